// How the slices of x and weight come into shared memory: by cp.async where types and alignment allow it, else through
// registers with a conversion. Both fill the same places: what lies outside of x or weight becomes zero.
#pragma once
#include "pointwise_product.cuh"

namespace effkernels::cuda {

template <class T_, PointwiseProduct kProduct_, int kTile, bool kConverts_>
struct PointwiseTraits {
  using T = T_;
  static constexpr PointwiseProduct kProduct = kProduct_;
  static constexpr PointwiseTile kShape = kPointwiseTiles[kTile];
  static constexpr int kResident = pointwise_resident(kTile, kProduct);
  static constexpr bool kConverts = kConverts_;
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kThreads = kShape.threads();
  static constexpr int kWarpRows = kRows / kShape.warps_m, kWarpColumns = kColumns / kShape.warps_n;
  static constexpr int M = kWarpRows / 16, N = kWarpColumns / 8;  // fragments of a warp
  static constexpr int kVector = kVectorOf<T>;
  static constexpr int kSlice = kSliceChunks * kVector;                         // k of a slice
  static constexpr int kStep = kSlice * kShape.warps_k;                         // k of a stage
  static constexpr int kSliceSpan = (kRows + kColumns) * kPointwiseSliceBytes;  // x, then weight
  static constexpr int kStageBytes = kSliceSpan * kShape.warps_k;
  static constexpr int kChunks = kSliceChunks * kShape.warps_k;  // of 16 bytes, along k, in a stage
  static constexpr int kRowsAtOnce = kThreads / kChunks;         // rows that the block loads with one instruction
  static constexpr int kSumStride = kColumns + 8;                // floats: the next row is 8 banks further
  static constexpr int kRunSteps = 4;

  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "ldmatrix reads 16 rows and 16 columns");
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's rows is the same for all of them");
  static_assert(kRows % kRowsAtOnce == 0 && kColumns % kRowsAtOnce == 0, "no thread loads less than another");
  static_assert(sizeof(T) == (kProduct == PointwiseProduct::kTensor16 ? 2 : 4), "what the product reads");
};

// Where the rows of a tile lie.
struct PointwiseRows {
  int64_t first_image, first_pixel, pixels;

  __device__ __forceinline__ PointwiseRows(int64_t first_row, int64_t pixels_of_image)
      : first_image(first_row / pixels_of_image), first_pixel(first_row % pixels_of_image), pixels(pixels_of_image) {}

  // The image of row `row` of the tile, counted from the tile's first, and the pixel in it.
  __device__ __forceinline__ int locate(int row, int64_t* pixel) const {
    *pixel = first_pixel + row;
    if (*pixel < pixels) return 0;
    *pixel -= pixels;
    if (*pixel < pixels) return 1;
    const unsigned small = static_cast<unsigned>(pixels), rest = static_cast<unsigned>(*pixel);  // both below `row`
    *pixel = rest % small;
    return 1 + static_cast<int>(rest / small);
  }
};

// What a thread loads of every stage: chunk `chunk` along k of rows `row`, row + kRowsAtOnce, ... of x, then of weight.
template <class Tr>
struct PointwiseShare {
  int row, chunk, offset;  // offset: of the first one in the stage, in bytes

  __device__ __forceinline__ PointwiseShare()
      : row(static_cast<int>(threadIdx.x) / Tr::kChunks), chunk(static_cast<int>(threadIdx.x) % Tr::kChunks) {
    offset = chunk / kSliceChunks * Tr::kSliceSpan + chunk_offset(row, chunk % kSliceChunks);
  }
};

template <class Tr>
class PointwiseCopier {
 public:
  using T = typename Tr::T;

  __device__ __forceinline__ PointwiseCopier(const PointwiseParams& p, const PointwisePlan&, const PointwiseRows& rows,
                                             int64_t rows_left, int first_column)
      : p_(p) {
#pragma unroll
    for (int j = 0; j < kOfX; ++j) {
      const int row = share_.row + j * Tr::kRowsAtOnce;
      x_[j] = static_cast<const T*>(p.x);
      if (row >= rows_left) continue;
      inside_ |= 1u << j;
      int64_t pixel;
      const int64_t image = rows.first_image + rows.locate(row, &pixel);
      x_[j] += image * p.x_stride_n + pixel * p.x_stride_p + share_.chunk * Tr::kVector;
    }
    const int column = first_column + share_.row;
    weight_ = static_cast<const T*>(p.weight.data) + column * p.in_channels + share_.chunk * Tr::kVector;
#pragma unroll
    for (int j = 0; j < kOfWeight; ++j)
      if (column + j * Tr::kRowsAtOnce < p.out_channels) inside_ |= 1u << (kOfX + j);
  }

  __device__ __forceinline__ void load(unsigned char* stage, int first_k) const {
    const SharedAddress to = shared_address(stage + share_.offset);
    const unsigned inside = first_k + share_.chunk * Tr::kVector < p_.in_channels ? inside_ : 0;
#pragma unroll
    for (int j = 0; j < kOfX + kOfWeight; ++j) {
      const bool copied = inside >> j & 1;
      const T* from = static_cast<const T*>(p_.weight.data);  // somewhere, where nothing is read
      if (copied) {
        if (j < kOfX) {
          from = x_[j < kOfX ? j : 0] + first_k;
        } else {
          from = weight_ + (j - kOfX) * Tr::kRowsAtOnce * p_.in_channels + first_k;
        }
      }
      cp_async_16(to + j * Tr::kRowsAtOnce * kPointwiseSliceBytes, from, copied ? 16 : 0);
    }
  }

 private:
  static constexpr int kOfX = Tr::kRows / Tr::kRowsAtOnce, kOfWeight = Tr::kColumns / Tr::kRowsAtOnce;
  static_assert(kOfX + kOfWeight <= 32, "a bit for each");

  PointwiseShare<Tr> share_;
  const T* x_[kOfX];
  const T* weight_;
  unsigned inside_ = 0;
  const PointwiseParams& p_;
};

// Also multiplies the gate in. Finds its rows anew at every stage: pointers in an array would need a loop unrolled
// around all the conversions.
template <class Tr>
class PointwiseConverter {
 public:
  using T = typename Tr::T;

  __device__ __forceinline__ PointwiseConverter(const PointwiseParams& p, const PointwisePlan& plan,
                                                const PointwiseRows& rows, int64_t rows_left, int first_column)
      : p_(p), rows_(rows), rows_left_(rows_left), first_column_(first_column), x_vectors_(plan.x_vectors) {}

  __device__ __forceinline__ void load(unsigned char* stage, int first_k) const {
    const int64_t k = first_k + share_.chunk * Tr::kVector;
    const int count = k + Tr::kVector <= p_.in_channels ? Tr::kVector : static_cast<int>(p_.in_channels - k);
#pragma unroll 1
    for (int row = share_.row, to = share_.offset; row < Tr::kRows + Tr::kColumns;
         row += Tr::kRowsAtOnce, to += Tr::kRowsAtOnce * kPointwiseSliceBytes) {
      Vector<T, Tr::kVector> chunk;
#pragma unroll
      for (int e = 0; e < Tr::kVector; ++e) chunk.at[e] = from_float<T>(0.f);
      if (row < Tr::kRows) {
        if (row < rows_left_ && count > 0) x_chunk(row, k, count, &chunk);
      } else {
        const int64_t column = first_column_ + row - Tr::kRows;
        if (column < p_.out_channels) {
#pragma unroll
          for (int e = 0; e < Tr::kVector; ++e)
            if (e < count) chunk.at[e] = from_float<T>(parameter(p_.weight, column * p_.in_channels + k + e, 0.f));
        }
      }
      *reinterpret_cast<Vector<T, Tr::kVector>*>(stage + to) = chunk;
    }
  }

 private:
  __device__ __forceinline__ void x_chunk(int row, int64_t k, int count, Vector<T, Tr::kVector>* chunk) const {
    int64_t pixel;
    const int64_t image = rows_.first_image + rows_.locate(row, &pixel);
    const T* from = static_cast<const T*>(p_.x) + image * p_.x_stride_n + pixel * p_.x_stride_p + k;
    if (x_vectors_) {
      *chunk = load_raw<T, Tr::kVector>(from);
    } else {
#pragma unroll
      for (int e = 0; e < Tr::kVector; ++e)
        if (e < count) chunk->at[e] = load_global(from + e);
    }
    if (p_.gate.data == nullptr) return;
#pragma unroll
    for (int e = 0; e < Tr::kVector; ++e) {
      if (e >= count) break;
      const T by = from_float<T>(parameter(p_.gate, image * p_.in_channels + k + e, 1.f));
      chunk->at[e] = from_float<T>(to_float(chunk->at[e]) * to_float(by));
    }
  }

  PointwiseShare<Tr> share_;
  const PointwiseParams& p_;
  const PointwiseRows& rows_;
  int64_t rows_left_;
  int first_column_;
  bool x_vectors_;
};

}  // namespace effkernels::cuda
