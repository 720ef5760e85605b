// From torch tensors to the params of csrc/training_params.h: the checks, allocations and packing that the training
// operators of the CPU and of CUDA share. Images are (N, H, W, C) and contiguous.
#pragma once
#include "../training_params.h"
#include "pack.h"

namespace effkernels::ops {

// On whose device the numbers have to be: `image`.
bool on_device_of(const Tensor& t, const Tensor& image);
const float* floats(const char* op, const char* name, const Tensor& t, int64_t elements, const Tensor& image);
const float* floats(const char* op, const char* name, const OptionalTensor& t, int64_t elements, const Tensor& image);
Activation activation_named(const char* op, const std::string& name);
// A parameter as a module keeps it, in any of the three types.
Param parameter_of(const char* op, const char* name, const OptionalTensor& t, int64_t elements, const Tensor& image);

// A norm as an operator takes it: all four (C,), or none.
struct TrainingNormArguments {
  const OptionalTensor &mean, &inverse_deviation, &scale, &bias;
};

// What a norm by the statistics of a result has of its own.
struct TrainingFoldArguments {
  const OptionalTensor &weight, &bias;
  double eps;
};

struct TrainingProductArguments {
  const Tensor &x, &weight;
  const OptionalTensor& conv_bias;
  TrainingNormArguments norm;
  const std::string& activation;
  const OptionalTensor& factor;
  TrainingFoldArguments fold;
  bool allow_tf32;
};

struct TrainingDepthwiseArguments {
  const Tensor& t;
  TrainingNormArguments norm;
  const std::string& activation;
  const Tensor& weight;
  const OptionalTensor& conv_bias;
  int64_t stride;
  const std::vector<int64_t>& padding;
  TrainingFoldArguments fold;
};

struct TrainingDepthwiseBackwardArguments {
  const Tensor &g, &z;
  TrainingNormArguments z_norm;
  const std::string& z_activation;
  const OptionalTensor &factor, &offset;
  const Tensor &alpha, &beta, &delta, &t;
  TrainingNormArguments norm;
  const std::string& activation;
  const Tensor& weight;
  int64_t stride;
  const std::vector<int64_t>& padding;
};

// `vectors`: (training::kNormRows, C).
struct TrainingStatistics {
  training::StatisticsParams params;
  Tensor vectors;
};
TrainingStatistics make_training_statistics(const Tensor& t, const TrainingFoldArguments& fold);

struct TrainingProduct {
  training::ProductParams params;
  Tensor z, vectors;
};
TrainingProduct make_training_product(const TrainingProductArguments& arguments);

struct TrainingNormAct {
  training::NormActParams params;
  Tensor y;
};
TrainingNormAct make_training_norm_act(const Tensor& t, const TrainingNormArguments& norm,
                                       const std::string& activation, const OptionalTensor& factor,
                                       const OptionalTensor& residual);
// y is the means of the images.
TrainingNormAct make_training_squeeze(const Tensor& t, const TrainingNormArguments& norm,
                                      const std::string& activation);

struct TrainingGradientSums {
  training::GradientSumsParams params;
  Tensor sums, y;
};
TrainingGradientSums make_training_gradient_sums(const Tensor& g, const Tensor& t, const TrainingNormArguments& norm,
                                                 const std::string& activation, const OptionalTensor& factor,
                                                 bool with_y);

struct TrainingNormBackward {
  training::NormBackwardParams params;
  Tensor dt;
};
TrainingNormBackward make_training_norm_backward(const Tensor& dy, const Tensor& t, const TrainingNormArguments& norm,
                                                 const std::string& activation, const Tensor& alpha, const Tensor& beta,
                                                 const Tensor& delta, const OptionalTensor& factor);

struct TrainingDepthwise {
  training::DepthwiseTrainParams params;
  Tensor z, vectors, weight;
};
TrainingDepthwise make_training_depthwise(const TrainingDepthwiseArguments& arguments);

struct TrainingDepthwiseBackward {
  training::DepthwiseBackwardParams params;
  Tensor dt, dweight, sums, weight;
};
TrainingDepthwiseBackward make_training_depthwise_backward(const TrainingDepthwiseBackwardArguments& arguments);

}  // namespace effkernels::ops
