// The plan of pointwise_bn_act: which tile, and by which product and loads.
#include "pointwise.h"

#include <algorithm>

namespace effkernels::cuda {
namespace {

constexpr int kMostGateBytes = 32 * 1024;  // beyond: far more images than pixels, and the gate is applied while loading

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether all rows of an (images, pixels, channels) tensor start at 16 bytes. The stride of a dimension of size 1 is
// never used, and may be anything.
bool rows_aligned(const PointwiseParams& p, const void* data, int64_t stride_n, int64_t stride_p, int vector) {
  return aligned(data) && (p.batch == 1 || stride_n % vector == 0) && (p.pixels == 1 || stride_p % vector == 0);
}

void fill(const PointwiseParams& p, int tile, PointwisePlan* plan) {
  const PointwiseTile& shape = kPointwiseTiles[tile];
  const int element = p.dtype == DType::kFloat32 ? 4 : 2, slice = kPointwiseSliceBytes / element;
  const int step = slice * shape.warps_k;
  plan->tile = tile;
  plan->steps = static_cast<int>(divide_up(p.in_channels, step));
  plan->column_tiles = divide_up(p.out_channels, shape.columns);
  plan->blocks = divide_up(p.batch * p.pixels, shape.rows) * plan->column_tiles;
  const int stages = std::clamp(plan->steps, 1, kPointwiseStages);  // no more than there are steps
  const int stage_bytes = (shape.rows + shape.columns) * kPointwiseSliceBytes * shape.warps_k;
  const int sum_bytes = shape.rows * (shape.columns + 8) * int(sizeof(float));
  plan->ring_bytes = std::max(stages * stage_bytes, sum_bytes);
  plan->gate_images = plan->gate_stride = plan->gate_bytes = 0;
  if (p.gate.data != nullptr && !plan->converts) {
    const int64_t images = std::min(p.batch, divide_up(shape.rows - 1, p.pixels) + 1);
    const int64_t stride = int64_t(plan->steps) * step + 16 / element;  // images in different banks
    plan->gate_bytes = static_cast<int>(std::min<int64_t>(divide_up(images * stride * element, 128) * 128, 1 << 30));
    plan->gate_images = static_cast<int>(images);
    plan->gate_stride = static_cast<int>(std::min<int64_t>(stride, 1 << 30));  // so large a one is not chosen
  }
  const int residual_bytes = p.residual != nullptr && !plan->converts ? shape.rows * shape.columns * element : 0;
  const int head_bytes = 2 * shape.columns * int(sizeof(float)) + shape.rows * int(sizeof(int));
  plan->shared_bytes = head_bytes + plan->gate_bytes + plan->ring_bytes + residual_bytes;
}

// Cycles of the busiest multiprocessor, from figures of sm_80 to sm_90 to a digit: to rank the tiles, not to predict.
// Either its blocks keep one of its units busy, or there are so few that each one's latency counts.
double cost(const PointwiseParams& p, const PointwisePlan& plan, const DeviceLimits& limits) {
  const PointwiseTile& t = kPointwiseTiles[plan.tile];
  const double element = p.dtype == DType::kFloat32 ? 4 : 2, k = double(p.in_channels);
  const double rows = double(std::min<int64_t>(t.rows, p.batch * p.pixels));
  const double columns = double(p.out_channels) / double(plan.column_tiles);
  const double warps = t.warps_m * t.warps_n, m = double(t.rows) / t.warps_m, n = double(t.columns) / t.warps_n;

  // 16 k of 16-bit values, 8 of float32: 32 bytes of every row, 128 bytes of shared memory a cycle
  const double shared = warps * (m + n) * 32 / 128 + (t.rows + t.columns) * 32 / 128;
  const double products_per_cycle = plan.product == PointwiseProduct::kTensor16 ? 1024
                                    : plan.product == PointwiseProduct::kTf32   ? 512
                                                                                : 96;
  const double products = double(t.rows) * t.columns * (32 / element) / products_per_cycle;
  const double busy = k * element / 32 * std::max(shared, products);
  const double loads = (rows + columns) * k * element / 32;  // from L2, when every multiprocessor reads
  const double epilogue = double(t.rows) * t.columns / 16 + rows * columns * (0.06 + element / 32);
  constexpr double kNotOverlapped = 0.25;
  const double of_block = std::max(busy, loads) + kNotOverlapped * std::min(busy, loads) + epilogue;

  const double queue = double(divide_up(plan.blocks, limits.multiprocessors));
  constexpr int kReservedShared = 1024;  // of every block, by the system
  const double fitting = double(limits.shared_per_multiprocessor / (plan.shared_bytes + kReservedShared));
  const double resident = std::max(1., std::min({double(pointwise_resident(plan.tile, plan.product)), fitting, queue}));
  constexpr double kFixedLatency = 2000, kStepLatency = 250;  // a third of a read's: three stages are on their way
  const double latency = kFixedLatency + plan.steps * kStepLatency + of_block / 2;
  const double waves = double(divide_up(int64_t(queue), int64_t(resident)));
  return std::max(queue * of_block, waves * latency);
}

}  // namespace

PointwisePlan plan_pointwise(const PointwiseParams& p, const DeviceLimits& limits) {
  const int vector = p.dtype == DType::kFloat32 ? 4 : 8;
  PointwisePlan plan;
  plan.product = p.dtype != DType::kFloat32 ? PointwiseProduct::kTensor16
                 : p.allow_tf32             ? PointwiseProduct::kTf32
                                            : PointwiseProduct::kMultiplyAdd;
  plan.x_vectors = p.in_channels % vector == 0 && rows_aligned(p, p.x, p.x_stride_n, p.x_stride_p, vector);
  plan.converts = !plan.x_vectors || p.weight.dtype != p.dtype || !aligned(p.weight.data) ||
                  p.out_channels % vector != 0 || !aligned(p.y) || !aligned(p.gate.data) ||
                  !rows_aligned(p, p.residual, p.residual_stride_n, p.residual_stride_p, vector);
  if (p.batch * p.pixels * p.out_channels == 0) return plan;

  for (bool found = false; !found; plan.converts = true) {
    PointwisePlan best;
    double lowest = 0;
    for (int tile = 0; tile < kPointwiseTileCount; ++tile) {
      if (!pointwise_tile_built(tile, plan.product, plan.converts)) continue;
      PointwisePlan with = plan;
      fill(p, tile, &with);
      if (with.gate_bytes > kMostGateBytes || with.shared_bytes > limits.shared_per_block) continue;
      const double cycles = cost(p, with, limits);
      if (!found || cycles < lowest) best = with, lowest = cycles, found = true;
    }
    if (found) return best;
  }
  return plan;
}

PlannedLaunches planned_launches(const PointwiseParams& p, const PointwisePlan& plan) {
  if (p.batch * p.pixels * p.out_channels == 0) return {};
  PlannedLaunch one;
  one.kernel = "pointwise";
  one.grid = plan.blocks;
  one.block_x = kPointwiseTiles[plan.tile].threads();
  one.shared_bytes = plan.shared_bytes;
  return {one};
}

}  // namespace effkernels::cuda
