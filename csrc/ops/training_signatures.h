// How the training operators call an adaptor: the arguments of the schema as structs (training_check.h).
#pragma once
#include "training_check.h"

namespace effkernels::ops::signature {

template <auto op>
Tensor training_statistics(const Tensor& t, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                           double norm_eps) {
  return op(make_training_statistics(t, {norm_weight, norm_bias, norm_eps}));
}

template <auto op>
auto training_product(const Tensor& x, const Tensor& weight, const OptionalTensor& conv_bias,
                      const OptionalTensor& mean, const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                      const OptionalTensor& bias, const std::string& activation, const OptionalTensor& factor,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                      bool allow_tf32) {
  return op(make_training_product({x,
                                   weight,
                                   conv_bias,
                                   {mean, inverse_deviation, scale, bias},
                                   activation,
                                   factor,
                                   {norm_weight, norm_bias, norm_eps},
                                   allow_tf32}));
}

template <auto op>
auto training_norm_act(const Tensor& t, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                       const OptionalTensor& scale, const OptionalTensor& bias, const std::string& activation,
                       const OptionalTensor& factor, const OptionalTensor& residual) {
  return op(make_training_norm_act(t, {mean, inverse_deviation, scale, bias}, activation, factor, residual));
}

template <auto op>
auto training_squeeze(const Tensor& t, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                      const OptionalTensor& scale, const OptionalTensor& bias, const std::string& activation) {
  return op(make_training_squeeze(t, {mean, inverse_deviation, scale, bias}, activation));
}

template <auto op>
auto training_gradient_sums(const Tensor& g, const Tensor& t, const OptionalTensor& mean,
                            const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                            const OptionalTensor& bias, const std::string& activation, const OptionalTensor& factor,
                            bool with_y) {
  return op(make_training_gradient_sums(g, t, {mean, inverse_deviation, scale, bias}, activation, factor, with_y));
}

template <auto op>
auto training_norm_backward(const Tensor& dy, const Tensor& t, const OptionalTensor& mean,
                            const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                            const OptionalTensor& bias, const std::string& activation, const Tensor& alpha,
                            const Tensor& beta, const Tensor& delta, const OptionalTensor& factor) {
  return op(make_training_norm_backward(dy, t, {mean, inverse_deviation, scale, bias}, activation, alpha, beta, delta,
                                        factor));
}

template <auto op>
auto training_depthwise(const Tensor& t, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                        const OptionalTensor& scale, const OptionalTensor& bias, const std::string& activation,
                        const Tensor& weight, const OptionalTensor& conv_bias, int64_t stride,
                        const std::vector<int64_t>& padding, const OptionalTensor& norm_weight,
                        const OptionalTensor& norm_bias, double norm_eps) {
  return op(make_training_depthwise({t,
                                     {mean, inverse_deviation, scale, bias},
                                     activation,
                                     weight,
                                     conv_bias,
                                     stride,
                                     padding,
                                     {norm_weight, norm_bias, norm_eps}}));
}

template <auto op>
auto training_depthwise_backward(const Tensor& g, const Tensor& z, const Tensor& z_mean,
                                 const Tensor& z_inverse_deviation, const Tensor& z_scale, const Tensor& z_bias,
                                 const std::string& z_activation, const OptionalTensor& factor,
                                 const OptionalTensor& offset, const Tensor& alpha, const Tensor& beta,
                                 const Tensor& delta, const Tensor& t, const OptionalTensor& mean,
                                 const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                                 const OptionalTensor& bias, const std::string& activation, const Tensor& weight,
                                 int64_t stride, const std::vector<int64_t>& padding) {
  const OptionalTensor mean_of_z(z_mean), inverse_deviation_of_z(z_inverse_deviation), scale_of_z(z_scale),
      bias_of_z(z_bias);
  return op(make_training_depthwise_backward({g,
                                              z,
                                              {mean_of_z, inverse_deviation_of_z, scale_of_z, bias_of_z},
                                              z_activation,
                                              factor,
                                              offset,
                                              alpha,
                                              beta,
                                              delta,
                                              t,
                                              {mean, inverse_deviation, scale, bias},
                                              activation,
                                              weight,
                                              stride,
                                              padding}));
}

}  // namespace effkernels::ops::signature
