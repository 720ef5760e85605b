// expand_depthwise_squeeze on CUDA in one launch, as the adaptor sees it: plain C++.
#pragma once
#include "../sizes.h"
#include "depthwise.h"
#include "pointwise.h"

namespace effkernels::cuda {

// Expanded channels of a block. Networks expand a multiple of 8 channels by 6 (or by 4), so that 48 divide what they
// expand to, and the weights of 48 channels leave room for three blocks on a multiprocessor.
constexpr int kExpandedChannels = 48;
constexpr int kExpandDepthwiseBlocks = 3;  // of kDepthwiseThreads, on a multiprocessor: 168 registers for a thread

// A warp multiplies two fragments of 16 pixels at a time, which read the weights once, or one: two where each warp has
// some, and where there are more blocks than run at a time two of any two.
constexpr int kFragmentPixels = 16;
constexpr int kPixelsOfSingles = kDepthwiseThreads / 32 * kFragmentPixels;  // of a group, at most

// n / divisor for n * divisor < 2^31 by a multiply: n * multiplier >> 31.
constexpr uint32_t multiplier_of(int divisor) { return (1u << 31) / static_cast<uint32_t>(divisor) + 1; }

// The division of the work; expand_depthwise.cuh explains the terms.
struct ExpandDepthwisePlan {
  bool fits = false;                 // else two launches: pointwise and depthwise
  DepthwisePlan depthwise;           // threads along the channels and strips; blocks; tiles are bands * column_tiles
  int channels = kExpandedChannels;  // of a block; without expansion kCopiedChannels where fewer are left over
  int bands = 1;                     // blocks along the rows of one image
  int band_rows = 1;                 // output rows of a band, at most
  int column_tiles = 1;              // blocks along the columns of one image
  int columns = 1;                   // output columns of a tile, at most
  int group_rows = 1;                // rows of x between two barriers
  int group_out_rows = 1;            // rows of y that they make possible
  int ring_rows = 1;                 // rows of the expanded tensor in shared memory
  int ring_row_bytes = 0;
  int pixels_of_singles = kPixelsOfSingles;  // of a group, at most, where a warp multiplies one fragment at a time
  bool pairs = false;                        // more than that
  int stage_pixels = 0;                      // of x in shared memory: those of a group, in whole fragments or pairs
  int slices = 1;                            // of 64 bytes of a pixel of x
  int chunks = 2;                            // of 16 bytes of a pixel of x, in whole fragments of 32 bytes
  uint32_t by_ring_rows = 0;                 // multiplier_of them
  // From a block's number to its channels and tile, from there to its columns; from a lane to its first strip, and from
  // one of its strips to the next (StripCursor).
  PointwiseDivisor by_channel_groups, by_tiles;
  uint32_t by_column_tiles = 0, by_group_out_rows = 0;  // multiplier_of
  int strip_rows = 0, strip_columns = 0;
  int norm_at = 0, places_at = 0, weights_at = 0, x_at = 0, ring_at = 0;  // in shared memory, in bytes
  int64_t shared_bytes = 0;
  int64_t clocks = 0;  // roughly, of the launch or of all items: what the plan was chosen by
};

// Of the places of the pixels of a group, one of 16 bits for each: see expand_rows.cuh.
constexpr int64_t place_bytes(int stage_pixels) { return int64_t(stage_pixels) * 2; }

// Of a block without expansion the result of `expand` is its x. Such blocks are items of a queue alone, for kernels of
// 3x3 and stride 1, which the first blocks of networks have, and of so many channels for a thread block.
constexpr int kCopiedChannels = 32;
inline bool expands(const PointwiseParams& expand) { return expand.weight.data != nullptr; }
// Whether expand_rows.cuh and the depthwise convolution from its rows are compiled for such a call.
bool expands_in_shared_memory(const PointwiseParams& expand, const DepthwiseParams& depthwise);
// Sets what follows from columns and group_rows: how x is kept in shared memory.
void lay_out_x(const PointwiseParams& expand, const DepthwiseParams& depthwise, ExpandDepthwisePlan& plan);

// Of the results of a block without expansion, between its two kinds of items: half of the L2 of an H100 or H200. Such
// a block has few instructions for a byte.
constexpr int64_t kBytesInFlight = int64_t(25) << 20;
inline int64_t bytes_in_flight(const DepthwiseParams& p, int64_t images) {
  return product({images < p.batch ? images : p.batch, p.out_height, p.out_width, p.channels, 2});
}

// The blocks are items of a queue: what is beside them there.
struct BesideItems {
  int64_t clocks = 0;  // of the items that project
  bool more = false;   // blocks of the network
};
// A pure function of sizes, strides, types, the alignment of the pointers, and the limits of the device. The result of
// `expand` and the input of `call.depthwise` are the same tensor, which is never written; their pointers do not count.
// Those of the last shapes are kept (plan_memory.h). `beside`: null where the blocks are a launch.
ExpandDepthwisePlan plan_expand_depthwise(const PointwiseParams& expand, const DepthwiseCall& call,
                                          const DeviceLimits& limits, const BesideItems* beside = nullptr);
// Clocks of a plan's blocks as items of a queue; of one with the gate that the last of a unit forms. A model, to weigh
// plans by.
ItemClocks clocks_of_items(const PointwiseParams& expand, const DepthwiseCall& call, const ExpandDepthwisePlan& plan,
                           const DeviceLimits& limits);
// Blocks of a plan that a multiprocessor holds if each takes `shared_bytes`.
int64_t expand_depthwise_resident(int64_t shared_bytes, const DeviceLimits& limits);
PlannedLaunches planned_launches(const PointwiseParams& expand, const DepthwiseCall& call,
                                 const ExpandDepthwisePlan& plan);

// Of a plan that fits; scratch memory as of depthwise_scratch(call, plan.depthwise).
const char* launch_expand_depthwise(const PointwiseParams& expand, const DepthwiseCall& call,
                                    const ExpandDepthwisePlan& plan, const DepthwiseWork& work, void* stream);

}  // namespace effkernels::cuda
