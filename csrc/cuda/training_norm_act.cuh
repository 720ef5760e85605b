// y = activation(norm(t)) * factor + residual, the pass that ends a training block's forward and writes its input to
// the project product.
//
// Threads and data: those of training_pass.cuh. The norm is in shared memory, the factors of the image in registers.
//
// Traffic: t once, the residual once where there is one, y once; 12 bytes a channel and block, 4 a channel and item.
//
// Limits: float32, float16, bfloat16; any channels.
#pragma once
#include "training_pass.cuh"

namespace effkernels::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    training_norm_act(const training::NormActParams p, const PassPlan plan) {
  wait_for_previous();
  allow_next();
  const TrainingLane at(plan, p.channels);
  const int block_channels = plan.channel_vectors * V;
  float* const rows = dynamic_shared<float>();
  fill_row<V>(rows, 0, block_channels, p.norm.mean, at.first_channel, p.channels, 0.f);
  fill_row<V>(rows, 1, block_channels, p.norm.scale, at.first_channel, p.channels, 1.f);
  fill_row<V>(rows, 2, block_channels, p.norm.bias, at.first_channel, p.channels, 0.f);
  __syncthreads();
  if (!at.active) return;
  const ThreadParameters<V> my(rows, block_channels, at.vector);
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const PassItem item(plan, index, p.pixels);
    float factor[V];
    read_channels<V>(p.factor, p.factor != nullptr ? item.image * p.channels + at.channel : 0, 1.f, factor);
    int64_t place = (item.image * p.pixels + item.first + at.lane) * p.channels + at.channel;
#pragma unroll 2
    for (int row = at.lane; row < item.pixels; row += plan.lanes, place += plan.lanes * p.channels) {
      const Vector<T, V> raw = load_raw<T, V>(static_cast<const T*>(p.t) + place);
      Vector<T, V> raw_residual = {};
      if (p.residual != nullptr) raw_residual = load_raw<T, V>(static_cast<const T*>(p.residual) + place);
      Vector<T, V> y;
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {
        const Vector<float, kQuad<V>> mean = my(0, part), scale = my(1, part), bias = my(2, part);
        float value[kQuad<V>], residual[kQuad<V>];
        unpack(raw, part, value);
        unpack(raw_residual, part, residual);
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i) value[i] = fmaf(value[i] - mean.at[i], scale.at[i], bias.at[i]);
        activate_as_trained<T>(value, p.activation);
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i)
          y.at[part + i] = from_float<T>(fmaf(value[i], factor[part + i], residual[i]));
      }
      store_raw(static_cast<T*>(p.y) + place, y);
    }
  }
}

}  // namespace effkernels::cuda
