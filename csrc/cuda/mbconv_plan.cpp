#include "mbconv.h"

#include <algorithm>
#include <limits>

#include "../sizes.h"
#include "plan_memory.h"

namespace effkernels::cuda {
namespace {

constexpr int kVector = 8;  // channels of a thread: 16 bytes
constexpr int kVectors = kExpandedChannels / kVector;
constexpr int kWarps = kMBConvThreads / 32;
constexpr int64_t kFloat = sizeof(float);
constexpr int kFewestPassColumns = 32;  // but for the last pass
// Beyond this no plane fits, and offsets in what is below fit into 32 bits.
constexpr int64_t kMostPixels = 1 << 14;
constexpr int64_t kMostChannels = 1 << 16;

int64_t up(int64_t value, int64_t unit) { return divide_up(value, unit) * unit; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Why no plan fits, or null.
const char* problem_of(const MBConvCall& call, const DeviceLimits& limits) {
  const PointwiseParams &expand = *call.expand, &project = *call.project;
  const DepthwiseParams& p = *call.depthwise;
  if (p.dtype == DType::kFloat32) return "float32";
  if (limits.largest_cluster <= 1) return "the GPU has no clusters";
  if (!expands(expand)) return "the block has no expansion";
  if (!expands_in_shared_memory(expand, p)) return "kernel, stride, padding or channels are not compiled";
  const bool vectors =
      project.out_channels % kVector == 0 && is_aligned(project.weight.data) && is_aligned(project.y) &&
      is_aligned(project.residual) &&
      (project.residual == nullptr || ((p.batch == 1 || project.residual_stride_n % kVector == 0) &&
                                       (project.pixels == 1 || project.residual_stride_p % kVector == 0)));
  if (!vectors) return "output channels are no vectors of 8";
  if (product({p.height, p.width}) > kMostPixels || product({p.out_height, p.out_width}) > kMostPixels ||
      std::max({p.channels, expand.in_channels, project.out_channels}) > kMostChannels ||
      (call.se != nullptr && call.se->reduced > kMostReduced))
    return "the plane does not fit into shared memory";
  return nullptr;
}

// Instructions of a warp, roughly, for a pair of parts of the depthwise result: a row of taps takes reads of columns
// and of taps, products, and two instructions to place a tap; a result norm, activation, store and sum.
int64_t window_instructions(const DepthwiseParams& p, int columns) {
  const int64_t inputs = (columns - 1) * p.stride + p.kernel_w, tap_pairs = (p.kernel_w + 1) / 2;
  return p.kernel_h * (inputs / 2 + columns * tap_pairs + 3 * p.kernel_w + 5) + 120 + columns * 31;
}
int64_t window_rounds(const MBConvPlan& plan, int64_t groups) {
  return divide_up(groups * plan.expand.depthwise.lanes * kVectors, kWarps);
}

// The parts of the depthwise result, and the rows of the expanded tensor that they are computed from, with their
// padding.
void lay_out_ring(const DepthwiseParams& p, MBConvPlan& plan) {
  constexpr int kPixelUnits = kExpandedChannels * 2 / 16;
  const auto cut = [&](int columns) {
    plan.window_columns = columns;
    plan.column_parts = static_cast<int>(divide_up(p.out_width, columns));
    plan.parts = static_cast<int>(divide_up(p.out_height, kWindowRows)) * plan.column_parts;
    plan.expand.depthwise.lanes = (plan.parts + 1) / 2;
    return window_rounds(plan, 1) * window_instructions(p, columns);
  };
  const int64_t narrow = cut(kNarrowWindow);
  if (p.stride == 1 && cut(kWideWindow) >= narrow) cut(kNarrowWindow);
  const int64_t last_column = (p.out_width - 1) * p.stride - p.pad_left + p.kernel_w;
  plan.by_in_columns = multiplier_of(static_cast<int>(std::min<int64_t>(last_column, p.width)));
  plan.by_column_parts = multiplier_of(plan.column_parts), plan.by_lanes = multiplier_of(plan.expand.depthwise.lanes);
  // A part is read in pairs of columns.
  const int of_part = static_cast<int>(up((plan.window_columns - 1) * p.stride + p.kernel_w, 2));
  const int read = (plan.column_parts - 1) * plan.window_columns * p.stride + of_part;
  const int columns = std::max(read, p.pad_left + static_cast<int>(p.width));
  plan.expand.ring_rows =
      std::max(static_cast<int>((p.out_height - 1) * p.stride + p.kernel_h), p.pad_top + static_cast<int>(p.height));
  // Eight rows below each other are read at a time: 16 bytes of each are in different banks.
  plan.expand.ring_row_bytes = (columns * kPixelUnits + 1) * 16;
}

// Instructions, roughly, of the warp that has most of the project product of a pass.
int64_t project_instructions(const MBConvPlan& plan, int64_t pixels, int tile) {
  const int64_t of_tile = kProjectedTiles[tile].pixels / 16, fragments = plan.tile_columns / kProjectedColumns;
  const int64_t tiles =
      divide_up(pixels, kProjectedTiles[tile].pixels) * divide_up(plan.padded_columns, plan.tile_columns);
  const int64_t of_slice = 12 + of_tile * 14 + fragments * (1 + 2 * of_tile);
  return divide_up(tiles, kWarps) * (90 + plan.held_slices * of_slice + fragments * 4 * of_tile);
}

// The tile of the product with the fewest of them.
void choose_projected(int64_t pixels, MBConvPlan& plan) {
  int64_t least = std::numeric_limits<int64_t>::max();
  int columns = 0;
  for (const int tile : {0, 1}) {
    const int64_t tiles = divide_up(plan.padded_columns, kProjectedTiles[tile].columns);
    plan.tile_columns = static_cast<int>(up(divide_up(plan.padded_columns, tiles), 2 * kProjectedColumns));
    const int64_t instructions = project_instructions(plan, pixels, tile);
    if (instructions < least) least = instructions, plan.projected = tile, columns = plan.tile_columns;
  }
  plan.tile_columns = columns;
}

// Sets what follows from groups, ring_slots, weight_slots and passes.
void lay_out(const MBConvCall& call, MBConvPlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int64_t out_channels = call.project->out_channels, pixels = p.out_height * p.out_width;
  const int64_t taps = int64_t(p.kernel_h) * p.kernel_w;
  const ExpandDepthwisePlan& of_group = plan.expand;
  plan.pass_columns = static_cast<int>(up(divide_up(out_channels, plan.passes), kVector));
  plan.padded_columns = static_cast<int>(up(plan.pass_columns, 2 * kProjectedColumns));
  plan.partial_stride = plan.pass_columns + (plan.pass_columns % 16 == 0 ? 8 : 0);
  plan.by_vectors = multiplier_of(plan.pass_columns / kVector);
  plan.held_slices = static_cast<int>(divide_up(int64_t(plan.groups) * kExpandedChannels * 2, kPointwiseSliceBytes));
  choose_projected(pixels, plan);
  plan.held_pixels = static_cast<int>(up(pixels, kProjectedTiles[plan.projected].pixels));

  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t here = at;
    at = up(at + bytes, 128);
    return static_cast<int>(here);
  };
  place(plan.groups * taps * kExpandedChannels * 2);
  plan.norm_at = place(plan.groups * 4 * kExpandedChannels * kFloat);
  plan.expand.places_at = place(place_bytes(of_group.stage_pixels));
  plan.project_norm_at = place(2 * out_channels * kFloat);
  plan.weights_at = place(int64_t(plan.weight_slots) * of_group.slices * kExpandedChannels * kPointwiseSliceBytes);
  plan.project_weights_at = place(int64_t(plan.held_slices) * plan.padded_columns * kPointwiseSliceBytes);
  plan.gate_weights_at = place(call.se == nullptr ? 0 : 2 * call.se->reduced * plan.groups * kExpandedChannels * 2);
  plan.x_at = place(int64_t(of_group.slices) * of_group.stage_pixels * kPointwiseSliceBytes);
  plan.sums_at = place((plan.ring_slots * of_group.depthwise.lanes + plan.groups) * kExpandedChannels * kFloat);
  plan.hidden_at = place(call.se == nullptr ? 0 : 2 * up(call.se->reduced, 4) * kFloat);
  plan.gate_at = place(int64_t(plan.held_slices) * kPointwiseSliceBytes);
  plan.held_at = place(int64_t(plan.held_slices) * plan.held_pixels * kPointwiseSliceBytes);
  plan.ring_at = place(std::max(int64_t(plan.ring_slots) * of_group.ring_rows * of_group.ring_row_bytes,
                                pixels * plan.partial_stride * kFloat));
  plan.shared_bytes = at;
}

// Clusters that the GPU holds at a time. A cluster is within a group of 16 multiprocessors or a few more, the rule on
// the GPUs that have clusters.
int64_t clusters_at_once(const MBConvPlan& plan, const DeviceLimits& limits) {
  constexpr int64_t kOfGroup = 16;
  const int64_t of_group = std::min<int64_t>(kOfGroup, limits.multiprocessors) / plan.cluster;
  return std::max<int64_t>(1, std::max<int64_t>(1, limits.multiprocessors / kOfGroup) * of_group);
}

// Clocks, roughly: what the choices below weigh. A model, no measurement: instructions of the warp that has most of
// each part, which are two clocks apart, and waits. The numbers of instructions are those of
// csrc/cuda/expand_depthwise's model and of the machine code of the other parts.
struct Clocks {
  int64_t prologue, image;

  Clocks(const MBConvCall& call, const MBConvPlan& plan) {
    constexpr int64_t kClusterBarrier = 500, kBlockBarrier = 60, kFirstInput = 2000, kBytesOfClock = 48;
    const DepthwiseParams& p = *call.depthwise;
    const ExpandDepthwisePlan& of_group = plan.expand;
    const int64_t expanded_pixels = of_group.stage_pixels, products = divide_up(call.expand->in_channels, 16);
    const bool pairs = expanded_pixels > kPixelsOfSingles;
    const int64_t fragments = divide_up(expanded_pixels, pairs ? 32 : 16);
    const int64_t slots = plan.ring_slots, turns = divide_up(plan.groups, slots);
    const int64_t expand = divide_up(slots * fragments, kWarps) * (pairs ? 275 + 26 * products : 155 + 19 * products);
    const int64_t lanes = of_group.depthwise.lanes;
    const int64_t depthwise =
        window_rounds(plan, slots) * window_instructions(p, plan.window_columns) + (call.se != nullptr ? 7 * lanes : 0);
    int64_t instructions = turns * (expand + depthwise + 4 * kBlockBarrier);
    if (call.se != nullptr) {
      const int64_t rows = divide_up(call.se->reduced, kMBConvThreads / 16);
      instructions += rows * (40 + plan.groups * 10) + plan.team * 6 + 200 + call.se->reduced * 6;
    }
    const int64_t vectors = call.project->pixels * (plan.pass_columns / kVector);
    instructions += plan.passes * (project_instructions(plan, call.project->pixels, plan.projected) +
                                   divide_up(vectors, plan.cluster * kMBConvThreads) * (90 + 14 * plan.team));
    image = 2 * instructions + (2 * plan.passes + (call.se != nullptr)) * kClusterBarrier;
    const int64_t weights = plan.sums_at - plan.weights_at;
    prologue = kFirstInput + weights / kBytesOfClock + plan.groups * 400;
    if (plan.weight_slots < plan.groups) image += plan.groups * 500;
    if (plan.passes > 1) image += plan.passes * 500;
  }
};

// The same for the three launches, fitted to the estimates of effkernels/plan for B0's blocks on an H200: three times
// start and end of a launch with waits for parameters, and the multiprocessors' work on every image.
int64_t clocks_of_three_launches(const MBConvCall& call, const DeviceLimits& limits) {
  constexpr int64_t kFixed = 17000;
  const DepthwiseParams& p = *call.depthwise;
  const int64_t pixels = p.height * p.width, out_pixels = p.out_height * p.out_width;
  const int64_t inner = expands(*call.expand) ? call.expand->in_channels : 0;
  const int64_t products = p.channels * (pixels * inner + out_pixels * call.project->out_channels);
  const int64_t depthwise = p.channels * (out_pixels * (p.kernel_w == 3 ? 300 : 450)) / 1000;
  return kFixed + p.batch * (products / 650 + depthwise) / limits.multiprocessors;
}

void cut_images(const MBConvCall& call, const DeviceLimits& limits, MBConvPlan& plan, int cluster) {
  plan.cluster = cluster, plan.by_cluster = divisor(cluster);
  const int64_t batch = call.depthwise->batch, at_once = clusters_at_once(plan, limits);
  plan.images = static_cast<int>(std::min<int64_t>(divide_up(batch, at_once), kMostImagesOfClusters));
  plan.units = divide_up(batch, plan.images);
}

int64_t clocks_of(const MBConvCall& call, const MBConvPlan& plan, const DeviceLimits& limits) {
  const Clocks clocks(call, plan);
  return divide_up(plan.units, clusters_at_once(plan, limits)) * (clocks.prologue + plan.images * clocks.image);
}

}  // namespace

MBConvPlan fit_mbconv(const MBConvCall& call, const DeviceLimits& limits) {
  const DepthwiseParams& p = *call.depthwise;
  MBConvPlan plan;
  if (const char* problem = problem_of(call, limits)) {
    plan.reason = problem;
    return plan;
  }
  MBConvPlan one;
  one.all_groups = static_cast<int>(divide_up(p.channels, kExpandedChannels));
  DepthwisePlan& d = one.expand.depthwise;
  d.vector = kVector, d.channel_vectors = kVectors, d.unrolled = true;
  d.channel_groups = one.all_groups, d.out_height = static_cast<int>(p.out_height);
  one.expand.columns = static_cast<int>(p.out_width);
  one.expand.group_rows = static_cast<int>(p.height);
  lay_out_x(*call.expand, p, one.expand);
  lay_out_ring(p, one);
  plan.reason = "the plane does not fit into shared memory";

  int64_t least = std::numeric_limits<int64_t>::max();
  const int fewest = static_cast<int>(divide_up(one.all_groups, limits.largest_cluster));
  for (one.groups = fewest; one.groups <= one.all_groups; ++one.groups) {
    one.team = static_cast<int>(divide_up(one.all_groups, one.groups));
    if (one.groups > fewest && one.team == divide_up(one.all_groups, one.groups - 1)) continue;
    bool fits = false;
    // All groups at once, or at least the weights of all in shared memory, where there is room.
    const int slots[][2] = {{one.groups, one.groups}, {1, one.groups}, {1, 1}};
    for (const auto& [ring_slots, weight_slots] : slots) {
      one.ring_slots = ring_slots, one.weight_slots = weight_slots;
      for (one.passes = 1; !fits && one.passes <= divide_up(call.project->out_channels, kFewestPassColumns);
           ++one.passes) {
        lay_out(call, one);
        if (divide_up(call.project->out_channels, one.pass_columns) < one.passes) continue;
        if (one.shared_bytes > limits.shared_per_block) continue;
        fits = true;
        cut_images(call, limits, one, one.team);
        const int64_t clocks = clocks_of(call, one, limits);
        if (clocks >= least) continue;
        least = clocks, plan = one;
      }
      if (fits) break;
    }
  }
  plan.fits = least < std::numeric_limits<int64_t>::max();
  if (plan.fits) plan.reason = "";
  return plan;
}

namespace {

// What a block may be a part of.
struct Candidate {
  MBConvPlan cluster;
  MBConvQueuePlan queue;
  int64_t without_cluster;  // clocks

  Candidate(const MBConvCall& call, const DeviceLimits& limits)
      : cluster(fit_mbconv(call, limits)), queue(plan_mbconv_queue(call, limits, true)) {
    without_cluster = queue.fits ? queue.expand.clocks : clocks_of_three_launches(call, limits);
  }
};

// As many blocks from the first on as fit into clusters, of the same size; none where the first does not, or where a
// queue or three launches for each are faster, together.
MBConvStackPlan stack_of_clusters(const MBConvCall* calls, const Candidate* candidates, int count,
                                  const DeviceLimits& limits) {
  // What a launch more takes, of which programmatic dependent launch hides some: an assumption, 0.5 us.
  constexpr int64_t kLaunch = 900;
  MBConvStackPlan stack;
  int cluster = 1;
  int64_t alone = -kLaunch, together = 0, without = 0;
  for (int i = 0; i < std::min(count, kMostStackedBlocks) && candidates[i].cluster.fits; ++i) {
    const MBConvPlan& plan = candidates[i].cluster;
    stack.clusters.push_back(plan);
    alone += clocks_of(calls[i], plan, limits) + kLaunch;
    cluster = std::max(cluster, plan.team);
    without += candidates[i].without_cluster;
  }
  std::vector<MBConvPlan> shared = stack.clusters;
  for (size_t i = 0; i < shared.size(); ++i) {
    cut_images(calls[i], limits, shared[i], cluster);
    together += clocks_of(calls[i], shared[i], limits);
  }
  if (std::min(alone, together) > without)
    stack.clusters.clear();
  else if (together <= alone)
    stack.clusters = std::move(shared);
  else
    stack.clusters.resize(std::min<size_t>(stack.clusters.size(), 1));
  for (size_t i = 0; i < stack.clusters.size(); ++i) {
    stack.shared_bytes = std::max(stack.shared_bytes, stack.clusters[i].shared_bytes);
    if (i > 0) stack.clusters[i].waits_first = stack.clusters[i].x_at > stack.clusters[i - 1].ring_at;
  }
  stack.count = static_cast<int>(stack.clusters.size());
  return stack;
}

// As many blocks from the first on as may be items of one queue: those of whose items a multiprocessor holds the same
// number.
MBConvStackPlan stack_of_items(const MBConvCall* calls, const Candidate* candidates, int count,
                               const DeviceLimits& limits) {
  const auto resident = [&](int64_t shared_bytes) { return expand_depthwise_resident(shared_bytes, limits); };
  MBConvStackPlan stack;
  stack.reason = candidates[0].queue.reason;
  int64_t items = 0;
  for (int i = 0; i < std::min(count, kMostStackedBlocks); ++i) {
    const MBConvQueuePlan& plan = candidates[i].queue;
    const int64_t shared_bytes = std::max(stack.shared_bytes, plan.shared_bytes),
                  first = candidates[0].queue.shared_bytes;
    items += plan.items;
    if (!plan.fits || resident(plan.shared_bytes) != resident(first) || resident(shared_bytes) != resident(first) ||
        items > std::numeric_limits<int32_t>::max())
      break;
    stack.items.push_back(plan);
    if (!order_blocks(limits, shared_bytes, stack.items)) {
      stack.items.pop_back();
      break;
    }
    stack.shared_bytes = shared_bytes;
  }
  stack.count = static_cast<int>(stack.items.size());
  if (stack.count == 1) {
    stack.items.front() = plan_mbconv_queue(calls[0], limits, false);
    stack.shared_bytes = stack.items.front().shared_bytes;
  }
  return stack;
}

MBConvStackPlans make_stacks(const std::vector<MBConvCall>& calls, const DeviceLimits& limits) {
  std::vector<Candidate> candidates;
  for (const MBConvCall& call : calls) candidates.emplace_back(call, limits);
  const int all = static_cast<int>(calls.size());
  const auto clusters_from = [&](int first) {
    return stack_of_clusters(&calls[first], &candidates[first], all - first, limits);
  };
  std::vector<MBConvStackPlan> found;
  for (int first = 0; first < all; first += found.back().count) {
    MBConvStackPlan stack = clusters_from(first);
    if (stack.clusters.empty()) {
      int end = first + 1;  // of those that are not in clusters
      while (end < all && clusters_from(end).clusters.empty()) ++end;
      stack = stack_of_items(&calls[first], &candidates[first], end - first, limits);
      if (stack.items.empty()) stack.count = 1;
    }
    stack.first = first;
    found.push_back(std::move(stack));
  }
  return found;
}

PlanMemory<MBConvStackPlans>& kept_stacks() {
  static PlanMemory<MBConvStackPlans> kept;
  return kept;
}

}  // namespace

std::shared_ptr<const MBConvStackPlans> plan_mbconv_stack(const std::vector<MBConvCall>& calls,
                                                          const DeviceLimits& limits) {
  PlanKey key(limits);
  for (const MBConvCall& call : calls) {
    const auto& [expand, depthwise, se, project] = call;
    key.add(expand), key.add(depthwise), key.add(se), key.add(project);
  }
  return kept_stacks().of(key, [&] { return make_stacks(calls, limits); });
}

int64_t kept_stack_plans() { return kept_stacks().size(); }

PlannedLaunches planned_launches(const MBConvCall* calls, const MBConvStackPlan& plan) {
  if (!plan.items.empty()) return {planned_queue(calls, plan)};
  if (plan.clusters.empty()) return {};
  PlannedLaunch one;
  one.kernel = plan.count > 1 ? "mbconv_stack" : "mbconv";
  one.grid = plan.clusters.front().blocks();
  one.block_x = kMBConvThreads;
  one.shared_bytes = plan.shared_bytes;
  one.cluster = plan.clusters.front().cluster;
  return {one};
}

}  // namespace effkernels::cuda
