// What the passes over pixels share. A block has `lanes` rows of `channel_vectors` threads; a thread has one vector of
// channels (16 bytes, or one channel where the channels do not divide) in all of its pixels, so that neighbouring
// threads read neighbouring bytes. Items are runs of `chunk` pixels of one image; a block takes `items_per_block` of
// them one after the other, a lane every lanes-th pixel. What is known per channel is in shared memory, in the planes
// of depthwise_parameters.cuh.
#pragma once
#include "depthwise_parameters.cuh"
#include "training.h"
#include "training_lane.cuh"
#include "training_slope.cuh"

namespace effkernels::cuda {

// Item `index` of the batch.
struct PassItem {
  int64_t image, first;  // first: pixel of the image
  int pixels;

  __device__ __forceinline__ PassItem(const PassPlan& plan, int64_t index, int64_t image_pixels) {
    image = index / plan.chunks;
    first = index % plan.chunks * plan.chunk;
    pixels = static_cast<int>(min(plan.chunk, image_pixels - first));
  }
};

// Row `row` of the block's parameters from a vector over all channels; `missing` where it is not given.
template <int V>
__device__ __forceinline__ void fill_row(float* rows, int row, int block_channels, const float* from,
                                         int64_t first_channel, int64_t channels, float missing) {
  for (int i = threadIdx.x; i < block_channels; i += blockDim.x) {
    const bool given = from != nullptr && first_channel + i < channels;
    rows[row * block_channels + place_in_row<V>(i, block_channels)] =
        given ? load_global(from + first_channel + i) : missing;
  }
}

// The values of a thread's channels from a vector over all channels, at any alignment.
template <int V>
__device__ __forceinline__ void read_channels(const float* from, int64_t channel, float missing, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = from != nullptr ? load_global(from + channel + i) : missing;
}

// A vector as it is stored, from float32, and its way to memory in one access.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> pack(const float (&from)[V]) {
  Vector<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.at[i] = from_float<T>(from[i]);
  return raw;
}
template <class T, int V>
__device__ __forceinline__ void store_raw(T* to, const Vector<T, V>& raw) {
  if constexpr (sizeof(raw) == 16) {
    uint4 words;
    memcpy(&words, &raw, sizeof(words));
    __stcg(reinterpret_cast<uint4*>(to), words);
  } else {
    static_assert(V == 1, "a vector has 16 bytes, or is one element");
    *to = raw.at[0];
  }
}

// What other blocks of the launch wrote: the cache of this multiprocessor may hold older values.
template <int kCount>
__device__ __forceinline__ Vector<float, kCount> load_past_first_cache(const float* from) {
  Vector<float, kCount> raw;
  if constexpr (kCount == 4) {
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(from));
    memcpy(&raw, &words, sizeof(raw));
  } else {
    static_assert(kCount == 1, "16 bytes, or one value");
    raw.at[0] = __ldcg(from);
  }
  return raw;
}

}  // namespace effkernels::cuda
