// y = activation(norm(depthwise convolution of x)) in one pass over x, and on the way, without a second pass, the
// channel means of y and squeeze-and-excitation's gate.
//
// Threads and data. A block has kDepthwiseThreads threads: `channel_vectors` along the channels, each a vector of 16
// bytes (or a single channel where the channels do not divide), times `lanes`. The output plane is cut into strips:
// kStrip neighbouring pixels of one row. A lane takes one strip per round; neighbouring lanes take strips below each
// other, so that the K rows which neighbours share come from the L1 cache. A thread keeps the taps of one kernel row in
// registers and slides over the input row once, adding each input vector to every output that it reaches. Of a kernel
// whose size is known at run time only, it keeps kTaps taps of a row at a time. Where a launch would leave
// multiprocessors without work, strips have 2 pixels, and a thread reads the whole window of one before it computes.
//
// Traffic. Memory: x once, y once, the parameters. L1: every input vector K times for a strip of kStrip outputs, and of
// a kernel of KH x KW up to KH * ceil(KW / kTaps) times.
//
// Sums. A thread adds its strips in order, the block its lanes in order, the last block to arrive the blocks of the
// image in order: the same bits every time, in one launch.
#pragma once
#include "depthwise_strip.cuh"
#include "depthwise_sums.cuh"

namespace effkernels::cuda {

// The part of the output that a thread computes.
struct DepthwiseLane {
  int group;    // of channels
  int tile;     // run of strips
  int unit;     // run of images
  int vector;   // of channels, within the block
  int lane;     // along the strips
  int channel;  // first of the thread's vector
  bool active;  // a channel that exists, and a lane that is needed

  __device__ __forceinline__ DepthwiseLane(const DepthwiseParams& p, const DepthwisePlan& plan, int group_, int tile_,
                                           int unit_)
      : group(group_), tile(tile_), unit(unit_) {
    vector = threadIdx.x % plan.channel_vectors;
    lane = threadIdx.x / plan.channel_vectors;
    channel = (group * plan.channel_vectors + vector) * plan.vector;
    active = channel < p.channels && lane < plan.lanes;
  }
};

// The strips of a lane, one after the other: strips below each other first. Divides once, not for each of them.
struct StripCursor {
  int index, row, column;
  int step, step_rows, step_columns, rows;

  __device__ __forceinline__ StripCursor(int first, int step_, int rows_)
      : index(first),
        row(first % rows_),
        column(first / rows_),
        step(step_),
        step_rows(step_ % rows_),
        step_columns(step_ / rows_),
        rows(rows_) {}
  // The same where a plan has the quotients; without an index.
  __device__ __forceinline__ StripCursor(int row_, int column_, int step_rows_, int step_columns_, int rows_)
      : index(0),
        row(row_),
        column(column_),
        step(0),
        step_rows(step_rows_),
        step_columns(step_columns_),
        rows(rows_) {}
  __device__ __forceinline__ void advance() {
    index += step, row += step_rows, column += step_columns;
    if (row >= rows) row -= rows, ++column;
  }
};

template <class Traits>
__global__ void __launch_bounds__(kDepthwiseThreads, Traits::kBlocks)
    depthwise_strips(const __grid_constant__ DepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const int block_channels = plan.channel_vectors * V, tap_count = K > 0 ? K * K : p.kernel_h * p.kernel_w;
  float* parameters = dynamic_shared<float>();
  const SumsInShared shared(plan, parameters, tap_count);

  const int group = blockIdx.x % plan.channel_groups, tile = blockIdx.x / plan.channel_groups % plan.tiles;
  const DepthwiseLane at(p, plan, group, tile, blockIdx.x / plan.channel_groups / plan.tiles);
  const bool sums = p.pooled != nullptr || a.se.gate != nullptr;
  if (sums) clear_lanes(plan, shared.lane_sums);
  load_parameters<T, V, K * K>(p, tap_count, int64_t(group) * block_channels, block_channels, parameters);
  const ThreadParameters<V> my(parameters, block_channels, at.vector);
  float* my_sums = shared.lane_sums + at.lane * block_channels + at.vector * V;

  for (int m = 0; m < plan.images; ++m) {
    const int image = at.unit * plan.images + m;
    if (image >= p.batch) break;
    const T* from = static_cast<const T*>(p.x) + int64_t(image) * p.x_stride_n + at.channel;
    T* to = static_cast<T*>(p.y) + int64_t(image) * p.out_height * p.out_width * p.channels + at.channel;
    StripCursor strip(tile * plan.rounds * plan.lanes + at.lane, plan.lanes, plan.out_height);
    for (int round = 0; round < plan.rounds; ++round, strip.advance()) {
      if (!at.active || strip.index >= plan.strips) break;
      const int row = strip.row, column = strip.column * kStrip;
      float acc[kStrip][V], sum[V];
      start_strip<T>(my, tap_count, acc);
      const int top = row * S - p.pad_top, left = column * S - p.pad_left;
      if constexpr (K > 0)
        convolve_strip<Traits>(p, from, top, left, my, acc);
      else
        convolve_any_strip<Traits>(p, from, top, left, my, acc);
      finish_strip<T>(my, tap_count, p.activation, acc);
      T* const first = to + (int64_t(row) * p.out_width + column) * p.channels;
      store_strip(acc, static_cast<int>(p.out_width) - column, sum,
                  [&](int ox, const float (&value)[V]) { store_global(first + ox * p.channels, value); });
      if (sums) add_to_lane(sum, my_sums);
    }
    if (sums) add_lanes(plan, shared.lane_sums, shared.sums + m * block_channels);
  }
  if (sums) finish_sums<T>(a, group, tile, at.unit, parameters);
}

// Any stride, dilation and channel count: one output per thread and round, taps from shared memory.
template <class T, int V>
__global__ void __launch_bounds__(kDepthwiseThreads, 4) depthwise_any(const __grid_constant__ DepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  const int block_channels = plan.channel_vectors * V, tap_count = p.kernel_h * p.kernel_w;
  float* parameters = dynamic_shared<float>();
  const SumsInShared shared(plan, parameters, tap_count);

  const int group = blockIdx.x % plan.channel_groups, tile = blockIdx.x / plan.channel_groups % plan.tiles;
  const DepthwiseLane at(p, plan, group, tile, blockIdx.x / plan.channel_groups / plan.tiles);
  const bool sums = p.pooled != nullptr || a.se.gate != nullptr;
  if (sums) clear_lanes(plan, shared.lane_sums);
  load_parameters<T, V, 0>(p, tap_count, int64_t(group) * block_channels, block_channels, parameters);
  const ThreadParameters<V> my(parameters, block_channels, at.vector);
  float* my_sums = shared.lane_sums + at.lane * block_channels + at.vector * V;

  for (int m = 0; m < plan.images; ++m) {
    const int image = at.unit * plan.images + m;
    if (image >= p.batch) break;
    const T* from = static_cast<const T*>(p.x) + int64_t(image) * p.x_stride_n + at.channel;
    T* to = static_cast<T*>(p.y) + int64_t(image) * p.out_height * p.out_width * p.channels + at.channel;
    StripCursor strip(tile * plan.rounds * plan.lanes + at.lane, plan.lanes, plan.out_height);
    for (int round = 0; round < plan.rounds; ++round, strip.advance()) {
      if (!at.active || strip.index >= plan.strips) break;
      const int row = strip.row, column = strip.column;
      float acc[1][V];
      start_strip<T>(my, tap_count, acc);
      for (int ky = 0; ky < p.kernel_h; ++ky) {
        const int iy = row * p.stride - p.pad_top + ky * p.dilation;
        if (iy < 0 || iy >= p.height) continue;
        for (int kx = 0; kx < p.kernel_w; ++kx) {
          const int ix = column * p.stride - p.pad_left + kx * p.dilation;
          if (ix < 0 || ix >= p.width) continue;
          float value[V];
          load(from + iy * p.x_stride_h + ix * p.x_stride_w, value);
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            const Vector<float, kQuad<V>> tap = my(ky * p.kernel_w + kx, part);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) acc[0][part + i] = fmaf(value[part + i], tap.at[i], acc[0][part + i]);
          }
        }
      }
      finish_strip<T>(my, tap_count, p.activation, acc);
      store_global(to + (int64_t(row) * p.out_width + column) * p.channels, acc[0]);
      if (sums) add_to_lane(acc[0], my_sums);
    }
    if (sums) add_lanes(plan, shared.lane_sums, shared.sums + m * block_channels);
  }
  if (sums) finish_sums<T>(a, group, tile, at.unit, parameters);
}

template <class T, int S>
cudaError_t run_kernel_size(const DepthwiseArguments& a, const Launch& at) {
  if (a.plan.strip == kShortStrip)
    return a.depthwise.kernel_h == 3 ? launch(depthwise_strips<DepthwiseTraits<T, 3, S, kShortStrip>>, at, a)
                                     : launch(depthwise_strips<DepthwiseTraits<T, 5, S, kShortStrip>>, at, a);
  switch (compiled_kernel(a.depthwise.kernel_h, a.depthwise.kernel_w)) {
    case 3:
      return launch(depthwise_strips<DepthwiseTraits<T, 3, S>>, at, a);
    case 5:
      return launch(depthwise_strips<DepthwiseTraits<T, 5, S>>, at, a);
    case 7:
      return launch(depthwise_strips<DepthwiseTraits<T, 7, S>>, at, a);
    case 9:
      return launch(depthwise_strips<DepthwiseTraits<T, 9, S>>, at, a);
    default:
      return launch(depthwise_strips<DepthwiseTraits<T, 0, S>>, at, a);
  }
}

// Chooses the instantiation that the plan names; one .cu file per element type instantiates it.
template <class T>
cudaError_t run_depthwise(const DepthwiseArguments& a, const Launch& at) {
  if (a.plan.unrolled) return a.depthwise.stride == 1 ? run_kernel_size<T, 1>(a, at) : run_kernel_size<T, 2>(a, at);
  if (a.plan.vector == 1) return launch(depthwise_any<T, 1>, at, a);
  return launch(depthwise_any<T, kVectorOf<T>>, at, a);
}

extern template cudaError_t run_depthwise<float>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_depthwise<__half>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_depthwise<__nv_bfloat16>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
