// The launches of mbconv and of mbconv_stack.
#include "mbconv_stack.cuh"

namespace effkernels::cuda {
namespace {

MBConvArguments arguments_of(const MBConvCall& call, const MBConvPlan& plan) {
  MBConvArguments arguments;
  arguments.expand = *call.expand;
  arguments.depthwise = *call.depthwise;
  if (call.se != nullptr) arguments.se = *call.se;
  arguments.project = *call.project;
  arguments.plan = plan;
  return arguments;
}

const char* refusal_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // answered by another plan: nobody else is to find it
  return kTeamRefused;
}

}  // namespace

const char* launch_mbconv_clusters(const MBConvCall* calls, const MBConvStackPlan& plan, void* stream) {
  const Launch at = launch_of(planned_launches(calls, plan)[0], stream);
  const bool half = calls[0].depthwise->dtype == DType::kFloat16;
  if (plan.count == 1) {
    const MBConvArguments arguments = arguments_of(calls[0], plan.clusters[0]);
    return refusal_of(half ? run_mbconv<__half>(arguments, at) : run_mbconv<__nv_bfloat16>(arguments, at));
  }
  MBConvStackArguments arguments;
  arguments.count = plan.count;
  for (int i = 0; i < plan.count; ++i) arguments.blocks[i] = arguments_of(calls[i], plan.clusters[i]);
  return refusal_of(half ? run_mbconv_stack<__half>(arguments, at) : run_mbconv_stack<__nv_bfloat16>(arguments, at));
}

}  // namespace effkernels::cuda
