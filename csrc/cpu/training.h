// The CPU's training kernels.
#pragma once
#include "../training_params.h"
#include "kernels.h"

namespace effkernels::cpu {

using namespace training;

struct TrainingKernels {
  void (*statistics)(const StatisticsParams&, const Parallel&);
  void (*norm_act)(const NormActParams&, const Parallel&);
  void (*gradient_sums)(const GradientSumsParams&, const Parallel&);
  void (*norm_backward)(const NormBackwardParams&, const Parallel&);
  void (*depthwise_train)(const DepthwiseTrainParams&, const Parallel&);
  void (*depthwise_backward)(const DepthwiseBackwardParams&, const Parallel&);
};

}  // namespace effkernels::cpu
