// The arguments of a kernel: one plain struct per kernel family. No torch, no CUDA, so that the CPU kernels, the CUDA
// kernels and the emulator of the tests share it. Sizes and strides count elements. Activations are channels_last:
// the channel stride is 1 unless a struct names it.
#pragma once
#include <cstdint>

namespace effkernels {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };
enum class Activation : int32_t { kIdentity, kRelu, kRelu6, kSilu, kHardSwish, kGelu, kGeluTanh };
enum class Gate : int32_t { kSigmoid, kHardSigmoid };

// A parameter tensor as its module stores it, contiguous; float32 or the type of x. A null pointer: not given.
struct Param {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Bias of the convolution and batch norm over C channels. The kernels form, in float32,
//   scale = weight / sqrt(var + eps),  shift = bias + (conv_bias - mean) * scale
// and apply them after the sum. Without mean and var there is no norm: scale 1, shift conv_bias.
struct Norm {
  Param conv_bias, weight, bias, mean, var;
  float eps = 0.f;
};

inline constexpr int kLargestDepthwise = 13;  // of a depthwise kernel's height and width, each from 1 on

// y = activation(norm(depthwise convolution of x)), and the mean of y over its pixels where `pooled` is given.
struct DepthwiseParams {
  const void* x = nullptr;  // (N, H, W, C) by the strides below
  void* y = nullptr;        // (N, OH, OW, C), contiguous in that order
  Param weight;             // (C, 1, KH, KW)
  Norm norm;
  float* pooled = nullptr;  // (N, C) or null
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t batch = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t x_stride_n = 0, x_stride_h = 0, x_stride_w = 0;
  int32_t kernel_h = 3, kernel_w = 3, stride = 1, dilation = 1;
  int32_t pad_top = 0, pad_left = 0;  // bottom and right follow from the sizes
};

// gate = gate_activation(w_expand @ activation(w_reduce @ pooled + b_reduce) + b_expand)
struct SqueezeExciteParams {
  const float* pooled = nullptr;                 // (N, C)
  Param w_reduce, b_reduce, w_expand, b_expand;  // (R, C), (R), (C, R), (C)
  void* gate = nullptr;                          // (N, C)
  DType gate_dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  Gate gate_activation = Gate::kSigmoid;
  int64_t batch = 0, channels = 0, reduced = 0;
};

// y *= gate, in place: (N, P, C) by (N, C)
struct ScaleParams {
  void* y = nullptr;
  const void* gate = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, pixels = 0, channels = 0;
};

// y = activation(norm(w @ (x * gate))) + residual over N * P rows of Cin, P the pixels of an image; or the mean of that
// over the pixels of each image, without gate and residual.
struct PointwiseParams {
  const void* x = nullptr;  // row p of image n at n * x_stride_n + p * x_stride_p
  void* y = nullptr;        // (N, P, Cout), contiguous; (N, Cout) of means
  Param weight;             // (Cout, Cin); not given: y is x, and Cout is Cin (of blocks without expansion alone)
  // The weight packed for the CPU's kernels (`pack` in csrc/cpu/kernels.h), if somebody keeps it; else null.
  const float* packed = nullptr;
  Norm norm;
  Param gate;                      // (N, Cin), not given: 1
  const void* residual = nullptr;  // rows as x's, by their own strides; null: none
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  bool allow_tf32 = false;
  bool pools = false;  // y is the means
  int64_t batch = 0, pixels = 0, in_channels = 0, out_channels = 0;
  int64_t x_stride_n = 0, x_stride_p = 0, residual_stride_n = 0, residual_stride_p = 0;
};

// y = activation(norm(dense convolution of x)); x by any strides, so that a contiguous NCHW image needs no copy.
struct ConvParams {
  const void* x = nullptr;
  void* y = nullptr;  // (N, OH, OW, Cout), contiguous in that order
  Param weight;       // (Cout, Cin, KH, KW)
  Norm norm;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  bool allow_tf32 = false;
  int64_t batch = 0, in_channels = 0, out_channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t x_stride_n = 0, x_stride_c = 0, x_stride_h = 0, x_stride_w = 0;
  int32_t kernel_h = 3, kernel_w = 3, stride = 1, pad_top = 0, pad_left = 0;
};

}  // namespace effkernels
