// A depthwise convolution by tensor cores, from rows of the expanded tensor in shared memory.
//
// A tap of 8 channels is a diagonal matrix, and the pixels under it are the rows of another one, so that mma.sync
// multiplies 16 pixels under two neighbouring taps of a row:
//
//   16 pixels x (8 channels of column c | 8 of column c + 1)   *   diagonal of tap kx        = 16 pixels x 8 channels
//                                                                  diagonal of tap kx + 1
//
// One factor in eight is no zero. Still an instruction does 256 multiply-adds with sums in float32, where plain ones
// take eight instructions, and four more to widen 8 channels of an input.
//
// Threads and data. A warp takes two parts of kWindowRows x kColumns pixels of the result and 8 channels. The 16
// pixels of a product are a column of each part, so that a pair of columns of the expanded tensor, read by one
// ldmatrix, is used for every column of the result whose windows have it, with other taps each time. A lane holds two
// channels of a row of each part: acc[column][2 * part + channel], channels 2t and 2t + 1 and row g of the part, with
// g = lane / 4 and t = lane % 4. It places tap and zero into the diagonal by a multiplication.
//
// Zero times infinity is NaN: a channel that is not finite spoils its neighbours, and a column those beside it. A lane
// that finds NaN among its results computes them again by plain multiply-adds.
//
// Traffic. Shared memory: kColumns * stride + K - stride columns for kColumns results, for each row of taps, as strips
// of so many pixels read them.
#pragma once
#include "mbconv.h"
#include "numeric.cuh"

namespace effkernels::cuda {

// Where two parts of the result are.
struct WindowParts {
  int row[2], column[2];  // the first ones of each
  bool exists[2];

  // Parts 2 * pair and 2 * pair + 1, the first of which exists.
  __device__ __forceinline__ WindowParts(const MBConvPlan& plan, int pair) {
    const unsigned columns = plan.column_parts;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      exists[i] = 2 * pair + i < plan.parts;
      const unsigned number = exists[i] ? 2 * pair + i : 2 * pair;
      const unsigned of_rows = static_cast<unsigned>(static_cast<uint64_t>(number) * plan.by_column_parts >> 31);
      row[i] = static_cast<int>(of_rows) * kWindowRows;
      column[i] = static_cast<int>(number - of_rows * columns) * plan.window_columns;
    }
  }
};

// The sums of a lane. `ring`: the vector's first channel of the first column and row, of padding where there is some;
// `taps`: (8, K, K), those of the vector's channels. Rows of the result after the last one repeat it.
template <class T, int K, int S, int kColumns>
class WindowProduct {
 public:
  using Sums = float[kColumns][4];

  __device__ __forceinline__ WindowProduct(const WindowParts& parts, const unsigned char* ring, int row_bytes,
                                           int out_height, const T* taps)
      : parts_(parts), ring_(ring), taps_(taps), row_bytes_(row_bytes), last_row_(out_height - 1) {}

  // All threads of the warp.
  __device__ __forceinline__ void multiply(Sums& acc) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    // Lane 8m + i reads row i of matrix m: of each part for a column, then for the next one.
    const bool of_first = lane / 8 % 2 == 0;
    SharedAddress from =
        shared_address(ring_) + lane / 16 * kPixelBytes +
        offset(of_first ? parts_.row[0] : parts_.row[1], lane % 8, of_first ? parts_.column[0] : parts_.column[1]);
    const uint32_t place = g / 2 != t ? 0u : g % 2 == 0 ? 1u : 1u << 16;
    const uint16_t* tap = reinterpret_cast<const uint16_t*>(taps_) + g * (K * K);
    clear(acc);
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
      uint32_t diagonal[K + 2];  // a zero, the taps, a zero
      diagonal[0] = diagonal[K + 1] = 0;
#pragma unroll
      for (int kx = 0; kx < K; ++kx) diagonal[kx + 1] = tap[kx] * place;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t columns[4];
        ldmatrix_x4(columns, from + 2 * pair * kPixelBytes);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int kx = 2 * pair - j * S;
          if (kx < -1 || kx >= K) continue;
          const uint32_t two[2] = {diagonal[kx + 1], diagonal[kx + 2]};
          mma_m16n8k16<T>(acc[j], columns, two);
        }
      }
      from += row_bytes_, tap += K;
    }
  }

  // The same without products of other channels and of other columns.
  __device__ __forceinline__ void multiply_alone(Sums& acc) const {
    const int lane = static_cast<int>(thread_here()) % 32, channel = lane % 4 * 2;
    const unsigned char* of_part[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      of_part[i] = ring_ + channel * sizeof(T) + offset(parts_.row[i], lane / 4, parts_.column[i]);
    clear(acc);
#pragma unroll 1
    for (int at = 0; at < K * K; ++at) {
      const int ky = at / K, place = ky * row_bytes_ + (at - ky * K) * kPixelBytes;
      const float tap[2] = {to_float(taps_[channel * (K * K) + at]), to_float(taps_[(channel + 1) * (K * K) + at])};
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float value[2];
          unpack(*reinterpret_cast<const Vector<T, 2>*>(of_part[i] + place + j * S * kPixelBytes), 0, value);
#pragma unroll
          for (int e = 0; e < 2; ++e) acc[j][2 * i + e] = fmaf(value[e], tap[e], acc[j][2 * i + e]);
        }
    }
  }

 private:
  static constexpr int kPixelBytes = kExpandedChannels * sizeof(T);
  static constexpr int kPairs = ((kColumns - 1) * S + K + 1) / 2;  // of columns under a part

  static __device__ __forceinline__ void clear(Sums& acc) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][e] = 0.f;
  }
  // Of the window of a pixel of the result in the ring.
  __device__ __forceinline__ int offset(int first_row, int row, int column) const {
    return min(first_row + row, last_row_) * S * row_bytes_ + column * (S * kPixelBytes);
  }

  const WindowParts& parts_;
  const unsigned char* ring_;
  const T* taps_;
  int row_bytes_, last_row_;
};

}  // namespace effkernels::cuda
