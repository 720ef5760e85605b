// From the sums of a tile to y: scale and shift, activation, residual, stores. A thread's sums of a row are those of
// neighbouring columns (column_of in pointwise_load.cuh): 16 bytes of y, or what is left of the warp's columns.
//
// write_direct: everything stays in registers. write_through_shared: the sums go to shared memory first, where the
// warps along k find each other's, and a loop that is not unrolled takes them from there: one copy of the code of every
// activation. Where blocks share a tile along k they write their sums to scratch memory, and the last one to arrive
// adds them, in the order of the parts.
#pragma once
#include "arrival.cuh"
#include "pointwise_load.cuh"

namespace effkernels::cuda {

template <int kCount>
__device__ __forceinline__ void read_floats(const float* from, float (&to)[kCount]) {
  const Vector<float, kCount> all = *reinterpret_cast<const Vector<float, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = all.at[i];
}

// The position of a thread in its warp, and of the warp in the tile.
template <class Tr>
struct PointwisePlace {
  int lane, k, row, column;  // k: of the warps along k; row, column: the warp's first of the tile

  __device__ __forceinline__ PointwisePlace() {
    const unsigned warp = threadIdx.x / 32;
    constexpr unsigned kM = Tr::kShape.warps_m, kN = Tr::kShape.warps_n;
    lane = static_cast<int>(threadIdx.x % 32);
    k = Tr::kWarpsK == 1 ? 0 : static_cast<int>(warp / (kM * kN));
    row = static_cast<int>(kN * Tr::kWarpsK == 1 ? warp : warp % kM) * Tr::kWarpRows;
    column = static_cast<int>(warp / kM % kN) * Tr::kWarpColumns;
  }
};

// The residual under a tile, by cp.async: rows of kColumns in shared memory. A warp loads what it reads itself, or the
// block loads all of it where warps along k share the tile. Outside of y the last rows and columns are repeated.
template <class Tr>
__device__ __forceinline__ void load_residual(const PointwiseParams& p, const PointwisePlan& plan, int64_t first_row,
                                              int first_column, const PointwisePlace<Tr>& place, unsigned char* to) {
  using T = typename Tr::T;
  constexpr bool kOwn = Tr::kWarpsK == 1;
  constexpr int kRows = kOwn ? Tr::kWarpRows : Tr::kRows, kLanes = kOwn ? 32 : Tr::kThreads;
  constexpr int kVectors = (kOwn ? Tr::kWarpColumns : Tr::kColumns) / Tr::kVector;
  const int top = kOwn ? place.row : 0, left = kOwn ? place.column : 0;
  const int last_row = rows_of_tile<Tr>(plan, first_row) - 1;
  const int last_column = static_cast<int>(p.out_channels) - Tr::kVector - first_column;
  const T* const residual = static_cast<const T*>(p.residual) + first_row * p.residual_stride_p + first_column;
#pragma unroll 1
  for (int i = kOwn ? place.lane : static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kLanes) {
    const int row = top + i / kVectors, column = left + i % kVectors * Tr::kVector;
    cp_async_16(shared_address(to + (row * Tr::kColumns + column) * sizeof(T)),
                residual + (row < last_row ? row : last_row) * p.residual_stride_p +
                    (column < last_column ? column : last_column));
  }
}

// kCount values of a row, read as words: a Vector by itself would be read byte by byte.
template <class T, int kCount>
__device__ __forceinline__ void add_residual(const unsigned char* residual, float (&value)[kCount]) {
  struct alignas(kCount * sizeof(T)) Words {
    uint32_t at[kCount * sizeof(T) / 4];
  };
  const Words words = *reinterpret_cast<const Words*>(residual);
  Vector<T, kCount> raw;
  memcpy(&raw, &words, sizeof(raw));
  float added[kCount];
  unpack(raw, 0, added);
#pragma unroll
  for (int e = 0; e < kCount; ++e) value[e] += added[e];
}

// From group kFirst of the fragments on. `scale`, `residual`, `y`: at the thread's row g of the warp's first fragment
// and the warp's first column. rows, columns: how many there are from there on.
template <class Tr, int kFirst = 0>
__device__ __forceinline__ void write_direct(const PointwiseParams& p, const float (&acc)[Tr::M][Tr::N][4],
                                             const float* scale, const unsigned char* residual, typename Tr::T* y,
                                             int rows, int columns) {
  using T = typename Tr::T;
  if constexpr (kFirst < Tr::N) {
    constexpr int kGroup = Tr::template kGroup<kFirst>, kCount = 2 * kGroup;
    // A warp with so many sums has no register for it meanwhile.
    const unsigned thread = Tr::N > 16 ? thread_here() : threadIdx.x;
    const int column = kFirst * 8 + static_cast<int>(thread % 4) * kCount;
    float by[kCount], shift[kCount];
    read_floats(scale + column, by);
    read_floats(scale + Tr::kColumns + column, shift);
    const int rows_here = column < columns ? rows : 0;
    const unsigned distance = 8 * static_cast<unsigned>(p.out_channels);
    T* to = y + column;
#pragma unroll
    for (int i = 0; i < Tr::M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8;
        float value[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) value[e] = fmaf(acc[i][kFirst + e / 2][half * 2 + e % 2], by[e], shift[e]);
        activate<T>(value, Tr::kActivation);
        if (Tr::kTakesMore && p.residual != nullptr)
          add_residual<T>(residual + (row * Tr::kColumns + column) * sizeof(T), value);
        if (row < rows_here) store_global(to, value);
        to += distance;
      }
    write_direct<Tr, kFirst + kGroup>(p, acc, scale, residual, y, rows, columns);
  }
}

// The sums of a tile in shared memory: those of each warp along k, as vectors of kWidth columns of a row, the vectors
// in planes of 16 bytes. Vector v is of thread v % kLayer of a layer of warps along m and n.
template <class Tr>
class PointwiseSums {
 public:
  static constexpr int kWidth = Tr::kWidth, kGroups = Tr::kWarpColumns / (4 * kWidth);
  static constexpr int kVectors = Tr::kRows * Tr::kColumns / kWidth, kLayer = Tr::kThreads / Tr::kWarpsK;
  static constexpr int kPlanes = kWidth / 4;
  static_assert(Tr::kWarpColumns % (4 * kWidth) == 0 && kWidth % 4 == 0, "vectors of one width");

  __device__ __forceinline__ explicit PointwiseSums(float* at) : at_(reinterpret_cast<float4*>(at)) {}

  __device__ __forceinline__ void write(const float (&acc)[Tr::M][Tr::N][4], int warp_k) {
    float4* const to = at_ + warp_k * kPlanes * kVectors + static_cast<int>(threadIdx.x) % kLayer;
#pragma unroll
    for (int i = 0; i < Tr::M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < Tr::N; j += 2) {  // two fragments fill a plane
          const int slot = (i * 2 + half) * kGroups + j / (kWidth / 2), plane = j % (kWidth / 2) / 2;
          const float *const low = acc[i][j] + half * 2, *const high = acc[i][j + 1] + half * 2;
          to[plane * kVectors + slot * kLayer] = make_float4(low[0], low[1], high[0], high[1]);
        }
  }

  __device__ __forceinline__ void add_up(int v, float (&sums)[kWidth]) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      float4 sum = at_[plane * kVectors + v];
#pragma unroll
      for (int k = 1; k < Tr::kWarpsK; ++k) {
        const float4 more = at_[(k * kPlanes + plane) * kVectors + v];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      sums[plane * 4] = sum.x, sums[plane * 4 + 1] = sum.y, sums[plane * 4 + 2] = sum.z, sums[plane * 4 + 3] = sum.w;
    }
  }
  // Element e of vector v.
  __device__ __forceinline__ float add_up_one(int v, int e) const {
    const float* const from = reinterpret_cast<const float*>(at_ + e / 4 * kVectors + v) + e % 4;
    float sum = *from;
#pragma unroll
    for (int k = 1; k < Tr::kWarpsK; ++k) sum += from[k * kPlanes * kVectors * 4];
    return sum;
  }

  static __device__ __forceinline__ int row(int v) {
    const int thread = v % kLayer;
    return thread / 32 % Tr::kShape.warps_m * Tr::kWarpRows + v / kLayer / kGroups * 8 + thread % 32 / 4;
  }
  static __device__ __forceinline__ int column(int v) {  // the first
    const int thread = v % kLayer;
    return thread / 32 / Tr::kShape.warps_m * Tr::kWarpColumns + v / kLayer % kGroups * (4 * kWidth) +
           thread % 4 * kWidth;
  }

 private:
  float4* at_;
};

// The sums of a warp are written; those that a thread reads were written by itself, but for warps along k.
template <class Tr>
__device__ __forceinline__ void write_through_shared(const PointwiseParams& p, const PointwisePlan& plan,
                                                     const PointwiseWork& work, const PointwiseSums<Tr>& sums,
                                                     const float* scale, const unsigned char* residual, unsigned* flag,
                                                     int64_t first_row, int row_count, int first_column, int part,
                                                     int64_t tile) {
  using T = typename Tr::T;
  constexpr int kWidth = Tr::kWidth;
  const bool shared = plan.parts > 1;
#pragma unroll 1
  for (int pass = shared ? 0 : 1; pass < 2; ++pass) {
    if (shared && pass == 1 && !arrive_last(work.arrivals + tile, static_cast<unsigned>(plan.parts), flag)) break;
#pragma unroll 1
    for (int v = static_cast<int>(threadIdx.x); v < PointwiseSums<Tr>::kVectors; v += Tr::kThreads) {
      const int row = PointwiseSums<Tr>::row(v), column = PointwiseSums<Tr>::column(v);
      if (row >= row_count || first_column + column >= p.out_channels) continue;
      const int64_t at = (first_row + row) * p.out_channels + first_column + column;
      float value[kWidth];
      if (pass == 0 || !shared) {
        sums.add_up(v, value);
      } else {
        const int64_t part_floats = plan.rows * p.out_channels;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) value[e] = 0.f;
#pragma unroll 4
        for (int other = 0; other < plan.parts; ++other)
#pragma unroll
          for (int e = 0; e < kWidth; e += 4) {
            const float4 more = __ldcg(reinterpret_cast<const float4*>(work.partial + other * part_floats + at + e));
            value[e] += more.x, value[e + 1] += more.y, value[e + 2] += more.z, value[e + 3] += more.w;
          }
      }
      if (pass == 0) {
        float4* const to = reinterpret_cast<float4*>(work.partial + part * (plan.rows * p.out_channels) + at);
#pragma unroll
        for (int e = 0; e < kWidth; e += 4)
          __stcg(to + e / 4, make_float4(value[e], value[e + 1], value[e + 2], value[e + 3]));
        continue;
      }
      float by[kWidth], shift[kWidth];
      read_floats(scale + column, by);
      read_floats(scale + Tr::kColumns + column, shift);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value[e] = fmaf(value[e], by[e], shift[e]);
      activate<T>(value, p.activation);
      if (p.residual != nullptr) add_residual<T>(residual + (row * Tr::kColumns + column) * sizeof(T), value);
      store_global(static_cast<T*>(p.y) + at, value);
    }
  }
}

// Element by element, any strides and alignment. Reads what other threads wrote.
template <class Tr>
__device__ __forceinline__ void write_elements(const PointwiseParams& p, const PointwiseSums<Tr>& sums,
                                               const float* scale, int64_t first_row, int row_count, int first_column) {
  using T = typename Tr::T;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tr::kRows * Tr::kColumns; i += Tr::kThreads) {
    const int v = i / Tr::kWidth, e = i % Tr::kWidth;
    const int row = PointwiseSums<Tr>::row(v), column = PointwiseSums<Tr>::column(v) + e;
    if (row >= row_count || first_column + column >= p.out_channels) continue;
    float value[1] = {fmaf(sums.add_up_one(v, e), scale[column], scale[Tr::kColumns + column])};
    activate<T>(value, p.activation);
    if (p.residual != nullptr) {
      const int64_t image = (first_row + row) / p.pixels, pixel = first_row + row - image * p.pixels;
      value[0] += to_float(static_cast<const T*>(
          p.residual)[image * p.residual_stride_n + pixel * p.residual_stride_p + first_column + column]);
    }
    static_cast<T*>(p.y)[(first_row + row) * p.out_channels + first_column + column] = from_float<T>(value[0]);
  }
}

}  // namespace effkernels::cuda
