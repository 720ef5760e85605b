// Pointwise convolution as a matrix product: y (M x N) = epilogue((x * gate) (M x K) * weight^T), weight (N x K) as
// stored; M the pixels of all images, N and K the output and input channels.
//
//            k ->                         A block keeps its columns of y and goes from one tile of rows to the next.
//        +---------+                      Blocks that share rows are neighbours, so that x comes from memory once and
//   rows | x       |                      from L2 after that.
//        +---------+   +-----------+      Slices of x, 64 bytes of each row, come by cp.async through a ring of four
//                      | tile of y |      stages into swizzled rows (pointwise_product.cuh); the ring runs on over the
//        +---------+   +-----------+      borders of tiles. The weights of the columns are loaded once where there is
//   cols | weight  |                      room for all of their k, else they come through the ring too. Tensor cores
//        +---------+                      read both by ldmatrix. The gates of a tile's images come beside the slices of
//                                         x and multiply its fragments.
//
// Where a single tile has so many input channels, and the GPU so few tiles, that it pays, several blocks share one
// along k and the last of them to arrive adds up (pointwise_epilogue.cuh).
//
// Shared memory: scale and shift | flag | ring of stages of x and gates | weights | residual | sums in float32.
// The order of every sum depends on the plan alone. Sums by multiply-add are taken in runs of kRunSteps slices: one
// chain over 1152 channels would err twice as much as PyTorch's blocked product.
#pragma once
#include "pointwise_epilogue.cuh"

namespace effkernels::cuda {

template <class Tr>
__device__ __forceinline__ void multiply(float (&acc)[Tr::M][Tr::N][4], const unsigned char* x,
                                         const unsigned char* weight, const TileGate<Tr::M>& gate, int left) {
  if constexpr (Tr::kProduct == PointwiseProduct::kTensor16) {
    multiply_tensor16<typename Tr::T>(acc, x, weight, gate, left);
  } else if constexpr (Tr::kProduct == PointwiseProduct::kTf32) {
    multiply_tf32(acc, x, weight, gate, left);
  } else {
    multiply_add(acc, x, weight, gate, left);
  }
}

// Which images the thread's rows of a tile belong to.
template <class Tr>
__device__ __forceinline__ void find_images(const PointwiseParams& p, const PointwisePlan& plan, int64_t first_row,
                                            const PointwisePlace<Tr>& place, TileGate<Tr::M>* gate) {
  const PointwiseImages<Tr> images(p, plan, first_row);
  const int last = rows_of_tile<Tr>(plan, first_row) - 1;  // rows after it: any gate that is there
  const auto image_of = [&](int row) { return static_cast<unsigned>(images.of(row < last ? row : last)); };
  const unsigned first = image_of(place.row);
  gate->uniform = first == image_of(place.row + Tr::kWarpRows - 1);
#pragma unroll
  for (int i = 0; i < (Tr::M + 1) / 2; ++i) gate->images[i] = first * 0x01010101u;
  if (gate->uniform) return;
#pragma unroll
  for (int i = 0; i < (Tr::M + 1) / 2; ++i) {
    gate->images[i] = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i * 2 + e / 2 < Tr::M) gate->images[i] |= image_of(place.row + i * 32 + e * 8 + place.lane / 4) << e * 8;
  }
}

__device__ __forceinline__ int64_t divided(int64_t value, const PointwiseDivisor& by) {
  return static_cast<int64_t>(static_cast<uint64_t>(value) * by.multiplier >> by.shift);
}

// The part of a product that a block computes: `count` tiles of rows, `distance` apart, of the same columns.
struct PointwiseTiles {
  int64_t first, distance;
  int count, first_column;
  int part;  // along k

  template <class Tr>
  __device__ __forceinline__ int64_t row(int tile) const {
    return (first + tile * distance) * Tr::kRows;
  }
};

// `More` is what training (training_product.cuh) and pooling (pointwise_pool.cuh) add to it; `Tiles`: PointwiseTiles,
// or what has its members and function.
template <class Tr, class More, class Tiles>
__device__ __forceinline__ void multiply_tiles(const PointwiseParams& p, const PointwisePlan& plan,
                                               const PointwiseWork& work, const More& more, const Tiles& own) {
  constexpr int kStages = kPointwiseStages, kAhead = kStages - 1;
  constexpr bool kDirect = Tr::kEpilogue != PointwiseEpilogue::kAny;
  float* const scale = dynamic_shared<float>();  // kColumns scales, then kColumns shifts
  unsigned* const flag = reinterpret_cast<unsigned*>(scale + 2 * Tr::kColumns);
  unsigned char* const ring = reinterpret_cast<unsigned char*>(flag + 4);
  unsigned char* const weights = ring + plan.ring_bytes;
  unsigned char* const residual = weights + plan.weight_bytes;
  float* const sums_at = reinterpret_cast<float*>(residual + plan.residual_bytes);
  typename More::template Columns<Tr> columns(plan, residual, flag);

  const int first_column = own.first_column, part = own.part, tiles = own.count;
  const int first_k = part * plan.steps * Tr::kStep;
  const PointwisePlace<Tr> place;
  std::conditional_t<Tr::kConverts, PointwiseConverter<Tr, More>, PointwiseCopier<Tr>> loader(p, plan, first_column,
                                                                                              more);

  // Weights and norm first: they are the same for all tiles.
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < plan.steps)
      loader.load_weight(weights + stage * (Tr::kWarpsK * Tr::kWeightSlice), first_k + stage * Tr::kStep);
  constexpr int kOwnColumns = (Tr::kColumns + Tr::kThreads - 1) / Tr::kThreads;
  ScaleShift of[kOwnColumns];
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int column = static_cast<int>(threadIdx.x) + i * Tr::kThreads;
    of[i] = {0.f, 0.f};
    if (column < Tr::kColumns && first_column + column < p.out_channels)
      of[i] = before_activation(scale_shift(p.norm, first_column + column), p.dtype, p.activation);
  }

  const auto row_of = [&](int tile) { return own.template row<Tr>(tile); };
  int tile_to_load = 0, step_to_load = 0;
  const auto load = [&](unsigned stage, bool with_weight) {
    if (tile_to_load == tiles) return;
    if (step_to_load == 0) loader.move(row_of(tile_to_load));
    const int k = first_k + step_to_load * Tr::kStep;
    loader.load_x(ring + stage * plan.stage_bytes, k);
    if (with_weight && (!plan.keeps_weight || tile_to_load == 0))
      loader.load_weight(weights + (plan.keeps_weight ? step_to_load : stage) * (Tr::kWarpsK * Tr::kWeightSlice), k);
    if (++step_to_load == plan.steps) step_to_load = 0, ++tile_to_load;
  };
  if (Tr::kTakesMore && plan.residual_bytes > 0) load_residual(p, plan, row_of(0), first_column, place, residual);
#pragma unroll 1
  for (unsigned stage = 0; stage < kAhead; ++stage) {
    load(stage, false);
    cp_async_commit();
  }
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int column = static_cast<int>(threadIdx.x) + i * Tr::kThreads;
    if (column < Tr::kColumns) scale[column] = of[i].scale, scale[Tr::kColumns + column] = of[i].shift;
  }

  static_assert((kStages & kAhead) == 0, "a power of two");
  unsigned in_use = 0;  // stage
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t first_row = row_of(tile);
    TileGate<Tr::M> gate;
    if (Tr::kTakesMore && plan.images > 0) find_images(p, plan, first_row, place, &gate);
    typename More::template Rows<Tr> rows(p, plan, more, first_row);
    float acc[Tr::M][Tr::N][4] = {};
    constexpr bool kRuns = Tr::kProduct == PointwiseProduct::kMultiplyAdd;
    float total[kRuns ? Tr::M : 1][kRuns ? Tr::N : 1][4] = {};
#pragma unroll 1
    for (int step = 0; step < plan.steps; ++step) {
      cp_async_wait<kStages - 2>();
      rows.prepare(ring + in_use * plan.stage_bytes, first_k + step * Tr::kStep);
      __syncthreads();
      if (Tr::kTakesMore && plan.residual_bytes > 0 && step == 0 && tile > 0)
        load_residual(p, plan, first_row, first_column, place, residual);
      load((in_use + kAhead) % kStages, true);
      cp_async_commit();
      const unsigned char* const stage = ring + in_use * plan.stage_bytes;
      const unsigned char* const weight =
          weights + ((plan.keeps_weight ? step : in_use) * Tr::kWarpsK + place.k) * Tr::kWeightSlice;
      if (Tr::kTakesMore && plan.images > 0)
        gate.slice = stage + Tr::kWarpsK * Tr::kXSlice + place.k * plan.images * kPointwiseGateBytes;
      multiply<Tr>(acc, stage + place.k * Tr::kXSlice + place.row * kPointwiseSliceBytes,
                   weight + place.column * kPointwiseSliceBytes, gate,
                   static_cast<int>(p.in_channels) - (first_k + step * Tr::kStep + place.k * Tr::kSlice));
      in_use = (in_use + 1) % kStages;
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

    if (Tr::kTakesMore && plan.residual_bytes > 0) {  // its copies were committed in the first step of the tile
      if (plan.steps < kAhead) {
        cp_async_wait<0>();
      } else {
        cp_async_wait<kStages - 2>();
      }
      if constexpr (kDirect) __syncwarp();
    }
    const int row_count = rows_of_tile<Tr>(plan, first_row);
    if constexpr (More::kPools) {
      if constexpr (kRuns) {
        columns.pool(p, plan, more, total, place, scale, sums_at, first_row);
      } else {
        columns.pool(p, plan, more, acc, place, scale, sums_at, first_row);
      }
    } else if constexpr (kDirect) {
      const int row = place.row + place.lane / 4;
      const int64_t left = p.out_channels - (first_column + place.column);
      write_direct<Tr>(
          p, acc, scale + place.column, residual + (row * Tr::kColumns + place.column) * sizeof(typename Tr::T),
          static_cast<typename Tr::T*>(p.y) + (first_row + row) * p.out_channels + first_column + place.column,
          row_count - row, static_cast<int>(left));
    } else {
      PointwiseSums<Tr> sums(sums_at);
      if constexpr (kRuns) {
        sums.write(total, place.k);
      } else {
        sums.write(acc, place.k);
      }
      if constexpr (Tr::kWarpsK > 1 || Tr::kConverts) {
        __syncthreads();
      } else {
        __syncwarp();  // the residual
      }
      if constexpr (Tr::kConverts) {
        write_elements<Tr>(p, sums, scale, first_row, row_count, first_column);
        __syncthreads();
      } else {
        write_through_shared<Tr>(p, plan, work, sums, scale, residual, flag, first_row, row_count, first_column, part,
                                 own.first * plan.column_tiles + first_column / Tr::kColumns);
      }
    }
    columns.add(p, first_row, row_count, first_column);
  }
  columns.finish(p, plan, work, more, own.first, first_column);
}

// The same for a block of a launch.
template <class Tr, class More>
__device__ __forceinline__ void multiply_tiles(const PointwiseParams& p, const PointwisePlan& plan,
                                               const PointwiseWork& work, const More& more) {
  wait_for_previous();
  allow_next();
  const int64_t cell = divided(blockIdx.x, plan.by_columns), group = divided(cell, plan.by_parts);
  PointwiseTiles of;
  of.first = group, of.distance = plan.row_groups;
  of.count = plan.tiles - (group + (plan.tiles - 1) * plan.row_groups >= plan.row_tiles ? 1 : 0);
  of.first_column = static_cast<int>(blockIdx.x - cell * plan.column_tiles) * Tr::kColumns;
  of.part = static_cast<int>(cell - group * plan.parts);
  multiply_tiles<Tr>(p, plan, work, more, of);
}

// The product alone.
struct NothingMore {
  template <class Tr>
  struct Columns {
    __device__ __forceinline__ Columns(const PointwisePlan&, unsigned char*, unsigned*) {}
    __device__ __forceinline__ void add(const PointwiseParams&, int64_t, int, int) {}
    __device__ __forceinline__ void finish(const PointwiseParams&, const PointwisePlan&, const PointwiseWork&,
                                           const NothingMore&, int64_t, int) {}
  };
  template <class Tr>
  struct Rows {
    template <class More>
    __device__ __forceinline__ Rows(const PointwiseParams&, const PointwisePlan&, const More&, int64_t) {}
    __device__ __forceinline__ void prepare(unsigned char*, int) const {}
  };
  static constexpr bool kChanges = false;  // x on its way
  static constexpr bool kPools = false;    // in place of y
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kResident)
    pointwise(const PointwiseParams p, const PointwisePlan plan, const PointwiseWork work) {
  multiply_tiles<Tr>(p, plan, work, NothingMore());
}

template <class T, PointwiseProduct kProduct, PointwiseEpilogue kEpilogue, bool kConverts, int kTile = 0>
cudaError_t run_pointwise_tile(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                               const Launch& at) {
  if constexpr (kTile < kPointwiseTileCount) {
    if constexpr (pointwise_tile_built(kTile, kProduct, kEpilogue, kConverts))
      if (plan.tile == kTile)
        return launch(pointwise<PointwiseTraits<T, kProduct, kTile, kEpilogue, kConverts>>, at, p, plan, work);
    return run_pointwise_tile<T, kProduct, kEpilogue, kConverts, kTile + 1>(p, plan, work, at);
  }
  return cudaErrorInvalidValue;
}

template <class T, PointwiseProduct kProduct>
cudaError_t run_pointwise_product(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                                  const Launch& at) {
  if (plan.converts) return run_pointwise_tile<T, kProduct, PointwiseEpilogue::kAny, true>(p, plan, work, at);
  switch (plan.epilogue) {
    case PointwiseEpilogue::kIdentity:
      return run_pointwise_tile<T, kProduct, PointwiseEpilogue::kIdentity, false>(p, plan, work, at);
    case PointwiseEpilogue::kSilu:
      return run_pointwise_tile<T, kProduct, PointwiseEpilogue::kSilu, false>(p, plan, work, at);
    default:
      return run_pointwise_tile<T, kProduct, PointwiseEpilogue::kAny, false>(p, plan, work, at);
  }
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_pointwise(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                          const Launch& at) {
  if constexpr (sizeof(T) == 2) {
    return run_pointwise_product<T, PointwiseProduct::kTensor16>(p, plan, work, at);
  } else if (plan.product == PointwiseProduct::kMultiplyAdd) {
    return run_pointwise_product<T, PointwiseProduct::kMultiplyAdd>(p, plan, work, at);
  } else {
    return run_pointwise_product<T, PointwiseProduct::kTf32>(p, plan, work, at);
  }
}
extern template cudaError_t run_pointwise<float>(const PointwiseParams&, const PointwisePlan&, const PointwiseWork&,
                                                 const Launch&);
extern template cudaError_t run_pointwise<__half>(const PointwiseParams&, const PointwisePlan&, const PointwiseWork&,
                                                  const Launch&);
extern template cudaError_t run_pointwise<__nv_bfloat16>(const PointwiseParams&, const PointwisePlan&,
                                                         const PointwiseWork&, const Launch&);

}  // namespace effkernels::cuda
