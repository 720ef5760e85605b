// The launches of the passes of training.
#include <limits>

#include "training_gradient_sums.cuh"
#include "training_norm_act.cuh"
#include "training_norm_backward.cuh"
#include "training_squeeze.cuh"
#include "training_statistics.cuh"

namespace effkernels::cuda {
namespace {

// `run(element type, channels of a vector as a constant)`.
template <class Run>
const char* launch_pass(DType dtype, const PassPlan& plan, void* stream, const Run& run) {
  const int64_t grid = plan.tiles * plan.channel_groups;
  if (grid > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  Launch at;
  at.grid = dim3(static_cast<unsigned>(grid));
  at.block = dim3(kPassThreads);
  at.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  at.stream = static_cast<cudaStream_t>(stream);
  at.overlaps = true;
  cudaError_t error = cudaErrorInvalidValue;
  const auto run_type = [&](auto element) {
    constexpr int kVector = kVectorOf<decltype(element)>;
    return plan.vector == 1 ? run(element, std::integral_constant<int, 1>(), at)
                            : run(element, std::integral_constant<int, kVector>(), at);
  };
  switch (dtype) {
    case DType::kFloat32:
      error = run_type(float());
      break;
    case DType::kFloat16:
      error = run_type(__half());
      break;
    case DType::kBFloat16:
      error = run_type(__nv_bfloat16());
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_statistics(const training::StatisticsParams& p, const PassPlan& plan, const TrainingWork& work,
                              void* stream) {
  return launch_pass(p.dtype, plan, stream, [&](auto element, auto vector, const Launch& at) {
    return launch(training_statistics<decltype(element), vector()>, at, p, plan, work);
  });
}

const char* launch_norm_act(const training::NormActParams& p, const PassPlan& plan, void* stream) {
  return launch_pass(p.dtype, plan, stream, [&](auto element, auto vector, const Launch& at) {
    return launch(training_norm_act<decltype(element), vector()>, at, p, plan);
  });
}

const char* launch_squeeze(const training::NormActParams& p, const PassPlan& plan, const TrainingWork& work,
                           void* stream) {
  return launch_pass(p.dtype, plan, stream, [&](auto element, auto vector, const Launch& at) {
    return launch(training_squeeze<decltype(element), vector()>, at, p, plan, work);
  });
}

const char* launch_gradient_sums(const training::GradientSumsParams& p, const PassPlan& plan, const TrainingWork& work,
                                 void* stream) {
  return launch_pass(p.dtype, plan, stream, [&](auto element, auto vector, const Launch& at) {
    return launch(training_gradient_sums<decltype(element), vector()>, at, p, plan, work);
  });
}

const char* launch_norm_backward(const training::NormBackwardParams& p, const PassPlan& plan, void* stream) {
  return launch_pass(p.dtype, plan, stream, [&](auto element, auto vector, const Launch& at) {
    return launch(training_norm_backward<decltype(element), vector()>, at, p, plan);
  });
}

}  // namespace effkernels::cuda
