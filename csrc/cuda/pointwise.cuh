// Pointwise convolution as a matrix product: y (M x N) = epilogue((x * gate) (M x K) * weight^T), weight (N x K) as
// stored; M the pixels of all images, N and K the output and input channels.
//
//            k ->                         A block computes one tile of y, with all of its k. Blocks that share rows
//        +---------+                      are neighbours, so that x comes from memory once and from L2 after that.
//   rows | x       |                      Slices of x and weight, 64 bytes of each row, come by cp.async through a ring
//        +---------+   +-----------+      of four stages into swizzled rows (pointwise_product.cuh); tensor cores read
//                      | tile of y |      them by ldmatrix. The gates of the tile's images lie beside the ring for all
//        +---------+   +-----------+      k and multiply the fragments of x.
//   cols | weight  |                      Then the sums go through shared memory, and each thread picks up 16 bytes of
//        +---------+                      y: scale and shift, activation, residual, one store.
//
// Shared memory: scale and shift | first gate of each row | gates | ring of stages, later sums in float32 | residual.
// The order of every sum depends on the tile alone. Sums by multiply-add are taken in runs of kRunSteps slices: one
// chain over 1152 channels would err twice as much as PyTorch's blocked product.
#pragma once
#include "pointwise_load.cuh"

namespace effkernels::cuda {

// Waits for nothing: the copies belong to the group that the caller closes, plain stores to the next barrier.
template <class Tr>
__device__ __forceinline__ void load_gates(const PointwiseParams& p, const PointwisePlan& plan, int64_t first_image,
                                           typename Tr::T* gates) {
  using T = typename Tr::T;
  constexpr int kVector = Tr::kVector;
  const int vectors = plan.steps * (Tr::kStep / kVector);
  for (int i = threadIdx.x; i < plan.gate_images * vectors; i += Tr::kThreads) {
    const int image = i / vectors, k = i % vectors * kVector;
    const bool inside = first_image + image < p.batch && k < p.in_channels;
    const int64_t from = inside ? (first_image + image) * p.in_channels + k : 0;
    T* const to = gates + image * plan.gate_stride + k;
    if (p.gate.dtype == p.dtype) {
      cp_async_16(shared_address(to), static_cast<const T*>(p.gate.data) + from, inside ? 16 : 0);
    } else {  // float32 beside a 16-bit x
      float value[kVector] = {};
      if (inside) load(static_cast<const float*>(p.gate.data) + from, value);
      store(to, value);
    }
  }
}

template <class Tr>
__device__ __forceinline__ void load_residual(const PointwiseParams& p, const PointwiseRows& rows, int64_t rows_left,
                                              int first_column, unsigned char* to) {
  using T = typename Tr::T;
  constexpr int kVectors = Tr::kColumns / Tr::kVector;
  const T* const residual = static_cast<const T*>(p.residual);
#pragma unroll 4
  for (int i = threadIdx.x; i < Tr::kRows * kVectors; i += Tr::kThreads) {
    const int row = i / kVectors, column = first_column + i % kVectors * Tr::kVector;
    if (row >= rows_left || column >= p.out_channels) continue;
    int64_t pixel;
    const int64_t image = rows.first_image + rows.locate(row, &pixel);
    cp_async_16(shared_address(to + i * 16),
                residual + image * p.residual_stride_n + pixel * p.residual_stride_p + column);
  }
}

// Eight or four neighbouring sums. Odd groups of four threads read their halves of eight in the other order, or they
// would meet the even groups in the same banks.
template <int kCount>
__device__ __forceinline__ void read_sums(const float* from, float (&sums)[kCount]) {
  if constexpr (kCount == 8) {
    const bool swapped = threadIdx.x & 4;
    const float4 first = *reinterpret_cast<const float4*>(from + (swapped ? 4 : 0));
    const float4 second = *reinterpret_cast<const float4*>(from + (swapped ? 0 : 4));
    const float4 low = swapped ? second : first, high = swapped ? first : second;
    sums[0] = low.x, sums[1] = low.y, sums[2] = low.z, sums[3] = low.w;
    sums[4] = high.x, sums[5] = high.y, sums[6] = high.z, sums[7] = high.w;
  } else {
    const float4 all = *reinterpret_cast<const float4*>(from);
    sums[0] = all.x, sums[1] = all.y, sums[2] = all.z, sums[3] = all.w;
  }
}

// 16 bytes of y for __stcg. A plain assignment, of a Vector or of a uint4, is taken apart behind the activation's
// switch and becomes four stores; stores go to L2 either way.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const Vector<T, 2> pair = {{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&value)[8]) {
  return make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                    pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&value)[4]) {
  return make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                    __float_as_uint(value[3]));
}

// The sums of a warp's fragments to shared memory, scaled and shifted; the warps along k add theirs one after the
// other.
template <class Tr>
__device__ __forceinline__ void write_sums(const float (&acc)[Tr::M][Tr::N][4], const float* scale, float* sums,
                                           int warp_row, int warp_column, int warp_k) {
  constexpr int kWarpsK = Tr::kShape.warps_k;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int turn = 0; turn < kWarpsK; ++turn) {
    if (turn == warp_k) {
#pragma unroll
      for (int j = 0; j < Tr::N; ++j) {
        const int column = warp_column + j * 8 + 2 * t;
        const float2 by = *reinterpret_cast<const float2*>(scale + column);
        const float2 shift = *reinterpret_cast<const float2*>(scale + Tr::kColumns + column);
#pragma unroll
        for (int i = 0; i < Tr::M; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2* const to =
                reinterpret_cast<float2*>(sums + (warp_row + i * 16 + half * 8 + g) * Tr::kSumStride + column);
            float2 sum = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
            if (kWarpsK > 1 && turn > 0) sum.x += to->x, sum.y += to->y;
            if (turn == kWarpsK - 1) sum.x = fmaf(sum.x, by.x, shift.x), sum.y = fmaf(sum.y, by.y, shift.y);
            *to = sum;
          }
      }
    }
    __syncthreads();
  }
}

template <class Tr>
__device__ __forceinline__ void write_vectors(const PointwiseParams& p, const float* sums,
                                              const unsigned char* residual, int64_t first_row, int64_t rows_left,
                                              int first_column) {
  using T = typename Tr::T;
  constexpr int kVectors = Tr::kColumns / Tr::kVector;
  T* const y = static_cast<T*>(p.y) + first_row * p.out_channels + first_column;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tr::kRows * kVectors; i += Tr::kThreads) {
    const int row = i / kVectors, column = i % kVectors * Tr::kVector;
    if (row >= rows_left || first_column + column >= p.out_channels) continue;
    float value[Tr::kVector];
    read_sums(sums + row * Tr::kSumStride + column, value);
    activate<T>(value, p.activation);
    if (p.residual != nullptr) {  // this very thread's copies
      const Vector<T, Tr::kVector> added = *reinterpret_cast<const Vector<T, Tr::kVector>*>(residual + i * 16);
#pragma unroll
      for (int e = 0; e < Tr::kVector; ++e) value[e] += to_float(added.at[e]);
    }
    __stcg(reinterpret_cast<uint4*>(y + row * p.out_channels + column), pack<T>(value));
  }
}

template <class Tr>
__device__ __forceinline__ void write_elements(const PointwiseParams& p, const float* sums, const PointwiseRows& rows,
                                               int64_t first_row, int64_t rows_left, int first_column) {
  using T = typename Tr::T;
  T* const y = static_cast<T*>(p.y) + first_row * p.out_channels + first_column;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tr::kRows * Tr::kColumns; i += Tr::kThreads) {
    const int row = i / Tr::kColumns, column = i % Tr::kColumns;
    if (row >= rows_left || first_column + column >= p.out_channels) continue;
    float value[1] = {sums[row * Tr::kSumStride + column]};
    activate<T>(value, p.activation);
    if (p.residual != nullptr) {
      int64_t pixel;
      const int64_t image = rows.first_image + rows.locate(row, &pixel);
      value[0] += to_float(load_global(static_cast<const T*>(p.residual) + image * p.residual_stride_n +
                                       pixel * p.residual_stride_p + first_column + column));
    }
    y[row * p.out_channels + column] = from_float<T>(value[0]);
  }
}

template <class Tr>
__device__ __forceinline__ void multiply(float (&acc)[Tr::M][Tr::N][4], const unsigned char* x,
                                         const unsigned char* weight, const TileGate<typename Tr::T>& gate, int left) {
  if constexpr (Tr::kProduct == PointwiseProduct::kTensor16) {
    multiply_tensor16(acc, x, weight, gate, left);
  } else if constexpr (Tr::kProduct == PointwiseProduct::kTf32) {
    multiply_tf32(acc, x, weight, gate, left);
  } else {
    multiply_add(acc, x, weight, gate, left);
  }
}

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kResident)
    pointwise(const PointwiseParams p, const PointwisePlan plan) {
  wait_for_previous();
  allow_next();
  using T = typename Tr::T;
  constexpr int kStages = kPointwiseStages;
  float* const scale = dynamic_shared<float>();  // kColumns scales, then kColumns shifts
  int* const gate_offsets = reinterpret_cast<int*>(scale + 2 * Tr::kColumns);
  T* const gates = reinterpret_cast<T*>(gate_offsets + Tr::kRows);
  unsigned char* const ring = reinterpret_cast<unsigned char*>(gates) + plan.gate_bytes;
  unsigned char* const residual = ring + plan.ring_bytes;

  const int64_t first_row = blockIdx.x / plan.column_tiles * Tr::kRows;
  const int first_column = static_cast<int>(blockIdx.x % plan.column_tiles) * Tr::kColumns;
  const int64_t rows_left = p.batch * p.pixels - first_row;
  const PointwiseRows rows(first_row, p.pixels);
  const bool gated = !Tr::kConverts && plan.gate_images > 0;

  std::conditional_t<Tr::kConverts, PointwiseConverter<Tr>, PointwiseCopier<Tr>> loader(p, plan, rows, rows_left,
                                                                                        first_column);
  if (gated) load_gates<Tr>(p, plan, rows.first_image, gates);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < plan.steps) loader.load(ring + stage * Tr::kStageBytes, stage * Tr::kStep);
    if (!Tr::kConverts && stage == kStages - 2 && p.residual != nullptr)
      load_residual<Tr>(p, rows, rows_left, first_column, residual);
    cp_async_commit();
  }
  for (int i = threadIdx.x; i < Tr::kColumns; i += Tr::kThreads) {
    ScaleShift of = {0.f, 0.f};
    if (first_column + i < p.out_channels) of = scale_shift(p.norm, first_column + i);
    scale[i] = of.scale, scale[Tr::kColumns + i] = of.shift;
  }

  const int warp = threadIdx.x / 32;
  const int warp_k = warp / (Tr::kShape.warps_m * Tr::kShape.warps_n);
  const int warp_row = warp % Tr::kShape.warps_m * Tr::kWarpRows;
  const int warp_column = warp / Tr::kShape.warps_m % Tr::kShape.warps_n * Tr::kWarpColumns;
  TileGate<T> gate;
  if (gated) {
    for (int i = threadIdx.x; i < Tr::kRows; i += Tr::kThreads) {
      int64_t pixel;  // rows past the last image: any gate that is there
      gate_offsets[i] = (i < rows_left ? rows.locate(i, &pixel) : 0) * plan.gate_stride;
    }
    gate.offsets = gate_offsets + warp_row;
    int64_t pixel;
    const int first = rows.locate(warp_row, &pixel), last = rows.locate(warp_row + Tr::kWarpRows - 1, &pixel);
    gate.uniform = first == last || warp_row >= rows_left;
    gate.offset = warp_row < rows_left ? first * plan.gate_stride : 0;
  }

  float acc[Tr::M][Tr::N][4] = {};
  constexpr bool kRuns = Tr::kProduct == PointwiseProduct::kMultiplyAdd;
  float total[kRuns ? Tr::M : 1][kRuns ? Tr::N : 1][4] = {};
  int in_use = 0, to_fill = kStages - 1;  // stages
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < plan.steps)
      loader.load(ring + to_fill * Tr::kStageBytes, (step + kStages - 1) * Tr::kStep);
    cp_async_commit();
    const int k = step * Tr::kStep + warp_k * Tr::kSlice;
    const unsigned char* const slice = ring + in_use * Tr::kStageBytes + warp_k * Tr::kSliceSpan;
    if (gated) gate.gates = gates + k;
    multiply<Tr>(acc, slice + warp_row * kPointwiseSliceBytes, slice + (Tr::kRows + warp_column) * kPointwiseSliceBytes,
                 gate, static_cast<int>(p.in_channels) - k);
    in_use = in_use == kStages - 1 ? 0 : in_use + 1;
    to_fill = to_fill == kStages - 1 ? 0 : to_fill + 1;
    if constexpr (kRuns) {
      if (step % Tr::kRunSteps == Tr::kRunSteps - 1 || step == plan.steps - 1) {
#pragma unroll
        for (int i = 0; i < Tr::M; ++i)
#pragma unroll
          for (int j = 0; j < Tr::N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              total[i][j][e] += acc[i][j][e];
              acc[i][j][e] = 0.f;
            }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring is free

  float* const sums = reinterpret_cast<float*>(ring);
  if constexpr (kRuns) {
    write_sums<Tr>(total, scale, sums, warp_row, warp_column, warp_k);
  } else {
    write_sums<Tr>(acc, scale, sums, warp_row, warp_column, warp_k);
  }
  if constexpr (Tr::kConverts) {
    write_elements<Tr>(p, sums, rows, first_row, rows_left, first_column);
  } else {
    write_vectors<Tr>(p, sums, residual, first_row, rows_left, first_column);
  }
}

template <class T, PointwiseProduct kProduct, bool kConverts, int kTile = 0>
cudaError_t run_pointwise_tile(const PointwiseParams& p, const PointwisePlan& plan, const Launch& at) {
  if constexpr (kTile < kPointwiseTileCount) {
    if constexpr (pointwise_tile_built(kTile, kProduct, kConverts))
      if (plan.tile == kTile) return launch(pointwise<PointwiseTraits<T, kProduct, kTile, kConverts>>, at, p, plan);
    return run_pointwise_tile<T, kProduct, kConverts, kTile + 1>(p, plan, at);
  }
  return cudaErrorInvalidValue;
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_pointwise(const PointwiseParams& p, const PointwisePlan& plan, const Launch& at) {
  if constexpr (sizeof(T) == 4) {
    if (plan.product == PointwiseProduct::kMultiplyAdd)
      return plan.converts ? run_pointwise_tile<T, PointwiseProduct::kMultiplyAdd, true>(p, plan, at)
                           : run_pointwise_tile<T, PointwiseProduct::kMultiplyAdd, false>(p, plan, at);
    return plan.converts ? run_pointwise_tile<T, PointwiseProduct::kTf32, true>(p, plan, at)
                         : run_pointwise_tile<T, PointwiseProduct::kTf32, false>(p, plan, at);
  } else {
    return plan.converts ? run_pointwise_tile<T, PointwiseProduct::kTensor16, true>(p, plan, at)
                         : run_pointwise_tile<T, PointwiseProduct::kTensor16, false>(p, plan, at);
  }
}
extern template cudaError_t run_pointwise<float>(const PointwiseParams&, const PointwisePlan&, const Launch&);
extern template cudaError_t run_pointwise<__half>(const PointwiseParams&, const PointwisePlan&, const Launch&);
extern template cudaError_t run_pointwise<__nv_bfloat16>(const PointwiseParams&, const PointwisePlan&, const Launch&);

}  // namespace effkernels::cuda
