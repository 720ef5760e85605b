// The parameters of a depthwise block: from global memory into shared memory, and from there to the threads.
#pragma once
#include "depthwise.h"
#include "numeric.cuh"

namespace effkernels::cuda {

// The block's parameters as float32 in shared memory: a row of block_channels values for each tap, one of scales and
// one of shifts; see kNormInTaps. Within a row the channels are stored in planes: first of every vector its channels 0
// to 3, then of every vector its channels 4 to 7. A thread reads 16 bytes of a plane, its neighbours the 16 bytes
// beside them, without a conflict.
template <int V>
constexpr int kQuad = V < 4 ? V : 4;  // channels of a vector in one plane

template <int V>
__device__ __forceinline__ int place_in_row(int channel, int block_channels) {
  constexpr int kPlanes = V / kQuad<V>;
  if constexpr (kPlanes == 1) return channel;
  return channel / kQuad<V> % kPlanes * (block_channels / kPlanes) + channel / V * kQuad<V> + channel % kQuad<V>;
}

// The parameters that a thread reads.
template <int V>
class ThreadParameters {
 public:
  __device__ __forceinline__ ThreadParameters(const float* rows, int block_channels, int vector)
      : at_(rows + vector * kQuad<V>), row_(block_channels), plane_(block_channels / (V / kQuad<V>)) {}
  // Channels `part` to `part + 4` of the thread's vector.
  __device__ __forceinline__ Vector<float, kQuad<V>> operator()(int row, int part) const {
    return *reinterpret_cast<const Vector<float, kQuad<V>>*>(at_ + row * row_ + part / kQuad<V> * plane_);
  }

 private:
  const float* at_;
  int row_, plane_;
};

// Stored as (C, 1, KH, KW), the taps of the block's channels one after another. A thread reads 16 bytes at a time, and
// starts all of its reads before it needs the first.
template <int V, int kTapCount, class W>
__device__ __forceinline__ void copy_taps(const W* from, int channels, int tap_count, int block_channels, float* rows) {
  constexpr int E = kVectorOf<W>, kAtOnce = 4;
  if constexpr (kTapCount > 0) tap_count = kTapCount;  // known where it is compiled: the divisions cost little
  const int count = channels * tap_count;
  if (count % E != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    for (int at = threadIdx.x; at < count; at += blockDim.x)
      rows[at % tap_count * block_channels + place_in_row<V>(at / tap_count, block_channels)] = to_float(from[at]);
    return;
  }
#pragma unroll 1
  for (int first = threadIdx.x * E; first < count; first += kAtOnce * E * blockDim.x) {
    Vector<W, E> raw[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      raw[j] = {};
      const int at = first + j * E * blockDim.x;
      if (at < count) raw[j] = load_raw<W, E>(from + at);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = first + j * E * blockDim.x;
      if (at >= count) break;
      int channel = at / tap_count, tap = at % tap_count;
      if constexpr (kTapCount >= E) {
        // Of one channel, or of two that follow each other.
        float value[E];
        unpack(raw[j], 0, value);
        float* const one = rows + tap * block_channels + place_in_row<V>(channel, block_channels);
        float* const next = rows + (tap - tap_count) * block_channels + place_in_row<V>(channel + 1, block_channels);
#pragma unroll
        for (int e = 0; e < E; ++e) (tap + e < tap_count ? one : next)[e * block_channels] = value[e];
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          rows[tap * block_channels + place_in_row<V>(channel, block_channels)] = to_float(raw[j].at[e]);
          if (++tap == tap_count) tap = 0, ++channel;
        }
      }
    }
  }
}

// Whether the taps are multiplied by the scale of the norm while they are loaded. Sums then start at the shift and end
// at the activation: a multiply-add less for each value. float32 keeps the norm apart, because to add small products to
// a large shift rounds more often than PyTorch does; 16-bit results do not show it.
template <class T>
constexpr bool kNormInTaps = sizeof(T) == 2;

// Multiplies the taps in shared memory by the scales there: of some channels each, all threads. `channels`: that exist.
template <int V>
__device__ __forceinline__ void scale_taps(int tap_count, int channels, int block_channels, float* rows) {
  constexpr int kPlanes = V / kQuad<V>;
  using Quad = Vector<float, kQuad<V>>;
  const int quads = block_channels / kQuad<V>, of_plane = quads / kPlanes, at_once = blockDim.x / quads;
  const int quad = threadIdx.x % quads, channel = quad % of_plane * V + quad / of_plane * kQuad<V>;
  if (channel >= channels || threadIdx.x >= at_once * quads) return;
  const Quad scale = *reinterpret_cast<const Quad*>(rows + tap_count * block_channels + quad * kQuad<V>);
#pragma unroll 1
  for (int tap = threadIdx.x / quads; tap < tap_count; tap += at_once) {
    Quad& of_tap = *reinterpret_cast<Quad*>(rows + tap * block_channels + quad * kQuad<V>);
    Quad product = of_tap;
#pragma unroll
    for (int i = 0; i < kQuad<V>; ++i) product.at[i] *= scale.at[i];
    of_tap = product;
  }
}

// A thread takes the norm of channel `own` of the block, where there is one: its reads are under way while the taps are
// read. keep(own, scale and shift) gets it, as it is before `activation`, and zeros after the last channel. Ends with a
// barrier.
template <class T, int V, int kTapCount, class Keep>
__device__ __forceinline__ void load_parameters(const DepthwiseParams& p, int tap_count, int64_t first_channel,
                                                int block_channels, float* rows, const Norm& norm, int own,
                                                Activation activation, const Keep& keep) {
  const int channels = static_cast<int>(min(int64_t(block_channels), p.channels - first_channel));
  const int64_t first = first_channel * tap_count;
  StoredNorm stored = {};
  if (own < channels) stored = stored_norm(norm, first_channel + own);
  if (p.weight.dtype == DType::kFloat32)
    copy_taps<V, kTapCount>(static_cast<const float*>(p.weight.data) + first, channels, tap_count, block_channels,
                            rows);
  else
    copy_taps<V, kTapCount>(static_cast<const T*>(p.weight.data) + first, channels, tap_count, block_channels, rows);
  if (own < block_channels) {
    ScaleShift by = {0.f, 0.f};
    if (own < channels) by = before_activation(scale_shift(norm, stored), p.dtype, activation);
    keep(own, by);
  }
  __syncthreads();
  if constexpr (kNormInTaps<T>) {
    scale_taps<V>(kTapCount > 0 ? kTapCount : tap_count, channels, block_channels, rows);
    __syncthreads();
  }
}

// The same where the first threads take the norms.
template <class T, int V, int kTapCount>
__device__ __forceinline__ void load_parameters(const DepthwiseParams& p, int tap_count, int64_t first_channel,
                                                int block_channels, float* rows) {
  load_parameters<T, V, kTapCount>(p, tap_count, first_channel, block_channels, rows, p.norm,
                                   static_cast<int>(threadIdx.x), p.activation, [&](int own, ScaleShift by) {
                                     float* scales =
                                         rows + tap_count * block_channels + place_in_row<V>(own, block_channels);
                                     scales[0] = by.scale, scales[block_channels] = by.shift;
                                   });
}

}  // namespace effkernels::cuda
