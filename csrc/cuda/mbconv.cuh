// A whole MBConv block in one launch: expand, depthwise, squeeze-and-excitation, project and residual. A cluster of
// blocks (`team`) has an image, and what is between x and y never leaves its multiprocessors.
//
//            x, all channels     e, 48 channels      held, all of the block's     partial sums of y
//   +------+ +-------------+ mma +-------------+     +------------------+     mma +----------------+
//   | rank | | whole image | --> | whole plane | --> | depthwise result | --gate->| all channels   | --> y
//   +------+ +-------------+     +-------------+     +------------------+         +----------------+
//                                 group after group        |       ^                  |  by all ranks,
//                                                          v       |                  v  in order
//                                              hidden values: sums of all ranks    a share of y
//
// A block has `groups` groups of kExpandedChannels expanded channels over the whole plane, so that no border is
// computed twice. For each group: x times the group's weights, norm and activation into `ring`, which has the columns
// of the padding as zeros (expand_rows.cuh, with all rows of x as one group of rows), then the depthwise convolution
// from there into `held` (threads and strips as in expand_depthwise.cuh), with channel sums as in depthwise_sums.cuh.
//
// Squeeze-and-excitation: every block has the means of its channels, multiplies them by its columns of w_reduce, and
// adds the R values of all ranks, in their order, through distributed shared memory; it then computes the gate of its
// own channels. The project product is split over the expanded channels in the same way (mbconv_project.cuh): each
// block multiplies its gated channels by its columns of the weights, for all pixels and output channels, and each then
// adds the sums of all ranks, in their order, for its share of y. Where these sums do not fit into shared memory, they
// are computed in several passes over the output channels.
//
// Values between the stages are rounded to the type of x as several launches round them. The same bits every time; a
// team of another size adds in another order.
//
// A cluster takes several images after each other where there are many; weights that fit stay in shared memory.
// Before the first image a thread asks for taps and norms (mbconv_parameters.cuh), for weights and x, then it keeps the
// former.
//
// Traffic. Memory: x, y, residual, the parameters. L2: x once for every block, the weights once for every cluster.
// Between multiprocessors: `team` float32 values for every element of y. Barriers of the cluster: one for
// squeeze-and-excitation, two for each pass.
//
// Limits (fit_mbconv): sm_90, 16-bit types, K of 3 and 5, strides 1 and 2, channels that vectors of 8 divide, planes
// that fit.
//
// Shared memory: taps and norm of every group | expand's norm | places of pixels | project's norm | expand's weights |
// project's weights | x | sums of the lanes, of the channels | hidden values: own, of all ranks | gate | held | ring,
// later partial sums. What is after x starts as zeros.
#pragma once
#include <type_traits>

#include "depthwise.cuh"
#include "expand_depthwise.cuh"
#include "mbconv_project.cuh"

namespace effkernels::cuda {

// Shared memory of a block; lay_out of the plan counts it.
template <class T>
struct MBConvShared {
  MBConvParameters parameters;
  float* lane_sums;   // (lanes, kExpandedChannels)
  float* sums;        // (groups * kExpandedChannels)
  float* own_hidden;  // (R), what the other blocks of the cluster read
  float* hidden;      // (R)
  T* gate;            // (groups * kExpandedChannels), zero where there are no channels
  uint16_t* places;   // of the pixels in the ring
  unsigned char *weights, *project_weights, *x, *held, *ring;
  float* partial;  // (pixels, partial_stride), what the other blocks of the cluster read; in place of the ring

  __device__ __forceinline__ MBConvShared(const MBConvPlan& plan, int reduced) {
    unsigned char* const bytes = dynamic_shared<unsigned char>();
    parameters.taps = dynamic_shared<float>();
    parameters.norm = reinterpret_cast<float*>(bytes + plan.norm_at);
    parameters.project_norm = reinterpret_cast<float*>(bytes + plan.project_norm_at);
    lane_sums = reinterpret_cast<float*>(bytes + plan.sums_at);
    sums = lane_sums + plan.expand.depthwise.lanes * kExpandedChannels;
    own_hidden = reinterpret_cast<float*>(bytes + plan.hidden_at);
    hidden = own_hidden + (reduced + 3) / 4 * 4;
    gate = reinterpret_cast<T*>(bytes + plan.gate_at);
    places = reinterpret_cast<uint16_t*>(bytes + plan.expand.places_at);
    weights = bytes + plan.weights_at, project_weights = bytes + plan.project_weights_at;
    x = bytes + plan.x_at, held = bytes + plan.held_at, ring = bytes + plan.ring_at;
    partial = reinterpret_cast<float*>(ring);
  }
};

__device__ __forceinline__ void clear(unsigned char* from, int bytes) {
#pragma unroll 1
  for (int at = threadIdx.x * 16; at < bytes; at += kMBConvThreads * 16)
    *reinterpret_cast<uint4*>(from + at) = make_uint4(0, 0, 0, 0);
}

// The gate of the block's channels, from the sums of their planes. All threads of the cluster; ends without a barrier.
template <class T>
__device__ __forceinline__ void gate_of_cluster(const SqueezeExciteParams& se, const MBConvPlan& plan,
                                                const MBConvShared<T>& shared, int first_channel, int channels,
                                                int64_t pixels) {
  constexpr int kAtOnce = 16;  // ranks whose values are under way together
  const int reduced = static_cast<int>(se.reduced);
  for (int at = threadIdx.x; at < channels; at += kMBConvThreads) shared.sums[at] /= static_cast<float>(pixels);
  __syncthreads();
  reduce_product<kReduceLanes, T>(se, first_channel, channels, shared.sums, channels, 1, shared.own_hidden, reduced);
  cluster_sync();
  for (int at = threadIdx.x; at < reduced; at += kMBConvThreads) {
    float total = 0.f;
#pragma unroll 1
    for (int first = 0; first < plan.team; first += kAtOnce) {
      float value[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < plan.team) value[i] = *cluster_map(shared.own_hidden + at, first + i);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < plan.team) total += value[i];
    }
    shared.hidden[at] = total;
  }
  __syncthreads();
  activate_hidden(se, 1, shared.hidden);
  T* const gate = shared.gate;
  expand_product<T>(se, first_channel, channels, shared.hidden, 1,
                    [gate, first_channel](int, int64_t channel, float value) {
                      gate[channel - first_channel] = from_float<T>(value);
                    });
}

// The depthwise convolution of a group of channels, from the ring into `held`, with the sums of each lane.
template <class Traits>
__device__ __forceinline__ void convolve_group(const MBConvArguments& a, const MBConvShared<typename Traits::T>& shared,
                                               int first_group, int group) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const DepthwiseParams& p = a.depthwise;
  const ExpandDepthwisePlan& of_group = a.plan.expand;
  const int out_width = static_cast<int>(p.out_width), strips_of_row = (out_width + kStrip - 1) / kStrip;
  const ExpandedLane<V> at(of_group.depthwise, first_group + group, static_cast<int>(p.channels));
  const ThreadParameters<V> my(shared.parameters.taps + group * ((K * K + 2) * kExpandedChannels), kExpandedChannels,
                               at.vector);
  float* const my_sums = shared.lane_sums + at.lane * kExpandedChannels + at.vector * V;
  const int chunk = group * (kExpandedChannels / V) + at.vector;  // of the block's channels
  unsigned char* const to = shared.held + chunk / kSliceChunks * a.plan.held_pixels * kPointwiseSliceBytes;
#pragma unroll 1
  for (StripCursor strip = at.first_strip(of_group); at.active && strip.column < strips_of_row; strip.advance()) {
    const int column = strip.column * kStrip, pixel = strip.row * out_width + column;
    float acc[kStrip][V], sum[V];
    convolve_ring<Traits>(p, of_group, shared.ring + (column * S * kExpandedChannels + at.vector * V) * sizeof(T),
                          strip.row * S - p.pad_top, 0, my, acc);
    finish_strip<T>(my, K * K, p.activation, acc);
    store_strip(acc, out_width - column, sum, [&](int ox, const float (&value)[V]) {
      store(reinterpret_cast<T*>(to + chunk_offset(pixel + ox, chunk % kSliceChunks)), value);
    });
    if (a.se.reduced > 0) add_to_lane(sum, my_sums);
  }
}

// The convolution of mbconv: calls f with its traits, and with the number of its taps.
template <int kTaps>
using TapCount = std::integral_constant<int, kTaps>;
template <class Traits>
struct OneConvolution {
  template <class F>
  __device__ __forceinline__ void with_traits(const F& f) const {
    f(Traits());
  }
  template <class F>
  __device__ __forceinline__ void with_taps(const F& f) const {
    f(TapCount<Traits::kKernel * Traits::kKernel>());
  }
};

// The whole work of a block of the team. `which`: the convolution, one in mbconv, and one of all in mbconv_stack, whose
// code for the rest is then there once. All threads of the cluster; ends with a barrier of the cluster.
template <class T, class Convolution>
__device__ __forceinline__ void compute_mbconv(const MBConvArguments& a, const Convolution& which) {
  constexpr int kThreads = kMBConvThreads;
  const PointwiseParams& expand = a.expand;
  const DepthwiseParams& p = a.depthwise;
  const MBConvPlan& plan = a.plan;
  const ExpandDepthwisePlan& of_group = plan.expand;
  const DepthwisePlan& division = of_group.depthwise;
  const bool excites = a.se.reduced > 0;
  const MBConvShared<T> shared(plan, static_cast<int>(a.se.reduced));

  const int rank = blockIdx.x % plan.cluster, unit = blockIdx.x / plan.cluster;
  const int first_image = unit * plan.images, images = min(plan.images, static_cast<int>(p.batch) - first_image);
  // A rank beyond the team has no channels, and adds its share of y alone.
  const int first_group = rank * plan.groups, groups = max(0, min(plan.groups, plan.all_groups - first_group));
  const int first_channel = first_group * kExpandedChannels;
  const int channels = groups == 0 ? 0 : min(groups * kExpandedChannels, static_cast<int>(p.channels) - first_channel);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const ExpandColumns columns(p, 0, static_cast<int>(p.out_width));
  const bool keeps_weights = plan.weight_slots == plan.groups;
  const int slot_bytes = of_group.slices * kExpandedChannels * kPointwiseSliceBytes;
  const int ring_bytes = height * of_group.ring_row_bytes;

  const T* x =
      static_cast<const T*>(expand.x) + int64_t(first_image) * expand.x_stride_n + columns.first * expand.x_stride_p;
  const auto load_x = [&] {
    load_expand_rows<T, kThreads>(expand, of_group, columns, reinterpret_cast<const unsigned char*>(x),
                                  width - columns.count, height, static_cast<int>(expand.in_channels), shared.x);
  };
  const auto load_weights = [&](int group) {
    load_expand_weights<T, kThreads>(expand, of_group, (first_group + group) * kExpandedChannels,
                                     shared.weights + (keeps_weights ? group * slot_bytes : 0));
  };
  const auto load_project = [&](int pass) {
    load_project_weights<T>(a.project, plan, pass, first_channel, channels, shared.project_weights);
  };

  MBConvParameterReads<T> reads(a, first_channel, channels, groups);
  for (int group = 0; group < min(groups, plan.weight_slots); ++group) load_weights(group);
  if (groups > 0) load_x();
  cp_async_commit();
  reads.next_norms(shared.parameters);
  load_project(0);
  cp_async_commit();
  clear_odd_chunk<T, kThreads>(expand, of_group, shared.x);
  set_places<kThreads>(of_group, columns, shared.places);
  unsigned char* const zeros = reinterpret_cast<unsigned char*>(shared.lane_sums);
  clear(zeros, plan.ring_at - plan.sums_at + ring_bytes);
  reads.keep_norms(shared.parameters);
  which.with_taps([&](auto taps) {
    reads.template keep_taps<decltype(taps)::value>(shared.parameters);
    __syncthreads();
    reads.template scale_taps<decltype(taps)::value>(shared.parameters);
  });

#pragma unroll 1
  for (int m = 0; m < images; ++m) {
    const bool more_images = m + 1 < images;
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      if (m == 0 && group == 0)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();
      expand_rows<T, kThreads>(
          expand, of_group, columns, shared.x, shared.weights + (keeps_weights ? group * slot_bytes : 0),
          shared.parameters.norm + group * 2 * kExpandedChannels, shared.places, height, 0, shared.ring);
      __syncthreads();
      const bool ends = group + 1 == groups;
      if (!keeps_weights && (!ends || more_images)) load_weights(ends ? 0 : group + 1);
      if (ends && more_images) {
        x += expand.x_stride_n;
        load_x();
      }
      cp_async_commit();

      which.with_traits([&](auto traits) { convolve_group<decltype(traits)>(a, shared, first_group, group); });
      if (excites) add_lanes<kExpandedChannels>(division, shared.lane_sums, shared.sums + group * kExpandedChannels);
    }
    if (excites) gate_of_cluster(a.se, plan, shared, first_channel, channels, p.out_height * p.out_width);
    project<T>(a, rank, first_image + m, channels, more_images, excites ? shared.gate : nullptr, shared.held,
               shared.project_weights, shared.parameters.project_norm, shared.partial, load_project);
    if (more_images) clear(shared.ring, ring_bytes);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kMBConvThreads, 1) mbconv(const __grid_constant__ MBConvArguments a) {
  wait_for_previous();
  allow_next();
  compute_mbconv<typename Traits::T>(a, OneConvolution<Traits>());
}

template <class T, int K, int S>
cudaError_t run_mbconv_of(const MBConvArguments& a, const Launch& at) {
  return a.plan.expand.depthwise.strip == kShortStrip ? launch(mbconv<DepthwiseTraits<T, K, S, kShortStrip>>, at, a)
                                                      : launch(mbconv<DepthwiseTraits<T, K, S>>, at, a);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_mbconv(const MBConvArguments& a, const Launch& at) {
  const bool small = a.depthwise.kernel_w == 3;
  if (a.depthwise.stride == 1) return small ? run_mbconv_of<T, 3, 1>(a, at) : run_mbconv_of<T, 5, 1>(a, at);
  return small ? run_mbconv_of<T, 3, 2>(a, at) : run_mbconv_of<T, 5, 2>(a, at);
}
extern template cudaError_t run_mbconv<__half>(const MBConvArguments&, const Launch&);
extern template cudaError_t run_mbconv<__nv_bfloat16>(const MBConvArguments&, const Launch&);

}  // namespace effkernels::cuda
