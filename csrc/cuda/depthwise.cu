// The launches of the depthwise operators.
#include <limits>

#include "depthwise_resident.cuh"

namespace effkernels::cuda {
namespace {

template <class T>
cudaError_t run(const DepthwiseArguments& a, const Launch& at) {
  return a.plan.team > 0 ? run_resident<T>(a, at) : run_depthwise<T>(a, at);
}

}  // namespace

const char* const kTeamRefused = "no room for a team of this size";

const char* launch_depthwise(const DepthwiseCall& call, const DepthwisePlan& plan, const DepthwiseWork& work,
                             void* stream) {
  const DepthwiseParams& p = *call.depthwise;
  if (p.batch == 0) return nullptr;
  if (plan.tiles == 0) return "the image has more pixels than 32-bit indices reach";
  constexpr int64_t kMostChannels = 1 << 30;  // indices of channels, and a block beyond them, have 32 bits
  if (p.channels > kMostChannels) return "more channels than 32 bits index";
  const PlannedLaunch planned = planned_launches(call, plan)[0];
  if (planned.grid > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  if (call.se != nullptr && call.se->reduced > kMostReduced) return "more reduced channels than shared memory holds";

  DepthwiseArguments arguments;
  arguments.depthwise = p;
  if (call.se != nullptr) arguments.se = *call.se;
  arguments.plan = plan;
  arguments.work = work;
  const Launch at = launch_of(planned, stream);

  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run<float>(arguments, at);
      break;
    case DType::kFloat16:
      error = run<__half>(arguments, at);
      break;
    case DType::kBFloat16:
      error = run<__nv_bfloat16>(arguments, at);
      break;
  }
  if (error != cudaSuccess && plan.team > 0) {
    cudaGetLastError();  // answered by another plan: nobody else is to find it
    return kTeamRefused;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
