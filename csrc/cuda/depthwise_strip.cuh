// One strip of output pixels by one thread: the convolution, its norm and its activation. See depthwise.cuh for the
// mapping of threads to strips.
#pragma once
#include "depthwise_parameters.cuh"

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

// What a strip's sums start from; `norm`: the row of scales, that of shifts is the next.
template <class T, int kPixels, int V>
__device__ __forceinline__ void start_strip(const ThreadParameters<V>& parameters, int norm, float (&acc)[kPixels][V]) {
#pragma unroll
  for (int part = 0; part < V; part += kQuad<V>) {
    Vector<float, kQuad<V>> start = {};
    if constexpr (kNormInTaps<T>) start = parameters(norm + 1, part);
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel)
#pragma unroll
      for (int i = 0; i < kQuad<V>; ++i) acc[pixel][part + i] = start.at[i];
  }
}

// Adds the products of a row of inputs with row `ky` of the taps to a strip's sums; those of the first row start from
// the shift. The row is as it is stored; its channels are taken four at a time, so that their taps, the row and the
// sums stay in registers.
template <class Traits, bool kFirst = false>
__device__ __forceinline__ void add_row(const Vector<typename Traits::T, Traits::kVector> (&row)[Traits::kInputs],
                                        int ky, const ThreadParameters<Traits::kVector>& taps,
                                        float (&acc)[Traits::kStrip][Traits::kVector]) {
  constexpr int K = Traits::kKernel, S = Traits::kStride, V = Traits::kVector;
#pragma unroll
  for (int part = 0; part < V; part += 4) {
    Vector<float, 4> tap[K];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) tap[kx] = taps(ky * K + kx, part);
    Vector<float, 4> start;
    if constexpr (kFirst) start = taps(K * K + 1, part);
#pragma unroll
    for (int ix = 0; ix < Traits::kInputs; ++ix) {
      float value[4];
      unpack(row[ix], part, value);
#pragma unroll
      for (int ox = 0; ox < Traits::kStrip; ++ox) {
        const int kx = ix - ox * S;
        if (kx < 0 || kx >= K) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          acc[ox][part + i] = fmaf(value[i], tap[kx].at[i], kFirst && kx == 0 ? start.at[i] : acc[ox][part + i]);
      }
    }
  }
}

// One strip, whose first output looks at the image from (top, left) on: the sums before the norm.
template <class Traits, bool kInside>
__device__ __forceinline__ void convolve_rows(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                              int left, const ThreadParameters<Traits::kVector>& taps,
                                              float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kVector;
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
    add_row<Traits>(row, ky, taps, acc);
  }
}

// The same of a short strip: its whole window is read at once.
template <class Traits>
__device__ __forceinline__ void convolve_window(const DepthwiseParams& p, const typename Traits::T* image, int top,
                                                int left, const ThreadParameters<Traits::kVector>& taps,
                                                float (&acc)[Traits::kStrip][Traits::kVector]) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, V = Traits::kVector;
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
  for (int ky = 0; ky < K; ++ky) add_row<Traits>(window[ky], ky, taps, acc);
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

// Norm, where it is not in the taps, and activation of the sums of a strip.
template <class T, int kPixels, int V>
__device__ __forceinline__ void finish_strip(const ThreadParameters<V>& parameters, int norm, Activation activation,
                                             float (&value)[kPixels][V]) {
  if constexpr (!kNormInTaps<T>) {
#pragma unroll
    for (int part = 0; part < V; part += kQuad<V>) {
      const Vector<float, kQuad<V>> scale = parameters(norm, part), shift = parameters(norm + 1, part);
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel)
#pragma unroll
        for (int i = 0; i < kQuad<V>; ++i)
          value[pixel][part + i] = fmaf(value[pixel][part + i], scale.at[i], shift.at[i]);
    }
  }
  activate<T>(reinterpret_cast<float (&)[kPixels * V]>(value), activation);
}

// Passes the first `pixels` of a strip, at least one, on to `store` by number and value, and returns their sum.
template <int kPixels, int V, class Store>
__device__ __forceinline__ void store_strip(const float (&value)[kPixels][V], int pixels, float (&sum)[V],
                                            const Store& store) {
#pragma unroll
  for (int ox = 0; ox < kPixels; ++ox) {
    if (ox > 0 && ox >= pixels) break;
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = ox == 0 ? value[ox][i] : sum[i] + value[ox][i];
    store(ox, value[ox]);
  }
}

}  // namespace effkernels::cuda
