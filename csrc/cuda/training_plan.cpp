#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "../sizes.h"
#include "training.h"

namespace effkernels::cuda {
namespace {

constexpr int64_t kMostPixels = 1 << 29;  // of an image: indices within it have 32 bits
constexpr int kMostChannelVectors = 16;   // of a pass: 256 bytes of neighbouring channels
constexpr int kRowsOfSum = 32;            // pixels that a thread adds in float32
constexpr int kRowsOfPass = 16;           // pixels of a thread in an item that is not summed
constexpr int kStatisticsRows = 8;        // pixels that a thread reads at once

int vector_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }
int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
int64_t round_up(int64_t value, int64_t to) { return divide_up(value, to) * to; }

// Channels per thread: 16 bytes where the channels divide and the images (null: not given) are aligned.
int vector_for(DType dtype, int64_t channels, std::initializer_list<const void*> images) {
  bool fits = channels % vector_of(dtype) == 0;
  for (const void* image : images) fits = fits && reinterpret_cast<uintptr_t>(image) % 16 == 0;
  return fits ? vector_of(dtype) : 1;
}

// Threads along the channels, at most `most`: the largest divisor, so that no thread idles, but not less than half.
int threads_along_channels(int64_t vectors, int most) {
  for (int count = most; 2 * count > most; --count)
    if (vectors % count == 0) return count;
  return static_cast<int>(std::min<int64_t>(vectors, most));
}

// Two levels of joining that are about as wide.
int fan_of(int64_t tiles) {
  int fan = 1;
  while (int64_t(fan) * fan < tiles) ++fan;
  return fan;
}
int64_t nodes_of(int64_t tiles, int fan) { return divide_up(tiles, fan); }

// Blocks along the channels, and along the items so that the device is full `waves` times.
PassPlan plan_pass(int64_t batch, int64_t pixels, int64_t channels, int vector, int rows, int blocks,
                   const DeviceLimits& limits) {
  PassPlan plan;
  plan.vector = vector;
  const int64_t vectors = divide_up(channels, vector);
  plan.channel_vectors = threads_along_channels(vectors, kMostChannelVectors);
  plan.lanes = kPassThreads / plan.channel_vectors;
  plan.channel_groups = static_cast<int>(divide_up(vectors, plan.channel_vectors));
  const int64_t resident = int64_t(limits.multiprocessors) * blocks;
  // Items as long as a thread may add, shorter where there would be too few of them: down to a quarter, because an item
  // costs partial sums.
  const int64_t longest = divide_up(pixels, int64_t(plan.lanes) * rows);
  const int64_t wanted = divide_up(resident, batch * plan.channel_groups);
  const int64_t most = divide_up(pixels, int64_t(plan.lanes) * std::max(1, rows / 4));
  plan.chunks = std::max(longest, std::min(wanted, most));
  plan.chunk = divide_up(pixels, plan.chunks);
  plan.chunks = divide_up(pixels, plan.chunk);
  plan.items = batch * plan.chunks;
  constexpr int kWaves = 4;  // blocks end at different times
  const int64_t tiles = std::max<int64_t>(1, kWaves * resident / plan.channel_groups);
  plan.items_per_block = divide_up(plan.items, tiles);
  plan.tiles = divide_up(plan.items, plan.items_per_block);
  return plan;
}

int64_t floats_of(int64_t rows, const PassPlan& plan) { return rows * plan.block_channels(); }

template <class Params>
PassPlan plan_sums(const Params& p, int vector, int parameters, int sums, int blocks, const DeviceLimits& limits) {
  PassPlan plan = plan_pass(p.batch, p.pixels, p.channels, vector, kRowsOfSum, blocks, limits);
  plan.shared_bytes = (floats_of(parameters + sums * plan.lanes, plan) + 4) * int64_t(sizeof(float));
  return plan;
}

// A cut of the work of a depthwise kernel, and how good it is.
struct Cut {
  int columns = 0, step = 0;
  double score = -1;
};

struct TrainShape {
  const training::DepthwiseShape& s;
  bool backward;
  int compiled;
  int64_t rows, columns;  // of an image, in the units of the walk
  int strip;              // columns of a thread
};

int64_t fill(const TrainShape& of, int columns, int step, TrainDepthwisePlan& plan) {
  const training::DepthwiseShape& s = of.s;
  plan.columns = columns, plan.step = step;
  const int64_t element = size_of(s.dtype), channels = plan.block_channels();
  int64_t rows = 0, pixels = 0;
  if (!of.backward) {
    plan.strips = columns / of.strip;
    plan.tile_columns = (columns - 1) * s.stride + s.kernel_w;
    plan.tile_rows = (step - 1) * s.stride + s.kernel_h + step * s.stride;
    rows = plan.taps + 4, pixels = int64_t(plan.tile_rows) * plan.tile_columns;
    const int64_t floats = round_up(rows * channels, 4) + 4 * int64_t(plan.lanes) * channels;
    return (floats / 4 + 1) * 16 + pixels * channels * element;
  }
  plan.strips = columns / of.strip;
  plan.z_rows = plan.reach_rows + 2 * step, plan.z_columns = columns + plan.reach_columns;
  plan.tile_rows = plan.z_rows * s.stride, plan.tile_columns = plan.z_columns * s.stride;
  rows = 3 * plan.taps + 12 + 4 + 2 * plan.lanes + int64_t(plan.sum_lanes) * plan.taps;
  pixels = int64_t(plan.z_rows + step) * plan.z_columns + int64_t(plan.tile_rows + step * s.stride) * plan.tile_columns;
  return (rows * channels / 4 + 1) * 16 + pixels * channels * element;
}

// How well a cut uses a multiprocessor: threads that have work in a step, blocks that fit, what is read twice, and the
// barriers of a step against its work. A model, not a measurement.
double score(const TrainShape& of, const TrainDepthwisePlan& plan, int64_t shared_bytes, int blocks,
             const DeviceLimits& limits) {
  constexpr double kBarriers = 0.25;  // of a round of work
  const int64_t fit = std::min<int64_t>(blocks, limits.shared_per_multiprocessor / (shared_bytes + 1024));
  if (fit == 0) return 0;
  const double units = double(plan.step) * plan.strips * (of.backward ? of.s.stride * of.s.stride : 1);
  const double rounds = std::ceil(units / plan.lanes), busy = units / (rounds * plan.lanes);
  const double reach = of.backward ? plan.reach_columns : double(of.s.kernel_w - of.s.stride) / of.s.stride;
  const double once = plan.columns / (plan.columns + std::max(0.0, reach));
  const int64_t tiles = divide_up(of.columns, plan.columns);
  const double whole = double(of.columns) / double(tiles * plan.columns);
  return std::sqrt(double(fit)) * busy * once * whole * rounds / (rounds + kBarriers);
}

TrainDepthwisePlan plan_tiles(const TrainShape& of, int vector, int blocks, const DeviceLimits& limits) {
  const training::DepthwiseShape& s = of.s;
  TrainDepthwisePlan plan;
  plan.vector = vector, plan.taps = s.kernel_h * s.kernel_w;
  if (std::max({s.height * s.width, s.out_height * s.out_width, of.rows * of.columns}) > kMostPixels) return plan;
  // 64 bytes of neighbouring channels, or as many whole sectors of 32 as divide them.
  const int64_t vectors = divide_up(s.channels, vector);
  const int most = vector == 1 ? 32 : 4;
  plan.channel_vectors = static_cast<int>(std::min<int64_t>(vectors, most));
  if (vector > 1 && vectors % plan.channel_vectors != 0)
    for (const int count : {6, 5, 3})
      if (vectors % count == 0) {
        plan.channel_vectors = count;
        break;
      }
  plan.channel_groups = static_cast<int>(divide_up(vectors, plan.channel_vectors));
  plan.lanes = kTrainDepthwiseThreads / plan.channel_vectors;
  if (of.backward) {
    plan.reach_rows = (s.kernel_h - 1) / s.stride, plan.reach_columns = (s.kernel_w - 1) / s.stride;
    const int taps_at_once = of.compiled > 0 ? of.compiled : 4;
    const int tap_groups = s.kernel_h * static_cast<int>(divide_up(s.kernel_w, taps_at_once));
    plan.sum_lanes = std::max(1, plan.lanes / tap_groups);
  }

  Cut best;
  constexpr int kMostColumns = 128, kMostStep = 16;
  for (int64_t tiles = 1, last = 0; last != of.strip; ++tiles) {
    const int64_t columns = round_up(divide_up(of.columns, tiles), of.strip);
    if (columns == last || columns > kMostColumns) {
      if (columns == of.strip) break;
      continue;
    }
    last = columns;
    for (int step = 1; step <= std::min<int64_t>(kMostStep, of.rows); ++step) {
      const int64_t bytes = fill(of, static_cast<int>(columns), step, plan);
      if (bytes > limits.shared_per_block) break;
      const double found = score(of, plan, bytes, blocks, limits);
      if (found > best.score) best = {static_cast<int>(columns), step, found};
    }
  }
  if (best.columns == 0) return plan;
  plan.shared_bytes = fill(of, best.columns, best.step, plan);
  plan.column_tiles = static_cast<int>(divide_up(of.columns, plan.columns));

  // One band where there are items enough to fill the device: the first rows of a band are read twice.
  const int64_t fit = std::min<int64_t>(blocks, limits.shared_per_multiprocessor / (plan.shared_bytes + 1024));
  const int64_t resident = std::max<int64_t>(1, fit) * limits.multiprocessors;
  const int64_t whole = s.batch * plan.column_tiles * plan.channel_groups;
  const int64_t most_bands = std::max<int64_t>(1, of.rows / (2 * plan.step));
  const int64_t bands = std::min(most_bands, divide_up(resident, whole));
  plan.rows = static_cast<int>(round_up(divide_up(of.rows, bands), plan.step));
  plan.bands = static_cast<int>(divide_up(of.rows, plan.rows));
  plan.items = s.batch * plan.column_tiles * plan.bands;
  plan.items_per_block = divide_up(plan.items, std::max<int64_t>(1, resident / plan.channel_groups));
  plan.tiles = divide_up(plan.items, plan.items_per_block);
  plan.fan = fan_of(plan.tiles);
  return plan;
}

}  // namespace

PassPlan plan_statistics(const training::StatisticsParams& p, const DeviceLimits& limits) {
  const int vector = vector_for(p.dtype, p.channels, {p.t});
  PassPlan plan = plan_pass(1, p.pixels, p.channels, vector, 1, kSumsBlocks, limits);
  const int64_t resident = int64_t(limits.multiprocessors) * kSumsBlocks;
  const int64_t fewest = int64_t(plan.lanes) * kStatisticsRows;  // pixels of a block
  const int64_t tiles = std::min(std::max<int64_t>(1, resident / plan.channel_groups), divide_up(p.pixels, fewest));
  plan.chunk = divide_up(p.pixels, tiles);
  plan.chunks = plan.items = plan.tiles = divide_up(p.pixels, plan.chunk);
  plan.items_per_block = 1;
  plan.fan = fan_of(plan.tiles);
  plan.shared_bytes = int64_t(plan.lanes) * plan.block_channels() * 16 + 16;
  return plan;
}

PointwisePlan plan_training_product(const training::ProductParams& p, const DeviceLimits& limits) {
  bool vectors = true;
  for (const float* read : {p.norm.mean, p.norm.scale, p.norm.bias, p.factor})
    vectors = vectors && reinterpret_cast<uintptr_t>(read) % 16 == 0;
  return plan_training_pointwise(p.product, vectors, limits);
}

PassPlan plan_norm_act(const training::NormActParams& p, const DeviceLimits& limits) {
  const int vector = vector_for(p.dtype, p.channels, {p.t, p.y, p.residual});
  PassPlan plan = plan_pass(p.batch, p.pixels, p.channels, vector, kRowsOfPass, kPassBlocks, limits);
  plan.shared_bytes = floats_of(3, plan) * int64_t(sizeof(float));
  return plan;
}

PassPlan plan_squeeze(const training::NormActParams& p, const DeviceLimits& limits) {
  return plan_sums(p, vector_for(p.dtype, p.channels, {p.t}), 3, 1, kSumsBlocks, limits);
}

PassPlan plan_gradient_sums(const training::GradientSumsParams& p, const DeviceLimits& limits) {
  return plan_sums(p, vector_for(p.dtype, p.channels, {p.g, p.t, p.y}), 5, kGradientSums / 2, kSumsBlocks, limits);
}

PassPlan plan_norm_backward(const training::NormBackwardParams& p, const DeviceLimits& limits) {
  const int vector = vector_for(p.dtype, p.channels, {p.dy, p.t, p.dt});
  PassPlan plan = plan_pass(p.batch, p.pixels, p.channels, vector, kRowsOfPass, kPassBlocks, limits);
  plan.shared_bytes = floats_of(6, plan) * int64_t(sizeof(float));
  return plan;
}

TrainDepthwisePlan plan_depthwise_train(const training::DepthwiseTrainParams& p, const DeviceLimits& limits) {
  const training::DepthwiseShape& s = p.shape;
  const int vector = vector_for(s.dtype, s.channels, {p.t, p.z});
  const int compiled = trained_kernel(s.kernel_h, s.kernel_w, vector);
  return plan_tiles({s, false, compiled, s.out_height, s.out_width, trained_strip(compiled, s.stride)}, vector,
                    kTrainForwardBlocks, limits);
}

TrainDepthwisePlan plan_depthwise_backward(const training::DepthwiseBackwardParams& p, const DeviceLimits& limits) {
  const training::DepthwiseShape& s = p.shape;
  const int vector = vector_for(s.dtype, s.channels, {p.g, p.z, p.t, p.dt});
  // Rows and columns of the input by the stride, in padded coordinates, and until the last result has its inputs.
  const auto units = [&](int64_t size, int64_t padding, int64_t results, int64_t kernel) {
    return std::max(divide_up(size + padding, s.stride), results + (kernel - 1) / s.stride);
  };
  return plan_tiles(
      {s, true, trained_kernel(s.kernel_h, s.kernel_w, vector), units(s.height, s.pad_top, s.out_height, s.kernel_h),
       units(s.width, s.pad_left, s.out_width, s.kernel_w), kTrainStrip},
      vector, kTrainBackwardBlocks, limits);
}

TrainingScratch statistics_scratch(const PassPlan& plan, int64_t channels) {
  const int64_t nodes = nodes_of(plan.tiles, plan.fan);
  return {product({plan.tiles + nodes, channels, 4}), plan.channel_groups * (nodes + 1)};
}

TrainingScratch sums_scratch(const PassPlan& plan, int64_t batch, int64_t channels, int sums) {
  if (plan.chunks == 1) return {};
  return {product({plan.items, sums, channels, 2}), batch * plan.channel_groups};
}

TrainingScratch depthwise_train_scratch(const TrainDepthwisePlan& plan, int64_t channels) {
  const int64_t nodes = nodes_of(plan.tiles, plan.fan);
  return {product({plan.tiles + nodes, channels, 4}), plan.channel_groups * (nodes + 1)};
}

TrainingScratch depthwise_backward_scratch(const TrainDepthwisePlan& plan, int64_t channels) {
  const int64_t nodes = nodes_of(plan.tiles, plan.fan);
  return {product({plan.tiles + nodes, channels, plan.taps + 4}), plan.channel_groups * (nodes + 1)};
}

}  // namespace effkernels::cuda
