// The CUDA kernels of the training operators without pixels: check and pack (training_vectors.h), launch on torch's
// current stream.
#include "../cuda/training_vectors.h"
#include "cuda_device.h"
#include "registry.h"
#include "training_vectors.h"

namespace effkernels::ops {
namespace {

// `launch(stream)` on the device of `like`: null, or what CUDA refused.
template <class Launch>
void launch_on_device_of(const char* op, const Tensor& like, const Launch& launch) {
  const OnDevice here(like);
  cuda::DeviceLimits limits;
  const char* error = cuda::enter_device(here.index(), &limits);
  if (error == nullptr) error = launch(here.stream());
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel could not be launched: ", error ? error : "");
}

void running(const std::vector<Tensor>& running, const std::vector<Tensor>& vectors, const std::vector<Tensor>& counts,
             const std::vector<double>& momenta) {
  const training::RunningParams params = make_training_running(running, vectors, counts, momenta);
  launch_on_device_of("training_running", vectors[0],
                      [&](void* stream) { return cuda::launch_running(params, stream); });
}

std::tuple<Tensor, Tensor, Tensor> norm_gradient(const Tensor& sums, const OptionalTensor& factor,
                                                 const OptionalTensor& offset, const Tensor& scale,
                                                 const Tensor& inverse_deviation, int64_t pixels, bool batch,
                                                 const OptionalTensor& weight, const OptionalTensor& bias) {
  const TrainingNormGradient made =
      make_training_norm_gradient(sums, factor, offset, scale, inverse_deviation, pixels, batch, weight, bias);
  launch_on_device_of("training_norm_gradient", sums,
                      [&](void* stream) { return cuda::launch_norm_gradient(made.params, stream); });
  return {made.weight, made.bias, made.vectors};
}

Tensor excite(const Tensor& means, const Tensor& w_reduce, const OptionalTensor& b_reduce, const Tensor& w_expand,
              const OptionalTensor& b_expand, const std::string& activation, const std::string& gate_activation) {
  const TrainingExcite made =
      make_training_excite(means, {w_reduce, b_reduce, w_expand, b_expand, activation, gate_activation});
  launch_on_device_of("training_excite", means, [&](void* stream) { return cuda::launch_excite(made.params, stream); });
  return made.gate;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(
    const Tensor& sums, int64_t pixels, const Tensor& w_reduce, const OptionalTensor& b_reduce, const Tensor& w_expand,
    const OptionalTensor& b_expand, const std::string& activation, const std::string& gate_activation) {
  const TrainingExcite made = make_training_excite_backward(
      sums, pixels, {w_reduce, b_reduce, w_expand, b_expand, activation, gate_activation});
  launch_on_device_of("training_excite_backward", sums,
                      [&](void* stream) { return cuda::launch_excite_backward(made.params, stream); });
  return {made.offset, made.dw_reduce, made.db_reduce, made.dw_expand, made.db_expand};
}

std::tuple<Tensor, Tensor, Tensor> product_weights(const Tensor& weight, const OptionalTensor& conv_bias,
                                                   const Tensor& mean, const Tensor& alpha, const Tensor& beta,
                                                   const Tensor& delta) {
  const TrainingProductGradient made = make_training_product_weights({weight, conv_bias, mean, alpha, beta, delta});
  launch_on_device_of("training_product_weights", weight,
                      [&](void* stream) { return cuda::launch_product_weights(made.params, stream); });
  return {made.scaled, made.middle, made.shift};
}

Tensor product_gradient(const Tensor& weight, const OptionalTensor& conv_bias, const Tensor& mean, const Tensor& alpha,
                        const Tensor& beta, const Tensor& delta, const Tensor& products, const OptionalTensor& x_mean,
                        const OptionalTensor& squares, int64_t pixels, bool centred) {
  const TrainingProductGradient made = make_training_product_gradient({weight, conv_bias, mean, alpha, beta, delta},
                                                                      products, x_mean, squares, pixels, centred);
  launch_on_device_of("training_product_gradient", weight,
                      [&](void* stream) { return cuda::launch_product_gradient(made.params, stream); });
  return made.dweight;
}

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, EFFKERNELS_CUDA_KEY, m) {
  using namespace effkernels::ops;
  m.impl("training_running", TORCH_BOX(&running));
  m.impl("training_norm_gradient", TORCH_BOX(&norm_gradient));
  m.impl("training_excite", TORCH_BOX(&excite));
  m.impl("training_excite_backward", TORCH_BOX(&excite_backward));
  m.impl("training_product_weights", TORCH_BOX(&product_weights));
  m.impl("training_product_gradient", TORCH_BOX(&product_gradient));
}
