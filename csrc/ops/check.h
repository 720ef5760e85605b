// From torch tensors to the params of csrc/params.h: every check, every allocation and every packing that the adaptors
// of the CPU and of CUDA share. A message names the operator, the argument, its value and what is allowed.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../params.h"

namespace effkernels::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bias and norm of a convolution, as the schema passes them.
struct NormArguments {
  const OptionalTensor &conv_bias, &mean, &var, &weight, &bias;
  double eps;
  const char* prefix = "";  // of the names in messages: an operator may have two norms
};

struct SeArguments {
  const Tensor& w_reduce;
  const OptionalTensor& b_reduce;
  const Tensor& w_expand;
  const OptionalTensor& b_expand;
  const std::string &activation, &gate_activation;
  const char* activation_name;  // in messages
};

struct DepthwiseArguments {
  const Tensor &x, &weight;
  NormArguments norm;
  int64_t stride;
  const std::vector<int64_t>& padding;
  int64_t dilation;
  const std::string& activation;
};

struct PointwiseArguments {
  const Tensor &x, &weight;
  NormArguments norm;
  const OptionalTensor &gate, &residual;
  const std::string& activation;
  bool allow_tf32;
};

struct ConvArguments {
  const Tensor &x, &weight;
  NormArguments norm;
  int64_t stride;
  const std::vector<int64_t>& padding;
  const std::string& activation;
  bool allow_tf32;
};

// Keeps the tensors that a params struct points into alive, copies of the caller's where a layout had to change.
using Keep = std::vector<Tensor>;

// A 4-d output (N, C, H, W) with exact channels_last strides, and a matrix (N, C).
Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);
Tensor empty_matrix(const Tensor& like, int64_t n, int64_t c, torch::headeronly::ScalarType dtype);

// A contiguous (N, H, W, C) of like's dtype.
Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t h, int64_t w, int64_t c);

// Height and width of a depthwise kernel, 1 to kLargestDepthwise; anything else is an error.
void check_depthwise_kernel(const char* op, int64_t height, int64_t width);

// float32, float16 or bfloat16; anything else is an error that names the argument.
DType dtype_of(const char* op, const char* name, const Tensor& t);

// Check the arguments, allocate the output and describe both to the kernels. `gate_dtype`: the type of the gate.
struct Depthwise {
  DepthwiseParams params;
  Tensor y;
};
Depthwise make_depthwise(const char* op, const DepthwiseArguments& arguments, Keep& keep);

struct SqueezeExcite {
  SqueezeExciteParams params;
  Tensor gate;
};
// The caller sets params.pooled, float32 (batch, channels); a pooled tensor of the user's goes through check_pooled
// first.
SqueezeExcite make_squeeze_excite(const char* op, const Tensor& like, int64_t batch, int64_t channels,
                                  const SeArguments& arguments, torch::headeronly::ScalarType gate_dtype, Keep& keep);
void check_pooled(const char* op, const Tensor& pooled);

struct Pointwise {
  PointwiseParams params;
  Tensor y;
};
Pointwise make_pointwise(const char* op, const PointwiseArguments& arguments, Keep& keep);

// Both halves of `expand_depthwise_squeeze`, whose `depthwise.x` is the x of the first half and counts for its dtype
// and device alone. make_ allocates the expanded tensor between them; describe_ leaves it out (expand.y,
// expand.params.y and depthwise.params.x are empty), and give_expanded makes up for it.
struct ExpandDepthwise {
  Pointwise expand;
  Depthwise depthwise;
  Tensor pooled;
};
ExpandDepthwise make_expand_depthwise(const char* op, const PointwiseArguments& expand,
                                      const DepthwiseArguments& depthwise, Keep& keep);
ExpandDepthwise describe_expand_depthwise(const char* op, const PointwiseArguments& expand,
                                          const DepthwiseArguments& depthwise, Keep& keep);
void give_expanded(ExpandDepthwise& both, const Tensor& x);

struct Conv {
  ConvParams params;
  Tensor y;
};
Conv make_conv(const char* op, const ConvArguments& arguments, Keep& keep);

}  // namespace effkernels::ops
