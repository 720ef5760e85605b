// depthwise_bn_act_se in one launch: y = act(norm(dwconv(x))) * gate, written once, because the ungated result waits
// for its gate on the chip.
//
// Threads and data. A team of blocks holds the result of one image in its shared memory: row_blocks * channel_blocks
// blocks, each a slab of rows of `slabs` channel groups. Within a slab, threads and strips are those of depthwise.cuh.
// Each block multiplies the channel sums of its rows by its columns of w_reduce (the mean over the image is linear, so
// nobody has to know it first), the blocks of the team add those R values in the order of their ranks, and each forms
// the gate of its own channels and writes its result.
//
// A team is a cluster on sm_90, which exchanges the R values through distributed shared memory. Elsewhere the whole
// grid is resident (a cooperative launch), the exchange goes through global memory and the team waits at a counter.
//
// The held result leaves room for one block on a multiprocessor, which therefore has more threads than elsewhere.
//
// Traffic. Memory: x once, y once, the parameters, w_expand once per team and row block. Limits: the plan says whether
// the result fits (plan_team); K of 3 and 5, vectors of 16 bytes.
#pragma once
#include "depthwise.cuh"

namespace effkernels::cuda {

// Shared memory of a block of a team; plan_team counts it.
template <class T>
struct ResidentShared {
  float* parameters;  // (K * K + 2, block_channels): see load_parameters
  float* lane_sums;   // (lanes, block_channels)
  float* sums;        // (slabs, block_channels)
  float* gate;        // (slabs, block_channels)
  float* partial;     // (R), what the other blocks of the cluster read
  float* hidden;      // (R)
  T* held;            // (slabs, rows, width, block_channels): the result without its gate

  __device__ __forceinline__ ResidentShared(const DepthwisePlan& plan, int tap_count, int reduced) {
    const int block_channels = plan.channel_vectors * plan.vector, padded = (reduced + 3) / 4 * 4;
    parameters = dynamic_shared<float>();
    lane_sums = parameters + (tap_count + 2) * block_channels;
    sums = lane_sums + plan.lanes * block_channels;
    gate = sums + plan.slabs * block_channels;
    partial = gate + plan.slabs * block_channels;
    hidden = partial + padded;
    held = reinterpret_cast<T*>(hidden + padded);
  }
};

template <class Traits, bool kCluster>
__global__ void __launch_bounds__(kResidentThreads, 1)
    depthwise_resident(const __grid_constant__ DepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  const int reduced = static_cast<int>(a.se.reduced), block_channels = plan.channel_vectors * V;
  ResidentShared<T> shared(plan, K * K, reduced);

  const int rank = blockIdx.x % plan.team;
  const int image = blockIdx.x / plan.team;
  const int channel_block = rank / plan.row_blocks, row_block = rank % plan.row_blocks;
  const int most_rows = (plan.out_height + plan.row_blocks - 1) / plan.row_blocks, first_row = row_block * most_rows;
  const int rows = min(most_rows, plan.out_height - first_row), width = static_cast<int>(p.out_width);
  const int strips = (width + kStrip - 1) / kStrip * rows;
  const int slab_size = most_rows * width * block_channels;

  for (int slab = 0; slab < plan.slabs; ++slab) {
    const int group = channel_block * plan.slabs + slab;
    if (group >= plan.channel_groups) break;
    const DepthwiseLane at(p, plan, group, 0, image);
    clear_lanes(plan, shared.lane_sums);
    load_parameters<T, V, K * K>(p, K * K, int64_t(group) * block_channels, block_channels, shared.parameters);
    const ThreadParameters<V> my(shared.parameters, block_channels, at.vector);
    const T* from = static_cast<const T*>(p.x) + int64_t(image) * p.x_stride_n + at.channel;
    T* held = shared.held + slab * slab_size + at.vector * V;
    StripCursor strip(at.lane, plan.lanes, rows);
    for (; strip.index < strips && at.active; strip.advance()) {
      const int row = strip.row, column = strip.column * kStrip;
      float acc[kStrip][V], sum[V];
      start_strip<T>(my, K * K, acc);
      convolve_strip<Traits>(p, from, (first_row + row) * S - p.pad_top, column * S - p.pad_left, my, acc);
      finish_strip<T>(my, K * K, p.activation, acc);
      store_strip(acc, width - column, sum, [&](int ox, const float (&value)[V]) {
        store(held + (row * width + column + ox) * block_channels, value);
      });
      add_to_lane(sum, shared.lane_sums + at.lane * block_channels + at.vector * V);
    }
    add_lanes(plan, shared.lane_sums, shared.sums + slab * block_channels);
  }

  // This block's share of w_reduce @ means: the channel groups of its slabs are neighbours, and so are their columns.
  const int64_t first_channel = int64_t(channel_block) * plan.slabs * block_channels;
  const int channels = static_cast<int>(min(int64_t(plan.slabs) * block_channels, p.channels - first_channel));
  const float image_pixels = static_cast<float>(p.out_height * p.out_width);
  for (int i = threadIdx.x; i < channels; i += kResidentThreads) shared.sums[i] /= image_pixels;
  __syncthreads();
  float* own = kCluster ? shared.partial : a.work.hidden + (int64_t(image) * plan.team + rank) * reduced;
  reduce_product<kReduceLanes, T>(a.se, first_channel, channels, shared.sums, channels, 1, own, reduced);
  if constexpr (kCluster)
    cluster_sync();
  else
    wait_for_all(a.work.arrivals + 2 * image, a.work.arrivals + 2 * image + 1, plan.team);
  for (int at = threadIdx.x; at < reduced; at += kResidentThreads) {
    float total = 0.f;
    for (int other = 0; other < plan.team; ++other)
      total += kCluster ? *cluster_map(shared.partial + at, other)
                        : __ldcg(a.work.hidden + (int64_t(image) * plan.team + other) * reduced + at);
    shared.hidden[at] = total;
  }
  // Nobody leaves, and takes its shared memory along, while another block reads it.
  if constexpr (kCluster)
    cluster_sync();
  else
    __syncthreads();
  activate_hidden(a.se, 1, shared.hidden);
  float* gate = shared.gate;
  expand_product<T>(a.se, first_channel, channels, shared.hidden, 1,
                    [gate, first_channel](int, int64_t channel, float value) {
                      gate[channel - first_channel] = to_float(from_float<T>(value));
                    });
  __syncthreads();

  const int pixels = rows * width;
  for (int slab = 0; slab < plan.slabs; ++slab) {
    const int group = channel_block * plan.slabs + slab;
    if (group >= plan.channel_groups) break;
    const DepthwiseLane at(p, plan, group, 0, image);
    if (!at.active) continue;
    T* to = static_cast<T*>(p.y) + (image * p.out_height + first_row) * p.out_width * p.channels + at.channel;
    const T* held = shared.held + slab * slab_size + at.vector * V;
    float factors[V];
#pragma unroll
    for (int i = 0; i < V; ++i) factors[i] = shared.gate[slab * block_channels + at.vector * V + i];
    for (int pixel = at.lane; pixel < pixels; pixel += plan.lanes) {
      const Vector<T, V> raw = *reinterpret_cast<const Vector<T, V>*>(held + pixel * block_channels);
      float value[V];
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = to_float(raw.at[i]) * factors[i];
      store_global(to + pixel * p.channels, value);
    }
  }
}

template <class T, bool kCluster>
cudaError_t run_resident_team(const DepthwiseArguments& a, const Launch& at) {
  const bool small = a.depthwise.kernel_w == 3;
  if (a.depthwise.stride == 1)
    return small ? launch(depthwise_resident<DepthwiseTraits<T, 3, 1>, kCluster>, at, a)
                 : launch(depthwise_resident<DepthwiseTraits<T, 5, 1>, kCluster>, at, a);
  return small ? launch(depthwise_resident<DepthwiseTraits<T, 3, 2>, kCluster>, at, a)
               : launch(depthwise_resident<DepthwiseTraits<T, 5, 2>, kCluster>, at, a);
}

// One .cu file per element type instantiates it.
template <class T>
cudaError_t run_resident(const DepthwiseArguments& a, const Launch& at) {
  return a.plan.in_cluster ? run_resident_team<T, true>(a, at) : run_resident_team<T, false>(a, at);
}

extern template cudaError_t run_resident<float>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_resident<__half>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_resident<__nv_bfloat16>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
