// A whole MBConv block in one launch, for planes that no cluster holds: expand, depthwise, squeeze-and-excitation,
// project and residual. The expanded tensor is in no memory; the result d of the depthwise convolution is written to
// scratch memory and read again, from the L2 cache where it is still there.
//
//            an item that expands                        an item that projects
//       x -> expand, depthwise, channel sums -> d ~~~~~> d * gate, project, + residual -> y
//            the last one of a unit: gate       unit done
//
// The work is items, a block takes one, and their order is fixed. Which item a block takes is not its index: the GPU
// may start blocks in any order. It is the number that it draws from a queue, a counter, when it starts.
//
// An item that expands is a block of expand_depthwise.cuh: some channels of a band of rows of a unit, which is an image
// or a few. The last of a unit to arrive forms the gate (depthwise_sums.cuh). An item that projects is a few
// neighbouring tiles of rows of pointwise.cuh; it waits until all units under its rows are done. The order is
//
//   round  0              1                   ahead                                  ahead + 1
//          expand unit 0, expand unit 1, ..., expand unit ahead and project unit 0, expand ... + 1 and project unit 1,
//          ...
//
// so that between the items that expand a unit and those that project it there are more items than blocks that run at a
// time, and waits are rare. An item that projects rows of several units is one of the last of them.
//
// No deadlock, for any number of blocks that run at a time. Numbers are drawn in order, by blocks that run, and only an
// item that projects waits, for items that expand and have smaller numbers. These were drawn before, by blocks that run
// or have ended, and they wait for nothing. So the launch needs neither clusters nor a grid that is resident as a
// whole.
//
// Order between blocks. A block makes what it wrote visible and adds to the counter of the unit (release); who waits
// reads the counter (acquire) by some threads, and all of them go on after a barrier. d and the gate are then read by
// cp.async, from L2. The last block to leave puts all counters back to zero.
//
// The same bits every time: the sums of an item do not depend on what runs beside it.
//
// Traffic. Memory: x, y, residual, the parameters; d once each way, but for what L2 keeps of `ahead` units. L2: x once
// for every kExpandedChannels channels; d once for each tile of columns of y; parameters once for every item.
//
// Limits (plan_mbconv_queue): 16-bit types, K of 3 and 5, strides 1 and 2, channels that vectors of 8 divide.
//
// Shared memory: that of an item of either kind | its number | flag.
#pragma once
#include "expand_depthwise.cuh"
#include "mbconv.h"
#include "pointwise.cuh"

namespace effkernels::cuda {

struct MBConvQueueArguments {
  ExpandDepthwiseArguments expand;
  PointwiseParams project;
  MBConvQueuePlan plan;
  unsigned* counters;  // of blocks that started, of those that left, of the items of every unit that are done

  __device__ __forceinline__ unsigned* done(int64_t unit) const { return counters + 2 + unit; }
};

// Items that project rows of the units up to `unit` alone.
__device__ __forceinline__ int items_projected(const MBConvQueuePlan& plan, int unit) {
  if (unit < 0) return 0;
  if (unit + 1 >= plan.expand.depthwise.units) return static_cast<int>(plan.project.blocks);
  return static_cast<int>(divided((unit + 1) * plan.unit_rows, plan.by_group_rows) * plan.project.column_tiles);
}

// Items of the rounds before `round`.
__device__ __forceinline__ int items_before(const MBConvQueuePlan& plan, int round) {
  const int units = static_cast<int>(plan.expand.depthwise.units);
  return min(round, units) * plan.expand_items + items_projected(plan, round - 1 - plan.ahead);
}

// The item with a number in the order: one that expands as it is counted among these, one that projects as -1 - that.
__device__ __forceinline__ int item_of(const MBConvQueuePlan& plan, int number) {
  const int units = static_cast<int>(plan.expand.depthwise.units);
  int round = 0, end = units + plan.ahead;  // the item is in one of the rounds from `round` to the one before `end`
  while (end - round > 1) {
    const int middle = (round + end) / 2;
    if (items_before(plan, middle) <= number) {
      round = middle;
    } else {
      end = middle;
    }
  }
  const int in_round = number - items_before(plan, round), expands = round < units ? plan.expand_items : 0;
  if (in_round < expands) return round * plan.expand_items + in_round;
  return -1 - (items_projected(plan, round - 1 - plan.ahead) + in_round - expands);
}

template <class Traits>
__device__ __forceinline__ void expand_item(const MBConvQueueArguments& a, int item) {
  const DepthwiseArguments& depthwise = a.expand.depthwise;
  const ExpandDepthwiseTile of(depthwise.plan, static_cast<unsigned>(item));
  expand_depthwise_tile<Traits>(a.expand, of);
  if (depthwise.se.gate != nullptr)
    finish_sums<typename Traits::T>(depthwise, of.group, of.tile, of.unit, dynamic_shared<float>());
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) add_release(a.done(of.unit), 1u);
}

template <int kTile>
constexpr bool kIsItemTile = pointwise_item_built(kTile);
template <class T, int kTile>
using ItemTraits = PointwiseTraits<T, PointwiseProduct::kTensor16, kTile, pointwise_item_epilogue(kTile), false>;

template <class T, int kTile = 0>
__device__ __forceinline__ void project_item(const MBConvQueueArguments& a, int item) {
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
        const int64_t last_row = min((of.first + of.count) * Tr::kRows, plan.rows) - 1;
        const int64_t last_unit = divided(last_row, a.plan.by_unit_rows);
        for (int64_t unit = divided(of.first * Tr::kRows, a.plan.by_unit_rows) + threadIdx.x; unit <= last_unit;
             unit += Tr::kThreads)
          while (load_acquire(a.done(unit)) < static_cast<unsigned>(a.plan.expand_items)) __nanosleep(64);
        __syncthreads();
        PointwiseParams p = a.project;  // up to these units: the gates of the next may not be there yet
        p.batch = min(p.batch, (last_unit + 1) * a.plan.expand.depthwise.images);
        multiply_tiles<Tr>(p, plan, PointwiseWork(), NothingMore(), of);
        return;
      }
    }
    project_item<T, kTile + 1>(a, item);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kDepthwiseThreads, kExpandDepthwiseBlocks)
    mbconv_queue(const __grid_constant__ MBConvQueueArguments a) {
  wait_for_previous();
  allow_next();
  int* const shared_item = reinterpret_cast<int*>(dynamic_shared<unsigned char>() + a.plan.item_at);
  if (threadIdx.x == 0) *shared_item = item_of(a.plan, static_cast<int>(atomicAdd(a.counters, 1u)));
  __syncthreads();
  const int item = *shared_item;
  if (item >= 0) {
    expand_item<Traits>(a, item);
  } else {
    project_item<typename Traits::T>(a, -1 - item);
  }
  if (!arrive_last(a.counters + 1, gridDim.x, reinterpret_cast<unsigned*>(shared_item + 1))) return;
  for (int64_t unit = threadIdx.x; unit < a.plan.expand.depthwise.units; unit += kDepthwiseThreads) *a.done(unit) = 0;
  if (threadIdx.x == 0) a.counters[0] = 0;
}

template <class T, int S>
cudaError_t run_mbconv_queue_of(const MBConvQueueArguments& a, const Launch& at) {
  return a.expand.depthwise.depthwise.kernel_w == 3 ? launch(mbconv_queue<DepthwiseTraits<T, 3, S>>, at, a)
                                                    : launch(mbconv_queue<DepthwiseTraits<T, 5, S>>, at, a);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_mbconv_queue(const MBConvQueueArguments& a, const Launch& at) {
  return a.expand.depthwise.depthwise.stride == 1 ? run_mbconv_queue_of<T, 1>(a, at) : run_mbconv_queue_of<T, 2>(a, at);
}
extern template cudaError_t run_mbconv_queue<__half>(const MBConvQueueArguments&, const Launch&);
extern template cudaError_t run_mbconv_queue<__nv_bfloat16>(const MBConvQueueArguments&, const Launch&);

}  // namespace effkernels::cuda
