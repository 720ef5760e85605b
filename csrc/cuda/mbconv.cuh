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
// computed twice. For each group: x times the group's weights, norm and activation into `ring`, which has the padding
// as zeros (expand_rows.cuh, with all rows of x as one group of rows), then the depthwise convolution from there into
// `held`, by tensor cores (depthwise_product.cuh), with channel sums as in depthwise_sums.cuh.
//
// Squeeze-and-excitation: every block has the means of its channels, multiplies them by its columns of w_reduce, and
// adds the R values of all ranks, in their order, through distributed shared memory; it then computes the gate of its
// own channels (mbconv_gate.cuh). The project product is split over the expanded channels in the same way
// (mbconv_project.cuh): each block multiplies its gated channels by its columns of the weights, for all pixels and
// output channels, and each then adds the sums of all ranks, in their order, for its share of y. Where these sums do
// not fit into shared memory, they are computed in several passes over the output channels.
//
// Values between the stages are rounded to the type of x as several launches round them. The same bits every time; a
// team of another size adds in another order.
//
// A cluster takes several images after each other where there are many; weights that fit stay in shared memory.
// Before the first image a thread asks for norms (mbconv_parameters.cuh), for weights and taps, then for x.
//
// Traffic. Memory: x, y, residual, the parameters. L2: x once for every block, the weights once for every cluster.
// Between multiprocessors: `team` float32 values for every element of y. Barriers of the cluster: one for
// squeeze-and-excitation, two for each pass.
//
// Limits (fit_mbconv): sm_90, 16-bit types, K of 3 and 5, strides 1 and 2, channels that vectors of 8 divide, planes
// that fit.
//
// Shared memory: taps of every group | norms of expand and depthwise | places of pixels | project's norm | expand's
// weights | project's weights | those of the gate | x | sums of the lanes, of the channels | hidden values: own, of all
// ranks | gate | held | ring, later partial sums. What is after x starts as zeros.
#pragma once
#include "depthwise_product.cuh"
#include "depthwise_sums.cuh"
#include "mbconv_gate.cuh"
#include "mbconv_project.cuh"

namespace effkernels::cuda {

// Shared memory of a block; lay_out of the plan counts it.
template <class T>
struct MBConvShared {
  MBConvParameters<T> parameters;
  float* lane_sums;  // (ring_slots, lanes, kExpandedChannels): a lane is a pair of parts
  GateShared<T> se;
  uint16_t* places;  // of the pixels in the ring
  unsigned char *weights, *project_weights, *x, *held, *ring;
  float* partial;  // (pixels, partial_stride), what the other blocks of the cluster read; in place of the ring

  __device__ __forceinline__ MBConvShared(const MBConvPlan& plan, int reduced) {
    unsigned char* const bytes = dynamic_shared<unsigned char>();
    parameters.taps = dynamic_shared<T>();
    parameters.norm = reinterpret_cast<float*>(bytes + plan.norm_at);
    parameters.depthwise_norm = parameters.norm + plan.groups * 2 * kExpandedChannels;
    parameters.project_norm = reinterpret_cast<float*>(bytes + plan.project_norm_at);
    lane_sums = reinterpret_cast<float*>(bytes + plan.sums_at);
    se.means = lane_sums + plan.ring_slots * plan.expand.depthwise.lanes * kExpandedChannels;
    se.own_hidden = reinterpret_cast<float*>(bytes + plan.hidden_at);
    se.hidden = se.own_hidden + (reduced + 3) / 4 * 4;
    se.gate = reinterpret_cast<T*>(bytes + plan.gate_at);
    se.reduce = reinterpret_cast<T*>(bytes + plan.gate_weights_at);
    se.expand = se.reduce + reduced * plan.groups * kExpandedChannels;
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

// Stores the results of a part that a lane has, 2 channels of a row, and adds them to its sums. `slice`: of 64 bytes of
// all pixels; `chunk`: the vector's of it.
template <class T, int kColumns>
__device__ __forceinline__ void store_window(const DepthwiseParams& p, const WindowParts& parts, int part,
                                             const float (&value)[kColumns][4], unsigned char* slice, int chunk,
                                             float (&sum)[2]) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int row = parts.row[part] + g, width = static_cast<int>(p.out_width);
  if (!parts.exists[part] || row >= static_cast<int>(p.out_height)) return;
  const int columns = width - parts.column[part], pixel = row * width + parts.column[part];
  unsigned char* const to = slice + pixel * kPointwiseSliceBytes + t * 2 * sizeof(T);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if (j < columns) {
      const float two[2] = {value[j][2 * part], value[j][2 * part + 1]};
      // chunk_offset(pixel + j, chunk), by fewer instructions.
      const int swizzled = ((pixel + j) * 8 & 0x30) ^ chunk * 16;
      store(reinterpret_cast<T*>(to + j * kPointwiseSliceBytes + swizzled), two);
      sum[0] += two[0], sum[1] += two[1];
    }
  }
}

// The depthwise convolution of the `groups` groups of channels in the ring, the first of which is `first_group` of the
// block, into `held`, with the sums of each pair of parts. A warp takes 8 channels of a pair of parts at a time.
template <class T, class Known>
__device__ __forceinline__ void convolve_groups(const MBConvArguments& a, const MBConvShared<T>& shared, int channels,
                                                int first_group, int groups) {
  constexpr int K = Known::K, S = Known::S, kColumns = Known::kColumns;
  constexpr int kVector = kVectorOf<T>, kVectors = kExpandedChannels / kVector;
  const DepthwiseParams& p = a.depthwise;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pairs = a.plan.expand.depthwise.lanes, tasks = groups * pairs * kVectors;
  const int ring_bytes = a.plan.expand.ring_rows * a.plan.expand.ring_row_bytes;
#pragma unroll 1
  for (int task = static_cast<int>(threadIdx.x) / 32; task < tasks; task += kMBConvThreads / 32) {
    const int of_vectors = static_cast<int>(static_cast<unsigned>(task) / kVectors);
    const int slot = static_cast<int>(SmallDivisor(a.plan.by_lanes)(of_vectors)), pair = of_vectors - slot * pairs;
    const int vector = task - of_vectors * kVectors, chunk = (first_group + slot) * kVectors + vector;  // of the block
    if (chunk * kVector >= channels) continue;
    const WindowParts parts(a.plan, pair);
    const WindowProduct<T, K, S, kColumns> product(
        parts, shared.ring + slot * ring_bytes + vector * kVector * sizeof(T), a.plan.expand.ring_row_bytes,
        static_cast<int>(p.out_height), shared.parameters.taps + chunk * kVector * K * K);
    const float* const norm = shared.parameters.depthwise_norm + (first_group + slot) * 2 * kExpandedChannels +
                              vector * kVector + lane % 4 * 2;
    unsigned char* const slice = shared.held + chunk / kSliceChunks * a.plan.held_pixels * kPointwiseSliceBytes;
    float value[kColumns][4], sum[2];
    product.multiply(value);
#pragma unroll 1
    for (bool again = false;; again = true) {
      const auto scale = *reinterpret_cast<const Vector<float, 2>*>(norm);
      const auto shift = *reinterpret_cast<const Vector<float, 2>*>(norm + kExpandedChannels);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) value[j][e] = fmaf(value[j][e], scale.at[e % 2], shift.at[e % 2]);
      activate<T>(reinterpret_cast<float (&)[kColumns * 4]>(value), p.activation);
      sum[0] = sum[1] = 0.f;
#pragma unroll
      for (int part = 0; part < 2; ++part) store_window<T>(p, parts, part, value, slice, chunk % kSliceChunks, sum);
      const float total = sum[0] + sum[1];
      if (again || total == total) break;
      product.multiply_alone(value);
    }
    if (a.se.reduced == 0) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], distance);
    if (lane < 4) {
      float* const to = shared.lane_sums + (slot * pairs + pair) * kExpandedChannels + vector * kVector + lane * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
    }
  }
}

// The channel means of `groups` groups, from the sums of the pairs of parts, in their order. All threads; ends with a
// barrier.
template <class T>
__device__ __forceinline__ void add_pairs(const MBConvPlan& plan, const MBConvShared<T>& shared, int first_group,
                                          int groups, int pixels) {
  __syncthreads();
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < groups * kExpandedChannels; at += kMBConvThreads) {
    const int pairs = plan.expand.depthwise.lanes;
    const int slot = static_cast<int>(static_cast<unsigned>(at) / kExpandedChannels);
    const float* from = shared.lane_sums + at + slot * (pairs - 1) * kExpandedChannels;
    ExactSum total;
    for (int pair = 0; pair < pairs; ++pair, from += kExpandedChannels) total.add(*from);
    shared.se.means[first_group * kExpandedChannels + at] = total.result() / static_cast<float>(pixels);
  }
  __syncthreads();
}

// The convolution of mbconv: calls f with its size, stride and window.
template <int kSize, int kStride, int kWindowColumns>
struct Convolution {
  static constexpr int K = kSize, S = kStride, kColumns = kWindowColumns;
};
template <class Known>
struct OneConvolution {
  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    f(Known());
  }
};

// The whole work of a block of the team. `with_convolution`: of one in mbconv, and of any in mbconv_stack, whose code
// for the rest is then there once. `wait`: until x may be read, and until shared memory from plan.x_at on is free; the
// parameters are asked for before. All threads of the cluster; ends with the first step of a barrier of the cluster.
template <class T, class WithConvolution, class Wait>
__device__ __forceinline__ void compute_mbconv(const MBConvArguments& a, const WithConvolution& with_convolution,
                                               const Wait& wait) {
  constexpr int kThreads = kMBConvThreads, kWarps = kThreads / 32;
  const PointwiseParams& expand = a.expand;
  const DepthwiseParams& p = a.depthwise;
  const MBConvPlan& plan = a.plan;
  const ExpandDepthwisePlan& of_group = plan.expand;
  const bool excites = a.se.reduced > 0;
  const MBConvShared<T> shared(plan, static_cast<int>(a.se.reduced));

  const int unit =
      static_cast<int>(static_cast<uint64_t>(blockIdx.x) * plan.by_cluster.multiplier >> plan.by_cluster.shift);
  const int rank = static_cast<int>(blockIdx.x) - unit * plan.cluster;
  const int first_image = unit * plan.images, images = min(plan.images, static_cast<int>(p.batch) - first_image);
  // A rank beyond the team has no channels, and adds its share of y alone.
  const int first_group = rank * plan.groups, groups = max(0, min(plan.groups, plan.all_groups - first_group));
  const int first_channel = first_group * kExpandedChannels;
  const int channels = groups == 0 ? 0 : min(groups * kExpandedChannels, static_cast<int>(p.channels) - first_channel);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const ExpandColumns columns(p, 0, static_cast<int>(p.out_width), plan.by_in_columns);
  const bool keeps_weights = plan.weight_slots == plan.groups;
  const int slot_bytes = of_group.slices * kExpandedChannels * kPointwiseSliceBytes;
  const int ring_bytes = of_group.ring_rows * of_group.ring_row_bytes;
  // Of the expand product of a group of channels, in its last turn.
  const int idle_warps = kWarps - of_group.stage_pixels / (of_group.pairs ? 32 : 16) % kWarps;

  const T* x =
      static_cast<const T*>(expand.x) + int64_t(first_image) * expand.x_stride_n + columns.first * expand.x_stride_p;
  const auto load_x = [&] {
    const auto* const from = reinterpret_cast<const unsigned char*>(x);
    const int left_out = width - columns.count, in_channels = static_cast<int>(expand.in_channels);
    if (of_group.pairs)
      load_expand_rows<T, kThreads>(expand, of_group, columns, from, left_out, height, in_channels, shared.x);
    else  // fewer pixels than threads that copy
      load_expand_rows<T, kThreads, 1>(expand, of_group, columns, from, left_out, height, in_channels, shared.x);
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
  load_taps<T>(p, first_channel, channels, shared.parameters.taps);
  if (excites) load_gate_weights(a.se, plan.groups, first_channel, channels, shared.se);
  load_project(0);
  reads.next_norms(shared.parameters);
  set_places<kThreads>(of_group, columns, shared.places);
  wait();
  if (groups > 0) load_x();
  cp_async_commit();
  clear_odd_chunk<T, kThreads>(expand, of_group, shared.x);
  unsigned char* const zeros = reinterpret_cast<unsigned char*>(shared.lane_sums);
  clear(zeros, plan.ring_at - plan.sums_at + plan.ring_slots * ring_bytes);
  reads.keep_norms(shared.parameters);
  if (groups == 0) __syncthreads();  // no group's barrier comes before its hidden values, which were cleared

#pragma unroll 1
  for (int m = 0; m < images; ++m) {
    const bool more_images = m + 1 < images;
#pragma unroll 1
    for (int group = 0; group < groups; group += plan.ring_slots) {
      const int here = min(plan.ring_slots, groups - group);
      cp_async_wait<0>();
      __syncthreads();
      int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
      for (int slot = 0; slot < here; ++slot) {
        expand_rows<T, kThreads>(expand, of_group, columns, shared.x,
                                 shared.weights + (keeps_weights ? (group + slot) * slot_bytes : 0),
                                 shared.parameters.norm + (group + slot) * 2 * kExpandedChannels, shared.places, height,
                                 p.pad_top, shared.ring + slot * ring_bytes, warp);
        warp = (warp + idle_warps) % kWarps;  // those that had nothing of this group are the first of the next one
      }
      __syncthreads();
      const bool ends = group + here == groups;
      if (!keeps_weights && (!ends || more_images)) load_weights(ends ? 0 : group + 1);
      if (ends && more_images) {
        x += expand.x_stride_n;
        load_x();
      }
      cp_async_commit();

      with_convolution([&](auto known) { convolve_groups<T, decltype(known)>(a, shared, channels, group, here); });
      if (excites) add_pairs(plan, shared, group, here, static_cast<int>(a.project.pixels));
    }
    if (excites) gate_of_cluster(a.se, plan, shared.se, first_channel, channels);
    project<T>(a, rank, first_image + m, channels, more_images, excites ? shared.se.gate : nullptr, shared.held,
               shared.project_weights, shared.parameters.project_norm, shared.partial, load_project);
    if (more_images) clear(shared.ring, plan.ring_slots * ring_bytes);
  }
}

template <class T, int K, int S, int kColumns>
__global__ void __launch_bounds__(kMBConvThreads, 1) mbconv(const __grid_constant__ MBConvArguments a) {
  wait_for_previous();
  allow_next();
  compute_mbconv<T>(a, OneConvolution<Convolution<K, S, kColumns>>(), [] {});
  cluster_wait();
}

template <class T, int K>
cudaError_t run_mbconv_of(const MBConvArguments& a, const Launch& at) {
  if (a.depthwise.stride == 2) return launch(mbconv<T, K, 2, kNarrowWindow>, at, a);
  return a.plan.window_columns == kWideWindow ? launch(mbconv<T, K, 1, kWideWindow>, at, a)
                                              : launch(mbconv<T, K, 1, kNarrowWindow>, at, a);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_mbconv(const MBConvArguments& a, const Launch& at) {
  return a.depthwise.kernel_w == 3 ? run_mbconv_of<T, 3>(a, at) : run_mbconv_of<T, 5>(a, at);
}
extern template cudaError_t run_mbconv<__half>(const MBConvArguments&, const Launch&);
extern template cudaError_t run_mbconv<__nv_bfloat16>(const MBConvArguments&, const Launch&);

}  // namespace effkernels::cuda
