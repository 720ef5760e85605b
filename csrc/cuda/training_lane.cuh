// The part of the work that a thread of a training kernel has: `channel_vectors` threads along the channels of a group,
// `lanes` rows of them; groups follow each other in the grid, tiles of the pixels after that.
#pragma once
#include "compat.cuh"

namespace effkernels::cuda {

struct TrainingLane {
  int group, vector, lane;
  int64_t tile, first_channel, channel;  // channel: first of the thread's vector
  bool active;

  template <class Plan>
  __device__ __forceinline__ TrainingLane(const Plan& plan, int64_t channels) {
    group = blockIdx.x % plan.channel_groups;
    tile = blockIdx.x / plan.channel_groups;
    vector = threadIdx.x % plan.channel_vectors;
    lane = threadIdx.x / plan.channel_vectors;
    first_channel = int64_t(group) * plan.channel_vectors * plan.vector;
    channel = first_channel + vector * plan.vector;
    active = lane < plan.lanes && channel < channels;
  }
};

}  // namespace effkernels::cuda
