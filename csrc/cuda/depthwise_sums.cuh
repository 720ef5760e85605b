// Channel sums of the results of a depthwise block, and what the block that comes last makes of them: the channel
// means, or by squeeze-and-excitation the gate. A thread adds its strips in order, the block its lanes in order, the
// last block to arrive the blocks of the image in order.
//
// For the means blocks arrive that have the same channels of an image. For the gate all of its blocks arrive, once: its
// first product is linear, so that each multiplies its own sums by its columns of w_reduce, and the last one adds up R
// values of each block.
#pragma once
#include "depthwise.h"
#include "squeeze_excite.cuh"

namespace effkernels::cuda {

// The arguments of a depthwise kernel. Without squeeze-and-excitation se.gate is null.
struct DepthwiseArguments {
  DepthwiseParams depthwise;
  SqueezeExciteParams se;
  DepthwisePlan plan;
  DepthwiseWork work;
};

// The channel sums of a thread are in shared memory, one row per lane: the convolution needs the registers.
template <int V>
__device__ __forceinline__ void add_to_lane(const float (&sum)[V], float* lane_sums) {
  constexpr int kPart = V < 4 ? V : 4;
  using Part = Vector<float, kPart>;
#pragma unroll
  for (int first = 0; first < V; first += kPart) {
    Part part = *reinterpret_cast<const Part*>(lane_sums + first);
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.at[i] += sum[first + i];
    *reinterpret_cast<Part*>(lane_sums + first) = part;
  }
}

// A sum together with what its additions round off: lanes and tiles are so many that a plain sum of equal ones would
// lose a digit of the means. `rest` is NaN where a value was infinite.
struct ExactSum {
  float value = 0.f, rest = 0.f;

  __device__ __forceinline__ void add(float addend) {
    const float sum = value + addend, added = sum - value;
    rest += (value - (sum - added)) + (addend - added);
    value = sum;
  }
  __device__ __forceinline__ float result() const { return rest == rest ? value + rest : value; }
};

// The value in double of a sum and what was rounded off.
__device__ __forceinline__ double double_of(const ExactSum& sum) {
  return sum.rest == sum.rest ? static_cast<double>(sum.value) + static_cast<double>(sum.rest)
                              : static_cast<double>(sum.value);
}

// Adds the lanes' sums of one image in lane order into `sums`, (block_channels), and clears them for the next image.
// Called by all threads; ends with a barrier. kChannels: of a block, if they are known where it is compiled.
template <int kChannels = 0>
__device__ __forceinline__ void add_lanes(const DepthwisePlan& plan, float* lane_sums, float* sums) {
  const int block_channels = kChannels > 0 ? kChannels : plan.channel_vectors * plan.vector;
  __syncthreads();
  if (threadIdx.x < block_channels) {
    ExactSum total;
    for (int lane = 0; lane < plan.lanes; ++lane) {
      float& sum = lane_sums[lane * block_channels + threadIdx.x];
      total.add(sum);
      sum = 0.f;
    }
    sums[threadIdx.x] = total.result();
  }
  __syncthreads();
}

// Shared memory after the block's parameters, if channel means are asked for.
struct SumsInShared {
  float* lane_sums;  // (lanes, block_channels)
  float* sums;       // (images, block_channels)
  unsigned* flag;    // one word
  float* hidden;     // (images, R), at a multiple of 16 bytes

  __device__ __forceinline__ SumsInShared(const DepthwisePlan& plan, float* parameters, int tap_count)
      : SumsInShared(plan, parameters, tap_count, plan.channel_vectors * plan.vector) {}
  __device__ __forceinline__ SumsInShared(const DepthwisePlan& plan, float* parameters, int tap_count,
                                          int block_channels) {
    const int of_lanes = (tap_count + 2) * block_channels, of_images = of_lanes + plan.lanes * block_channels;
    const int of_flag = of_images + plan.images * block_channels;
    lane_sums = parameters + of_lanes;
    sums = parameters + of_images;
    flag = reinterpret_cast<unsigned*>(parameters + of_flag);
    hidden = parameters + (of_flag / 4 + 1) * 4;
  }
};

__device__ __forceinline__ void clear_lanes(const DepthwisePlan& plan, float* lane_sums) {
  const int count = plan.lanes * plan.channel_vectors * plan.vector;
  for (int at = threadIdx.x; at < count; at += blockDim.x) lane_sums[at] = 0.f;
}

// Adds up the tiles of the block's channels, in the block that comes last, into the means. All threads.
__device__ __forceinline__ void finish_means(const DepthwiseArguments& a, const SumsInShared& shared, int group,
                                             int tile, int64_t unit, int block_channels, int channels, int images) {
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  const int64_t first_channel = int64_t(group) * block_channels, first_image = unit * plan.images;
  if (plan.tiles > 1) {
    float* partial = a.work.partial + unit * plan.tiles * p.channels + first_channel;
    if (threadIdx.x < channels) partial[tile * p.channels + threadIdx.x] = shared.sums[threadIdx.x];
    if (!arrive_last(a.work.arrivals + unit * plan.channel_groups + group, plan.tiles, shared.flag)) return;
    // Threads that are not needed for a channel of their own share the tiles, where the sums of the lanes were.
    const int parts = min(kDepthwiseThreads / block_channels, plan.lanes), part = threadIdx.x / block_channels;
    const int channel = threadIdx.x % block_channels;
    if (part < parts && channel < channels) {
      constexpr int kAtOnce = 8;  // reads that are under way together
      ExactSum total;
#pragma unroll 1
      for (int first = part; first < plan.tiles; first += kAtOnce * parts) {
        float of_tile[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int from = first + i * parts;
          of_tile[i] = from < plan.tiles ? __ldcg(partial + from * p.channels + channel) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) total.add(of_tile[i]);
      }
      shared.lane_sums[part * block_channels + channel] = total.result();
    }
    __syncthreads();
    if (threadIdx.x < channels) {
      ExactSum total;
#pragma unroll 1
      for (int from = 0; from < parts; ++from) total.add(shared.lane_sums[from * block_channels + threadIdx.x]);
      shared.sums[threadIdx.x] = total.result();
    }
    __syncthreads();
  }
  const float pixels = static_cast<float>(p.out_height * p.out_width);
#pragma unroll 1
  for (int at = threadIdx.x; at < images * block_channels; at += kDepthwiseThreads) {
    const int channel = at % block_channels;
    if (p.pooled != nullptr && channel < channels)
      p.pooled[(first_image + at / block_channels) * p.channels + first_channel + channel] = shared.sums[at] / pixels;
  }
}

// What other blocks wrote: past L1, which may hold older values.
template <int kWidth>
__device__ __forceinline__ Vector<float, kWidth> load_sums(const float* from) {
  static_assert(kWidth == 1 || kWidth == 4, "one read");
  Vector<float, kWidth> values;
  if constexpr (kWidth == 1) {
    values.at[0] = __ldcg(from);
  } else {
    const float4 all = __ldcg(reinterpret_cast<const float4*>(from));
    values.at[0] = all.x, values.at[1] = all.y, values.at[2] = all.z, values.at[3] = all.w;
  }
  return values;
}

// Adds up the first products of all blocks of the images into the hidden values, kWidth of which a thread takes at a
// time. Of each some threads have a share, in place of the sums of the lanes. All threads; ends with a barrier.
template <int kWidth>
__device__ __forceinline__ void add_hidden(const float* from, int blocks, int images, int reduced, int lane_floats,
                                           const SumsInShared& shared) {
  constexpr int kAtOnce = 12;  // reads that are under way together
  using Values = Vector<float, kWidth>;
  const int vectors = images * reduced / kWidth;
  const int room = min(kDepthwiseThreads / vectors, lane_floats / (images * reduced));
  const int parts = max(1, min(room, blocks));
  const int part = parts > 1 ? static_cast<int>(threadIdx.x) / vectors : 0;
  float* const to = parts > 1 ? shared.lane_sums + part * images * reduced : shared.hidden;
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) - part * vectors; at < vectors && part < parts; at += kDepthwiseThreads) {
    const int value = at * kWidth;
    const float* const of = from + (value / reduced * int64_t(blocks)) * reduced + value % reduced;
    ExactSum total[kWidth];
#pragma unroll 1
    for (int first = part; first < blocks; first += kAtOnce * parts) {
      Values of_block[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        of_block[i] = {};
        if (first + i * parts < blocks) of_block[i] = load_sums<kWidth>(of + int64_t(first + i * parts) * reduced);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[e].add(of_block[i].at[e]);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) to[value + e] = total[e].result();
  }
  __syncthreads();
  if (parts == 1) return;
  for (int at = static_cast<int>(threadIdx.x); at < images * reduced; at += kDepthwiseThreads) {
    const float* share = shared.lane_sums + at;
    float total = 0.f;  // of few: nothing that counts is rounded off
#pragma unroll 4
    for (int left = parts; left > 0; --left, share += images * reduced) total += *share;
    shared.hidden[at] = total;
  }
  __syncthreads();
}

// From the sums of this block to the means, or to the gate, by the block that comes last. All threads. kChannels as
// above.
template <class T, int kChannels = 0>
__device__ __noinline__ void finish_sums(const DepthwiseArguments& a, int group, int tile, int64_t unit,
                                         float* parameters) {
  const DepthwiseParams& p = a.depthwise;
  const SqueezeExciteParams& se = a.se;
  const DepthwisePlan& plan = a.plan;
  const int block_channels = kChannels > 0 ? kChannels : plan.channel_vectors * plan.vector;
  const SumsInShared shared(plan, parameters, p.kernel_h * p.kernel_w, block_channels);
  const int64_t first_channel = int64_t(group) * block_channels, first_image = unit * plan.images;
  const int channels = static_cast<int>(min(int64_t(block_channels), p.channels - first_channel));
  const int images = static_cast<int>(min(int64_t(plan.images), p.batch - first_image));
  if (se.gate == nullptr) {
    finish_means(a, shared, group, tile, unit, block_channels, channels, images);
    return;
  }

  const float pixels = static_cast<float>(p.out_height * p.out_width);
#pragma unroll 1
  for (int at = threadIdx.x; at < images * block_channels; at += kDepthwiseThreads) shared.sums[at] /= pixels;
  __syncthreads();
  const int reduced = static_cast<int>(se.reduced), blocks = plan.channel_groups * plan.tiles;
  float* hidden = a.work.hidden + first_image * blocks * reduced;  // (images, blocks, R)
  reduce_product<kReduceLanesOfBlock, T>(se, first_channel, channels, shared.sums, block_channels, images,
                                         hidden + int64_t(group * plan.tiles + tile) * reduced,
                                         int64_t(blocks) * reduced);
  if (!arrive_last(a.work.arrivals + unit, static_cast<unsigned>(blocks), shared.flag)) return;
  if (reduced % 4 == 0)
    add_hidden<4>(hidden, blocks, images, reduced, plan.lanes * block_channels, shared);
  else
    add_hidden<1>(hidden, blocks, images, reduced, plan.lanes * block_channels, shared);
  activate_hidden(se, images, shared.hidden);
  T* gate = static_cast<T*>(se.gate) + first_image * p.channels;
  const int64_t stride = p.channels;
  expand_product<T>(
      se, 0, static_cast<int>(p.channels), shared.hidden, images,
      [gate, stride](int m, int64_t channel, float value) { gate[m * stride + channel] = from_float<T>(value); });
}

}  // namespace effkernels::cuda
