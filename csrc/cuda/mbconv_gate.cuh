// Squeeze-and-excitation of mbconv.cuh: the gate of the block's channels from the means of their planes.
//
//   hidden, own:  w_reduce[:, own channels] * own means      by every block of the cluster
//   hidden:       activation(sum of all ranks + b_reduce)    by every block, in the order of the ranks
//   gate:         gate_activation(w_expand[own channels] * hidden + b_expand)
//
// Threads. First product: kReduceLanesOfBlock threads for a row of w_reduce; second one: kExpandLanes for a channel.
//
// Traffic. Weights of the type of x are copied to shared memory before the first image (load_gate_weights), so that
// nothing is waited for but the other blocks; float32 ones are read from L2 for every image. Biases are asked for
// before that wait.
#pragma once
#include "mbconv_parameters.cuh"
#include "squeeze_excite.cuh"

namespace effkernels::cuda {

// In shared memory. `weights`: (R, own_stride) of w_reduce, then (channels, R) of w_expand.
template <class T>
struct GateShared {
  float* means;       // of the block's channels: (groups * kExpandedChannels)
  float* own_hidden;  // (R), what the other blocks of the cluster read
  float* hidden;      // (R)
  T* gate;            // (groups * kExpandedChannels), zero where there are no channels
  T* reduce;          // (R, groups * kExpandedChannels): columns of w_reduce
  T* expand;          // (channels, R): rows of w_expand
};

// By cp.async, what is not aligned one by one. All threads; ends without a barrier.
template <class T>
__device__ __forceinline__ void load_gate_weights(const SqueezeExciteParams& se, int groups, int first_channel,
                                                  int channels, const GateShared<T>& to) {
  constexpr int V = kVectorOf<T>, kChunks = 8;  // threads that copy a row
  const int reduced = static_cast<int>(se.reduced), thread = static_cast<int>(threadIdx.x);
  if (se.w_reduce.dtype != DType::kFloat32) {
    const T* const from = static_cast<const T*>(se.w_reduce.data) + first_channel;
    const unsigned row_bytes = static_cast<unsigned>(se.channels) * sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(se.w_reduce.data) % 16 == 0;
#pragma unroll 1
    for (int row = thread / kChunks; row < reduced; row += kMBConvThreads / kChunks) {
      const unsigned char* const of_row = product_after(reinterpret_cast<const unsigned char*>(from), row, row_bytes);
      T* const to_row = to.reduce + row * groups * kExpandedChannels;
      if (aligned) {
#pragma unroll 1
        for (int at = thread % kChunks * V; at < channels; at += kChunks * V)
          cp_async_16(shared_address(to_row + at), of_row + at * sizeof(T));
      } else {
#pragma unroll 1
        for (int at = thread % kChunks; at < channels; at += kChunks)
          to_row[at] = load_global(reinterpret_cast<const T*>(of_row) + at);
      }
    }
  }
  if (se.w_expand.dtype != DType::kFloat32) {
    const int count = channels * reduced;
    const unsigned char* const from = product_after(static_cast<const unsigned char*>(se.w_expand.data), first_channel,
                                                    reduced * static_cast<unsigned>(sizeof(T)));
    copy_parameters<T>(from, count, to.expand);
  }
}

// The first product from shared memory: of the block's channels, which vectors of 8 divide.
template <class T>
__device__ __forceinline__ void reduce_held(const GateShared<T>& shared, int groups, int channels, int reduced) {
  constexpr int V = kVectorOf<T>, kLanes = kReduceLanesOfBlock, kRows = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int rows = static_cast<int>(threadIdx.x) / 32 * kRows; rows < reduced; rows += kMBConvThreads / kLanes) {
    const int row = rows + static_cast<int>(threadIdx.x) % 32 / kLanes;
    const T* const from = shared.reduce + row * groups * kExpandedChannels;
    float sum = 0.f;
#pragma unroll 1
    for (int at = lane * V; at < (row < reduced ? channels : 0); at += kLanes * V) {
      float w[V];
      const Vector<T, V> raw = *reinterpret_cast<const Vector<T, V>*>(from + at);
      unpack(raw, 0, w);
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        const Vector<float, 4> mean = *reinterpret_cast<const Vector<float, 4>*>(shared.means + at + e);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum = fmaf(w[e + i], mean.at[i], sum);
      }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0 && row < reduced) shared.own_hidden[row] = sum;
  }
}

// The second one, E values of a row at a time.
template <class T, int E>
__device__ __forceinline__ void expand_held(const SqueezeExciteParams& se, const GateShared<T>& shared,
                                            int first_channel, int channels, unsigned own_bias) {
  constexpr int kLanes = 2;  // of a channel
  const int reduced = static_cast<int>(se.reduced), lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / 32 * (32 / kLanes); first < channels;
       first += kMBConvThreads / kLanes) {
    const int own = first + static_cast<int>(threadIdx.x) % 32 / kLanes;
    const T* const from = shared.expand + own * reduced;
    float sum[E] = {};  // added at last: short sums err less, and need not wait for each other
#pragma unroll 1
    for (int at = lane * E; at < (own < channels ? reduced : 0); at += kLanes * E) {
      float w[E];
      const Vector<T, E> raw = *reinterpret_cast<const Vector<T, E>*>(from + at);
      const Vector<float, E> value = *reinterpret_cast<const Vector<float, E>*>(shared.hidden + at);
      unpack(raw, 0, w);
#pragma unroll
      for (int i = 0; i < E; ++i) sum[i] = fmaf(w[i], value.at[i], sum[i]);
    }
    float total = sum[0];
#pragma unroll
    for (int i = 1; i < E; ++i) total += sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    if (lane > 0 || own >= channels) continue;
    const unsigned bias = own < kMBConvThreads / kLanes ? own_bias : stored_parameter(se.b_expand, first_channel + own);
    total += parameter_value(se.b_expand, bias, 0.f);
    shared.gate[own] = from_float<T>(apply_gate(total, se.gate_activation));
  }
}

// All threads of the cluster; ends without a barrier.
template <class T>
__device__ __forceinline__ void gate_of_cluster(const SqueezeExciteParams& se, const MBConvPlan& plan,
                                                const GateShared<T>& shared, int first_channel, int channels) {
  constexpr int kAtOnce = 16;  // ranks whose values are under way together
  const int reduced = static_cast<int>(se.reduced), thread = static_cast<int>(threadIdx.x);
  const unsigned reduce_bias = thread < reduced ? stored_parameter(se.b_reduce, thread) : 0;
  const unsigned expand_bias = thread / 2 < channels ? stored_parameter(se.b_expand, first_channel + thread / 2) : 0;
  if (se.w_reduce.dtype != DType::kFloat32)
    reduce_held(shared, plan.groups, channels, reduced);
  else
    reduce_rows<kReduceLanesOfBlock>(static_cast<const float*>(se.w_reduce.data), se.channels, reduced, first_channel,
                                     channels, shared.means, channels, 1, shared.own_hidden, reduced);
  cluster_sync();
  for (int at = thread; at < reduced; at += kMBConvThreads) {
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
    const unsigned bias = at == thread ? reduce_bias : stored_parameter(se.b_reduce, at);
    float value[1] = {total + parameter_value(se.b_reduce, bias, 0.f)};
    activate<float>(value, se.activation);
    shared.hidden[at] = value[0];
  }
  __syncthreads();
  if (se.w_expand.dtype == DType::kFloat32)
    expand_product_of<float>(se, first_channel, channels, shared.hidden, 1, [&](int, int64_t channel, float value) {
      shared.gate[channel - first_channel] = from_float<T>(value);
    });
  else if (reduced % 4 == 0)
    expand_held<T, 4>(se, shared, first_channel, channels, expand_bias);
  else
    expand_held<T, 1>(se, shared, first_channel, channels, expand_bias);
}

}  // namespace effkernels::cuda
