// The tile instructions of amx_bf16 in plain C++, under the names of their intrinsics, for processors without them.
//
// They compute what Intel's manual says (volume 2, TDPBF16PS): within an instruction the first and the second products
// of all pairs are summed apart, by fused multiply-adds, and the sum of both is added to the result. Each step is
// rounded to nearest, and denormal operands and results are zero, whatever the processor's mode. What the instructions
// would refuse with a signal stops the process with a message.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) ::amx_model::tiles().load_configuration(from)
#define _tile_release() ::amx_model::tiles().release()
#define _tile_zero(tile) ::amx_model::tiles().zero(tile)
#define _tile_loadd(tile, base, stride) ::amx_model::tiles().load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx_model::tiles().store(tile, base, stride)
#define _tile_dpbf16ps(sum, a, b) ::amx_model::tiles().multiply_add(sum, a, b)

namespace amx_model {

// Of all threads, since the process started.
struct Counts {
  std::atomic<int64_t> configurations{0}, releases{0}, products{0};
};
inline Counts counts;

class Tiles {
 public:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

  void load_configuration(const void* from) {
    unsigned char bytes[64];
    std::memcpy(bytes, from, 64);
    check(bytes[0] == 1, "the palette is not 1");
    for (int i = 1; i < 16; i++) check(bytes[i] == 0, "a reserved byte, or the row to start at, is not 0");
    for (int tile = 0; tile < 16; tile++) {
      uint16_t row_bytes;
      std::memcpy(&row_bytes, bytes + 16 + 2 * tile, 2);
      const int rows = bytes[48 + tile];
      check(row_bytes <= kRowBytes && rows <= kRows && (row_bytes == 0) == (rows == 0), "a tile has a wrong size");
      check(tile < kTiles || rows == 0, "palette 1 has eight tiles");
      if (tile < kTiles) shapes_[tile] = {rows, row_bytes};
    }
    std::memset(data_, 0, sizeof data_);
    configured_ = true;
    counts.configurations++;
  }

  void release() {
    std::memset(data_, 0, sizeof data_);
    configured_ = false;
    counts.releases++;
  }

  void zero(int tile) {
    check_tile(tile);
    std::memset(data_[tile], 0, sizeof data_[tile]);
  }

  void load(int tile, const void* base, int64_t stride) {
    zero(tile);
    for (int row = 0; row < shapes_[tile].rows; row++)
      std::memcpy(data_[tile][row], static_cast<const char*>(base) + row * stride, size_t(shapes_[tile].row_bytes));
  }

  void store(int tile, void* base, int64_t stride) {
    check_tile(tile);
    for (int row = 0; row < shapes_[tile].rows; row++)
      std::memcpy(static_cast<char*>(base) + row * stride, data_[tile][row], size_t(shapes_[tile].row_bytes));
  }

  void multiply_add(int sum, int a, int b) {
    check_tile(sum), check_tile(a), check_tile(b);
    check(sum != a && sum != b && a != b, "a product names a tile twice");
    const Shape &s = shapes_[sum], &left = shapes_[a], &right = shapes_[b];
    check(s.row_bytes % 4 == 0 && left.row_bytes % 4 == 0 && left.rows == s.rows && right.row_bytes == s.row_bytes &&
              right.rows == left.row_bytes / 4,
          "the sizes of a product do not match");
    counts.products++;
    const int columns = s.row_bytes / 4;
    for (int m = 0; m < s.rows; m++) {
      float first[16] = {}, second[16] = {};
      for (int k = 0; k < right.rows; k++) {
        const float a_first = half_of(data_[a][m] + 4 * k), a_second = half_of(data_[a][m] + 4 * k + 2);
        for (int n = 0; n < columns; n++) {
          first[n] = flushed(std::fma(a_first, half_of(data_[b][k] + 4 * n), first[n]));
          second[n] = flushed(std::fma(a_second, half_of(data_[b][k] + 4 * n + 2), second[n]));
        }
      }
      float total[16] = {};
      std::memcpy(total, data_[sum][m], kRowBytes);
      for (int n = 0; n < columns; n++) total[n] = flushed(flushed(total[n]) + flushed(first[n] + second[n]));
      std::memset(data_[sum][m], 0, kRowBytes);
      std::memcpy(data_[sum][m], total, size_t(s.row_bytes));
    }
  }

 private:
  struct Shape {
    int rows = 0, row_bytes = 0;
  };

  static void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "amx model: %s\n", what);
    std::abort();
  }
  void check_tile(int tile) const {
    check(configured_, "tiles are used without a configuration");
    check(tile >= 0 && tile < kTiles && shapes_[tile].rows > 0, "a tile is used that was not configured");
  }
  static float flushed(float v) { return std::fabs(v) < 1.17549435e-38f ? std::copysign(0.f, v) : v; }
  static float half_of(const unsigned char* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return flushed(v);
  }

  bool configured_ = false;
  Shape shapes_[kTiles];
  unsigned char data_[kTiles][kRows][kRowBytes] = {};
};

// Of the calling thread.
inline Tiles& tiles() {
  static thread_local Tiles mine;
  return mine;
}

}  // namespace amx_model
