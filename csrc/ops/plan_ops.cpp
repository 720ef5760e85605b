// The launches of the CUDA operators, without a GPU: the same plan functions that the operators use.
#include <algorithm>
#include <sstream>
#include <string>
#include <utility>

#include "../cuda/conv.h"
#include "../cuda/depthwise.h"
#include "../cuda/expand_depthwise.h"
#include "../cuda/mbconv.h"
#include "../cuda/pointwise.h"
#include "../cuda/squeeze_excite.h"
#include "../sizes.h"
#include "check.h"
#include "pack.h"
#include "registry.h"

namespace effkernels::ops {
namespace {

using cuda::DeviceLimits;
using Shape = std::vector<int64_t>;

// A launch, and how its plan cuts the work: `key=value` after a space each, "variant" with the template arguments.
struct DescribedLaunch {
  cuda::PlannedLaunch launch;
  std::string cut;
};
using DescribedLaunches = std::vector<DescribedLaunch>;

void append(DescribedLaunches& to, const cuda::PlannedLaunches& launches, const std::string& cut) {
  for (const cuda::PlannedLaunch& one : launches) to.push_back({one, cut});
}

constexpr int kLimits = 8;

void check_count(const std::string& op, const char* name, const Shape& given, size_t wanted) {
  STD_TORCH_CHECK(given.size() == wanted, "cuda_plan: ", name, " of ", op, " has ", given.size(),
                  " numbers; allowed: ", wanted);
  for (const int64_t value : given)
    STD_TORCH_CHECK(value >= 0 && value < (int64_t(1) << 31), "cuda_plan: ", name, " of ", op, " holds ", value,
                    "; allowed: 0 to 2^31 - 1");
}

DeviceLimits limits_of(const std::string& op, const Shape& given) {
  check_count(op, "limits", given, kLimits);
  DeviceLimits limits;
  int* const to[kLimits] = {&limits.capability,
                            &limits.multiprocessors,
                            &limits.shared_per_multiprocessor,
                            &limits.shared_per_block,
                            &limits.threads_per_multiprocessor,
                            &limits.blocks_per_multiprocessor,
                            &limits.registers_per_multiprocessor,
                            &limits.largest_cluster};
  for (int i = 0; i < kLimits; i++) {
    STD_TORCH_CHECK(given[i] > 0, "cuda_plan: limits holds ", given[i], "; allowed: 1 or more");
    *to[i] = int(given[i]);
  }
  return limits;
}

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

int vector_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

// The arguments are the template arguments after the element type.
template <class... Arguments>
std::string variant(const char* kernel, DType dtype, Arguments... arguments) {
  std::ostringstream out;
  out << std::boolalpha << " variant=" << kernel << '<' << name_of(dtype);
  ((out << ',' << arguments), ...);
  out << '>';
  return out.str();
}

std::string cut_of(const DepthwiseParams& p, const cuda::DepthwisePlan& plan) {
  const int kernel = cuda::compiled_kernel(p.kernel_h, p.kernel_w);
  std::ostringstream out;
  if (plan.team > 0)
    out << variant("depthwise_resident", p.dtype, kernel, p.stride, plan.strip, plan.in_cluster);
  else if (plan.unrolled)
    out << variant("depthwise_strips", p.dtype, kernel, p.stride, plan.strip);
  else
    out << variant("depthwise_any", p.dtype, plan.vector);
  out << " channel_vectors=" << plan.channel_vectors << " vector=" << plan.vector << " lanes=" << plan.lanes
      << " strip=" << plan.strip << " rounds=" << plan.rounds << " images=" << plan.images
      << " channel_groups=" << plan.channel_groups << " tiles=" << plan.tiles << " team=" << plan.team
      << " row_blocks=" << plan.row_blocks << " slabs=" << plan.slabs;
  return out.str();
}

std::string cut_of(const PointwiseParams& p, const cuda::PointwisePlan& plan) {
  const cuda::PointwiseTile& tile = cuda::kPointwiseTiles[plan.tile];
  std::ostringstream out;
  out << variant(p.pools ? "pointwise_pool" : "pointwise", p.dtype, static_cast<int>(plan.product), plan.tile,
                 static_cast<int>(plan.epilogue), plan.converts)
      << " rows=" << tile.rows << " warp_rows=" << tile.warp_rows() << " columns=" << tile.columns
      << " steps=" << plan.steps << " parts=" << plan.parts << " tiles=" << plan.tiles
      << " row_tiles=" << plan.row_tiles << " column_tiles=" << plan.column_tiles
      << " gate_images=" << (p.pools ? 0 : plan.images) << " images=" << (p.pools ? plan.images : 0)
      << " keeps_weight=" << plan.keeps_weight << " tile=" << plan.tile << " epilogue=" << int(plan.epilogue)
      << " converts=" << plan.converts;
  return out.str();
}

std::string cut_of(const DepthwiseParams& p, const cuda::ExpandDepthwisePlan& plan) {
  const cuda::DepthwisePlan& d = plan.depthwise;
  std::ostringstream out;
  out << variant("expand_depthwise", p.dtype, p.kernel_h, p.stride, d.strip) << " lanes=" << d.lanes
      << " strip=" << d.strip << " images=" << d.images << " channel_groups=" << d.channel_groups
      << " tiles=" << d.tiles << " channels=" << plan.channels << " bands=" << plan.bands
      << " band_rows=" << plan.band_rows << " column_tiles=" << plan.column_tiles << " columns=" << plan.columns
      << " group_rows=" << plan.group_rows << " group_out_rows=" << plan.group_out_rows
      << " ring_rows=" << plan.ring_rows << " slices=" << plan.slices << " pairs=" << plan.pairs;
  return out.str();
}

std::string cut_of(const DepthwiseParams& p, const cuda::MBConvPlan& plan) {
  const cuda::DepthwisePlan& d = plan.expand.depthwise;
  std::ostringstream out;
  out << variant("mbconv", p.dtype, p.kernel_h, p.stride, plan.window_columns) << " lanes=" << d.lanes
      << " team=" << plan.team << " groups=" << plan.groups << " channel_groups=" << plan.all_groups
      << " images=" << plan.images << " weight_slots=" << plan.weight_slots << " passes=" << plan.passes
      << " pass_columns=" << plan.pass_columns << " held_pixels=" << plan.held_pixels
      << " slices=" << plan.expand.slices << " ring_rows=" << plan.expand.ring_rows << " ring_slots=" << plan.ring_slots
      << " window_columns=" << plan.window_columns << " projected=" << plan.projected
      << " tile_columns=" << plan.tile_columns << " waits_first=" << plan.waits_first
      << " ring_row_bytes=" << plan.expand.ring_row_bytes;
  return out.str();
}

std::string cut_of(const PointwiseParams& project, const DepthwiseParams& p, const cuda::MBConvQueuePlan& plan) {
  const auto prefixed = [](const std::string& cut, const char* prefix) {
    std::string out;
    std::istringstream words(cut);
    for (std::string word; words >> word;) out += std::string(" ") + prefix + word;
    return out;
  };
  std::ostringstream out;
  out << variant("mbconv_queue", p.dtype) << " units=" << plan.expand.depthwise.units << " ahead=" << plan.ahead
      << " first_round=" << plan.first_round << " items=" << plan.items << prefixed(cut_of(p, plan.expand), "expand_")
      << " expand_grid=" << plan.expand.depthwise.blocks() << prefixed(cut_of(project, plan.project), "project_")
      << " project_grid=" << plan.project.blocks;
  return out.str();
}

std::string cut_of(const ConvParams& p, const cuda::ConvPlan& plan) {
  if (!plan.fused) return variant("norm_act", p.dtype, plan.norm_act.vectors ? vector_of(p.dtype) : 1);
  std::ostringstream out;
  out << variant(plan.stem ? "conv_stem" : "conv", p.dtype) << " warps=" << plan.warps
      << " padded_channels=" << plan.padded_channels << " weight_bytes=" << plan.weight_bytes
      << " window_height=" << plan.window_height << " window_width=" << plan.window_width << " tiles=" << plan.tiles
      << " tiles_per_block=" << plan.tiles_per_block;
  return out.str();
}

// A tensor that is there, and aligned: a plan looks at addresses, and reads none.
void* somewhere() { return reinterpret_cast<void*>(uintptr_t(1) << 12); }
Param some(DType dtype) { return {somewhere(), dtype}; }

Norm some_norm() {
  Norm norm;
  norm.weight = norm.bias = norm.mean = norm.var = some(DType::kFloat32);
  norm.eps = 1e-5f;
  return norm;
}

// The activation of params.h that a shape may have after its first `sizes` numbers; identity where it has none.
Activation activation_after(const std::string& op, const Shape& s, size_t sizes) {
  check_count(op, "shape", s, s.size() == sizes + 1 ? sizes + 1 : sizes);
  if (s.size() == sizes) return Activation::kIdentity;
  STD_TORCH_CHECK(s[sizes] <= int64_t(Activation::kGeluTanh), "cuda_plan: activation ", s[sizes], " of ", op,
                  "; allowed: 0 to ", int64_t(Activation::kGeluTanh));
  return static_cast<Activation>(s[sizes]);
}

void check_reduced(int64_t reduced) {
  STD_TORCH_CHECK(reduced <= cuda::kMostReduced, "cuda_plan: reduced=", reduced, "; allowed: up to ",
                  cuda::kMostReduced);
}

int64_t out_size(int64_t size, int64_t before, int64_t after, int64_t window, int64_t stride) {
  STD_TORCH_CHECK(stride >= 1 && size + before + after >= window, "cuda_plan: a size of ", size, " with padding ",
                  before, " + ", after, ", window ", window, ", stride ", stride, "; allowed: at least one output");
  return (size + before + after - window) / stride + 1;
}

// As check.cpp checks a tensor's sizes.
void check_elements(const std::string& op, const char* name, const Shape& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) elements = product({elements, std::max<int64_t>(size, 1)});
  STD_TORCH_CHECK(elements <= kMostElements, "cuda_plan: ", name, " of ", op,
                  " has too many elements; allowed: sizes whose product is at most 2^54");
}

bool excites(const std::string& op) { return op == "depthwise_bn_act_gate" || op == "depthwise_bn_act_se"; }

DepthwiseParams depthwise_of(const std::string& op, DType dtype, const Shape& s) {
  check_count(op, "shape", s, 13);
  DepthwiseParams p;
  p.x = p.y = somewhere();
  p.dtype = dtype, p.weight = some(dtype), p.norm = some_norm();
  p.batch = s[0], p.channels = s[1], p.height = s[2], p.width = s[3];
  p.kernel_h = int32_t(s[4]), p.kernel_w = int32_t(s[5]), p.stride = int32_t(s[6]), p.dilation = int32_t(s[7]);
  check_depthwise_kernel("cuda_plan", s[4], s[5]);
  STD_TORCH_CHECK(s[7] >= 1 && s[1] >= 1, "cuda_plan: dilation=", s[7], ", channels=", s[1], "; allowed: 1 or more");
  p.pad_top = int32_t(s[8]), p.pad_left = int32_t(s[10]);
  p.out_height = out_size(s[2], s[8], s[9], (s[4] - 1) * s[7] + 1, s[6]);
  p.out_width = out_size(s[3], s[10], s[11], (s[5] - 1) * s[7] + 1, s[6]);
  check_elements(op, "x", {p.batch, p.channels, p.height, p.width});
  check_elements(op, "the result", {p.batch, p.channels, p.out_height, p.out_width});
  check_elements(op, "the hidden layer", {p.batch, p.channels, s[12]});
  p.x_stride_w = p.channels, p.x_stride_h = p.width * p.channels, p.x_stride_n = p.height * p.x_stride_h;
  check_reduced(s[12]);
  STD_TORCH_CHECK(excites(op) == (s[12] > 0), "cuda_plan: reduced=", s[12], " of ", op,
                  "; allowed: ", excites(op) ? "1 or more" : "0");
  return p;
}

DescribedLaunches plan_of_depthwise(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  const DepthwiseParams p = depthwise_of(op, dtype, s);
  SqueezeExciteParams se;
  se.w_reduce = se.w_expand = some(dtype), se.b_reduce = se.b_expand = some(DType::kFloat32);
  se.gate = somewhere(), se.gate_dtype = dtype;
  se.batch = s[0], se.channels = s[1], se.reduced = s[12];
  const cuda::DepthwiseCall call{&p, excites(op) ? &se : nullptr, op == "depthwise_bn_act_squeeze",
                                 op == "depthwise_bn_act_se"};
  const cuda::DepthwisePlan plan = cuda::plan_depthwise(call, limits);
  DescribedLaunches launches;
  append(launches, cuda::planned_launches(call, plan), cut_of(p, plan));
  if (call.gated && plan.team == 0) {
    ScaleParams scale;
    scale.y = somewhere(), scale.gate = somewhere(), scale.dtype = dtype;
    scale.batch = p.batch, scale.channels = p.channels, scale.pixels = p.out_height * p.out_width;
    const cuda::ScalePlan plan_of_scale = cuda::plan_scale(scale, limits);
    append(launches, cuda::planned_launches(scale, plan_of_scale),
           variant("scale_by_gate", dtype, plan_of_scale.vectors ? vector_of(dtype) : 1));
  }
  return launches;
}

DescribedLaunches plan_of_gate(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  check_count(op, "shape", s, 3);
  check_elements(op, "pooled", {s[0], s[1]});
  check_elements(op, "w_reduce", {s[1], s[2]});
  check_elements(op, "the hidden layer", {s[0], s[2]});
  SqueezeExciteParams p;
  p.w_reduce = p.w_expand = some(dtype), p.b_reduce = p.b_expand = some(DType::kFloat32);
  p.pooled = static_cast<const float*>(somewhere()), p.gate = somewhere(), p.gate_dtype = dtype;
  p.batch = s[0], p.channels = s[1], p.reduced = s[2];
  check_reduced(s[2]);
  STD_TORCH_CHECK(s[1] >= 1 && s[2] >= 1, "cuda_plan: channels=", s[1], ", reduced=", s[2], "; allowed: 1 or more");
  const cuda::SqueezeExcitePlan plan = cuda::plan_squeeze_excite(p, limits);
  std::ostringstream cut;
  cut << variant("squeeze_excite_gate", dtype) << " images=" << plan.images
      << " split_channels=" << plan.split_channels;
  DescribedLaunches launches;
  append(launches, cuda::planned_launches(p, plan), cut.str());
  return launches;
}

PointwiseParams pointwise_of(const std::string& op, DType dtype, const Shape& s) {
  const Activation activation = activation_after(op, s, 8);
  check_elements(op, "x", {s[0], s[1], s[2], s[3]});
  check_elements(op, "the result", {s[0], s[1], s[2], s[4]});
  check_elements(op, "weight", {s[3], s[4]});
  PointwiseParams p;
  p.x = p.y = somewhere();
  p.dtype = dtype, p.weight = some(dtype), p.norm = some_norm();
  p.batch = s[0], p.pixels = s[1] * s[2], p.in_channels = s[3], p.out_channels = s[4];
  STD_TORCH_CHECK(s[3] >= 1 && s[4] >= 1, "cuda_plan: channels ", s[3], " to ", s[4], "; allowed: 1 or more");
  if (s[5]) p.gate = some(dtype);
  if (s[6]) p.residual = somewhere();
  p.pools = op == "pointwise_bn_act_pool";
  STD_TORCH_CHECK(!p.pools || !(s[5] || s[6]), "cuda_plan: gate ", s[5], ", residual ", s[6], " of ", op,
                  "; allowed: 0");
  p.allow_tf32 = s[7] != 0, p.activation = activation;
  p.x_stride_p = p.in_channels, p.x_stride_n = p.pixels * p.in_channels;
  p.residual_stride_p = p.out_channels, p.residual_stride_n = p.pixels * p.out_channels;
  return p;
}

DescribedLaunches plan_of_pointwise(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  const PointwiseParams p = pointwise_of(op, dtype, s);
  const cuda::PointwisePlan plan = cuda::plan_pointwise(p, limits);
  DescribedLaunches launches;
  append(launches, cuda::planned_launches(p, plan), cut_of(p, plan));
  return launches;
}

// The sizes of the depthwise operator, x's channels being the expanded ones, then the input channels, allow_tf32 and
// the first product's activation.
DescribedLaunches plan_of_expand(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  const int64_t activation = int64_t(activation_after(op, s, 15));
  const Shape pointwise = {s[0], s[2], s[3], s[13], s[1], 0, 0, s[14], activation};
  const Shape depthwise(s.begin(), s.begin() + 13);
  const PointwiseParams expand = pointwise_of("pointwise_bn_act", dtype, pointwise);
  const DepthwiseParams p = depthwise_of("depthwise_bn_act_squeeze", dtype, depthwise);
  const cuda::DepthwiseCall call{&p, nullptr, true, false};
  const cuda::ExpandDepthwisePlan plan = cuda::plan_expand_depthwise(expand, call, limits);
  DescribedLaunches launches;
  if (plan.fits) {
    append(launches, cuda::planned_launches(expand, call, plan), cut_of(p, plan));
    return launches;
  }
  launches = plan_of_pointwise("pointwise_bn_act", dtype, pointwise, limits);
  for (DescribedLaunch& one : plan_of_depthwise("depthwise_bn_act_squeeze", dtype, depthwise, limits))
    launches.push_back(std::move(one));
  return launches;
}

// A block by its sizes: those of the depthwise operator, x's channels being the expanded ones and without
// squeeze-and-excitation reduced 0; then the input channels, 0 without expansion, the output channels, whether there is
// a residual, allow_tf32 and the first product's activation.
struct PlannedBlock {
  static constexpr size_t kSizes = 17;  // and the activation

  Shape depthwise_shape, first, last;
  std::string depthwise_op;
  DepthwiseParams depthwise;
  PointwiseParams expand, project;
  SqueezeExciteParams se;

  PlannedBlock(const std::string& op, DType dtype, const Shape& s) {
    const int64_t activation = int64_t(activation_after(op, s, kSizes));
    depthwise_shape.assign(s.begin(), s.begin() + 13);
    depthwise_op = s[12] > 0 ? "depthwise_bn_act_gate" : "depthwise_bn_act";
    depthwise = depthwise_of(depthwise_op, dtype, depthwise_shape);
    const bool expands = s[13] > 0;
    STD_TORCH_CHECK(expands || activation == 0, "cuda_plan: activation ", activation, " of ", op,
                    " without input channels; allowed: 0");
    first = {s[0], s[2], s[3], expands ? s[13] : s[1], s[1], 0, 0, s[16], activation};
    last = {s[0], depthwise.out_height, depthwise.out_width, s[1], s[14], s[12] > 0, s[15], s[16]};
    expand = pointwise_of("pointwise_bn_act", dtype, first);
    if (!expands) expand.weight = Param(), expand.norm = Norm();
    project = pointwise_of("pointwise_bn_act", dtype, last);
    se.batch = s[0], se.channels = s[1], se.reduced = s[12];
  }

  cuda::MBConvCall call() const { return {&expand, &depthwise, se.reduced > 0 ? &se : nullptr, &project}; }
};

// A line for each launch of a part of a stack, and of a launch of several blocks one for each of them, which says how
// many blocks the launch has; "at": the block.
DescribedLaunches launches_of(const PlannedBlock* blocks, const std::vector<cuda::MBConvCall>& calls,
                              const cuda::MBConvStackPlan& plan, DType dtype, const DeviceLimits& limits) {
  DescribedLaunches launches;
  const cuda::PlannedLaunches planned = cuda::planned_launches(&calls[size_t(plan.first)], plan);
  for (int i = 0; i < plan.count && !planned.empty(); ++i) {
    const PlannedBlock& block = blocks[plan.first + i];
    cuda::PlannedLaunch one = planned.front();
    std::string cut;
    if (plan.items.empty()) {
      cut = cut_of(block.depthwise, plan.clusters[size_t(i)]);
    } else {
      cut = cut_of(block.project, block.depthwise, plan.items[size_t(i)]);
      one.workspace_bytes = cuda::mbconv_queue_bytes(block.call(), plan.items[size_t(i)]);
    }
    if (plan.count > 1) cut += " stacked=" + std::to_string(plan.count);
    append(launches, {one}, cut);
  }
  if (planned.empty()) {
    const PlannedBlock& block = blocks[plan.first];
    if (cuda::expands(block.expand)) launches = plan_of_pointwise("pointwise_bn_act", dtype, block.first, limits);
    for (DescribedLaunch& one : plan_of_depthwise(block.depthwise_op, dtype, block.depthwise_shape, limits))
      launches.push_back(std::move(one));
    if (!launches.empty()) {
      std::string reason = plan.reason;
      std::replace(reason.begin(), reason.end(), ' ', '-');
      launches.front().cut += " reason=" + reason;
    }
    for (DescribedLaunch& one : plan_of_pointwise("pointwise_bn_act", dtype, block.last, limits))
      launches.push_back(std::move(one));
  }
  return launches;
}

DescribedLaunches plan_of_mbconv(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  const PlannedBlock block(op, dtype, s);
  const std::vector<cuda::MBConvCall> calls{block.call()};
  return launches_of(&block, calls, cuda::plan_mbconv_stack(calls, limits)->front(), dtype, limits);
}

// The sizes of each block, with the activation.
DescribedLaunches plan_of_mbconv_stack(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  constexpr size_t kSizes = PlannedBlock::kSizes + 1;
  const size_t count = s.size() / kSizes;
  STD_TORCH_CHECK(count > 0 && s.size() == count * kSizes, "cuda_plan: shape of ", op, " has ", s.size(),
                  " numbers; allowed: ", kSizes, " for each block");
  std::vector<PlannedBlock> blocks;
  std::vector<cuda::MBConvCall> calls;
  blocks.reserve(count);
  for (size_t i = 0; i < count; ++i)
    blocks.emplace_back(op, dtype, Shape(s.begin() + int64_t(i * kSizes), s.begin() + int64_t((i + 1) * kSizes)));
  for (const PlannedBlock& block : blocks) calls.push_back(block.call());
  DescribedLaunches launches;
  const std::shared_ptr<const cuda::MBConvStackPlans> plans = cuda::plan_mbconv_stack(calls, limits);
  for (const cuda::MBConvStackPlan& plan : *plans) {
    DescribedLaunches of_plan = launches_of(blocks.data(), calls, plan, dtype, limits);
    for (size_t i = 0; i < of_plan.size(); ++i) {
      of_plan[i].cut += " at=" + std::to_string(size_t(plan.first) + (plan.count > 1 ? i : 0));
      launches.push_back(std::move(of_plan[i]));
    }
  }
  return launches;
}

DescribedLaunches plan_of_conv(const std::string& op, DType dtype, const Shape& s, const DeviceLimits& limits) {
  check_count(op, "shape", s, 12);
  ConvParams p;
  p.x = p.y = somewhere();
  p.dtype = dtype, p.weight = some(dtype), p.norm = some_norm();
  p.batch = s[0], p.in_channels = s[1], p.out_channels = s[2], p.height = s[3], p.width = s[4];
  p.kernel_h = int32_t(s[5]), p.kernel_w = int32_t(s[6]), p.stride = int32_t(s[7]);
  p.pad_top = int32_t(s[8]), p.pad_left = int32_t(s[10]);
  p.out_height = out_size(s[3], s[8], s[9], s[5], s[7]), p.out_width = out_size(s[4], s[10], s[11], s[6], s[7]);
  check_elements(op, "x", {p.batch, p.in_channels, p.height, p.width});
  check_elements(op, "weight", {p.out_channels, p.in_channels, s[5], s[6]});
  check_elements(op, "the result", {p.batch, p.out_channels, p.out_height, p.out_width});
  p.x_stride_c = 1, p.x_stride_w = p.in_channels, p.x_stride_h = p.width * p.in_channels;
  p.x_stride_n = p.height * p.x_stride_h;
  const cuda::ConvPlan plan = cuda::plan_conv(p, limits);
  DescribedLaunches launches;
  if (!plan.fused && p.batch > 0) {
    launches.push_back({});
    launches.back().launch.kernel = "aten::convolution";
  }
  append(launches, cuda::planned_launches(p, plan), cut_of(p, plan));
  return launches;
}

std::string cuda_plan(const std::string& op, const std::string& dtype_name, const Shape& shape,
                      const Shape& limit_values) {
  const DType dtype = dtype_named("cuda_plan", dtype_name);
  const DeviceLimits limits = limits_of(op, limit_values);
  DescribedLaunches launches;
  if (op == "pointwise_bn_act" || op == "pointwise_bn_act_pool")
    launches = plan_of_pointwise(op, dtype, shape, limits);
  else if (op == "expand_depthwise_squeeze")
    launches = plan_of_expand(op, dtype, shape, limits);
  else if (op == "mbconv")
    launches = plan_of_mbconv(op, dtype, shape, limits);
  else if (op == "mbconv_stack")
    launches = plan_of_mbconv_stack(op, dtype, shape, limits);
  else if (op == "conv_bn_act")
    launches = plan_of_conv(op, dtype, shape, limits);
  else if (op == "squeeze_excite_gate")
    launches = plan_of_gate(op, dtype, shape, limits);
  else if (op == "depthwise_bn_act" || op == "depthwise_bn_act_squeeze" || op == "depthwise_bn_act_gate" ||
           op == "depthwise_bn_act_se")
    launches = plan_of_depthwise(op, dtype, shape, limits);
  else
    STD_TORCH_CHECK(false, "cuda_plan: op='", op, "' is not an operator");
  std::ostringstream out;
  for (const auto& [one, cut] : launches)
    out << "kernel=" << one.kernel << " grid=" << one.grid << " block=" << one.block_x << ',' << one.block_y
        << " shared=" << one.shared_bytes << " cluster=" << one.cluster << " cooperative=" << int(one.cooperative)
        << " workspace=" << one.workspace_bytes << cut << '\n';
  return out.str();
}

int64_t cuda_plans_kept() { return cuda::kept_stack_plans(); }

int64_t cuda_launches() { return cuda::launch_count(); }

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&effkernels::ops::cuda_plan));
  m.impl("cuda_plans_kept", TORCH_BOX(&effkernels::ops::cuda_plans_kept));
  m.impl("cuda_launches", TORCH_BOX(&effkernels::ops::cuda_launches));
}
