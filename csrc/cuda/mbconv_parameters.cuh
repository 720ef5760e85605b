// The parameters of a block of mbconv.cuh, without the weights of the products: its taps, and the norms of its expanded
// channels, of its results of the depthwise convolution and of all output channels.
//
// Threads. A warp takes 32 norms of one of these at a time. A thread asks for the first one before the block asks for
// weights and x, and keeps it after that; for the second one it asks before the weights of the projection. So it does
// not wait for them. Taps are copied as they are stored.
//
// Traffic: once for each block.
#pragma once
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
template <class T>
struct MBConvParameters {
  T* taps;                // (groups, kExpandedChannels, K, K)
  float* norm;            // of the expansion: (groups, 2, kExpandedChannels)
  float* depthwise_norm;  // the same of the depthwise convolution
  float* project_norm;    // (2, output channels)
};

// `count` parameters of type T that are stored after each other: by cp.async, those that are not aligned one by one.
// All threads.
template <class T>
__device__ __forceinline__ void copy_parameters(const unsigned char* from, int count, T* to) {
  const int thread = static_cast<int>(threadIdx.x), bytes = count * static_cast<int>(sizeof(T));
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll 1
    for (int at = thread * 16; at < bytes; at += kMBConvThreads * 16) cp_async_16(shared_address(to) + at, from + at);
  } else {
#pragma unroll 1
    for (int at = thread; at < count; at += kMBConvThreads) to[at] = load_global(reinterpret_cast<const T*>(from) + at);
  }
}

// The taps of the block's channels; float32 ones are rounded to T, as PyTorch rounds the parameters of an operator of
// that type.
template <class T>
__device__ __forceinline__ void load_taps(const DepthwiseParams& p, int first_channel, int channels, T* taps) {
  const unsigned of_channel = p.kernel_w * p.kernel_w, count = channels * of_channel;
  const unsigned char* const data = static_cast<const unsigned char*>(p.weight.data);
  if (p.weight.dtype != DType::kFloat32) {
    copy_parameters(product_after(data, first_channel, of_channel * sizeof(T)), static_cast<int>(count), taps);
    return;
  }
  const float* const from =
      reinterpret_cast<const float*>(product_after(data, first_channel, of_channel * sizeof(float)));
#pragma unroll 1
  for (unsigned at = threadIdx.x; at < count; at += kMBConvThreads) taps[at] = from_float<T>(load_global(from + at));
}

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
  }

  // Keeps the norms that were asked for last, and asks for the next ones. All threads; ends without a barrier.
  __device__ __forceinline__ void next_norms(const MBConvParameters<T>& to) {
    if (unit_ < units_) keep_norm(to);
    unit_ += kMBConvThreads / 32;
    ask_norm();
  }
  // Keeps all that are left.
  __device__ __forceinline__ void keep_norms(const MBConvParameters<T>& to) {
#pragma unroll 1
    while (unit_ < units_) next_norms(to);
  }

 private:
  // f(norm, the first of its channels that the block has, how many, the thread's among these, activation, write): see
  // keep_norm.
  template <class F>
  __device__ __forceinline__ void with_norm(const MBConvParameters<T>& to, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto keep_in = [&](float* norm) {
      return [this, norm](int group, int channel, ScaleShift by) {
        float* const at = norm + 2 * kExpandedChannels * group + channel;
        if (group < groups_) at[0] = by.scale, at[kExpandedChannels] = by.shift;
      };
    };
    if (unit_ < own_units_) {
      f(a_.expand.norm, first_channel_, channels_, unit_ * 32 + lane, a_.expand.activation, keep_in(to.norm));
    } else if (unit_ < 2 * own_units_) {
      f(a_.depthwise.norm, first_channel_, channels_, (unit_ - own_units_) * 32 + lane, a_.depthwise.activation,
        keep_in(to.depthwise_norm));
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
  __device__ __forceinline__ void keep_norm(const MBConvParameters<T>& to) const {
    with_norm(to, [&](const Norm& norm, int, int count, int own, Activation activation, const auto& write) {
      ScaleShift by = {0.f, 0.f};
      if (own < count) by = before_activation(scale_shift(norm, stored_), a_.depthwise.dtype, activation);
      write(static_cast<unsigned>(own) / kExpandedChannels, static_cast<unsigned>(own) % kExpandedChannels, by);
    });
  }

  const MBConvArguments& a_;
  int first_channel_, channels_, groups_, own_units_, units_, unit_;  // units: of 32 norms
  StoredNorm stored_;
};

}  // namespace effkernels::cuda
