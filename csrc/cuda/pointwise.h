// pointwise_bn_act and pointwise_bn_act_pool on CUDA, as the adaptor sees it: plain C++.
#pragma once
#include "device.h"

namespace effkernels::cuda {

// The instructions of the products: 16-bit types and TF32 on tensor cores, float32 by exact multiply-adds.
enum class PointwiseProduct { kTensor16, kTf32, kMultiplyAdd };

// The work on the sums. That of MBConv blocks is compiled for itself and leaves from the registers: identity in
// projections, swish without gate or residual in expansions. Any activation goes through shared memory, so that its
// code is there once.
enum class PointwiseEpilogue { kIdentity, kSilu, kAny };

// A block computes tiles of `rows` x `columns` of y with warps_m x warps_n x warps_k warps. Warps along k take turns
// over the slices of k and add their sums up at the end: for few rows and many input channels, where there are too few
// tiles.
struct PointwiseTile {
  int rows, columns, warps_m, warps_n, warps_k;
  int resident;  // blocks per multiprocessor: the kernel's __launch_bounds__, as many as fit without a spill

  constexpr int threads() const { return 32 * warps_m * warps_n * warps_k; }
  constexpr int warp_rows() const { return rows / warps_m; }
  constexpr int warp_columns() const { return columns / warps_n; }
};
// 32x64 or 32x96 of y per warp where there is enough work: 16 multiply instructions for 6 reads of shared memory, and
// two fragments of x for the gate. Few columns are for the project convolutions, which read x only once then, and more
// rows where there are many, because a tile takes some 200 instructions whatever its rows; 144 for the expansion of 24
// channels. Warps along k are for single images.
constexpr PointwiseTile kPointwiseTiles[] = {
    {128, 128, 4, 2, 1, 2}, {128, 96, 4, 1, 1, 3}, {64, 144, 4, 1, 1, 4}, {128, 64, 4, 1, 1, 4}, {128, 40, 4, 1, 1, 5},
    {128, 32, 4, 1, 1, 5},  {128, 24, 4, 1, 1, 6}, {128, 16, 4, 1, 1, 6}, {64, 64, 2, 2, 1, 5},  {32, 32, 1, 1, 4, 4},
    {16, 32, 1, 1, 4, 4},   {16, 16, 1, 1, 8, 3},  {192, 24, 4, 1, 1, 4}, {256, 16, 4, 1, 1, 4},
};
constexpr int kPointwiseTileCount = sizeof(kPointwiseTiles) / sizeof(kPointwiseTiles[0]);

// Float32 by multiply-add: two accumulators per output and the weights as float4 take 168 registers, room for three
// blocks of 128 threads.
constexpr int pointwise_resident(int tile, PointwiseProduct product) {
  constexpr int kMultiplyAdd = 3;
  const int resident = kPointwiseTiles[tile].resident;
  return product == PointwiseProduct::kMultiplyAdd && resident > kMultiplyAdd ? kMultiplyAdd : resident;
}

// The kernels that are compiled: each costs code and a second of nvcc.
constexpr bool pointwise_tile_built(int tile, PointwiseProduct product, PointwiseEpilogue epilogue, bool converts) {
  const PointwiseTile t = kPointwiseTiles[tile];
  const bool any = epilogue == PointwiseEpilogue::kAny;
  // Conversion while loading is for rare inputs: two sizes are enough.
  if (converts) return any && t.rows == t.columns && t.rows <= 64 && t.rows >= 32;
  // A float32 thread holds two accumulators per output, so its warps keep to 32x32; its vectors have 4 columns.
  if (product != PointwiseProduct::kTensor16) return any && t.warp_columns() == 32 && t.rows >= 32;
  if (t.warps_k > 1) return any;
  // Through shared memory go vectors of 8 columns.
  if (any) return t.warp_columns() % 32 == 0 && t.columns <= 64;
  // No network is known that expands to so few channels, or projects to so many at once.
  return epilogue == PointwiseEpilogue::kSilu ? t.columns >= 64 : t.columns != 144;
}

// The kernels that are compiled with pooling (pointwise_pool.cuh): square tiles, whose rows may be of several images.
constexpr bool pool_tile_built(int tile, PointwiseProduct product, PointwiseEpilogue epilogue, bool converts) {
  return epilogue != PointwiseEpilogue::kIdentity && kPointwiseTiles[tile].rows == kPointwiseTiles[tile].columns &&
         pointwise_tile_built(tile, product, epilogue, converts);
}

constexpr int64_t kMostPooledPixels = 1 << 30;  // of an image: rows of a block have 32 bits

constexpr int kPointwiseStages = 4;       // slices of x on their way or in use
constexpr int kPointwiseSliceBytes = 64;  // of a row of x or weight, per stage and warp along k
constexpr int kPointwiseGateBytes = 80;   // of an image's gates beside a slice: images in different banks

// n / divisor for 0 <= n < 2^31 by a multiply: (n * multiplier) >> shift.
struct PointwiseDivisor {
  uint32_t multiplier = 1u << 31;
  int shift = 31;
};

// The divisor of a division by `by`, 1 to 2^31 - 1.
PointwiseDivisor divisor(int64_t by);

// The cut of the product: see pointwise.cuh.
struct PointwisePlan {
  int tile = 0;  // of kPointwiseTiles
  PointwiseProduct product = PointwiseProduct::kTensor16;
  PointwiseEpilogue epilogue = PointwiseEpilogue::kAny;
  bool converts = false;      // x and weight go through registers, element by element where they are not aligned
  bool x_vectors = false;     // 16-byte reads of x
  bool keeps_weight = false;  // the weights of a block's columns are loaded once, for all k
  int steps = 0;              // along the input channels, of each part
  int parts = 1;              // blocks that share a tile along the input channels; with pooling, those of an image
  int tiles = 1;              // row tiles of a block, at most
  // Of a tile, their gates beside the slices of x; 0: no gate, or while converting. With pooling: of a block. (More
  // fields make the compiler keep less in registers: 8 bytes cost 10 percent more instructions in a tile.)
  int images = 0;
  int64_t rows = 0;  // of all images
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t row_groups = 0;  // blocks along the rows: each takes every row_groups-th tile
  int64_t blocks = 0;
  double images_per_row = 0;              // 1 / pixels
  PointwiseDivisor by_columns, by_parts;  // block index to group, part, column
  int stage_bytes = 0;                    // slices of x and their gates
  int ring_bytes = 0, weight_bytes = 0, residual_bytes = 0, sum_bytes = 0, shared_bytes = 0;
};

// What training adds takes registers: a block or two less, so that nothing spills.
constexpr int training_resident(int tile, PointwiseProduct product) {
  const int resident = pointwise_resident(tile, product);
  return resident > 5 ? 4 : resident > 2 ? resident - 1 : resident;
}

constexpr int kMomentFloats = 4;  // of a column: csrc/cuda/training_moments.cuh

// The kernels that are compiled for training, whose results have no activation and no residual. The widest tile has no
// register for more.
constexpr bool training_tile_built(int tile, PointwiseProduct product, PointwiseEpilogue epilogue, bool converts) {
  const PointwiseTile t = kPointwiseTiles[tile];
  const bool direct = pointwise_tile_built(tile, product, PointwiseEpilogue::kIdentity, converts);
  return epilogue != PointwiseEpilogue::kSilu && pointwise_tile_built(tile, product, epilogue, converts) &&
         (epilogue == PointwiseEpilogue::kIdentity || !direct) && t.columns < 128 && t.rows <= 128;
}

// Scratch memory of a launch whose tiles, or images, are shared by several blocks; sizes are functions of the plan.
struct PointwiseWork {
  float* partial = nullptr;      // (parts, batch * pixels, out_channels): sums over each part of the input channels;
                                 // with pooling (parts, batch, out_channels): over each part of the pixels
  unsigned* arrivals = nullptr;  // of every tile, zero before and after
};
struct PointwiseScratch {
  int64_t partial = 0, arrivals = 0;  // elements
};

// A pure function of params (sizes, strides, types, alignment of the pointers) and limits.
PointwisePlan plan_pointwise(const PointwiseParams& params, const DeviceLimits& limits);
// Of items of a queue, all that they are: clocks of all of them where they fill the GPU, and of one from its first
// instruction to the last.
struct ItemClocks {
  int64_t all = 0, one = 0;
};
// The same for a product whose tiles are items of another launch, whose blocks have kPointwiseItemThreads threads, keep
// to `shared_bytes` and are `resident` on a multiprocessor (mbconv_queue.cuh): row_groups of `tiles` neighbouring row
// tiles each, or fewer in the last. blocks is 0 where no such tile is compiled or fits.
constexpr int kPointwiseItemThreads = 128;
constexpr PointwiseEpilogue pointwise_item_epilogue(int tile) {
  return kPointwiseTiles[tile].warps_k > 1 ? PointwiseEpilogue::kAny : PointwiseEpilogue::kIdentity;
}
// A wide tile leaves no register for parameters that are one of several blocks'.
constexpr bool pointwise_item_built(int tile) {
  return kPointwiseTiles[tile].threads() == kPointwiseItemThreads && kPointwiseTiles[tile].columns <= 64 &&
         pointwise_tile_built(tile, PointwiseProduct::kTensor16, pointwise_item_epilogue(tile), false);
}
// `beside`: what expands for them, in a queue of several blocks of a network; null where it is not known, or alone.
PointwisePlan plan_pointwise_items(const PointwiseParams& params, int resident, int64_t shared_bytes,
                                   const DeviceLimits& limits, const ItemClocks* beside = nullptr);
// Clocks that these items take by themselves: a model, to weigh plans by.
int64_t clocks_of_items(const PointwiseParams& params, const PointwisePlan& plan, const DeviceLimits& limits);
// The same for the kernel of training, which has the statistics of its columns where others have a residual; vectors:
// whether the vectors of its norm are aligned to 16 bytes.
PointwisePlan plan_training_pointwise(const PointwiseParams& params, bool vectors, const DeviceLimits& limits);
// Blocks along the rows whose statistics are joined first.
int training_fan(const PointwisePlan& plan);
PointwiseScratch training_pointwise_scratch(const PointwiseParams& params, const PointwisePlan& plan);
PointwiseScratch pointwise_scratch(const PointwiseParams& params, const PointwisePlan& plan);
PlannedLaunches planned_launches(const PointwiseParams& params, const PointwisePlan& plan);
const char* launch_pointwise(const PointwiseParams& params, const PointwisePlan& plan, const PointwiseWork& work,
                             void* stream);

}  // namespace effkernels::cuda
