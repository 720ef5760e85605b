// z = weight @ (activation(norm(x)) * factor) as the product of pointwise.cuh, and mean, variance and norm of z, in one
// launch: what a training block's expansion and projection compute.
//
// x comes as it is stored. A thread turns the chunks of a stage that it copied itself into what the product reads, in
// place in shared memory and before the barrier that the stage needs anyway: once for each tile of columns, of which a
// projection has one or a few. It reads the norm's vectors and the factors of the rows' images through the L1 cache.
//
// Statistics: of z as it is stored. After a tile a thread takes its rows of a vector of columns back, from the L2
// cache, and sums distances, and their squares, from the mean of the block's tiles before (of the first tile: from its
// first row), so that nothing cancels. The block adds its threads up in order and joins the tile to those before;
// blocks are joined in two levels by those that come last (training_moments.cuh): the same bits every time.
//
// Traffic: x once for each tile of columns (from memory once), the weight once for each block, z once; 16 bytes a
// column and block written and read.
#pragma once
#include "depthwise_parameters.cuh"
#include "pointwise.cuh"
#include "training_moments.cuh"
#include "training_slope.cuh"

namespace effkernels::cuda {

// Those of the product, with what training adds to it.
template <class T, PointwiseProduct kProduct, int kTile, PointwiseEpilogue kEpilogue, bool kConverts>
struct TrainingProductTraits : PointwiseTraits<T, kProduct, kTile, kEpilogue, kConverts> {
  static constexpr int kResident = training_resident(kTile, kProduct);
  static constexpr bool kTakesMore = false;
};

struct TrainingProduct {
  const training::NormVectors& norm;
  const float* factor;
  Activation activation;
  const training::NormFold& fold;
  int fan;  // training_fan of the plan

  static constexpr bool kChanges = true, kPools = false;

  // `count` values of x from channel `first` on, in the way of the converter.
  template <class T, int V>
  __device__ __forceinline__ void change(const PointwiseParams& p, int64_t image, int64_t first, int count,
                                         Vector<T, V>& chunk) const {
    if (norm.mean == nullptr) return;
    float value[V];
    unpack(chunk, 0, value);
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (e < count) value[e] = fmaf(value[e] - norm.mean[first + e], norm.scale[first + e], norm.bias[first + e]);
    activate_as_trained<T>(value, activation);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (e >= count) break;
      if (factor != nullptr) value[e] *= factor[image * p.in_channels + first + e];
      chunk.at[e] = from_float<T>(value[e]);
    }
  }

  // The chunks of x that a thread copied: those of PointwiseShare.
  template <class Tr>
  class Rows {
   public:
    __device__ __forceinline__ Rows(const PointwiseParams& p, const PointwisePlan& plan, const TrainingProduct& of,
                                    int64_t first_row)
        : of_(of), channels_(static_cast<int>(p.in_channels)) {
      if (Tr::kConverts || of.factor == nullptr) return;
      const PointwiseImages<Tr> images(p, plan, first_row);
      const int last = rows_of_tile<Tr>(plan, first_row) - 1;
      factor_ = of.factor + images.first() * p.in_channels;
#pragma unroll
      for (int j = 0; j < Tr::kOfX; ++j) {
        const int row = share_.row + j * Tr::kRowsAtOnce;
        image_[j] = images.of(row < last ? row : last);
      }
    }

    // `k`: the first of the stage, whose copies have arrived.
    __device__ __forceinline__ void prepare(unsigned char* stage, int k) const {
      using T = typename Tr::T;
      constexpr int V = Tr::kVector;
      const int at = k + share_.chunk * V;
      if (Tr::kConverts || of_.norm.mean == nullptr || at >= channels_) return;
      unsigned char* const to = stage + share_.slice() * Tr::kXSlice + share_.in_slice;
      using Part = Vector<T, kQuad<V>>;
#pragma unroll
      for (int part = 0; part < V; part += kQuad<V>) {  // few channels at a time: the product needs the registers
        float mean[kQuad<V>], scale[kQuad<V>], bias[kQuad<V>];
        load(of_.norm.mean + at + part, mean);
        load(of_.norm.scale + at + part, scale);
        load(of_.norm.bias + at + part, bias);
#pragma unroll
        for (int j = 0; j < Tr::kOfX; ++j) {
          if (!share_.template has<Tr::kRows>(j)) continue;
          Part& place = *reinterpret_cast<Part*>(to + j * Tr::kRowsAtOnce * kPointwiseSliceBytes + part * sizeof(T));
          float value[kQuad<V>];
          unpack(place, 0, value);
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) value[i] = fmaf(value[i] - mean[i], scale[i], bias[i]);
          activate_as_trained<T>(value, of_.activation);
          if (of_.factor != nullptr) {
            float by[kQuad<V>];
            load(factor_ + int64_t(image_[j]) * channels_ + at + part, by);
#pragma unroll
            for (int i = 0; i < kQuad<V>; ++i) value[i] *= by[i];
          }
          Part raw;
#pragma unroll
          for (int i = 0; i < kQuad<V>; ++i) raw.at[i] = from_float<T>(value[i]);
          place = raw;
        }
      }
    }

   private:
    const TrainingProduct& of_;
    PointwiseShare<Tr> share_;
    int channels_;
    const float* factor_ = nullptr;  // of the tile's first image
    int image_[Tr::kOfX] = {};       // of the thread's rows, counted from it
  };

  // The statistics of a block's columns.
  template <class Tr>
  class Columns {
   public:
    using T = typename Tr::T;
    static constexpr int V = Tr::kConverts ? 1 : Tr::kVector, kVectors = Tr::kColumns / V;
    static constexpr int kLanes = Tr::kThreads / kVectors;
    static_assert(kLanes > 0 && Tr::kColumns <= Tr::kThreads, "a thread for each vector and for each column");

    __device__ __forceinline__ Columns(const PointwisePlan&, unsigned char* memory, unsigned* flag)
        : totals_(reinterpret_cast<Moments*>(memory)),
          sums_(reinterpret_cast<float*>(totals_ + Tr::kColumns)),
          flag_(flag) {
      if (threadIdx.x < Tr::kColumns) totals_[threadIdx.x] = Moments();
    }

    // Adds a tile that the block has written.
    __device__ __forceinline__ void add(const PointwiseParams& p, int64_t first_row, int rows, int first_column) {
      __syncthreads();
      const int vector = static_cast<int>(threadIdx.x) % kVectors, lane = static_cast<int>(threadIdx.x) / kVectors;
      const int column = vector * V;
      const bool exists = lane < kLanes && first_column + column < p.out_channels;
      const T* const z = static_cast<const T*>(p.y) + first_row * p.out_channels + first_column;
      if (exists) {
        float shift[V], sum[V] = {}, squares[V] = {};
        unpack(read(z + column), 0, shift);
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (totals_[column + i].count > 0.f) shift[i] = totals_[column + i].mean;
        const T* from = z + lane * p.out_channels + column;
#pragma unroll 4
        for (int row = lane; row < rows; row += kLanes, from += kLanes * p.out_channels) {
          float value[V];
          unpack(read(from), 0, value);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float distance = value[i] - shift[i];
            sum[i] += distance;
            squares[i] = fmaf(distance, distance, squares[i]);
          }
        }
        float* const to = sums_ + 2 * (lane * Tr::kColumns + column);
#pragma unroll
        for (int i = 0; i < V; ++i) to[2 * i] = sum[i], to[2 * i + 1] = squares[i];
      }
      __syncthreads();
      const int own = static_cast<int>(threadIdx.x);
      if (own < Tr::kColumns && first_column + own < p.out_channels) {
        const Moments before = totals_[own];
        const float count = static_cast<float>(rows);
        float sum = 0.f, squares = 0.f;
#pragma unroll 8
        for (int other = 0; other < kLanes; ++other) {
          const float2 two = *reinterpret_cast<const float2*>(sums_ + 2 * (other * Tr::kColumns + own));
          sum += two.x, squares += two.y;
        }
        const float rest = sum / count;
        Moments tile = {before.mean, rest, fmaxf(fmaf(-rest, sum, squares), 0.f), count};
        if (before.count == 0.f) tile.mean = to_float(__ldcg(z + own));
        Moments total = before;
        total.join(tile);
        totals_[own] = total;
      }
    }

    __device__ __forceinline__ void finish(const PointwiseParams& p, const PointwisePlan& plan,
                                           const PointwiseWork& work, const TrainingProduct& of, int64_t group,
                                           int first_column) {
      Moments* const partial = reinterpret_cast<Moments*>(work.partial);
      const int own = static_cast<int>(threadIdx.x);
      if (own < Tr::kColumns && first_column + own < p.out_channels)
        partial[group * p.out_channels + first_column + own] = totals_[own];
      const int64_t nodes = (plan.row_groups + of.fan - 1) / of.fan;
      join_blocks(plan.row_groups, of.fan, group, work.arrivals + first_column / Tr::kColumns * (nodes + 1), flag_,
                  [&](int64_t first, int count, int64_t to) {
                    join_moments(partial, first, count, to, p.out_channels, first_column, Tr::kColumns, of.fold,
                                 reinterpret_cast<Moments*>(sums_));
                  });
    }

   private:
    // What the block wrote: the cache of the multiprocessor may hold older values.
    static __device__ __forceinline__ Vector<T, V> read(const T* from) {
      Vector<T, V> raw;
      if constexpr (sizeof(raw) == 16) {
        const uint4 words = __ldcg(reinterpret_cast<const uint4*>(from));
        memcpy(&raw, &words, sizeof(raw));
      } else {
        raw.at[0] = __ldcg(from);
      }
      return raw;
    }

    Moments* totals_;
    float* sums_;  // of lanes and columns: distances and their squares
    unsigned* flag_;
  };
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kResident)
    training_product(const training::ProductParams p, const PointwisePlan plan, const PointwiseWork work,
                     const int fan) {
  multiply_tiles<Tr>(p.product, plan, work, TrainingProduct{p.norm, p.factor, p.activation, p.fold, fan});
}

template <class T, PointwiseProduct kProduct, PointwiseEpilogue kEpilogue, bool kConverts, int kTile = 0>
cudaError_t run_training_tile(const training::ProductParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                              const Launch& at) {
  if constexpr (kTile < kPointwiseTileCount) {
    if constexpr (training_tile_built(kTile, kProduct, kEpilogue, kConverts))
      if (plan.tile == kTile)
        return launch(training_product<TrainingProductTraits<T, kProduct, kTile, kEpilogue, kConverts>>, at, p, plan,
                      work, training_fan(plan));
    return run_training_tile<T, kProduct, kEpilogue, kConverts, kTile + 1>(p, plan, work, at);
  }
  return cudaErrorInvalidValue;
}

template <class T, PointwiseProduct kProduct>
cudaError_t run_training_of(const training::ProductParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                            const Launch& at) {
  if (plan.converts) return run_training_tile<T, kProduct, PointwiseEpilogue::kAny, true>(p, plan, work, at);
  return plan.epilogue == PointwiseEpilogue::kIdentity
             ? run_training_tile<T, kProduct, PointwiseEpilogue::kIdentity, false>(p, plan, work, at)
             : run_training_tile<T, kProduct, PointwiseEpilogue::kAny, false>(p, plan, work, at);
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_training_product(const training::ProductParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                                 const Launch& at) {
  if constexpr (sizeof(T) == 2) {
    return run_training_of<T, PointwiseProduct::kTensor16>(p, plan, work, at);
  } else if (plan.product == PointwiseProduct::kMultiplyAdd) {
    return run_training_of<T, PointwiseProduct::kMultiplyAdd>(p, plan, work, at);
  } else {
    return run_training_of<T, PointwiseProduct::kTf32>(p, plan, work, at);
  }
}
extern template cudaError_t run_training_product<float>(const training::ProductParams&, const PointwisePlan&,
                                                        const PointwiseWork&, const Launch&);
extern template cudaError_t run_training_product<__half>(const training::ProductParams&, const PointwisePlan&,
                                                         const PointwiseWork&, const Launch&);
extern template cudaError_t run_training_product<__nv_bfloat16>(const training::ProductParams&, const PointwisePlan&,
                                                                const PointwiseWork&, const Launch&);

}  // namespace effkernels::cuda
