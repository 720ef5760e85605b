// Values: vectors of up to 16 bytes along the channels, conversions, parameters as modules store them, activations.
#pragma once
#include <cstring>

#include "../params.h"
#include "compat.cuh"

namespace effkernels::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<__nv_bfloat16> = true;

template <class T>
constexpr int kVectorOf = 16 / sizeof(T);  // elements in the widest access

// kCount consecutive elements, read and written by one instruction where they are at most 16 bytes, by several of 16
// bytes where they are more. The address is a multiple of their size, or of 16.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T at[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_raw(const T* from) {
  constexpr size_t kBytes = sizeof(T) * kCount;
  Vector<T, kCount> raw;
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (size_t i = 0; i < kBytes / 16; ++i)
      reinterpret_cast<uint4*>(&raw)[i] = load_global(reinterpret_cast<const uint4*>(from) + i);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(&raw) = load_global(reinterpret_cast<const uint2*>(from));
  } else if constexpr (kBytes == 4 && kCount > 1) {
    *reinterpret_cast<unsigned*>(&raw) = load_global(reinterpret_cast<const unsigned*>(from));
  } else {
    static_assert(kCount == 1, "a vector is one element, or 4, 8 or a multiple of 16 bytes");
    raw.at[0] = load_global(from);
  }
  return raw;
}

// Elements `first` to `first + kPart` of a vector as float32. A bfloat16 is the upper half of one, so that two of them
// take a shift and a mask; converted one by one they take three instructions each.
template <int kPart, class T, int kCount>
__device__ __forceinline__ void unpack(const Vector<T, kCount>& raw, int first, float (&to)[kPart]) {
  if constexpr (is_bfloat16<T> && kPart % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
      unsigned two;
      memcpy(&two, &raw.at[first + i], sizeof(two));
      to[i] = __uint_as_float(two << 16);
      to[i + 1] = __uint_as_float(two & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; ++i) to[i] = to_float(raw.at[first + i]);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
  unpack(load_raw<T, kCount>(from), 0, to);
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
  static_assert(sizeof(T) * kCount <= 16, "one instruction");
  Vector<T, kCount> raw;
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, kCount>*>(to) = raw;
}

// The same to global memory. A plain assignment is taken apart by the compiler where the code before it has a switch,
// and becomes several stores; stores go to L2 either way.
template <class T, int kCount>
__device__ __forceinline__ void store_global(T* to, const float (&from)[kCount]) {
  constexpr int kBytes = sizeof(T) * kCount;
  Vector<T, kCount> raw;
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw.at[i] = from_float<T>(from[i]);
  if constexpr (kBytes == 16) {
    uint4 words;
    memcpy(&words, &raw, kBytes);
    __stcg(reinterpret_cast<uint4*>(to), words);
  } else if constexpr (kBytes == 8) {
    uint2 words;
    memcpy(&words, &raw, kBytes);
    __stcg(reinterpret_cast<uint2*>(to), words);
  } else if constexpr (kBytes == 4) {
    unsigned word;
    memcpy(&word, &raw, kBytes);
    __stcg(reinterpret_cast<unsigned*>(to), word);
  } else {
    static_assert(kCount == 1, "one instruction");
    *to = raw.at[0];
  }
}

// Element `index` of a parameter in whichever type its module keeps it, as it is stored, and its value; `missing` where
// it is not given. Who needs several reads them all before the value of the first: then their reads do not wait for
// each other.
__device__ __forceinline__ unsigned stored_parameter(const Param& param, int64_t index) {
  if (param.data == nullptr) return 0;
  if (param.dtype == DType::kFloat32) return load_global(static_cast<const unsigned*>(param.data) + index);
  return load_global(static_cast<const unsigned short*>(param.data) + index);
}
__device__ __forceinline__ float parameter_value(const Param& param, unsigned stored, float missing) {
  if (param.data == nullptr) return missing;
  if (param.dtype == DType::kFloat32) return __uint_as_float(stored);
  if (param.dtype == DType::kBFloat16) return __uint_as_float(stored << 16);
  __half half;
  memcpy(&half, &stored, sizeof(half));
  return to_float(half);
}
__device__ __forceinline__ float parameter(const Param& param, int64_t index, float missing) {
  return parameter_value(param, stored_parameter(param, index), missing);
}

// Batch norm and convolution bias of one channel as y = x * scale + shift.
struct ScaleShift {
  float scale, shift;
};

struct StoredNorm {
  unsigned conv_bias, weight, bias, mean, var;
};

__device__ __forceinline__ StoredNorm stored_norm(const Norm& norm, int64_t channel) {
  return {stored_parameter(norm.conv_bias, channel), stored_parameter(norm.weight, channel),
          stored_parameter(norm.bias, channel), stored_parameter(norm.mean, channel),
          stored_parameter(norm.var, channel)};
}

__device__ __forceinline__ ScaleShift scale_shift(const Norm& norm, const StoredNorm& stored) {
  const float conv_bias = parameter_value(norm.conv_bias, stored.conv_bias, 0.f);
  if (norm.var.data == nullptr) return {1.f, conv_bias};
  const float variance = parameter_value(norm.var, stored.var, 1.f);
  const float scale = parameter_value(norm.weight, stored.weight, 1.f) * rsqrtf(variance + norm.eps);
  const float mean = parameter_value(norm.mean, stored.mean, 0.f);
  return {scale, parameter_value(norm.bias, stored.bias, 0.f) + (conv_bias - mean) * scale};
}

__device__ __forceinline__ ScaleShift scale_shift(const Norm& norm, int64_t channel) {
  return scale_shift(norm, stored_norm(norm, channel));
}

// Whether `activate` takes half of the values: swish of 16-bit types is x / 2 (1 + tanh(x / 2)). To halve scale and
// shift of the norm ahead of it is exact, and one multiplication a channel instead of one a value.
__device__ __forceinline__ bool takes_half(DType dtype, Activation activation) {
  return dtype != DType::kFloat32 && activation == Activation::kSilu;
}
__device__ __forceinline__ ScaleShift before_activation(const ScaleShift& by, DType dtype, Activation activation) {
  const float factor = takes_half(dtype, activation) ? 0.5f : 1.f;
  return {factor * by.scale, factor * by.shift};
}

// x * sigmoid(x), of x in float32 and of half of it in 16-bit types. There it takes one special-function instruction
// instead of two, whose error of 2^-11 is no larger than the rounding of the result.
template <class T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (sizeof(T) == 2)
    return fmaf(x, tanh_approx(x), x);
  else
    return x / (1.f + expf(-x));
}

// Comparisons are written so that a NaN stays a NaN, as in PyTorch (fminf and fmaxf would drop it).
__device__ __forceinline__ float clamp_to(float x, float low, float high) {
  return x < low ? low : (x > high ? high : x);
}

// Of values from `before_activation`. The switch is outside of the loop, so that it costs one uniform branch per kCount
// values; swish, which networks have most, is asked for first.
template <class T, int kCount>
__device__ __forceinline__ void activate(float (&x)[kCount], Activation activation) {
  if (activation == Activation::kSilu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = silu<T>(x[i]);
    return;
  }
  switch (activation) {
    case Activation::kIdentity:
    case Activation::kSilu:
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = x[i] < 0.f ? 0.f : x[i];
      break;
    case Activation::kRelu6:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = clamp_to(x[i], 0.f, 6.f);
      break;
    case Activation::kHardSwish:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] *= clamp_to(x[i] + 3.f, 0.f, 6.f) * (1.f / 6.f);
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = 0.5f * x[i] * (1.f + erff(x[i] * 0.70710678118654752f));
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float inner = 0.79788456080286536f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = 0.5f * x[i] * (1.f + tanhf(inner));
      }
      break;
  }
}

// The gate of squeeze-and-excitation: one value per channel, so that exact functions cost nothing.
__device__ __forceinline__ float apply_gate(float x, Gate gate) {
  return gate == Gate::kSigmoid ? 1.f / (1.f + expf(-x)) : clamp_to(x + 3.f, 0.f, 6.f) / 6.f;
}

}  // namespace effkernels::cuda
