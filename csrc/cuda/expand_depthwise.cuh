// y = activation(norm(depthwise convolution of e)), e = expand_activation(expand_norm(x * expand_weight^T)), and the
// channel means of y, in one launch: e is never in memory.
//
//   x: a group of rows      e: a ring of rows        y
//   +----------------+      +------------------+
//   |                |      |  K - 1 older     |
//   +----------------+      +------------------+     +---------------------+
//   |  group_rows    | ---> |  group_rows      | --> |  group_out_rows     |
//   +----------------+ mma  +------------------+     +---------------------+
//
// A block has kExpandedChannels channels of an image, or of several images after each other, a band of its rows and a
// tile of its columns. It walks down the band: the next group of rows of x is multiplied by the weights, which stay in
// shared memory, into the ring (expand_rows.cuh), and the rows of y that it makes possible are computed from the ring.
//
// Each row of x is expanded once for a band, so that the window's overlap costs nothing along the walk; bands and tiles
// of columns expand their borders again. In a block without expansion (mbconv_queue.cuh) e is x: its channels are
// copied to the ring. The padding of e is zero, not activation(shift): its columns in the ring are zeroed once and
// never written, its rows are skipped.
//
// Threads of the depthwise convolution are those of depthwise.cuh: kExpandedChannels / 8 along the channels, times
// lanes, each a strip of neighbouring pixels, a short one where the images are few; lanes that follow each other take
// strips below each other. e is rounded to the type of x as the two launches round it.
//
// Traffic. Memory: x, y, the parameters. L2: x once for every kExpandedChannels channels. Two barriers a group. Sums as
// in depthwise_sums.cuh: the same bits every time.
//
// Limits: 16-bit types, K of 3 and 5, strides 1 and 2, channels that vectors of 8 divide, two blocks on a
// multiprocessor by their shared memory (plan_expand_depthwise); all else takes two launches.
//
// Shared memory: parameters, sums, flag | expand's scale and shift | places of pixels | weights | group of rows of x |
// ring.
#pragma once
#include <type_traits>

#include "depthwise.cuh"
#include "expand_rows.cuh"

namespace effkernels::cuda {

struct ExpandDepthwiseArguments {
  PointwiseParams expand;
  DepthwiseArguments depthwise;  // its plan is that of the ExpandDepthwisePlan
  ExpandDepthwisePlan plan;
};

// One strip from the ring, whose first output looks at row `top` of x and the following; `first_row`: of the band.
// Columns outside of x are zeros in the ring.
template <class Traits, int kChannels = kExpandedChannels>
__device__ __forceinline__ void convolve_ring(const DepthwiseParams& p, const ExpandDepthwisePlan& plan,
                                              const unsigned char* column, int top, int first_row,
                                              const ThreadParameters<Traits::kVector>& taps,
                                              float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kVector;
  const int above = top < 0 ? -top : 0, row = top + above - first_row;
  int slot = row - static_cast<int>(SmallDivisor(plan.by_ring_rows)(row)) * plan.ring_rows;
  const unsigned char* from = column + slot * plan.ring_row_bytes;
  const int end = static_cast<int>(p.height) - top < K ? static_cast<int>(p.height) - top : K;
  const auto add = [&](int ky, auto first) {
    Vector<T, V> inputs[Traits::kInputs];
#pragma unroll
    for (int ix = 0; ix < Traits::kInputs; ++ix)
      inputs[ix] = *reinterpret_cast<const Vector<T, V>*>(from + ix * (kChannels * sizeof(T)));
    add_row<Traits, decltype(first)::value>(inputs, ky, taps, acc);
    from += plan.ring_row_bytes;
    if (++slot == plan.ring_rows) slot = 0, from = column;
  };
  add(above, std::true_type());
#pragma unroll 1
  for (int ky = above + 1; ky < end; ++ky) add(ky, std::false_type());
}

// The share of a thread in the depthwise convolution of a block's channels: see DepthwiseLane and StripCursor.
template <int V, int kChannels = kExpandedChannels>
struct ExpandedLane {
  int vector, lane, channel;  // of the block; along the strips; first of the thread's vector
  bool active;

  __device__ __forceinline__ ExpandedLane(const DepthwisePlan& division, int group, int channels) {
    constexpr unsigned kVectors = kChannels / V;
    vector = static_cast<int>(threadIdx.x % kVectors), lane = static_cast<int>(threadIdx.x / kVectors);
    channel = group * kChannels + vector * V;
    active = channel < channels && lane < division.lanes;
  }
  __device__ __forceinline__ StripCursor first_strip(const ExpandDepthwisePlan& plan) const {
    const int column = static_cast<int>(SmallDivisor(plan.by_group_out_rows)(lane));
    return StripCursor(lane - column * plan.group_out_rows, column, plan.strip_rows, plan.strip_columns,
                       plan.group_out_rows);
  }
};

// The part of the result that a block computes.
struct ExpandDepthwiseTile {
  int group, tile, unit;  // of channels, of the image, of images

  __device__ __forceinline__ ExpandDepthwiseTile(const ExpandDepthwisePlan& plan, unsigned number) {
    const auto divided = [](unsigned value, const PointwiseDivisor& by) {
      return static_cast<unsigned>(static_cast<uint64_t>(value) * by.multiplier >> by.shift);
    };
    const unsigned of_groups = divided(number, plan.by_channel_groups), of_tiles = divided(of_groups, plan.by_tiles);
    group = static_cast<int>(number - of_groups * plan.depthwise.channel_groups);
    tile = static_cast<int>(of_groups - of_tiles * plan.depthwise.tiles);
    unit = static_cast<int>(of_tiles);
  }
};

// Of x nothing that has to be waited for.
struct InputIsThere {
  __device__ __forceinline__ void operator()(int, int) const {}
};

// The tile and its channel sums; ends with a barrier. `wait`, called by all threads with the first image and the number
// of images, returns when x may be read and y written: the parameters are loaded meanwhile.
// `kChannels`: of the block; less than kExpandedChannels only without expansion.
template <class Traits, bool kExpands = true, int kChannels = kExpandedChannels, class Wait = InputIsThere>
__device__ __forceinline__ void expand_depthwise_tile(const ExpandDepthwiseArguments& a, const ExpandDepthwiseTile& of,
                                                      const Wait& wait = Wait()) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  static_assert(kExpands ? kChannels == kExpandedChannels : kChannels <= kExpandedChannels, "not compiled");
  const PointwiseParams& expand = a.expand;
  const DepthwiseParams& p = a.depthwise.depthwise;
  const DepthwisePlan& division = a.depthwise.plan;
  const ExpandDepthwisePlan& plan = a.plan;
  float* const parameters = dynamic_shared<float>();
  unsigned char* const shared_bytes = dynamic_shared<unsigned char>();
  float* const norm = reinterpret_cast<float*>(shared_bytes + plan.norm_at);
  uint16_t* const places = reinterpret_cast<uint16_t*>(shared_bytes + plan.places_at);
  unsigned char *const weights = shared_bytes + plan.weights_at, *const stage = shared_bytes + plan.x_at;
  unsigned char* const ring = shared_bytes + plan.ring_at;
  const SumsInShared shared(division, parameters, K * K, kChannels);

  const int group = of.group, tile = of.tile;
  const int channels = static_cast<int>(p.channels);
  const ExpandedLane<V, kChannels> at(division, group, channels);
  const int first_image = of.unit * division.images,
            images = min(division.images, static_cast<int>(p.batch) - first_image);
  const int band = static_cast<int>(SmallDivisor(plan.by_column_tiles)(tile));
  const int first_column = (tile - band * plan.column_tiles) * plan.columns;
  const int out_columns = min(plan.columns, static_cast<int>(p.out_width) - first_column);
  const ExpandColumns columns(p, first_column, out_columns);

  // Rows of y of the band, and those of x under them.
  const int first_out = band * plan.band_rows,
            out_end = min(first_out + plan.band_rows, static_cast<int>(p.out_height));
  const int first_row = max(first_out * S - p.pad_top, 0);
  const int end_row = min((out_end - 1) * S - p.pad_top + K, static_cast<int>(p.height));
  const unsigned char* x = static_cast<const unsigned char*>(expand.x) +
                           (int64_t(first_image) * expand.x_stride_n +
                            (int64_t(first_row) * static_cast<int>(p.width) + columns.first) * expand.x_stride_p) *
                               sizeof(T);
  const int own_channels = min(kChannels, channels - group * kChannels);
  if (!kExpands) x += group * (kChannels * sizeof(T));
  const int all_rows = end_row - first_row;
  int rows = min(plan.group_rows, all_rows);  // of the next group
  const auto load_rows = [&](int before) {    // before it
    const unsigned row_bytes = static_cast<unsigned>(p.width) * static_cast<unsigned>(expand.x_stride_p) * sizeof(T);
    const int left_out = static_cast<int>(p.width) - columns.count;
    load_expand_rows<T>(expand, plan, columns, product_after(x, before, row_bytes), left_out, rows,
                        kExpands ? static_cast<int>(expand.in_channels) : own_channels, stage);
    cp_async_commit();
  };

  if (kExpands) {
    load_expand_weights<T>(expand, plan, group * kChannels, weights);
    clear_odd_chunk<T>(expand, plan, stage);
  }
  set_places<kDepthwiseThreads, kChannels>(plan, columns, places);
  clear_padding<kDepthwiseThreads, kChannels>(plan, columns, ring);
  for (int i = static_cast<int>(threadIdx.x) * 4; i < division.lanes * kChannels; i += kDepthwiseThreads * 4)
    *reinterpret_cast<float4*>(shared.lane_sums + i) = make_float4(0.f, 0.f, 0.f, 0.f);
  // The first half of the threads takes the norm after the taps, the second half that of the expansion.
  constexpr unsigned kNorms = kDepthwiseThreads / 2;
  static_assert(kChannels <= kNorms, "a channel for each thread");
  const bool of_expand = kExpands && threadIdx.x >= kNorms;
  const int own = static_cast<int>(kExpands ? threadIdx.x % kNorms : threadIdx.x);
  load_parameters<T, V, K * K>(
      p, K * K, int64_t(group) * kChannels, kChannels, parameters, of_expand ? expand.norm : p.norm, own,
      of_expand ? expand.activation : p.activation, [&](int channel, ScaleShift by) {
        float* const to =
            of_expand ? norm + channel : parameters + K * K * kChannels + place_in_row<V>(channel, kChannels);
        to[0] = by.scale, to[kChannels] = by.shift;
      });
  wait(first_image, images);
  load_rows(0);

  const ThreadParameters<V> my(parameters, kChannels, at.vector);
  float* const my_sums = shared.lane_sums + at.lane * kChannels + at.vector * V;
  const int out_width = static_cast<int>(p.out_width);
  const unsigned image_size = static_cast<unsigned>(p.out_height) * out_width * channels;  // less than 2^30
  T* y = static_cast<T*>(p.y) + uint64_t(static_cast<unsigned>(first_image)) * image_size;
  const StripCursor first_strip = at.first_strip(plan);
  const int strips_of_row = (out_columns + kStrip - 1) / kStrip;

#pragma unroll 1
  for (int m = 0; m < images; ++m) {
    int made = first_out, slot = 0;  // rows of y; of the ring, for the first row of the group
#pragma unroll 1
    for (int left = all_rows; left > 0;) {
      cp_async_wait<0>();
      __syncthreads();
      if (kExpands)
        expand_rows<T>(expand, plan, columns, stage, weights, norm, places, rows, slot, ring);
      else
        copy_rows(plan, stage, places, own_channels / V, rows * columns.count, slot, ring);
      __syncthreads();
      left -= rows, slot += rows;
      if (slot >= plan.ring_rows) slot -= plan.ring_rows;
      // Rows of y whose windows are complete: all where nothing of x is left.
      const int possible = left == 0 ? out_end : (end_row - left + p.pad_top + S - K) >> (S / 2);
      if (left == 0) x += expand.x_stride_n * sizeof(T);
      const int before = left == 0 ? 0 : all_rows - left;
      rows = min(plan.group_rows, all_rows - before);
      if (left > 0 || m + 1 < images) load_rows(before);

#pragma unroll 1
      while (made < possible) {
        const int rows_here = min(plan.group_out_rows, possible - made);
#pragma unroll 1
        for (StripCursor strip = first_strip; at.active && strip.column < strips_of_row; strip.advance()) {
          if (strip.row >= rows_here) continue;
          const int row = made + strip.row, column = strip.column * kStrip;
          float acc[kStrip][V], sum[V];
          convolve_ring<Traits, kChannels>(p, plan, ring + (column * S * kChannels + at.vector * V) * sizeof(T),
                                           row * S - p.pad_top, first_row, my, acc);
          finish_strip<T>(my, K * K, p.activation, acc);
          // Elements from the image, in 32 bits: one addition a pixel.
          const unsigned to = (row * out_width + first_column + column) * channels + at.channel;
          store_strip(acc, out_columns - column, sum,
                      [&](int ox, const float (&value)[V]) { store_global(y + (to + ox * channels), value); });
          add_to_lane(sum, my_sums);
        }
        made += rows_here;
      }
    }
    add_lanes<kChannels>(division, shared.lane_sums, shared.sums + m * kChannels);
    y += image_size;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kDepthwiseThreads, kExpandDepthwiseBlocks)
    expand_depthwise(const __grid_constant__ ExpandDepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  const ExpandDepthwiseTile of(a.plan, blockIdx.x);
  expand_depthwise_tile<Traits>(a, of);
  finish_sums<typename Traits::T, kExpandedChannels>(a.depthwise, of.group, of.tile, of.unit, dynamic_shared<float>());
}

template <class T, int K, int S>
cudaError_t run_expand_depthwise_of(const ExpandDepthwiseArguments& a, const Launch& at) {
  return a.depthwise.plan.strip == kShortStrip ? launch(expand_depthwise<DepthwiseTraits<T, K, S, kShortStrip>>, at, a)
                                               : launch(expand_depthwise<DepthwiseTraits<T, K, S>>, at, a);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_expand_depthwise(const ExpandDepthwiseArguments& a, const Launch& at) {
  const bool small = a.depthwise.depthwise.kernel_w == 3;
  if (a.depthwise.depthwise.stride == 1)
    return small ? run_expand_depthwise_of<T, 3, 1>(a, at) : run_expand_depthwise_of<T, 5, 1>(a, at);
  return small ? run_expand_depthwise_of<T, 3, 2>(a, at) : run_expand_depthwise_of<T, 5, 2>(a, at);
}
extern template cudaError_t run_expand_depthwise<__half>(const ExpandDepthwiseArguments&, const Launch&);
extern template cudaError_t run_expand_depthwise<__nv_bfloat16>(const ExpandDepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
