// Mean and variance of a channel without cancellation: results over runs of pixels that are joined in a fixed order
// (Chan, Golub and LeVeque 1979, equation 2.1), and the tree by which the blocks of a launch join theirs.
#pragma once
#include "../training_params.h"
#include "arrival.cuh"
#include "numeric.cuh"

namespace effkernels::cuda {

// Adds to a mean that is the sum of two floats: the first keeps what it can hold.
__device__ __forceinline__ void add_to_mean(float& mean, float& rest, float addend) {
  const float added = rest + addend, sum = mean + added, kept = sum - mean;
  rest = (mean - (sum - kept)) + (added - kept);
  mean = sum;
}

// Of `count` values: the mean as the sum of two floats, and the sum of their squared distances from it.
struct alignas(16) Moments {
  float mean = 0.f, rest = 0.f, squares = 0.f, count = 0.f;

  __device__ __forceinline__ void join(const Moments& other) {
    if (other.count == 0.f) return;
    if (count == 0.f) {
      *this = other;
      return;
    }
    const float share = other.count / (count + other.count);
    const float distance = (other.mean - mean) + (other.rest - rest);
    squares += fmaf(distance * distance, share * count, other.squares);
    add_to_mean(mean, rest, distance * share);
    count += other.count;
  }
};

// The same of a thread that adds one tile after the other, for one channel.
struct RunningMoments {
  float mean, rest, squares;
};

// Adds a tile of values: their mean is first + step, `within` the sum of their squared distances from it. `share`: of
// the tile among all values with it; `before`: number of values without it.
__device__ __forceinline__ void add_tile(RunningMoments& to, float first, float step, float within, float share,
                                         float before) {
  if (before == 0.f) {
    to = {first, step, within};
    return;
  }
  const float distance = (first - to.mean) + (step - to.rest);
  to.squares += fmaf(distance * distance, share * before, within);
  add_to_mean(to.mean, to.rest, distance * share);
}

__device__ __forceinline__ Moments load_moments(const Moments* from) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(from));
  Moments moments;
  memcpy(&moments, &words, sizeof(moments));
  return moments;
}

// Joins the results of the blocks of a channel group, [tiles + nodes][...] in global memory, in two levels, so that the
// last block has few to read: first `fan` neighbours, by the last of them to arrive, then those nodes. Called by all
// threads of a block after it wrote result `tile`. `join(first, count, to)` joins results first to first + count - 1
// into result `to`, or into the operator's own results where `to` is negative. `counters`: nodes + 1.
template <class Join>
__device__ __forceinline__ void join_blocks(int64_t tiles, int fan, int64_t tile, unsigned* counters, unsigned* flag,
                                            const Join& join) {
  const int64_t nodes = (tiles + fan - 1) / fan, node = tile / fan, first = node * fan;
  const int count = static_cast<int>(min(int64_t(fan), tiles - first));
  if (!arrive_last(counters + 1 + node, count, flag)) return;
  if (nodes == 1) {
    join(first, count, int64_t(-1));
    return;
  }
  join(first, count, tiles + node);
  if (!arrive_last(counters, static_cast<unsigned>(nodes), flag)) return;
  join(tiles, static_cast<int>(nodes), int64_t(-1));
}

// Everything of a channel's norm that follows from its statistics.
__device__ __forceinline__ void store_norm(const training::NormFold& fold, int64_t channels, int64_t channel,
                                           float mean, float variance) {
  const float inverse = 1.f / sqrtf(variance + fold.eps);
  const float rows[] = {mean,
                        variance,
                        variance * fold.unbiased,
                        inverse,
                        inverse * parameter(fold.weight, channel, 1.f),
                        parameter(fold.bias, channel, 0.f)};
#pragma unroll
  for (int row = 0; row < training::kNormRows; ++row) fold.vectors[row * channels + channel] = rows[row];
}

// The join of Moments by all threads of a block: of channels `first_channel` on, `block_channels` of them. `shared`:
// one Moments for each thread.
__device__ __forceinline__ void join_moments(Moments* partial, int64_t first, int count, int64_t to, int64_t channels,
                                             int64_t first_channel, int block_channels, const training::NormFold& fold,
                                             Moments* shared) {
  const int parts = blockDim.x / block_channels, part = threadIdx.x / block_channels;
  const int channel = threadIdx.x % block_channels;
  const bool exists = part < parts && first_channel + channel < channels;
  Moments total;
  if (exists) {
    const Moments* from = partial + first * channels + first_channel + channel;
    constexpr int kAtOnce = 4;  // reads that are under way together
#pragma unroll 1
    for (int at = part; at < count; at += kAtOnce * parts) {
      Moments read[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (at + i * parts < count) read[i] = load_moments(from + (at + i * parts) * channels);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total.join(read[i]);
    }
  }
  __syncthreads();  // a join before this one may still read
  if (part < parts) shared[part * block_channels + channel] = total;
  __syncthreads();
  if (part == 0 && exists) {
    for (int other = 1; other < parts; ++other) total.join(shared[other * block_channels + channel]);
    const int64_t at = first_channel + channel;
    if (to >= 0)
      partial[to * channels + at] = total;
    else
      store_norm(fold, channels, at, total.mean + total.rest, total.squares / total.count);
  }
}

}  // namespace effkernels::cuda
