// The launches of the depthwise kernels of training.
#include <limits>

#include "training_depthwise.cuh"
#include "training_depthwise_backward.cuh"

namespace effkernels::cuda {
namespace {

constexpr int64_t kMostChannels = 1 << 30;  // indices of channels, and a block beyond them, have 32 bits

// `run(element)` launches the kernels of an element type.
template <class Run>
const char* launch_tiles(const training::DepthwiseShape& s, const TrainDepthwisePlan& plan, void* stream,
                         const Run& run) {
  if (plan.tiles == 0) return "the image has more pixels than 32-bit indices reach";
  if (s.channels > kMostChannels) return "more channels than 32 bits index";
  const int64_t grid = plan.tiles * plan.channel_groups;
  if (grid > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  Launch at;
  at.grid = dim3(static_cast<unsigned>(grid));
  at.block = dim3(kTrainDepthwiseThreads);
  at.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  at.stream = static_cast<cudaStream_t>(stream);
  at.overlaps = true;
  cudaError_t error = cudaErrorInvalidValue;
  switch (s.dtype) {
    case DType::kFloat32:
      error = run(float(), at);
      break;
    case DType::kFloat16:
      error = run(__half(), at);
      break;
    case DType::kBFloat16:
      error = run(__nv_bfloat16(), at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_depthwise_train(const training::DepthwiseTrainParams& p, const TrainDepthwisePlan& plan,
                                   const TrainingWork& work, void* stream) {
  return launch_tiles(p.shape, plan, stream, [&](auto element, const Launch& at) {
    return run_train_depthwise<decltype(element)>({p, plan, work}, at);
  });
}

const char* launch_depthwise_backward(const training::DepthwiseBackwardParams& p, const TrainDepthwisePlan& plan,
                                      const TrainingWork& work, void* stream) {
  return launch_tiles(p.shape, plan, stream, [&](auto element, const Launch& at) {
    return run_train_backward<decltype(element)>({p, plan, work}, at);
  });
}

}  // namespace effkernels::cuda
