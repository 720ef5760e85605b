// The depthwise operators on CUDA, as the adaptor sees them: plain C++.
#pragma once
#include "device.h"

namespace effkernels::cuda {

constexpr int kDepthwiseThreads = 128;
constexpr int kResidentThreads = 256;

// The division of a depthwise operator's work; depthwise.cuh and depthwise_resident.cuh explain the terms.
struct DepthwisePlan {
  int vector = 1;           // channels per thread
  int channel_vectors = 1;  // threads along the channels
  int lanes = 1;            // threads along the strips of output pixels
  int strip = 1;            // output pixels per thread and round, along a row
  int rounds = 1;           // strips per thread, one after the other
  int images = 1;           // images per block, one after the other
  bool unrolled = false;    // dilation 1, stride 1 or 2, whole vectors: depthwise_strips
  int strips = 1;           // strips of one image
  int out_height = 1;       // rows of one image: number of strips below each other
  int channel_groups = 1;   // blocks along the channels
  int tiles = 1;            // blocks along the strips of one image; 0: the plane is too large for 32-bit indices
  int64_t units = 0;        // blocks along the images

  // depthwise_bn_act_se in one launch: the blocks of a team hold the result of one image in shared memory.
  int team = 0;             // blocks of a team; 0: two launches
  int row_blocks = 1;       // of a team, along the rows
  int slabs = 1;            // channel groups of each block of a team
  bool in_cluster = false;  // a team is a cluster; else the whole grid is resident
  int64_t shared_bytes = 0;

  int block_channels() const { return channel_vectors * vector; }
  int64_t blocks() const { return units * tiles * channel_groups; }
};

// The results of the launch beside y, and the scratch memory it needs: sizes are functions of the plan.
struct DepthwiseWork {
  // Of every block: its channel sums, (batch * tiles, channels), where means are asked for and tiles > 1; or where it
  // is the gate, w_reduce times its share of the means, (batch * blocks of an image, R).
  float *partial = nullptr, *hidden = nullptr;
  unsigned* arrivals = nullptr;  // zero before and after: of the tiles of (unit, group), or of the blocks of a unit
};
struct DepthwiseScratch {
  int64_t partial = 0, hidden = 0, arrivals = 0;  // elements
};

// Selects the operator: `se` is null without squeeze-and-excitation; `gated` asks for the result multiplied by the
// gate.
struct DepthwiseCall {
  const DepthwiseParams* depthwise = nullptr;
  const SqueezeExciteParams* se = nullptr;
  bool pooled = false;
  bool gated = false;
};

// The kernel size that depthwise_strips is compiled for: that of the square kernels of networks, 0 for all others,
// whose height and width are read at run time.
constexpr int compiled_kernel(int height, int width) {
  return height == width && (height == 3 || height == 5 || height == 7 || height == 9) ? height : 0;
}

// Output pixels per thread. 7 use every tap in registers 7 times and divide the planes of a network at 224 (112, 56,
// 28, 14, 7) without waste; a stride of 2 or a large kernel needs so many input columns and taps at once that 4 are
// left, as many as a kernel of unknown size takes.
constexpr int depthwise_strip(int compiled, int stride) { return compiled == 0 || compiled >= 7 || stride > 1 ? 4 : 7; }

// For launches that would leave multiprocessors without work: 2 pixels per thread, of the small square kernels. A
// thread then has the whole window of its strip in registers, so that its reads wait for each other no longer.
constexpr int kShortStrip = 2;
constexpr bool has_short_strips(int compiled) { return compiled == 3 || compiled == 5; }

// Blocks that a multiprocessor holds: strip * vector sums and the inputs of a row, or of a window, per thread are in
// registers.
constexpr int depthwise_resident_blocks(DType dtype, int strip) {
  return strip == kShortStrip ? 2 : dtype == DType::kFloat32 ? 4 : 3;
}

// A pure function of sizes, strides, types, the alignment of the pointers, and the limits of the device.
DepthwisePlan plan_depthwise(const DepthwiseCall& call, const DeviceLimits& limits);
DepthwiseScratch depthwise_scratch(const DepthwiseCall& call, const DepthwisePlan& plan);
PlannedLaunches planned_launches(const DepthwiseCall& call, const DepthwisePlan& plan);

// The result of launch_depthwise if the GPU refuses a team as large as the plan's: it has no room for such a cluster,
// or not for the whole grid at once (multiprocessors that are disabled, or kept for others by MPS or a green context).
// Nothing was launched.
extern const char* const kTeamRefused;

// depthwise->pooled, se->gate (with se and not gated) are where the results beside y go.
const char* launch_depthwise(const DepthwiseCall& call, const DepthwisePlan& plan, const DepthwiseWork& work,
                             void* stream);

}  // namespace effkernels::cuda
