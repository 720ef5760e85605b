// Shared by the two matrix products of this folder (pointwise.cpp, conv.cpp): which convolutions are which, the size of
// a tile and the code that writes a finished tile.
#pragma once
#include "activation.h"
#include "pack.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

#if defined(EFFKERNELS_ISA_AMX_BF16)
inline constexpr bool kByTiles = true;  // amx.h
inline constexpr int kRows = 32;
#else
inline constexpr bool kByTiles = false;
// kRows * (kPanel / kLanes) accumulators leave room for a panel's vectors and one broadcast among 32 (AVX-512) or 16
// registers.
inline constexpr int kRows = kLanes == 16 ? 14 : 6;
#endif
inline constexpr int kPanelVecs = 2;
inline constexpr int kPanel = kPanelVecs * kLanes;
inline constexpr int64_t kPackedBytes = 384 * 1024;  // of the second-level cache, 1 MiB or more on current servers

// Whether the windows of a dense convolution are copied to the rows of a product (conv.cpp).
inline constexpr int64_t kFewestOfWindows = 5;   // input channels
inline constexpr int64_t kLongestWindow = 8192;  // values of a window, which is copied to the stack
inline bool goes_by_windows(const ConvParams& p) {
  return p.x_stride_c == 1 && p.x_stride_w == p.in_channels && p.in_channels >= kFewestOfWindows &&
         p.in_channels * p.kernel_h * p.kernel_w <= kLongestWindow;
}

inline constexpr int64_t kBlock = 128;  // products summed in one chain

// The sums of a block into acc[Rows][Vecs * kLanes], the first overwrites what was there.
template <int Rows, int Vecs>
EFFKERNELS_INLINE void add_block(const Vec (&sum)[Rows][Vecs], bool first, float* acc) {
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < Vecs; v++) {
      float* place = acc + (r * Vecs + v) * kLanes;
      store(place, first ? sum[r][v] : sum[r][v] + load(place));
    }
}

// One row of the result: where it goes, and what is added to it.
template <class T>
struct Row {
  T* y;
  const T* residual;
};

// y = activation(acc * scale + shift) + residual for columns [n0, n0 + columns) of row_count rows; past: see
// is_past_caches.
template <class T, Activation A>
inline void write(const float* acc, const Row<T>* rows, int row_count, int64_t n0, int columns, const float* scale,
                  const float* shift, bool past = false) {
  const int width = int(round_up(columns, kLanes));
  for (int r = 0; r < row_count; r++)
    for (int c = 0; c < columns; c += kLanes) {
      const int n = columns - c;
      Vec v = activate<A, T>(load(acc + r * width + c) * load(scale + c) + load(shift + c));
      if (rows[r].residual) v += load_up_to(rows[r].residual + n0 + c, n);
      store_past(rows[r].y + n0 + c, v, n, past);
    }
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
