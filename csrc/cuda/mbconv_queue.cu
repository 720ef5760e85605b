// The launch of mbconv as items of a queue.
#include "mbconv_queue.cuh"

namespace effkernels::cuda {

const char* launch_mbconv_queue(const MBConvCall* calls, const MBConvStackPlan& plan, const MBConvQueueWork& work,
                                void* stream) {
  const PlannedLaunch planned = planned_launches(calls, plan)[0];
  MBConvQueueArguments arguments;
  arguments.count = plan.count;
  arguments.item_at = static_cast<int>(planned.shared_bytes - kQueueItemBytes);
  arguments.counters = work.counters;
  unsigned* counters = work.counters + kQueueCounters;
  for (int i = 0; i < plan.count; ++i) {
    const MBConvCall& call = calls[i];
    const MBConvQueuePlan& of_block = plan.items[i];
    const int64_t units = of_block.expand.depthwise.units;
    MBConvQueueBlock& block = arguments.blocks[i];
    block.expand.expand = *call.expand;
    block.expand.depthwise.depthwise = *call.depthwise;
    if (call.se != nullptr) block.expand.depthwise.se = *call.se;
    block.expand.depthwise.plan = of_block.expand.depthwise;
    block.expand.depthwise.work = work.depthwise[i];
    block.expand.plan = of_block.expand;
    block.project = *call.project;
    block.plan = of_block;
    block.done = counters, block.written = counters + units, block.items_written = counters + 2 * units;
    counters += 2 * units + 1;
  }
  arguments.waited_end = static_cast<int>(counters - work.counters);
  for (int i = 0; i < plan.count; ++i) {
    arguments.blocks[i].expand.depthwise.work.arrivals = counters;
    counters += mbconv_queue_scratch(calls[i], plan.items[i]).arrivals;
  }
  const Launch at = launch_of(planned, stream);
  const cudaError_t error = calls[0].depthwise->dtype == DType::kFloat16
                                ? run_mbconv_queue<__half>(arguments, at)
                                : run_mbconv_queue<__nv_bfloat16>(arguments, at);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
