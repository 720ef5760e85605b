#include <algorithm>

#include "squeeze_excite.h"

namespace effkernels::cuda {

SqueezeExcitePlan plan_squeeze_excite(const SqueezeExciteParams& p, const DeviceLimits& limits) {
  SqueezeExcitePlan plan;
  // Several images per block once there are more images than multiprocessors, or they could not all work at once.
  plan.images = static_cast<int>(std::clamp<int64_t>(p.batch / limits.multiprocessors, 1, kMostImagesOfGate));
  while (plan.images > 1 && plan.images * p.reduced * int64_t(sizeof(float)) > limits.shared_per_block) plan.images--;
  const int64_t units = divide_up(p.batch, plan.images);
  // Few images: split the gate's channels, in runs of at least 64, until half of the multiprocessors have a block.
  constexpr int64_t kShortestSplit = 64;
  const int64_t wanted = std::max<int64_t>(1, limits.multiprocessors / 2 / std::max<int64_t>(1, units));
  plan.splits = static_cast<int>(std::clamp<int64_t>(p.channels / kShortestSplit, 1, std::min<int64_t>(wanted, 16)));
  plan.split_channels = static_cast<int>(divide_up(p.channels, plan.splits));
  plan.splits = static_cast<int>(divide_up(p.channels, plan.split_channels));
  plan.blocks = units * plan.splits;
  plan.shared_bytes = plan.images * p.reduced * int64_t(sizeof(float));
  return plan;
}

PlannedLaunches planned_launches(const SqueezeExciteParams& p, const SqueezeExcitePlan& plan) {
  if (p.batch == 0) return {};
  PlannedLaunch one;
  one.kernel = "squeeze_excite_gate";
  one.grid = plan.blocks;
  one.block_x = kSqueezeExciteThreads;
  one.shared_bytes = plan.shared_bytes;
  return {one};
}

ScalePlan plan_scale(const ScaleParams& p, const DeviceLimits& limits) {
  const int64_t vector = p.dtype == DType::kFloat32 ? 4 : 8;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  ScalePlan plan;
  plan.vectors = p.channels % vector == 0 && aligned(p.y) && aligned(p.gate);
  const int64_t elements = p.batch * p.pixels * p.channels;
  const int64_t blocks = divide_up(plan.vectors ? elements / vector : elements, kScaleThreads);
  plan.blocks = std::min<int64_t>(blocks, int64_t(limits.multiprocessors) * 8 * 16);  // 16 waves, then a loop
  return plan;
}

PlannedLaunches planned_launches(const ScaleParams& p, const ScalePlan& plan) {
  if (p.batch * p.pixels * p.channels == 0) return {};
  PlannedLaunch one;
  one.kernel = "scale_by_gate";
  one.grid = plan.blocks;
  one.block_x = kScaleThreads;
  return {one};
}

}  // namespace effkernels::cuda
