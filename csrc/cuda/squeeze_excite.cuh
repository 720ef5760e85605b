// Squeeze-and-excitation's two small matrix products, as parts that several kernels share:
//   hidden = activation(w_reduce @ means + b_reduce)        R values per image
//   gate   = gate_activation(w_expand @ hidden + b_expand)  C values per image
// and the kernel of squeeze_excite_gate, which is these parts alone.
//
// The reads are mostly weights: 2 C R values for each image, from the L2 cache. A block that has several images
// reads each weight once for all of them (kMostImagesOfGate). Every sum has a fixed order.
#pragma once
#include "arrival.cuh"
#include "numeric.cuh"
#include "squeeze_excite.h"

namespace effkernels::cuda {

// Threads that share one row of w_reduce: of all channels of an image, and of those of one block.
constexpr int kReduceLanes = 16, kReduceLanesOfBlock = 4;

// The first product over `count` channels from `first` on, without bias and activation. kLanes threads share a row, and
// a warp takes several rows, all of its threads as long as any: their shuffles need no mask that is worked out at run
// time.
//   means: channel `first + i` of image m at m * means_stride + i
//   hidden: row r of image m at m * hidden_stride + r
template <int kLanes, class W>
__device__ void reduce_rows(const W* weight, int64_t channels, int reduced, int64_t first, int count,
                            const float* means, int means_stride, int images, float* hidden, int64_t hidden_stride) {
  constexpr int E = kVectorOf<W>, kRows = 32 / kLanes;
  const int lane = threadIdx.x % kLanes, warps = blockDim.x / 32;
  const bool vectors = (channels | first | count | means_stride) % E == 0 &&
                       (reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(means)) % 16 == 0;
#pragma unroll 2
  for (int rows = threadIdx.x / 32 * kRows; rows < reduced; rows += warps * kRows) {
    const int row = rows + threadIdx.x % 32 / kLanes;
    const W* from = weight + row * channels + first;
    const int own_count = row < reduced ? count : 0;
    float sum[kMostImagesOfGate] = {};
    if (vectors) {
#pragma unroll 4
      for (int at = lane * E; at < own_count; at += kLanes * E) {
        float w[E];
        load(from + at, w);
#pragma unroll
        for (int m = 0; m < kMostImagesOfGate; ++m) {
          if (m >= images) break;
#pragma unroll
          for (int e = 0; e < E; e += 4) {
            const Vector<float, 4> mean = *reinterpret_cast<const Vector<float, 4>*>(means + m * means_stride + at + e);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[m] = fmaf(w[e + i], mean.at[i], sum[m]);
          }
        }
      }
    } else {
#pragma unroll 4
      for (int at = lane; at < own_count; at += kLanes) {
        const float w = to_float(load_global(from + at));
#pragma unroll
        for (int m = 0; m < kMostImagesOfGate; ++m)
          if (m < images) sum[m] = fmaf(w, means[m * means_stride + at], sum[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < kMostImagesOfGate; ++m) {
      if (m >= images) break;
      float total = sum[m];
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (lane == 0 && row < reduced) hidden[m * hidden_stride + row] = total;
    }
  }
}

template <int kLanes, class T>
__device__ void reduce_product(const SqueezeExciteParams& p, int64_t first, int count, const float* means,
                               int means_stride, int images, float* hidden, int64_t hidden_stride) {
  const int reduced = static_cast<int>(p.reduced);
  if (p.w_reduce.dtype == DType::kFloat32)
    reduce_rows<kLanes>(static_cast<const float*>(p.w_reduce.data), p.channels, reduced, first, count, means,
                        means_stride, images, hidden, hidden_stride);
  else
    reduce_rows<kLanes>(static_cast<const T*>(p.w_reduce.data), p.channels, reduced, first, count, means, means_stride,
                        images, hidden, hidden_stride);
}

// Bias and activation of the first product, in place on images * R adjacent values; ends with a barrier.
__device__ __forceinline__ void activate_hidden(const SqueezeExciteParams& p, int images, float* hidden) {
  const int reduced = static_cast<int>(p.reduced);
  for (int at = threadIdx.x; at < images * reduced; at += blockDim.x) {
    float value[1] = {hidden[at] + parameter(p.b_reduce, at % reduced, 0.f)};
    activate<float>(value, p.activation);
    hidden[at] = value[0];
  }
  __syncthreads();
}

// The second product for `count` channels from `first` on, by threads that each take a channel and read its row of
// w_expand E values at a time, kAhead such reads before the first is needed; neighbouring rows are neighbours in
// memory, so that every byte that is fetched is used. write(m, channel, gate) gets each result once. The parameters are
// copied: through a reference they would be read anew for each channel.
template <class W, int E, class Write>
__device__ void expand_rows(const SqueezeExciteParams& p, int64_t first, int count, const float* hidden, int images,
                            Write write) {
  constexpr int kSums = E < 4 ? E : 4;  // added at last: short sums err less, and need not wait for each other
  constexpr int kAhead = 6;
  const int reduced = static_cast<int>(p.reduced);
  const W* const weight = static_cast<const W*>(p.w_expand.data);
  const Param bias = p.b_expand;
  const Gate gate = p.gate_activation;
  for (int at = threadIdx.x; at < count; at += blockDim.x) {
    const int64_t channel = first + at;
    const unsigned own_bias = stored_parameter(bias, channel);
    float sum[kMostImagesOfGate][kSums] = {};
#pragma unroll 1
    for (int start = 0; start < reduced; start += kAhead * E) {
      Vector<W, E> raw[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        raw[j] = {};
        if (start + j * E < reduced) raw[j] = load_raw<W, E>(weight + channel * reduced + start + j * E);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (start + j * E >= reduced) break;
        float w[E];
        unpack(raw[j], 0, w);
#pragma unroll
        for (int m = 0; m < kMostImagesOfGate; ++m) {
          if (m >= images) break;
#pragma unroll
          for (int e = 0; e < E; e += kSums) {
            const auto value = *reinterpret_cast<const Vector<float, kSums>*>(hidden + m * reduced + start + j * E + e);
#pragma unroll
            for (int i = 0; i < kSums; ++i) sum[m][i] = fmaf(w[e + i], value.at[i], sum[m][i]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMostImagesOfGate; ++m) {
      if (m >= images) break;
      float total = sum[m][0];
#pragma unroll
      for (int i = 1; i < kSums; ++i) total += sum[m][i];
      write(m, channel, apply_gate(total + parameter_value(bias, own_bias, 0.f), gate));
    }
  }
}

template <class W, class Write>
__device__ void expand_product_of(const SqueezeExciteParams& p, int64_t first, int count, const float* hidden,
                                  int images, Write write) {
  constexpr int kWidest = kVectorOf<W>;
  const bool aligned = reinterpret_cast<uintptr_t>(p.w_expand.data) % 16 == 0;
  if (aligned && p.reduced % kWidest == 0)
    expand_rows<W, kWidest>(p, first, count, hidden, images, write);
  else if (kWidest > 4 && aligned && p.reduced % 4 == 0)
    expand_rows<W, 4>(p, first, count, hidden, images, write);
  else if (aligned && p.reduced % 2 == 0)
    expand_rows<W, 2>(p, first, count, hidden, images, write);
  else
    expand_rows<W, 1>(p, first, count, hidden, images, write);
}

// hidden: images * R adjacent values.
template <class T, class Write>
__device__ void expand_product(const SqueezeExciteParams& p, int64_t first, int count, const float* hidden, int images,
                               Write write) {
  if (p.w_expand.dtype == DType::kFloat32)
    expand_product_of<float>(p, first, count, hidden, images, write);
  else
    expand_product_of<T>(p, first, count, hidden, images, write);
}

// squeeze_excite_gate: block (unit, split) takes plan.images images and plan.split_channels channels of the gate. The
// splits repeat the first product, which fills the GPU where there are few images; their weights come from L2.
template <class T>
__global__ void __launch_bounds__(kSqueezeExciteThreads, 2)
    squeeze_excite_gate(const SqueezeExciteParams p, const SqueezeExcitePlan plan) {
  wait_for_previous();
  allow_next();
  float* hidden = dynamic_shared<float>();
  const int64_t unit = blockIdx.x / plan.splits;
  const int64_t first_image = unit * plan.images;
  const int images = static_cast<int>(min(int64_t(plan.images), p.batch - first_image));
  const int64_t first_channel = int64_t(blockIdx.x % plan.splits) * plan.split_channels;
  const int count = static_cast<int>(min(int64_t(plan.split_channels), p.channels - first_channel));

  const float* means = p.pooled + first_image * p.channels;
  reduce_product<kReduceLanes, T>(p, 0, static_cast<int>(p.channels), means, static_cast<int>(p.channels), images,
                                  hidden, p.reduced);
  __syncthreads();
  activate_hidden(p, images, hidden);
  T* gate = static_cast<T*>(p.gate) + first_image * p.channels;
  const int64_t channels = p.channels;
  expand_product<T>(p, first_channel, count, hidden, images, [gate, channels](int m, int64_t channel, float value) {
    gate[m * channels + channel] = from_float<T>(value);
  });
}

// y *= gate, in place. A thread takes vectors of V channels.
template <class T, int V>
__global__ void __launch_bounds__(kScaleThreads, 4) scale_by_gate(const ScaleParams p, int64_t vectors) {
  wait_for_previous();
  allow_next();
  const int64_t per_image = p.pixels * p.channels / V, per_pixel = p.channels / V;
  for (int64_t at = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x; at < vectors;
       at += int64_t(gridDim.x) * kScaleThreads) {
    float value[V], gate[V];
    T* y = static_cast<T*>(p.y) + at * V;
    const Vector<T, V> raw = *reinterpret_cast<const Vector<T, V>*>(y);  // written below: not through the cache of load
    load(static_cast<const T*>(p.gate) + at / per_image * p.channels + at % per_pixel * V, gate);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = to_float(raw.at[i]) * gate[i];
    store_global(y, value);
  }
}

}  // namespace effkernels::cuda
