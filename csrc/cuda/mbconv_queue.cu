// The launch of mbconv as items of a queue.
#include "mbconv_queue.cuh"

namespace effkernels::cuda {

const char* launch_mbconv_queue(const MBConvCall& call, const MBConvQueuePlan& plan, const MBConvQueueWork& work,
                                void* stream) {
  MBConvQueueArguments arguments;
  arguments.expand.expand = *call.expand;
  arguments.expand.depthwise.depthwise = *call.depthwise;
  if (call.se != nullptr) arguments.expand.depthwise.se = *call.se;
  arguments.expand.depthwise.plan = plan.expand.depthwise;
  arguments.expand.depthwise.work = work.depthwise;
  arguments.expand.plan = plan.expand;
  arguments.project = *call.project;
  arguments.plan = plan;
  arguments.counters = work.counters;
  const Launch at = launch_of(planned_launches(call, plan)[0], stream);
  const cudaError_t error = call.depthwise->dtype == DType::kFloat16 ? run_mbconv_queue<__half>(arguments, at)
                                                                     : run_mbconv_queue<__nv_bfloat16>(arguments, at);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
