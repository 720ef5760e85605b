// The CPU kernels of the training blocks as operators. effkernels/ops/training_steps.py calls them, and has the same in
// plain PyTorch.
#include "../cpu/training.h"
#include "registry.h"
#include "training_signatures.h"

namespace effkernels::ops {
namespace {

cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = int(torch::stable::get_num_threads());
  parallel.run = [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

Tensor statistics(const TrainingStatistics& made) {
  cpu::kernels().training.statistics(made.params, torch_threads());
  return made.vectors;
}

// Of the squeeze, too, whose result is the means.
Tensor norm_act(const TrainingNormAct& made) {
  cpu::kernels().training.norm_act(made.params, torch_threads());
  return made.y;
}

std::tuple<Tensor, Tensor> gradient_sums(const TrainingGradientSums& made) {
  cpu::kernels().training.gradient_sums(made.params, torch_threads());
  return {made.sums, made.y};
}

Tensor norm_backward(const TrainingNormBackward& made) {
  cpu::kernels().training.norm_backward(made.params, torch_threads());
  return made.dt;
}

std::tuple<Tensor, Tensor> depthwise(const TrainingDepthwise& made) {
  cpu::kernels().training.depthwise_train(made.params, torch_threads());
  return {made.z, made.vectors};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const TrainingDepthwiseBackward& made) {
  cpu::kernels().training.depthwise_backward(made.params, torch_threads());
  return {made.dt, made.dweight, made.sums};
}

}  // namespace
}  // namespace effkernels::ops

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  using namespace effkernels::ops;
  m.impl("training_statistics", TORCH_BOX(&signature::training_statistics<&statistics>));
  m.impl("training_norm_act", TORCH_BOX(&signature::training_norm_act<&norm_act>));
  m.impl("training_squeeze", TORCH_BOX(&signature::training_squeeze<&norm_act>));
  m.impl("training_gradient_sums", TORCH_BOX(&signature::training_gradient_sums<&gradient_sums>));
  m.impl("training_norm_backward", TORCH_BOX(&signature::training_norm_backward<&norm_backward>));
  m.impl("training_depthwise", TORCH_BOX(&signature::training_depthwise<&depthwise>));
  m.impl("training_depthwise_backward", TORCH_BOX(&signature::training_depthwise_backward<&depthwise_backward>));
}
