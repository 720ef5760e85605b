// The walk of the depthwise kernels of training: down the rows of a tile, which are in shared memory in a ring.
//
// A tile is `columns` columns of a band of rows of one image, of the block's channels. It is walked in steps of `step`
// rows. The rows that a step adds are copied as they are stored, asynchronously, while the step before computes; then
// each thread turns the pixels that it copied into what the convolution reads, in place: once per element, apart from
// the columns that neighbouring tiles share and the first rows of a band. A thread has the same vector of channels in
// all of its pixels. Elements outside of the image are zero.
#pragma once
#include "training_pass.cuh"

namespace effkernels::cuda {

template <class Element, int kKernelSize, int kStrideSize, int kChannels>
struct TrainTraits {
  using T = Element;
  static constexpr int kKernel = kKernelSize;  // height and width; 0: those of the params
  static constexpr int kStride = kStrideSize;
  static constexpr int kVector = kChannels;
  static constexpr int kTaps = kKernel > 0 ? kKernel : 4;         // of a kernel row in registers at a time
  static constexpr int kStrip = trained_strip(kKernel, kStride);  // of output pixels, forward
  static_assert(kKernel == trained_kernel(kKernel, kKernel, kVector), "no size that a plan asks for");
};

// Pixels `first`, `first + step` and so on of rows of `columns`. Divides once, not for each of them.
struct PixelCursor {
  int row, column, step_rows, step_columns, columns;

  __device__ __forceinline__ PixelCursor(int first, int step, int columns_)
      : row(first / columns_),
        column(first % columns_),
        step_rows(step / columns_),
        step_columns(step % columns_),
        columns(columns_) {}
  __device__ __forceinline__ void advance() {
    row += step_rows, column += step_columns;
    if (column >= columns) column -= columns, ++row;
  }
};

// Row `first + by` of a ring, for first and by below its number of rows.
__device__ __forceinline__ int wrapped(int first, int by, int rows) {
  const int slot = first + by;
  return slot < rows ? slot : slot - rows;
}

// 16 bytes asynchronously, a single element at once.
template <class T, int V>
__device__ __forceinline__ void copy_vector(T* to, const T* from) {
  if constexpr (sizeof(T) * V == 16)
    cp_async_16(shared_address(to), from);
  else
    *to = load_global(from);
}

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_shared(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

// An image (N, H, W, C) as a tile's rows come from it and go to it.
struct TileImage {
  int height, width;
  int64_t row_stride, pixel_stride;

  __device__ __forceinline__ TileImage(int64_t height_, int64_t width_, int64_t channels)
      : height(static_cast<int>(height_)),
        width(static_cast<int>(width_)),
        row_stride(width_ * channels),
        pixel_stride(channels) {}
  __device__ __forceinline__ bool has(int row, int column) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(column) < static_cast<unsigned>(width);
  }
  __device__ __forceinline__ int64_t place(int row, int column) const {
    return row * row_stride + column * pixel_stride;
  }
};

// Values of a thread in shared memory, a row of all threads' after the other: written and read as ThreadParameters.
template <int V>
class ThreadRows {
 public:
  __device__ __forceinline__ ThreadRows(float* rows, int block_channels, int vector)
      : at_(rows + vector * kQuad<V>), row_(block_channels), plane_(block_channels / (V / kQuad<V>)) {}
  __device__ __forceinline__ Vector<float, kQuad<V>>& operator()(int row, int part) const {
    return *reinterpret_cast<Vector<float, kQuad<V>>*>(at_ + row * row_ + part / kQuad<V> * plane_);
  }
  __device__ __forceinline__ void read(int row, float (&to)[V]) const {
#pragma unroll
    for (int part = 0; part < V; part += kQuad<V>) {
      const Vector<float, kQuad<V>> four = (*this)(row, part);
#pragma unroll
      for (int i = 0; i < kQuad<V>; ++i) to[part + i] = four.at[i];
    }
  }

 private:
  float* at_;
  int row_, plane_;
};

// The taps of the block's channels, as rows.
template <class Traits>
__device__ __forceinline__ void load_taps(const training::DepthwiseShape& s, int taps, int64_t first_channel,
                                          int block_channels, float* rows) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kVector;
  const int channels = static_cast<int>(min(int64_t(block_channels), s.channels - first_channel));
  const int64_t first = first_channel * taps;
  if (s.weight.dtype == DType::kFloat32)
    copy_taps<V, K * K>(static_cast<const float*>(s.weight.data) + first, channels, taps, block_channels, rows);
  else
    copy_taps<V, K * K>(static_cast<const T*>(s.weight.data) + first, channels, taps, block_channels, rows);
}

// An item of a block.
struct TileItem {
  int64_t image;
  int band, column_tile;

  __device__ __forceinline__ TileItem(const TrainDepthwisePlan& plan, int64_t index) {
    column_tile = static_cast<int>(index % plan.column_tiles);
    band = static_cast<int>(index / plan.column_tiles % plan.bands);
    image = index / plan.column_tiles / plan.bands;
  }
};

}  // namespace effkernels::cuda
