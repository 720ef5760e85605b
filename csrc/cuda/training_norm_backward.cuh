// The gradient of a norm's input, dt = alpha * factor * dy * slope of the activation at norm(t) + beta * (t - mean) +
// delta, from sums that are known already.
//
// Threads and data: those of training_pass.cuh. What is known per channel is in shared memory, alpha times the factors
// of the image in registers.
//
// Traffic: dy once, t once, dt once; 24 bytes a channel and block, 4 a channel and item.
//
// Limits: float32, float16, bfloat16; any channels.
#pragma once
#include "training_pass.cuh"

namespace effkernels::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    training_norm_backward(const training::NormBackwardParams p, const PassPlan plan) {
  wait_for_previous();
  allow_next();
  const TrainingLane at(plan, p.channels);
  const int block_channels = plan.channel_vectors * V;
  float* const rows = dynamic_shared<float>();
  const float* const vectors[] = {p.norm.mean, p.norm.scale, p.norm.bias, p.alpha, p.beta, p.delta};
#pragma unroll
  for (int row = 0; row < 6; ++row)
    fill_row<V>(rows, row, block_channels, vectors[row], at.first_channel, p.channels, 0.f);
  __syncthreads();
  if (!at.active) return;
  const ThreadParameters<V> my(rows, block_channels, at.vector);
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const PassItem item(plan, index, p.pixels);
    float factor[V];
    read_channels<V>(p.factor, p.factor != nullptr ? item.image * p.channels + at.channel : 0, 1.f, factor);
#pragma unroll
    for (int part = 0; part < V; part += kQuad<V>) {
      const Vector<float, kQuad<V>> alpha = my(3, part);
#pragma unroll
      for (int i = 0; i < kQuad<V>; ++i) factor[part + i] *= alpha.at[i];
    }
    int64_t place = (item.image * p.pixels + item.first + at.lane) * p.channels + at.channel;
#pragma unroll 2
    for (int row = at.lane; row < item.pixels; row += plan.lanes, place += plan.lanes * p.channels) {
      const Vector<T, V> raw_dy = load_raw<T, V>(static_cast<const T*>(p.dy) + place);
      const Vector<T, V> raw = load_raw<T, V>(static_cast<const T*>(p.t) + place);
      Vector<T, V> dt;
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {
        const Vector<float, kQuad<V>> mean = my(0, part), scale = my(1, part), bias = my(2, part);
        const Vector<float, kQuad<V>> beta = my(4, part), delta = my(5, part);
        float t[kQuad<V>], dy[kQuad<V>], value[kQuad<V>], slope[kQuad<V>];
        unpack(raw, part, t);
        unpack(raw_dy, part, dy);
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i) {
          t[i] -= mean.at[i];
          value[i] = fmaf(t[i], scale.at[i], bias.at[i]);
        }
        activate_with_slope<T>(value, slope, p.activation);
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i)
          dt.at[part + i] =
              from_float<T>(fmaf(factor[part + i], dy[i] * slope[i], fmaf(beta.at[i], t[i], delta.at[i])));
      }
      store_raw(static_cast<T*>(p.dt) + place, dt);
    }
  }
}

}  // namespace effkernels::cuda
