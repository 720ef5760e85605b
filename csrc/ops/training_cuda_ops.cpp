// The CUDA kernels of the training blocks as operators: check and pack (training_check.h), plan, take scratch memory,
// launch on torch's current stream.
#include "../cuda/counters.h"
#include "../cuda/training.h"
#include "cuda_device.h"
#include "registry.h"
#include "training_signatures.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;

void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel could not be launched: ", error ? error : "");
}

// The device of a call, and the scratch memory of its launch.
class Call {
 public:
  Call(const char* op, const Tensor& image) : op_(op), image_(image), here_(image) {
    check_launch(op, cuda::enter_device(here_.index(), &limits_));
  }

  const cuda::DeviceLimits& limits() const { return limits_; }
  void* stream() const { return here_.stream(); }

  cuda::TrainingWork work(const cuda::TrainingScratch& scratch) {
    cuda::TrainingWork work;
    if (scratch.partial > 0) {
      partial_ = empty_matrix(image_, 1, scratch.partial, ScalarType::Float);
      work.partial = static_cast<float*>(partial_.mutable_data_ptr());
    }
    if (scratch.arrivals > 0)
      check_launch(op_, cuda::acquire_counters(here_.index(), stream(), scratch.arrivals, &work.arrivals));
    return work;
  }

 private:
  const char* op_;
  const Tensor& image_;
  OnDevice here_;
  cuda::DeviceLimits limits_;
  Tensor partial_;
};

Tensor statistics(const TrainingStatistics& made) {
  constexpr const char* op = "training_statistics";
  Call call(op, made.vectors);
  const cuda::PassPlan plan = cuda::plan_statistics(made.params, call.limits());
  const cuda::TrainingWork work = call.work(cuda::statistics_scratch(plan, made.params.channels));
  check_launch(op, cuda::launch_statistics(made.params, plan, work, call.stream()));
  return made.vectors;
}

std::tuple<Tensor, Tensor> product(const TrainingProduct& made) {
  constexpr const char* op = "training_product";
  Call call(op, made.z);
  const cuda::PointwisePlan plan = cuda::plan_training_product(made.params, call.limits());
  const cuda::PointwiseScratch scratch = cuda::training_pointwise_scratch(made.params.product, plan);
  const cuda::TrainingWork work = call.work({scratch.partial, scratch.arrivals});
  check_launch(op, cuda::launch_training_product(made.params, plan, {work.partial, work.arrivals}, call.stream()));
  return {made.z, made.vectors};
}

Tensor norm_act(const TrainingNormAct& made) {
  constexpr const char* op = "training_norm_act";
  Call call(op, made.y);
  const cuda::PassPlan plan = cuda::plan_norm_act(made.params, call.limits());
  check_launch(op, cuda::launch_norm_act(made.params, plan, call.stream()));
  return made.y;
}

Tensor squeeze(const TrainingNormAct& made) {
  constexpr const char* op = "training_squeeze";
  Call call(op, made.y);
  const cuda::PassPlan plan = cuda::plan_squeeze(made.params, call.limits());
  const cuda::TrainingWork work = call.work(cuda::sums_scratch(plan, made.params.batch, made.params.channels, 1));
  check_launch(op, cuda::launch_squeeze(made.params, plan, work, call.stream()));
  return made.y;
}

std::tuple<Tensor, Tensor> gradient_sums(const TrainingGradientSums& made) {
  constexpr const char* op = "training_gradient_sums";
  Call call(op, made.sums);
  const cuda::PassPlan plan = cuda::plan_gradient_sums(made.params, call.limits());
  const cuda::TrainingWork work =
      call.work(cuda::sums_scratch(plan, made.params.batch, made.params.channels, cuda::kGradientSums));
  check_launch(op, cuda::launch_gradient_sums(made.params, plan, work, call.stream()));
  return {made.sums, made.y};
}

Tensor norm_backward(const TrainingNormBackward& made) {
  constexpr const char* op = "training_norm_backward";
  Call call(op, made.dt);
  const cuda::PassPlan plan = cuda::plan_norm_backward(made.params, call.limits());
  check_launch(op, cuda::launch_norm_backward(made.params, plan, call.stream()));
  return made.dt;
}

std::tuple<Tensor, Tensor> depthwise(const TrainingDepthwise& made) {
  constexpr const char* op = "training_depthwise";
  Call call(op, made.z);
  const cuda::TrainDepthwisePlan plan = cuda::plan_depthwise_train(made.params, call.limits());
  const cuda::TrainingWork work = call.work(cuda::depthwise_train_scratch(plan, made.params.shape.channels));
  check_launch(op, cuda::launch_depthwise_train(made.params, plan, work, call.stream()));
  return {made.z, made.vectors};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const TrainingDepthwiseBackward& made) {
  constexpr const char* op = "training_depthwise_backward";
  Call call(op, made.dt);
  const cuda::TrainDepthwisePlan plan = cuda::plan_depthwise_backward(made.params, call.limits());
  const cuda::TrainingWork work = call.work(cuda::depthwise_backward_scratch(plan, made.params.shape.channels));
  check_launch(op, cuda::launch_depthwise_backward(made.params, plan, work, call.stream()));
  return {made.dt, made.dweight, made.sums};
}

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, EFFKERNELS_CUDA_KEY, m) {
  using namespace effkernels::ops;
  m.impl("training_statistics", TORCH_BOX(&signature::training_statistics<&statistics>));
  m.impl("training_product", TORCH_BOX(&signature::training_product<&product>));
  m.impl("training_norm_act", TORCH_BOX(&signature::training_norm_act<&norm_act>));
  m.impl("training_squeeze", TORCH_BOX(&signature::training_squeeze<&squeeze>));
  m.impl("training_gradient_sums", TORCH_BOX(&signature::training_gradient_sums<&gradient_sums>));
  m.impl("training_norm_backward", TORCH_BOX(&signature::training_norm_backward<&norm_backward>));
  m.impl("training_depthwise", TORCH_BOX(&signature::training_depthwise<&depthwise>));
  m.impl("training_depthwise_backward", TORCH_BOX(&signature::training_depthwise_backward<&depthwise_backward>));
}
