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

// Sets what follows from groups, weight_slots and passes.
void lay_out(const MBConvCall& call, MBConvPlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int64_t out_channels = call.project->out_channels, pixels = p.out_height * p.out_width;
  const int64_t taps = int64_t(p.kernel_h) * p.kernel_w;
  const ExpandDepthwisePlan& of_group = plan.expand;
  plan.pass_columns = static_cast<int>(up(divide_up(out_channels, plan.passes), kVector));
  plan.padded_columns = static_cast<int>(up(plan.pass_columns, kProjectedColumns));
  plan.partial_stride = plan.pass_columns + (plan.pass_columns % 16 == 0 ? 8 : 0);
  plan.by_vectors = multiplier_of(plan.pass_columns / kVector);
  plan.held_pixels = static_cast<int>(up(pixels, kProjectedPixels));
  plan.held_slices = static_cast<int>(divide_up(int64_t(plan.groups) * kExpandedChannels * 2, kPointwiseSliceBytes));

  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t here = at;
    at = up(at + bytes, 128);
    return static_cast<int>(here);
  };
  place(plan.groups * (taps + 2) * kExpandedChannels * kFloat);
  plan.sums_at = place((of_group.depthwise.lanes + plan.groups) * kExpandedChannels * kFloat);
  plan.hidden_at = place(call.se == nullptr ? 0 : 2 * up(call.se->reduced, 4) * kFloat);
  plan.gate_at = place(int64_t(plan.held_slices) * kPointwiseSliceBytes);
  plan.norm_at = place(plan.groups * 2 * kExpandedChannels * kFloat);
  plan.expand.places_at = place(place_bytes(of_group.stage_pixels));
  plan.project_norm_at = place(2 * out_channels * kFloat);
  plan.weights_at = place(int64_t(plan.weight_slots) * of_group.slices * kExpandedChannels * kPointwiseSliceBytes);
  plan.project_weights_at = place(int64_t(plan.held_slices) * plan.padded_columns * kPointwiseSliceBytes);
  plan.x_at = place(int64_t(of_group.slices) * of_group.stage_pixels * kPointwiseSliceBytes);
  plan.held_at = place(int64_t(plan.held_slices) * plan.held_pixels * kPointwiseSliceBytes);
  plan.ring_at = place(std::max(p.height * of_group.ring_row_bytes, pixels * plan.partial_stride * kFloat));
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
    const int64_t strip = of_group.depthwise.strip, lanes = of_group.depthwise.lanes;
    const int64_t expanded_pixels = of_group.stage_pixels, products = divide_up(call.expand->in_channels, 16);
    const bool pairs = expanded_pixels > kPixelsOfSingles;
    const int64_t fragments = divide_up(expanded_pixels, pairs ? 32 : 16);
    const int64_t expand = divide_up(fragments, kWarps) * (pairs ? 275 + 26 * products : 155 + 19 * products);
    const int64_t inputs = (strip - 1) * p.stride + p.kernel_w;
    const int64_t of_strip = strip * p.kernel_h * p.kernel_w * kVector + p.kernel_h * inputs * 9 + strip * 40;
    const int64_t strips = divide_up(p.out_width, strip) * p.out_height;
    const int64_t depthwise = divide_up(strips, lanes) * of_strip + (call.se != nullptr ? 7 * lanes : 0);
    int64_t instructions = plan.groups * (expand + depthwise + 4 * kBlockBarrier);
    if (call.se != nullptr) {
      const int64_t rows = divide_up(call.se->reduced, kMBConvThreads / 16);
      instructions += rows * (40 + plan.groups * 10) + plan.team * 6 + 200 + call.se->reduced * 6;
    }
    const int64_t tiles = int64_t(plan.held_pixels / kProjectedPixels) * (plan.padded_columns / kProjectedColumns);
    const int64_t vectors = call.project->pixels * (plan.pass_columns / kVector);
    instructions += plan.passes * (divide_up(tiles, kWarps) * (150 + 60 * plan.groups) +
                                   divide_up(vectors, plan.cluster * kMBConvThreads) * (90 + 14 * plan.team));
    image = 2 * instructions + (2 * plan.passes + (call.se != nullptr)) * kClusterBarrier;
    const int64_t weights = plan.held_at - plan.weights_at;
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
  const int64_t products = p.channels * (pixels * call.expand->in_channels + out_pixels * call.project->out_channels);
  const int64_t depthwise = p.channels * (out_pixels * (p.kernel_w == 3 ? 300 : 450)) / 1000;
  return kFixed + p.batch * (products / 650 + depthwise) / limits.multiprocessors;
}

void cut_images(const MBConvCall& call, const DeviceLimits& limits, MBConvPlan& plan, int cluster) {
  plan.cluster = cluster;
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
  one.expand.group_rows = one.expand.ring_rows = static_cast<int>(p.height);
  one.expand.group_out_rows = static_cast<int>(p.out_height);
  plan.reason = "the plane does not fit into shared memory";

  int64_t least = std::numeric_limits<int64_t>::max();
  const int strips[] = {depthwise_strip(compiled_kernel(p.kernel_h, p.kernel_w), p.stride), kShortStrip};
  for (const int strip : strips) {
    d.strip = strip;
    const int64_t all_strips = divide_up(p.out_width, strip) * p.out_height;
    d.lanes = static_cast<int>(std::min<int64_t>(kMBConvThreads / kVectors, all_strips));
    lay_out_group(*call.expand, p, one.expand);
    const int fewest = static_cast<int>(divide_up(one.all_groups, limits.largest_cluster));
    for (one.groups = fewest; one.groups <= one.all_groups; ++one.groups) {
      one.team = static_cast<int>(divide_up(one.all_groups, one.groups));
      if (one.groups > fewest && one.team == divide_up(one.all_groups, one.groups - 1)) continue;
      bool fits = false;
      for (const int slots : {one.groups, 1}) {
        one.weight_slots = slots;
        for (one.passes = 1; !fits && one.passes <= divide_up(call.project->out_channels, kProjectedColumns);
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
  }
  plan.fits = least < std::numeric_limits<int64_t>::max();
  if (plan.fits) plan.reason = "";
  return plan;
}

MBConvPlan plan_mbconv_cluster(const MBConvCall& call, const DeviceLimits& limits) {
  MBConvPlan plan = fit_mbconv(call, limits);
  if (plan.fits && clocks_of(call, plan, limits) > clocks_of_three_launches(call, limits))
    plan.fits = false, plan.reason = "three launches are faster";
  return plan;
}

MBConvChoice plan_mbconv(const MBConvCall& call, const DeviceLimits& limits) {
  MBConvChoice choice;
  choice.cluster = plan_mbconv_cluster(call, limits);
  if (!choice.cluster.fits) choice.queue = plan_mbconv_queue(call, limits);
  return choice;
}

PlannedLaunches planned_launches(const MBConvCall&, const MBConvPlan& plan) {
  PlannedLaunch one;
  one.kernel = "mbconv";
  one.grid = plan.blocks();
  one.block_x = kMBConvThreads;
  one.shared_bytes = plan.shared_bytes;
  one.cluster = plan.cluster;
  return {one};
}

namespace {

MBConvStackPlans make_stacks(const std::vector<MBConvCall>& calls, const DeviceLimits& limits) {
  // What a launch more takes, of which programmatic dependent launch hides some: an assumption, 0.5 us.
  constexpr int64_t kLaunch = 900;
  std::vector<MBConvStackPlan> found;
  for (size_t first = 0; first < calls.size();) {
    MBConvStackPlan stack;
    stack.first = static_cast<int>(first);
    int cluster = 1;
    int64_t alone = -kLaunch, together = 0;
    for (size_t i = first; i < calls.size() && stack.blocks.size() < kMostStackedBlocks; ++i) {
      const MBConvPlan plan = plan_mbconv_cluster(calls[i], limits);
      if (!plan.fits && !stack.blocks.empty()) break;
      stack.blocks.push_back(plan);
      if (!plan.fits) break;
      alone += clocks_of(calls[i], plan, limits) + kLaunch;
      cluster = std::max(cluster, plan.team);
    }
    if (stack.is_stack()) {
      const std::vector<MBConvPlan> singles = stack.blocks;
      for (size_t i = 0; i < stack.blocks.size(); ++i) {
        MBConvPlan& plan = stack.blocks[i];
        cut_images(calls[first + i], limits, plan, cluster);
        together += clocks_of(calls[first + i], plan, limits);
        stack.shared_bytes = std::max(stack.shared_bytes, plan.shared_bytes);
      }
      if (together > alone) {
        for (size_t i = 0; i < singles.size(); ++i)
          found.push_back({static_cast<int>(first + i), {singles[i]}, {}, singles[i].shared_bytes});
        first += singles.size();
        continue;
      }
    } else {
      stack.shared_bytes = stack.blocks.front().shared_bytes;
      if (!stack.blocks.front().fits) stack.queue = plan_mbconv_queue(calls[first], limits);
    }
    first += stack.blocks.size();
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

PlannedLaunches planned_launches(const MBConvStackPlan& plan) {
  PlannedLaunch one;
  one.kernel = "mbconv_stack";
  one.grid = plan.blocks.front().blocks();
  one.block_x = kMBConvThreads;
  one.shared_bytes = plan.shared_bytes;
  one.cluster = plan.blocks.front().cluster;
  return {one};
}

}  // namespace effkernels::cuda
