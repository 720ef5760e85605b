// y = activation(norm(depthwise convolution of x)), and the channel means of y, in one pass over x.
//
// Threads and data. threadIdx.x is a vector of 16 bytes of channels (or a single channel where the channels do not
// divide), threadIdx.y a lane. The output plane is cut into strips: kStrip neighbouring pixels of one row. A lane
// takes one strip per round; neighbouring lanes take strips below each other, so that the K rows which neighbours
// share come from the L1 cache. A thread keeps the taps of one kernel row in registers and slides over the input
// row once, adding each input vector to every output that it reaches.
//
// The channel sums are deterministic: a thread adds its strips in order, the block adds its lanes in order, and a
// second, small kernel adds the blocks in order where an image has more than one.
#pragma once
#include "launch.h"
#include "numeric.cuh"

namespace effkernels::cuda {

constexpr int kDepthwiseThreads = 128;
constexpr int kMaxChannelVectors = 16;

template <class Element, int kKernelSize, int kStrideSize, int kVectorSize>
struct DepthwiseTraits {
  using T = Element;
  static constexpr int kKernel = kKernelSize;
  static constexpr int kStride = kStrideSize;
  static constexpr int kVector = kVectorSize;
  static constexpr int kStrip = depthwise_strip(kKernel, kStride);
  static constexpr int kInputs = (kStrip - 1) * kStride + kKernel;  // input columns under one strip
  static_assert(kKernel % 2 == 1 && kStride >= 1, "odd kernels only");
  static_assert(sizeof(T) * kVector <= 16, "a vector is one access");
};

// Which part of the output a thread works on.
struct DepthwiseLane {
  int image, tile, group, channel, first_strip;
  bool has_channel;

  __device__ __forceinline__ DepthwiseLane(const DepthwiseParams& p, const DepthwisePlan& plan) {
    group = blockIdx.x % plan.channel_groups;
    tile = blockIdx.x / plan.channel_groups % plan.tiles;
    image = blockIdx.x / plan.channel_groups / plan.tiles;
    channel = (group * plan.channel_vectors + threadIdx.x) * plan.vector;
    has_channel = channel < p.channels;
    first_strip = tile * plan.lanes * plan.rounds + threadIdx.y;
  }
};

// The taps of the block's channels as float32, [tap][channel of the block], so that threads along the channels read
// neighbouring words. Stored as (C, 1, K, K), the taps of a block are one contiguous run.
__device__ __forceinline__ void load_taps(const DepthwiseParams& p, const DepthwisePlan& plan, int group, float* taps) {
  const int block_channels = plan.channel_vectors * plan.vector;
  const int first = group * block_channels;
  const int tap_count = p.kernel * p.kernel;
  const int threads = blockDim.x * blockDim.y;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < block_channels * tap_count; i += threads) {
    const int channel = i / tap_count, tap = i % tap_count;
    const bool inside = first + channel < p.channels;
    const int64_t at = int64_t(first + channel) * tap_count + tap;
    taps[tap * block_channels + channel] = inside ? parameter(p.weight, at, 0.f) : 0.f;
  }
}

// Adds the lanes' channel sums in lane order and leaves the block's sums in `partial`, or the means in p.pooled.
template <int kVector>
__device__ __forceinline__ void finish_sums(const DepthwiseParams& p, const DepthwisePlan& plan,
                                            const DepthwiseLane& lane, const float (&sum)[kVector], float* lane_sums,
                                            float* partial) {
  const int block_channels = plan.channel_vectors * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) lane_sums[threadIdx.y * block_channels + threadIdx.x * kVector + i] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || !lane.has_channel) return;
  const bool whole_image = plan.tiles == 1;
  float* to = whole_image ? p.pooled + int64_t(lane.image) * p.channels
                          : partial + (int64_t(lane.image) * plan.tiles + lane.tile) * p.channels;
  const float factor = whole_image ? 1.f / static_cast<float>(p.out_height * p.out_width) : 1.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float total = 0.f;
    for (int y = 0; y < plan.lanes; ++y) total += lane_sums[y * block_channels + threadIdx.x * kVector + i];
    to[lane.channel + i] = total * factor;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    depthwise_strips(const DepthwiseParams p, const DepthwisePlan plan, float* partial) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const int block_channels = plan.channel_vectors * V;
  float* taps = dynamic_shared<float>();
  float* lane_sums = taps + K * K * block_channels;

  const DepthwiseLane lane(p, plan);
  load_taps(p, plan, lane.group, taps);
  __syncthreads();

  ScaleShift norm[V];
  float sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    norm[i] = lane.has_channel ? scale_shift(p.norm, lane.channel + i) : ScaleShift{0.f, 0.f};
    sum[i] = 0.f;
  }

  const T* image = static_cast<const T*>(p.x) + lane.image * p.x_stride_n + lane.channel;
  T* out = static_cast<T*>(p.y) + int64_t(lane.image) * p.out_height * p.out_width * p.channels + lane.channel;
  const float* my_taps = taps + threadIdx.x * V;

  for (int round = 0; round < plan.rounds; ++round) {
    const int strip = lane.first_strip + round * plan.lanes;
    if (!lane.has_channel || strip >= plan.strips) break;
    const int row = strip % plan.out_height, column = strip / plan.out_height * kStrip;
    const int top = row * S - p.pad_top, left = column * S - p.pad_left;

    float acc[kStrip][V] = {};
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
      if (top + ky < 0 || top + ky >= p.height) continue;
      const T* from = image + (top + ky) * p.x_stride_h;
      float tap[K][V];
#pragma unroll
      for (int kx = 0; kx < K; ++kx)
#pragma unroll
        for (int i = 0; i < V; ++i) tap[kx][i] = my_taps[(ky * K + kx) * block_channels + i];
#pragma unroll
      for (int ix = 0; ix < Traits::kInputs; ++ix) {
        float value[V] = {};
        if (left + ix >= 0 && left + ix < p.width) load(from + (left + ix) * p.x_stride_w, value);
#pragma unroll
        for (int ox = 0; ox < kStrip; ++ox) {
          const int kx = ix - ox * S;
          if (kx < 0 || kx >= K) continue;
#pragma unroll
          for (int i = 0; i < V; ++i) acc[ox][i] = fmaf(value[i], tap[kx][i], acc[ox][i]);
        }
      }
    }

#pragma unroll
    for (int ox = 0; ox < kStrip; ++ox) {
      if (column + ox >= p.out_width) break;
#pragma unroll
      for (int i = 0; i < V; ++i) acc[ox][i] = fmaf(acc[ox][i], norm[i].scale, norm[i].shift);
      activate<T>(acc[ox], p.activation);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += acc[ox][i];
      store(out + (int64_t(row) * p.out_width + column + ox) * p.channels, acc[ox]);
    }
  }
  if (p.pooled != nullptr) finish_sums(p, plan, lane, sum, lane_sums, partial);
}

// Any stride, dilation and channel count: one output per thread and round, taps from shared memory.
template <class T, int V>
__global__ void __launch_bounds__(kDepthwiseThreads, 1)
    depthwise_any(const DepthwiseParams p, const DepthwisePlan plan, float* partial) {
  const int block_channels = plan.channel_vectors * V;
  float* taps = dynamic_shared<float>();
  float* lane_sums = taps + p.kernel * p.kernel * block_channels;
  const DepthwiseLane lane(p, plan);
  load_taps(p, plan, lane.group, taps);
  __syncthreads();

  ScaleShift norm[V];
  float sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    norm[i] = lane.has_channel ? scale_shift(p.norm, lane.channel + i) : ScaleShift{0.f, 0.f};
    sum[i] = 0.f;
  }

  const T* image = static_cast<const T*>(p.x) + lane.image * p.x_stride_n + lane.channel;
  T* out = static_cast<T*>(p.y) + int64_t(lane.image) * p.out_height * p.out_width * p.channels + lane.channel;

  for (int round = 0; round < plan.rounds; ++round) {
    const int strip = lane.first_strip + round * plan.lanes;
    if (!lane.has_channel || strip >= plan.strips) break;
    const int row = strip % plan.out_height, column = strip / plan.out_height;
    float acc[V] = {};
    for (int ky = 0; ky < p.kernel; ++ky) {
      const int iy = row * p.stride - p.pad_top + ky * p.dilation;
      if (iy < 0 || iy >= p.height) continue;
      for (int kx = 0; kx < p.kernel; ++kx) {
        const int ix = column * p.stride - p.pad_left + kx * p.dilation;
        if (ix < 0 || ix >= p.width) continue;
        float value[V];
        load(image + iy * p.x_stride_h + ix * p.x_stride_w, value);
        const float* tap = taps + (ky * p.kernel + kx) * block_channels + threadIdx.x * V;
#pragma unroll
        for (int i = 0; i < V; ++i) acc[i] = fmaf(value[i], tap[i], acc[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) acc[i] = fmaf(acc[i], norm[i].scale, norm[i].shift);
    activate<T>(acc, p.activation);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += acc[i];
    store(out + (int64_t(row) * p.out_width + column) * p.channels, acc);
  }
  if (p.pooled != nullptr) finish_sums(p, plan, lane, sum, lane_sums, partial);
}

// pooled[n][c]: the mean, from the sums of the blocks of image n added in order. One thread per (n, c).
template <int kThreads>
__global__ void __launch_bounds__(kThreads) depthwise_mean(const DepthwiseParams p, const float* partial, int tiles) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.batch * p.channels) return;
  const int64_t image = at / p.channels, channel = at % p.channels;
  float total = 0.f;
  for (int tile = 0; tile < tiles; ++tile) total += partial[(image * tiles + tile) * p.channels + channel];
  p.pooled[at] = total / static_cast<float>(p.out_height * p.out_width);
}

inline size_t depthwise_shared_bytes(const DepthwiseParams& p, const DepthwisePlan& plan) {
  const size_t block_channels = size_t(plan.channel_vectors) * plan.vector;
  return (size_t(p.kernel) * p.kernel + plan.lanes) * block_channels * sizeof(float);
}

template <class T, int K, int S>
cudaError_t run_strips(const DepthwiseParams& p, const DepthwisePlan& plan, float* partial, const Launch& at) {
  using Traits = DepthwiseTraits<T, K, S, kVectorOf<T>>;
  return launch(depthwise_strips<Traits>, at, p, plan, partial);
}

template <class T, int S>
cudaError_t run_kernel_size(const DepthwiseParams& p, const DepthwisePlan& plan, float* partial, const Launch& at) {
  switch (p.kernel) {
    case 3:
      return run_strips<T, 3, S>(p, plan, partial, at);
    case 5:
      return run_strips<T, 5, S>(p, plan, partial, at);
    case 7:
      return run_strips<T, 7, S>(p, plan, partial, at);
    case 9:
      return run_strips<T, 9, S>(p, plan, partial, at);
    default:
      return cudaErrorInvalidValue;
  }
}

// Chooses the instantiation that the plan names; one .cu file per element type instantiates it.
template <class T>
cudaError_t run_depthwise(const DepthwiseParams& p, const DepthwisePlan& plan, float* partial, const Launch& at) {
  if (plan.unrolled)
    return p.stride == 1 ? run_kernel_size<T, 1>(p, plan, partial, at) : run_kernel_size<T, 2>(p, plan, partial, at);
  if (plan.vector == 1) return launch(depthwise_any<T, 1>, at, p, plan, partial);
  return launch(depthwise_any<T, kVectorOf<T>>, at, p, plan, partial);
}

extern template cudaError_t run_depthwise<float>(const DepthwiseParams&, const DepthwisePlan&, float*, const Launch&);
extern template cudaError_t run_depthwise<__half>(const DepthwiseParams&, const DepthwisePlan&, float*, const Launch&);
extern template cudaError_t run_depthwise<__nv_bfloat16>(const DepthwiseParams&, const DepthwisePlan&, float*,
                                                         const Launch&);

}  // namespace effkernels::cuda
