#include <algorithm>
#include <limits>

#include "../sizes.h"
#include "depthwise.h"
#include "squeeze_excite.h"

namespace effkernels::cuda {
namespace {

constexpr int64_t kMostPixels = 1 << 29;  // of a plane, a window or a padding: their sums are formed in 32 bits
constexpr int kMostChannelVectors = 16;   // 256 bytes: two cache lines of neighbouring channels per pixel
constexpr int kFewestChannelVectors = 4;  // 64 bytes: two sectors of a cache line
constexpr int64_t kMostRounds = 16;

int vector_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }
int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool vectors_fit(const DepthwiseParams& p, int vector) {
  const auto divides = [vector](int64_t value) { return value % vector == 0; };
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  // The stride of a dimension of size 1 is never used, and may be anything.
  return divides(p.channels) && (p.batch == 1 || divides(p.x_stride_n)) && (p.height == 1 || divides(p.x_stride_h)) &&
         (p.width == 1 || divides(p.x_stride_w)) && aligned(p.x) && aligned(p.y);
}

// Threads along the channels, at most `most`: the largest divisor, so that no thread idles, but not less than half.
int threads_along_channels(int64_t vectors, int most) {
  for (int count = most; 2 * count > most; --count)
    if (vectors % count == 0) return count;
  return static_cast<int>(std::min<int64_t>(vectors, most));
}

// Cuts the channels and the plane for blocks that each have `most` vectors of channels at most.
void cut(const DepthwiseParams& p, int most, int threads, DepthwisePlan& plan) {
  plan.strips = static_cast<int>(divide_up(p.out_width, plan.strip) * p.out_height);
  const int64_t vectors = divide_up(p.channels, plan.vector);
  plan.channel_vectors = threads_along_channels(vectors, most);
  plan.channel_groups = static_cast<int>(divide_up(vectors, plan.channel_vectors));
  plan.lanes = static_cast<int>(std::min<int64_t>(threads / plan.channel_vectors, plan.strips));
}

int64_t taps_of(const DepthwiseParams& p) { return int64_t(p.kernel_h) * p.kernel_w; }

// Taps, scale and shift, the sums of the lanes, the means, a flag, the hidden values: see SumsInShared.
int64_t shared_floats(const DepthwiseCall& call, const DepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int64_t channels = plan.block_channels();
  int64_t floats = (taps_of(p) + 2) * channels;
  if (call.pooled || call.se != nullptr) floats += (plan.lanes + plan.images) * channels + 4;
  if (call.se != nullptr && !plan.in_cluster && plan.team == 0) floats += plan.images * call.se->reduced;
  return floats;
}

// Fits the result of an image into the shared memory of a team of blocks, the largest team that the device can hold: a
// cluster, or the share of an image in a grid that is resident as a whole, one block on each multiprocessor.
void plan_team(const DepthwiseCall& call, const DeviceLimits& limits, bool in_cluster, DepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  const int compiled = compiled_kernel(p.kernel_h, p.kernel_w);
  if (!plan.unrolled || (compiled != 3 && compiled != 5) || p.batch == 0) return;
  const int64_t most = in_cluster ? limits.largest_cluster : limits.multiprocessors / p.batch;
  for (int slabs = 1; slabs <= plan.channel_groups; ++slabs) {
    const int64_t channel_blocks = divide_up(plan.channel_groups, slabs);
    if (channel_blocks > most) continue;
    for (int64_t row_blocks = std::min(most / channel_blocks, p.out_height); row_blocks >= 1; --row_blocks) {
      const int64_t rows = divide_up(p.out_height, row_blocks);
      if (divide_up(p.out_height, rows) != row_blocks) continue;  // the last block of rows would be empty
      DepthwisePlan team = plan;
      team.slabs = slabs, team.row_blocks = static_cast<int>(row_blocks);
      team.team = static_cast<int>(channel_blocks * row_blocks);
      team.in_cluster = in_cluster;
      team.tiles = 1, team.images = 1, team.units = p.batch;
      const int64_t slab_strips = divide_up(p.out_width, plan.strip) * rows;
      team.lanes = static_cast<int>(std::min<int64_t>(kResidentThreads / plan.channel_vectors, slab_strips));
      team.rounds = static_cast<int>(divide_up(slab_strips, team.lanes));
      const int64_t held = slabs * rows * p.out_width * plan.block_channels();
      const int64_t floats = (taps_of(p) + 2) * plan.block_channels()        // taps, scale and shift
                             + (team.lanes + slabs) * plan.block_channels()  // sums of the lanes, of the block
                             + 2 * divide_up(call.se->reduced, 4) * 4        // w_reduce times the sums, hidden
                             + slabs * plan.block_channels();                // the gate
      team.shared_bytes = divide_up(floats * int64_t(sizeof(float)), 16) * 16 + held * size_of(p.dtype);
      if (team.shared_bytes <= limits.shared_per_block && p.batch * team.team <= std::numeric_limits<int32_t>::max()) {
        plan = team;
        return;
      }
    }
  }
}

// Few images: narrower blocks, down to a cache line of channels, so that every multiprocessor has one.
void cut_for_all(const DepthwiseParams& p, const DeviceLimits& limits, int most, DepthwisePlan& plan) {
  cut(p, most, kDepthwiseThreads, plan);
  for (most /= 2; most >= kFewestChannelVectors; most /= 2) {
    if (p.batch * plan.channel_groups * divide_up(plan.strips, plan.lanes) >= limits.multiprocessors) break;
    cut(p, most, kDepthwiseThreads, plan);
  }
}

// Rounds and images of a block. More of them share its prologue (taps, scale and shift, and the weights of
// squeeze-and-excitation), fewer leave less work for the last blocks: the least of waves * (prologue + rounds), which
// is a model, not a measurement. Rounds that an image does not need go to the next images.
void plan_rounds(const DepthwiseParams& p, const DeviceLimits& limits, DepthwisePlan& plan) {
  constexpr int64_t kPrologue = 2;  // in rounds: its loads wait for each other, those of a round mostly do not
  const int64_t resident = int64_t(limits.multiprocessors) * depthwise_resident_blocks(p.dtype, plan.strip);
  const int64_t image_rounds = divide_up(plan.strips, plan.lanes);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t wanted = 1; wanted <= kMostRounds; ++wanted) {
    const int64_t tiles = divide_up(image_rounds, wanted), rounds = divide_up(image_rounds, tiles);
    const int64_t most_images = std::clamp<int64_t>(p.batch, 1, kMostImagesOfGate);
    const int64_t images = tiles > 1 ? 1 : std::clamp<int64_t>(wanted / image_rounds, 1, most_images);
    const int64_t blocks = divide_up(p.batch, images) * tiles * plan.channel_groups;
    const int64_t cost = divide_up(blocks, resident) * (kPrologue + rounds * images);
    if (cost >= least) continue;
    least = cost;
    plan.tiles = static_cast<int>(tiles), plan.rounds = static_cast<int>(rounds);
    plan.images = static_cast<int>(images);
  }
}

}  // namespace

DepthwisePlan plan_depthwise(const DepthwiseCall& call, const DeviceLimits& limits) {
  const DepthwiseParams& p = *call.depthwise;
  DepthwisePlan plan;
  const int widest = vector_of(p.dtype);
  plan.vector = vectors_fit(p, widest) ? widest : 1;
  plan.unrolled = plan.vector == widest && p.dilation == 1 && (p.stride == 1 || p.stride == 2);
  const int compiled = compiled_kernel(p.kernel_h, p.kernel_w);
  plan.strip = plan.unrolled ? depthwise_strip(compiled, p.stride) : 1;

  const int64_t window = int64_t(std::max(p.kernel_h, p.kernel_w) - 1) * p.dilation + 1;
  if (p.out_height * p.out_width > kMostPixels || p.height * p.width > kMostPixels ||
      std::max<int64_t>({window, p.pad_top, p.pad_left}) > kMostPixels) {
    plan.tiles = 0;
    return plan;
  }
  plan.out_height = static_cast<int>(p.out_height);
  int widest_block = kMostChannelVectors;
  const int64_t taps_of_vector = (taps_of(p) + 2) * plan.vector * int64_t(sizeof(float));
  const int64_t share = limits.shared_per_multiprocessor / depthwise_resident_blocks(p.dtype, plan.strip);
  if (compiled == 0)  // as many blocks fit by their taps as by their registers
    while (widest_block > kFewestChannelVectors && widest_block * taps_of_vector > share) widest_block /= 2;
  if (call.gated && call.se != nullptr) {
    cut(p, widest_block, kDepthwiseThreads, plan);
    if (limits.largest_cluster > 1) plan_team(call, limits, true, plan);
    if (plan.team == 0) plan_team(call, limits, false, plan);
    if (plan.team > 0) return plan;
  }
  cut_for_all(p, limits, widest_block, plan);
  if (plan.unrolled && has_short_strips(compiled) &&
      p.batch * plan.channel_groups * divide_up(plan.strips, plan.lanes) < limits.multiprocessors) {
    plan.strip = kShortStrip;
    cut(p, kFewestChannelVectors, kDepthwiseThreads, plan);  // the last block has fewer sums of others to add
  }
  plan_rounds(p, limits, plan);
  // A block's shared memory grows with its images (their hidden values) and its channels (their taps).
  const auto shared_bytes = [&] { return shared_floats(call, plan) * int64_t(sizeof(float)); };
  while (shared_bytes() > limits.shared_per_block) {
    if (plan.images > 1) {
      --plan.images;
    } else if (plan.channel_vectors > 1) {
      cut(p, plan.channel_vectors / 2, kDepthwiseThreads, plan);
      plan_rounds(p, limits, plan);
    } else {
      break;
    }
  }
  plan.units = divide_up(p.batch, plan.images);
  plan.shared_bytes = shared_bytes();
  return plan;
}

DepthwiseScratch depthwise_scratch(const DepthwiseCall& call, const DepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  DepthwiseScratch scratch;
  if (plan.team > 0) {
    if (!plan.in_cluster)
      scratch.hidden = product({p.batch, plan.team, call.se->reduced}), scratch.arrivals = 2 * p.batch;
    return scratch;
  }
  if (call.se != nullptr) {
    scratch.hidden = product({p.batch, plan.channel_groups, plan.tiles, call.se->reduced});
    scratch.arrivals = plan.units;
  } else if (call.pooled && plan.tiles > 1) {
    scratch.partial = product({p.batch, plan.tiles, p.channels});
    scratch.arrivals = plan.units * plan.channel_groups;
  }
  return scratch;
}

PlannedLaunches planned_launches(const DepthwiseCall& call, const DepthwisePlan& plan) {
  const DepthwiseParams& p = *call.depthwise;
  if (p.batch == 0) return {};
  const DepthwiseScratch scratch = depthwise_scratch(call, plan);
  PlannedLaunch one;
  one.kernel = plan.team > 0 ? "depthwise_resident" : plan.unrolled ? "depthwise_strips" : "depthwise_any";
  one.grid = plan.team > 0 ? p.batch * plan.team : plan.blocks();
  one.block_x = plan.team > 0 ? kResidentThreads : kDepthwiseThreads;
  one.shared_bytes = plan.shared_bytes;
  one.cluster = plan.in_cluster ? plan.team : 1;
  one.cooperative = plan.team > 0 && !plan.in_cluster;
  one.workspace_bytes = (scratch.partial + scratch.hidden + scratch.arrivals) * int64_t(sizeof(float));
  return {one};
}

}  // namespace effkernels::cuda
