// For y = activation(norm(t)), its gradient g and its slope a', h = (t - mean) * inverse_deviation: the sums of y, g y,
// g a', a', g a' h and a' h over the pixels of every image and channel, from which the gradients of a norm and of a
// gate follow; and y * factor where it is asked for. One pass.
//
// Threads and data: those of training_pass.cuh; sums as training_sums.cuh adds them, in one launch.
//
// Traffic: g once, t once, y once where it is asked for, 48 bytes an image and channel; of an image that is cut into
// items, 48 bytes a channel and item written and read.
//
// Limits: float32, float16, bfloat16; any channels.
#pragma once
#include "training_sums.cuh"

namespace effkernels::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kPassThreads, kSumsBlocks)
    training_gradient_sums(const training::GradientSumsParams p, const PassPlan plan, const TrainingWork work) {
  wait_for_previous();
  allow_next();
  constexpr int kHalf = kGradientSums / 2;  // sums that are in shared memory at a time
  const TrainingLane at(plan, p.channels);
  const int block_channels = plan.channel_vectors * V;
  float* const rows = dynamic_shared<float>();
  float* const lane_sums = rows + 5 * block_channels;
  unsigned* const flag = reinterpret_cast<unsigned*>(lane_sums + kHalf * plan.lanes * block_channels);
  fill_row<V>(rows, 0, block_channels, p.norm.mean, at.first_channel, p.channels, 0.f);
  fill_row<V>(rows, 1, block_channels, p.norm.inverse_deviation, at.first_channel, p.channels, 0.f);
  fill_row<V>(rows, 2, block_channels, p.norm.scale, at.first_channel, p.channels, 0.f);
  fill_row<V>(rows, 3, block_channels, p.norm.bias, at.first_channel, p.channels, 0.f);
  const ThreadParameters<V> my(rows, block_channels, at.vector);
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const PassItem item(plan, index, p.pixels);
    __syncthreads();  // the factors of the item before have been read
    if (p.y != nullptr) {
      const float* factors = p.factor != nullptr ? p.factor + item.image * p.channels : nullptr;
      fill_row<V>(rows, 4, block_channels, factors, at.first_channel, p.channels, 1.f);
    }
    __syncthreads();
    float sums[kGradientSums][V] = {};
    if (at.active) {
      int64_t place = (item.image * p.pixels + item.first + at.lane) * p.channels + at.channel;
#pragma unroll 2
      for (int row = at.lane; row < item.pixels; row += plan.lanes, place += plan.lanes * p.channels) {
        const Vector<T, V> raw_g = load_raw<T, V>(static_cast<const T*>(p.g) + place);
        const Vector<T, V> raw_t = load_raw<T, V>(static_cast<const T*>(p.t) + place);
        Vector<T, V> y;
#pragma unroll
        for (int part = 0; part < V; part += kQuad<V>) {
          const Vector<float, kQuad<V>> mean = my(0, part), inverse = my(1, part), scale = my(2, part);
          const Vector<float, kQuad<V>> bias = my(3, part);
          float g[kQuad<V>], h[kQuad<V>], value[kQuad<V>], slope[kQuad<V>];
          unpack(raw_g, part, g);
          unpack(raw_t, part, h);
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) {
            h[i] -= mean.at[i];
            value[i] = fmaf(h[i], scale.at[i], bias.at[i]);
            h[i] *= inverse.at[i];
          }
          activate_with_slope<T>(value, slope, p.activation);
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) {
            const int c = part + i;
            const float ga = g[i] * slope[i];
            sums[0][c] += value[i];
            sums[1][c] = fmaf(g[i], value[i], sums[1][c]);
            sums[2][c] += ga;
            sums[3][c] += slope[i];
            sums[4][c] = fmaf(ga, h[i], sums[4][c]);
            sums[5][c] = fmaf(slope[i], h[i], sums[5][c]);
          }
          if (p.y != nullptr) {
            const Vector<float, kQuad<V>> factor = my(4, part);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) y.at[part + i] = from_float<T>(value[i] * factor.at[i]);
          }
        }
        if (p.y != nullptr) store_raw(static_cast<T*>(p.y) + place, y);
      }
    }
    finish_item<kGradientSums, kHalf, V>(plan, work, at, item, index, p.channels, sums, lane_sums, flag,
                                         [&](int which, int64_t channel, double value) {
                                           const int64_t image = which * p.batch + item.image;
                                           p.sums[image * p.channels + channel] = value;
                                         });
  }
}

}  // namespace effkernels::cuda
