// The product of pointwise.cuh with global average pooling in place of y: y (images x N) holds the means of the
// finished values over the pixels of each image, and the values themselves are never in memory.
//
//        +---------+      A block has whole images, one after the other: some of its tiles end in the middle of one,
//   rows | image 0 |      none is emptier than the last. A thread finishes its sums in its registers and adds up those
//        |---------|      of its rows that are of one image; the 8 lanes of a warp that share columns then add theirs
//        by | image 1 |      exchanges that leave each lane one column (sum_over_rows), which it adds to the warp's own
//        sum
//        +---------+      of that image in shared memory. No other warp touches it, so tiles need no barrier for it.
//          columns        After the last tile the warps' sums are added and divided.
//
// Where there are few images, several blocks have a part of the pixels of one each, write their sums to scratch memory,
// and the last of them to arrive adds all up. The order of every sum depends on the plan alone.
//
// Traffic: x once for each tile of columns (from memory once), the weight once for each block, y once.
//
// Shared memory: that of pointwise.cuh, with the sums of warps, images and columns in place of the residual.
#pragma once
#include "pointwise.cuh"

namespace effkernels::cuda {

template <class T, PointwiseProduct kProduct, int kTile, PointwiseEpilogue kEpilogue, bool kConverts>
struct PointwisePoolTraits : PointwiseTraits<T, kProduct, kTile, kEpilogue, kConverts> {
  static constexpr bool kTakesMore = false;
};

// The tiles of a block: neighbours, from the first row of its images, or of its part of one, on.
struct PointwisePoolTiles {
  int64_t first;  // of its images, counted in groups of as many
  int64_t first_row;
  int count, first_column;
  static constexpr int part = 0;  // along k

  template <class Tr>
  __device__ __forceinline__ int64_t row(int tile) const {
    return first_row + tile * Tr::kRows;
  }
};

// The sum over a warp's lanes that differ in lane / 4 alone, of one of their kCount values: that of the column which is
// added to `column`.
template <int kCount, int kDistance = 16>
__device__ __forceinline__ float sum_over_rows(const float (&value)[kCount], int* column) {
  if constexpr (kDistance < 4) {
    static_assert(kCount == 1, "no more columns than lanes");
    return value[0];
  } else if constexpr (kCount == 1) {
    const float sum[1] = {value[0] + __shfl_xor_sync(0xffffffffu, value[0], kDistance)};
    return sum_over_rows<1, kDistance / 2>(sum, column);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (threadIdx.x & kDistance) != 0;
    float sum[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? value[i] : value[i + kHalf], kept = upper ? value[i + kHalf] : value[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, kDistance);
    }
    if (upper) *column += kHalf;
    return sum_over_rows<kHalf, kDistance / 2>(sum, column);
  }
}

struct PointwisePool : NothingMore {
  int64_t first_row;  // of the block's first image
  int end;            // of the block's rows, counted from there
  int part;           // of an image

  static constexpr bool kPools = true;

  // The sums of the block's columns.
  template <class Tr>
  class Columns {
   public:
    using T = typename Tr::T;
    static constexpr int kWarpsM = Tr::kShape.warps_m, kSlots = kWarpsM * Tr::kWarpsK;  // warps of the same columns
    static constexpr bool kDirect = Tr::kEpilogue != PointwiseEpilogue::kAny;

    __device__ __forceinline__ Columns(const PointwisePlan& plan, unsigned char* memory, unsigned* flag)
        : sums_(reinterpret_cast<float*>(memory)), flag_(flag) {
      const PointwisePlace<Tr> place;
      for (int i = place.lane; i < plan.images * Tr::kWarpColumns; i += 32)
        own(plan, place)[i / Tr::kWarpColumns * Tr::kColumns + place.column + i % Tr::kWarpColumns] = 0.f;
      __syncwarp();
    }

    // Adds a tile, whose sums `acc` are not finished; `through`: shared memory for them where they do not leave from
    // the registers.
    __device__ __forceinline__ void pool(const PointwiseParams& p, const PointwisePlan& plan, const PointwisePool& of,
                                         float (&acc)[Tr::M][Tr::N][4], const PointwisePlace<Tr>& place,
                                         const float* scale, float* through, int64_t tile_row) {
      const int top = static_cast<int>(tile_row - of.first_row);
      if constexpr (kDirect) {
        pool_direct(p, plan, of, acc, place, scale, top + place.row);
      } else {
        PointwiseSums<Tr> sums(through);
        sums.write(acc, place.k);
        if constexpr (Tr::kWarpsK > 1) {
          __syncthreads();
        } else {
          __syncwarp();
        }
#pragma unroll 1
        for (int v = static_cast<int>(threadIdx.x); v < PointwiseSums<Tr>::kVectors; v += Tr::kThreads) {
          const int column = PointwiseSums<Tr>::column(v);
          float value[1][Tr::kWidth];
          sums.add_up(v, value[0]);
          finish_values(p, scale + column, value[0]);
          add_images<1, Tr::kWidth>(p, plan, of, place, top + PointwiseSums<Tr>::row(v) - place.lane / 4, column,
                                    value);
        }
      }
    }

    __device__ __forceinline__ void add(const PointwiseParams&, int64_t, int, int) {}

    __device__ __forceinline__ void finish(const PointwiseParams& p, const PointwisePlan& plan,
                                           const PointwiseWork& work, const PointwisePool& of, int64_t group,
                                           int first_column) {
      const int64_t first_image = group * plan.images, left = p.batch - first_image;
      const int images = left < plan.images ? static_cast<int>(left) : plan.images;
      const float pixels = static_cast<float>(p.pixels);
      T* const y = static_cast<T*>(p.y) + first_image * p.out_channels + first_column;
      float* const partial = work.partial + first_image * p.out_channels + first_column;
      const int64_t of_part = p.batch * p.out_channels;
      __syncthreads();
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < images * Tr::kColumns; i += Tr::kThreads) {
        const int column = i % Tr::kColumns;
        if (first_column + column >= p.out_channels) continue;
        float sum = 0.f;
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) sum += sums_[slot * plan.images * Tr::kColumns + i];
        const int64_t at = i / Tr::kColumns * p.out_channels + column;
        if (plan.parts == 1) {
          y[at] = from_float<T>(sum / pixels);
        } else {
          __stcg(partial + of.part * of_part + at, sum);
        }
      }
      if (plan.parts == 1) return;
      unsigned* const arrivals = work.arrivals + group * plan.column_tiles + first_column / Tr::kColumns;
      if (!arrive_last(arrivals, static_cast<unsigned>(plan.parts), flag_)) return;
      const int column = static_cast<int>(threadIdx.x);  // parts are of one image
      if (column >= Tr::kColumns || first_column + column >= p.out_channels) return;
      float sum = 0.f;
#pragma unroll 4
      for (int other = 0; other < plan.parts; ++other) sum += __ldcg(partial + other * of_part + column);
      y[column] = from_float<T>(sum / pixels);
    }

   private:
    static_assert(Tr::kColumns <= Tr::kThreads, "a thread for each column");

    // The sums of a warp: (images, kColumns), of which it has its own columns.
    __device__ __forceinline__ float* own(const PointwisePlan& plan, const PointwisePlace<Tr>& place) const {
      return sums_ + (place.k * kWarpsM + place.row / Tr::kWarpRows) * plan.images * Tr::kColumns;
    }

    template <int kCount>
    static __device__ __forceinline__ void finish_values(const PointwiseParams& p, const float* scale,
                                                         float (&value)[kCount]) {
      float by[kCount], shift[kCount];
      read_floats(scale, by);
      read_floats(scale + Tr::kColumns, shift);
#pragma unroll
      for (int e = 0; e < kCount; ++e) value[e] = fmaf(value[e], by[e], shift[e]);
      activate<T>(value, kDirect ? Tr::kActivation : p.activation);
    }

    // From group kFirst of the fragments on, as write_direct. top: the warp's first row, counted as `end` is.
    template <int kFirst = 0>
    __device__ __forceinline__ void pool_direct(const PointwiseParams& p, const PointwisePlan& plan,
                                                const PointwisePool& of, const float (&acc)[Tr::M][Tr::N][4],
                                                const PointwisePlace<Tr>& place, const float* scale, int top) {
      if constexpr (kFirst < Tr::N) {
        constexpr int kGroup = Tr::template kGroup<kFirst>, kCount = 2 * kGroup;
        const int column = place.column + kFirst * 8 + place.lane % 4 * kCount;
        float value[2 * Tr::M][kCount];
#pragma unroll
        for (int i = 0; i < 2 * Tr::M; ++i) {
#pragma unroll
          for (int e = 0; e < kCount; ++e) value[i][e] = acc[i / 2][kFirst + e / 2][i % 2 * 2 + e % 2];
          finish_values(p, scale + column, value[i]);
        }
        add_images<2 * Tr::M, kCount>(p, plan, of, place, top, column, value);
        pool_direct<kFirst + kGroup>(p, plan, of, acc, place, scale, top);
      }
    }

    // Adds values of the rows top + g, top + g + 8, ... with g = lane / 4, of kCount columns from `column` on. All
    // lanes of a warp.
    template <int kRows, int kCount>
    __device__ __forceinline__ void add_images(const PointwiseParams& p, const PointwisePlan& plan,
                                               const PointwisePool& of, const PointwisePlace<Tr>& place, int top,
                                               int column, const float (&value)[kRows][kCount]) {
      const int last = (top + 8 * kRows < of.end ? top + 8 * kRows : of.end) - 1, g = place.lane / 4;
      if (top > last) return;
      const bool single = plan.images == 1;
      // As in PointwiseImages; a block of several images has so few rows that the quotient is exact.
      const float images_per_row = static_cast<float>(plan.images_per_row);
      const auto image_of = [&](int row) {
        return single ? 0 : static_cast<int>((static_cast<float>(row) + 0.5f) * images_per_row);
      };
      const int first_image = image_of(top), last_image = image_of(last);
      float* to = own(plan, place) + first_image * Tr::kColumns;
      // The image's rows, counted from `top`; of a single one none is outside.
      const int pixels = single ? of.end : static_cast<int>(p.pixels);
      int begin = first_image * pixels - top;
#pragma unroll 1
      for (int image = first_image; image <= last_image; ++image, begin += pixels, to += Tr::kColumns) {
        const int end = begin + pixels < of.end - top ? begin + pixels : of.end - top;
        float sum[kCount] = {};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int row = 8 * i + g;
          if (row >= begin && row < end) {
#pragma unroll
            for (int e = 0; e < kCount; ++e) sum[e] += value[i][e];
          }
        }
        int at = column;
        const float total = sum_over_rows(sum, &at);
        constexpr int kSharing = 8 / kCount;  // lanes that have the same sum
        if (g % kSharing == 0) to[at] += total;
      }
    }

    float* sums_;
    unsigned* flag_;
  };
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kResident)
    pointwise_pool(const PointwiseParams p, const PointwisePlan plan, const PointwiseWork work) {
  wait_for_previous();
  allow_next();
  const int64_t cell = divided(blockIdx.x, plan.by_columns), group = divided(cell, plan.by_parts);
  const int64_t first_image = group * plan.images, left = p.batch - first_image;
  PointwisePool of;
  of.first_row = first_image * p.pixels;
  of.part = static_cast<int>(cell - group * plan.parts);
  const int rows = static_cast<int>((left < plan.images ? left : plan.images) * p.pixels);
  const int first = of.part * plan.tiles * Tr::kRows, rest = rows - first;
  of.end = rest < plan.tiles * Tr::kRows ? rows : first + plan.tiles * Tr::kRows;
  PointwisePoolTiles tiles;
  tiles.first = group, tiles.first_row = of.first_row + first;
  tiles.count = (of.end - first + Tr::kRows - 1) / Tr::kRows;
  tiles.first_column = static_cast<int>(blockIdx.x - cell * plan.column_tiles) * Tr::kColumns;
  multiply_tiles<Tr>(p, plan, work, of, tiles);
}

template <class T, PointwiseProduct kProduct, PointwiseEpilogue kEpilogue, bool kConverts, int kTile = 0>
cudaError_t run_pool_tile(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                          const Launch& at) {
  if constexpr (kTile < kPointwiseTileCount) {
    if constexpr (pool_tile_built(kTile, kProduct, kEpilogue, kConverts))
      if (plan.tile == kTile)
        return launch(pointwise_pool<PointwisePoolTraits<T, kProduct, kTile, kEpilogue, kConverts>>, at, p, plan, work);
    return run_pool_tile<T, kProduct, kEpilogue, kConverts, kTile + 1>(p, plan, work, at);
  }
  return cudaErrorInvalidValue;
}

template <class T, PointwiseProduct kProduct>
cudaError_t run_pool_product(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                             const Launch& at) {
  if (plan.converts) return run_pool_tile<T, kProduct, PointwiseEpilogue::kAny, true>(p, plan, work, at);
  return plan.epilogue == PointwiseEpilogue::kSilu
             ? run_pool_tile<T, kProduct, PointwiseEpilogue::kSilu, false>(p, plan, work, at)
             : run_pool_tile<T, kProduct, PointwiseEpilogue::kAny, false>(p, plan, work, at);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_pointwise_pool(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                               const Launch& at) {
  if constexpr (sizeof(T) == 2) {
    return run_pool_product<T, PointwiseProduct::kTensor16>(p, plan, work, at);
  } else if (plan.product == PointwiseProduct::kMultiplyAdd) {
    return run_pool_product<T, PointwiseProduct::kMultiplyAdd>(p, plan, work, at);
  } else {
    return run_pool_product<T, PointwiseProduct::kTf32>(p, plan, work, at);
  }
}
extern template cudaError_t run_pointwise_pool<float>(const PointwiseParams&, const PointwisePlan&,
                                                      const PointwiseWork&, const Launch&);
extern template cudaError_t run_pointwise_pool<__half>(const PointwiseParams&, const PointwisePlan&,
                                                       const PointwiseWork&, const Launch&);
extern template cudaError_t run_pointwise_pool<__nv_bfloat16>(const PointwiseParams&, const PointwisePlan&,
                                                              const PointwiseWork&, const Launch&);

}  // namespace effkernels::cuda
