// Rows of the expanded tensor in shared memory: activation(norm(x * weight^T)) of a group of rows of x, by tensor
// cores.
//
// Threads and data. The pixels of a group, of all of its rows, are one matrix, cut into fragments of 16 pixels. A warp
// takes one or two of them at a time, and all kExpandedChannels channels: it reads the pixels by ldmatrix once and the
// weights once for each one or two fragments; two where each warp has some. Both are in shared memory in slices of 64
// bytes of a row (pointwise_product.cuh), pixels after each other. The rows of the weights are in such an order that a
// thread's sums of a pixel are those of 12 neighbouring channels: 24 bytes, which a warp stores without a conflict of
// banks.
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
  __device__ __forceinline__ unsigned operator()(unsigned value) const {
    return static_cast<unsigned>(static_cast<uint64_t>(value) * multiplier >> 31);
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

// The share of a thread in what a block copies to slices: one chunk of every slice, of rows `at_once` apart, which are
// swizzled alike.
template <int kThreads>
struct ExpandShare {
  unsigned row, chunk, at_once;  // the first row; of 16 bytes in a slice; rows that the block copies at once

  __device__ __forceinline__ explicit ExpandShare(const ExpandDepthwisePlan& plan) {
    const unsigned lanes = plan.chunks > 2 ? kSliceChunks : 2;  // of a row
    row = threadIdx.x / lanes, chunk = threadIdx.x % lanes, at_once = kThreads / lanes;
  }
};

// Weights of T by cp.async, float32 ones through registers. Channels after the last one repeat it.
template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void load_expand_weights(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                    int first_channel, unsigned char* weights) {
  constexpr int V = kVectorOf<T>;
  const ExpandShare<kThreads> share(plan);
  const int in_channels = static_cast<int>(p.in_channels), last = static_cast<int>(p.out_channels) - 1;
#pragma unroll 1
  for (unsigned row = share.row; row < kExpandedChannels; row += share.at_once) {
    const int wanted = first_channel + expanded_channel_of(static_cast<int>(row));
    const int64_t from = int64_t(wanted < last ? wanted : last) * in_channels;
    unsigned char* to = weights + chunk_offset(static_cast<int>(row), static_cast<int>(share.chunk));
#pragma unroll 1
    for (int chunk = static_cast<int>(share.chunk); chunk < plan.chunks; chunk += kSliceChunks) {
      const int k = chunk * V, inside = k < in_channels ? k : 0, valid = k < in_channels ? 16 : 0;
      if (p.weight.dtype != DType::kFloat32) {
        cp_async_16(shared_address(to), static_cast<const T*>(p.weight.data) + (from + inside), valid);
      } else {
        float value[V] = {};
        if (valid > 0) load(static_cast<const float*>(p.weight.data) + (from + inside), value);
        store(reinterpret_cast<T*>(to), value);
      }
      to += kExpandedChannels * kPointwiseSliceBytes;
    }
  }
}

// Asks for `rows` rows of x from `first_row` on; `image`: the first pixel of the first column. A slice after another,
// and of each two pixels in a row: that keeps addresses to an addition or two, and the compiler puts three instructions
// that do nothing in front of a cp.async that follows a branch.
template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void load_expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                 const ExpandColumns& columns, const T* image, int width, int first_row,
                                                 int rows, unsigned char* stage) {
  constexpr int kBytes = kSliceChunks * 16, kAtOnce = 2;
  const ExpandShare<kThreads> share(plan);
  const unsigned pixels = rows * columns.count, unit = pixels > kPixelsOfSingles ? 32 : 16;
  const unsigned padded = (pixels + unit - 1) / unit * unit;  // as padded_pixels of the plan
  const unsigned left_out = width - columns.count, pixel_bytes = static_cast<unsigned>(p.x_stride_p) * sizeof(T);
  const int x_bytes = static_cast<int>(p.in_channels) * static_cast<int>(sizeof(T)), end = plan.chunks * 16;
  const unsigned char* const first =
      reinterpret_cast<const unsigned char*>(image) + int64_t(first_row * width) * pixel_bytes;
  const auto copy = [&](const auto& offset_of) {
    SharedAddress of_slice =
        shared_address(stage) + chunk_offset(static_cast<int>(share.row), static_cast<int>(share.chunk));
#pragma unroll 1
    for (int at = static_cast<int>(share.chunk) * 16; at < end; at += kBytes) {
      const int valid = at < x_bytes ? 16 : 0;
      const unsigned char* const from = first + (valid > 0 ? at : 0);
      SharedAddress to = of_slice;
#pragma unroll 1
      for (unsigned first_place = share.row; first_place < padded; first_place += kAtOnce * share.at_once) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const unsigned place = first_place + i * share.at_once;
          cp_async_16_if(place < padded, to, from + offset_of(min(place, pixels - 1)), valid);
          to += share.at_once * kPointwiseSliceBytes;
        }
      }
      of_slice += plan.stage_pixels * kPointwiseSliceBytes;
    }
  };
  if (left_out == 0)
    copy([&](unsigned pixel) { return pixel * pixel_bytes; });
  else
    copy([&](unsigned pixel) { return (pixel + columns.rows(pixel) * left_out) * pixel_bytes; });
}

// Places of the pixels of a group in the ring, in units of 16 bytes, where its first row is row 0 of the ring. All
// threads; ends without a barrier. A place read is five instructions, a place computed some twenty.
template <int kThreads>
__device__ __forceinline__ void set_places(const ExpandDepthwisePlan& plan, const ExpandColumns& columns,
                                           uint16_t* places) {
  constexpr int kUnit = 16, kPixelUnits = kExpandedChannels * 2 / kUnit;
  const int pixels = plan.group_rows * columns.count;
#pragma unroll 1
  for (int pixel = static_cast<int>(threadIdx.x); pixel < pixels; pixel += kThreads) {
    const int row = static_cast<int>(columns.rows(pixel)), column = pixel - row * columns.count + columns.in_ring;
    places[pixel] = static_cast<uint16_t>(row * (plan.ring_row_bytes / kUnit) + column * kPixelUnits);
  }
}

// Expands the `rows` rows in `stage` into the ring, the first into row `first_slot`; a warp M fragments at a time.
// `norm`: scales, then shifts; `places`: see set_places.
template <class T, int M, int kThreads>
__device__ __forceinline__ void expand_fragments(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                 const unsigned char* stage, const unsigned char* weights,
                                                 const float* norm, const uint16_t* places, int pixels, int first_slot,
                                                 unsigned char* ring) {
  constexpr int kOwn = kExpandedChannels / 4, kFragments = kExpandedChannels / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const unsigned ring_bytes = plan.ring_rows * plan.ring_row_bytes, start = first_slot * plan.ring_row_bytes;
  unsigned char* const own = ring + t * kOwn * sizeof(T);
  const TileGate<M> no_gate;
#pragma unroll 1
  for (int first = warp * 16 * M; first < pixels; first += kThreads / 32 * 16 * M) {
    float acc[M][kFragments][4] = {};
    const unsigned char* x = stage + first * kPointwiseSliceBytes;
    const unsigned char* weight = weights;
#pragma unroll 1
    for (int left = plan.chunks * kVectorOf<T>; left > 0; left -= kSliceChunks * kVectorOf<T>) {
      multiply_tensor16<T>(acc, x, weight, no_gate, left);
      x += plan.stage_pixels * kPointwiseSliceBytes, weight += kExpandedChannels * kPointwiseSliceBytes;
    }
    float value[2 * M][kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; c += 4) {
      const Vector<float, 4> scale = *reinterpret_cast<const Vector<float, 4>*>(norm + t * kOwn + c);
      const Vector<float, 4> shift =
          *reinterpret_cast<const Vector<float, 4>*>(norm + kExpandedChannels + t * kOwn + c);
#pragma unroll
      for (int half = 0; half < 2 * M; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          value[half][c + e] = fmaf(acc[half / 2][c / 2 + e / 2][half % 2 * 2 + e % 2], scale.at[e], shift.at[e]);
    }
    activate<T>(reinterpret_cast<float (&)[2 * M * kOwn]>(value), p.activation);
    const uint16_t* const place = places + first + g;
    const int inside = pixels - first - g;
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
      if (half * 8 >= inside) break;
      // The ring's end is its beginning; below it the difference is a large number.
      const unsigned at = place[half * 8] * 16u + start;
      T* const to = reinterpret_cast<T*>(own + min(at, at - ring_bytes));
#pragma unroll
      for (int c = 0; c < kOwn; c += 4) {
        float part[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) part[e] = value[half][c + e];
        store(to + c, part);
      }
    }
  }
}

template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                            const ExpandColumns& columns, const unsigned char* stage,
                                            const unsigned char* weights, const float* norm, const uint16_t* places,
                                            int rows, int first_slot, unsigned char* ring) {
  const int pixels = rows * columns.count;
  if (pixels > kPixelsOfSingles)
    expand_fragments<T, 2, kThreads>(p, plan, stage, weights, norm, places, pixels, first_slot, ring);
  else
    expand_fragments<T, 1, kThreads>(p, plan, stage, weights, norm, places, pixels, first_slot, ring);
}

}  // namespace effkernels::cuda
