// acc += rows of x times columns of weight over one slice of k, by the three ways of PointwiseProduct. All three leave
// the sums where mma.sync does: with g = lane / 4 and t = lane % 4, acc[i][j] holds of fragment (i, j), 16x8 of y,
//   row g: columns 2t, 2t+1; row g + 8: columns 2t, 2t+1.
//
// In shared memory a row of a slice is 64 bytes, four chunks of 16. Chunk c of row r is at c ^ (r / 2 % 4), so that
// any eight consecutive rows, and any four rows two apart, hold one chunk number in different banks.
#pragma once
#include "numeric.cuh"
#include "pointwise.h"

namespace effkernels::cuda {

constexpr int kSliceChunks = kPointwiseSliceBytes / 16;

__device__ __forceinline__ int chunk_offset(int row, int chunk) {  // in bytes
  return row * kPointwiseSliceBytes + ((chunk ^ ((row >> 1) & (kSliceChunks - 1))) << 4);
}

// The images that the rows of a warp are of, where there are gates.
enum class TileGates { kNone, kOne, kSeveral };

// The gates that apply to the M * 16 rows of a warp, in shared memory as elements of x's type.
template <int M>
struct TileGate {
  const unsigned char* slice = nullptr;  // of the tile's images, at the k of the slice of x; null: no gate
  TileGates kind = TileGates::kOne;
  uint32_t offsets[M] = {};  // those of the thread's rows i * 16 + g are there and, << 16, of i * 16 + 8 + g

  // The gates of the thread's row i * 16 + half * 8 + g.
  __device__ __forceinline__ const unsigned char* of(int i, int half) const {
    return slice + (half == 0 ? offsets[i] & 0xffffu : offsets[i] >> 16);
  }
};

__device__ __forceinline__ uint32_t multiply_pair(uint32_t value, const __half* gate) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&value), *reinterpret_cast<const __half2*>(gate));
  return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ __forceinline__ uint32_t multiply_pair(uint32_t value, const __nv_bfloat16* gate) {
  const __nv_bfloat162 product =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&value), *reinterpret_cast<const __nv_bfloat162*>(gate));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// A warp's product of a slice. A few columns are read for all k of the slice at a time, for the least addresses; of
// many columns there is a register for half of it only.
template <class T, int M, int N>
class SliceProduct {
 public:
  // x, weight: the warp's first row and first column of a slice, aligned to 64 bytes.
  __device__ __forceinline__ SliceProduct(const unsigned char* x, const unsigned char* weight) {
    const int lane = threadIdx.x % 32;
    move_x(x);
    weight_ = shared_address(weight) +
              (kHalves ? chunk_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) : chunk_offset(lane % 8, lane / 8));
  }

  __device__ __forceinline__ void move_x(const unsigned char* x) {
    const int lane = threadIdx.x % 32;
    x_ = shared_address(x) + chunk_offset(lane % 16, lane / 16);
  }
  // To other slices, so many bytes further.
  __device__ __forceinline__ void advance(int x, int weight) { x_ += x, weight_ += weight; }

  // All k of the slices, which are zero outside of x.
  template <TileGates kGates>
  __device__ __forceinline__ void multiply(float (&acc)[M][N][4], const TileGate<M>& gate) const {
    uint32_t a[2][M][4];
    if constexpr (kHalves) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        read<kGates>(a[0], k, gate);
        multiply_half(acc, a[0], half_of(weight_, k));
      }
    } else {
      read<kGates>(a[0], 0, gate);
      read<kGates>(a[1], 1, gate);
      multiply_all(acc, a, weight_);
    }
  }

 private:
  // The same for half `k`: a multiple of 64 was added to what the constructor formed.
  static __device__ __forceinline__ SharedAddress half_of(SharedAddress address, int k) { return address ^ (k * 32); }

  static constexpr bool kHalves = N > 6;
  static_assert(!kHalves || N % 2 == 0, "two fragments of the weight at a time");

  template <TileGates kGates>
  __device__ __forceinline__ void read(uint32_t (&a)[M][4], int k, const TileGate<M>& gate) const {
#pragma unroll
    for (int i = 0; i < M; ++i) ldmatrix_x4(a[i], half_of(x_, k) + i * 16 * kPointwiseSliceBytes);
    if constexpr (kGates != TileGates::kNone) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const unsigned char* const gates = kGates == TileGates::kOne ? gate.of(0, 1) : gate.of(i, e % 2);
          a[i][e] = multiply_pair(a[i][e], reinterpret_cast<const T*>(gates + k * 32) + e / 2 * 8);
        }
    }
  }

  static __device__ __forceinline__ void multiply_half(float (&acc)[M][N][4], const uint32_t (&a)[M][4],
                                                       SharedAddress weight) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, weight + j * 8 * kPointwiseSliceBytes);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t pair[2] = {b[2 * e], b[2 * e + 1]};
#pragma unroll
        for (int i = 0; i < M; ++i) mma_m16n8k16<T>(acc[i][j + e], a[i], pair);
      }
    }
  }

  static __device__ __forceinline__ void multiply_all(float (&acc)[M][N][4], const uint32_t (&a)[2][M][4],
                                                      SharedAddress weight) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t b[2][4];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (j + e < N) ldmatrix_x4(b[e], weight + (j + e) * 8 * kPointwiseSliceBytes);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (j + e >= N) break;
          const uint32_t pair[2] = {b[e][2 * k], b[e][2 * k + 1]};
#pragma unroll
          for (int i = 0; i < M; ++i) mma_m16n8k16<T>(acc[i][j + e], a[k][i], pair);
        }
    }
  }

  SharedAddress x_, weight_;  // where the lane reads by ldmatrix
};

// The same with all addresses formed here, and the fragments of one half of k at a time. x, weight: the warp's first
// row and first column of the slice. left: how many of its k there are; columns: how many of N * 8, in pairs of 8.
template <class T, int M, int N>
__device__ __forceinline__ void multiply_tensor16(float (&acc)[M][N][4], const unsigned char* x,
                                                  const unsigned char* weight, const TileGate<M>& gate, int left,
                                                  int columns = N * 8) {
  const int lane = threadIdx.x % 32;
  const SharedAddress x_rows = shared_address(x), weight_rows = shared_address(weight);
  const int x_row = lane % 16, x_chunk = lane / 16;
  const int weight_row = lane % 8 + lane / 16 * 8, weight_chunk = lane / 8 % 2;
  uint32_t odd[4];  // the last of an odd number of fragments, for both halves of the slice
  if constexpr (N % 2 == 1) ldmatrix_x4(odd, weight_rows + chunk_offset((N - 1) * 8 + lane % 8, lane / 8));
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k * 16 >= left) break;
    uint32_t a[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i) ldmatrix_x4(a[i], x_rows + chunk_offset(i * 16 + x_row, 2 * k + x_chunk));
    if (gate.slice != nullptr) {
      const T* const gates = reinterpret_cast<const T*>(gate.slice + (k * 32 + lane % 4 * 4));
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = multiply_pair(a[i][e], gates + e / 2 * 8);
    }
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      if (j * 8 >= columns) break;
      uint32_t b[4];
      if (j + 1 < N) {
        ldmatrix_x4(b, weight_rows + chunk_offset(j * 8 + weight_row, 2 * k + weight_chunk));
      } else {
        b[0] = odd[2 * k], b[1] = odd[2 * k + 1];
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (j + e >= N) break;
        const uint32_t pair[2] = {b[2 * e], b[2 * e + 1]};
#pragma unroll
        for (int i = 0; i < M; ++i) mma_m16n8k16<T>(acc[i][j + e], a[i], pair);
      }
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void multiply_tf32(float (&acc)[M][N][4], const unsigned char* x,
                                              const unsigned char* weight, const TileGate<M>& gate, int left) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto at = [t](const unsigned char* rows, int row, int chunk) {
    return reinterpret_cast<const float*>(rows + chunk_offset(row, chunk))[t];
  };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k * 8 >= left) break;
    uint32_t b[N][2];
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) b[j][h] = to_tf32(at(weight, j * 8 + g, 2 * k + h));
#pragma unroll
    for (int i = 0; i < M; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int row = i * 16 + g + h % 2 * 8;
        float value = at(x, row, 2 * k + h / 2);
        if (gate.slice != nullptr) value *= reinterpret_cast<const float*>(gate.of(i, h % 2))[k * 8 + h / 2 * 4];
        a[h] = to_tf32(value);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) mma_m16n8k8_tf32(acc[i][j], a, b[j]);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void multiply_add(float (&acc)[M][N][4], const unsigned char* x, const unsigned char* weight,
                                             const TileGate<M>& gate, int left) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto at = [](const unsigned char* rows, int row, int chunk) {
    return *reinterpret_cast<const float4*>(rows + chunk_offset(row, chunk));
  };
#pragma unroll
  for (int chunk = 0; chunk < kSliceChunks; ++chunk) {
    if (chunk * 4 >= left) break;
    float4 b[N][2];
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) b[j][h] = at(weight, j * 8 + 2 * t + h, chunk);
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8 + g;
        float4 a = at(x, row, chunk);
        if (gate.slice != nullptr) {
          const float4 by = reinterpret_cast<const float4*>(gate.of(i, half))[chunk];
          a.x *= by.x, a.y *= by.y, a.z *= by.z, a.w *= by.w;
        }
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& sum = acc[i][j][half * 2 + h];
            sum = fmaf(a.x, b[j][h].x, sum);
            sum = fmaf(a.y, b[j][h].y, sum);
            sum = fmaf(a.z, b[j][h].z, sum);
            sum = fmaf(a.w, b[j][h].w, sum);
          }
      }
  }
}

}  // namespace effkernels::cuda
