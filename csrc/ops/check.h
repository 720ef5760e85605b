// What the arguments of the operators may be. A message names the operator, the argument, its value and what is
// allowed.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "../params.h"

namespace effkernels::ops {

using torch::stable::Tensor;

constexpr int64_t kLargest = int64_t(1) << 31;  // of a single size: two of them multiply in 64 bits

// A shape in words, as Python prints one.
std::string shape_of_sizes(const std::vector<int64_t>& sizes);
std::string shape_of(const Tensor& t);

// A type in words, as PyTorch names it.
const char* name_of(torch::headeronly::ScalarType type);

// float32, float16 or bfloat16; anything else is an error that names the argument.
DType dtype_of(const char* op, const char* name, const Tensor& t);

// The same by its name in PyTorch.
DType dtype_named(const char* op, const std::string& name);

Activation activation_of(const char* op, const char* name, const std::string& given);
Gate gate_of(const char* op, const char* name, const std::string& given);

// Bytes, strides and multiply-adds are products of sizes. They are formed only where they fit into 64 bits, in an empty
// batch too, whose strides are as large.
void check_elements(const char* op, const char* name, std::initializer_list<int64_t> sizes);

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x);
void check_image(const char* op, const char* name, const Tensor& x);
void check_pooled(const char* op, const Tensor& pooled);
void check_padding(const char* op, const std::vector<int64_t>& padding);

// Height and width of a depthwise kernel, 1 to kLargestDepthwise.
void check_depthwise_kernel(const char* op, int64_t height, int64_t width);

// The output's size along one axis; an error where there is no output.
int64_t out_size(const char* op, const char* name, int64_t size, int64_t before, int64_t after, int64_t window,
                 int64_t stride);

}  // namespace effkernels::ops
