// Dense convolution for few input channels, the stem: y = activation(norm(convolution of x)), x by any strides.
//
//        window of x                    A block computes a tile of output pixels, 16 wide and two rows per warp, with
//     +--------------+                  all of their channels. The part of x that the tile needs lies in shared memory,
//     |  +---------+ |   c times        one plane per input channel, padding as zeros, beside all of the weights.
//     |  | tile    | |                  The products of an output pixel, tap (c, ky, kx) after tap, form a row of a
//     |  +---------+ |                  matrix that is never written: each lane gathers its elements from the window
//     +--------------+                  (offsets of the taps, base of the pixel) straight into the fragments of
// mma.sync, 32 pixels by 32 channels by 16 taps at a time. Products of 16-bit values are exact in float32, so tensor
// cores lose nothing. Float32 takes multiply-adds, four pixels by eight channels per lane.
// Sums change hands inside the warp, through shared memory, so that each lane stores 16 bytes.
//
// Shared memory: scale and shift | offsets of the taps | weights | window | sums, 5 KB per warp.
// kConvMostWarps warps, at most 85 registers: three blocks per multiprocessor, as many as the shared memory of sm_80
// has room for.
#pragma once
#include "conv.h"
#include "numeric.cuh"

namespace effkernels::cuda {

// What lies in the shared memory of a block.
template <class T>
struct ConvShared {
  float *scale, *shift;
  int* offsets;  // of a tap in the window; -1 beyond the last tap
  T* weights;    // 16-bit: [channel][tap], float32: [tap][channel]
  T* window;     // [channel of x][row][column]
  float* sums;   // of this warp: [pixel][channel]

  __device__ __forceinline__ explicit ConvShared(const ConvPlan& plan) {
    scale = dynamic_shared<float>();
    shift = scale + plan.padded_channels;
    offsets = reinterpret_cast<int*>(shift + plan.padded_channels);
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(offsets + plan.padded_taps);
    weights = reinterpret_cast<T*>(bytes);
    window = reinterpret_cast<T*>(bytes + plan.weight_bytes);
    sums = reinterpret_cast<float*>(bytes + plan.weight_bytes + plan.window_bytes) +
           threadIdx.x / 32 * (kConvWarpRows * kConvTileWidth * kConvSumStride);
  }
};

template <class T>
__device__ __forceinline__ void load_conv_parameters(const ConvParams& p, const ConvPlan& plan,
                                                     const ConvShared<T>& shared) {
  constexpr bool kTensor = sizeof(T) == 2;
  const int threads = blockDim.x;
  for (int i = threadIdx.x; i < plan.padded_channels; i += threads) {
    ScaleShift of = {0.f, 0.f};
    if (i < p.out_channels) of = scale_shift(p.norm, i);
    shared.scale[i] = of.scale, shared.shift[i] = of.shift;
  }
  for (int i = threadIdx.x; i < plan.padded_taps; i += threads) {
    const int kx = i % p.kernel_w, row = i / p.kernel_w, ky = row % p.kernel_h, c = row / p.kernel_h;
    shared.offsets[i] = i < plan.taps ? (c * plan.window_height + ky) * plan.window_width + kx : -1;
  }
  const int inner = plan.weight_stride, outer = plan.weight_bytes / (inner * static_cast<int>(sizeof(T)));
  for (int i = threadIdx.x; i < outer * inner; i += threads) {
    const int tap = kTensor ? i % inner : i / inner, channel = kTensor ? i / inner : i % inner;
    float value = 0.f;
    if (tap < plan.taps && channel < p.out_channels)
      value = parameter(p.weight, static_cast<int64_t>(channel) * plan.taps + tap, 0.f);
    shared.weights[i] = from_float<T>(value);
  }
}

// A warp fetches a row of a plane at a time, neighbouring columns by neighbouring lanes.
template <class T>
__device__ __forceinline__ void load_window(const ConvParams& p, const ConvPlan& plan, const T* image, int64_t top,
                                            int64_t left, T* window) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = static_cast<int>(p.in_channels) * plan.window_height;
#pragma unroll 4
  for (int row = warp; row < rows; row += plan.warps) {
    const int channel = row / plan.window_height;
    const int64_t y = top + row % plan.window_height;
    const bool inside = y >= 0 && y < p.height;
    const T* const from = image + channel * p.x_stride_c + (inside ? y * p.x_stride_h : 0);
    for (int column = lane; column < plan.window_width; column += 32) {
      const int64_t x = left + column;
      T value = from_float<T>(0.f);
      if (inside && x >= 0 && x < p.width) value = load_global(from + x * p.x_stride_w);
      window[row * plan.window_width + column] = value;
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

// The same by multiply-adds; here the lane's channels are 8t to 8t + 7: acc[i][j][2 half + e] is channel 8t + 2j + e.
__device__ __forceinline__ void sum_by_multiply_add(const ConvPlan& plan, const ConvShared<float>& shared,
                                                    const float* weights, const int (&base)[kConvWarpRows][2],
                                                    float (&acc)[kConvWarpRows][4][4]) {
  const float* row = weights + threadIdx.x % 4 * 8;
#pragma unroll 2
  for (int k = 0; k < plan.taps; ++k, row += plan.weight_stride) {
    const int offset = shared.offsets[k];
    const float4 low = *reinterpret_cast<const float4*>(row), high = *reinterpret_cast<const float4*>(row + 4);
    const float b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = shared.window[base[i][half] + offset];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) acc[i][j][2 * half + e] = fmaf(a, b[2 * j + e], acc[i][j][2 * half + e]);
      }
  }
}

// One warp's 32 pixels by 32 channels from `sums` to y.
template <class T, int kCount>
__device__ __forceinline__ void write_pixels(const ConvParams& p, const float* sums, int64_t image, int64_t first_y,
                                             int64_t first_x, int first_channel) {
  constexpr int kUnits = kConvChannels / kCount;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < kConvWarpRows * kConvTileWidth * kUnits; i += 32) {
    const int pixel = i / kUnits, channel = i % kUnits * kCount;
    const int64_t y = first_y + pixel / kConvTileWidth, x = first_x + pixel % kConvTileWidth;
    if (y >= p.out_height || x >= p.out_width || first_channel + channel >= p.out_channels) continue;
    float value[kCount];
#pragma unroll
    for (int e = 0; e < kCount; e += kCount < 4 ? 1 : 4) {
      const float* const from = sums + pixel * kConvSumStride + channel + e;
      if constexpr (kCount < 4) {
        value[e] = *from;
      } else {
        const float4 four = *reinterpret_cast<const float4*>(from);
        value[e] = four.x, value[e + 1] = four.y, value[e + 2] = four.z, value[e + 3] = four.w;
      }
    }
    activate<T>(value, p.activation);
    store(static_cast<T*>(p.y) + ((image * p.out_height + y) * p.out_width + x) * p.out_channels + first_channel +
              channel,
          value);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kConvMostWarps, 3) conv(const ConvParams p, const ConvPlan plan) {
  wait_for_previous();
  allow_next();
  const ConvShared<T> shared(plan);
  const int64_t tile_x = blockIdx.x % plan.tiles_x, row_of_tiles = blockIdx.x / plan.tiles_x;
  const int64_t tile_y = row_of_tiles % plan.tiles_y, image = row_of_tiles / plan.tiles_y;
  const int64_t first_x = tile_x * kConvTileWidth, tile_top = tile_y * (plan.warps * kConvWarpRows);

  load_window<T>(p, plan, static_cast<const T*>(p.x) + image * p.x_stride_n, tile_top * p.stride - p.pad_top,
                 first_x * p.stride - p.pad_left, shared.window);
  load_conv_parameters<T>(p, plan, shared);
  __syncthreads();

  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int base[kConvWarpRows][2];
#pragma unroll
  for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      base[i][half] = (warp * kConvWarpRows + i) * p.stride * plan.window_width + (g + 8 * half) * p.stride;

#pragma unroll 1
  for (int first_channel = 0; first_channel < p.out_channels; first_channel += kConvChannels) {
    float acc[kConvWarpRows][4][4] = {};
    if constexpr (sizeof(T) == 2) {
      sum_by_tensor<T>(plan, shared, shared.weights + first_channel * plan.weight_stride, base, acc);
    } else {
      sum_by_multiply_add(plan, shared, shared.weights + first_channel, base, acc);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int channel = sizeof(T) == 2 ? j * 8 + 2 * t : t * 8 + 2 * j;
      const float2 scale = *reinterpret_cast<const float2*>(shared.scale + first_channel + channel);
      const float2 shift = *reinterpret_cast<const float2*>(shared.shift + first_channel + channel);
#pragma unroll
      for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = shared.sums + (i * kConvTileWidth + g + 8 * half) * kConvSumStride + channel;
          *reinterpret_cast<float2*>(to) =
              make_float2(fmaf(acc[i][j][2 * half], scale.x, shift.x), fmaf(acc[i][j][2 * half + 1], scale.y, shift.y));
        }
    }
    __syncwarp();
    const int64_t first_y = tile_top + warp * kConvWarpRows;
    if (plan.y_vectors) {
      write_pixels<T, kVectorOf<T>>(p, shared.sums, image, first_y, first_x, first_channel);
    } else {
      write_pixels<T, 1>(p, shared.sums, image, first_y, first_x, first_channel);
    }
    __syncwarp();
  }
}

}  // namespace effkernels::cuda
