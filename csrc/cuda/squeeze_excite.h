// squeeze_excite_gate and the scaling by a gate on CUDA, as the adaptor sees them: plain C++.
#pragma once
#include "device.h"

namespace effkernels::cuda {

constexpr int64_t kMostReduced = 8192;  // hidden values of an image, which are in shared memory
constexpr int kMostImagesOfGate = 4;    // images whose gates one block computes together, reading each weight once
constexpr int kSqueezeExciteThreads = 256;
constexpr int kScaleThreads = 256;

// The division of squeeze_excite_gate into blocks: see squeeze_excite.cuh.
struct SqueezeExcitePlan {
  int images = 1;  // per block
  int splits = 1;  // blocks along the channels of the gate
  int split_channels = 1;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
};
SqueezeExcitePlan plan_squeeze_excite(const SqueezeExciteParams& params, const DeviceLimits& limits);
PlannedLaunches planned_launches(const SqueezeExciteParams& params, const SqueezeExcitePlan& plan);
const char* launch_squeeze_excite(const SqueezeExciteParams& params, const SqueezeExcitePlan& plan, void* stream);

// y *= gate in place, the second launch of depthwise_bn_act_se where its result does not fit on the chip.
struct ScalePlan {
  bool vectors = false;  // 16 bytes of channels per thread
  int64_t blocks = 0;
};
ScalePlan plan_scale(const ScaleParams& params, const DeviceLimits& limits);
PlannedLaunches planned_launches(const ScaleParams& params, const ScalePlan& plan);
const char* launch_scale(const ScaleParams& params, const ScalePlan& plan, void* stream);

}  // namespace effkernels::cuda
