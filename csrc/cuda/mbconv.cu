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

const char* launch_mbconv(const MBConvCall& call, const MBConvPlan& plan, void* stream) {
  const MBConvArguments arguments = arguments_of(call, plan);
  const Launch at = launch_of(planned_launches(call, plan)[0], stream);
  return refusal_of(call.depthwise->dtype == DType::kFloat16 ? run_mbconv<__half>(arguments, at)
                                                             : run_mbconv<__nv_bfloat16>(arguments, at));
}

const char* launch_mbconv_stack(const MBConvCall* calls, const MBConvStackPlan& plan, void* stream) {
  MBConvStackArguments arguments;
  arguments.count = static_cast<int>(plan.blocks.size());
  for (int i = 0; i < arguments.count; ++i) arguments.blocks[i] = arguments_of(calls[i], plan.blocks[i]);
  const Launch at = launch_of(planned_launches(plan)[0], stream);
  return refusal_of(calls[0].depthwise->dtype == DType::kFloat16 ? run_mbconv_stack<__half>(arguments, at)
                                                                 : run_mbconv_stack<__nv_bfloat16>(arguments, at));
}

}  // namespace effkernels::cuda
