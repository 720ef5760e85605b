// The tiles of amx_bf16: which products go by them, their configuration, and the product of a tile of rows by a panel.
//
// A tile register holds 16 rows of 64 bytes: 16 words of 16 rows of x, as prepare_row (tile.h) writes a chunk, 16 words
// of 16 columns of a panel, or 16 by 16 float32 sums. One instruction adds the product of two tiles to a third, 8192
// multiply-adds. Two tiles of rows by two of columns, each loaded once for two products, fill the eight registers.
//
// Every tile is a whole one, so that one configuration serves all products: words past the last k are zero in the rows
// and in the panel (PairTiles), and sums of rows and columns that do not exist are never read.
//
// The tests compile this file without the instructions, with EFFKERNELS_AMX_MODEL: tests/amx/tiles.h computes what they
// do.
#pragma once
#include <atomic>

#include "product.h"

#if defined(EFFKERNELS_AMX_MODEL)
#include "tiles.h"
#endif

namespace effkernels::cpu::EFFKERNELS_ISA {

inline constexpr int kTileRows = 16, kTileWords = 16;
static_assert(kTileWords == kLanes && kRows == 2 * kTileRows && kPanel == 2 * kLanes && kBlock % kTileWords == 0);

// Cycles, none of them measured here. Published for Sapphire Rapids: a product of tiles starts every 16 cycles, and
// vectors of pairs make two products a cycle. Assumed: a product that adds to the result of the last waits 52 cycles
// for it, and loading a configuration takes 200.
inline constexpr double kTileCycles = 16, kTileLatency = 52, kConfigureCycles = 200;

// Whether a product of so many pixels of an image, output channels and input channels goes by tiles: where that takes
// fewer cycles than vectors of pairs. Of the pixels, not of all rows: the sums round differently, and an image must
// have the same bits in any batch. `packed_size` has room for whole tiles from 16 input channels on.
constexpr bool pays_by_tiles(int64_t pixels, int64_t out_channels, int64_t in_channels) {
  if (pixels < 2 || in_channels < kTileWords) return false;
  const double panels = double(ceil_div(out_channels, kPanel)), words = double(ceil_div(in_channels, 2));
  const int64_t left = pixels % kRows;
  const double rest = left == 0 ? 0 : left > kTileRows ? 4 * kTileCycles : kTileLatency;
  const double chunks = double(ceil_div(in_channels, 2 * kTileWords));
  const double by_tiles = kConfigureCycles + panels * chunks * (double(pixels / kRows) * 4 * kTileCycles + rest);
  return by_tiles < panels * words * double(max_of<int64_t>(pixels, 4));
}

// As ldtilecfg reads it: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

// The calling thread's tiles while it works on a share. Between kernels they are as if they had never been used: no
// other code meets a configuration of ours, and the system need not save eight KiB when it switches threads.
class TileScope {
 public:
  TileScope() {
    static constexpr TileConfiguration configuration{};
    _tile_loadconfig(&configuration);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Rows of words: a tile that was prepared, [chunk][row][16 words], or rows of x as they are.
struct TileRows {
  const void* data;
  int64_t row_step, chunk_step;  // in bytes
  TileRows(const float* tile) : data(tile), row_step(kTileWords * 4), chunk_step(kRows * kTileWords * 4) {}
  TileRows(const BFloat16* x, int64_t k) : data(x), row_step(k * 2), chunk_step(kTileWords * 4) {}
};

// x where full tiles are read from it as it is, else null: rows of whole chunks, one after the other, that no gate
// multiplies. In a product of few panels, preparing them would be a good part of the work.
inline const void* rows_in_place(const PointwiseParams& p) {
  const bool whole = !p.gate.data && p.in_channels % (2 * kTileWords) == 0 && p.x_stride_p == p.in_channels &&
                     (p.batch == 1 || p.x_stride_n == p.pixels * p.in_channels);
  return whole ? p.x : nullptr;
}

// acc[RowTiles * 16][Vecs * 16] = rows * panel, as `multiply` in tile.h. Sums of kBlock words are added up apart, too.
template <int RowTiles, int Vecs>
void multiply_tiles(TileRows rows, const float* panel, int64_t words, float* acc) {
  constexpr int64_t kBytes = kTileWords * 4, kSumBytes = Vecs * kBytes;
  const char* tile = static_cast<const char*>(rows.data);
  constexpr int64_t kBelow = kTileRows * Vecs * kLanes;  // from the sums of a tile to those of the one below
  alignas(64) float later[RowTiles * kBelow];
  std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC's _tile_loadd does not say that it reads memory
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    _tile_zero(0);
    if constexpr (Vecs > 1) _tile_zero(1);
    if constexpr (RowTiles > 1) _tile_zero(2);
    if constexpr (RowTiles > 1 && Vecs > 1) _tile_zero(3);
    for (int64_t k = begin; k < min_of(begin + kBlock, words); k += kTileWords) {
      _tile_loadd(4, tile, rows.row_step);
      _tile_loadd(6, panel, kBytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Vecs > 1) {
        _tile_loadd(7, panel + words * kLanes, kBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (RowTiles > 1) {
        _tile_loadd(5, tile + kTileRows * rows.row_step, rows.row_step);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Vecs > 1) _tile_dpbf16ps(3, 5, 7);
      }
      tile += rows.chunk_step, panel += kTileWords * kLanes;
    }
    float* const to = begin == 0 ? acc : later;
    _tile_stored(0, to, kSumBytes);
    if constexpr (Vecs > 1) _tile_stored(1, to + kLanes, kSumBytes);
    if constexpr (RowTiles > 1) _tile_stored(2, to + kBelow, kSumBytes);
    if constexpr (RowTiles > 1 && Vecs > 1) _tile_stored(3, to + kBelow + kLanes, kSumBytes);
    if (begin > 0)
      for (int64_t i = 0; i < RowTiles * kBelow; i += kLanes) store(acc + i, load(later + i) + load(acc + i));
  }
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
