// From torch tensors to the params of csrc/training_vector_params.h: the checks, allocations and packing of the
// training operators without pixels. CUDA alone has kernels for them.
#pragma once
#include "../training_vector_params.h"
#include "training_check.h"

namespace effkernels::ops {

// `running`: mean and variance of each norm, changed in place; `counts` of those that count batches.
training::RunningParams make_training_running(const std::vector<Tensor>& running, const std::vector<Tensor>& vectors,
                                              const std::vector<Tensor>& counts, const std::vector<double>& momenta);

struct TrainingNormGradient {
  training::NormGradientParams params;
  Tensor weight, bias, vectors;
};
TrainingNormGradient make_training_norm_gradient(const Tensor& sums, const OptionalTensor& factor,
                                                 const OptionalTensor& offset, const Tensor& scale,
                                                 const Tensor& inverse_deviation, int64_t pixels, bool batch,
                                                 const OptionalTensor& weight, const OptionalTensor& bias);

struct TrainingExciteArguments {
  const Tensor& w_reduce;
  const OptionalTensor& b_reduce;
  const Tensor& w_expand;
  const OptionalTensor& b_expand;
  const std::string &activation, &gate_activation;
};
struct TrainingExcite {
  training::ExciteParams params;
  Tensor gate;                                                         // forward
  Tensor offset, dw_reduce, db_reduce, dw_expand, db_expand, scratch;  // backward
};
TrainingExcite make_training_excite(const Tensor& means, const TrainingExciteArguments& arguments);
TrainingExcite make_training_excite_backward(const Tensor& sums, int64_t pixels,
                                             const TrainingExciteArguments& arguments);

struct TrainingProductGradientArguments {
  const Tensor& weight;
  const OptionalTensor& conv_bias;
  const Tensor &mean, &alpha, &beta, &delta;
};
struct TrainingProductGradient {
  training::ProductGradientParams params;
  Tensor scaled, middle, shift;  // weights
  Tensor dweight;                // gradient
};
TrainingProductGradient make_training_product_weights(const TrainingProductGradientArguments& arguments);
TrainingProductGradient make_training_product_gradient(const TrainingProductGradientArguments& arguments,
                                                       const Tensor& products, const OptionalTensor& x_mean,
                                                       const OptionalTensor& squares, int64_t pixels, bool centred);

}  // namespace effkernels::ops
