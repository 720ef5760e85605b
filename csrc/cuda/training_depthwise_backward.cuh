// Backward of a depthwise convolution and of the norms and activations on both of its sides, in one pass over (g, z,
// t):
//   dz = alpha * (g * factor + offset) * slope of z_activation at z_norm(z) + beta * (z - z_mean) + delta
//   dt = slope of activation at norm(t) * transposed convolution of dz     (the gradient of norm(t))
//   dweight = sums of dz * activation(norm(t)), and the sums of dt and of dt * h over the batch
//
// Threads and data: the walk of training_tile.cuh, over the input. In padded coordinates row y of the input is in row
// v = y / stride, and is reached by the results of rows v - J to v, J = (KH - 1) / stride; likewise columns. A tile has
// rings of dz and of the activated input, each element formed once on its way in, and the input as it is stored of the
// step's rows. A step (1) computes dt of its rows, a thread strips of neighbouring pixels, taps from shared memory, and
// (2) adds to dweight the products of the results J rows above, a thread a row of taps over strips of 4 results.
//
// Sums. A thread adds the products of a step in registers and puts them to its own in shared memory; the block adds its
// lanes in order, after every few items, the blocks are joined in two levels by those that come last: the same bits
// every time, in one launch, without atomic additions of floats.
//
// Traffic: g, z, t once (columns at the border of a tile and the first rows of a band twice), dt once; of a channel and
// block 4 bytes for each tap and 16 for the sums, written and read.
//
// Limits: float32, float16, bfloat16; kernels of 1x1 to 13x13, stride 1 or 2, no dilation; any channels.
#pragma once
#include "depthwise_sums.cuh"
#include "training_moments.cuh"
#include "training_tile.cuh"

namespace effkernels::cuda {

struct TrainBackwardArguments {
  training::DepthwiseBackwardParams depthwise;
  TrainDepthwisePlan plan;
  TrainingWork work;
};

// Shared memory: rows of parameters, of sums and of dweight, a flag, the rings.
struct BackwardShared {
  // Rows after the taps. factor and offset: of the item's image.
  enum Row { kZMean, kZScale, kZBias, kFactor, kOffset, kAlpha, kBeta, kDelta, kMean, kInverse, kScale, kBias, kRows };
  static constexpr int kSums = 4;  // of dt and what rounding left of it, of dt * h likewise; then those of dweight

  float* rows;
  int norm, block_sums, block_dweight, lane_sums, dweight;  // first rows
  unsigned* flag;
  unsigned char* rings;

  __device__ __forceinline__ BackwardShared(const TrainDepthwisePlan& plan, float* memory) {
    norm = plan.taps, block_sums = norm + kRows, block_dweight = block_sums + kSums;
    lane_sums = block_dweight + 2 * plan.taps;
    dweight = lane_sums + 2 * plan.lanes;
    const int floats = (dweight + plan.sum_lanes * plan.taps) * plan.channel_vectors * plan.vector;
    rows = memory;
    flag = reinterpret_cast<unsigned*>(memory + floats);
    rings = reinterpret_cast<unsigned char*>(memory + (floats / 4 + 1) * 4);
  }
};

// The transposed convolution for `kUnits` neighbouring columns of a row of the tile, each kStride pixels: from row
// `slot` of the ring of dz on, upwards. `from`: the thread's vector in the first column that reaches the strip.
template <class Traits, int kUnits>
__device__ __forceinline__ void convolve_transposed(const TrainDepthwisePlan& plan, const typename Traits::T* from,
                                                    int slot, int result_row, int result_rows, int first_tap_row,
                                                    int kernel_h, int kernel_w,
                                                    const ThreadParameters<Traits::kVector>& taps,
                                                    float (&acc)[kUnits * Traits::kStride][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector;
  const int pixel = plan.channel_vectors * V, row_size = plan.z_columns * pixel;
#pragma unroll 1
  for (int ky = first_tap_row; ky < kernel_h; ky += S) {
    const T* const start = from + slot * row_size;
    const bool exists = static_cast<unsigned>(result_row) < static_cast<unsigned>(result_rows);
    --result_row;
    slot = slot > 0 ? slot - 1 : plan.z_rows - 1;
    if (!exists) continue;
    if constexpr (K > 0) {
      constexpr int kReach = (K - 1) / S, kInputs = kUnits + kReach;
      Vector<T, V> row[kInputs];
#pragma unroll
      for (int c = 0; c < kInputs; ++c) row[c] = load_shared<V>(start + c * pixel);
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {
        Vector<float, kQuad<V>> tap[K];
#pragma unroll
        for (int kx = 0; kx < K; ++kx) tap[kx] = taps(ky * K + kx, part);
#pragma unroll
        for (int c = 0; c < kInputs; ++c) {
          float value[kQuad<V>];
          unpack(row[c], part, value);
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit) {
            const int j = unit + kReach - c;
            if (j < 0 || j > kReach) continue;
#pragma unroll
            for (int r = 0; r < S; ++r) {
              const int kx = r + S * j;
              if (kx >= K) continue;
#pragma unroll
              for (int i = 0; i < kQuad<V>; ++i)
                acc[unit * S + r][part + i] = fmaf(value[i], tap[kx].at[i], acc[unit * S + r][part + i]);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < S; ++r)
#pragma unroll 1
        for (int kx = r, j = 0; kx < kernel_w; kx += S, ++j)
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            const Vector<float, kQuad<V>> tap = taps(ky * kernel_w + kx, part);
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
              float value[kQuad<V>];
              unpack(load_shared<kQuad<V>>(start + (unit + plan.reach_columns - j) * pixel + part), 0, value);
#pragma unroll
              for (int i = 0; i < kQuad<V>; ++i)
                acc[unit * S + r][part + i] = fmaf(value[i], tap.at[i], acc[unit * S + r][part + i]);
            }
          }
    }
  }
}

// Adds the products of a strip of kTrainStrip results (`z`, the thread's vector in the first) with the inputs under
// `count` neighbouring taps (`t`, the input under the first tap).
template <class Traits>
__device__ __forceinline__ void add_products(const typename Traits::T* z, const typename Traits::T* t, int pixel,
                                             int count, float (&acc)[Traits::kTaps][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kTaps = Traits::kTaps;
  constexpr int kInputs = (kTrainStrip - 1) * S + kTaps;
  Vector<T, V> results[kTrainStrip], inputs[kInputs];
#pragma unroll
  for (int o = 0; o < kTrainStrip; ++o) results[o] = load_shared<V>(z + o * pixel);
#pragma unroll
  for (int c = 0; c < kInputs; ++c) {
    if constexpr (K == 0) inputs[c] = {};
    if (K > 0 || c < (kTrainStrip - 1) * S + count) inputs[c] = load_shared<V>(t + c * pixel);
  }
#pragma unroll
  for (int part = 0; part < V; part += kQuad<V>) {
    float result[kTrainStrip][kQuad<V>];
#pragma unroll
    for (int o = 0; o < kTrainStrip; ++o) unpack(results[o], part, result[o]);
#pragma unroll
    for (int c = 0; c < kInputs; ++c) {
      float value[kQuad<V>];
      unpack(inputs[c], part, value);
#pragma unroll
      for (int o = 0; o < kTrainStrip; ++o) {
        const int kx = c - o * S;
        if (kx < 0 || kx >= kTaps) continue;
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i) acc[kx][part + i] = fmaf(result[o][i], value[i], acc[kx][part + i]);
      }
    }
  }
}

// From the sums of this block to those of the batch, by the blocks that come last. All threads.
template <int V>
__device__ __noinline__ void finish_backward(const TrainBackwardArguments& a) {
  const TrainingLane at(a.plan, a.depthwise.shape.channels);
  const BackwardShared shared(a.plan, dynamic_shared<float>());
  const training::DepthwiseBackwardParams& p = a.depthwise;
  const TrainDepthwisePlan& plan = a.plan;
  const int64_t channels = p.shape.channels;
  const int pixel = plan.channel_vectors * V, taps = plan.taps, sums = p.sums != nullptr ? 2 : 0;
  const int rows = taps + 2 * sums;  // of a block in memory
  float* const partial = a.work.partial + at.first_channel;
  for (int task = threadIdx.x; task < rows * pixel; task += blockDim.x) {
    const int row = task / pixel, channel = task % pixel, place = place_in_row<V>(channel, pixel);
    if (at.first_channel + channel >= channels) continue;
    float value = shared.rows[(shared.block_sums + row - taps) * pixel + place];
    if (row < taps) {
      const float* sum = shared.rows + (shared.block_dweight + 2 * row) * pixel + place;
      value = sum[0] + sum[pixel];
    }
    partial[(at.tile * rows + row) * channels + channel] = value;
  }
  constexpr int kWide = kQuad<V>, kAtOnce = 4;  // reads that are under way together
  const int64_t nodes = (plan.tiles + plan.fan - 1) / plan.fan;
  const auto join = [&](int64_t first, int number, int64_t into) {
    for (int task = threadIdx.x; task < (taps + sums) * (pixel / kWide); task += blockDim.x) {
      const int row = task / (pixel / kWide), channel = task % (pixel / kWide) * kWide;
      if (at.first_channel + channel >= channels) continue;
      const bool of_taps = row < taps;
      const int row_of_block = of_taps ? row : 2 * row - taps;  // a sum, and in the next row what rounding left of it
      const float* from = partial + (first * rows + row_of_block) * channels + channel;
      ExactSum total[kWide];
      float rest[kWide] = {};
#pragma unroll 1
      for (int block = 0; block < number; block += kAtOnce) {
        Vector<float, kWide> read[kAtOnce] = {}, rests[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float* one = from + int64_t(block + i) * rows * channels;
          if (block + i < number) read[i] = load_past_first_cache<kWide>(one);
          if (block + i < number && !of_taps) rests[i] = load_past_first_cache<kWide>(one + channels);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int e = 0; e < kWide; ++e) total[e].add(read[i].at[e]), rest[e] += rests[i].at[e];
      }
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        total[e].rest += rest[e];
        if (into >= 0) {
          float* const to = partial + (into * rows + row_of_block) * channels + channel + e;
          to[0] = of_taps ? total[e].result() : total[e].value;
          if (!of_taps) to[channels] = total[e].rest;
        } else if (of_taps) {
          p.dweight[(at.first_channel + channel + e) * taps + row] = total[e].result();
        } else {
          p.sums[(row - taps) * channels + at.first_channel + channel + e] = double_of(total[e]);
        }
      }
    }
  };
  join_blocks(plan.tiles, plan.fan, at.tile, a.work.arrivals + at.group * (nodes + 1), shared.flag, join);
}

template <class Traits>
__global__ void __launch_bounds__(kTrainDepthwiseThreads, kTrainBackwardBlocks)
    training_depthwise_backward(const __grid_constant__ TrainBackwardArguments a) {
  wait_for_previous();
  allow_next();
  using T = typename Traits::T;
  using Row = BackwardShared::Row;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kTaps = Traits::kTaps;
  constexpr int kUnits = kTrainStrip / S, kPixels = kUnits * S;
  const training::DepthwiseBackwardParams& p = a.depthwise;
  const training::DepthwiseShape& s = p.shape;
  const TrainDepthwisePlan& plan = a.plan;
  const int pixel = plan.channel_vectors * V;
  const int kernel_h = K > 0 ? K : s.kernel_h, kernel_w = K > 0 ? K : s.kernel_w;
  const TrainingLane at(plan, s.channels);
  const BackwardShared shared(plan, dynamic_shared<float>());
  const bool has_norm = p.norm.mean != nullptr;

  load_taps<Traits>(s, plan.taps, at.first_channel, pixel, shared.rows);
  const auto fill = [&](Row row, const float* from, float missing) {
    fill_row<V>(shared.rows, shared.norm + row, pixel, from, at.first_channel, s.channels, missing);
  };
  fill(Row::kZMean, p.z_norm.mean, 0.f), fill(Row::kZScale, p.z_norm.scale, 1.f);
  fill(Row::kZBias, p.z_norm.bias, 0.f), fill(Row::kAlpha, p.alpha, 0.f), fill(Row::kBeta, p.beta, 0.f),
      fill(Row::kDelta, p.delta, 0.f);
  fill(Row::kMean, p.norm.mean, 0.f), fill(Row::kInverse, p.norm.inverse_deviation, 0.f);
  fill(Row::kScale, p.norm.scale, 1.f), fill(Row::kBias, p.norm.bias, 0.f);
  for (int i = threadIdx.x; i < (shared.dweight - shared.block_sums + plan.sum_lanes * plan.taps) * pixel;
       i += blockDim.x)
    shared.rows[shared.block_sums * pixel + i] = 0.f;

  const ThreadParameters<V> taps(shared.rows, pixel, at.vector);
  const ThreadRows<V> my(shared.rows, pixel, at.vector);
  const int z_size = plan.z_columns * pixel, t_size = plan.tile_columns * pixel;  // of rows of the rings
  T* const z_ring = reinterpret_cast<T*>(shared.rings) + at.vector * V;           // g, then dz
  T* const z_fetched = z_ring + plan.z_rows * z_size;
  T* const t_ring = z_fetched + plan.step * z_size;  // t, then its activation
  T* const stored = t_ring + plan.tile_rows * t_size;

  const TileImage input(s.height, s.width, s.channels), result(s.out_height, s.out_width, s.channels);
  constexpr int kMostPending = 128;  // products of a thread, about
  int pending = 0;
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const TileItem item(plan, index);
    const int first_row = item.band * plan.rows, end_row = first_row + plan.rows;
    const int first_column = item.column_tile * plan.columns;
    const int start = first_row - (plan.reach_rows + plan.step - 1) / plan.step * plan.step;  // of the walk
    const int left = first_column - plan.reach_columns;                                       // of the tile's results
    const int64_t image_vector = item.image * s.channels;
    const T* const t = static_cast<const T*>(p.t) + item.image * input.height * input.row_stride + at.channel;
    T* const dt = static_cast<T*>(p.dt) + item.image * input.height * input.row_stride + at.channel;
    const int64_t of_result = item.image * result.height * result.row_stride + at.channel;
    const T *const g = static_cast<const T*>(p.g) + of_result, *const z = static_cast<const T*>(p.z) + of_result;

    // The rows that a step from row `row` on adds: act(place in the ring, place beside it, row, column, inside).
    const auto each_result = [&](int row, const auto& act) {
      if (!at.active) return;
      const int slot = (row - start) % plan.z_rows;
#pragma unroll 1
      for (PixelCursor cursor(at.lane, plan.lanes, plan.z_columns); cursor.row < plan.step; cursor.advance()) {
        const int column = cursor.column * pixel, y = row + cursor.row, x = left + cursor.column;
        act(z_ring + wrapped(slot, cursor.row, plan.z_rows) * z_size + column, z_fetched + cursor.row * z_size + column,
            y, x, result.has(y, x) && y >= first_row - plan.reach_rows && y < end_row);
      }
    };
    const auto each_input = [&](int row, const auto& act) {
      if (!at.active) return;
      const int slot = (row - start) * S % plan.tile_rows;
#pragma unroll 1
      for (PixelCursor cursor(at.lane, plan.lanes, plan.tile_columns); cursor.row < plan.step * S; cursor.advance()) {
        const int column = cursor.column * pixel, y = row * S + cursor.row - s.pad_top;
        const int x = left * S + cursor.column - s.pad_left;
        act(t_ring + wrapped(slot, cursor.row, plan.tile_rows) * t_size + column, stored + cursor.row * t_size + column,
            y, x, input.has(y, x));
      }
    };
    const auto fetch = [&](int row) {
      each_result(row, [&](T* to, T* to_z, int y, int x, bool inside) {
        if (!inside) return;
        copy_vector<T, V>(to, g + result.place(y, x));
        copy_vector<T, V>(to_z, z + result.place(y, x));
      });
      each_input(row, [&](T* to, T*, int y, int x, bool inside) {
        if (inside) copy_vector<T, V>(to, t + input.place(y, x));
      });
      cp_async_commit();
    };
    const auto prepare_results = [&](int row) {
      float mean[V], scale[V], bias[V], factor[V], offset[V], alpha[V], beta[V], delta[V];
      my.read(shared.norm + Row::kZMean, mean), my.read(shared.norm + Row::kZScale, scale);
      my.read(shared.norm + Row::kZBias, bias), my.read(shared.norm + Row::kFactor, factor);
      my.read(shared.norm + Row::kOffset, offset), my.read(shared.norm + Row::kAlpha, alpha);
      my.read(shared.norm + Row::kBeta, beta);
      my.read(shared.norm + Row::kDelta, delta);
      each_result(row, [&](T* place, const T* place_z, int, int, bool inside) {
        Vector<T, V> raw = {};
        if (inside) {
          const Vector<T, V> raw_g = load_shared<V>(place), raw_z = load_shared<V>(place_z);
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            float dy[kQuad<V>], centred[kQuad<V>], value[kQuad<V>], slope[kQuad<V>];
            unpack(raw_g, part, dy);
            unpack(raw_z, part, centred);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) {
              centred[i] -= mean[part + i];
              value[i] = fmaf(centred[i], scale[part + i], bias[part + i]);
            }
            activate_with_slope<T>(value, slope, p.z_activation);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) {
              const float of_norm = fmaf(dy[i], factor[part + i], offset[part + i]) * slope[i];
              const float of_mean = fmaf(beta[part + i], centred[i], delta[part + i]);
              raw.at[part + i] = from_float<T>(fmaf(alpha[part + i], of_norm, of_mean));
            }
          }
        }
        *reinterpret_cast<Vector<T, V>*>(place) = raw;
      });
    };
    const auto prepare_inputs = [&](int row) {
      float mean[V], scale[V], bias[V];
      my.read(shared.norm + Row::kMean, mean), my.read(shared.norm + Row::kScale, scale);
      my.read(shared.norm + Row::kBias, bias);
      each_input(row, [&](T* place, T* beside, int, int, bool inside) {
        if (inside && !has_norm) return;
        Vector<T, V> raw = {};
        if (inside) {
          raw = load_shared<V>(place);
          *reinterpret_cast<Vector<T, V>*>(beside) = raw;
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            float value[kQuad<V>];
            unpack(raw, part, value);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i)
              value[i] = fmaf(value[i] - mean[part + i], scale[part + i], bias[part + i]);
            activate_as_trained<T>(value, p.activation);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) raw.at[part + i] = from_float<T>(value[i]);
          }
        }
        *reinterpret_cast<Vector<T, V>*>(place) = raw;
      });
    };
    // dt of the rows of a step.
    const auto convolve = [&](int row) {
      const int slot = (row - start) % plan.z_rows;
#pragma unroll 1
      for (PixelCursor cursor(at.lane, plan.lanes, plan.columns / kUnits); cursor.row < plan.step * S;
           cursor.advance()) {
        const int below = cursor.row / S, first_tap_row = cursor.row % S, column = cursor.column * kUnits;
        const int y = (row + below) * S + first_tap_row - s.pad_top;
        const int x = (first_column + column) * S - s.pad_left;  // of the strip's first pixel
        if (y < 0 || y >= input.height || x + kPixels <= 0 || x >= input.width) continue;
        float acc[kPixels][V] = {};
        convolve_transposed<Traits, kUnits>(plan, z_ring + column * pixel, wrapped(slot, below, plan.z_rows),
                                            row + below, result.height, first_tap_row, kernel_h, kernel_w, taps, acc);
        T* const to = dt + input.place(y, x);
        const T* const from = stored + cursor.row * t_size + (column + plan.reach_columns) * S * pixel;
        const int sums = shared.lane_sums + 2 * at.lane;
        if (has_norm) {
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            const Vector<float, kQuad<V>> mean = my(shared.norm + Row::kMean, part);
            const Vector<float, kQuad<V>> inverse = my(shared.norm + Row::kInverse, part);
            const Vector<float, kQuad<V>> scale = my(shared.norm + Row::kScale, part);
            const Vector<float, kQuad<V>> bias = my(shared.norm + Row::kBias, part);
            Vector<float, kQuad<V>> sum = my(sums, part), sum_h = my(sums + 1, part);
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
              if (static_cast<unsigned>(x + i) >= static_cast<unsigned>(input.width)) continue;
              float h[kQuad<V>], value[kQuad<V>], slope[kQuad<V>];
              unpack(load_shared<kQuad<V>>(from + i * pixel + part), 0, h);
#pragma unroll
              for (int e = 0; e < kQuad<V>; ++e) {
                h[e] -= mean.at[e];
                value[e] = fmaf(h[e], scale.at[e], bias.at[e]);
              }
              activate_with_slope<T>(value, slope, p.activation);
#pragma unroll
              for (int e = 0; e < kQuad<V>; ++e) {
                const float dy = acc[i][part + e] * slope[e];
                acc[i][part + e] = dy;
                sum.at[e] += dy;
                sum_h.at[e] = fmaf(dy * inverse.at[e], h[e], sum_h.at[e]);
              }
            }
            my(sums, part) = sum, my(sums + 1, part) = sum_h;
          }
        }
#pragma unroll
        for (int i = 0; i < kPixels; ++i)
          if (static_cast<unsigned>(x + i) < static_cast<unsigned>(input.width))
            store_raw(to + i * input.pixel_stride, pack<T>(acc[i]));
      }
    };
    // dweight by the results whose inputs are there after the step.
    const int tap_runs = (kernel_w + kTaps - 1) / kTaps, tap_groups = kernel_h * tap_runs;
    const bool shares = plan.lanes >= tap_groups;
    const auto sum_weight = [&](int row) {
      const int begin = max(max(row, first_row) - plan.reach_rows, 0);
      const int end = min(min(row + plan.step, end_row) - plan.reach_rows, result.height);
      const int sum_lane = shares ? at.lane / tap_groups : 0;
      if (sum_lane >= plan.sum_lanes || begin >= end) return;
      const int z_slot = (begin - start) % plan.z_rows, t_slot = (begin - start) * S % plan.tile_rows;
#pragma unroll 1
      for (int tap_group = shares ? at.lane % tap_groups : at.lane; tap_group < tap_groups;
           tap_group += shares ? tap_groups : plan.lanes) {
        const int ky = tap_group / tap_runs, kx = tap_group % tap_runs * kTaps, count = min(kTaps, kernel_w - kx);
        const int first = wrapped(t_slot, ky, plan.tile_rows);
        float acc[kTaps][V] = {};
#pragma unroll 1
        for (PixelCursor cursor(sum_lane, plan.sum_lanes, plan.columns / kTrainStrip); cursor.row < end - begin;
             cursor.advance()) {
          const int y = (begin + cursor.row) * S + ky - s.pad_top, column = cursor.column * kTrainStrip;
          if (y < 0 || y >= input.height) continue;
          add_products<Traits>(
              z_ring + wrapped(z_slot, cursor.row, plan.z_rows) * z_size + column * pixel,
              t_ring + wrapped(first, cursor.row * S, plan.tile_rows) * t_size + (column * S + kx) * pixel, pixel,
              count, acc);
        }
        const int own = shared.dweight + sum_lane * plan.taps + ky * kernel_w + kx;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          if (K == 0 && tap >= count) break;
#pragma unroll
          for (int part = 0; part < V; part += kQuad<V>) {
            Vector<float, kQuad<V>>& to = my(own + tap, part);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) to.at[i] += acc[tap][part + i];
          }
        }
      }
    };

    fill(Row::kFactor, p.factor != nullptr ? p.factor + image_vector : nullptr, 1.f);
    fill(Row::kOffset, p.offset != nullptr ? p.offset + image_vector : nullptr, 0.f);
    __syncthreads();  // parameters and factors are there, the item before has been read
    fetch(start);
    for (int row = start; row < end_row; row += plan.step) {
      cp_async_wait<0>();
      prepare_results(row);
      prepare_inputs(row);
      __syncthreads();
      if (row + plan.step < end_row) fetch(row + plan.step);
      if (at.active) {
        if (row >= first_row) convolve(row);
        sum_weight(row);
      }
      __syncthreads();  // the stored rows of the step have been read
    }
    // What the lanes have summed goes to the block before there is too much of it for a plain sum.
    pending += plan.rows * plan.columns;
    if (pending < kMostPending * plan.sum_lanes && index + 1 < last) continue;
    pending = 0;
    const auto add_lanes = [&](int total_row, int row, int rows, int lanes, int place) {
      float* const total_of = shared.rows + total_row * pixel + place;
      ExactSum total;
      total.value = total_of[0], total.rest = total_of[pixel];
      for (int lane = 0; lane < lanes; ++lane) {
        float& sum = shared.rows[(row + lane * rows) * pixel + place];
        total.add(sum);
        sum = 0.f;
      }
      total_of[0] = total.value, total_of[pixel] = total.rest;
    };
    for (int task = threadIdx.x; task < (plan.taps + (has_norm ? 2 : 0)) * pixel; task += blockDim.x) {
      const int row = task / pixel, place = place_in_row<V>(task % pixel, pixel), which = row - plan.taps;
      if (which < 0)
        add_lanes(shared.block_dweight + 2 * row, shared.dweight + row, plan.taps, plan.sum_lanes, place);
      else
        add_lanes(shared.block_sums + 2 * which, shared.lane_sums + which, 2, plan.lanes, place);
    }
  }
  __syncthreads();
  finish_backward<V>(a);
}

// Chooses the instantiation that the plan names; one .cu file per element type instantiates it.
template <class T>
cudaError_t run_train_backward(const TrainBackwardArguments& a, const Launch& at) {
  constexpr int V = kVectorOf<T>;
  const training::DepthwiseShape& s = a.depthwise.shape;
  const bool twice = s.stride == 2;
  if (a.plan.vector == 1)
    return twice ? launch(training_depthwise_backward<TrainTraits<T, 0, 2, 1>>, at, a)
                 : launch(training_depthwise_backward<TrainTraits<T, 0, 1, 1>>, at, a);
  switch (trained_kernel(s.kernel_h, s.kernel_w, V)) {
    case 3:
      return twice ? launch(training_depthwise_backward<TrainTraits<T, 3, 2, V>>, at, a)
                   : launch(training_depthwise_backward<TrainTraits<T, 3, 1, V>>, at, a);
    case 5:
      return twice ? launch(training_depthwise_backward<TrainTraits<T, 5, 2, V>>, at, a)
                   : launch(training_depthwise_backward<TrainTraits<T, 5, 1, V>>, at, a);
    default:
      return twice ? launch(training_depthwise_backward<TrainTraits<T, 0, 2, V>>, at, a)
                   : launch(training_depthwise_backward<TrainTraits<T, 0, 1, V>>, at, a);
  }
}

extern template cudaError_t run_train_backward<float>(const TrainBackwardArguments&, const Launch&);
extern template cudaError_t run_train_backward<__half>(const TrainBackwardArguments&, const Launch&);
extern template cudaError_t run_train_backward<__nv_bfloat16>(const TrainBackwardArguments&, const Launch&);

}  // namespace effkernels::cuda
