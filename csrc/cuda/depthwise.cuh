// y = activation(norm(depthwise convolution of x)) in one pass over x, and on the way, without a second pass, the
// channel means of y and squeeze-and-excitation's gate.
//
// Threads and data. A block has kDepthwiseThreads threads: `channel_vectors` along the channels, each a vector of 16
// bytes (or a single channel where the channels do not divide), times `lanes`. The output plane is cut into strips:
// kStrip neighbouring pixels of one row. A lane takes one strip per round; neighbouring lanes take strips below each
// other, so that the K rows which neighbours share come from the L1 cache. A thread keeps the taps of one kernel row in
// registers and slides over the input row once, adding each input vector to every output that it reaches. Of a kernel
// whose size is known at run time only, it keeps kTaps taps of a row at a time.
//
// Traffic. Memory: x once, y once, the parameters. L1: every input vector K times for a strip of kStrip outputs, and of
// a kernel of KH x KW up to KH * ceil(KW / kTaps) times.
//
// Sums. A thread adds its strips in order, the block its lanes in order, the last block to arrive the blocks of the
// image in order: the same bits every time, in one launch.
#pragma once
#include "depthwise.h"
#include "squeeze_excite.cuh"

namespace effkernels::cuda {

template <class Element, int kKernelSize, int kStrideSize, int kPixels = depthwise_strip(kKernelSize, kStrideSize)>
struct DepthwiseTraits {
  using T = Element;
  static constexpr int kKernel = kKernelSize;  // height and width; 0: those of the params
  static constexpr int kStride = kStrideSize;
  static constexpr int kVector = kVectorOf<T>;
  static constexpr int kStrip = kPixels;
  static constexpr int kTaps = kKernel > 0 ? kKernel : 4;         // of a kernel row in registers at a time
  static constexpr int kInputs = (kStrip - 1) * kStride + kTaps;  // input columns under one strip and these taps
  static constexpr bool kShort = kStrip == kShortStrip;
  static constexpr int kBlocks = depthwise_resident_blocks(sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat16, kStrip);
  static_assert(kKernel == compiled_kernel(kKernel, kKernel) && kStride >= 1, "no size that a plan asks for");
};

// The arguments of a depthwise kernel. Without squeeze-and-excitation se.gate is null.
struct DepthwiseArguments {
  DepthwiseParams depthwise;
  SqueezeExciteParams se;
  DepthwisePlan plan;
  DepthwiseWork work;
};

// The part of the output that a thread computes.
struct DepthwiseLane {
  int group;    // of channels
  int tile;     // run of strips
  int unit;     // run of images
  int vector;   // of channels, within the block
  int lane;     // along the strips
  int channel;  // first of the thread's vector
  bool active;  // a channel that exists, and a lane that is needed

  __device__ __forceinline__ DepthwiseLane(const DepthwiseParams& p, const DepthwisePlan& plan, int group_, int tile_,
                                           int unit_)
      : group(group_), tile(tile_), unit(unit_) {
    vector = threadIdx.x % plan.channel_vectors;
    lane = threadIdx.x / plan.channel_vectors;
    channel = (group * plan.channel_vectors + vector) * plan.vector;
    active = channel < p.channels && lane < plan.lanes;
  }
};

// The strips of a lane, one after the other: strips below each other first. Divides once, not for each of them.
struct StripCursor {
  int index, row, column;
  int step, step_rows, step_columns, rows;

  __device__ __forceinline__ StripCursor(int first, int step_, int rows_)
      : index(first),
        row(first % rows_),
        column(first / rows_),
        step(step_),
        step_rows(step_ % rows_),
        step_columns(step_ / rows_),
        rows(rows_) {}
  __device__ __forceinline__ void advance() {
    index += step, row += step_rows, column += step_columns;
    if (row >= rows) row -= rows, ++column;
  }
};

// The block's parameters as float32 in shared memory: a row of block_channels values for each tap, one of scales and
// one of shifts. Within a row the channels are stored in planes: first of every vector its channels 0 to 3, then of
// every vector its channels 4 to 7. A thread reads 16 bytes of a plane, its neighbours the 16 bytes beside them,
// without a conflict.
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
#pragma unroll
      for (int e = 0; e < E; ++e) {
        rows[tap * block_channels + place_in_row<V>(channel, block_channels)] = to_float(raw[j].at[e]);
        if (++tap == tap_count) tap = 0, ++channel;
      }
    }
  }
}

// A thread takes one channel's norm: its reads are under way while the taps are read.
template <class T, int V, int kTapCount>
__device__ __forceinline__ void load_parameters(const DepthwiseParams& p, int tap_count, int64_t first_channel,
                                                int block_channels, float* rows) {
  const int channels = static_cast<int>(min(int64_t(block_channels), p.channels - first_channel));
  const int64_t first = first_channel * tap_count;
  const int own = threadIdx.x;
  StoredNorm norm = {};
  if (own < channels) norm = stored_norm(p.norm, first_channel + own);
  if (p.weight.dtype == DType::kFloat32)
    copy_taps<V, kTapCount>(static_cast<const float*>(p.weight.data) + first, channels, tap_count, block_channels,
                            rows);
  else
    copy_taps<V, kTapCount>(static_cast<const T*>(p.weight.data) + first, channels, tap_count, block_channels, rows);
  if (own < channels) {
    const ScaleShift by = scale_shift(p.norm, norm);
    float* scales = rows + tap_count * block_channels + place_in_row<V>(own, block_channels);
    scales[0] = by.scale, scales[block_channels] = by.shift;
  }
  __syncthreads();
}

// One strip, whose first output looks at the image from (top, left) on: the sums before the norm. A row is read as it
// is stored; the channels are then taken four at a time, so that their taps, the row and the sums stay in registers.
template <class Traits, bool kInside>
__device__ __forceinline__ void convolve_rows(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                              int left, const ThreadParameters<Traits::kVector>& taps,
                                              float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector;
  const T* start = image + top * p.x_stride_h + left * p.x_stride_w;
#pragma unroll 1
  for (int ky = 0; ky < K; ++ky, start += p.x_stride_h) {
    if (static_cast<unsigned>(top + ky) >= static_cast<unsigned>(p.height)) continue;
    const T* from = start;
    Vector<T, V> row[Traits::kInputs];
#pragma unroll
    for (int ix = 0; ix < Traits::kInputs; ++ix) {
      if constexpr (!kInside) row[ix] = {};
      if (kInside || static_cast<unsigned>(left + ix) < static_cast<unsigned>(p.width)) row[ix] = load_raw<T, V>(from);
      from += p.x_stride_w;
    }
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      Vector<float, 4> tap[K];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) tap[kx] = taps(ky * K + kx, part);
#pragma unroll
      for (int ix = 0; ix < Traits::kInputs; ++ix) {
        float value[4];
        unpack(row[ix], part, value);
#pragma unroll
        for (int ox = 0; ox < Traits::kStrip; ++ox) {
          const int kx = ix - ox * S;
          if (kx < 0 || kx >= K) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[ox][part + i] = fmaf(value[i], tap[kx].at[i], acc[ox][part + i]);
        }
      }
    }
  }
}

// The same of a short strip: its whole window is read at once.
template <class Traits>
__device__ __forceinline__ void convolve_window(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                                int left, const ThreadParameters<Traits::kVector>& taps,
                                                float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector;
  Vector<T, V> window[K][Traits::kInputs];
  const T* const start = image + top * p.x_stride_h + left * p.x_stride_w;
#pragma unroll
  for (int ky = 0; ky < K; ++ky)
#pragma unroll
    for (int ix = 0; ix < Traits::kInputs; ++ix) {
      window[ky][ix] = {};
      const bool inside = static_cast<unsigned>(top + ky) < static_cast<unsigned>(p.height) &&
                          static_cast<unsigned>(left + ix) < static_cast<unsigned>(p.width);
      if (inside) window[ky][ix] = load_raw<T, V>(start + ky * p.x_stride_h + ix * p.x_stride_w);
    }
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      Vector<float, 4> tap[K];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) tap[kx] = taps(ky * K + kx, part);
#pragma unroll
      for (int ix = 0; ix < Traits::kInputs; ++ix) {
        float value[4];
        unpack(window[ky][ix], part, value);
#pragma unroll
        for (int ox = 0; ox < Traits::kStrip; ++ox) {
          const int kx = ix - ox * S;
          if (kx < 0 || kx >= K) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[ox][part + i] = fmaf(value[i], tap[kx].at[i], acc[ox][part + i]);
        }
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void convolve_strip(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                               int left, const ThreadParameters<Traits::kVector>& taps,
                                               float (&acc)[Traits::kStrip][Traits::kVector]) {
  if constexpr (Traits::kShort)
    convolve_window<Traits>(p, image, top, left, taps, acc);
  else if (left >= 0 && left + Traits::kInputs <= p.width)
    convolve_rows<Traits, true>(p, image, top, left, taps, acc);
  else
    convolve_rows<Traits, false>(p, image, top, left, taps, acc);
}

// The same for a kernel of any height and width, kTaps taps of a row at a time. Taps beyond the row's end are skipped,
// not zero: an infinite input times zero would not be.
template <class Traits>
__device__ __forceinline__ void convolve_any_strip(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                                   int left, const ThreadParameters<Traits::kVector>& taps,
                                                   float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int S = Traits::kStride, V = Traits::kVector, kTaps = Traits::kTaps;
#pragma unroll 1
  for (int ky = 0; ky < p.kernel_h; ++ky) {
    if (top + ky < 0 || top + ky >= p.height) continue;
#pragma unroll 1
    for (int first = 0; first < p.kernel_w; first += kTaps) {
      const int count = min(kTaps, p.kernel_w - first), inputs = (Traits::kStrip - 1) * S + count;
      const T* from = image + (top + ky) * p.x_stride_h + (left + first) * p.x_stride_w;
      Vector<T, V> row[Traits::kInputs];
#pragma unroll
      for (int ix = 0; ix < Traits::kInputs; ++ix) {
        row[ix] = {};
        const bool inside = static_cast<unsigned>(left + first + ix) < static_cast<unsigned>(p.width);
        if (inside && ix < inputs) row[ix] = load_raw<T, V>(from);
        from += p.x_stride_w;
      }
      const int row_of_taps = ky * p.kernel_w + first;
#pragma unroll
      for (int part = 0; part < V; part += 4) {
        Vector<float, 4> tap[kTaps] = {};
#pragma unroll
        for (int kx = 0; kx < kTaps; ++kx)
          if (kx < count) tap[kx] = taps(row_of_taps + kx, part);
#pragma unroll
        for (int ix = 0; ix < Traits::kInputs; ++ix) {
          float value[4];
          unpack(row[ix], part, value);
#pragma unroll
          for (int ox = 0; ox < Traits::kStrip; ++ox) {
            const int kx = ix - ox * S;
            if (kx < 0 || kx >= kTaps) continue;
            if (kx < count)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[ox][part + i] = fmaf(value[i], tap[kx].at[i], acc[ox][part + i]);
          }
        }
      }
    }
  }
}

// Norm and activation of the sums of a strip. `norm`: the row of scales; that of shifts is the next.
template <class T, int kPixels, int V>
__device__ __forceinline__ void finish_strip(const ThreadParameters<V>& parameters, int norm, Activation activation,
                                             float (&value)[kPixels][V]) {
#pragma unroll
  for (int part = 0; part < V; part += kQuad<V>) {
    const Vector<float, kQuad<V>> scale = parameters(norm, part), shift = parameters(norm + 1, part);
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel)
#pragma unroll
      for (int i = 0; i < kQuad<V>; ++i)
        value[pixel][part + i] = fmaf(value[pixel][part + i], scale.at[i], shift.at[i]);
  }
  activate<T>(reinterpret_cast<float (&)[kPixels * V]>(value), activation);
}

// The channel sums of a thread are in shared memory, one row per lane: the convolution needs the registers.
template <int V>
__device__ __forceinline__ void add_to_lane(const float (&sum)[V], float* lane_sums) {
#pragma unroll
  for (int i = 0; i < V; ++i) lane_sums[i] += sum[i];
}

// A sum together with what its additions round off: lanes and tiles are so many that a plain sum of equal ones would
// lose a digit of the means. `rest` is NaN where a value was infinite.
struct ExactSum {
  float value = 0.f, rest = 0.f;

  __device__ __forceinline__ void add(float addend) {
    const float sum = value + addend, added = sum - value;
    rest += (value - (sum - added)) + (addend - added);
    value = sum;
  }
  __device__ __forceinline__ float result() const { return rest == rest ? value + rest : value; }
};

// Adds the lanes' sums of one image in lane order into `sums`, (block_channels), and clears them for the next image.
// Called by all threads; ends with a barrier.
__device__ __forceinline__ void add_lanes(const DepthwisePlan& plan, float* lane_sums, float* sums) {
  const int block_channels = plan.channel_vectors * plan.vector;
  __syncthreads();
  if (threadIdx.x < block_channels) {
    ExactSum total;
    for (int lane = 0; lane < plan.lanes; ++lane) {
      float& sum = lane_sums[lane * block_channels + threadIdx.x];
      total.add(sum);
      sum = 0.f;
    }
    sums[threadIdx.x] = total.result();
  }
  __syncthreads();
}

// Shared memory after the block's parameters, if channel means are asked for.
struct SumsInShared {
  float* lane_sums;  // (lanes, block_channels)
  float* sums;       // (images, block_channels)
  unsigned* flag;    // one word
  float* hidden;     // (images, R), at a multiple of 16 bytes

  __device__ __forceinline__ SumsInShared(const DepthwisePlan& plan, float* parameters, int tap_count) {
    const int block_channels = plan.channel_vectors * plan.vector;
    const int of_lanes = (tap_count + 2) * block_channels, of_images = of_lanes + plan.lanes * block_channels;
    const int of_flag = of_images + plan.images * block_channels;
    lane_sums = parameters + of_lanes;
    sums = parameters + of_images;
    flag = reinterpret_cast<unsigned*>(parameters + of_flag);
    hidden = parameters + (of_flag / 4 + 1) * 4;
  }
};

__device__ __forceinline__ void clear_lanes(const DepthwisePlan& plan, float* lane_sums) {
  const int count = plan.lanes * plan.channel_vectors * plan.vector;
  for (int at = threadIdx.x; at < count; at += blockDim.x) lane_sums[at] = 0.f;
}

// From the sums of this block to the means, and from the means to the gate, by the blocks that come last. All threads.
template <class T>
__device__ __noinline__ void finish_sums(const DepthwiseArguments& a, int group, int tile, int64_t unit,
                                         float* parameters) {
  const DepthwiseParams& p = a.depthwise;
  const SqueezeExciteParams& se = a.se;
  const DepthwisePlan& plan = a.plan;
  const DepthwiseWork& work = a.work;
  const SumsInShared shared(plan, parameters, p.kernel_h * p.kernel_w);
  const int block_channels = plan.channel_vectors * plan.vector;
  const int64_t first_channel = int64_t(group) * block_channels, first_image = unit * plan.images;
  const int channels = static_cast<int>(min(int64_t(block_channels), p.channels - first_channel));
  const int images = static_cast<int>(min(int64_t(plan.images), p.batch - first_image));

  unsigned* unit_arrivals = work.arrivals + unit;
  if (plan.tiles > 1) {
    float* partial = work.partial + unit * plan.tiles * p.channels + first_channel;
    if (threadIdx.x < channels) partial[tile * p.channels + threadIdx.x] = shared.sums[threadIdx.x];
    if (!arrive_last(work.arrivals + unit * plan.channel_groups + group, plan.tiles, shared.flag)) return;
    unit_arrivals += plan.units * plan.channel_groups;
    // Threads that are not needed for a channel of their own share the tiles.
    const int parts = kDepthwiseThreads / block_channels, part = threadIdx.x / block_channels;
    const int channel = threadIdx.x % block_channels;
    if (part < parts && channel < channels) {
      constexpr int kAtOnce = 8;  // reads that are under way together
      ExactSum total;
#pragma unroll 1
      for (int first = part; first < plan.tiles; first += kAtOnce * parts) {
        float of_tile[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int from = first + i * parts;
          of_tile[i] = from < plan.tiles ? __ldcg(partial + from * p.channels + channel) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) total.add(of_tile[i]);
      }
      shared.lane_sums[part * block_channels + channel] = total.result();
    }
    __syncthreads();
    if (threadIdx.x < channels) {
      ExactSum total;
      for (int from = 0; from < parts; ++from) total.add(shared.lane_sums[from * block_channels + threadIdx.x]);
      shared.sums[threadIdx.x] = total.result();
    }
    __syncthreads();
  }

  const float pixels = static_cast<float>(p.out_height * p.out_width);
  for (int at = threadIdx.x; at < images * block_channels; at += kDepthwiseThreads) {
    const float mean = shared.sums[at] / pixels;
    shared.sums[at] = mean;
    const int channel = at % block_channels;
    if (p.pooled != nullptr && channel < channels)
      p.pooled[(first_image + at / block_channels) * p.channels + first_channel + channel] = mean;
  }
  if (se.gate == nullptr) return;
  __syncthreads();

  const int reduced = static_cast<int>(se.reduced);
  float* hidden = work.hidden + first_image * plan.channel_groups * reduced;  // (images, groups, R)
  reduce_product<kReduceLanesOfBlock, T>(se, first_channel, channels, shared.sums, block_channels, images,
                                         hidden + group * reduced, int64_t(plan.channel_groups) * reduced);
  if (!arrive_last(unit_arrivals, plan.channel_groups, shared.flag)) return;
  for (int at = threadIdx.x; at < images * reduced; at += kDepthwiseThreads) {
    const float* from = hidden + (at / reduced * plan.channel_groups) * reduced + at % reduced;
    constexpr int kAtOnce = 12;  // reads that are under way together
    float total = 0.f;
#pragma unroll 1
    for (int first = 0; first < plan.channel_groups; first += kAtOnce) {
      float of_group[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        of_group[i] = first + i < plan.channel_groups ? __ldcg(from + (first + i) * reduced) : 0.f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total += of_group[i];
    }
    shared.hidden[at] = total;
  }
  __syncthreads();
  activate_hidden(se, images, shared.hidden);
  T* gate = static_cast<T*>(se.gate) + first_image * p.channels;
  const int64_t stride = p.channels;
  expand_product<T>(
      se, 0, static_cast<int>(p.channels), shared.hidden, images,
      [gate, stride](int m, int64_t channel, float value) { gate[m * stride + channel] = from_float<T>(value); });
}

template <class Traits>
__global__ void __launch_bounds__(kDepthwiseThreads, Traits::kBlocks)
    depthwise_strips(const __grid_constant__ DepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const int block_channels = plan.channel_vectors * V, tap_count = K > 0 ? K * K : p.kernel_h * p.kernel_w;
  float* parameters = dynamic_shared<float>();
  const SumsInShared shared(plan, parameters, tap_count);

  const int group = blockIdx.x % plan.channel_groups, tile = blockIdx.x / plan.channel_groups % plan.tiles;
  const DepthwiseLane at(p, plan, group, tile, blockIdx.x / plan.channel_groups / plan.tiles);
  const bool sums = p.pooled != nullptr || a.se.gate != nullptr;
  if (sums) clear_lanes(plan, shared.lane_sums);
  load_parameters<T, V, K * K>(p, tap_count, int64_t(group) * block_channels, block_channels, parameters);
  const ThreadParameters<V> my(parameters, block_channels, at.vector);
  float* my_sums = shared.lane_sums + at.lane * block_channels + at.vector * V;

  for (int m = 0; m < plan.images; ++m) {
    const int image = at.unit * plan.images + m;
    if (image >= p.batch) break;
    const T* from = static_cast<const T*>(p.x) + int64_t(image) * p.x_stride_n + at.channel;
    T* to = static_cast<T*>(p.y) + int64_t(image) * p.out_height * p.out_width * p.channels + at.channel;
    StripCursor strip(tile * plan.rounds * plan.lanes + at.lane, plan.lanes, plan.out_height);
    for (int round = 0; round < plan.rounds; ++round, strip.advance()) {
      if (!at.active || strip.index >= plan.strips) break;
      const int row = strip.row, column = strip.column * kStrip;
      float acc[kStrip][V] = {}, sum[V] = {};
      const int top = row * S - p.pad_top, left = column * S - p.pad_left;
      if constexpr (K > 0)
        convolve_strip<Traits>(p, from, top, left, my, acc);
      else
        convolve_any_strip<Traits>(p, from, top, left, my, acc);
      finish_strip<T>(my, tap_count, p.activation, acc);
      T* const first = to + (int64_t(row) * p.out_width + column) * p.channels;
      const int pixels = static_cast<int>(p.out_width) - column;
#pragma unroll
      for (int ox = 0; ox < kStrip; ++ox) {
        if (ox >= pixels) break;
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += acc[ox][i];
        store_global(first + ox * p.channels, acc[ox]);
      }
      if (sums) add_to_lane(sum, my_sums);
    }
    if (sums) add_lanes(plan, shared.lane_sums, shared.sums + m * block_channels);
  }
  if (sums) finish_sums<T>(a, group, tile, at.unit, parameters);
}

// Any stride, dilation and channel count: one output per thread and round, taps from shared memory.
template <class T, int V>
__global__ void __launch_bounds__(kDepthwiseThreads, 4) depthwise_any(const __grid_constant__ DepthwiseArguments a) {
  wait_for_previous();
  allow_next();
  const DepthwiseParams& p = a.depthwise;
  const DepthwisePlan& plan = a.plan;
  const int block_channels = plan.channel_vectors * V, tap_count = p.kernel_h * p.kernel_w;
  float* parameters = dynamic_shared<float>();
  const SumsInShared shared(plan, parameters, tap_count);

  const int group = blockIdx.x % plan.channel_groups, tile = blockIdx.x / plan.channel_groups % plan.tiles;
  const DepthwiseLane at(p, plan, group, tile, blockIdx.x / plan.channel_groups / plan.tiles);
  const bool sums = p.pooled != nullptr || a.se.gate != nullptr;
  if (sums) clear_lanes(plan, shared.lane_sums);
  load_parameters<T, V, 0>(p, tap_count, int64_t(group) * block_channels, block_channels, parameters);
  const ThreadParameters<V> my(parameters, block_channels, at.vector);
  float* my_sums = shared.lane_sums + at.lane * block_channels + at.vector * V;

  for (int m = 0; m < plan.images; ++m) {
    const int image = at.unit * plan.images + m;
    if (image >= p.batch) break;
    const T* from = static_cast<const T*>(p.x) + int64_t(image) * p.x_stride_n + at.channel;
    T* to = static_cast<T*>(p.y) + int64_t(image) * p.out_height * p.out_width * p.channels + at.channel;
    StripCursor strip(tile * plan.rounds * plan.lanes + at.lane, plan.lanes, plan.out_height);
    for (int round = 0; round < plan.rounds; ++round, strip.advance()) {
      if (!at.active || strip.index >= plan.strips) break;
      const int row = strip.row, column = strip.column;
      float acc[1][V] = {};
      for (int ky = 0; ky < p.kernel_h; ++ky) {
        const int iy = row * p.stride - p.pad_top + ky * p.dilation;
        if (iy < 0 || iy >= p.height) continue;
        for (int kx = 0; kx < p.kernel_w; ++kx) {
          const int ix = column * p.stride - p.pad_left + kx * p.dilation;
          if (ix < 0 || ix >= p.width) continue;
          float value[V];
          load(from + iy * p.x_stride_h + ix * p.x_stride_w, value);
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            const Vector<float, kQuad<V>> tap = my(ky * p.kernel_w + kx, part);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) acc[0][part + i] = fmaf(value[part + i], tap.at[i], acc[0][part + i]);
          }
        }
      }
      finish_strip<T>(my, tap_count, p.activation, acc);
      store_global(to + (int64_t(row) * p.out_width + column) * p.channels, acc[0]);
      if (sums) add_to_lane(acc[0], my_sums);
    }
    if (sums) add_lanes(plan, shared.lane_sums, shared.sums + m * block_channels);
  }
  if (sums) finish_sums<T>(a, group, tile, at.unit, parameters);
}

template <class T, int S>
cudaError_t run_kernel_size(const DepthwiseArguments& a, const Launch& at) {
  if (a.plan.strip == kShortStrip)
    return a.depthwise.kernel_h == 3 ? launch(depthwise_strips<DepthwiseTraits<T, 3, S, kShortStrip>>, at, a)
                                     : launch(depthwise_strips<DepthwiseTraits<T, 5, S, kShortStrip>>, at, a);
  switch (compiled_kernel(a.depthwise.kernel_h, a.depthwise.kernel_w)) {
    case 3:
      return launch(depthwise_strips<DepthwiseTraits<T, 3, S>>, at, a);
    case 5:
      return launch(depthwise_strips<DepthwiseTraits<T, 5, S>>, at, a);
    case 7:
      return launch(depthwise_strips<DepthwiseTraits<T, 7, S>>, at, a);
    case 9:
      return launch(depthwise_strips<DepthwiseTraits<T, 9, S>>, at, a);
    default:
      return launch(depthwise_strips<DepthwiseTraits<T, 0, S>>, at, a);
  }
}

// Chooses the instantiation that the plan names; one .cu file per element type instantiates it.
template <class T>
cudaError_t run_depthwise(const DepthwiseArguments& a, const Launch& at) {
  if (a.plan.unrolled) return a.depthwise.stride == 1 ? run_kernel_size<T, 1>(a, at) : run_kernel_size<T, 2>(a, at);
  if (a.plan.vector == 1) return launch(depthwise_any<T, 1>, at, a);
  return launch(depthwise_any<T, kVectorOf<T>>, at, a);
}

extern template cudaError_t run_depthwise<float>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_depthwise<__half>(const DepthwiseArguments&, const Launch&);
extern template cudaError_t run_depthwise<__nv_bfloat16>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
