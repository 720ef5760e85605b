// From the arguments of a schema (effkernels/ops/schemas.inc) to the structs of pack.h, once for each list of
// arguments: `depthwise<&f>` takes the arguments of a depthwise operator one by one and calls f with them as a struct.
#pragma once
#include "pack.h"

namespace effkernels::ops::signature {

template <auto op>
auto depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_mean,
               const OptionalTensor& norm_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
               double norm_eps, int64_t stride, const std::vector<int64_t>& padding, int64_t dilation,
               const std::string& activation) {
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(DepthwiseOpArguments{x, weight, norm, stride, padding, dilation, activation});
}

template <auto op>
auto depthwise_se(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_mean,
                  const OptionalTensor& norm_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                  double norm_eps, int64_t stride, const std::vector<int64_t>& padding, int64_t dilation,
                  const std::string& activation, const Tensor& w_reduce, const OptionalTensor& b_reduce,
                  const Tensor& w_expand, const OptionalTensor& b_expand, const std::string& se_activation,
                  const std::string& gate_activation) {
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(DepthwiseOpArguments{x, weight, norm, stride, padding, dilation, activation},
            SeArguments{w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation, "se_activation"});
}

template <auto op>
auto squeeze_excite(const Tensor& pooled, const Tensor& w_reduce, const OptionalTensor& b_reduce,
                    const Tensor& w_expand, const OptionalTensor& b_expand, const std::string& activation,
                    const std::string& gate_activation) {
  return op(pooled, SeArguments{w_reduce, b_reduce, w_expand, b_expand, activation, gate_activation, "activation"});
}

template <auto op>
auto pointwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_mean,
               const OptionalTensor& norm_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
               double norm_eps, const OptionalTensor& gate, const OptionalTensor& residual,
               const std::string& activation, bool allow_tf32) {
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(PointwiseArguments{x, weight, norm, gate, residual, activation, allow_tf32});
}

template <auto op>
auto pointwise_pool(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_mean,
                    const OptionalTensor& norm_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                    double norm_eps, const std::string& activation, bool allow_tf32) {
  const OptionalTensor none;
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(PointwiseArguments{x, weight, norm, none, none, activation, allow_tf32});
}

template <auto op>
auto expand_depthwise(const Tensor& x, const Tensor& expand_weight, const OptionalTensor& expand_bias,
                      const OptionalTensor& expand_norm_mean, const OptionalTensor& expand_norm_var,
                      const OptionalTensor& expand_norm_weight, const OptionalTensor& expand_norm_bias,
                      double expand_norm_eps, const std::string& expand_activation, const Tensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& norm_mean, const OptionalTensor& norm_var,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                      int64_t stride, const std::vector<int64_t>& padding, int64_t dilation,
                      const std::string& activation, bool allow_tf32) {
  const OptionalTensor none;
  const NormArguments expand_norm{expand_bias,      expand_norm_mean, expand_norm_var, expand_norm_weight,
                                  expand_norm_bias, expand_norm_eps,  "expand_"};
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(PointwiseArguments{x, expand_weight, expand_norm, none, none, expand_activation, allow_tf32},
            DepthwiseOpArguments{x, weight, norm, stride, padding, dilation, activation});
}

template <auto op>
auto mbconv(const Tensor& x, const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
            const OptionalTensor& expand_norm_mean, const OptionalTensor& expand_norm_var,
            const OptionalTensor& expand_norm_weight, const OptionalTensor& expand_norm_bias, double expand_norm_eps,
            const std::string& expand_activation, const Tensor& weight, const OptionalTensor& bias,
            const OptionalTensor& norm_mean, const OptionalTensor& norm_var, const OptionalTensor& norm_weight,
            const OptionalTensor& norm_bias, double norm_eps, int64_t stride, const std::vector<int64_t>& padding,
            int64_t dilation, const std::string& activation, const OptionalTensor& w_reduce,
            const OptionalTensor& b_reduce, const OptionalTensor& w_expand, const OptionalTensor& b_expand,
            const std::string& se_activation, const std::string& gate_activation, const Tensor& project_weight,
            const OptionalTensor& project_bias, const OptionalTensor& project_norm_mean,
            const OptionalTensor& project_norm_var, const OptionalTensor& project_norm_weight,
            const OptionalTensor& project_norm_bias, double project_norm_eps, const OptionalTensor& residual,
            bool allow_tf32) {
  const OptionalTensor none;
  const std::string identity = "identity";
  const NormArguments expand_norm{expand_bias,      expand_norm_mean, expand_norm_var, expand_norm_weight,
                                  expand_norm_bias, expand_norm_eps,  "expand_"};
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  const NormArguments project_norm{project_bias,      project_norm_mean, project_norm_var, project_norm_weight,
                                   project_norm_bias, project_norm_eps,  "project_"};
  return op(MBConvArguments{x,
                            {expand_weight, expand_norm, expand_activation},
                            {x, weight, norm, stride, padding, dilation, activation},
                            {w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation},
                            {x, project_weight, project_norm, none, residual, identity, allow_tf32}});
}

template <auto op>
auto mbconv_stack(const Tensor& x, const std::vector<OptionalTensor>& tensors, const std::vector<double>& norm_eps,
                  const std::vector<int64_t>& sizes, const std::vector<std::string>& activations, bool allow_tf32) {
  return op(MBConvStackArguments{x, tensors, norm_eps, sizes, activations, allow_tf32});
}

template <auto op>
auto conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_mean,
          const OptionalTensor& norm_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
          double norm_eps, int64_t stride, const std::vector<int64_t>& padding, const std::string& activation,
          bool allow_tf32) {
  const NormArguments norm{bias, norm_mean, norm_var, norm_weight, norm_bias, norm_eps};
  return op(ConvArguments{x, weight, norm, stride, padding, activation, allow_tf32});
}

}  // namespace effkernels::ops::signature
