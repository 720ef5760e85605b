// Norm and activation in one pass over the result of another library's convolution. A block has the same channels in
// all of its rows and forms their scale and shift once; a thread then keeps those of its own channels in registers.
#pragma once
#include "conv.h"
#include "numeric.cuh"

namespace effkernels::cuda {

template <class T, int kCount>
__global__ void __launch_bounds__(kNormActThreads, 4) norm_act(const NormActParams p, const NormActPlan plan) {
  wait_for_previous();
  allow_next();
  const int channels = plan.threads_x * kCount;  // of the block
  float* const scale = dynamic_shared<float>();
  float* const shift = scale + channels;
  const int64_t first_channel = blockIdx.x % plan.channel_groups * channels;
  const int threads = blockDim.x * blockDim.y;
#pragma unroll 1
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < channels; i += threads) {
    ScaleShift of = {0.f, 0.f};
    if (first_channel + i < p.channels)
      of = before_activation(scale_shift(p.norm, first_channel + i), p.dtype, p.activation);
    scale[i] = of.scale, shift[i] = of.shift;
  }
  __syncthreads();
  const int own = threadIdx.x * kCount;
  const int64_t channel = first_channel + own;
  if (channel >= p.channels) return;
  const Vector<float, kCount> by = *reinterpret_cast<const Vector<float, kCount>*>(scale + own);
  const Vector<float, kCount> plus = *reinterpret_cast<const Vector<float, kCount>*>(shift + own);

  const int64_t step = plan.row_groups * blockDim.y;
#pragma unroll 2
  for (int64_t row = blockIdx.x / plan.channel_groups * blockDim.y + threadIdx.y; row < p.rows; row += step) {
    // Not through the read-only cache: y may be x.
    const Vector<T, kCount> raw =
        *reinterpret_cast<const Vector<T, kCount>*>(static_cast<const T*>(p.x) + row * p.channels + channel);
    float value[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) value[e] = fmaf(to_float(raw.at[e]), by.at[e], plus.at[e]);
    activate<T>(value, p.activation);
    store_global(static_cast<T*>(p.y) + row * p.channels + channel, value);
  }
}

}  // namespace effkernels::cuda
