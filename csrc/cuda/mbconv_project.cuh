// The project product of mbconv.cuh: y = norm(gated * weight^T) + residual, split over the expanded
// channels, of which each block of a cluster has some.
//
// Threads and data. Product: a warp takes a tile of kProjectedTiles at a time, as wide as leaves all warps one or few;
// gated channels and weights are in slices of 64 bytes (pointwise_product.cuh), the sums go to shared memory as
// float32. Sum: a thread takes 8 output channels of a pixel, adds the sums of all blocks in the order of their ranks
// and writes y. Rows of the sums are 8 or 24 floats more than a multiple of 32 apart, so that the four rows that a warp
// writes at a time are in different banks.
//
// Traffic. Weights once for each image where there are several passes, else once for each cluster; residual and y once.
#pragma once
#include "mbconv_parameters.cuh"
#include "pointwise_product.cuh"

namespace effkernels::cuda {

// The block's columns of the weights of a pass: by cp.async, float32 ones through registers. Output channels after the
// last one repeat it, expanded channels after the block's are zero. A thread takes two rows at a time.
template <class T>
__device__ __forceinline__ void load_project_weights(const PointwiseParams& p, const MBConvPlan& plan, int pass,
                                                     int first_channel, int channels, unsigned char* weights) {
  constexpr int V = kVectorOf<T>, kDistance = kMBConvThreads / kSliceChunks, kRows = 2;
  const int chunk = threadIdx.x % kSliceChunks, slice_bytes = plan.padded_columns * kPointwiseSliceBytes;
  const int first_row = pass * plan.pass_columns, last = static_cast<int>(p.out_channels) - 1;
  const bool in_type = p.weight.dtype != DType::kFloat32;
  const unsigned size = in_type ? sizeof(T) : sizeof(float), row_bytes = static_cast<unsigned>(p.in_channels) * size;
  const unsigned char* const of_chunk =
      static_cast<const unsigned char*>(p.weight.data) + (first_channel + chunk * V) * size;
#pragma unroll 1
  for (int row = threadIdx.x / kSliceChunks; row < plan.padded_columns; row += kRows * kDistance) {
    const bool both = row + kDistance < plan.padded_columns;
    const unsigned char* one = product_after(of_chunk, min(first_row + row, last), row_bytes);
    const unsigned char* other = product_after(of_chunk, min(first_row + row + kDistance, last), row_bytes);
    unsigned char* to = weights + chunk_offset(row, chunk);
    int left = plan.held_slices, k = chunk * V;
    if (in_type) {
#pragma unroll 1
      for (; k < channels; k += kSliceChunks * V, --left) {
        cp_async_16_if(both, shared_address(to) + kDistance * kPointwiseSliceBytes, other);
        cp_async_16(shared_address(to), one);
        one += kSliceChunks * V * sizeof(T), other += kSliceChunks * V * sizeof(T), to += slice_bytes;
      }
    } else {
#pragma unroll 1
      for (; k < channels; k += kSliceChunks * V, --left) {
        float value[V];
        load(reinterpret_cast<const float*>(one), value);
        store(reinterpret_cast<T*>(to), value);
        load(reinterpret_cast<const float*>(other), value);
        if (both) store(reinterpret_cast<T*>(to + kDistance * kPointwiseSliceBytes), value);
        one += kSliceChunks * V * sizeof(float), other += kSliceChunks * V * sizeof(float), to += slice_bytes;
      }
    }
#pragma unroll 1
    for (; left > 0; --left) {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      if (both) *reinterpret_cast<uint4*>(to + kDistance * kPointwiseSliceBytes) = make_uint4(0, 0, 0, 0);
      to += slice_bytes;
    }
  }
}

// The block's sums of all pixels and of the output channels of a pass, by tiles of kProjectedTiles[kTile].
template <class T, int kTile>
__device__ __forceinline__ void multiply_held_by(const MBConvPlan& plan, int pixels, int channels, const T* gate,
                                                 const unsigned char* held, const unsigned char* weights,
                                                 float* partial) {
  constexpr int kPixels = kProjectedTiles[kTile].pixels, M = kPixels / 16, N = kProjectedTiles[kTile].columns / 8;
  constexpr int kSlice = kSliceChunks * kVectorOf<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // The warps go along the pixels, then along the columns.
  int pixel = warp * kPixels, column = 0;
#pragma unroll 1
  while (true) {
    while (pixel >= plan.held_pixels) pixel -= plan.held_pixels, column += plan.tile_columns;
    if (column >= plan.padded_columns) break;
    const unsigned char* x = held + pixel * kPointwiseSliceBytes;
    const unsigned char* weight = weights + column * kPointwiseSliceBytes;
    const int columns = min(plan.tile_columns, plan.pass_columns - column);
    TileGate<M> gates;
    gates.slice = reinterpret_cast<const unsigned char*>(gate);
    float acc[M][N][4] = {};
#pragma unroll 1
    for (int left = channels; left > 0; left -= kSlice) {
      multiply_tensor16<T>(acc, x, weight, gates, left, columns);
      x += plan.held_pixels * kPointwiseSliceBytes, weight += plan.padded_columns * kPointwiseSliceBytes;
      if (gate != nullptr) gates.slice += kPointwiseSliceBytes;
    }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = pixel + i * 16 + half * 8 + g;
        if (row >= pixels) continue;
        float* const to = partial + row * plan.partial_stride + column + 2 * t;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (j * 8 >= columns) break;
          *reinterpret_cast<float2*>(to + j * 8) = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
        }
      }
    pixel += kMBConvThreads / 32 * kPixels;
  }
}

template <class T>
__device__ __forceinline__ void multiply_held(const MBConvPlan& plan, int pixels, int channels, const T* gate,
                                              const unsigned char* held, const unsigned char* weights, float* partial) {
  if (plan.projected == 0)
    multiply_held_by<T, 0>(plan, pixels, channels, gate, held, weights, partial);
  else
    multiply_held_by<T, 1>(plan, pixels, channels, gate, held, weights, partial);
}

// The block's share of y in a pass: the sums of all ranks, norm, activation and residual.
template <class T>
__device__ __forceinline__ void add_partial(const PointwiseParams& p, const MBConvPlan& plan, int rank, int64_t image,
                                            int pass, const float* norm, float* partial) {
  constexpr int V = kVectorOf<T>, kAtOnce = 16;  // ranks whose sums are under way together
  const int out_channels = static_cast<int>(p.out_channels), first_column = pass * plan.pass_columns;
  const int vectors = plan.pass_columns / V, items = static_cast<int>(p.pixels) * vectors;
  const SmallDivisor by_vectors(plan.by_vectors);
  T* const y = static_cast<T*>(p.y) + image * p.pixels * out_channels + first_column;
  const T* const residual =
      p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + image * p.residual_stride_n + first_column;
#pragma unroll 1
  for (int item = rank * kMBConvThreads + static_cast<int>(threadIdx.x); item < items;
       item += plan.cluster * kMBConvThreads) {
    const int pixel = static_cast<int>(by_vectors(item)), column = (item - pixel * vectors) * V;
    if (first_column + column >= out_channels) continue;
    float total[V] = {};
    float* const from = partial + pixel * plan.partial_stride + column;
#pragma unroll 1
    for (int first = 0; first < plan.team; first += kAtOnce) {
      float4 low[kAtOnce], high[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const auto* const of = reinterpret_cast<const float4*>(cluster_map(from, min(first + i, plan.team - 1)));
        low[i] = of[0], high[i] = of[1];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < plan.team) {
          total[0] += low[i].x, total[1] += low[i].y, total[2] += low[i].z, total[3] += low[i].w;
          total[4] += high[i].x, total[5] += high[i].y, total[6] += high[i].z, total[7] += high[i].w;
        }
      }
    }
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      const float* const of = norm + first_column + column + part;
      const Vector<float, 4> scale = *reinterpret_cast<const Vector<float, 4>*>(of);
      const Vector<float, 4> shift = *reinterpret_cast<const Vector<float, 4>*>(of + out_channels);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[part + i] = fmaf(total[part + i], scale.at[i], shift.at[i]);
    }
    if (residual != nullptr) {
      float of[V];
      load(residual + pixel * p.residual_stride_p + column, of);
#pragma unroll
      for (int i = 0; i < V; ++i) total[i] += of[i];
    }
    store_global(y + pixel * out_channels + column, total);
  }
}

// All threads of the cluster. After the last image it ends with the first step of a barrier of the cluster, after which
// nobody reads or writes the block's `partial` any more; before another one with both.
template <class T, class Load>
__device__ __forceinline__ void project(const MBConvArguments& a, int rank, int64_t image, int channels,
                                        bool more_images, const T* gate, const unsigned char* held,
                                        const unsigned char* weights, const float* norm, float* partial,
                                        const Load& load_weights) {
  const MBConvPlan& plan = a.plan;
#pragma unroll 1
  for (int pass = 0; pass < plan.passes; ++pass) {
    cp_async_wait<0>();
    __syncthreads();
    multiply_held<T>(plan, static_cast<int>(a.project.pixels), channels, gate, held, weights, partial);
    cluster_sync();
    if (plan.passes > 1 && (pass + 1 < plan.passes || more_images)) {
      load_weights(pass + 1 < plan.passes ? pass + 1 : 0);
      cp_async_commit();
    }
    add_partial<T>(a.project, plan, rank, image, pass, norm, partial);
    cluster_arrive();
    if (pass + 1 < plan.passes || more_images) cluster_wait();
  }
}

}  // namespace effkernels::cuda
