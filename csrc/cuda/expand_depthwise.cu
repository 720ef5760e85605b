// The launch of expand_depthwise_squeeze.
#include "expand_depthwise.cuh"

namespace effkernels::cuda {

const char* launch_expand_depthwise(const PointwiseParams& expand, const DepthwiseCall& call,
                                    const ExpandDepthwisePlan& plan, const DepthwiseWork& work, void* stream) {
  ExpandDepthwiseArguments arguments;
  arguments.expand = expand;
  arguments.depthwise.depthwise = *call.depthwise;
  if (call.se != nullptr) arguments.depthwise.se = *call.se;
  arguments.depthwise.plan = plan.depthwise;
  arguments.depthwise.work = work;
  arguments.plan = plan;
  const Launch at = launch_of(planned_launches(expand, call, plan)[0], stream);
  const cudaError_t error = call.depthwise->dtype == DType::kFloat16
                                ? run_expand_depthwise<__half>(arguments, at)
                                : run_expand_depthwise<__nv_bfloat16>(arguments, at);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
