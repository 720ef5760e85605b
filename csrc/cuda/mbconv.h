// mbconv, a whole MBConv block, and mbconv_stack, several, on CUDA in one launch, as the adaptor sees it: plain C++.
// There are two kernels: of clusters that hold an image, and of items from a queue, where the result of the depthwise
// convolution passes through memory.
#pragma once
#include <memory>
#include <vector>

#include "expand_depthwise.h"
#include "squeeze_excite.h"

namespace effkernels::cuda {

constexpr int kMBConvThreads = 256;           // one such block on a multiprocessor: 255 registers for a thread
constexpr int kProjectedColumns = 8;          // output channels of one matrix product
constexpr int64_t kMostImagesOfClusters = 4;  // images that a cluster takes one after the other
constexpr int kMostStackedBlocks = 20;        // of a launch, whose arguments are at most 32764 bytes
constexpr int kQueueItemBytes = 16;           // of shared memory: what a thread block has to do
constexpr int kQueueCounters = 2;             // of thread blocks that started, and of those that left

// What a warp of mbconv computes at a time. Of the project product: pixels, and output channels at most.
struct ProjectedTile {
  int pixels, columns;
};
inline constexpr ProjectedTile kProjectedTiles[] = {{16, 96}, {32, 112}};
// Of the depthwise convolution: two parts of so many rows and columns; wide ones at stride 1.
constexpr int kWindowRows = 8, kNarrowWindow = 4, kWideWindow = 14;

// A block of the network. What is between x and y has no address while plans are made, so that neither expand->y nor
// depthwise->x, depthwise->y, project->x and project->gate count.
struct MBConvCall {
  const PointwiseParams* expand = nullptr;
  const DepthwiseParams* depthwise = nullptr;
  const SqueezeExciteParams* se = nullptr;  // null: without squeeze-and-excitation
  const PointwiseParams* project = nullptr;
};

// The division of the work among clusters; mbconv.cuh explains the terms.
struct MBConvPlan {
  bool fits = false;
  const char* reason = "";     // why it does not, or why several launches are faster
  ExpandDepthwisePlan expand;  // of a group of channels: all rows of x are one group; its lanes are pairs of parts
  int window_columns = kNarrowWindow;
  int parts = 1;                // of the depthwise result: kWindowRows by window_columns
  int column_parts = 1;         // of its width
  int team = 1;                 // blocks of a cluster that have channels
  int cluster = 1;              // blocks of a cluster: in a stack there may be more than the team
  int groups = 1;               // of kExpandedChannels, of a block
  int all_groups = 1;           // of the expanded channels
  int images = 1;               // of a cluster, one after the other
  int64_t units = 0;            // clusters
  int ring_slots = 1;           // groups that are computed at once: all, or one
  int weight_slots = 1;         // groups whose weights are in shared memory: all, which stay there, or one
  int passes = 1;               // over the output channels
  int pass_columns = 0;         // output channels of a pass
  int padded_columns = 0;       // the same in pairs of kProjectedColumns
  int projected = 0;            // of kProjectedTiles
  int tile_columns = 0;         // output channels of a tile: no more than kProjectedTiles says
  int held_pixels = 0;          // of the depthwise result, in whole tiles of the product
  int held_slices = 1;          // of 64 bytes of the block's channels
  int partial_stride = 0;       // floats of a pixel in the partial sums
  PointwiseDivisor by_cluster;  // from blocks to units
  // multiplier_of: parts in a row, pairs of them, columns of x, vectors of a pixel in a pass.
  uint32_t by_column_parts = 0, by_lanes = 0, by_in_columns = 0, by_vectors = 0;
  // In shared memory, in bytes.
  int sums_at = 0, hidden_at = 0, gate_at = 0, norm_at = 0, project_norm_at = 0, weights_at = 0;
  int project_weights_at = 0, gate_weights_at = 0, x_at = 0, held_at = 0, ring_at = 0;
  int64_t shared_bytes = 0;
  bool waits_first = false;  // in a stack: its parameters would be where the sums of the block before are

  int64_t blocks() const { return units * cluster; }
};

// The division of the work into items of a queue; mbconv_queue.cuh explains the terms.
struct MBConvQueuePlan {
  bool fits = false;
  const char* reason = "";                          // why it does not
  ExpandDepthwisePlan expand;                       // its blocks are the items that expand
  PointwisePlan project;                            // its blocks are the items that project
  int expand_items = 0;                             // of a unit
  int ahead = 1;                                    // units that are expanded before the first one is projected
  int first_round = 0, first_item = 0;              // of the launch: where the block begins
  int64_t unit_rows = 0;                            // of the result
  int64_t group_rows = 0;                           // of the result, of an item that projects
  int64_t items = 0;                                // of both kinds: blocks of the launch
  PointwiseDivisor by_images, by_unit_rows;         // from images, and from rows of the result, to units,
  PointwiseDivisor by_group_rows, by_column_tiles;  // to groups; from items that project to groups
  int64_t shared_bytes = 0;
};

// Consecutive blocks of a network that are one launch, of clusters or of a queue; or a block that is three.
struct MBConvStackPlan {
  int first = 0, count = 1;          // of the blocks
  std::vector<MBConvPlan> clusters;  // of the same cluster, units and images
  std::vector<MBConvQueuePlan> items;
  const char* reason = "";  // why it is neither
  int64_t shared_bytes = 0;
};

// Pure functions of sizes, strides, types, the alignment of the pointers, and the limits of the device.
// Whether a block fits into a cluster at all, and how.
MBConvPlan fit_mbconv(const MBConvCall& call, const DeviceLimits& limits);
// Items of a queue: fewer bytes and launches than three of them, wherever it fits.
// `more`: those of other blocks of the network are in it.
MBConvQueuePlan plan_mbconv_queue(const MBConvCall& call, const DeviceLimits& limits, bool more);
// Sets where the blocks of one queue begin in its order. False where it has more rounds than 32 bits count.
bool order_blocks(const DeviceLimits& limits, int64_t shared_bytes, std::vector<MBConvQueuePlan>& blocks);

// Divide blocks that follow each other, the y of one being the x of the next, into launches: a pure function. Those of
// the last shapes are kept (plan_memory.h).
using MBConvStackPlans = std::vector<MBConvStackPlan>;
std::shared_ptr<const MBConvStackPlans> plan_mbconv_stack(const std::vector<MBConvCall>& calls,
                                                          const DeviceLimits& limits);
int64_t kept_stack_plans();
// Empty where the block is three launches; `calls`: of its blocks.
PlannedLaunches planned_launches(const MBConvCall* calls, const MBConvStackPlan& plan);
PlannedLaunch planned_queue(const MBConvCall* calls, const MBConvStackPlan& plan);  // that of items

// Scratch memory of a queue. depthwise->y and se->gate are given, of the type of x; each of the blocks has its own
// gate, but what depthwise->y and project->y point to is used again after kDepthwiseInTurn and kResultsInTurn blocks.
constexpr size_t kDepthwiseInTurn = 2, kResultsInTurn = 3;
struct MBConvQueueWork {
  std::vector<DepthwiseWork> depthwise;  // of every block; its counters are among `counters`
  unsigned* counters = nullptr;          // zero before and after: mbconv_queue_counters
};
DepthwiseScratch mbconv_queue_scratch(const MBConvCall& call, const MBConvQueuePlan& plan);
int64_t mbconv_queue_counters(const MBConvCall* calls, const MBConvStackPlan& plan);
// Bytes of scratch memory that a block of a queue writes and reads again.
int64_t mbconv_queue_bytes(const MBConvCall& call, const MBConvQueuePlan& plan);

// Of a plan of clusters. kTeamRefused where the GPU has no room for such a cluster; nothing was launched then.
const char* launch_mbconv_clusters(const MBConvCall* calls, const MBConvStackPlan& plan, void* stream);
// Of a plan of items.
const char* launch_mbconv_queue(const MBConvCall* calls, const MBConvStackPlan& plan, const MBConvQueueWork& work,
                                void* stream);

}  // namespace effkernels::cuda
