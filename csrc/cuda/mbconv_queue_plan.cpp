// The plan of mbconv_queue: the items of both kinds, and their order.
#include <algorithm>
#include <limits>

#include "../sizes.h"
#include "mbconv.h"

namespace effkernels::cuda {
namespace {

int64_t up(int64_t value, int64_t unit) { return divide_up(value, unit) * unit; }

DepthwiseCall depthwise_of(const MBConvCall& call) { return {call.depthwise, call.se, false, false}; }

// As it is once the gate has an address.
PointwiseParams gated_project(const MBConvCall& call) {
  PointwiseParams project = *call.project;
  if (call.se != nullptr) project.gate = {reinterpret_cast<const void*>(uintptr_t(1) << 12), project.dtype};
  return project;
}

}  // namespace

MBConvQueuePlan plan_mbconv_queue(const MBConvCall& call, const DeviceLimits& limits, bool more) {
  constexpr int64_t kOfTheSystem = 1024;  // of shared memory, for each block
  const DepthwiseParams& p = *call.depthwise;
  MBConvQueuePlan plan;
  const auto refused = [&plan](const char* reason) {
    plan.fits = false, plan.reason = reason;
    return plan;
  };
  if (p.dtype == DType::kFloat32) return refused("float32");
  if (!expands_in_shared_memory(*call.expand, p))
    return refused("kernel, stride, padding or channels are not compiled");

  const PointwiseParams project = gated_project(call);
  const PointwisePlan other = plan_pointwise_items(project, kExpandDepthwiseBlocks, limits.shared_per_block, limits);
  const BesideItems beside{clocks_of_items(project, other, limits), more};
  plan.expand = plan_expand_depthwise(*call.expand, depthwise_of(call), limits, &beside);
  if (!plan.expand.fits) return refused("a group of rows does not fit into shared memory");
  const ItemClocks expanding = clocks_of_items(*call.expand, depthwise_of(call), plan.expand, limits);
  // Tiles that leave room for as many blocks as the items that expand; where shared memory is small, for fewer.
  for (int64_t resident = expand_depthwise_resident(plan.expand.shared_bytes + kQueueItemBytes, limits);
       plan.project.blocks == 0 && resident > 0; --resident) {
    const int64_t shared = limits.shared_per_multiprocessor / resident - kOfTheSystem;
    plan.project = plan_pointwise_items(project, static_cast<int>(resident),
                                        std::min<int64_t>(limits.shared_per_block, shared) - kQueueItemBytes, limits,
                                        more ? &expanding : nullptr);
  }
  if (plan.project.blocks == 0) return refused("output channels are no vectors of 8, or the weights of another type");

  const DepthwisePlan& d = plan.expand.depthwise;
  plan.expand_items = d.tiles * d.channel_groups;
  plan.unit_rows = d.images * p.out_height * p.out_width;
  plan.items = d.units * plan.expand_items + plan.project.blocks;
  const int64_t group_rows = int64_t(plan.project.tiles) * kPointwiseTiles[plan.project.tile].rows;
  if (plan.project.rows + group_rows + plan.unit_rows > std::numeric_limits<int32_t>::max() ||
      plan.items > std::numeric_limits<int32_t>::max())
    return refused("more rows than 32 bits index");
  plan.by_images = divisor(d.images);
  plan.by_unit_rows = divisor(plan.unit_rows);
  plan.by_group_rows = divisor(group_rows);
  plan.group_rows = group_rows;
  plan.by_column_tiles = divisor(plan.project.column_tiles);
  plan.shared_bytes =
      up(std::max<int64_t>(plan.expand.shared_bytes, plan.project.shared_bytes), kQueueItemBytes) + kQueueItemBytes;
  const int64_t at_once = limits.multiprocessors * expand_depthwise_resident(plan.shared_bytes, limits);
  // Between the items that expand a unit and those that project it: a quarter more items than run at a time, so that d
  // is read from L2 where it is small. GPUs with the memory of data centers (capability x.0) have the bandwidth for
  // more: what is left to project when the last units are expanded then fills the multiprocessors. A block without
  // expansion has few instructions for a byte: where its d is large and what is in flight is not, it needs L2 all the
  // same.
  const bool needs_l2 = !expands(*call.expand) && bytes_in_flight(p, p.batch) > kBytesInFlight &&
                        bytes_in_flight(p, at_once / plan.expand_items + 2) <= kBytesInFlight;
  const int64_t between = needs_l2 ? at_once : limits.capability % 10 == 0 ? 4 * at_once : at_once + at_once / 4;
  plan.ahead = static_cast<int>(std::min(d.units, divide_up(between, plan.expand_items) + 1));
  plan.fits = true;
  return plan;
}

namespace {

// Rounds from the first projection of a block to the first expansion of the next. An image is projected one round
// after the other, but in items that have rows of several, and a unit has several images, so that the last round whose
// results a unit of the next block reads is so much later than its own. As many items as run at a time come between,
// which hides most of the way to these results.
int64_t rounds_between(const MBConvQueuePlan& block, const MBConvQueuePlan& next, int64_t at_once) {
  const int64_t images = block.expand.depthwise.images, next_images = next.expand.depthwise.images;
  const int64_t pixels = block.unit_rows / images, rounds = block.expand.depthwise.units * images;
  const int64_t needed = images + next_images - 2 + divide_up(block.group_rows - 1, pixels);
  const double of_round =
      double(next.expand_items) / double(next_images) + double(block.project.blocks) / double(rounds);
  return std::min(std::max(needed, static_cast<int64_t>(double(at_once) / of_round)), rounds);
}

// Items of a block that come before a round, which is not its first one, and in which all of it is expanded.
int64_t items_before(const MBConvQueuePlan& block, int64_t round) {
  const int64_t images = block.expand.depthwise.images, units = block.expand.depthwise.units;
  const int64_t done = divide_up(std::max<int64_t>(round - block.first_round - block.ahead * images, 0), images);
  if (done >= units) return block.items;
  return units * block.expand_items + done * block.unit_rows / block.group_rows * block.project.column_tiles;
}

}  // namespace

bool order_blocks(const DeviceLimits& limits, int64_t shared_bytes, std::vector<MBConvQueuePlan>& blocks) {
  const int64_t at_once = limits.multiprocessors * expand_depthwise_resident(shared_bytes, limits);
  int64_t round = 0, items = 0;  // items: of the blocks before
  for (size_t i = 0; i < blocks.size(); ++i) {
    MBConvQueuePlan& block = blocks[i];
    const int64_t images = block.expand.depthwise.images, rounds = block.expand.depthwise.units * images;
    if (round + 2 * rounds > std::numeric_limits<int32_t>::max()) return false;
    block.first_round = static_cast<int>(round), block.first_item = static_cast<int>(items);
    if (i > 0) block.first_item -= static_cast<int>(blocks[i - 1].items - items_before(blocks[i - 1], round));
    if (i + 1 == blocks.size()) break;
    round += std::max(rounds, block.ahead * images + rounds_between(block, blocks[i + 1], at_once));
    items += block.items;
  }
  return true;
}

DepthwiseScratch mbconv_queue_scratch(const MBConvCall& call, const MBConvQueuePlan& plan) {
  return depthwise_scratch(depthwise_of(call), plan.expand.depthwise);
}

namespace {

// Of its units, of all of them, of its sums.
int64_t counters_of(const MBConvCall& call, const MBConvQueuePlan& plan) {
  return 2 * plan.expand.depthwise.units + 1 + mbconv_queue_scratch(call, plan).arrivals;
}

}  // namespace

int64_t mbconv_queue_counters(const MBConvCall* calls, const MBConvStackPlan& plan) {
  int64_t count = kQueueCounters;
  for (int i = 0; i < plan.count; ++i) count += counters_of(calls[i], plan.items[i]);
  return count;
}

PlannedLaunch planned_queue(const MBConvCall* calls, const MBConvStackPlan& plan) {
  PlannedLaunch one;
  one.kernel = "mbconv_queue";
  one.grid = 0;
  one.block_x = kDepthwiseThreads;
  one.shared_bytes = plan.shared_bytes;
  one.workspace_bytes = kQueueCounters * int64_t(sizeof(unsigned));
  for (int i = 0; i < plan.count; ++i) {
    one.grid += plan.items[i].items;
    one.workspace_bytes += mbconv_queue_bytes(calls[i], plan.items[i]);
  }
  return one;
}

int64_t mbconv_queue_bytes(const MBConvCall& call, const MBConvQueuePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const DepthwiseScratch scratch = mbconv_queue_scratch(call, plan);
  const int64_t gates = call.se != nullptr ? p.batch * p.channels : 0;
  return 2 * (product({p.batch, p.out_height, p.out_width, p.channels}) + gates) +
         (scratch.partial + scratch.hidden + counters_of(call, plan)) * int64_t(sizeof(float));
}

}  // namespace effkernels::cuda
