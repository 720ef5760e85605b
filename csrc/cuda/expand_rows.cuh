// Rows of the expanded tensor in shared memory: activation(norm(x * weight^T)) of a group of rows of x, by tensor
// cores.
//
// Threads and data. The pixels of a group, of all of its rows, are one matrix, cut into fragments of 16 pixels. A warp
// takes every fourth fragment and all kExpandedChannels channels of it: it reads the pixels by ldmatrix once and the
// weights once for each fragment. Both are in shared memory in slices of 64 bytes of a row (pointwise_product.cuh),
// pixels after each other. The rows of the weights are in such an order that a thread's sums of a pixel are those of 12
// neighbouring channels: 24 bytes, which a warp stores without a conflict of banks.
//
// Traffic. Weights from memory once for each block. x by cp.async, for the next group while the depthwise convolution
// of this one is computed. Input channels outside of x become zero, pixels after the last one repeat it.
#pragma once
#include "expand_depthwise.h"
#include "pointwise_product.cuh"

namespace effkernels::cuda {

// n / divisor where n * divisor < 2^31.
struct SmallDivisor {
  uint32_t multiplier;

  __device__ __forceinline__ explicit SmallDivisor(uint32_t multiplier_) : multiplier(multiplier_) {}
  __device__ __forceinline__ int operator()(int value) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(value)) * multiplier >> 31);
  }
};

// The columns of x that a block reads, and where they are in a row of the ring.
struct ExpandColumns {
  int first, count;   // of x
  int in_ring;        // of the first of them; what is left and right of them in the ring is padding
  SmallDivisor rows;  // from pixels of a group to rows

  __device__ __forceinline__ ExpandColumns(const DepthwiseParams& p, int first_out, int out_count) : rows(0) {
    const int left = first_out * p.stride - p.pad_left, end = left + (out_count - 1) * p.stride + p.kernel_w;
    const int width = static_cast<int>(p.width);
    first = left > 0 ? left : 0;
    count = (end < width ? end : width) - first;
    in_ring = first - left;
    rows = SmallDivisor((1u << 31) / static_cast<unsigned>(count) + 1);
  }
};

// The channel whose weights are in row `row` of a slice: see the sums of a thread in pointwise_product.cuh.
__device__ __forceinline__ int expanded_channel_of(int row) {
  constexpr int kOwn = kExpandedChannels / 4;  // of a thread
  return row % 8 / 2 * kOwn + row / 8 * 2 + row % 2;
}

// Weights of T by cp.async, float32 ones through registers. Channels after the last one repeat it.
template <class T>
__device__ __forceinline__ void load_expand_weights(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                    int first_channel, unsigned char* weights) {
  constexpr int V = kVectorOf<T>;
  const SmallDivisor by_chunks(plan.by_chunks);
  const int in_channels = static_cast<int>(p.in_channels), last = static_cast<int>(p.out_channels) - 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < kExpandedChannels * plan.chunks; i += kDepthwiseThreads) {
    const int row = by_chunks(i), chunk = i - row * plan.chunks, k = chunk * V;
    const int wanted = first_channel + expanded_channel_of(row), channel = wanted < last ? wanted : last;
    const bool inside = k < in_channels;
    const int64_t from = int64_t(channel) * in_channels + (inside ? k : 0);
    unsigned char* const to = weights + chunk / kSliceChunks * (kExpandedChannels * kPointwiseSliceBytes) +
                              chunk_offset(row, chunk % kSliceChunks);
    if (p.weight.dtype != DType::kFloat32) {
      cp_async_16(shared_address(to), static_cast<const T*>(p.weight.data) + from, inside ? 16 : 0);
    } else {
      float value[V] = {};
      if (inside) load(static_cast<const float*>(p.weight.data) + from, value);
      store(reinterpret_cast<T*>(to), value);
    }
  }
}

// Asks for `rows` rows of x from `first_row` on; `image`: the first pixel of the first column.
template <class T>
__device__ __forceinline__ void load_expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                 const ExpandColumns& columns, const T* image, int width, int first_row,
                                                 int rows, unsigned char* stage) {
  constexpr int V = kVectorOf<T>;
  const SmallDivisor by_chunks(plan.by_chunks);
  const int pixels = rows * columns.count, padded = (pixels + 15) / 16 * 16;
  const int in_channels = static_cast<int>(p.in_channels), stride = static_cast<int>(p.x_stride_p);
  const SharedAddress to = shared_address(stage);
#pragma unroll 2
  for (int i = threadIdx.x; i < padded * plan.chunks; i += kDepthwiseThreads) {
    const int place = by_chunks(i), chunk = i - place * plan.chunks, k = chunk * V;
    const int pixel = place < pixels ? place : pixels - 1;
    const int row = columns.rows(pixel), column = pixel - row * columns.count;
    const bool inside = k < in_channels;
    const unsigned from = static_cast<unsigned>((first_row + row) * width + column) * static_cast<unsigned>(stride);
    cp_async_16(to + chunk / kSliceChunks * (plan.stage_pixels * kPointwiseSliceBytes) +
                    chunk_offset(place, chunk % kSliceChunks),
                image + from + (inside ? k : 0), inside ? 16 : 0);
  }
}

// Expands the `rows` rows in `stage` into the ring, the first into row `first_slot`. `norm`: scales, then shifts.
template <class T>
__device__ __forceinline__ void expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                            const ExpandColumns& columns, const unsigned char* stage,
                                            const unsigned char* weights, const float* norm, int rows, int first_slot,
                                            unsigned char* ring) {
  constexpr int kOwn = kExpandedChannels / 4, kFragments = kExpandedChannels / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int pixels = rows * columns.count;
  const TileGate<1> no_gate;
#pragma unroll 1
  for (int first = warp * 16; first < pixels; first += kDepthwiseThreads / 32 * 16) {
    float acc[1][kFragments][4] = {};
    const unsigned char* x = stage + first * kPointwiseSliceBytes;
    const unsigned char* weight = weights;
#pragma unroll 1
    for (int left = plan.chunks * kVectorOf<T>; left > 0; left -= kSliceChunks * kVectorOf<T>) {
      multiply_tensor16<T>(acc, x, weight, no_gate, left);
      x += plan.stage_pixels * kPointwiseSliceBytes, weight += kExpandedChannels * kPointwiseSliceBytes;
    }
    float value[2 * kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; c += 4) {
      const Vector<float, 4> scale = *reinterpret_cast<const Vector<float, 4>*>(norm + t * kOwn + c);
      const Vector<float, 4> shift =
          *reinterpret_cast<const Vector<float, 4>*>(norm + kExpandedChannels + t * kOwn + c);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          value[half * kOwn + c + e] = fmaf(acc[0][c / 2 + e / 2][half * 2 + e % 2], scale.at[e], shift.at[e]);
    }
    activate<T>(value, p.activation);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first + half * 8 + g;
      if (pixel >= pixels) break;
      const int row = columns.rows(pixel), column = pixel - row * columns.count + columns.in_ring;
      int slot = first_slot + row;
      if (slot >= plan.ring_rows) slot -= plan.ring_rows;
      T* const to = reinterpret_cast<T*>(ring + slot * plan.ring_row_bytes) + column * kExpandedChannels + t * kOwn;
#pragma unroll
      for (int c = 0; c < kOwn; c += 4) {
        float part[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) part[e] = value[half * kOwn + c + e];
        store(to + c, part);
      }
    }
  }
}

}  // namespace effkernels::cuda
