// mbconv, a whole MBConv block, on CUDA in one launch, as the adaptor sees it: plain C++.
#pragma once
#include "expand_depthwise.h"
#include "squeeze_excite.h"

namespace effkernels::cuda {

constexpr int kMBConvThreads = 256;           // one such block on a multiprocessor: 255 registers for a thread
constexpr int kProjectedColumns = 32;         // output channels that a warp computes at a time,
constexpr int kProjectedPixels = 32;          // and pixels
constexpr int64_t kMostImagesOfClusters = 4;  // images that a cluster takes one after the other

// A block of the network. The expanded tensor and the result of the depthwise convolution are in no memory, so that
// neither expand->y nor depthwise->x, depthwise->y and project->x count.
struct MBConvCall {
  const PointwiseParams* expand = nullptr;
  const DepthwiseParams* depthwise = nullptr;
  const SqueezeExciteParams* se = nullptr;  // null: without squeeze-and-excitation
  const PointwiseParams* project = nullptr;
};

// The division of the work; mbconv.cuh explains the terms.
struct MBConvPlan {
  bool fits = false;
  const char* reason = "";     // why it does not, or why several launches are faster
  ExpandDepthwisePlan expand;  // of a group of channels: all rows of x are one group
  int team = 1;                // blocks of a cluster
  int groups = 1;              // of kExpandedChannels, of a block
  int all_groups = 1;          // of the expanded channels
  int images = 1;              // of a cluster, one after the other
  int64_t units = 0;           // clusters
  int weight_slots = 1;        // groups whose weights are in shared memory: all, which stay there, or one
  int passes = 1;              // over the output channels
  int pass_columns = 0;        // output channels of a pass
  int padded_columns = 0;      // the same in whole kProjectedColumns
  int held_pixels = 0;         // of the depthwise result, in whole kProjectedPixels
  int held_slices = 1;         // of 64 bytes of the block's channels
  int partial_stride = 0;      // floats of a pixel in the partial sums
  uint32_t by_vectors = 0;     // multiplier_of the vectors of a pixel in a pass
  // In shared memory, in bytes.
  int sums_at = 0, hidden_at = 0, gate_at = 0, norm_at = 0, project_norm_at = 0, weights_at = 0;
  int project_weights_at = 0, x_at = 0, held_at = 0, ring_at = 0;
  int64_t shared_bytes = 0;

  int64_t blocks() const { return units * team; }
};

// Pure functions of sizes, strides, types, the alignment of the pointers, and the limits of the device. The first says
// whether a block fits into a cluster at all, and how; the second is `fits` where one launch is also faster than the
// three of pointwise_bn_act, depthwise_bn_act_gate and pointwise_bn_act.
MBConvPlan fit_mbconv(const MBConvCall& call, const DeviceLimits& limits);
MBConvPlan plan_mbconv(const MBConvCall& call, const DeviceLimits& limits);
PlannedLaunches planned_launches(const MBConvCall& call, const MBConvPlan& plan);

// Of a plan that fits. kTeamRefused where the GPU has no room for such a cluster; nothing was launched then.
const char* launch_mbconv(const MBConvCall& call, const MBConvPlan& plan, void* stream);

}  // namespace effkernels::cuda
