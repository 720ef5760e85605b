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
// Shared memory: ring of stages of x and gates | weights | residual | sums in float32 | scale and shift | flag.
// The order of every sum depends on the plan alone. Sums by multiply-add are taken in runs of kRunSteps slices: one
// chain over 1152 channels would err twice as much as PyTorch's blocked product.
#pragma once
#include "pointwise_epilogue.cuh"

namespace effkernels::cuda {

// The product of a warp: its rows of the slices of x by its columns of those of the weight.
template <class Tr>
class PointwiseMultiplier {
 public:
  // From the first slices of both on.
  __device__ __forceinline__ PointwiseMultiplier(const PointwisePlace<Tr>& place, const unsigned char* ring,
                                                 const unsigned char* weights)
      : x_(ring + place.k * Tr::kXSlice + place.row * kPointwiseSliceBytes),
        weight_(weights + place.k * Tr::kWeightSlice + place.column * kPointwiseSliceBytes),
        product_(x_, weight_) {}

  // To other slices, so many bytes further.
  __device__ __forceinline__ void advance(int x, int weight) {
    x_ += x, weight_ += weight;
    product_.advance(x, weight);
  }

  // To a stage of x. Formed for each tile: what leads to it needs no register meanwhile.
  __device__ __forceinline__ void move_x(const PointwisePlace<Tr>& place, const unsigned char* stage) {
    x_ = stage + place.k * Tr::kXSlice + place.row * kPointwiseSliceBytes;
    product_.move_x(x_);
  }

  // left: how many k of the slices there are.
  __device__ __forceinline__ void operator()(float (&acc)[Tr::M][Tr::N][4], const TileGate<Tr::M>& gate,
                                             int left) const {
    if constexpr (Tr::kProduct == PointwiseProduct::kTensor16) {
      if (Tr::kTakesMore && gate.kind == TileGates::kOne) {
        product_.template multiply<TileGates::kOne>(acc, gate);
      } else if (!Tr::kTakesMore || gate.kind == TileGates::kNone) {
        product_.template multiply<TileGates::kNone>(acc, gate);
      } else {
        product_.template multiply<TileGates::kSeveral>(acc, gate);
      }
    } else if constexpr (Tr::kProduct == PointwiseProduct::kTf32) {
      multiply_tf32(acc, x_, weight_, gate, left);
    } else {
      multiply_add(acc, x_, weight_, gate, left);
    }
  }

 private:
  const unsigned char *x_, *weight_;
  SliceProduct<typename Tr::T, Tr::M, Tr::N> product_;
};

// Which images the thread's rows of a tile belong to.
template <class Tr>
__device__ __forceinline__ void find_images(const PointwiseParams& p, const PointwisePlan& plan, int64_t first_row,
                                            const PointwisePlace<Tr>& place, TileGate<Tr::M>* gate) {
  const PointwiseImages<Tr> images(p, plan, first_row);
  const int last = rows_of_tile<Tr>(plan, first_row) - 1;  // rows after it: any gate that is there
  // From the stage to the first image's gates, and there to the first k of the lane: two of 16 bits, or one in TF32.
  const unsigned lane_offset = Tr::kWarpsK * Tr::kXSlice + place.k * plan.images * kPointwiseGateBytes +
                               (Tr::kProduct == PointwiseProduct::kMultiplyAdd ? 0 : place.lane % 4 * 4);
  const auto offset_of = [&](int row) {
    return static_cast<unsigned>(images.of(row < last ? row : last)) * kPointwiseGateBytes + lane_offset;
  };
  static_assert(Tr::kWarpsK * (Tr::kXSlice + (Tr::kRows + 1) * kPointwiseGateBytes) < 1 << 16, "two in a word");
  const unsigned first = offset_of(place.row);
  gate->kind = first == offset_of(place.row + Tr::kWarpRows - 1) ? TileGates::kOne : TileGates::kSeveral;
#pragma unroll
  for (int i = 0; i < Tr::M; ++i) gate->offsets[i] = first * 0x10001u;
  if (gate->kind == TileGates::kOne) return;
#pragma unroll
  for (int i = 0; i < Tr::M; ++i) {
    const int row = place.row + i * 16 + place.lane / 4;
    gate->offsets[i] = offset_of(row) | offset_of(row + 8) << 16;
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

// Of x and the gates nothing that has to be waited for.
struct ProductIsReady {
  __device__ __forceinline__ void operator()() const {}
};

// `More` is what training (training_product.cuh) and pooling (pointwise_pool.cuh) add to it; `Tiles`: PointwiseTiles,
// or what has its members and function. `wait`, called by all threads, returns when x, the gates and the residual may
// be read and y written: the weights and the norm are loaded meanwhile.
template <class Tr, class More, class Tiles, class Wait = ProductIsReady>
__device__ __forceinline__ void multiply_tiles(const PointwiseParams& p, const PointwisePlan& plan,
                                               const PointwiseWork& work, const More& more, const Tiles& own,
                                               const Wait& wait = Wait()) {
  constexpr int kStages = kPointwiseStages, kAhead = kStages - 1, kWeightStage = Tr::kWarpsK * Tr::kWeightSlice;
  constexpr bool kDirect = Tr::kEpilogue != PointwiseEpilogue::kAny;
  unsigned char* const ring = dynamic_shared<unsigned char>();
  unsigned char* const weights = ring + plan.ring_bytes;
  unsigned char* const residual = weights + plan.weight_bytes;
  float* const sums_at = reinterpret_cast<float*>(residual + plan.residual_bytes);
  // kColumns scales, then kColumns shifts
  float* const scale = reinterpret_cast<float*>(residual + plan.residual_bytes + plan.sum_bytes);
  unsigned* const flag = reinterpret_cast<unsigned*>(scale + 2 * Tr::kColumns);
  typename More::template Columns<Tr> columns(plan, residual, flag);

  const int first_column = own.first_column, part = own.part, tiles = own.count;
  const int first_k = part * plan.steps * Tr::kStep;
  const PointwisePlace<Tr> place;
  std::conditional_t<Tr::kConverts, PointwiseConverter<Tr, More>, PointwiseCopier<Tr>> loader(p, plan, first_column,
                                                                                              ring, weights, more);

  // Weights and norm first: they are the same for all tiles.
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage)
    if (stage < plan.steps) loader.load_weight(first_k + stage * Tr::kStep);
  constexpr int kOwnColumns = (Tr::kColumns + Tr::kThreads - 1) / Tr::kThreads;
  ScaleShift of[kOwnColumns];
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int column = static_cast<int>(threadIdx.x) + i * Tr::kThreads;
    of[i] = {0.f, 0.f};
    if (column < Tr::kColumns && first_column + column < p.out_channels)
      of[i] = before_activation(scale_shift(p.norm, first_column + column), p.dtype, p.activation);
  }
  wait();

  const auto row_of = [&](int tile) { return own.template row<Tr>(tile); };
  int tiles_moved = 0, left_to_load = 0;  // along k
  bool loads_more = true;                 // than x and its first gates
  const auto load = [&](unsigned stage, bool with_weight) {
    if (left_to_load == 0) {
      if (tiles_moved == tiles) return;
      loads_more = !plan.keeps_weight || tiles_moved == 0 || (Tr::kTakesMore && plan.images > Tr::kRowsAtOnce);
      loader.move(row_of(tiles_moved++), first_k);
      left_to_load = plan.steps * Tr::kStep;
    }
    const int k = first_k + plan.steps * Tr::kStep - left_to_load;
    loader.load_x(stage, k);
    if (loads_more) {
      if (with_weight && (!plan.keeps_weight || tiles_moved == 1)) loader.load_weight_too(k);
      loader.load_more_gates();
    }
    left_to_load -= Tr::kStep;
  };
#pragma unroll 1
  for (unsigned stage = 0; stage < kAhead; ++stage) {
    load(stage * plan.stage_bytes, false);
    loader.advance(plan.stage_bytes);
    cp_async_commit();
  }
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int column = static_cast<int>(threadIdx.x) + i * Tr::kThreads;
    if (column < Tr::kColumns) scale[column] = of[i].scale, scale[Tr::kColumns + column] = of[i].shift;
  }

  PointwiseMultiplier<Tr> multiply(place, ring, weights);
  unsigned stage = 0, free_stage = kAhead * plan.stage_bytes;  // the one in use, the next to load; in bytes
  const int weight_ring_bytes = plan.keeps_weight ? 0 : plan.weight_bytes;
  constexpr bool kOwnResidual = Tr::kWarpsK == 1;  // a warp loads what it reads itself
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t first_row = row_of(tile);
    multiply.move_x(place, ring + stage);
    loader.move_stage(ring + free_stage);
    TileGate<Tr::M> gate;
    gate.kind = TileGates::kNone;
    if (Tr::kTakesMore && plan.images > 0) find_images(p, plan, first_row, place, &gate);
    if (kOwnResidual && Tr::kTakesMore && plan.residual_bytes > 0) {
      __syncwarp();
      load_residual(p, plan, first_row, first_column, place, residual);
    }
    typename More::template Rows<Tr> rows(p, plan, more, first_row);
    float acc[Tr::M][Tr::N][4] = {};
    constexpr bool kRuns = Tr::kProduct == PointwiseProduct::kMultiplyAdd;
    float total[kRuns ? Tr::M : 1][kRuns ? Tr::N : 1][4] = {};
    int left = static_cast<int>(p.in_channels) - first_k - place.k * Tr::kSlice;
#pragma unroll 1
    for (int steps = plan.steps; steps > 0; --steps) {
      cp_async_wait<kStages - 2>();
      rows.prepare(ring + stage, first_k + (plan.steps - steps) * Tr::kStep);
      __syncthreads();
      if (!kOwnResidual && Tr::kTakesMore && plan.residual_bytes > 0 && steps == plan.steps)
        load_residual(p, plan, first_row, first_column, place, residual);
      load(free_stage, true);
      loader.advance(static_cast<int>(stage - free_stage));
      free_stage = stage;
      cp_async_commit();
      if (Tr::kTakesMore && (Tr::kProduct == PointwiseProduct::kTensor16 || plan.images > 0)) gate.slice = ring + stage;
      multiply(acc, gate, left);
      left -= Tr::kStep;
      const unsigned next = stage + plan.stage_bytes;
      const bool last = next == static_cast<unsigned>(plan.ring_bytes);
      const int to_next = static_cast<int>((last ? 0 : next) - stage);
      stage += to_next;
      multiply.advance(to_next, kWeightStage - (last ? weight_ring_bytes : 0));
      if constexpr (kRuns) {
        if ((plan.steps - steps) % Tr::kRunSteps == Tr::kRunSteps - 1 || steps == 1) {
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

    if (plan.keeps_weight) multiply.advance(0, -plan.weight_bytes);
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
