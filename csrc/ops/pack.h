// From the arguments of an operator to the params of csrc/params.h, for the adaptors of the CPU and of CUDA.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "tensors.h"

namespace effkernels::ops {

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

struct DepthwiseOpArguments {
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

// Squeeze-and-excitation that may be left out, by both matrices.
struct OptionalSeArguments {
  const OptionalTensor &w_reduce, &b_reduce, &w_expand, &b_expand;
  const std::string &activation, &gate_activation;
};

// The first convolution of a block, that may be left out.
struct OptionalExpandArguments {
  const OptionalTensor& weight;
  NormArguments norm;
  const std::string& activation;
};

// Of the x of `depthwise` and `project` only the dtype and the device count; `project` has allow_tf32 for both.
struct MBConvArguments {
  const Tensor& x;
  OptionalExpandArguments expand;
  DepthwiseOpArguments depthwise;
  OptionalSeArguments se;
  PointwiseArguments project;
};

// Blocks that follow each other, flattened: of each block kTensors tensors (those of mbconv but x and residual, in its
// order), kNorms norm_eps, kSizes sizes (stride, padding, dilation, and whether the block adds its x) and kActivations
// activations (expand, depthwise, squeeze-and-excitation, gate).
struct MBConvStackArguments {
  static constexpr size_t kTensors = 22, kNorms = 3, kSizes = 7, kActivations = 4;

  const Tensor& x;
  const std::vector<OptionalTensor>& tensors;
  const std::vector<double>& norm_eps;
  const std::vector<int64_t>& sizes;
  const std::vector<std::string>& activations;
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

// Check the arguments, allocate the output and describe both to the kernels. `gate_dtype`: the type of the gate.
struct Depthwise {
  DepthwiseParams params;
  Tensor y;
};
Depthwise make_depthwise(const char* op, const DepthwiseOpArguments& arguments, Keep& keep);

struct SqueezeExcite {
  SqueezeExciteParams params;
  Tensor gate;
};
// The caller sets params.pooled, float32 (batch, channels); a pooled tensor of the user's goes through check_pooled
// first.
SqueezeExcite make_squeeze_excite(const char* op, const Tensor& like, int64_t batch, int64_t channels,
                                  const SeArguments& arguments, torch::headeronly::ScalarType gate_dtype, Keep& keep);

struct Pointwise {
  PointwiseParams params;
  Tensor y;
};
Pointwise make_pointwise(const char* op, const PointwiseArguments& arguments, Keep& keep);
// The same with global average pooling: y is (N, Cout).
Pointwise make_pointwise_pool(const char* op, const PointwiseArguments& arguments, Keep& keep);

// Both halves of `expand_depthwise_squeeze`, whose `depthwise.x` is the x of the first half and counts for its dtype
// and device alone. The expanded tensor between them is left out (expand.y, expand.params.y and depthwise.params.x are
// empty) until give_expanded allocates it.
struct ExpandDepthwise {
  Pointwise expand;
  Depthwise depthwise;
  Tensor pooled;
};
ExpandDepthwise describe_expand_depthwise(const char* op, const PointwiseArguments& expand,
                                          const DepthwiseOpArguments& depthwise, Keep& keep);
void give_expanded(ExpandDepthwise& both, const Tensor& x);

// A whole block. What is between x and y (expand.y, depthwise.y and se.gate, and their addresses in the params) is left
// out until give_expanded and give_depthwise_result allocate it. Without expansion `expand` has no weight, and its
// result is its x.
struct MBConv {
  Pointwise expand;
  Depthwise depthwise;
  SqueezeExcite se;
  bool excites = false;
  bool adds_input = false;  // of a stack: the residual is the block's x
  Pointwise project;
};
MBConv describe_mbconv(const char* op, const MBConvArguments& arguments, Keep& keep);
// Blocks without their results, and without their inputs but that of the first: aligned addresses stand for them until
// give_input and give_result.
std::vector<MBConv> describe_mbconv_stack(const char* op, const MBConvStackArguments& arguments, Keep& keep);
void give_input(MBConv& block, const Tensor& x, Keep& keep);
void give_result(MBConv& block, const Tensor& like);
void give_expanded(MBConv& block, const Tensor& x);
void give_depthwise_result(MBConv& block, const Tensor& x);
// All that is between the first block's input and the last one's result: memory that they use in turn, so many for the
// results of depthwise convolutions and of blocks, and a gate for each.
void give_memory_in_turn(MBConv* blocks, size_t count, size_t depthwise_in_turn, size_t results_in_turn,
                         const Tensor& x, Keep& keep);

struct Conv {
  ConvParams params;
  Tensor y;
};
Conv make_conv(const char* op, const ConvArguments& arguments, Keep& keep);

}  // namespace effkernels::ops
