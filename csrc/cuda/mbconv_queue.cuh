// MBConv blocks of a network in one launch, one or several that follow each other: expand, depthwise,
// squeeze-and-excitation, project and residual of each. The expanded tensor is in no memory; the result d of the
// depthwise convolution is written to scratch memory and read again, from the L2 cache where it is still there.
//
//            an item that expands                        an item that projects
//       x -> expand, depthwise, channel sums -> d ~~~~~> d * gate, project, + residual -> y ~~~~~> x of the next block
//            the last one of a unit: gate       unit done                     unit written
//
// The work is items, a thread block takes one, and their order is fixed. Which item it takes is not its index: the GPU
// may start thread blocks in any order. It is the number that it draws from a queue, a counter, when it starts.
//
// An item that expands is a thread block of expand_depthwise.cuh: some channels of a band of rows of a unit, which is
// an image or a few. In a block of the network without expansion it has these channels of x itself. The last of a unit
// to arrive forms the gate (depthwise_sums.cuh). An item that projects is a few neighbouring tiles of rows of
// pointwise.cuh; it waits until all units under its rows are done. The order is that of rounds, one for each image that
// is expanded or projected:
//
//   round      first_round      ... + ahead                 that of the next block       ... + all rounds of this one
//   expanded   unit 0   unit 1  ...      last unit          unit 0 of the next  unit 1 ...
//   projected                   unit 0   unit 1  ...                                     last unit
//
// so that between the items that expand a unit and those that project it there are more items than run at a time, and
// about as many between those that project an image and those of the next block of the network that read it
// (order_blocks). Waits are rare: while the last units of a block wait for their gates, the next one begins. Of a
// round, what the block before projects comes first, then what is expanded, then what is projected. An item that
// projects rows of several units is one of the last of them.
//
// No deadlock, for any number of thread blocks that run at a time. Numbers are drawn in order, by those that run, and
// an item waits for items with smaller numbers alone. These were drawn before, by thread blocks that run or have ended;
// the smallest number that has not ended waits for nothing. So the launch needs neither clusters nor a grid that is
// resident as a whole.
//
// Order between thread blocks. Some threads of one add to the counter of the unit (release) after a barrier, which
// makes what all threads wrote visible; who waits reads the counter (acquire) by some threads, and all of them go on
// after a barrier. x, d, the gate and the residual are then read by cp.async, from L2. The last thread block to leave
// puts all counters back to zero.
//
// Memory is used again: d of a network's block is where that of the block before the last one was, y where that of the
// third last was. Whoever could still read these projects in the block before the last one, or earlier: an item that
// expands waits until all of that block is projected, which it is long before.
//
// The same bits every time: the sums of an item do not depend on what runs beside it.
//
// Traffic. Memory: x, y, residual, the parameters; d once each way, but for what L2 keeps of `ahead` units. L2: x once
// for every kExpandedChannels channels; d once for each tile of columns of y; parameters once for every item.
//
// Limits (plan_mbconv_queue): 16-bit types, K of 3 and 5, strides 1 and 2, without expansion K of 3 and stride 1;
// channels that vectors of 8 divide; kMostStackedBlocks, whose descriptions are the kernel's arguments.
//
// Shared memory: that of an item of either kind | its number, the network's block, a flag.
#pragma once
#include "expand_depthwise.cuh"
#include "mbconv.h"
#include "pointwise.cuh"

namespace effkernels::cuda {

struct MBConvQueueBlock {
  ExpandDepthwiseArguments expand;
  PointwiseParams project;
  MBConvQueuePlan plan;
  unsigned* done;           // of every unit: items that expanded it
  unsigned* written;        // of every unit: items that projected some of its rows
  unsigned* items_written;  // of all units
};

struct MBConvQueueArguments {
  int count;       // of the network's blocks
  int item_at;     // in shared memory, in bytes: three words
  int waited_end;  // of the counters that are waited for; those of arrivals, which follow, are zero again by themselves
  unsigned* counters;  // of thread blocks that started, of those that left, then those of the network's blocks
  MBConvQueueBlock blocks[kMostStackedBlocks];
};
static_assert(sizeof(MBConvQueueArguments) <= 32764, "larger than the arguments of a kernel may be");

// Units whose round is before the block's round `rounds`.
__device__ __forceinline__ int units_before(const MBConvQueuePlan& plan, int rounds) {
  const DepthwisePlan& d = plan.expand.depthwise;
  return static_cast<int>(min(divided(max(rounds, 0) + d.images - 1, plan.by_images), int64_t(d.units)));
}

// Items that project before the block's round `rounds`: those with rows of the first units alone.
__device__ __forceinline__ int projected_before(const MBConvQueuePlan& plan, int rounds) {
  const DepthwisePlan& d = plan.expand.depthwise;
  const int units = units_before(plan, rounds - plan.ahead * d.images);
  if (units >= d.units) return static_cast<int>(plan.project.blocks);
  return static_cast<int>(divided(units * plan.unit_rows, plan.by_group_rows) * plan.project.column_tiles);
}

// What the thread block has to do, in shared memory: no thread keeps it in registers meanwhile.
struct QueueItem {
  int item, number;  // one that expands as it is counted among these, one that projects as -1 - that; network's block
};

// Where `is_after` begins to be true of the numbers from `first` to the one before `end`; `end` where it is nowhere. By
// a warp, which asks for 32 of them at a time.
template <class Predicate>
__device__ __forceinline__ int first_after(int first, int end, const Predicate& is_after) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  while (first < end) {
    const int step = (end - first + 31) / 32, at = first + lane * step;
    const unsigned before = __ballot_sync(0xffffffffu, at < end && !is_after(at));
    const int count = __popc(before);
    if (count == 0) return first;
    end = min(first + count * step, end), first += (count - 1) * step + 1;
  }
  return end;
}

// The item with a number in the launch; by a warp.
__device__ __forceinline__ QueueItem item_of(const MBConvQueueArguments& a, int drawn) {
  const int number = first_after(1, a.count, [&](int i) { return a.blocks[i].plan.first_item > drawn; }) - 1;
  const MBConvQueuePlan &plan = a.blocks[number].plan, &before = a.blocks[max(number - 1, 0)].plan;
  // What is left to project of the block before, whose rounds began so much earlier; of the first one nothing is.
  const int earlier = number > 0 ? plan.first_round - before.first_round : -(1 << 30);
  const int done_before = projected_before(before, earlier);
  const auto items_before = [&](int round) {
    return projected_before(before, earlier + round) - done_before + units_before(plan, round) * plan.expand_items +
           projected_before(plan, round);
  };
  const int in_block = drawn - plan.first_item, images = plan.expand.depthwise.images;
  const int rounds = (static_cast<int>(plan.expand.depthwise.units) + plan.ahead) * images;
  const int round = first_after(1, rounds, [&](int next) { return items_before(next) > in_block; }) - 1;
  int in_round = in_block - items_before(round);
  const int of_before = projected_before(before, earlier + round), first = units_before(plan, round);
  const int still = projected_before(before, earlier + round + 1) - of_before;
  if (in_round < still) return {-1 - (of_before + in_round), number - 1};
  in_round -= still;
  const int expands = (units_before(plan, round + 1) - first) * plan.expand_items;
  if (in_round < expands) return {first * plan.expand_items + in_round, number};
  return {-1 - (projected_before(plan, round) + in_round - expands), number};
}

// Until the counters of units are what they will be; ends without a barrier.
__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned value) {
  while (load_acquire(counter) < value) __nanosleep(64);
}

// All threads, until what an item that expands reads is written, and what it writes to is read.
__device__ __forceinline__ void wait_for_input(const MBConvQueueArguments& a, int number, int first_image, int images) {
  if (number == 0) return;
  const MBConvQueueBlock& before = a.blocks[number - 1];
  const MBConvQueuePlan& plan = before.plan;
  const int of_unit = plan.expand.depthwise.images, last = (first_image + images - 1) / of_unit;
  for (int unit = first_image / of_unit + static_cast<int>(threadIdx.x); unit <= last; unit += kDepthwiseThreads) {
    const int64_t first_row = unit * plan.unit_rows, last_row = min(first_row + plan.unit_rows, plan.project.rows) - 1;
    const int64_t groups = divided(last_row, plan.by_group_rows) - divided(first_row, plan.by_group_rows) + 1;
    wait_for(before.written + unit, static_cast<unsigned>(groups * plan.project.column_tiles));
  }
  if (number > 1 && threadIdx.x == kDepthwiseThreads - 1) {
    const MBConvQueueBlock& readers = a.blocks[number - 2];
    wait_for(readers.items_written, static_cast<unsigned>(readers.plan.project.blocks));
  }
  __syncthreads();
}

template <class Traits, bool kExpands = true, int kChannels = kExpandedChannels>
__device__ __forceinline__ void expand_item_of(const MBConvQueueArguments& a, int number, int item) {
  const MBConvQueueBlock& block = a.blocks[number];
  const ExpandDepthwiseTile of(block.expand.plan, static_cast<unsigned>(item));
  expand_depthwise_tile<Traits, kExpands, kChannels>(
      block.expand, of, [&](int first_image, int images) { wait_for_input(a, number, first_image, images); });
}

template <class Traits, bool kExpands = true, int kChannels = kExpandedChannels>
__device__ __forceinline__ void expand_item_of_strip(const MBConvQueueArguments& a, int number, int item) {
  using Short = DepthwiseTraits<typename Traits::T, Traits::kKernel, Traits::kStride, kShortStrip>;
  a.blocks[number].expand.depthwise.plan.strip == kShortStrip
      ? expand_item_of<Short, kExpands, kChannels>(a, number, item)
      : expand_item_of<Traits, kExpands, kChannels>(a, number, item);
}

template <class T>
__device__ __forceinline__ void expand_item(const MBConvQueueArguments& a, int number, int item) {
  const DepthwiseParams& p = a.blocks[number].expand.depthwise.depthwise;
  const ExpandDepthwiseArguments& of = a.blocks[number].expand;
  if (of.expand.weight.data == nullptr) {
    using Traits = DepthwiseTraits<T, 3, 1>;
    of.plan.channels == kCopiedChannels ? expand_item_of_strip<Traits, false, kCopiedChannels>(a, number, item)
                                        : expand_item_of_strip<Traits, false>(a, number, item);
  } else if (p.stride == 1) {
    p.kernel_w == 3 ? expand_item_of_strip<DepthwiseTraits<T, 3, 1>>(a, number, item)
                    : expand_item_of_strip<DepthwiseTraits<T, 5, 1>>(a, number, item);
  } else {
    p.kernel_w == 3 ? expand_item_of_strip<DepthwiseTraits<T, 3, 2>>(a, number, item)
                    : expand_item_of_strip<DepthwiseTraits<T, 5, 2>>(a, number, item);
  }
}

template <int kTile>
constexpr bool kIsItemTile = pointwise_item_built(kTile);
template <class T, int kTile>
using ItemTraits = PointwiseTraits<T, PointwiseProduct::kTensor16, kTile, pointwise_item_epilogue(kTile), false>;

// The units under the rows of an item that projects.
struct ProjectedUnits {
  int first, last;

  __device__ __forceinline__ ProjectedUnits(const MBConvQueuePlan& plan, int64_t group) {
    const int64_t group_rows = plan.group_rows, end_row = min((group + 1) * group_rows, plan.project.rows);
    first = static_cast<int>(divided(group * group_rows, plan.by_unit_rows));
    last = static_cast<int>(divided(end_row - 1, plan.by_unit_rows));
  }
};

template <class T, int kTile = 0>
__device__ __forceinline__ void project_item(const MBConvQueueBlock& a, int item) {
  if constexpr (kTile < kPointwiseTileCount) {
    if constexpr (kIsItemTile<kTile>) {
      const PointwisePlan& plan = a.plan.project;
      if (plan.tile == kTile) {
        using Tr = ItemTraits<T, kTile>;
        const int64_t group = divided(item, a.plan.by_column_tiles);
        PointwiseTiles of;
        of.first = group * plan.tiles, of.distance = 1, of.part = 0;
        of.count = static_cast<int>(min(int64_t(plan.tiles), plan.row_tiles - of.first));
        of.first_column = static_cast<int>(item - group * plan.column_tiles) * Tr::kColumns;
        const ProjectedUnits units(a.plan, group);
        PointwiseParams p = a.project;  // up to these units: the gates of the next may not be there yet
        p.batch = min(p.batch, (int64_t(units.last) + 1) * a.plan.expand.depthwise.images);
        multiply_tiles<Tr>(p, plan, PointwiseWork(), NothingMore(), of, [&] {
          for (int unit = units.first + static_cast<int>(threadIdx.x); unit <= units.last; unit += Tr::kThreads)
            wait_for(a.done + unit, static_cast<unsigned>(a.plan.expand_items));
          __syncthreads();
        });
        return;
      }
    }
    project_item<T, kTile + 1>(a, item);
  }
}

// Channel sums of an item that expands, and the gate by the last one.
template <class T>
__device__ __forceinline__ void finish_expansion(const MBConvQueueArguments& a, const volatile QueueItem& item) {
  const ExpandDepthwiseArguments& expand = a.blocks[item.number].expand;
  if (expand.depthwise.se.gate == nullptr) return;
  const ExpandDepthwiseTile of(expand.plan, static_cast<unsigned>(item.item));
  if (expand.plan.channels == kExpandedChannels)
    finish_sums<T, kExpandedChannels>(expand.depthwise, of.group, of.tile, of.unit, dynamic_shared<float>());
  else
    finish_sums<T>(expand.depthwise, of.group, of.tile, of.unit, dynamic_shared<float>());
}

// Makes an item's results known to those who wait for them; all threads. What a thread releases after the barrier is
// what all of them wrote, and read.
__device__ __forceinline__ void finish_item(const MBConvQueueArguments& a, const volatile QueueItem& of) {
  __syncthreads();
  const int item = of.item, number = of.number;
  const MBConvQueueBlock& block = a.blocks[number];
  if (item >= 0) {
    const ExpandDepthwiseTile tile(block.expand.plan, static_cast<unsigned>(item));
    if (threadIdx.x == 0) add_release(block.done + tile.unit, 1u);
  } else if (number + 1 < a.count) {
    const ProjectedUnits units(block.plan, divided(-1 - item, block.plan.by_column_tiles));
    for (int unit = units.first + static_cast<int>(threadIdx.x); unit <= units.last; unit += kDepthwiseThreads)
      add_release(block.written + unit, 1u);
    if (threadIdx.x == 0) add_release(block.items_written, 1u);
  }
}

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, kExpandDepthwiseBlocks)
    mbconv_queue(const __grid_constant__ MBConvQueueArguments a) {
  wait_for_previous();
  allow_next();
  volatile QueueItem& of = *reinterpret_cast<QueueItem*>(dynamic_shared<unsigned char>() + a.item_at);
  if (threadIdx.x < 32) {
    const int drawn = threadIdx.x == 0 ? static_cast<int>(atomicAdd(a.counters, 1u)) : 0;
    const QueueItem found = item_of(a, __shfl_sync(0xffffffffu, drawn, 0));
    if (threadIdx.x == 0) of.item = found.item, of.number = found.number;
  }
  __syncthreads();
  const int item = of.item, number = of.number;
  if (item >= 0) {
    expand_item<T>(a, number, item);
    finish_expansion<T>(a, of);
  } else {
    project_item<T>(a.blocks[number], -1 - item);
  }
  finish_item(a, of);
  unsigned* const flag = reinterpret_cast<unsigned*>(dynamic_shared<unsigned char>() + a.item_at + sizeof(QueueItem));
  if (!arrive_last(a.counters + 1, gridDim.x, flag)) return;
  for (int i = kQueueCounters + static_cast<int>(threadIdx.x); i < a.waited_end; i += kDepthwiseThreads)
    a.counters[i] = 0;
  if (threadIdx.x == 0) a.counters[0] = 0;
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_mbconv_queue(const MBConvQueueArguments& a, const Launch& at) {
  return launch(mbconv_queue<T>, at, a);
}
extern template cudaError_t run_mbconv_queue<__half>(const MBConvQueueArguments&, const Launch&);
extern template cudaError_t run_mbconv_queue<__nv_bfloat16>(const MBConvQueueArguments&, const Launch&);

}  // namespace effkernels::cuda
