// The mean of activation(norm(t)) over the pixels of every image and channel.
//
// Threads and data: those of training_pass.cuh; sums as training_sums.cuh adds them, in one launch.
//
// Traffic: t once, 8 bytes an image and channel; of an image that is cut into items, 8 bytes a channel and item
// written and read.
//
// Limits: float32, float16, bfloat16; any channels.
#pragma once
#include "training_sums.cuh"

namespace effkernels::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, kSumsBlocks)
    training_squeeze(const training::NormActParams p, const PassPlan plan, const TrainingWork work) {
  wait_for_previous();
  allow_next();
  constexpr int kRows = V == 1 ? 1 : 2;
  const TrainingLane at(plan, p.channels);
  const int block_channels = plan.channel_vectors * V;
  float* const rows = dynamic_shared<float>();
  float* const lane_sums = rows + 3 * block_channels;
  unsigned* const flag = reinterpret_cast<unsigned*>(lane_sums + plan.lanes * block_channels);
  fill_row<V>(rows, 0, block_channels, p.norm.mean, at.first_channel, p.channels, 0.f);
  fill_row<V>(rows, 1, block_channels, p.norm.scale, at.first_channel, p.channels, 1.f);
  fill_row<V>(rows, 2, block_channels, p.norm.bias, at.first_channel, p.channels, 0.f);
  __syncthreads();
  const ThreadParameters<V> my(rows, block_channels, at.vector);
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const PassItem item(plan, index, p.pixels);
    float sum[1][V] = {};
    if (at.active) {
      const T* from =
          static_cast<const T*>(p.t) + (item.image * p.pixels + item.first + at.lane) * p.channels + at.channel;
      const int64_t step = plan.lanes * p.channels;
#pragma unroll 2
      for (int row = at.lane; row < item.pixels; row += kRows * plan.lanes, from += kRows * step) {
        Vector<T, V> raw[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          raw[j] = {};
          if (row + j * plan.lanes < item.pixels) raw[j] = load_raw<T, V>(from + j * step);
        }
#pragma unroll
        for (int part = 0; part < V; part += kQuad<V>) {
          const Vector<float, kQuad<V>> mean = my(0, part), scale = my(1, part), bias = my(2, part);
          float value[kRows * kQuad<V>];
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            float t[kQuad<V>];
            unpack(raw[j], part, t);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i)
              value[j * kQuad<V> + i] = fmaf(t[i] - mean.at[i], scale.at[i], bias.at[i]);
          }
          activate_as_trained<T>(value, p.activation);
#pragma unroll
          for (int j = 0; j < kRows; ++j)
            if (row + j * plan.lanes < item.pixels)
#pragma unroll
              for (int i = 0; i < kQuad<V>; ++i) sum[0][part + i] += value[j * kQuad<V> + i];
        }
      }
    }
    finish_item<1, 1, V>(plan, work, at, item, index, p.channels, sum, lane_sums, flag,
                         [&](int, int64_t channel, double value) {
                           p.pooled[item.image * p.channels + channel] = value / static_cast<double>(p.pixels);
                         });
  }
}

}  // namespace effkernels::cuda
