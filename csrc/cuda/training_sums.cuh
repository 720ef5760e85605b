// Sums over the pixels of an image and channel, as the passes that need them end an item: a thread adds few pixels in
// float32, the block its lanes in order, the last block to arrive the items of the image in order, both with what the
// additions round off (ExactSum).
#pragma once
#include "arrival.cuh"
#include "depthwise_sums.cuh"
#include "training_pass.cuh"

namespace effkernels::cuda {

// Puts `mine`, kSums sums of each channel of a thread, of the item into the image's results by `put(sum, channel,
// value)`: at once where the image is one item, else by the block that comes last. All threads; `lane_sums`: kHalf sums
// of every lane and channel in shared memory; `flag`: one word.
template <int kSums, int kHalf, int V, class Put>
__device__ __forceinline__ void finish_item(const PassPlan& plan, const TrainingWork& work, const TrainingLane& at,
                                            const PassItem& item, int64_t index, int64_t channels,
                                            const float (&mine)[kSums][V], float* lane_sums, unsigned* flag,
                                            const Put& put) {
  static_assert(kSums % kHalf == 0, "whole parts");
  const int block_channels = plan.channel_vectors * V;
  float2* const partial = reinterpret_cast<float2*>(work.partial) + at.first_channel;
#pragma unroll
  for (int half = 0; half < kSums; half += kHalf) {
    __syncthreads();  // the sums before these have been read
    if (at.lane < plan.lanes)
#pragma unroll
      for (int s = 0; s < kHalf; ++s)
#pragma unroll
        for (int part = 0; part < V; part += kQuad<V>) {
          Vector<float, kQuad<V>> four;
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) four.at[i] = mine[half + s][part + i];
          *reinterpret_cast<Vector<float, kQuad<V>>*>(lane_sums + (s * plan.lanes + at.lane) * block_channels +
                                                      at.vector * V + part) = four;
        }
    __syncthreads();
    for (int task = threadIdx.x; task < kHalf * block_channels; task += blockDim.x) {
      const int s = task / block_channels, channel = task % block_channels;
      if (at.first_channel + channel >= channels) continue;
      ExactSum total;
      for (int lane = 0; lane < plan.lanes; ++lane)
        total.add(lane_sums[(s * plan.lanes + lane) * block_channels + channel]);
      if (plan.chunks == 1)
        put(half + s, at.first_channel + channel, double_of(total));
      else
        partial[(index * kSums + half + s) * channels + channel] = {total.value, total.rest};
    }
  }
  if (plan.chunks == 1) return;
  if (!arrive_last(work.arrivals + item.image * plan.channel_groups + at.group, static_cast<unsigned>(plan.chunks),
                   flag))
    return;
  const float2* from = partial + item.image * plan.chunks * kSums * channels;
  for (int task = threadIdx.x; task < kSums * block_channels; task += blockDim.x) {
    const int s = task / block_channels, channel = task % block_channels;
    if (at.first_channel + channel >= channels) continue;
    ExactSum total;
    float rest = 0.f;
#pragma unroll 4
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const float2 one = __ldcg(from + (chunk * kSums + s) * channels + channel);
      total.add(one.x);
      rest += one.y;
    }
    total.rest += rest;
    put(s, at.first_channel + channel, double_of(total));
  }
}

}  // namespace effkernels::cuda
