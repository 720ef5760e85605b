// The slices of x and weight are copied to shared memory by cp.async where types and alignment allow it, else through
// registers with a conversion. Both fill the same places: input channels outside of x and weight become zero, rows and
// columns outside repeat the last one, and their sums are not stored.
//
// A thread of a warp is to hold sums of neighbouring columns, as many as fill 16 bytes of y: two columns of each of a
// group of fragments. So the rows of the weight have another order in shared memory: see column_of.
#pragma once
#include "pointwise_product.cuh"

namespace effkernels::cuda {

constexpr int pointwise_group(int first, int fragments, int most) {
  int size = most;
  while (size > 1 && size > fragments - first) size /= 2;
  return size;
}

template <class T_, PointwiseProduct kProduct_, int kTile, PointwiseEpilogue kEpilogue_, bool kConverts_>
struct PointwiseTraits {
  using T = T_;
  static constexpr PointwiseProduct kProduct = kProduct_;
  static constexpr PointwiseEpilogue kEpilogue = kEpilogue_;
  static constexpr PointwiseTile kShape = kPointwiseTiles[kTile];
  static constexpr int kResident = pointwise_resident(kTile, kProduct);
  static constexpr bool kConverts = kConverts_;
  // Gate and residual in shared memory: not converted, and not for an expansion.
  static constexpr bool kTakesMore = !kConverts && kEpilogue != PointwiseEpilogue::kSilu;
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kThreads = kShape.threads();
  static constexpr int kWarpsK = kShape.warps_k;
  static constexpr int kWarpRows = kShape.warp_rows(), kWarpColumns = kShape.warp_columns();
  static constexpr int M = kWarpRows / 16, N = kWarpColumns / 8;  // fragments of a warp
  static constexpr int kVector = kVectorOf<T>;
  static constexpr int kSlice = kSliceChunks * kVector;                 // k of a slice
  static constexpr int kStep = kSlice * kWarpsK;                        // k of a stage
  static constexpr int kXSlice = kRows * kPointwiseSliceBytes;          // bytes
  static constexpr int kWeightSlice = kColumns * kPointwiseSliceBytes;  // bytes
  static constexpr int kChunks = kSliceChunks * kWarpsK;                // of 16 bytes, along k, in a stage
  static constexpr int kRowsAtOnce = kThreads / kChunks;                // rows that the block loads at once
  static constexpr int kOfX = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;  // loads of a thread
  static constexpr int kOfWeight = (kColumns + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kRunSteps = 4;

  // Fragments of the group that begins with fragment kFirst: a power of two, 16 bytes of y for a thread or less.
  template <int kFirst>
  static constexpr int kGroup = pointwise_group(kFirst, N, kVector / 2);
  static constexpr int kWidth = 2 * pointwise_group(0, N, kVector / 2);  // columns of a thread in the first group
  static constexpr int kFull = N / (kWidth / 2) * (kWidth / 2);          // fragments in groups as large as the first
  static constexpr int kRest = pointwise_group(kFull, N, kVector / 2);
  static constexpr Activation kActivation =
      kEpilogue == PointwiseEpilogue::kSilu ? Activation::kSilu : Activation::kIdentity;

  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 8 == 0, "fragments of 16 rows and 8 columns");
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's rows is the same for all of them");
  static_assert(sizeof(T) == (kProduct == PointwiseProduct::kTensor16 ? 2 : 4), "what the product reads");

  // The column of the tile whose weights are in row `row` of a slice. With fragment j of a group of G it is, for
  // column n of the fragment, 2G (n / 2) + 2j + n % 2 of the group: see the sums of a thread in pointwise_product.cuh.
  static __device__ __forceinline__ int column_of(int row) {
    const int fragment = row % kWarpColumns / 8, n = row % 8;
    int first = 0, size = kWidth / 2;
    if (kFull < N && fragment >= kFull) {
      first = kFull, size = kRest;
      if (fragment >= first + size) first += size, size = 1;
    }
    const int j = (fragment - first) % size;
    return row / kWarpColumns * kWarpColumns + 8 * (fragment - j) + 2 * size * (n / 2) + 2 * j + n % 2;
  }
};

// The images that the rows of a tile belong to. Without a 64-bit division, which takes some hundred instructions.
template <class Tr>
class PointwiseImages {
 public:
  __device__ __forceinline__ PointwiseImages(const PointwiseParams& p, const PointwisePlan& plan, int64_t first_row)
      : images_per_row_(static_cast<float>(plan.images_per_row)) {
    first_ = static_cast<int64_t>(static_cast<double>(first_row) * plan.images_per_row);  // at most one off
    int64_t left = (first_ + 1) * p.pixels - first_row;
    if (left <= 0) left += p.pixels, ++first_;
    if (left > p.pixels) left -= p.pixels, --first_;
    left_ = left < Tr::kRows ? static_cast<int>(left) : Tr::kRows;
    pixels_ = p.pixels < Tr::kRows ? static_cast<int>(p.pixels) : Tr::kRows;
  }

  __device__ __forceinline__ int64_t first() const { return first_; }
  // Of row `row` of the tile, counted from the tile's first. Half a row more keeps the quotient's rounding off the
  // whole numbers.
  __device__ __forceinline__ int of(int row) const {
    if (row < left_) return 0;
    return pixels_ == Tr::kRows ? 1 : 1 + static_cast<int>((static_cast<float>(row - left_) + 0.5f) * images_per_row_);
  }

 private:
  int64_t first_;
  int left_, pixels_;  // rows of the first image in the tile; of every image; as many as the tile has, or fewer
  float images_per_row_;
};

// Rows of a tile that there are, of the kRows.
template <class Tr>
__device__ __forceinline__ int rows_of_tile(const PointwisePlan& plan, int64_t first_row) {
  const int64_t left = plan.rows - first_row;
  return left < Tr::kRows ? static_cast<int>(left) : Tr::kRows;
}

// The share of every stage that a thread loads: chunk `chunk` along k of rows `row`, row + kRowsAtOnce, ... of x and of
// weight.
template <class Tr>
struct PointwiseShare {
  int row, chunk;
  int in_slice;  // offset of the first one in a slice, in bytes

  __device__ __forceinline__ PointwiseShare()
      : row(static_cast<int>(threadIdx.x / Tr::kChunks)), chunk(static_cast<int>(threadIdx.x % Tr::kChunks)) {
    in_slice = chunk_offset(row, chunk % kSliceChunks);
  }
  __device__ __forceinline__ int slice() const { return Tr::kWarpsK == 1 ? 0 : chunk / kSliceChunks; }
  // True if the thread has a load `j` of `rows` rows; a constant where all threads load as much.
  template <int kRows>
  __device__ __forceinline__ bool has(int j) const {
    return (j + 1) * Tr::kRowsAtOnce <= kRows || row + j * Tr::kRowsAtOnce < kRows;
  }
};

template <class Tr>
class PointwiseCopier {
 public:
  using T = typename Tr::T;

  template <class More>
  __device__ __forceinline__ PointwiseCopier(const PointwiseParams& p, const PointwisePlan& plan, int first_column,
                                             unsigned char* ring, unsigned char* weights, const More&)
      : p_(p), plan_(plan), weights_(weights) {
    move_stage(ring);
    to_weight_ = first_weight();
    weight_ = bytes_of(static_cast<const T*>(p.weight.data) + first_column * p.in_channels);
    const int last = static_cast<int>(p.out_channels) - 1 - first_column;
#pragma unroll
    for (int j = 0; j < Tr::kOfWeight; ++j) {
      const int column = Tr::column_of(share_.row + j * Tr::kRowsAtOnce);
      weight_rows_[j] = static_cast<unsigned>(column < last ? column : last) *
                        static_cast<unsigned>(p.in_channels * static_cast<int>(sizeof(T)));
    }
  }

  // To the tile of rows from `first_row` on, and to the first k of them.
  __device__ __forceinline__ void move(int64_t first_row, int first_k) {
    at_ = static_cast<unsigned>(first_k + share_.chunk * Tr::kVector) * static_cast<unsigned>(sizeof(T));
    const int last = rows_of_tile<Tr>(plan_, first_row) - 1;
    x_ = bytes_of(static_cast<const T*>(p_.x) + first_row * p_.x_stride_p);
#pragma unroll
    for (int j = 0; j < Tr::kOfX; ++j) {
      const int row = share_.row + j * Tr::kRowsAtOnce;
      x_rows_[j] = static_cast<unsigned>(row < last ? row : last) *
                   static_cast<unsigned>(p_.x_stride_p * static_cast<int>(sizeof(T)));
    }
    if (Tr::kTakesMore && plan_.images > 0) {
      const int64_t image = PointwiseImages<Tr>(p_, plan_, first_row).first(), left = p_.batch - 1 - image;
      gate_ = bytes_of(static_cast<const T*>(p_.gate.data) + image * p_.in_channels);
      last_gate_ = left < plan_.images ? static_cast<int>(left) : plan_.images;
      gate_row_ = gate_offset(share_.row);
    }
  }

  // To the next stage. `k`: the first of it.
  __device__ __forceinline__ void load_weight(int k) {
    const unsigned chunk = static_cast<unsigned>(k + share_.chunk * Tr::kVector);
    copy_weight(Inside(p_, chunk * static_cast<unsigned>(sizeof(T))));
  }
  // The same after load_x of this k. The tile of 40 columns has no register to keep the chunk's place in meanwhile.
  __device__ __forceinline__ void load_weight_too(int k) {
    if constexpr (Tr::kColumns == 40) {
      load_weight(k);
    } else {
      copy_weight(inside_);
    }
  }

  // To a stage of the ring. Formed for each tile: what leads to it needs no register meanwhile.
  __device__ __forceinline__ void move_stage(unsigned char* stage) {
    to_x_ = shared_address(stage + share_.slice() * Tr::kXSlice + share_.in_slice);
    to_gates_ = shared_address(stage + Tr::kWarpsK * Tr::kXSlice + share_.chunk % kSliceChunks * 16) +
                (share_.slice() * plan_.images + share_.row) * kPointwiseGateBytes;
  }
  // To another stage, `bytes` further.
  __device__ __forceinline__ void advance(int bytes) {
    to_x_ += bytes;
    if (Tr::kTakesMore) to_gates_ += bytes;
  }

  // No branch in the code between the copies: the compiler puts three instructions that do nothing in front of one that
  // follows a branch.
  __device__ __forceinline__ void load_x(unsigned, int) {
    inside_ = Inside(p_, at_);
    at_ += Tr::kStep * sizeof(T);
#pragma unroll
    for (int j = 0; j < Tr::kOfX; ++j)
      cp_async_16_if(share_.template has<Tr::kRows>(j), to_x_ + j * Tr::kRowsAtOnce * kPointwiseSliceBytes,
                     x_ + x_rows_[j] + inside_.at, inside_.bytes);
    if constexpr (Tr::kTakesMore)
      cp_async_16_if(share_.row < plan_.images, to_gates_, gate_ + gate_row_ + inside_.at, inside_.bytes);
  }

  // Those of images after the first kRowsAtOnce, after load_x of the same k.
  __device__ __forceinline__ void load_more_gates() const {
    if (!Tr::kTakesMore || plan_.images <= Tr::kRowsAtOnce) return;
#pragma unroll 1
    for (int i = share_.row + Tr::kRowsAtOnce; i < plan_.images; i += Tr::kRowsAtOnce)
      cp_async_16(to_gates_ + (i - share_.row) * kPointwiseGateBytes, gate_ + gate_offset(i) + inside_.at,
                  inside_.bytes);
  }

 private:
  static __device__ __forceinline__ const unsigned char* bytes_of(const T* at) {
    return reinterpret_cast<const unsigned char*>(at);
  }
  __device__ __forceinline__ SharedAddress first_weight() const {
    return shared_address(weights_ + share_.slice() * Tr::kWeightSlice + share_.in_slice);
  }
  // The thread's chunk of a stage in a row: its place and its bytes, or 0 and 0 outside.
  struct Inside {
    unsigned at = 0;
    int bytes = 0;

    Inside() = default;
    __device__ __forceinline__ Inside(const PointwiseParams& p, unsigned wanted) {
      const bool inside = wanted < static_cast<unsigned>(p.in_channels) * static_cast<unsigned>(sizeof(T));
      at = inside ? wanted : 0u, bytes = inside ? 16 : 0;
    }
  };
  __device__ __forceinline__ void copy_weight(const Inside& inside) {
#pragma unroll
    for (int j = 0; j < Tr::kOfWeight; ++j)
      cp_async_16_if(share_.template has<Tr::kColumns>(j), to_weight_ + j * Tr::kRowsAtOnce * kPointwiseSliceBytes,
                     weight_ + weight_rows_[j] + inside.at, inside.bytes);
    to_weight_ += Tr::kWarpsK * Tr::kWeightSlice;
    if (to_weight_ == first_weight() + plan_.weight_bytes) to_weight_ = first_weight();
  }
  __device__ __forceinline__ unsigned gate_offset(int image) const {
    return static_cast<unsigned>(image < last_gate_ ? image : last_gate_) *
           (static_cast<unsigned>(p_.in_channels) * static_cast<unsigned>(sizeof(T)));
  }

  PointwiseShare<Tr> share_;
  SharedAddress to_x_, to_gates_;                           // the thread's places in the next stage to load
  SharedAddress to_weight_;                                 // the same of the weights
  const unsigned char *x_, *weight_;                        // of the tile's first row, of the block's first column
  unsigned x_rows_[Tr::kOfX], weight_rows_[Tr::kOfWeight];  // from there, in bytes: see kMostDistance of the plan
  const unsigned char* gate_ = nullptr;                     // of the tile's first image
  int last_gate_ = 0;                                       // the last image, counted from the first
  unsigned at_ = 0;                                         // the thread's chunk of the next slice, in a row
  Inside inside_;                                           // the thread's chunk of the last slice of x
  unsigned gate_row_ = 0;                                   // of the thread's first image, from gate_
  const PointwiseParams& p_;
  const PointwisePlan& plan_;
  unsigned char* const weights_;
};

// Any strides, types and alignment. Also multiplies the gate in, and changes x as training does (`More`).
template <class Tr, class More>
class PointwiseConverter {
 public:
  using T = typename Tr::T;
  using Chunk = Vector<T, Tr::kVector>;

  __device__ __forceinline__ PointwiseConverter(const PointwiseParams& p, const PointwisePlan& plan, int first_column,
                                                unsigned char* ring, unsigned char* weights, const More& more)
      : p_(p), plan_(plan), more_(more), ring_(ring), weights_(weights), first_column_(first_column) {}

  __device__ __forceinline__ void move(int64_t first_row, int) { first_row_ = first_row; }

  __device__ __forceinline__ void load_weight(int first_k) {
    const int64_t k = first_k + share_.chunk * Tr::kVector;
    unsigned char* to = weights_ + weight_stage_ + share_.slice() * Tr::kWeightSlice + share_.in_slice;
#pragma unroll 1
    for (int row = share_.row; row < Tr::kColumns;
         row += Tr::kRowsAtOnce, to += Tr::kRowsAtOnce * kPointwiseSliceBytes) {
      Chunk chunk = zeros();
      const int64_t column = first_column_ + Tr::column_of(row);
      if (column < p_.out_channels) {
#pragma unroll
        for (int e = 0; e < Tr::kVector; ++e)
          if (k + e < p_.in_channels)
            chunk.at[e] = from_float<T>(parameter(p_.weight, column * p_.in_channels + k + e, 0.f));
      }
      *reinterpret_cast<Chunk*>(to) = chunk;
    }
    weight_stage_ += Tr::kWarpsK * Tr::kWeightSlice;
    if (weight_stage_ == static_cast<unsigned>(plan_.weight_bytes)) weight_stage_ = 0;
  }

  __device__ __forceinline__ void load_weight_too(int k) { load_weight(k); }
  __device__ __forceinline__ void load_more_gates() const {}
  __device__ __forceinline__ void advance(int) {}
  __device__ __forceinline__ void move_stage(unsigned char*) {}

  __device__ __forceinline__ void load_x(unsigned stage, int first_k) const {
    const int64_t k = first_k + share_.chunk * Tr::kVector;
    const int count = k + Tr::kVector <= p_.in_channels ? Tr::kVector : static_cast<int>(p_.in_channels - k);
    const int rows = rows_of_tile<Tr>(plan_, first_row_);
    unsigned char* to = ring_ + stage + share_.slice() * Tr::kXSlice + share_.in_slice;
#pragma unroll 1
    for (int row = share_.row; row < Tr::kRows; row += Tr::kRowsAtOnce, to += Tr::kRowsAtOnce * kPointwiseSliceBytes) {
      Chunk chunk = zeros();
      if (row < rows && count > 0) x_chunk(first_row_ + row, k, count, &chunk);
      *reinterpret_cast<Chunk*>(to) = chunk;
    }
  }

 private:
  static __device__ __forceinline__ Chunk zeros() {
    Chunk chunk;
#pragma unroll
    for (int e = 0; e < Tr::kVector; ++e) chunk.at[e] = from_float<T>(0.f);
    return chunk;
  }

  __device__ __forceinline__ void x_chunk(int64_t row, int64_t k, int count, Chunk* chunk) const {
    const int64_t image = row / p_.pixels;
    const T* from = static_cast<const T*>(p_.x) + image * p_.x_stride_n + (row - image * p_.pixels) * p_.x_stride_p + k;
    if (plan_.x_vectors) {
      *chunk = *reinterpret_cast<const Chunk*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < Tr::kVector; ++e)
        if (e < count) chunk->at[e] = from[e];
    }
    if constexpr (More::kChanges) {
      more_.template change<T>(p_, image, k, count, *chunk);
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
  const PointwisePlan& plan_;
  const More& more_;
  unsigned char *ring_, *weights_;
  unsigned weight_stage_ = 0;
  int first_column_;
  int64_t first_row_ = 0;
};

}  // namespace effkernels::cuda
