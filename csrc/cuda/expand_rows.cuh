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

  // `by_count`: multiplier_of the count, if it is known.
  __device__ __forceinline__ ExpandColumns(const DepthwiseParams& p, int first_out, int out_count,
                                           uint32_t by_count = 0)
      : rows(by_count) {
    const int left = first_out * p.stride - p.pad_left, end = left + (out_count - 1) * p.stride + p.kernel_w;
    const int width = static_cast<int>(p.width);
    first = left > 0 ? left : 0;
    count = (end < width ? end : width) - first;
    in_ring = first - left;
    if (by_count == 0) rows = SmallDivisor((1u << 31) / static_cast<unsigned>(count) + 1);
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

// Weights of T by cp.async, float32 ones through registers. Channels after the last one repeat it; after an odd number
// of chunks of input channels is one of zeros.
template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void load_expand_weights(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                    int first_channel, unsigned char* weights) {
  constexpr int V = kVectorOf<T>, kSlice = kExpandedChannels * kPointwiseSliceBytes;
  const ExpandShare<kThreads> share(plan);
  const int last = static_cast<int>(p.out_channels) - 1;
  const unsigned in_channels = static_cast<unsigned>(p.in_channels), first = share.chunk * V;
  const auto each_row = [&](const auto& copy) {
#pragma unroll 1
    for (unsigned row = share.row; row < kExpandedChannels; row += share.at_once) {
      const int channel = min(first_channel + expanded_channel_of(static_cast<int>(row)), last);
      unsigned char* to = weights + chunk_offset(static_cast<int>(row), static_cast<int>(share.chunk));
      const unsigned end = copy(channel, to);
      if (end < plan.chunks * V) *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  };
  if (p.weight.dtype != DType::kFloat32) {
    const unsigned char* const of_chunk = static_cast<const unsigned char*>(p.weight.data) + share.chunk * 16;
    each_row([&](int channel, unsigned char*& to) {
      const unsigned char* from = product_after(of_chunk, channel, in_channels * sizeof(T));
      unsigned k = first;
#pragma unroll 1
      for (; k < in_channels; k += kSliceChunks * V) {
        cp_async_16(shared_address(to), from);
        from += kSliceChunks * 16, to += kSlice;
      }
      return k;
    });
  } else {
    each_row([&](int channel, unsigned char*& to) {
      unsigned k = first;
#pragma unroll 1
      for (; k < in_channels; k += kSliceChunks * V) {
        float value[V];
        load(static_cast<const float*>(p.weight.data) + int64_t(channel) * in_channels + k, value);
        store(reinterpret_cast<T*>(to), value);
        to += kSlice;
      }
      return k;
    });
  }
}

// Asks for `rows` rows of x, of which `first` is the first pixel of the first column; `left_out`: columns between the
// last one and the first one of the next row. A thread takes kAtOnce pixels at a time and their slices one after
// another: the compiler puts three instructions that do nothing in front of a cp.async that follows a branch. All of
// the stage is written for `channels` of x, whatever the number of rows; the chunk after an odd number of them is not,
// see clear_odd_chunk.
template <class T, int kThreads = kDepthwiseThreads, int kAtOnce = 4>
__device__ __forceinline__ void load_expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                 const ExpandColumns& columns, const unsigned char* first, int left_out,
                                                 int rows, int channels, unsigned char* stage) {
  constexpr int kDistance = kThreads / kSliceChunks, kBytes = kSliceChunks * 16;
  const unsigned thread = thread_here();
  unsigned pixel = thread / kSliceChunks, chunk = thread % kSliceChunks;
  int step = kAtOnce * kDistance;
  if (plan.chunks == 2) pixel += chunk / 2 * step, chunk %= 2, step *= 2;  // two threads for a pixel
  const int stage_pixels = plan.stage_pixels, last = rows * columns.count - 1;
  const int own_bytes = channels * static_cast<int>(sizeof(T)) - static_cast<int>(chunk) * 16;
  const int pixel_bytes = static_cast<int>(p.x_stride_p * sizeof(T)), last_bytes = last * pixel_bytes;
  SharedAddress to_first = shared_address(stage) + chunk_offset(static_cast<int>(pixel), static_cast<int>(chunk));
  int next = static_cast<int>(pixel) * pixel_bytes;
  first += chunk * 16;
#pragma unroll 1
  for (int left = own_bytes > 0 ? stage_pixels - static_cast<int>(pixel) : 0; left > 0; left -= step) {
    int offset[kAtOnce];
    if (left_out == 0) {
      offset[0] = min(next, last_bytes);
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) offset[i] = min(offset[i - 1] + kDistance * pixel_bytes, last_bytes);
      next += step * pixel_bytes;
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = min(stage_pixels - left + i * kDistance, last);
        offset[i] = (at + static_cast<int>(columns.rows(at)) * left_out) * pixel_bytes;
      }
    }
    SharedAddress to = to_first;
    const unsigned char* from = first;
    const auto copy = [&](int ahead) {
#pragma unroll
      for (int i = kAtOnce - 1; i > 0; --i)
        cp_async_16_if(left > i * kDistance, to + i * kDistance * kPointwiseSliceBytes,
                       from + static_cast<unsigned>(offset[i]) + ahead);
      cp_async_16(to, from + static_cast<unsigned>(offset[0]) + ahead);
    };
#pragma unroll 1
    for (int bytes = own_bytes;; bytes -= 2 * kBytes) {
      copy(0);
      if (bytes <= kBytes) break;
      to += stage_pixels * kPointwiseSliceBytes;
      copy(kBytes);
      if (bytes <= 2 * kBytes) break;
      to += stage_pixels * kPointwiseSliceBytes, from += 2 * kBytes;
    }
    to_first += step * kPointwiseSliceBytes;
  }
}

// Zeros after an odd number of chunks of 8 input channels, which are multiplied 16 at a time. Nothing else writes
// there. All threads; ends without a barrier.
template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void clear_odd_chunk(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                unsigned char* stage) {
  const int chunk = static_cast<int>(p.in_channels) / kVectorOf<T>;
  if (chunk == plan.chunks) return;
  unsigned char* const slice = stage + chunk / kSliceChunks * plan.stage_pixels * kPointwiseSliceBytes;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x); row < plan.stage_pixels; row += kThreads)
    *reinterpret_cast<uint4*>(slice + chunk_offset(row, chunk % kSliceChunks)) = make_uint4(0, 0, 0, 0);
}

// Places of the pixels of a group in the ring, in units of 16 bytes, where its first row is row 0 of the ring. All
// threads, a row for a warp at a time; ends without a barrier. A place read is five instructions, a place computed some
// twenty.
template <int kThreads, int kChannels = kExpandedChannels>
__device__ __forceinline__ void set_places(const ExpandDepthwisePlan& plan, const ExpandColumns& columns,
                                           uint16_t* places) {
  constexpr unsigned kUnit = 16, kPixelUnits = kChannels * 2 / kUnit;
  const unsigned count = columns.count, row_units = plan.ring_row_bytes / kUnit, lane = threadIdx.x % 32;
#pragma unroll 1
  for (unsigned row = threadIdx.x / 32; row < plan.group_rows; row += kThreads / 32) {
    uint16_t* to = places + row * count + lane;
    unsigned place = row * row_units + (columns.in_ring + lane) * kPixelUnits;
#pragma unroll 1
    for (unsigned column = lane; column < count; column += 32) {
      *to = static_cast<uint16_t>(place);
      to += 32, place += 32 * kPixelUnits;
    }
  }
}

// Zeros left and right of the columns in the ring: the padding, and what strips read beyond it. All threads, a row for
// a warp at a time; ends without a barrier.
template <int kThreads, int kChannels = kExpandedChannels>
__device__ __forceinline__ void clear_padding(const ExpandDepthwisePlan& plan, const ExpandColumns& columns,
                                              unsigned char* ring) {
  constexpr unsigned kUnit = 16, kPixelUnits = kChannels * 2 / kUnit;
  const unsigned left = columns.in_ring * kPixelUnits, between = columns.count * kPixelUnits;
  const unsigned count = plan.ring_row_bytes / kUnit - between;
#pragma unroll 1
  for (unsigned row = threadIdx.x / 32; row < plan.ring_rows; row += kThreads / 32) {
    uint4* const to = reinterpret_cast<uint4*>(ring + row * plan.ring_row_bytes);
#pragma unroll 1
    for (unsigned unit = threadIdx.x % 32; unit < count; unit += 32)
      to[unit < left ? unit : unit + between] = make_uint4(0, 0, 0, 0);
  }
}

// Where a pixel of the group is in the ring, whose end is its beginning; `start`: of the group's first row. Below the
// ring's end the difference is a large number.
__device__ __forceinline__ unsigned place_in_ring(const uint16_t* place, unsigned start, unsigned ring_bytes) {
  const unsigned at = *place * 16u + start;
  return min(at, at - ring_bytes);
}

// Expands the `rows` rows in `stage` into the ring, the first into row `first_slot`; a warp M fragments at a time.
// `norm`: scales, then shifts; `places`: see set_places.
template <class T, int M, int kThreads>
__device__ __forceinline__ void expand_fragments(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                                 const unsigned char* stage, const unsigned char* weights,
                                                 const float* norm, const uint16_t* places, int pixels, int first_slot,
                                                 unsigned char* ring, int warp) {
  constexpr int kOwn = kExpandedChannels / 4, kFragments = kExpandedChannels / 8;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
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
      T* const to = reinterpret_cast<T*>(own + place_in_ring(place + half * 8, start, ring_bytes));
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

// A block without expansion: `chunks` of 16 bytes of every pixel in `stage` go into the ring as they are.
template <int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void copy_rows(const ExpandDepthwisePlan& plan, const unsigned char* stage,
                                          const uint16_t* places, int chunks, int pixels, int first_slot,
                                          unsigned char* ring) {
  const unsigned ring_bytes = plan.ring_rows * plan.ring_row_bytes, start = first_slot * plan.ring_row_bytes;
  const int first = static_cast<int>(threadIdx.x) / kSliceChunks;
#pragma unroll 1
  for (int chunk = static_cast<int>(threadIdx.x) % kSliceChunks; chunk < chunks; chunk += kSliceChunks) {
    const unsigned char* from = stage + chunk_offset(first, chunk % kSliceChunks);  // rows that far apart are alike
#pragma unroll 2
    for (int pixel = first; pixel < pixels; pixel += kThreads / kSliceChunks) {
      unsigned char* const to = ring + place_in_ring(places + pixel, start, ring_bytes);
      *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(from);
      from += kThreads / kSliceChunks * kPointwiseSliceBytes;
    }
    stage += plan.stage_pixels * kPointwiseSliceBytes;
  }
}

// `warp`: which one the warp is; as long as each has another number, any.
template <class T, int kThreads = kDepthwiseThreads>
__device__ __forceinline__ void expand_rows(const PointwiseParams& p, const ExpandDepthwisePlan& plan,
                                            const ExpandColumns& columns, const unsigned char* stage,
                                            const unsigned char* weights, const float* norm, const uint16_t* places,
                                            int rows, int first_slot, unsigned char* ring,
                                            int warp = static_cast<int>(threadIdx.x) / 32) {
  const int pixels = rows * columns.count;
  if (plan.pairs)
    expand_fragments<T, 2, kThreads>(p, plan, stage, weights, norm, places, pixels, first_slot, ring, warp);
  else
    expand_fragments<T, 1, kThreads>(p, plan, stage, weights, norm, places, pixels, first_slot, ring, warp);
}

}  // namespace effkernels::cuda
