// The plans of conv_bn_act: of its own kernel for few input channels, and of the norm and activation after another's.
#include "conv.h"

#include <algorithm>
#include <limits>

namespace effkernels::cuda {
namespace {

// 7x7 over three channels. Beyond, PyTorch's convolution is the better way: there the sums outweigh reading x and
// writing y, and a library tuned for them wins.
constexpr int64_t kMostTaps = 147;
constexpr int64_t kMostWeightBytes = 48 * 1024;
constexpr int64_t kMostSharedBytes = 64 * 1024;  // two blocks on any multiprocessor

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
int64_t round_up(int64_t value, int64_t by) { return divide_up(value, by) * by; }

// Return whether conv_stem takes this convolution, and how it reads x.
void choose_stem(const ConvParams& p, ConvPlan* plan) {
  const bool size = p.kernel_h == kStemKernel && p.kernel_w == kStemKernel && p.stride == kStemStride;
  const bool together = p.x_stride_c == 1 && p.x_stride_w == kStemChannels, planes = p.x_stride_w == 1;
  if (!size || p.in_channels != kStemChannels || !(together || planes)) return;
  // Offsets within a window fit 32 bits.
  constexpr int64_t kMostSide = 1 << 26, kMostPadding = 1 << 20, kMostRowStride = 1 << 25;
  if (p.height > kMostSide || p.width > kMostSide || p.x_stride_h > kMostRowStride) return;
  if (p.pad_top > kMostPadding || p.pad_left > kMostPadding) return;
  const int element = p.dtype == DType::kFloat32 ? 4 : 2;
  for (const int bytes : {8, 16}) {
    const int64_t vector = bytes / element;
    const auto divides = [vector](int64_t step, int64_t count) { return step % vector == 0 || count <= 1; };
    if (reinterpret_cast<uintptr_t>(p.x) % bytes == 0 && p.width % vector == 0 && divides(p.x_stride_h, p.height) &&
        divides(p.x_stride_n, p.batch) && (together || divides(p.x_stride_c, p.in_channels)))
      plan->x_vector_bytes = bytes;
  }
  if (plan->x_vector_bytes == 0) return;
  plan->stem = true, plan->planes = !together;
  plan->lead = static_cast<int>(round_up(p.pad_left, stem_unit(element)));
}

// The sizes that depend on the number of warps.
int64_t fill(const ConvParams& p, int warps, ConvPlan* plan) {
  const int element = p.dtype == DType::kFloat32 ? 4 : 2, tile_height = warps * kConvWarpRows;
  const int64_t height = int64_t(tile_height - 1) * p.stride + p.kernel_h;
  const int64_t width =
      plan->stem ? stem_units(element) * stem_unit(element) : int64_t(kConvTileWidth - 1) * p.stride + p.kernel_w;
  const int64_t window_bytes = round_up(p.in_channels * height * width * element, 16);
  const int64_t offsets = plan->stem ? 0 : int64_t(sizeof(int)) * plan->padded_taps;
  const int64_t shared = 2 * int64_t(sizeof(float)) * plan->padded_channels + offsets + plan->weight_bytes +
                         (plan->stem ? 2 : 1) * window_bytes;
  if (shared > kMostSharedBytes) return shared;
  plan->warps = warps;
  plan->window_height = static_cast<int>(height), plan->window_width = static_cast<int>(width);
  plan->window_bytes = static_cast<int>(window_bytes), plan->shared_bytes = static_cast<int>(shared);
  plan->tiles_y = static_cast<int>(divide_up(p.out_height, tile_height));
  plan->tiles_x = static_cast<int>(divide_up(p.out_width, kConvTileWidth));
  plan->tiles = p.batch * plan->tiles_y * plan->tiles_x;
  return shared;
}

// A block's work before its first tile costs some 4/5 of a tile: as many tiles a block as give the least work to the
// multiprocessor that has most. More than kMost would leave too few blocks to even out what one of them is late.
int choose_tiles_per_block(int64_t tiles, int64_t resident) {
  constexpr int kMost = 8;
  int best = 1;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int count = 1; count <= kMost; ++count) {
    const int64_t work = divide_up(divide_up(tiles, count), resident) * (5 * count + 4);
    if (work < least) best = count, least = work;
  }
  return best;
}

}  // namespace

NormActPlan plan_norm_act(const NormActParams& p, const DeviceLimits& limits) {
  const int64_t vector = p.dtype == DType::kFloat32 ? 4 : 8;
  NormActPlan plan;
  plan.vectors = p.channels % vector == 0 && aligned(p.x) && aligned(p.y);
  const int64_t units = plan.vectors ? p.channels / vector : p.channels;
  // All of the channels side by side where they fit, so that the lanes of a warp read on without a gap.
  plan.threads_x = static_cast<int>(std::clamp<int64_t>(units, 1, kNormActThreads));
  plan.channel_groups = std::max<int64_t>(1, divide_up(units, plan.threads_x));
  // Enough blocks for 16 waves; each forms scale and shift once and loops over what rows are left.
  const int64_t rows_at_once = kNormActThreads / plan.threads_x;
  const int64_t most = divide_up(int64_t(limits.multiprocessors) * 8 * 16, plan.channel_groups);
  plan.row_groups = std::clamp<int64_t>(divide_up(p.rows, rows_at_once), 1, most);
  return plan;
}

PlannedLaunches planned_launches(const NormActParams& p, const NormActPlan& plan) {
  if (p.rows * p.channels == 0) return {};
  PlannedLaunch one;
  one.kernel = "norm_act";
  one.grid = plan.channel_groups * plan.row_groups;
  one.block_x = plan.threads_x, one.block_y = kNormActThreads / plan.threads_x;
  const int64_t vector = plan.vectors ? (p.dtype == DType::kFloat32 ? 4 : 8) : 1;
  one.shared_bytes = 2 * int64_t(sizeof(float)) * plan.threads_x * vector;
  return {one};
}

ConvPlan plan_conv(const ConvParams& p, const DeviceLimits& limits) {
  ConvPlan plan;
  NormActParams result;
  result.x = result.y = p.y, result.dtype = p.dtype;
  result.rows = p.batch * p.out_height * p.out_width, result.channels = p.out_channels;
  plan.norm_act = plan_norm_act(result, limits);

  const bool tensor = p.dtype != DType::kFloat32;
  const int64_t window = int64_t(p.kernel_h) * p.kernel_w;
  if (window > kMostTaps || p.in_channels > kMostTaps / window) return plan;
  // Offsets within a tile of y fit 32 bits.
  constexpr int64_t kMostRow = 1 << 26, kMostRows = 1 << 26;
  if (p.out_channels > kMostRow || p.out_width > kMostRow / p.out_channels || p.out_height > kMostRows) return plan;
  choose_stem(p, &plan);
  const int64_t taps = p.in_channels * window, padded_taps = tensor ? round_up(taps, 16) : taps;
  const int64_t padded_channels = round_up(p.out_channels, kConvChannels);
  // Tensor cores read rows of one channel, 16 bytes apart in the banks; multiply-adds read rows of one tap.
  const int64_t stride = tensor ? padded_taps + 8 : padded_channels;
  const int64_t weight_bytes = tensor ? padded_channels * stride * 2 : padded_taps * stride * 4;
  if (padded_channels > kMostWeightBytes || weight_bytes > kMostWeightBytes) return plan;
  constexpr int64_t kMostStride = 1 << 12;  // a window beyond would not fit anyway, and its size might overflow
  if (p.stride > kMostStride) return plan;
  plan.taps = static_cast<int>(taps), plan.padded_taps = static_cast<int>(round_up(padded_taps, 4));
  plan.padded_channels = static_cast<int>(padded_channels), plan.weight_stride = static_cast<int>(stride);
  plan.weight_bytes = static_cast<int>(weight_bytes);
  plan.y_vectors = p.out_channels % (tensor ? 8 : 4) == 0 && aligned(p.y);

  // The tallest tile, which reads the fewest border pixels twice, that fits and still leaves a block for every
  // multiprocessor; where none does, the lowest.
  const int64_t most_shared = std::min<int64_t>(kMostSharedBytes, limits.shared_per_block);
  for (int warps = kConvMostWarps; warps >= 1; warps /= 2) {
    if (fill(p, warps, &plan) > most_shared) continue;
    plan.fused = plan.tiles <= std::numeric_limits<int32_t>::max();
    if (!plan.fused || plan.tiles >= limits.multiprocessors) break;
  }
  if (!plan.fused) return plan;
  const int64_t resident = int64_t(limits.multiprocessors) * kConvBlocks * (kConvMostWarps / plan.warps);
  plan.tiles_per_block = choose_tiles_per_block(plan.tiles, resident);
  plan.blocks = divide_up(plan.tiles, plan.tiles_per_block);
  return plan;
}

PlannedLaunches planned_launches(const ConvParams& p, const ConvPlan& plan) {
  if (p.batch * p.out_height * p.out_width * p.out_channels == 0) return {};
  if (!plan.fused) {
    NormActParams result;
    result.dtype = p.dtype;
    result.rows = p.batch * p.out_height * p.out_width, result.channels = p.out_channels;
    return planned_launches(result, plan.norm_act);
  }
  PlannedLaunch one;
  one.kernel = plan.stem ? "conv_stem" : "conv";
  one.grid = plan.blocks;
  one.block_x = 32 * plan.warps;
  one.shared_bytes = plan.shared_bytes;
  return {one};
}

}  // namespace effkernels::cuda
