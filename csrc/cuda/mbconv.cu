// The launch of mbconv.
#include "mbconv.cuh"

namespace effkernels::cuda {

const char* launch_mbconv(const MBConvCall& call, const MBConvPlan& plan, void* stream) {
  MBConvArguments arguments;
  arguments.expand = *call.expand;
  arguments.depthwise = *call.depthwise;
  if (call.se != nullptr) arguments.se = *call.se;
  arguments.project = *call.project;
  arguments.plan = plan;
  const Launch at = launch_of(planned_launches(call, plan)[0], stream);
  const cudaError_t error = call.depthwise->dtype == DType::kFloat16 ? run_mbconv<__half>(arguments, at)
                                                                     : run_mbconv<__nv_bfloat16>(arguments, at);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // answered by another plan: nobody else is to find it
  return kTeamRefused;
}

}  // namespace effkernels::cuda
