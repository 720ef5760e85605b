// The parameter lists of schema.h as C++ sees them, and their packing for check.h: shared by the adaptors of the CPU
// and of CUDA, so that a change of a signature is made here and in schema.h.
#pragma once
#include "check.h"

#define NORM_PARAMETERS                                                                           \
  const OptionalTensor &bias, const OptionalTensor &norm_weight, const OptionalTensor &norm_bias, \
      const OptionalTensor &norm_mean, const OptionalTensor &norm_var, double eps
#define DEPTHWISE_PARAMETERS                                                                                  \
  const Tensor &x, const Tensor &weight, NORM_PARAMETERS, int64_t stride, const std::vector<int64_t>&padding, \
      int64_t dilation, const std::string &activation
#define EXPAND_PARAMETERS                                                                                   \
  const Tensor &expand_weight, const OptionalTensor &expand_bias, const OptionalTensor &expand_norm_weight, \
      const OptionalTensor &expand_norm_bias, const OptionalTensor &expand_norm_mean,                       \
      const OptionalTensor &expand_norm_var, double expand_eps, const std::string &expand_activation
#define SE_PARAMETERS                                                                                             \
  const Tensor &w_reduce, const OptionalTensor &b_reduce, const Tensor &w_expand, const OptionalTensor &b_expand, \
      const std::string &se_activation, const std::string &gate
#define NORM \
  NormArguments { bias, norm_weight, norm_bias, norm_mean, norm_var, eps }
#define DEPTHWISE \
  DepthwiseArguments { x, weight, NORM, stride, padding, dilation, activation }
#define EXPAND                                                                                               \
  ExpandArguments {                                                                                          \
    x, expand_weight, NormArguments{expand_bias,     expand_norm_weight, expand_norm_bias, expand_norm_mean, \
                                    expand_norm_var, expand_eps,         "expand_"},                         \
        expand_activation                                                                                    \
  }
#define SE \
  SeArguments { w_reduce, b_reduce, w_expand, b_expand, se_activation, gate }
