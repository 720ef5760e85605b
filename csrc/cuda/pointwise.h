// pointwise_bn_act on CUDA, as the adaptor sees it: plain C++.
#pragma once
#include "device.h"

namespace effkernels::cuda {

// How the products are formed: 16-bit types and TF32 on tensor cores, float32 by exact multiply-adds.
enum class PointwiseProduct { kTensor16, kTf32, kMultiplyAdd };

// A block computes `rows` x `columns` of y with warps_m x warps_n x warps_k warps. Warps along k take turns over the
// slices of k and add their sums up at the end: for few rows and many input channels, where there are too few tiles.
struct PointwiseTile {
  int rows, columns, warps_m, warps_n, warps_k;
  int resident;  // blocks per multiprocessor: the kernel's __launch_bounds__, as many as fit without a spill

  constexpr int threads() const { return 32 * warps_m * warps_n * warps_k; }
};
// 64x48 or 64x32 of y per warp where there is enough work: 16 multiply instructions for 6 reads of shared memory. 32x32
// elsewhere. 128 rows by 32 columns is for the project convolutions, which have few columns and read x only once then.
constexpr PointwiseTile kPointwiseTiles[] = {
    {128, 128, 2, 4, 1, 2}, {128, 96, 2, 2, 1, 3}, {128, 64, 2, 2, 1, 4},
    {128, 32, 4, 1, 1, 5},  {64, 64, 2, 2, 1, 5},  {32, 32, 1, 1, 4, 4},
};
constexpr int kPointwiseTileCount = sizeof(kPointwiseTiles) / sizeof(kPointwiseTiles[0]);

// Float32 by multiply-add: two accumulators per output and the weights as float4 take 168 registers, room for three
// blocks of 128 threads.
constexpr int pointwise_resident(int tile, PointwiseProduct product) {
  constexpr int kMultiplyAdd = 3;
  const int resident = kPointwiseTiles[tile].resident;
  return product == PointwiseProduct::kMultiplyAdd && resident > kMultiplyAdd ? kMultiplyAdd : resident;
}

// The tiles that are compiled: all for 16-bit types. A float32 thread holds two accumulators per output, so its warps
// keep to 32x32; conversion while loading is for rare inputs, two sizes are enough.
constexpr bool pointwise_tile_built(int tile, PointwiseProduct product, bool converts) {
  const PointwiseTile t = kPointwiseTiles[tile];
  const bool small_warps = t.rows / t.warps_m <= 32 && t.columns / t.warps_n <= 32;
  return converts ? t.rows == t.columns && t.rows <= 64 : product == PointwiseProduct::kTensor16 || small_warps;
}

constexpr int kPointwiseStages = 4;       // tiles of x and weight on their way or in use
constexpr int kPointwiseSliceBytes = 64;  // of a row of x or weight, per stage and warp along k

// How the product is cut: see pointwise.cuh.
struct PointwisePlan {
  int tile = 0;  // of kPointwiseTiles
  PointwiseProduct product = PointwiseProduct::kTensor16;
  bool converts = false;   // x and weight go through registers, element by element where they are not aligned
  bool x_vectors = false;  // 16-byte reads of x
  int steps = 0;           // along the input channels
  int gate_images = 0;     // images whose gates lie in shared memory; 0: no gate, or one applied while converting
  int gate_stride = 0;     // elements from one image's gates to the next
  int64_t column_tiles = 0, blocks = 0;
  int gate_bytes = 0, ring_bytes = 0, shared_bytes = 0;
};

// A pure function of params (sizes, strides, types, alignment of the pointers) and limits.
PointwisePlan plan_pointwise(const PointwiseParams& params, const DeviceLimits& limits);
PlannedLaunches planned_launches(const PointwiseParams& params, const PointwisePlan& plan);
const char* launch_pointwise(const PointwiseParams& params, const PointwisePlan& plan, void* stream);

}  // namespace effkernels::cuda
