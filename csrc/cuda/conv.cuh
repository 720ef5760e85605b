// Dense convolution for few input channels, the stem: y = activation(norm(convolution of x)), x by any strides.
//
//        window of x                    A block computes tiles of output pixels, 16 wide and two rows per warp, with
//     +--------------+                  all of their channels. The part of x that a tile needs is in shared memory,
//     |  +---------+ |   c times        one plane per input channel, padding as zeros, beside all of the weights.
//     |  | tile    | |                  The products of an output pixel, tap (c, ky, kx) after tap, form a row of a
//     |  +---------+ |                  matrix that is never written: each lane gathers its elements from the window
//     +--------------+                  (offsets of the taps, base of the pixel) straight into the fragments of
// mma.sync, 32 pixels by 32 channels by 16 taps at a time. Products of 16-bit values are exact in float32, so tensor
// cores lose nothing. Float32 takes multiply-adds, four pixels by eight channels per lane.
// The columns of the second factor are in such an order (conv_weight_row) that a lane has the sums of eight
// neighbouring channels: it stores 16 bytes, and lanes exchange nothing.
//
// Shared memory: scale and shift | offsets of the taps | weights | window.
// kConvMostWarps warps, at most 85 registers: three blocks per multiprocessor, as many as the shared memory of sm_80
// has room for. conv_stem.cuh has the kernel for the stems that networks have; this one takes all others.
#pragma once
#include "conv.h"
#include "numeric.cuh"

namespace effkernels::cuda {

// One tile after the other, along the rows of tiles.
struct ConvTile {
  int x, y, image;

  __device__ __forceinline__ ConvTile(const ConvPlan& plan, unsigned index) {
    const unsigned across = static_cast<unsigned>(plan.tiles_x), down = static_cast<unsigned>(plan.tiles_y);
    x = index % across, y = index / across % down, image = index / across / down;
  }
  __device__ __forceinline__ void advance(const ConvPlan& plan) {
    if (++x < plan.tiles_x) return;
    x = 0;
    if (++y < plan.tiles_y) return;
    y = 0, ++image;
  }
};

// Tiles of the block whose first tile is `first`.
__device__ __forceinline__ int tiles_of_block(const ConvPlan& plan, unsigned first) {
  return static_cast<int>(min(int64_t(plan.tiles_per_block), plan.tiles - first));
}

__device__ __forceinline__ void load_conv_norm(const ConvParams& p, const ConvPlan& plan, float* scale, float* shift) {
  // The last threads have least to do otherwise.
  for (int i = blockDim.x - 1 - threadIdx.x; i < plan.padded_channels; i += blockDim.x) {
    ScaleShift of = {0.f, 0.f};
    if (i < p.out_channels) of = before_activation(scale_shift(p.norm, i), p.dtype, p.activation);
    scale[i] = of.scale, shift[i] = of.shift;
  }
}

// The row of a channel in the weights. Of four matrices of eight columns, lane t of four gets the sums of columns 2t
// and 2t + 1: they are to be channels 8t to 8t + 7.
__device__ __forceinline__ int conv_weight_row(int channel) {
  const int t = channel / 8 % 4, matrix = channel % 8 / 2;
  return channel / kConvChannels * kConvChannels + matrix * 8 + 2 * t + channel % 2;
}

// Norm, activation and stores of a warp's 32 pixels by 32 channels. In acc[i][j][2 half + e] a lane has pixel
// (lane / 4 + 8 half) of row i, channel 8 (lane % 4) + 2j + e. scale and shift: of all channels.
template <class T>
__device__ __forceinline__ void finish_pixels(const ConvParams& p, const ConvPlan& plan, const float* scale,
                                              const float* shift, const ConvTile& tile, int first_channel,
                                              float (&acc)[kConvWarpRows][4][4]) {
  constexpr int kPixels = 2 * kConvWarpRows, kLane = 8, kVector = kVectorOf<T>;
  const int lane = threadIdx.x % 32, channel = first_channel + lane % 4 * kLane;
  float value[kPixels][kLane];
#pragma unroll
  for (int part = 0; part < kLane; part += 4) {
    const Vector<float, 4> by = *reinterpret_cast<const Vector<float, 4>*>(scale + channel + part);
    const Vector<float, 4> plus = *reinterpret_cast<const Vector<float, 4>*>(shift + channel + part);
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        value[pixel][part + e] = fmaf(acc[pixel / 2][(part + e) / 2][pixel % 2 * 2 + e % 2], by.at[e], plus.at[e]);
  }
  activate<T>(reinterpret_cast<float (&)[kPixels * kLane]>(value), p.activation);
  Vector<T, kVector> result[kPixels][kLane / kVector];
#pragma unroll
  for (int pixel = 0; pixel < kPixels; ++pixel)
#pragma unroll
    for (int e = 0; e < kLane; ++e) result[pixel][e / kVector].at[e % kVector] = from_float<T>(value[pixel][e]);

  // Offsets within a tile fit 32 bits: plan_conv takes nothing larger.
  const int width = static_cast<int>(p.out_width), channels = static_cast<int>(p.out_channels);
  const int y = threadIdx.x / 32 * kConvWarpRows, x = lane / 4;
  const int rows = static_cast<int>(p.out_height) - tile.y * plan.warps * kConvWarpRows - y;
  const int columns = width - tile.x * kConvTileWidth - x;
  const int64_t first_row = tile.image * p.out_height + tile.y * plan.warps * kConvWarpRows;
  T* const first = static_cast<T*>(p.y) + (first_row * width + tile.x * kConvTileWidth) * channels +
                   ((y * width + x) * channels + channel);
  const int row_step = width * channels, column_step = 8 * channels;
  if (rows <= 0 || columns <= 0 || channel >= channels) return;
  if (plan.y_vectors) {
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      T* const to = first + (pixel / 2 * row_step + pixel % 2 * column_step);
#pragma unroll
      for (int e = 0; e < kLane; e += kVector)
        if (pixel / 2 < rows && pixel % 2 * 8 < columns && (e == 0 || channel + e < channels))
          *reinterpret_cast<Vector<T, kVector>*>(to + e) = result[pixel][e / kVector];
    }
  } else {
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      T* const to = first + (pixel / 2 * row_step + pixel % 2 * column_step);
#pragma unroll
      for (int e = 0; e < kLane; ++e)
        if (pixel / 2 < rows && pixel % 2 * 8 < columns && channel + e < channels)
          to[e] = result[pixel][e / kVector].at[e % kVector];
    }
  }
}

// The shared memory of a block of conv.
template <class T>
struct ConvShared {
  float *scale, *shift;
  int* offsets;  // of a tap in the window; -1 beyond the last tap
  T* weights;    // 16-bit: [conv_weight_row(channel)][tap], float32: [tap][channel]
  T* window;     // [channel of x][row][column]

  __device__ __forceinline__ explicit ConvShared(const ConvPlan& plan) {
    scale = dynamic_shared<float>();
    shift = scale + plan.padded_channels;
    offsets = reinterpret_cast<int*>(shift + plan.padded_channels);
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(offsets + plan.padded_taps);
    weights = reinterpret_cast<T*>(bytes);
    window = reinterpret_cast<T*>(bytes + plan.weight_bytes);
  }
};

template <class T>
__device__ __forceinline__ void load_conv_parameters(const ConvParams& p, const ConvPlan& plan,
                                                     const ConvShared<T>& shared) {
  constexpr bool kTensor = sizeof(T) == 2;
  const int threads = blockDim.x;
  load_conv_norm(p, plan, shared.scale, shared.shift);
  for (int i = threadIdx.x; i < plan.padded_taps; i += threads) {
    const int kx = i % p.kernel_w, row = i / p.kernel_w, ky = row % p.kernel_h, c = row / p.kernel_h;
    shared.offsets[i] = i < plan.taps ? (c * plan.window_height + ky) * plan.window_width + kx : -1;
  }
  const int inner = plan.weight_stride, outer = plan.weight_bytes / (inner * static_cast<int>(sizeof(T)));
  for (int i = threadIdx.x; i < outer * inner; i += threads) {
    const int at = i / inner, tap = kTensor ? i % inner : at, channel = kTensor ? at : i % inner;
    float value = 0.f;
    if (tap < plan.taps && channel < p.out_channels)
      value = parameter(p.weight, static_cast<int64_t>(channel) * plan.taps + tap, 0.f);
    shared.weights[kTensor ? conv_weight_row(channel) * inner + tap : i] = from_float<T>(value);
  }
}

// A warp fetches a row of a plane at a time, neighbouring columns by neighbouring lanes; kRows rows are under way
// before the first of them is stored.
template <class T>
__device__ __forceinline__ void load_window(const ConvParams& p, const ConvPlan& plan, const T* image, int64_t top,
                                            int64_t left, T* window) {
  constexpr int kRows = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = static_cast<int>(p.in_channels) * plan.window_height;
  for (int first = warp; first < rows; first += kRows * plan.warps) {
    const T* from[kRows];
    bool inside[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * plan.warps, channel = row / plan.window_height;
      const int64_t y = top + row % plan.window_height;
      inside[i] = row < rows && y >= 0 && y < p.height;
      from[i] = image + channel * p.x_stride_c + (inside[i] ? y * p.x_stride_h : 0);
    }
    for (int column = lane; column < plan.window_width; column += 32) {
      const int64_t x = left + column;
      const bool in_row = x >= 0 && x < p.width;
      T value[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        value[i] = from_float<T>(0.f);
        if (inside[i] && in_row) value[i] = from[i][x * p.x_stride_w];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first + i * plan.warps;
        if (row < rows) window[row * plan.window_width + column] = value[i];
      }
    }
  }
}

// Sums of 32 pixels by 32 channels. base: of the lane's pixels (row i, pixel g + 8 half) in the window. weights: at the
// first of the channels.
template <class T>
__device__ __forceinline__ void sum_by_tensor(const ConvPlan& plan, const ConvShared<T>& shared, const T* weights,
                                              const int (&base)[kConvWarpRows][2], float (&acc)[kConvWarpRows][4][4]) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  const T* const weight_row = weights + (lane % 8 + lane / 16 * 8) * plan.weight_stride + lane / 8 % 2 * 8;
#pragma unroll 2
  for (int k = 0; k < plan.taps; k += 16) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) ldmatrix_x4(b[j], shared_address(weight_row + j * 16 * plan.weight_stride + k));
    int at[4];  // taps 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
    for (int e = 0; e < 4; ++e) at[e] = shared.offsets[k + 2 * t + e % 2 + e / 2 * 8];
#pragma unroll
    for (int i = 0; i < kConvWarpRows; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        Vector<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int offset = at[r / 2 * 2 + e];
          pair.at[e] = offset < 0 ? from_float<T>(0.f) : shared.window[base[i][r % 2] + offset];
        }
        a[r] = *reinterpret_cast<const uint32_t*>(&pair);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t two[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<T>(acc[i][j], a, two);
      }
    }
  }
}

// The same as sum_by_tensor by multiply-adds. In runs, whose sums are added: one after the other, up to 147 products
// round off more than twice as much as PyTorch's, which adds 16 sums up. Half of the channels at a time, for the
// registers.
__device__ __forceinline__ void sum_by_multiply_add(const ConvPlan& plan, const ConvShared<float>& shared,
                                                    const float* weights, const int (&base)[kConvWarpRows][2],
                                                    float (&acc)[kConvWarpRows][4][4]) {
  constexpr int kRun = 32, kChannels = 4;
#pragma unroll
  for (int first_channel = 0; first_channel < 8; first_channel += kChannels) {
    const float* row = weights + threadIdx.x % 4 * 8 + first_channel;
#pragma unroll 1
    for (int first = 0; first < plan.taps; first += kRun) {
      float sum[kConvWarpRows][2][kChannels] = {};
      const int end = min(first + kRun, plan.taps);
#pragma unroll 2
      for (int k = first; k < end; ++k, row += plan.weight_stride) {
        const float* const from = shared.window + shared.offsets[k];
        const Vector<float, kChannels> weight = *reinterpret_cast<const Vector<float, kChannels>*>(row);
#pragma unroll
        for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float pixel = from[base[i][half]];
#pragma unroll
            for (int e = 0; e < kChannels; ++e) sum[i][half][e] = fmaf(pixel, weight.at[e], sum[i][half][e]);
          }
      }
#pragma unroll
      for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int e = 0; e < kChannels; ++e) acc[i][(first_channel + e) / 2][2 * half + e % 2] += sum[i][half][e];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kConvMostWarps, kConvBlocks)
    conv(const __grid_constant__ ConvParams p, const __grid_constant__ ConvPlan plan) {
  wait_for_previous();
  allow_next();
  const ConvShared<T> shared(plan);
  load_conv_parameters<T>(p, plan, shared);

  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  int base[kConvWarpRows][2];
#pragma unroll
  for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      base[i][half] = (warp * kConvWarpRows + i) * p.stride * plan.window_width + (g + 8 * half) * p.stride;

  const unsigned first_tile = blockIdx.x * plan.tiles_per_block;
  ConvTile tile(plan, first_tile);
  const int tiles = tiles_of_block(plan, first_tile);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i, tile.advance(plan)) {
    if (i > 0) __syncthreads();
    load_window<T>(p, plan, static_cast<const T*>(p.x) + tile.image * p.x_stride_n,
                   int64_t(tile.y) * plan.warps * kConvWarpRows * p.stride - p.pad_top,
                   int64_t(tile.x) * kConvTileWidth * p.stride - p.pad_left, shared.window);
    __syncthreads();
#pragma unroll 1
    for (int first_channel = 0; first_channel < p.out_channels; first_channel += kConvChannels) {
      float acc[kConvWarpRows][4][4] = {};
      if constexpr (sizeof(T) == 2)
        sum_by_tensor<T>(plan, shared, shared.weights + first_channel * plan.weight_stride, base, acc);
      else
        sum_by_multiply_add(plan, shared, shared.weights + first_channel, base, acc);
      finish_pixels<T>(p, plan, shared.scale, shared.shift, tile, first_channel, acc);
    }
  }
}

}  // namespace effkernels::cuda
