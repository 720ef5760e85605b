// The stem of an EfficientNet: 3x3, stride 2, three input channels; x is channels_last or contiguous, and vectors of 16
// or 8 bytes divide its address, strides and rows. conv.cuh has the tiles and the lanes' pixels.
//
// Reading. A unit is 16 bytes of columns by three channels. A thread reads its unit of the next tile's window into
// registers before it finishes the present tile, and later writes it into the other of two windows in shared memory:
// one barrier a tile. A window is stored as channels_last whatever x is, so that the nine values under a row of the
// kernel are neighbours.
//
// Products, 16 bits. The tensor cores take 32 values of a pixel. First come twelve pairs that are one word of the
// window each, four of every kernel row; then the ninth value of every row; then nothing. A ninth value shares its word
// with a value of another window. That half is masked: it may be infinite, and zero times infinity is not zero. Pairs
// begin at even places, so that the padding decides whether the ninth value is the first or the last of its row. All
// offsets but two are constants.
//
// Products, float32. Multiply-adds, four pixels by eight channels for each lane.
//
// Traffic. Memory: x once, y once, the parameters once a block. L2: x 1.3 times, because a window has 40 columns for 32
// and, with 8 warps, 33 rows for 32.
#pragma once
#include "conv.cuh"

namespace effkernels::cuda {

template <class T>
struct StemTraits {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kUnit = stem_unit(sizeof(T));               // columns
  static constexpr int kUnits = stem_units(sizeof(T));             // of a row of the window
  static constexpr int kPitch = kUnits * kUnit * kStemChannels;    // elements
  static constexpr int kRun = kStemKernel * kStemChannels;         // values under a row of the kernel
  static constexpr int kPairs = kRun / 2;                          // words of them without the ninth
  static constexpr int kTaps = 32;                                 // of the tensor cores
  static constexpr int kRowStep = kStemStride * kPitch;            // from an output's row to the next
  static constexpr int kColumnStep = kStemStride * kStemChannels;  // and column
  // Whether a thread reads its unit of the next tile before it finishes the present one. In float32 it has two units,
  // for whose 24 registers there is no room.
  static constexpr bool kAhead = kTensor;
  static_assert(!kAhead || kUnits * (kConvWarpRows * kStemStride + 1) <= 32,
                "one unit a thread, for any number of warps");
  static_assert(kRun % 2 == 1 && 2 * (kPairs + 1) * kStemKernel <= kTaps && kPairs == 4,
                "eight values of a row are half of an instruction's");
};

// The shared memory of a block.
template <class T>
struct StemShared {
  float *scale, *shift;
  T* weights;  // 16-bit: [conv_weight_row(channel)][place of the tap], float32: [ky][kx][channel of x][channel]
  T* window;   // two of [row][column][channel]

  __device__ __forceinline__ explicit StemShared(const ConvPlan& plan) {
    scale = dynamic_shared<float>();
    shift = scale + plan.padded_channels;
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(shift + plan.padded_channels);
    weights = reinterpret_cast<T*>(bytes);
    window = reinterpret_cast<T*>(bytes + plan.weight_bytes);
  }
};

// The product's place for a tap. ky: row of the kernel; run: the value's place among the nine under that row.
template <class T>
__device__ __forceinline__ int stem_place(int ky, int run, int odd) {
  using Traits = StemTraits<T>;
  if (!Traits::kTensor) return ky * Traits::kRun + run;
  const int in_pairs = run - odd, whole = 2 * Traits::kPairs;
  if (in_pairs >= 0 && in_pairs < whole) return ky * whole + in_pairs;
  return (kStemKernel * Traits::kPairs + ky) * 2 + odd;  // the first value is the upper half of its word
}

// A thread copies the weights of one output channel for one input channel. odd: whether the first value under a kernel
// row is the upper half of a word. No barrier at the end.
template <class T, class W>
__device__ __forceinline__ void copy_stem_weights(const ConvParams& p, const ConvPlan& plan, const W* from, int odd,
                                                  T* weights) {
  using Traits = StemTraits<T>;
  constexpr int kWindow = kStemKernel * kStemKernel;
  for (int at = threadIdx.x; at < plan.weight_bytes / 16; at += blockDim.x)
    reinterpret_cast<uint4*>(weights)[at] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const int planes = static_cast<int>(p.out_channels) * kStemChannels;
  const int channel_step = Traits::kTensor ? plan.weight_stride : 1,
            tap_step = Traits::kTensor ? 1 : plan.weight_stride;
#pragma unroll 1
  for (int at = threadIdx.x; at < planes; at += blockDim.x) {
    const int channel = at / kStemChannels, c = at % kStemChannels;
    W value[kWindow];
#pragma unroll
    for (int tap = 0; tap < kWindow; ++tap) value[tap] = from[at * kWindow + tap];
    T* const to = weights + (Traits::kTensor ? conv_weight_row(channel) : channel) * channel_step;
#pragma unroll
    for (int tap = 0; tap < kWindow; ++tap)
      to[stem_place<T>(tap / kStemKernel, tap % kStemKernel * kStemChannels + c, odd) * tap_step] =
          from_float<T>(to_float(value[tap]));
  }
}

// A unit of a window, on its way through a thread's registers.
template <class T>
class StemUnit {
 public:
  using Traits = StemTraits<T>;

  __device__ __forceinline__ explicit StemUnit(int unit)
      : row_(unit / Traits::kUnits), column_(unit % Traits::kUnits * Traits::kUnit) {}
  __device__ __forceinline__ bool exists(const ConvPlan& plan) const { return row_ < plan.window_height; }

  // Reads the unit of a tile's window; what is outside of the image is zero.
  __device__ __forceinline__ void load(const ConvParams& p, const ConvPlan& plan, const ConvTile& tile) {
    const int row_step = static_cast<int>(p.x_stride_h), column_step = static_cast<int>(p.x_stride_w);
    const int top = tile.y * plan.warps * (kConvWarpRows * kStemStride) - p.pad_top;
    const int left = tile.x * (kConvTileWidth * kStemStride) - plan.lead;
    const T* const first =
        static_cast<const T*>(p.x) + (tile.image * p.x_stride_n + int64_t(top) * row_step + left * column_step);
    const T* const from = first + (row_ * row_step + column_ * column_step);
    const int64_t step = plan.planes ? p.x_stride_c : Traits::kUnit;  // to the next of the unit's vectors
    const unsigned x = static_cast<unsigned>(left + column_), width = static_cast<unsigned>(p.width);
    const bool row_exists = static_cast<unsigned>(top + row_) < static_cast<unsigned>(p.height);
#pragma unroll
    for (int k = 0; k < kStemChannels; ++k) raw_[k] = make_uint4(0, 0, 0, 0);
    if (plan.x_vector_bytes == 16) {
      if (row_exists && x < width)
#pragma unroll
        for (int k = 0; k < kStemChannels; ++k) raw_[k] = *reinterpret_cast<const uint4*>(from + k * step);
    } else {
      constexpr int kHalf = Traits::kUnit / 2;
      const bool low = row_exists && x < width, high = row_exists && x + kHalf < width;  // columns
#pragma unroll
      for (int k = 0; k < 2 * kStemChannels; ++k) {
        const bool is_high = plan.planes ? k % 2 == 1 : k >= kStemChannels;
        if (is_high ? high : low)
          reinterpret_cast<uint2*>(raw_)[k] = *reinterpret_cast<const uint2*>(from + k / 2 * step + k % 2 * kHalf);
      }
    }
  }

  // Writes it into a window, as channels_last.
  __device__ __forceinline__ void put(const ConvPlan& plan, T* window) {
    if (plan.planes) {
      Vector<T, Traits::kUnit> pixels[kStemChannels];
#pragma unroll
      for (int at = 0; at < kStemChannels * Traits::kUnit; ++at)
        pixels[at / Traits::kUnit].at[at % Traits::kUnit] =
            reinterpret_cast<const Vector<T, Traits::kUnit>&>(raw_[at % kStemChannels]).at[at / kStemChannels];
#pragma unroll
      for (int k = 0; k < kStemChannels; ++k) raw_[k] = reinterpret_cast<const uint4&>(pixels[k]);
    }
    uint4* const to = reinterpret_cast<uint4*>(window + row_ * Traits::kPitch + column_ * kStemChannels);
#pragma unroll
    for (int k = 0; k < kStemChannels; ++k) to[k] = raw_[k];
  }

 private:
  int row_, column_;  // in the window
  uint4 raw_[kStemChannels];
};

// Sums of 32 pixels by 32 channels. pairs: the lane's pair of the first kernel row, under its first pixel. ninth: the
// word with the ninth value of the lane's kernel row, under its first pixel; mask: that value's half.
template <class T>
__device__ __forceinline__ void sum_stem(const ConvPlan& plan, const T* weights, const uint32_t* pairs,
                                         const uint32_t* ninth, uint32_t mask, float (&acc)[kConvWarpRows][4][4]) {
  using Traits = StemTraits<T>;
  const int lane = threadIdx.x % 32;
  const T* const weight_row = weights + (lane % 8 + lane / 16 * 8) * plan.weight_stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < Traits::kTaps; k += 16) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) ldmatrix_x4(b[j], shared_address(weight_row + j * 16 * plan.weight_stride + k));
#pragma unroll
    for (int i = 0; i < kConvWarpRows; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = k / 8 + r / 2, pixel = (i * Traits::kRowStep + r % 2 * 8 * Traits::kColumnStep) / 2;
        a[r] = row < kStemKernel ? pairs[pixel + row * Traits::kPitch / 2] : ninth[pixel] & mask;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t two[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<T>(acc[i][j], a, two);
      }
    }
  }
}

// One tap of the lane's four pixels by its eight channels. weights: those of the tap, from the lane's first channel on.
__device__ __forceinline__ void multiply_add_tap(const float* weights, const float (&pixel)[2 * kConvWarpRows],
                                                 float (&acc)[kConvWarpRows][4][4]) {
  const float4 low = *reinterpret_cast<const float4*>(weights), high = *reinterpret_cast<const float4*>(weights + 4);
  const float b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < kConvWarpRows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& sum = acc[i][e / 2][2 * half + e % 2];
        sum = fmaf(pixel[2 * i + half], b[e], sum);
      }
}

// The same by multiply-adds; weights and pixel: of the lane's first channel, of its first pixel.
__device__ __forceinline__ void sum_stem(const ConvPlan& plan, const float* weights, const float* pixel,
                                         float (&acc)[kConvWarpRows][4][4]) {
  using Traits = StemTraits<float>;
#pragma unroll 1
  for (int ky = 0; ky < kStemKernel; ++ky, pixel += Traits::kPitch)
#pragma unroll 3
    for (int at = 0; at < Traits::kRun; ++at, weights += plan.weight_stride) {
      float value[2 * kConvWarpRows];
#pragma unroll
      for (int i = 0; i < 2 * kConvWarpRows; ++i)
        value[i] = pixel[i / 2 * Traits::kRowStep + i % 2 * 8 * Traits::kColumnStep + at];
      multiply_add_tap(weights, value, acc);
    }
}

template <class T>
__global__ void __launch_bounds__(32 * kConvMostWarps, kConvBlocks)
    conv_stem(const __grid_constant__ ConvParams p, const __grid_constant__ ConvPlan plan) {
  wait_for_previous();
  allow_next();
  using Traits = StemTraits<T>;
  const StemShared<T> shared(plan);
  // Place of the first value under a tile's first pixel, in a row of the window.
  const int first_value = (plan.lead - p.pad_left) * kStemChannels, odd = first_value % 2;
  load_conv_norm(p, plan, shared.scale, shared.shift);
  if (p.weight.dtype == DType::kFloat32)
    copy_stem_weights<T>(p, plan, static_cast<const float*>(p.weight.data), odd, shared.weights);
  else
    copy_stem_weights<T>(p, plan, static_cast<const T*>(p.weight.data), odd, shared.weights);

  const int lane = threadIdx.x % 32, t = lane % 4;
  const int pixel = threadIdx.x / 32 * kConvWarpRows * Traits::kRowStep + lane / 4 * Traits::kColumnStep + first_value;

  // Words of a window, as sum_stem takes them. The fourth lane has no kernel row.
  const bool has_row = t < kStemKernel;
  const int pairs = (pixel + odd) / 2 + t;
  const int ninth = (odd ? pixel - 1 : pixel + 2 * Traits::kPairs) / 2 + (has_row ? t * (Traits::kPitch / 2) : 0);
  const uint32_t mask = !has_row ? 0u : (odd ? 0xffff0000u : 0xffffu);

  const unsigned first_tile = blockIdx.x * plan.tiles_per_block;
  ConvTile tile(plan, first_tile);
  StemUnit<T> unit(threadIdx.x);
  if (Traits::kAhead && unit.exists(plan)) unit.load(p, plan, tile);
  int window = 0, first_channel = 0, tiles = tiles_of_block(plan, first_tile);
  // One loop over tiles and groups of channels. Out of an inner loop over the groups, the compiler takes the reads of
  // the window, and there are no registers to hold them through the activation.
#pragma unroll 1
  for (;;) {
    T* const present = shared.window + window;
    if (first_channel == 0) {
      if constexpr (Traits::kAhead) {
        if (unit.exists(plan)) unit.put(plan, present);
      } else {
#pragma unroll 1
        for (int at = threadIdx.x; at < plan.window_height * Traits::kUnits; at += blockDim.x) {
          StemUnit<T> each(at);
          each.load(p, plan, tile);
          each.put(plan, present);
        }
      }
      // A thread that has passed this barrier has finished with the other window, so that one barrier is enough.
      __syncthreads();
    }
    float acc[kConvWarpRows][4][4] = {};
    if constexpr (Traits::kTensor) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(present);
      sum_stem<T>(plan, shared.weights + first_channel * plan.weight_stride, words + pairs, words + ninth, mask, acc);
    } else {
      sum_stem(plan, shared.weights + first_channel + t * 8, present + pixel, acc);
    }
    // The next tile's window, now that the factors of the product have left the registers.
    if (Traits::kAhead && first_channel == 0 && tiles > 1) {
      ConvTile next = tile;
      next.advance(plan);
      if (unit.exists(plan)) unit.load(p, plan, next);
    }
    finish_pixels<T>(p, plan, shared.scale, shared.shift, tile, first_channel, acc);
    first_channel += kConvChannels;
    if (first_channel < p.out_channels) continue;
    if (--tiles == 0) break;
    tile.advance(plan);
    first_channel = 0;
    window = plan.window_bytes / static_cast<int>(sizeof(T)) - window;
  }
}

}  // namespace effkernels::cuda
