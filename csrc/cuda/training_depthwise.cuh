// z = depthwise convolution of activation(norm(t)), and mean, variance and norm of z, in one launch.
//
// Threads and data: the walk of training_tile.cuh; norm and activation are applied once per input element, on its way
// into the ring. A thread computes strips of neighbouring pixels of one output row: it keeps the taps of one kernel row
// in registers and slides over the row of inputs once. Of a kernel whose size is known at run time only, it keeps 4
// taps of a row at a time.
//
// Statistics: of z as it is stored. A thread takes mean and squared distances of a strip from its registers and joins
// them to those of its strips before (training_moments.cuh); the block joins its lanes in order, the blocks are joined
// in two levels by those that come last: the same bits every time.
//
// Traffic: t once (columns at the border of a tile and the first rows of a band twice), z once; 16 bytes a channel and
// block written and read.
//
// Limits: float32, float16, bfloat16; kernels of 1x1 to 13x13, stride 1 or 2, no dilation; any channels.
#pragma once
#include "training_moments.cuh"
#include "training_tile.cuh"

namespace effkernels::cuda {

struct TrainForwardArguments {
  training::DepthwiseTrainParams depthwise;
  TrainDepthwisePlan plan;
  TrainingWork work;
};

// Shared memory: rows of parameters, four rows for the moments of each lane, a flag, the ring.
struct ForwardShared {
  static constexpr int kRows = 4;  // mean, scale, bias, bias of the convolution

  float *rows, *lanes;
  int norm;  // its first row
  unsigned* flag;
  void* ring;

  __device__ __forceinline__ ForwardShared(const TrainDepthwisePlan& plan, float* memory) {
    const int pixel = plan.channel_vectors * plan.vector, of_lanes = ((plan.taps + kRows) * pixel + 3) / 4 * 4;
    const int floats = of_lanes + 4 * plan.lanes * pixel;
    rows = memory, lanes = memory + of_lanes;
    norm = plan.taps;
    flag = reinterpret_cast<unsigned*>(memory + floats);
    ring = memory + (floats / 4 + 1) * 4;
  }
};

// Sums of a strip, before the bias: `from` is the thread's vector in the first column of the strip's inputs, in row
// `slot` of the ring.
template <class Traits, int kStrip>
__device__ __forceinline__ void convolve_tile(const training::DepthwiseShape& s, const TrainDepthwisePlan& plan,
                                              const typename Traits::T* from, int slot,
                                              const ThreadParameters<Traits::kVector>& taps,
                                              float (&acc)[kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kTaps = Traits::kTaps;
  constexpr int kInputs = (kStrip - 1) * S + kTaps;
  const int pixel = plan.channel_vectors * V, row_size = plan.tile_columns * pixel;
  const int kernel_h = K > 0 ? K : s.kernel_h, kernel_w = K > 0 ? K : s.kernel_w;
#pragma unroll 1
  for (int ky = 0; ky < kernel_h; ++ky, slot = wrapped(slot, 1, plan.tile_rows)) {
#pragma unroll 1
    for (int first = 0; first < kernel_w; first += kTaps) {
      const T* const start = from + slot * row_size + first * pixel;
      const int count = K > 0 ? kTaps : min(kTaps, kernel_w - first), inputs = (kStrip - 1) * S + count;
      Vector<T, V> row[kInputs];
#pragma unroll
      for (int ix = 0; ix < kInputs; ++ix) {
        if constexpr (K == 0) row[ix] = {};
        if (K > 0 || ix < inputs) row[ix] = load_shared<V>(start + ix * pixel);
      }
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {
        Vector<float, kQuad<V>> tap[kTaps] = {};
#pragma unroll
        for (int kx = 0; kx < kTaps; ++kx)
          if (K > 0 || kx < count) tap[kx] = taps(ky * kernel_w + first + kx, part);
#pragma unroll
        for (int ix = 0; ix < kInputs; ++ix) {
          float value[kQuad<V>];
          unpack(row[ix], part, value);
#pragma unroll
          for (int ox = 0; ox < kStrip; ++ox) {
            const int kx = ix - ox * S;
            if (kx < 0 || kx >= kTaps) continue;
            if (K > 0 || kx < count)
#pragma unroll
              for (int i = 0; i < kQuad<V>; ++i) acc[ox][part + i] = fmaf(value[i], tap[kx].at[i], acc[ox][part + i]);
          }
        }
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(kTrainDepthwiseThreads, kTrainForwardBlocks)
    training_depthwise(const __grid_constant__ TrainForwardArguments a) {
  wait_for_previous();
  allow_next();
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector, kStrip = Traits::kStrip;
  const training::DepthwiseTrainParams& p = a.depthwise;
  const training::DepthwiseShape& s = p.shape;
  const TrainDepthwisePlan& plan = a.plan;
  const int pixel = plan.channel_vectors * V, row_size = plan.tile_columns * pixel;
  const int kernel_h = K > 0 ? K : s.kernel_h;
  const TrainingLane at(plan, s.channels);
  const ForwardShared shared(plan, dynamic_shared<float>());
  const bool has_norm = p.norm.mean != nullptr;

  load_taps<Traits>(s, plan.taps, at.first_channel, pixel, shared.rows);
  const float* const vectors[] = {p.norm.mean, p.norm.scale, p.norm.bias, static_cast<const float*>(p.conv_bias.data)};
#pragma unroll
  for (int row = 0; row < ForwardShared::kRows; ++row)
    fill_row<V>(shared.rows, shared.norm + row, pixel, vectors[row], at.first_channel, s.channels, 0.f);
  const ThreadParameters<V> taps(shared.rows, pixel, at.vector);
  const ThreadRows<V> my(shared.rows, pixel, at.vector), moments_of(shared.lanes, pixel, at.vector);
  T* const ring = static_cast<T*>(shared.ring) + at.vector * V;
  const int lane_rows = 4 * at.lane;
  int count = 0;

  const TileImage input(s.height, s.width, s.channels), output(s.out_height, s.out_width, s.channels);
  const int64_t last = min(plan.items, (at.tile + 1) * plan.items_per_block);
  for (int64_t index = at.tile * plan.items_per_block; index < last; ++index) {
    const TileItem item(plan, index);
    const int first_row = item.band * plan.rows, end_row = min(first_row + plan.rows, output.height);
    const int first_column = item.column_tile * plan.columns;
    const int columns = min(plan.columns, output.width - first_column);
    const int top = first_row * S - s.pad_top, left = first_column * S - s.pad_left;
    const int needed = (end_row - first_row - 1) * S + kernel_h;  // rows of inputs
    const T* const from = static_cast<const T*>(p.t) + item.image * input.height * input.row_stride + at.channel;
    T* const to = static_cast<T*>(p.z) + item.image * output.height * output.row_stride + at.channel;

    const auto each_pixel = [&](int begin, int end, const auto& act) {
      if (!at.active) return;
      end = min(end, needed);
      PixelCursor cursor(at.lane, plan.lanes, plan.tile_columns);
      const int slot = begin % plan.tile_rows;
#pragma unroll 1
      for (; cursor.row < end - begin; cursor.advance()) {
        const int row = top + begin + cursor.row, column = left + cursor.column;
        act(ring + wrapped(slot, cursor.row, plan.tile_rows) * row_size + cursor.column * pixel, row, column,
            input.has(row, column));
      }
    };
    const auto fetch = [&](int begin, int end) {
      each_pixel(begin, end, [&](T* place, int row, int column, bool inside) {
        if (inside) copy_vector<T, V>(place, from + input.place(row, column));
      });
      cp_async_commit();
    };
    const auto prepare = [&](int begin, int end) {
      cp_async_wait<0>();
      float mean[V], scale[V], bias[V];
      my.read(shared.norm, mean), my.read(shared.norm + 1, scale), my.read(shared.norm + 2, bias);
      each_pixel(begin, end, [&](T* place, int, int, bool inside) {
        if (inside && !has_norm) return;
        Vector<T, V> raw = {};
        if (inside) {
          float value[V];
          unpack(load_shared<V>(place), 0, value);
#pragma unroll
          for (int i = 0; i < V; ++i) value[i] = fmaf(value[i] - mean[i], scale[i], bias[i]);
          activate_as_trained<T>(value, p.activation);
          raw = pack<T>(value);
        }
        *reinterpret_cast<Vector<T, V>*>(place) = raw;
      });
    };

    __syncthreads();  // the parameters are there, the item before has been read
    const int step_rows = plan.step * S;
    int end = step_rows - S + kernel_h;  // rows in the ring after the step
    fetch(0, end);
    for (int row = first_row; row < end_row; row += plan.step, end += step_rows) {
      prepare(row == first_row ? 0 : end - step_rows, end);
      __syncthreads();
      if (row + plan.step < end_row) fetch(end, end + step_rows);
      if (!at.active) continue;
      const int base = (row - first_row) * S % plan.tile_rows;
#pragma unroll 1
      for (int unit = at.lane; unit < plan.step * plan.strips; unit += plan.lanes) {
        const int below = unit / plan.strips, column = unit % plan.strips * kStrip;
        const int pixels = min(kStrip, columns - column);
        if (row + below >= end_row || pixels <= 0) continue;
        float acc[kStrip][V] = {};
        convolve_tile<Traits>(s, plan, ring + column * S * pixel, wrapped(base, below * S, plan.tile_rows), taps, acc);

        T* const first = to + output.place(row + below, first_column + column);
        const float before = static_cast<float>(count), inverse = 1.f / static_cast<float>(pixels);
        const float share = static_cast<float>(pixels) / (before + static_cast<float>(pixels));
        float bias[V];
        my.read(shared.norm + 3, bias);
#pragma unroll
        for (int ox = 0; ox < kStrip; ++ox) {
#pragma unroll
          for (int i = 0; i < V; ++i) acc[ox][i] += bias[i];
          const Vector<T, V> raw = pack<T>(acc[ox]);
          if (ox < pixels) store_raw(first + ox * output.pixel_stride, raw);
          unpack(raw, 0, acc[ox]);
        }
#pragma unroll
        for (int part = 0; part < V; part += kQuad<V>) {
          Vector<float, kQuad<V>>&mean = moments_of(lane_rows, part), &rest = moments_of(lane_rows + 1, part);
          Vector<float, kQuad<V>>& squares = moments_of(lane_rows + 2, part);
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) {
            const float first_value = acc[0][part + i];
            float step = 0.f, within = 0.f;
#pragma unroll
            for (int ox = 1; ox < kStrip; ++ox) step += ox < pixels ? acc[ox][part + i] - first_value : 0.f;
            step *= inverse;
#pragma unroll
            for (int ox = 0; ox < kStrip; ++ox) {
              const float distance = ox < pixels ? acc[ox][part + i] - first_value - step : 0.f;
              within = fmaf(distance, distance, within);
            }
            RunningMoments moments = {};
            if (count > 0) moments = {mean.at[i], rest.at[i], squares.at[i]};
            add_tile(moments, first_value, step, within, share, before);
            mean.at[i] = moments.mean, rest.at[i] = moments.rest, squares.at[i] = moments.squares;
          }
        }
        count += pixels;
      }
    }
  }

  if (at.lane < plan.lanes)
#pragma unroll
    for (int part = 0; part < V; part += kQuad<V>)
#pragma unroll
      for (int i = 0; i < kQuad<V>; ++i) moments_of(lane_rows + 3, part).at[i] = static_cast<float>(count);
  __syncthreads();
  Moments total;
  const bool exists = threadIdx.x < pixel && at.first_channel + threadIdx.x < s.channels;
  if (exists) {
    const float* own = shared.lanes + place_in_row<V>(threadIdx.x, pixel);
    for (int lane = 0; lane < plan.lanes; ++lane, own += 4 * pixel)
      if (own[3 * pixel] > 0.f) total.join({own[0], own[pixel], own[2 * pixel], own[3 * pixel]});
  }
  Moments* const partial = reinterpret_cast<Moments*>(a.work.partial);
  if (exists) partial[at.tile * s.channels + at.first_channel + threadIdx.x] = total;
  const int64_t nodes = (plan.tiles + plan.fan - 1) / plan.fan;
  join_blocks(plan.tiles, plan.fan, at.tile, a.work.arrivals + at.group * (nodes + 1), shared.flag,
              [&](int64_t first, int number, int64_t into) {
                join_moments(partial, first, number, into, s.channels, at.first_channel, pixel, p.fold,
                             reinterpret_cast<Moments*>(shared.lanes));
              });
}

// Chooses the instantiation that the plan names; one .cu file per element type instantiates it.
template <class T>
cudaError_t run_train_depthwise(const TrainForwardArguments& a, const Launch& at) {
  constexpr int V = kVectorOf<T>;
  const training::DepthwiseShape& s = a.depthwise.shape;
  const bool twice = s.stride == 2;
  if (a.plan.vector == 1)
    return twice ? launch(training_depthwise<TrainTraits<T, 0, 2, 1>>, at, a)
                 : launch(training_depthwise<TrainTraits<T, 0, 1, 1>>, at, a);
  switch (trained_kernel(s.kernel_h, s.kernel_w, V)) {
    case 3:
      return twice ? launch(training_depthwise<TrainTraits<T, 3, 2, V>>, at, a)
                   : launch(training_depthwise<TrainTraits<T, 3, 1, V>>, at, a);
    case 5:
      return twice ? launch(training_depthwise<TrainTraits<T, 5, 2, V>>, at, a)
                   : launch(training_depthwise<TrainTraits<T, 5, 1, V>>, at, a);
    default:
      return twice ? launch(training_depthwise<TrainTraits<T, 0, 2, V>>, at, a)
                   : launch(training_depthwise<TrainTraits<T, 0, 1, V>>, at, a);
  }
}

extern template cudaError_t run_train_depthwise<float>(const TrainForwardArguments&, const Launch&);
extern template cudaError_t run_train_depthwise<__half>(const TrainForwardArguments&, const Launch&);
extern template cudaError_t run_train_depthwise<__nv_bfloat16>(const TrainForwardArguments&, const Launch&);

}  // namespace effkernels::cuda
