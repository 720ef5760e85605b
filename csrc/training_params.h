// What the training kernels take, those of the CPU and those of CUDA. Images are (N, H, W, C), contiguous; everything
// per channel is float32.
#pragma once
#include "params.h"

namespace effkernels::training {

// (t - mean) * scale + bias; mean is null where there is no norm. All (C,).
struct NormVectors {
  const float *mean = nullptr, *inverse_deviation = nullptr, *scale = nullptr, *bias = nullptr;
};

// The rows of what a norm needs after its statistics; the variance is divided by the number of pixels, the unbiased one
// by that less 1.
enum NormRow { kMeanRow, kVarianceRow, kUnbiasedRow, kInverseRow, kScaleRow, kBiasRow, kNormRows };

// Where mean and variance of a batch go, and what else of a norm follows from them: scale = weight / sqrt(var + eps).
struct NormFold {
  Param weight, bias;  // (C,); not given: 1 and 0
  float eps = 0.f;
  float unbiased = 1.f;      // unbiased variance by the biased one
  float* vectors = nullptr;  // (kNormRows, C)
};

struct StatisticsParams {
  const void* t = nullptr;
  DType dtype = DType::kFloat32;
  int64_t pixels = 0, channels = 0;  // of the whole batch
  NormFold fold;
};

// y = activation(norm(t)) * factor + residual, or the means of activation(norm(t)) where y is null.
struct NormActParams {
  const void *t = nullptr, *residual = nullptr;
  const float* factor = nullptr;  // (N, C)
  void* y = nullptr;
  double* pooled = nullptr;  // (N, C)
  NormVectors norm;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t batch = 0, pixels = 0, channels = 0;
};

// For y = activation(norm(t)), its gradient g and its slope a', h = (t - mean) * inverse_deviation, per image and
// channel: the sums of y, g y, g a', a', g a' h, a' h; and y * factor where it is asked for.
struct GradientSumsParams {
  const void *g = nullptr, *t = nullptr;
  const float* factor = nullptr;  // (N, C)
  void* y = nullptr;
  double* sums = nullptr;  // (6, N, C)
  NormVectors norm;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t batch = 0, pixels = 0, channels = 0;
};

// dt = alpha * factor * dy * slope of the activation at norm(t) + beta * (t - mean) + delta
struct NormBackwardParams {
  const void *dy = nullptr, *t = nullptr;
  const float *factor = nullptr, *alpha = nullptr, *beta = nullptr, *delta = nullptr;
  NormVectors norm;
  void* dt = nullptr;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t batch = 0, pixels = 0, channels = 0;
};

// z = weight @ (activation(norm(x)) * factor) + bias of the convolution over all pixels, and the norm of z by its
// statistics.
struct ProductParams {
  PointwiseParams product;        // x, weight, z as y; of its norm the bias of the convolution alone
  NormVectors norm;               // none: x as it is
  const float* factor = nullptr;  // (N, Cin) or null
  Activation activation = Activation::kIdentity;
  NormFold fold;
};

// The shape of a depthwise convolution without dilation.
struct DepthwiseShape {
  Param weight;  // (C, 1, KH, KW)
  DType dtype = DType::kFloat32;
  int64_t batch = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int32_t kernel_h = 3, kernel_w = 3, stride = 1, pad_top = 0, pad_left = 0;
};

// z = depthwise convolution of activation(norm(t)), and the norm of z by its statistics.
struct DepthwiseTrainParams {
  DepthwiseShape shape;
  const void* t = nullptr;
  Param conv_bias;
  NormVectors norm;
  Activation activation = Activation::kIdentity;
  void* z = nullptr;
  NormFold fold;
};

// dy = (g * factor + offset) * slope of z_activation at z_norm(z), dz = alpha * dy + beta * (z - mean) + delta; then
// the gradients of norm(t) (of t where there is no norm) and of the weight, and the sums of the first and of the first
// times h.
struct DepthwiseBackwardParams {
  DepthwiseShape shape;
  const void *g = nullptr, *z = nullptr, *t = nullptr;
  const float *factor = nullptr, *offset = nullptr;  // (N, C) or null
  const float *alpha = nullptr, *beta = nullptr, *delta = nullptr;
  NormVectors z_norm, norm;
  Activation z_activation = Activation::kIdentity, activation = Activation::kIdentity;
  void* dt = nullptr;
  float* dweight = nullptr;  // (C, KH, KW)
  double* sums = nullptr;    // (2, C) or null
};

}  // namespace effkernels::training
