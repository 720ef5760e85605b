// Mean and variance of every channel over all pixels of a batch, and the vectors of its norm.
//
// Threads and data: those of training_pass.cuh, the batch as one image, one item for each block. A thread reads 8
// pixels at once, forms their mean and the sum of squared distances from it, and joins these tiles in order
// (training_moments.cuh). The block joins its lanes in order, the blocks are joined in two levels by those that come
// last: the same bits every time, in one launch.
//
// Traffic: t once; 16 bytes a channel and block written and read.
//
// Limits: float32, float16, bfloat16; any channels.
#pragma once
#include "training_moments.cuh"
#include "training_pass.cuh"

namespace effkernels::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, kSumsBlocks)
    training_statistics(const training::StatisticsParams p, const PassPlan plan, const TrainingWork work) {
  wait_for_previous();
  allow_next();
  constexpr int kRows = 8;
  const TrainingLane at(plan, p.channels);
  const PassItem item(plan, at.tile, p.pixels);
  const int block_channels = plan.channel_vectors * V;
  Moments* const shared = dynamic_shared<Moments>();
  unsigned* const flag = reinterpret_cast<unsigned*>(shared + plan.lanes * block_channels);

  RunningMoments my[V] = {};
  int count = 0;
  if (at.active) {
    const T* from = static_cast<const T*>(p.t) + (item.first + at.lane) * p.channels + at.channel;
    const int64_t step = plan.lanes * p.channels;
#pragma unroll 1
    for (int row = at.lane; row < item.pixels; row += kRows * plan.lanes, from += kRows * step) {
      Vector<T, V> raw[kRows];
      int rows = 0;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        raw[j] = {};
        if (row + j * plan.lanes < item.pixels) raw[j] = load_raw<T, V>(from + j * step), ++rows;
      }
      const float inverse = 1.f / static_cast<float>(rows);
      const float before = static_cast<float>(count), share = static_cast<float>(rows) / (before + rows);
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {
        float first[kQuad<V>], step[kQuad<V>] = {}, squares[kQuad<V>] = {};
        unpack(raw[0], part, first);
        const auto each_row = [&](const auto& act) {
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            float value[kQuad<V>];
            unpack(raw[j], part, value);
            if (j < rows)
#pragma unroll
              for (int i = 0; i < kQuad<V>; ++i) act(i, value[i] - first[i]);
          }
        };
        each_row([&](int i, float distance) { step[i] += distance; });
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i) step[i] *= inverse;
        each_row([&](int i, float distance) {
          const float from_mean = distance - step[i];
          squares[i] = fmaf(from_mean, from_mean, squares[i]);
        });
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i) add_tile(my[part + i], first[i], step[i], squares[i], share, before);
      }
      count += rows;
    }
  }
  if (at.lane < plan.lanes)
#pragma unroll
    for (int i = 0; i < V; ++i)
      shared[at.lane * block_channels + at.vector * V + i] = {my[i].mean, my[i].rest, my[i].squares,
                                                              static_cast<float>(count)};
  __syncthreads();
  Moments* const partial = reinterpret_cast<Moments*>(work.partial);
  if (threadIdx.x < block_channels && at.first_channel + threadIdx.x < p.channels) {
    Moments total;
    for (int lane = 0; lane < plan.lanes; ++lane) total.join(shared[lane * block_channels + threadIdx.x]);
    partial[at.tile * p.channels + at.first_channel + threadIdx.x] = total;
  }
  const int64_t nodes = (plan.tiles + plan.fan - 1) / plan.fan;
  join_blocks(plan.tiles, plan.fan, at.tile, work.arrivals + at.group * (nodes + 1), flag,
              [&](int64_t first, int number, int64_t to) {
                join_moments(partial, first, number, to, p.channels, at.first_channel, block_channels, p.fold, shared);
              });
}

}  // namespace effkernels::cuda
