// From torch tensors to the params of csrc/training_params.h: the checks, allocations and packing that the training
// operators of the CPU and of CUDA share. Images are (N, H, W, C) and contiguous.
#pragma once
#include "../training_params.h"
#include "pack.h"

namespace effkernels::ops {

// A norm as an operator takes it: all four (C,), or none.
struct TrainingNormArguments {
  const OptionalTensor &mean, &inverse_deviation, &scale, &bias;
};

struct TrainingDepthwiseArguments {
  const Tensor& t;
  TrainingNormArguments norm;
  const std::string& activation;
  const Tensor& weight;
  const OptionalTensor& conv_bias;
  int64_t stride;
  const std::vector<int64_t>& padding;
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

struct TrainingStatistics {
  training::StatisticsParams params;
  Tensor mean, var;
};
TrainingStatistics make_training_statistics(const Tensor& t);

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
  Tensor z, mean, var, weight;
};
TrainingDepthwise make_training_depthwise(const TrainingDepthwiseArguments& arguments);

struct TrainingDepthwiseBackward {
  training::DepthwiseBackwardParams params;
  Tensor dt, dweight, sums, weight;
};
TrainingDepthwiseBackward make_training_depthwise_backward(const TrainingDepthwiseBackwardArguments& arguments);

}  // namespace effkernels::ops
