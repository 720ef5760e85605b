// Activations together with their derivatives, which are those of PyTorch's backward functions where an activation has
// a corner.
#pragma once
#include "numeric.cuh"

namespace effkernels::cuda {

// 1 / (1 + exp(-x)); for 16-bit types by the two special-function instructions alone, whose error is some 2^-21. Not by
// tanh.approx, as silu in numeric.cuh: its error of 2^-11 would show in statistics and in sums of gradients.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(1.f, 1.f + __expf(-x));
  else
    return 1.f / (1.f + expf(-x));
}

// Comparisons let a NaN pass, as PyTorch's do. The switch is outside of the loop: one uniform branch per kCount values.
template <class T, int kCount>
__device__ __forceinline__ void activate_with_slope(float (&x)[kCount], float (&slope)[kCount], Activation activation) {
  switch (activation) {
    case Activation::kIdentity:
#pragma unroll
      for (int i = 0; i < kCount; ++i) slope[i] = 1.f;
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) slope[i] = x[i] <= 0.f ? 0.f : 1.f, x[i] = x[i] < 0.f ? 0.f : x[i];
      break;
    case Activation::kRelu6:
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        slope[i] = x[i] <= 0.f || x[i] >= 6.f ? 0.f : 1.f, x[i] = clamp_to(x[i], 0.f, 6.f);
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float s = sigmoid<T>(x[i]);
        x[i] *= s;
        slope[i] = fmaf(x[i], 1.f - s, s);
      }
      break;
    case Activation::kHardSwish:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        slope[i] = x[i] < -3.f ? 0.f : (x[i] > 3.f ? 1.f : fmaf(x[i], 1.f / 3.f, 0.5f));
        x[i] *= clamp_to(x[i] + 3.f, 0.f, 6.f) * (1.f / 6.f);
      }
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float distribution = 0.5f * (1.f + erff(x[i] * 0.70710678118654752f));
        slope[i] = fmaf(x[i] * 0.39894228040143268f, expf(-0.5f * x[i] * x[i]), distribution);
        x[i] *= distribution;
      }
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // x * s with s the sigmoid of u. From the smaller of s and 1 - s, which loses nothing where s is close to 1.
        const float square = x[i] * x[i], u = 1.5957691216057308f * x[i] * fmaf(0.044715f, square, 1.f);
        const float tail = 1.f / (1.f + expf(u < 0.f ? -u : u)), s = u < 0.f ? tail : 1.f - tail;
        slope[i] = s + x[i] * (tail * (1.f - tail)) * (1.5957691216057308f * fmaf(0.134145f, square, 1.f));
        x[i] *= s;
      }
      break;
  }
}

// The activation alone.
template <class T, int kCount>
__device__ __forceinline__ void activate_as_trained(float (&x)[kCount], Activation activation) {
  float unused[kCount];
  activate_with_slope<T>(x, unused, activation);
}

}  // namespace effkernels::cuda
