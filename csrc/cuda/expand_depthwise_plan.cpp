#include "expand_depthwise.h"

#include <algorithm>
#include <limits>

#include "../sizes.h"
#include "plan_memory.h"
#include "squeeze_excite.h"

namespace effkernels::cuda {
namespace {

constexpr int kVector = 8;  // channels of a thread: 16 bytes
constexpr int kWarps = kDepthwiseThreads / 32;
constexpr int kFragment = kFragmentPixels;
constexpr int64_t kMostPixels = 256;              // of a group
constexpr int64_t kFewestColumns = 12;            // of a tile: narrower ones would expand their borders too often
constexpr int64_t kMostRows = 1 << 21;            // and columns: of x; times a row of the ring they stay below 2^31
constexpr int64_t kMostBytes = int64_t(1) << 31;  // of an image, so that offsets in it have 32 bits,
constexpr int64_t kMostStage = 8192;              // and of pixels in shared memory, and some more

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool vectors_fit(const PointwiseParams& expand, const DepthwiseParams& p) {
  const auto divides = [](int64_t value) { return value % kVector == 0; };
  return divides(expand.in_channels) && divides(expand.out_channels) && (p.batch == 1 || divides(expand.x_stride_n)) &&
         (expand.pixels == 1 || divides(expand.x_stride_p)) && is_aligned(expand.x) && is_aligned(expand.weight.data);
}

// Every window has a pixel of the image, so that there are rows to walk over, and columns in every tile.
bool windows_meet_image(const DepthwiseParams& p) {
  return p.pad_top < p.kernel_h && p.pad_left < p.kernel_w && (p.out_height - 1) * p.stride - p.pad_top < p.height &&
         (p.out_width - 1) * p.stride - p.pad_left < p.width;
}

int64_t in_columns(const DepthwiseParams& p, int64_t out_columns) {
  return std::min<int64_t>(p.width, (out_columns - 1) * p.stride + p.kernel_w);
}

// Of a block: as many as leave fewer over.
int channels_of(const PointwiseParams& expand) {
  const auto covered = [&](int channels) { return divide_up(expand.out_channels, channels) * channels; };
  return expands(expand) || covered(kExpandedChannels) < covered(kCopiedChannels) ? kExpandedChannels : kCopiedChannels;
}

// Of 16 bytes of a pixel of x that a block reads, in whole fragments.
int chunks_of(const PointwiseParams& expand) {
  const int64_t read =
      expands(expand) ? expand.in_channels : std::min<int64_t>(expand.in_channels, channels_of(expand));
  return static_cast<int>(divide_up(read, kFragment)) * 2;
}

int strips_of_row(const ExpandDepthwisePlan& plan) {
  return static_cast<int>(divide_up(plan.columns, plan.depthwise.strip));
}

}  // namespace

bool expands_in_shared_memory(const PointwiseParams& expand, const DepthwiseParams& p) {
  const int compiled = compiled_kernel(p.kernel_h, p.kernel_w);
  return p.dtype != DType::kFloat32 && (compiled == 3 || (compiled == 5 && expands(expand))) &&
         (p.stride == 1 || (p.stride == 2 && expands(expand))) && p.dilation == 1 &&
         std::max(p.height, p.width) <= kMostRows && p.batch > 0 && expand.pixels > 0 && windows_meet_image(p) &&
         product({std::max(p.height * p.width, kMostStage), expand.x_stride_p, 2}) < kMostBytes &&
         product({p.out_height, p.out_width, p.channels}) < kMostBytes && vectors_fit(expand, p);
}

int64_t expand_depthwise_resident(int64_t shared_bytes, const DeviceLimits& limits) {
  constexpr int64_t kOfTheSystem = 1024;  // bytes that it takes for each block
  return std::min<int64_t>(kExpandDepthwiseBlocks, limits.shared_per_multiprocessor / (shared_bytes + kOfTheSystem));
}

void lay_out_x(const PointwiseParams& expand, const DepthwiseParams& p, ExpandDepthwisePlan& plan) {
  const int64_t group_pixels = plan.group_rows * in_columns(p, plan.columns);
  plan.pairs = group_pixels > plan.pixels_of_singles;
  const int64_t unit = plan.pairs ? 2 * kFragment : kFragment;
  plan.stage_pixels = static_cast<int>(divide_up(group_pixels, unit) * unit);
  plan.chunks = chunks_of(expand);
  plan.slices = (plan.chunks + 3) / 4;
}

namespace {

// Taps, scale and shift, sums of the lanes, of the block, a flag, hidden values: see SumsInShared.
int64_t sum_bytes(const DepthwiseCall& call, const DepthwisePlan& plan) {
  const int64_t taps = int64_t(call.depthwise->kernel_h) * call.depthwise->kernel_w;
  int64_t floats = (taps + 2 + plan.lanes + plan.images) * plan.channel_vectors * kVector + 4;
  if (call.se != nullptr) floats += plan.images * call.se->reduced;
  return floats * int64_t(sizeof(float));
}

// Sets what follows from columns, strip, group_rows and ring_rows: how strips are read from the ring.
void lay_out_ring(const DepthwiseParams& p, ExpandDepthwisePlan& plan) {
  // Lanes that follow each other take strips below each other. Their 96 (or 64) bytes are in different banks if the
  // distance of these rows is so many more than a multiple of 128.
  const int pixel_units = plan.channels * 2 / 16;
  const int pixels = (strips_of_row(plan) * plan.depthwise.strip - 1) * p.stride + p.kernel_w;
  int units = pixels * pixel_units;
  while (units * p.stride % 8 != pixel_units) ++units;
  plan.ring_row_bytes = units * 16;
  plan.by_ring_rows = multiplier_of(plan.ring_rows);
  plan.by_group_out_rows = multiplier_of(plan.group_out_rows);
  plan.strip_rows = plan.depthwise.lanes % plan.group_out_rows;
  plan.strip_columns = plan.depthwise.lanes / plan.group_out_rows;
}

// Sets what follows from columns, group_rows and, once they are known, band_rows.
void lay_out(const PointwiseParams& expand, const DepthwiseCall& call, ExpandDepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int strips = strips_of_row(plan), stride = p.stride;
  plan.column_tiles = static_cast<int>(divide_up(p.out_width, plan.columns));
  plan.group_out_rows = plan.group_rows / stride;
  if (plan.band_rows > 0) plan.group_out_rows = std::min(plan.group_out_rows, plan.band_rows);
  plan.ring_rows = plan.group_rows + p.kernel_h - 1;
  plan.depthwise.lanes = std::min(kDepthwiseThreads / plan.depthwise.channel_vectors, strips * plan.group_out_rows);

  lay_out_x(expand, p, plan);
  lay_out_ring(p, plan);

  const auto up = [](int64_t bytes) { return static_cast<int>(divide_up(bytes, 128) * 128); };
  plan.norm_at = static_cast<int>(divide_up(sum_bytes(call, plan.depthwise), 16)) * 16;
  plan.places_at = plan.norm_at + 2 * kExpandedChannels * static_cast<int>(sizeof(float));
  plan.weights_at = up(plan.places_at + place_bytes(plan.stage_pixels));
  plan.x_at = plan.weights_at + (expands(expand) ? plan.slices * kExpandedChannels * kPointwiseSliceBytes : 0);
  plan.ring_at = up(plan.x_at + plan.slices * int64_t(plan.stage_pixels) * kPointwiseSliceBytes);
  plan.shared_bytes = plan.ring_at + int64_t(plan.ring_rows) * plan.ring_row_bytes;
}

int64_t blocks_of_multiprocessor(const ExpandDepthwisePlan& plan, const DeviceLimits& limits) {
  return expand_depthwise_resident(plan.shared_bytes, limits);
}

// Instructions of a warp for its parts of a group, roughly: what the choices below weigh. A model, no measurement.
struct Work {
  int64_t single, pair, strip, barriers;  // of a fragment by itself and of two, what asks for their x included

  Work(const PointwiseParams& expand, const DepthwiseParams& p, const ExpandDepthwisePlan& plan) : barriers(105) {
    const int64_t products = divide_up(expand.in_channels, kFragment);
    single = 155 + 23 * products, pair = 275 + 34 * products;
    if (!expands(expand)) single = 6 * chunks_of(expand), pair = 12 * chunks_of(expand);
    const int64_t pixels = plan.depthwise.strip, inputs = (pixels - 1) * p.stride + p.kernel_w;
    strip = pixels * p.kernel_h * p.kernel_w * kVector + p.kernel_h * inputs * 9 + pixels * 40;
  }

  // Of the warp that has most, one after the other, in a steady group of a band of so many rows.
  int64_t chain(const DepthwiseParams& p, const ExpandDepthwisePlan& plan, int64_t band_rows) const {
    const int64_t pixels = plan.group_rows * in_columns(p, plan.columns);
    const int64_t strips = std::min<int64_t>(plan.group_out_rows, band_rows) * strips_of_row(plan);
    const int64_t lanes = std::min<int64_t>(kDepthwiseThreads / plan.depthwise.channel_vectors, strips);
    const int64_t products = pixels > kPixelsOfSingles ? divide_up(pixels, 2 * kFragment * kWarps) * pair : single;
    return products + divide_up(strips, lanes) * strip + barriers;
  }
  // Of all warps of a block.
  int64_t all(const DepthwiseParams& p, const ExpandDepthwisePlan& plan) const {
    const int64_t pixels = plan.group_rows * in_columns(p, plan.columns);
    const int64_t strips = int64_t(plan.group_out_rows) * strips_of_row(plan);
    const int64_t products =
        pixels > kPixelsOfSingles ? divide_up(pixels, 2 * kFragment) * pair : divide_up(pixels, kFragment) * single;
    return products + divide_up(strips * plan.depthwise.channel_vectors, 32) * strip + kWarps * barriers;
  }
};

// Clocks of a multiprocessor full of blocks for a row of the result: what its blocks wait for, whose dependent
// instructions are two clocks apart, or the instructions that it issues, four a clock.
int64_t clocks_of_row(const Work& work, const DepthwiseParams& p, const ExpandDepthwisePlan& plan, int64_t resident) {
  const int64_t group = std::max(2 * work.chain(p, plan, p.out_height) / resident, work.all(p, plan) / 4);
  return group * plan.column_tiles / plan.group_out_rows;
}

// Columns of a tile and rows of a group, for three blocks on a multiprocessor or for two: one alone would leave it idle
// at every barrier. Few tiles, because neighbours expand their borders twice; many rows, which share the barriers and
// fill the fragments and the warps.
bool choose_tile(const PointwiseParams& expand, const DepthwiseCall& call, const DeviceLimits& limits,
                 ExpandDepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int strip = plan.depthwise.strip, stride = p.stride;
  const Work work(expand, p, plan);
  const int64_t most_rows = divide_up(p.height, stride) * stride;
  int64_t least = std::numeric_limits<int64_t>::max();
  ExpandDepthwisePlan one = plan;
  for (int64_t resident = kExpandDepthwiseBlocks; resident >= 2; --resident) {
    bool found = false;
    for (int64_t tiles = 1; !found; ++tiles) {
      const int64_t columns = divide_up(divide_up(p.out_width, tiles), strip) * strip;
      if (tiles > 1 && columns < kFewestColumns) break;
      const int64_t pixels = in_columns(p, columns);  // of a row
      if (pixels * stride > 2 * kMostPixels) continue;
      one.columns = static_cast<int>(columns);
      for (int64_t rows = stride; rows <= most_rows; rows += stride) {
        if (rows > stride && rows * pixels > kMostPixels) break;
        one.group_rows = static_cast<int>(rows);
        lay_out(expand, call, one);
        if (one.shared_bytes > limits.shared_per_block || blocks_of_multiprocessor(one, limits) < resident) break;
        found = true;
        const int64_t clocks = clocks_of_row(work, p, one, resident);
        if (clocks < least) least = clocks, plan = one;
      }
    }
  }
  return least < std::numeric_limits<int64_t>::max();
}

// Of the blocks of a plan with other bands and images.
struct BlockClocks {
  int64_t blocks, waits, issues;  // of one; dependent instructions are two clocks apart, a multiprocessor issues four
  int64_t gate;                   // of a unit

  BlockClocks(const PointwiseParams& expand, const DepthwiseCall& call, const ExpandDepthwisePlan& plan, int64_t bands,
              int64_t images) {
    constexpr int64_t kFixed = 1500;  // instructions of a warp for parameters and sums, and the waits for them
    const DepthwiseParams& p = *call.depthwise;
    const Work work(expand, p, plan);
    const int64_t rows = divide_up(p.out_height, bands);
    const int64_t in_rows = std::min<int64_t>(p.height, (rows - 1) * p.stride + p.kernel_h);
    const int64_t groups = divide_up(in_rows, plan.group_rows) * images;
    const int64_t of_unit = plan.depthwise.channel_groups * plan.column_tiles * bands;
    blocks = divide_up(p.batch, images) * of_unit;
    waits = (kFixed + groups * work.chain(p, plan, rows)) * 2,
    issues = (kFixed * kWarps + groups * work.all(p, plan)) / 4;
    const int64_t reduced = call.se != nullptr ? call.se->reduced : 0;
    // The block that comes last adds the hidden values of all.
    gate = 3000 + images * p.channels * (40 + 2 * reduced) / 64 + of_unit * reduced / 4;
  }

  // Of one among other items of a queue, with as many of them on a multiprocessor as there are.
  int64_t item(int64_t resident, const DeviceLimits& limits) const {
    return std::max(waits, std::min(resident, divide_up(blocks, limits.multiprocessors)) * issues);
  }
};

// Bands: blocks for every multiprocessor where the images are few, although each expands the K - 1 rows above it too.
// Several images for a block, which share its parameters and weights, where planes are small and the images many.
// Returns the clocks that it was chosen by.
int64_t choose_blocks(const PointwiseParams& expand, const DepthwiseCall& call, const DeviceLimits& limits,
                      const BesideItems* beside, ExpandDepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  constexpr int64_t kFewestRows = 6;  // of a band, to read from L2: shorter ones read their borders too often
  const int64_t resident = blocks_of_multiprocessor(plan, limits);
  int64_t least = std::numeric_limits<int64_t>::max(), plan_clocks = least;
  const auto is_less = [&](int64_t bands, int64_t images) {
    const BlockClocks one(expand, call, plan, bands, images);
    const auto [blocks, waits, issues, gate] = one;
    const int64_t slots = limits.multiprocessors * resident;
    int64_t against_others = 0;  // where other launches are weighed against the queue, without idle places
    int64_t clocks = std::max(divide_up(blocks, slots) * waits, divide_up(blocks, limits.multiprocessors) * issues);
    if (beside != nullptr && beside->more) {
      // Among other blocks of the network: all items count and what these leave idle, or the way of a unit from its
      // input to its result where the images are few.
      constexpr int64_t kProjects = 4000;
      if (expands(expand)) {
        const int64_t item = one.item(resident, limits);
        const int64_t turns = divide_up(blocks / divide_up(p.batch, images), slots);  // of a unit
        const int64_t way = turns * item + gate + kProjects;
        // While the last wave is expanded, the other places project the units of the waves before, if there are enough,
        // and expand those of the next block: where there is more than a wave or two, all that is left; else half.
        const int64_t last = blocks % slots, before = blocks - last;
        int64_t idle = gate;
        if (last > 0)
          idle = std::max<int64_t>(0, (slots - last) * (item + gate) / slots - beside->clocks * before / blocks);
        if (blocks >= 2 * slots) idle = 0;
        clocks = std::max(blocks * item / slots + beside->clocks + idle / 2, way) + way / 8;
        against_others = std::max(blocks * item / slots + beside->clocks, way) + way / 3;
      } else {
        const int64_t at_once = std::min(resident, divide_up(blocks, limits.multiprocessors));
        const int64_t item = std::max(waits, at_once * issues), way = item + gate + kProjects;
        clocks = std::max(blocks * item / slots + beside->clocks, way) + way / 3;
      }
    } else if (beside != nullptr) {
      // In the last wave other items run in idle places, once the first units are done; the last ones wait for its end.
      constexpr int64_t kWaiting = 15000;
      const int64_t item = std::max(waits, resident * issues), waves = divide_up(blocks, slots);
      const int64_t idle = waves > 1 ? (waves * slots - blocks) * item / slots : 0;
      clocks = waves * item + std::max(std::min(beside->clocks, kWaiting), beside->clocks - idle);
    }
    const bool less = clocks < least;
    if (less) least = clocks, plan_clocks = against_others > 0 ? against_others : clocks;
    return less;
  };
  // Without expansion first bands so short that the results in flight stay in L2, if they are not too short for that.
  const auto stays_in_l2 = [&](int64_t bands) {
    const int64_t items = bands * plan.column_tiles * plan.depthwise.channel_groups;
    return bytes_in_flight(p, limits.multiprocessors * resident / items + 2) <= kBytesInFlight;
  };
  bool found = false;
  for (const bool in_l2 : {!expands(expand), false}) {
    for (int64_t wanted = 1; wanted <= std::min<int64_t>(p.out_height, 64); wanted += wanted < 4 ? 1 : wanted / 3) {
      const int64_t rows = divide_up(p.out_height, wanted), bands = divide_up(p.out_height, rows);
      if (in_l2 && !(stays_in_l2(1) || (rows >= kFewestRows && stays_in_l2(bands)))) continue;
      if (is_less(bands, 1)) plan.bands = static_cast<int>(bands), plan.band_rows = static_cast<int>(rows);
      found = true;
    }
    if (found) break;
  }
  plan.clocks = plan_clocks;
  lay_out(expand, call, plan);
  const auto fits = [&](ExpandDepthwisePlan& one) {
    lay_out(expand, call, one);
    return one.shared_bytes <= limits.shared_per_block && blocks_of_multiprocessor(one, limits) >= resident;
  };
  // The sums of several blocks are added for one image.
  const int64_t most_images = plan.bands * plan.column_tiles > 1 ? 1 : kMostImagesOfGate;
  for (int images = 2; images <= std::min<int64_t>(most_images, p.batch); ++images) {
    ExpandDepthwisePlan more = plan;
    more.depthwise.images = images;
    if (!fits(more)) break;
    if (is_less(1, images)) plan = more, plan.clocks = plan_clocks;
  }
  const int64_t tiles = int64_t(plan.bands) * plan.column_tiles * plan.depthwise.channel_groups;
  if (divide_up(p.batch, plan.depthwise.images) * tiles <= limits.multiprocessors * resident) return least;
  ExpandDepthwisePlan pairs = plan;
  pairs.pixels_of_singles = kFragment;
  if (fits(pairs)) plan = pairs;
  return least;
}

// Tiles and blocks. Where the images are few, any tiles, groups of rows and strips: those with the shortest way from
// the input to the result.
bool choose_cut(const PointwiseParams& expand, const DepthwiseCall& call, const DeviceLimits& limits,
                const BesideItems* beside, ExpandDepthwisePlan& plan) {
  constexpr int64_t kFewestColumnsOfFew = 7;
  const DepthwiseParams& p = *call.depthwise;
  plan.band_rows = 0;
  ExpandDepthwisePlan one = plan;
  if (!choose_tile(expand, call, limits, plan)) return false;
  int64_t least = choose_blocks(expand, call, limits, beside, plan);
  const int64_t resident = blocks_of_multiprocessor(plan, limits);
  const int64_t blocks =
      divide_up(p.batch, plan.depthwise.images) * plan.bands * plan.column_tiles * plan.depthwise.channel_groups;
  if (2 * blocks > limits.multiprocessors * resident) return true;
  const int64_t most_rows = divide_up(p.height, p.stride) * p.stride;
  const int long_strip = plan.depthwise.strip;
  for (const int strip : {long_strip, kShortStrip}) {
    one.depthwise.strip = strip;
    for (int64_t tiles = 1, before = 0; tiles <= p.out_width; ++tiles) {
      const int64_t columns = divide_up(divide_up(p.out_width, tiles), strip) * strip, pixels = in_columns(p, columns);
      if (tiles > 1 && columns < kFewestColumnsOfFew) break;
      if (columns == before || pixels * p.stride > 2 * kMostPixels) continue;
      before = columns;
      for (int64_t rows = p.stride; rows <= most_rows; rows += p.stride) {
        if (rows > p.stride && rows * pixels > kMostPixels) break;
        one.columns = static_cast<int>(columns), one.group_rows = static_cast<int>(rows);
        lay_out(expand, call, one);
        if (one.shared_bytes > limits.shared_per_block || blocks_of_multiprocessor(one, limits) < resident) break;
        ExpandDepthwisePlan cut = one;
        const int64_t clocks = choose_blocks(expand, call, limits, beside, cut);
        if (clocks < least) least = clocks, plan = cut;
      }
    }
  }
  return true;
}

}  // namespace

namespace {

ExpandDepthwisePlan make_plan(const PointwiseParams& expand, const DepthwiseCall& call, const DeviceLimits& limits,
                              const BesideItems* beside) {
  const DepthwiseParams& p = *call.depthwise;
  ExpandDepthwisePlan plan;
  if (call.gated || !expands_in_shared_memory(expand, p) || !is_aligned(p.y)) return plan;
  if (!expands(expand) && beside == nullptr) return plan;
  DepthwisePlan& d = plan.depthwise;
  plan.channels = channels_of(expand);
  d.vector = kVector, d.channel_vectors = plan.channels / kVector, d.unrolled = true;
  d.strip = depthwise_strip(compiled_kernel(p.kernel_h, p.kernel_w), p.stride);
  d.channel_groups = static_cast<int>(divide_up(p.channels, plan.channels));
  d.out_height = static_cast<int>(p.out_height);
  if (!choose_cut(expand, call, limits, beside, plan)) return plan;
  d.tiles = plan.bands * plan.column_tiles;
  plan.by_channel_groups = divisor(d.channel_groups), plan.by_tiles = divisor(d.tiles);
  plan.by_column_tiles = multiplier_of(plan.column_tiles);
  d.units = divide_up(p.batch, d.images);
  d.strips = strips_of_row(plan) * d.out_height;
  d.shared_bytes = plan.shared_bytes;
  plan.fits = product({d.units, d.tiles, d.channel_groups}) <= std::numeric_limits<int32_t>::max();
  return plan;
}

}  // namespace

ItemClocks clocks_of_items(const PointwiseParams& expand, const DepthwiseCall& call, const ExpandDepthwisePlan& plan,
                           const DeviceLimits& limits) {
  const int64_t resident = blocks_of_multiprocessor(plan, limits);
  const BlockClocks one(expand, call, plan, plan.bands, plan.depthwise.images);
  const int64_t item = one.item(resident, limits);
  return {one.blocks * item / (limits.multiprocessors * resident), item + one.gate};
}

ExpandDepthwisePlan plan_expand_depthwise(const PointwiseParams& expand, const DepthwiseCall& call,
                                          const DeviceLimits& limits, const BesideItems* beside) {
  static PlanMemory<ExpandDepthwisePlan> kept;
  const auto& [depthwise, se, pooled, gated] = call;
  const PlanKey key(limits, expand, depthwise, se, pooled, gated, beside == nullptr ? -1 : beside->clocks,
                    beside != nullptr && beside->more);
  return *kept.of(key, [&] { return make_plan(expand, call, limits, beside); });
}

PlannedLaunches planned_launches(const PointwiseParams&, const DepthwiseCall& call, const ExpandDepthwisePlan& plan) {
  const DepthwiseScratch scratch = depthwise_scratch(call, plan.depthwise);
  PlannedLaunch one;
  one.kernel = "expand_depthwise";
  one.grid = plan.depthwise.blocks();
  one.block_x = kDepthwiseThreads;
  one.shared_bytes = plan.shared_bytes;
  one.workspace_bytes = (scratch.partial + scratch.hidden + scratch.arrivals) * int64_t(sizeof(float));
  return {one};
}

}  // namespace effkernels::cuda
