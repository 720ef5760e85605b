// The plan of pointwise_bn_act and of pointwise_bn_act_pool: which tile, how many of them for a block, by which product
// and loads.
#include "pointwise.h"

#include <algorithm>
#include <cmath>

#include "../sizes.h"

namespace effkernels::cuda {
namespace {

constexpr int64_t kMostDistance = 1 << 23;  // of two rows of x, y or weight, in elements: 127 of them have 32 bits
constexpr int kMostTiles = 16;              // of a block
constexpr int kMostParts = 16;              // of a tile, along k
constexpr int kMostTilesOfItem = 8;         // of a queue of several blocks of a network
constexpr double kOfEstimate = 0.5;         // Cost ranks products; the estimate of effkernels/plan is about half of it
constexpr int kReservedShared = 1024;       // of every block, by the system

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Return whether all rows of an (images, pixels, channels) tensor start at 16 bytes. The stride of a dimension of size
// 1 is never used, and may be anything.
bool rows_aligned(const PointwiseParams& p, const void* data, int64_t stride_n, int64_t stride_p, int vector) {
  return aligned(data) && (p.batch == 1 || stride_n % vector == 0) && (p.pixels == 1 || stride_p % vector == 0);
}

// Return whether the rows are at one distance, from the first of the first image to the last of the last, and the
// offsets of a tile's rows have 32 bits.
bool rows_even(const PointwiseParams& p, int64_t stride_n, int64_t stride_p) {
  return stride_p < kMostDistance && (p.batch == 1 || stride_n == p.pixels * stride_p);
}

int element_of(const PointwiseParams& p) { return p.dtype == DType::kFloat32 ? 4 : 2; }

// A plan, and whether it is for the kernel of training, of pooling, or for items of a queue.
struct Draft : PointwisePlan {
  bool trains = false, pools = false, items = false;
  int tiles_of_item = 0;  // where they are given
};

// The layout of a tile in shared memory; the weights of its columns stay there for all k, or pass through the ring.
void lay_out(const PointwiseParams& p, bool keeps_weight, Draft* plan) {
  const PointwiseTile& shape = kPointwiseTiles[plan->tile];
  const int64_t steps = int64_t(plan->tiles) * plan->steps, element = element_of(p);
  const int stages = static_cast<int>(std::min<int64_t>(steps, kPointwiseStages));
  plan->keeps_weight = keeps_weight;
  int gates = 0;  // images
  if (p.gate.data != nullptr && !plan->converts)
    gates = static_cast<int>(std::min(p.batch, divide_up(shape.rows - 1, p.pixels) + 1));
  if (!plan->pools) plan->images = gates;
  const int gate_bytes = static_cast<int>(divide_up(gates * shape.warps_k * kPointwiseGateBytes, 128) * 128);
  plan->stage_bytes = shape.rows * kPointwiseSliceBytes * shape.warps_k + gate_bytes;
  plan->ring_bytes = stages * plan->stage_bytes;
  const int64_t slots = keeps_weight ? plan->steps : stages;
  const int64_t weight_bytes = slots * shape.columns * kPointwiseSliceBytes * shape.warps_k;
  plan->weight_bytes = static_cast<int>(std::min<int64_t>(weight_bytes, 1 << 29));  // so much is not chosen
  plan->residual_bytes =
      p.residual != nullptr && !plan->converts ? static_cast<int>(shape.rows * shape.columns * element) : 0;
  plan->sum_bytes = plan->epilogue == PointwiseEpilogue::kAny
                        ? shape.rows * shape.columns * shape.warps_k * static_cast<int>(sizeof(float))
                        : 0;
  const int head_bytes = 2 * shape.columns * static_cast<int>(sizeof(float)) + 16;
  if (plan->trains) {  // a vector of the thread has 16 bytes, or one element while converting
    const int floats =
        plan->converts ? kMomentFloats : std::max<int>(kMomentFloats, 2 * 16 / static_cast<int>(element));
    plan->residual_bytes = (kMomentFloats * shape.columns + floats * shape.threads()) * static_cast<int>(sizeof(float));
  }
  if (plan->pools)  // of each warp that shares its columns with others
    plan->residual_bytes =
        shape.warps_m * shape.warps_k * plan->images * shape.columns * static_cast<int>(sizeof(float));
  plan->shared_bytes = head_bytes + plan->ring_bytes + plan->weight_bytes + plan->residual_bytes + plan->sum_bytes;
}

int resident_blocks(const Draft& plan, const DeviceLimits& limits) {
  const int fitting = limits.shared_per_multiprocessor / (plan.shared_bytes + kReservedShared);
  const int most =
      plan.trains ? training_resident(plan.tile, plan.product) : pointwise_resident(plan.tile, plan.product);
  return std::max(1, std::min(most, fitting));
}

// Cycles of the busiest multiprocessor, from figures of sm_80 to sm_90 to a digit: to rank the plans, not to predict.
// Either its blocks keep one of its units busy, or there are so few that each one's latency counts.
class Cost {
 public:
  Cost(const PointwiseParams& p, const Draft& plan, const DeviceLimits& limits) {
    const PointwiseTile& t = kPointwiseTiles[plan.tile];
    const double element = element_of(p);
    const double k = std::min(double(p.in_channels), double(plan.steps) * kPointwiseSliceBytes / element * t.warps_k);
    const double rows = double(std::min<int64_t>(t.rows, p.batch * p.pixels));
    const double columns = double(p.out_channels) / double(plan.column_tiles);
    const double warps = t.warps_m * t.warps_n, m = t.warp_rows(), n = t.warp_columns();

    // 16 k of 16-bit values, 8 of float32: 32 bytes of every row, 128 bytes of shared memory a cycle
    const double shared = warps * (m + n) * 32 / 128 + (t.rows + t.columns) * 32 / 128;
    const double products_per_cycle = plan.product == PointwiseProduct::kTensor16 ? 1024
                                      : plan.product == PointwiseProduct::kTf32   ? 512
                                                                                  : 96;
    const double products = double(t.rows) * t.columns * (32 / element) / products_per_cycle;
    const double busy = k * element / 32 * std::max(shared, products);
    // From L2, when every multiprocessor reads; the weights only once where they are kept.
    const double of_weight = columns * (plan.keeps_weight ? 1. / plan.tiles : 1.);
    const double loads = (rows + of_weight) * k * element / 32;
    const double through_shared = plan.epilogue == PointwiseEpilogue::kAny ? 8. / 128 * t.warps_k : 0.;
    const double stored = plan.pools ? 0. : element / 32;
    const double epilogue = double(t.rows) * t.columns * (1. / 32 + through_shared) + rows * columns * (0.06 + stored);
    constexpr double kNotOverlapped = 0.25;
    of_tile_ = std::max(busy, loads) + kNotOverlapped * std::min(busy, loads) + epilogue;

    // A part writes its sums and arrives: a fence and an atomic, each of which waits for L2. The last one reads those
    // of all, four at a time.
    constexpr double kArrival = 1000, kFourParts = 600;
    if (plan.parts > 1) {
      if (!plan.pools) of_tile_ += rows * columns * 4 * 2 / 32;
      arrival_ = kArrival + kFourParts * double(divide_up(plan.parts, 4));
    }
    blocks_ = double(plan.blocks) / limits.multiprocessors;
    most_ = double(resident_blocks(plan, limits));
    queue_ = double(divide_up(plan.blocks, limits.multiprocessors));
    resident_ = std::max(1., std::min(double(resident_blocks(plan, limits)), queue_));
    steps_ = plan.steps;
    tiles_ = plan.tiles;
    items_ = plan.items;
    if (plan.pools) prologue_ = 150. * (t.threads() / 32);
  }

  double cycles() const {
    // Items of a queue fill its last wave with what is beside them.
    const double waves = items_ ? queue_ / resident_ : double(divide_up(int64_t(queue_), int64_t(resident_)));
    return std::max(queue_ * (tiles_ * of_tile_ + prologue_), waves * latency());
  }

  // Of one block.
  double latency() const {
    constexpr double kFixedLatency = 2000, kStepLatency = 250;  // a third of a read's: three stages are on their way
    constexpr double kNextTile = 100;                           // its first slices are there
    return kFixedLatency + steps_ * kStepLatency + of_tile_ / 2 + (tiles_ - 1) * (kNextTile + of_tile_) + arrival_;
  }

  // Of items among others of a queue, which fill the last wave, and of which a multiprocessor has `resident`.
  double among_others(int resident) const {
    return std::max(blocks_ * (tiles_ * of_tile_ + prologue_), blocks_ / std::min<double>(resident, most_) * latency());
  }

 private:
  double prologue_ = 150;  // of instruction issue; of a block that pools some 600 instructions of each warp
  double of_tile_, arrival_ = 0, blocks_, most_, queue_, resident_, steps_, tiles_;
  bool items_;
};

// Row tiles of a block. More of them share its prologue, fewer leave less for the last blocks: the least of waves *
// (prologue + tiles), which is a model, not a measurement. The items of a queue have no waves of their own, but the
// last ones run alone: the least of what all of them take and of one more.
int tiles_of_block(const Draft& plan, const DeviceLimits& limits) {
  constexpr double kPrologue = 0.5;  // of a tile
  const int64_t slots = int64_t(limits.multiprocessors) * resident_blocks(plan, limits);
  if (plan.items) {
    const double tiles = std::sqrt(double(plan.row_tiles * plan.column_tiles) * kPrologue / double(slots));
    return std::clamp(static_cast<int>(tiles + 0.5), 1,
                      static_cast<int>(std::min<int64_t>(kMostTiles, plan.row_tiles)));
  }
  double least = 0;
  int best = 1;
  for (int tiles = 1; tiles <= kMostTiles && tiles <= plan.row_tiles; ++tiles) {
    const int64_t blocks = divide_up(plan.row_tiles, tiles) * plan.column_tiles;
    const double cost = double(divide_up(blocks, slots)) * (kPrologue + tiles);
    if (tiles == 1 || cost < least) best = tiles, least = cost;
  }
  return best;
}

// The rest of a plan whose tiles, parts and groups of rows are set. False where it does not fit the device.
bool finish_cut(const PointwiseParams& p, const DeviceLimits& limits, bool keeps_weight, Draft* plan) {
  lay_out(p, keeps_weight || plan->steps <= kPointwiseStages, plan);
  plan->blocks = plan->row_groups * plan->parts * plan->column_tiles;
  plan->images_per_row = 1. / double(p.pixels);
  plan->by_columns = divisor(plan->column_tiles), plan->by_parts = divisor(plan->parts);
  // A single block would leave the multiprocessor idle at each of its barriers.
  if (keeps_weight && resident_blocks(*plan, limits) < 2) return false;
  return plan->shared_bytes <= limits.shared_per_block;
}

// Cuts the product into tiles of `tile`, shared by `parts` blocks each. False where that does not fit the device, or is
// another way to say what is tried elsewhere.
bool cut(const PointwiseParams& p, const DeviceLimits& limits, int tile, int parts, bool keeps_weight, Draft* plan) {
  const PointwiseTile& shape = kPointwiseTiles[tile];
  const int64_t step = kPointwiseSliceBytes / element_of(p) * shape.warps_k;
  const int64_t steps = std::max<int64_t>(divide_up(p.in_channels, step), 1);
  if (parts > steps) return false;
  plan->tile = tile;
  plan->steps = static_cast<int>(divide_up(steps, parts));
  plan->parts = static_cast<int>(divide_up(steps, plan->steps));
  if (plan->parts != parts) return false;
  // So few weights take no more room than the ring.
  const bool fits_ring = plan->steps <= kPointwiseStages;
  if (fits_ring && keeps_weight) return false;

  plan->rows = p.batch * p.pixels;
  plan->row_tiles = divide_up(plan->rows, shape.rows);
  plan->column_tiles = divide_up(p.out_channels, shape.columns);
  plan->tiles = 1;
  if (parts == 1 && !plan->converts && plan->row_tiles * plan->column_tiles > limits.multiprocessors) {
    plan->tiles = kMostTiles;
    lay_out(p, keeps_weight || fits_ring, plan);
    if (plan->tiles_of_item > 0)
      plan->tiles = static_cast<int>(std::min<int64_t>(plan->tiles_of_item, plan->row_tiles));
    else
      plan->tiles = plan->shared_bytes <= limits.shared_per_block ? tiles_of_block(*plan, limits) : 1;
  }
  if (keeps_weight && plan->tiles == 1) return false;
  plan->row_groups = divide_up(plan->row_tiles, plan->tiles);
  plan->tiles = static_cast<int>(divide_up(plan->row_tiles, plan->row_groups));
  return finish_cut(p, limits, keeps_weight, plan);
}

// Cuts the rows into groups of whole images that fill `tiles` tiles, or an image into parts of so many. False as in
// `cut`.
bool cut_images(const PointwiseParams& p, const DeviceLimits& limits, int tile, int tiles, bool keeps_weight,
                Draft* plan) {
  const PointwiseTile& shape = kPointwiseTiles[tile];
  const int64_t step = kPointwiseSliceBytes / element_of(p) * shape.warps_k;
  plan->tile = tile;
  plan->steps = static_cast<int>(std::max<int64_t>(divide_up(p.in_channels, step), 1));
  const bool fits_ring = plan->steps <= kPointwiseStages;
  if (keeps_weight && (fits_ring || tiles == 1 || plan->converts)) return false;
  const int64_t fitting = int64_t(tiles) * shape.rows / p.pixels, of_image = divide_up(p.pixels, shape.rows);
  plan->images = static_cast<int>(std::min(std::max<int64_t>(fitting, 1), p.batch));
  plan->parts = fitting > 0 ? 1 : static_cast<int>(divide_up(of_image, tiles));
  if (plan->parts > kMostParts) return false;
  plan->tiles = static_cast<int>(divide_up(plan->images * (fitting > 0 ? p.pixels : 0), shape.rows));
  if (fitting == 0) plan->tiles = static_cast<int>(divide_up(of_image, plan->parts));
  if (plan->tiles != tiles) return false;
  plan->rows = p.batch * p.pixels;
  plan->row_groups = divide_up(p.batch, plan->images);
  plan->row_tiles = plan->row_groups * plan->tiles;  // of each part
  plan->column_tiles = divide_up(p.out_channels, shape.columns);
  return finish_cut(p, limits, keeps_weight, plan);
}

bool tile_built(int tile, const Draft& plan) {
  return plan.pools    ? pool_tile_built(tile, plan.product, plan.epilogue, plan.converts)
         : plan.trains ? training_tile_built(tile, plan.product, plan.epilogue, plan.converts)
                       : pointwise_tile_built(tile, plan.product, plan.epilogue, plan.converts);
}

PointwiseEpilogue epilogue_of(const PointwiseParams& p, int tile, const Draft& plan) {
  const bool expands = p.activation == Activation::kSilu && p.gate.data == nullptr && p.residual == nullptr;
  const PointwiseEpilogue own = expands                                 ? PointwiseEpilogue::kSilu
                                : p.activation == Activation::kIdentity ? PointwiseEpilogue::kIdentity
                                                                        : PointwiseEpilogue::kAny;
  const bool built = plan.pools ? pool_tile_built(tile, plan.product, own, plan.converts)
                                : pointwise_tile_built(tile, plan.product, own, plan.converts);
  return built ? own : PointwiseEpilogue::kAny;
}

// What does not depend on the tile. `vectors`: what the kernel of training reads beside x and weight is aligned, too.
Draft draft_of(const PointwiseParams& p, bool trains, bool vectors) {
  const int vector = p.dtype == DType::kFloat32 ? 4 : 8;
  Draft plan;
  plan.trains = trains, plan.pools = p.pools;
  plan.product = p.dtype != DType::kFloat32 ? PointwiseProduct::kTensor16
                 : p.allow_tf32             ? PointwiseProduct::kTf32
                                            : PointwiseProduct::kMultiplyAdd;
  plan.x_vectors = p.in_channels % vector == 0 && rows_aligned(p, p.x, p.x_stride_n, p.x_stride_p, vector);
  // By way of registers goes what is rare: other types and alignments, and parts of larger images.
  plan.converts = !vectors || !plan.x_vectors || !rows_even(p, p.x_stride_n, p.x_stride_p) ||
                  std::max(p.in_channels, p.out_channels) > kMostDistance || p.weight.dtype != p.dtype ||
                  !aligned(p.weight.data) || (!p.pools && (p.out_channels % vector != 0 || !aligned(p.y))) ||
                  !aligned(p.gate.data) || (p.gate.data != nullptr && p.gate.dtype != p.dtype) ||
                  (p.residual != nullptr && !rows_even(p, p.residual_stride_n, p.residual_stride_p)) ||
                  !rows_aligned(p, p.residual, p.residual_stride_n, p.residual_stride_p, vector);
  return plan;
}

PointwisePlan plan_of(const PointwiseParams& p, bool trains, bool vectors, const DeviceLimits& limits) {
  Draft plan = draft_of(p, trains, vectors);
  if (p.batch * p.pixels * p.out_channels == 0 || (p.pools && p.pixels > kMostPooledPixels)) return plan;

  for (bool found = false; !found; plan.converts = true) {
    Draft best;
    double lowest = 0;
    for (int tile = 0; tile < kPointwiseTileCount; ++tile) {
      plan.epilogue = epilogue_of(p, tile, plan);
      if (!tile_built(tile, plan)) continue;
      const auto consider = [&](const Draft& with) {
        const double cycles = Cost(p, with, limits).cycles();
        if (!found || cycles < lowest) best = with, lowest = cycles, found = true;
      };
      if (plan.pools) {
        // Of an image that is too large for that, the fewest tiles of which there are not too many parts.
        const int64_t of_image = divide_up(p.pixels, kPointwiseTiles[tile].rows);
        const int least = static_cast<int>(divide_up(of_image, kMostParts));
        for (int tiles = least > kMostTiles ? least : 1; tiles <= std::max(least, kMostTiles); ++tiles)
          for (const bool keeps_weight : {false, true}) {
            Draft with = plan;
            if (cut_images(p, limits, tile, tiles, keeps_weight, &with)) consider(with);
          }
        continue;
      }
      const bool shares = plan.epilogue == PointwiseEpilogue::kAny && !plan.converts && !trains;
      for (int parts = 1; parts <= (shares ? kMostParts : 1); ++parts)
        for (const bool keeps_weight : {false, true}) {
          Draft with = plan;
          if (cut(p, limits, tile, parts, keeps_weight, &with)) consider(with);
        }
    }
    if (found) return best;
    if (plan.converts) break;
  }
  return plan;
}

}  // namespace

PointwiseDivisor divisor(int64_t by) {
  PointwiseDivisor d;
  while ((int64_t(1) << (d.shift - 31)) < by) ++d.shift;
  d.multiplier = static_cast<uint32_t>(((uint64_t(1) << d.shift) + uint64_t(by) - 1) / uint64_t(by));
  return d;
}

PointwisePlan plan_pointwise(const PointwiseParams& p, const DeviceLimits& limits) {
  return plan_of(p, false, true, limits);
}

PointwisePlan plan_pointwise_items(const PointwiseParams& p, int resident, int64_t shared_bytes,
                                   const DeviceLimits& limits, const ItemClocks* beside) {
  Draft plan = draft_of(p, false, true);
  plan.items = true;
  Draft best;
  if (plan.converts || plan.product != PointwiseProduct::kTensor16 || p.activation != Activation::kIdentity ||
      p.batch * p.pixels * p.out_channels == 0)
    return best;
  // Where all that expands is little beside the way of one unit, other items wait for this one.
  const double latency_counts = beside != nullptr && double(beside->one) > 0.7 * double(beside->all) ? 1.0 : 0.1;
  const int first_tiles = beside != nullptr ? 1 : 0, most_tiles = beside != nullptr ? kMostTilesOfItem : 0;
  double lowest = 0;
  for (int tile = 0; tile < kPointwiseTileCount; ++tile) {
    if (!pointwise_item_built(tile) || kPointwiseTiles[tile].resident < resident) continue;
    const auto consider = [&](bool keeps_weight, int tiles_of_item) {
      Draft with = plan;
      with.epilogue = pointwise_item_epilogue(tile), with.tiles_of_item = tiles_of_item;
      if (!cut(p, limits, tile, 1, keeps_weight, &with) || with.shared_bytes > shared_bytes) return;
      const Cost cost(p, with, limits);
      const double cycles = beside == nullptr
                                ? cost.cycles()
                                : kOfEstimate * cost.among_others(resident) + latency_counts * cost.latency();
      if (best.blocks == 0 || cycles < lowest) best = with, lowest = cycles;
    };
    for (const bool keeps_weight : {false, true})
      for (int tiles = first_tiles; tiles <= most_tiles; ++tiles) consider(keeps_weight, tiles);
  }
  best.row_groups = divide_up(best.row_tiles, best.tiles);
  best.blocks = best.row_groups * best.column_tiles;
  return best;
}

int64_t clocks_of_items(const PointwiseParams& p, const PointwisePlan& plan, const DeviceLimits& limits) {
  if (plan.blocks == 0) return 0;
  Draft draft = draft_of(p, false, true);
  static_cast<PointwisePlan&>(draft) = plan;
  draft.items = true;
  return static_cast<int64_t>(Cost(p, draft, limits).cycles() * kOfEstimate);
}

PointwisePlan plan_training_pointwise(const PointwiseParams& p, bool vectors, const DeviceLimits& limits) {
  return plan_of(p, true, vectors, limits);
}

int training_fan(const PointwisePlan& plan) {
  int fan = 1;
  while (int64_t(fan) * fan < plan.row_groups) ++fan;
  return fan;
}

PointwiseScratch training_pointwise_scratch(const PointwiseParams& p, const PointwisePlan& plan) {
  const int64_t nodes = divide_up(plan.row_groups, training_fan(plan));
  return {product({plan.row_groups + nodes, p.out_channels, kMomentFloats}), plan.column_tiles * (nodes + 1)};
}

PointwiseScratch pointwise_scratch(const PointwiseParams& p, const PointwisePlan& plan) {
  PointwiseScratch scratch;
  if (plan.parts == 1) return scratch;
  scratch.partial = product({plan.parts, p.batch, p.pools ? 1 : p.pixels, p.out_channels});
  scratch.arrivals = (p.pools ? plan.row_groups : plan.row_tiles) * plan.column_tiles;
  return scratch;
}

PlannedLaunches planned_launches(const PointwiseParams& p, const PointwisePlan& plan) {
  if (p.batch * p.pixels * p.out_channels == 0) return {};
  const PointwiseScratch scratch = pointwise_scratch(p, plan);
  PlannedLaunch one;
  one.kernel = p.pools ? "pointwise_pool" : "pointwise";
  one.grid = plan.blocks;
  one.block_x = kPointwiseTiles[plan.tile].threads();
  one.shared_bytes = plan.shared_bytes;
  one.workspace_bytes = (scratch.partial + scratch.arrivals) * int64_t(sizeof(float));
  return {one};
}

}  // namespace effkernels::cuda
