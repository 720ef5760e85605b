// The parameters of a block of mbconv.cuh, without the weights of the products: its taps, and the norms of its expanded
// channels, of its results of the depthwise convolution and of all output channels.
//
// Threads. A warp takes 32 norms of one of these at a time, and a thread kVectors vectors of 16 bytes of taps. A thread
// asks for the first ones of both before the block asks for weights and x, and keeps them after that; for the second
// norm it asks before the weights of the projection. So it does not wait for them.
//
// Traffic: once for each block.
#pragma once
#include "depthwise_parameters.cuh"
#include "expand_rows.cuh"
#include "mbconv.h"

namespace effkernels::cuda {

struct MBConvArguments {
  PointwiseParams expand;
  DepthwiseParams depthwise;
  SqueezeExciteParams se;  // without it reduced is 0; its gate does not count
  PointwiseParams project;
  MBConvPlan plan;
};

// In shared memory.
struct MBConvParameters {
  float* taps;          // (groups, K * K + 2, kExpandedChannels): rows as in depthwise_parameters.cuh
  float* norm;          // of the expansion: (groups, 2, kExpandedChannels)
  float* project_norm;  // (2, output channels)
};

template <class T>
class MBConvParameterReads {
 public:
  // `groups` of kExpandedChannels from first_channel on, of which `channels` exist. Asks for the first reads.
  __device__ __forceinline__ MBConvParameterReads(const MBConvArguments& a, int first_channel, int channels, int groups)
      : a_(a), first_channel_(first_channel), channels_(channels), groups_(groups) {
    own_units_ = (groups * kExpandedChannels + 31) / 32;
    units_ = 2 * own_units_ + (static_cast<int>(a.project.out_channels) + 31) / 32;
    unit_ = static_cast<int>(threadIdx.x) / 32;
    ask_norm();
    ask_taps(static_cast<int>(threadIdx.x));
  }

  // Keeps the norms that were asked for last, and asks for the next ones. All threads; ends without a barrier.
  __device__ __forceinline__ void next_norms(const MBConvParameters& to) {
    if (unit_ < units_) keep_norm(to);
    unit_ += kMBConvThreads / 32;
    ask_norm();
  }
  // Keeps all that are left.
  __device__ __forceinline__ void keep_norms(const MBConvParameters& to) {
#pragma unroll 1
    while (unit_ < units_) next_norms(to);
  }

  // The same of the taps; kTaps: K * K.
  template <int kTaps>
  __device__ __forceinline__ void keep_taps(const MBConvParameters& to) {
    if (a_.depthwise.weight.dtype == DType::kFloat32)
      keep_taps_of<kTaps, float>(to.taps);
    else
      keep_taps_of<kTaps, T>(to.taps);
  }

  // Multiplies the taps by the scales, after a barrier; ends without one.
  template <int kTaps>
  __device__ __forceinline__ void scale_taps(const MBConvParameters& of) const {
    constexpr int kQuads = kExpandedChannels / 4, kAtOnce = kMBConvThreads / kQuads, kRows = kTaps + 2;
    using Quad = Vector<float, 4>;
    const int quad = static_cast<int>(threadIdx.x) % kQuads, lane = static_cast<int>(threadIdx.x) / kQuads;
    const int channel = quad % (kQuads / 2) * 8 + quad / (kQuads / 2) * 4;
    if (lane >= kAtOnce) return;
    const int all = groups_ * kTaps;
#pragma unroll 1
    for (int tap = lane; tap < all; tap += kAtOnce) {
      const int group = tap / kTaps;
      if (group * kExpandedChannels + channel >= channels_) break;
      float* const first = of.taps + (group * kRows * kQuads + quad) * 4;
      const Quad by = *reinterpret_cast<const Quad*>(first + kTaps * kExpandedChannels);
      Quad& of_tap = *reinterpret_cast<Quad*>(first + (tap - group * kTaps) * kExpandedChannels);
      Quad product = of_tap;
#pragma unroll
      for (int i = 0; i < 4; ++i) product.at[i] *= by.at[i];
      of_tap = product;
    }
  }

 private:
  static constexpr int kVectors = 4;

  // f(norm, the first of its channels that the block has, how many, the thread's among these, activation, write): see
  // keep_norm.
  template <class F>
  __device__ __forceinline__ void with_norm(const MBConvParameters& to, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (unit_ < own_units_) {
      f(a_.expand.norm, first_channel_, channels_, unit_ * 32 + lane, a_.expand.activation,
        [&](int group, int channel, ScaleShift by) {
          float* const at = to.norm + 2 * kExpandedChannels * group + channel;
          if (group < groups_) at[0] = by.scale, at[kExpandedChannels] = by.shift;
        });
    } else if (unit_ < 2 * own_units_) {
      const int taps = a_.depthwise.kernel_w * a_.depthwise.kernel_w;
      f(a_.depthwise.norm, first_channel_, channels_, (unit_ - own_units_) * 32 + lane, a_.depthwise.activation,
        [&](int group, int channel, ScaleShift by) {
          float* const at =
              to.taps + ((taps + 2) * group + taps) * kExpandedChannels + place_in_row<8>(channel, kExpandedChannels);
          if (group < groups_) at[0] = by.scale, at[kExpandedChannels] = by.shift;
        });
    } else {
      const int own = (unit_ - 2 * own_units_) * 32 + lane, count = static_cast<int>(a_.project.out_channels);
      f(a_.project.norm, 0, count, own, Activation::kIdentity, [&](int, int, ScaleShift by) {
        if (own < count) to.project_norm[own] = by.scale, to.project_norm[count + own] = by.shift;
      });
    }
  }
  __device__ __forceinline__ void ask_norm() {
    stored_ = {};
    if (unit_ >= units_) return;
    with_norm({}, [&](const Norm& norm, int first, int count, int own, Activation, const auto&) {
      if (own < count) stored_ = stored_norm(norm, first + own);
    });
  }
  __device__ __forceinline__ void keep_norm(const MBConvParameters& to) const {
    with_norm(to, [&](const Norm& norm, int, int count, int own, Activation activation, const auto& write) {
      ScaleShift by = {0.f, 0.f};
      if (own < count) by = before_activation(scale_shift(norm, stored_), a_.depthwise.dtype, activation);
      write(static_cast<unsigned>(own) / kExpandedChannels, static_cast<unsigned>(own) % kExpandedChannels, by);
    });
  }

  // Taps are stored as (C, 1, K, K): those of the block are together.
  __device__ __forceinline__ const unsigned char* stored_taps() const {
    const DepthwiseParams& p = a_.depthwise;
    const unsigned size = p.weight.dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
    return product_after(static_cast<const unsigned char*>(p.weight.data), first_channel_,
                         p.kernel_w * p.kernel_w * size);
  }
  __device__ __forceinline__ int tap_bytes() const {
    const DepthwiseParams& p = a_.depthwise;
    return channels_ * p.kernel_w * p.kernel_w * static_cast<int>(p.weight.dtype == DType::kFloat32 ? 4 : sizeof(T));
  }
  // Else one by one.
  __device__ __forceinline__ bool in_vectors() const { return reinterpret_cast<uintptr_t>(stored_taps()) % 16 == 0; }

  __device__ __forceinline__ void ask_taps(int first) {
    if (!in_vectors()) return;
    const unsigned char* const from = stored_taps() + first * 16;
    const int left = tap_bytes() - first * 16;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (i * 16 * kMBConvThreads < left)
        taps_[i] = load_global(reinterpret_cast<const uint4*>(from + i * 16 * kMBConvThreads));
  }
  // In bytes.
  template <int kTaps>
  __device__ __forceinline__ static unsigned place(unsigned channel, unsigned tap) {
    const unsigned group = channel / kExpandedChannels, of_group = channel % kExpandedChannels;
    const unsigned in_row = of_group % 8 / 4 * (kExpandedChannels / 2) + of_group / 8 * 4 + of_group % 4;
    return (((kTaps + 2) * group + tap) * kExpandedChannels + in_row) * sizeof(float);
  }
  template <int kTaps, class W>
  __device__ __forceinline__ void keep_taps_of(float* to) {
    constexpr int E = kVectorOf<W>, kRowBytes = kExpandedChannels * sizeof(float);
    const int count = channels_ * kTaps;
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(to);
    if (!in_vectors()) {
      const W* const from = reinterpret_cast<const W*>(stored_taps());
#pragma unroll 1
      for (int at = static_cast<int>(threadIdx.x); at < count; at += kMBConvThreads)
        *reinterpret_cast<float*>(bytes + place<kTaps>(at / kTaps, at % kTaps)) = to_float(from[at]);
      return;
    }
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first * E < count;) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = (first + i * kMBConvThreads) * E;
        if (at >= count) break;
        float value[E];
        Vector<W, E> raw;
        memcpy(&raw, &taps_[i], sizeof(raw));
        unpack(raw, 0, value);
        // Of one channel, or of two that follow each other.
        static_assert(E <= kTaps);
        const unsigned channel = static_cast<unsigned>(at) / kTaps, tap = at - channel * kTaps;
        const int one = static_cast<int>(place<kTaps>(channel, tap));
        const int next = static_cast<int>(place<kTaps>(channel + 1, 0)) - static_cast<int>(kTaps - tap) * kRowBytes;
#pragma unroll
        for (int e = 0; e < E; ++e)
          *reinterpret_cast<float*>(bytes + (tap + e < kTaps ? one : next) + e * kRowBytes) = value[e];
      }
      first += kVectors * kMBConvThreads;
      ask_taps(first);
    }
  }

  const MBConvArguments& a_;
  int first_channel_, channels_, groups_, own_units_, units_, unit_;  // units: of 32 norms
  StoredNorm stored_;
  uint4 taps_[kVectors];
};

}  // namespace effkernels::cuda
