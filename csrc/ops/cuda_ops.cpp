// CUDA's side of every operator: check and pack (check.h), plan, take scratch memory, launch on torch's current stream.
#include <algorithm>
#include <array>

#include "../cuda/conv.h"
#include "../cuda/counters.h"
#include "../cuda/depthwise.h"
#include "../cuda/expand_depthwise.h"
#include "../cuda/mbconv.h"
#include "../cuda/pointwise.h"
#include "../cuda/squeeze_excite.h"
#include "cuda_device.h"
#include "registry.h"
#include "signatures.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;

void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel could not be launched: ", error ? error : "");
}

cuda::DeviceLimits limits_of(const char* op, const OnDevice& here) {
  cuda::DeviceLimits limits;
  check_launch(op, cuda::enter_device(here.index(), &limits));
  return limits;
}

float* scratch_floats(const Tensor& like, int64_t count, Keep& keep) {
  if (count == 0) return nullptr;
  keep.push_back(empty_matrix(like, 1, count, ScalarType::Float));
  return static_cast<float*>(keep.back().mutable_data_ptr());
}

// Scratch memory of a depthwise launch, and its counters on `stream`, with `more` of them after its own.
cuda::DepthwiseWork depthwise_work(const char* op, const cuda::DepthwiseScratch& scratch, int64_t more,
                                   const Tensor& like, const OnDevice& here, void* stream, Keep& keep) {
  cuda::DepthwiseWork work;
  work.partial = scratch_floats(like, scratch.partial, keep);
  work.hidden = scratch_floats(like, scratch.hidden, keep);
  if (scratch.arrivals + more > 0)
    check_launch(op, cuda::acquire_counters(here.index(), stream, scratch.arrivals + more, &work.arrivals));
  return work;
}

// What CUDA refused, or null.
const char* enqueue_depthwise(const char* op, const cuda::DepthwiseCall& call, const cuda::DepthwisePlan& plan,
                              const Tensor& like, const OnDevice& here, Keep& keep) {
  void* stream = here.stream();
  const cuda::DepthwiseScratch scratch = cuda::depthwise_scratch(call, plan);
  return cuda::launch_depthwise(call, plan, depthwise_work(op, scratch, 0, like, here, stream, keep), stream);
}

const char* enqueue_pointwise(const char* op, const PointwiseParams& p, const cuda::PointwisePlan& plan,
                              const Tensor& like, const OnDevice& here, Keep& keep) {
  const cuda::PointwiseScratch scratch = cuda::pointwise_scratch(p, plan);
  cuda::PointwiseWork work;
  work.partial = scratch_floats(like, scratch.partial, keep);
  void* stream = here.stream();
  if (scratch.arrivals > 0)
    check_launch(op, cuda::acquire_counters(here.index(), stream, scratch.arrivals, &work.arrivals));
  return cuda::launch_pointwise(p, plan, work, stream);
}

Tensor depthwise_bn_act(const DepthwiseOpArguments& a) {
  constexpr const char* op = "depthwise_bn_act";
  Keep keep;
  Depthwise d = make_depthwise(op, a, keep);
  const OnDevice here(d.y);
  const cuda::DepthwiseCall call{&d.params, nullptr, false, false};
  check_launch(op, enqueue_depthwise(op, call, cuda::plan_depthwise(call, limits_of(op, here)), d.y, here, keep));
  return d.y;
}

std::tuple<Tensor, Tensor> depthwise_bn_act_squeeze(const DepthwiseOpArguments& a) {
  constexpr const char* op = "depthwise_bn_act_squeeze";
  Keep keep;
  Depthwise d = make_depthwise(op, a, keep);
  Tensor pooled = empty_matrix(a.x, d.params.batch, d.params.channels, ScalarType::Float);
  d.params.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  const OnDevice here(d.y);
  const cuda::DepthwiseCall call{&d.params, nullptr, true, false};
  check_launch(op, enqueue_depthwise(op, call, cuda::plan_depthwise(call, limits_of(op, here)), d.y, here, keep));
  return {d.y, pooled};
}

Tensor squeeze_excite_gate(const Tensor& pooled, const SeArguments& a) {
  constexpr const char* op = "squeeze_excite_gate";
  Keep keep;
  check_pooled(op, pooled);
  SqueezeExcite s = make_squeeze_excite(op, pooled, pooled.size(0), pooled.size(1), a, a.w_expand.scalar_type(), keep);
  keep.push_back(pooled.is_contiguous() ? pooled : torch::stable::contiguous(pooled));
  s.params.pooled = static_cast<const float*>(keep.back().const_data_ptr());
  const OnDevice here(s.gate);
  const cuda::SqueezeExcitePlan plan = cuda::plan_squeeze_excite(s.params, limits_of(op, here));
  check_launch(op, cuda::launch_squeeze_excite(s.params, plan, here.stream()));
  return s.gate;
}

std::tuple<Tensor, Tensor> depthwise_bn_act_gate(const DepthwiseOpArguments& a, const SeArguments& se) {
  constexpr const char* op = "depthwise_bn_act_gate";
  Keep keep;
  Depthwise d = make_depthwise(op, a, keep);
  const SqueezeExcite s = make_squeeze_excite(op, a.x, d.params.batch, d.params.channels, se, a.x.scalar_type(), keep);
  const OnDevice here(d.y);
  const cuda::DepthwiseCall call{&d.params, &s.params, false, false};
  check_launch(op, enqueue_depthwise(op, call, cuda::plan_depthwise(call, limits_of(op, here)), d.y, here, keep));
  return {d.y, s.gate};
}

// One launch where a team of blocks holds the result of an image; else the gate, and a second launch that applies it.
Tensor depthwise_bn_act_se(const DepthwiseOpArguments& a, const SeArguments& se) {
  constexpr const char* op = "depthwise_bn_act_se";
  Keep keep;
  Depthwise d = make_depthwise(op, a, keep);
  const SqueezeExcite s = make_squeeze_excite(op, a.x, d.params.batch, d.params.channels, se, a.x.scalar_type(), keep);
  const OnDevice here(d.y);
  cuda::DeviceLimits limits = limits_of(op, here);
  cuda::DepthwiseCall call{&d.params, &s.params, false, true};
  cuda::DepthwisePlan plan;
  const char* refused = cuda::kTeamRefused;
  // 8 blocks are what a GPU with clusters has room for, as a rule; the largest there are, not always. Then a team in a
  // grid that is resident as a whole (1), and at last none (0).
  for (const int largest : {limits.largest_cluster, 8, 1, 0}) {
    if (refused != cuda::kTeamRefused) break;
    call.gated = largest > 0;
    limits.largest_cluster = std::min(std::max(largest, 1), limits.largest_cluster);
    plan = cuda::plan_depthwise(call, limits);
    refused = enqueue_depthwise(op, call, plan, d.y, here, keep);
  }
  check_launch(op, refused);
  if (plan.team == 0) {
    ScaleParams p;
    p.y = d.params.y, p.gate = s.params.gate, p.dtype = d.params.dtype;
    p.batch = d.params.batch, p.channels = d.params.channels, p.pixels = d.params.out_height * d.params.out_width;
    check_launch(op, cuda::launch_scale(p, cuda::plan_scale(p, limits), here.stream()));
  }
  return d.y;
}

Tensor run_pointwise(const char* op, const Pointwise& p, Keep& keep) {
  const OnDevice here(p.y);
  const cuda::PointwisePlan plan = cuda::plan_pointwise(p.params, limits_of(op, here));
  check_launch(op, enqueue_pointwise(op, p.params, plan, p.y, here, keep));
  return p.y;
}

Tensor pointwise_bn_act(const PointwiseArguments& a) {
  constexpr const char* op = "pointwise_bn_act";
  Keep keep;
  return run_pointwise(op, make_pointwise(op, a, keep), keep);
}

Tensor pointwise_bn_act_pool(const PointwiseArguments& a) {
  constexpr const char* op = "pointwise_bn_act_pool";
  Keep keep;
  return run_pointwise(op, make_pointwise_pool(op, a, keep), keep);
}

// One launch where the expanded tensor stays on the chip; else two, and it passes through memory.
std::tuple<Tensor, Tensor> expand_depthwise_squeeze(const PointwiseArguments& expand,
                                                    const DepthwiseOpArguments& depthwise) {
  constexpr const char* op = "expand_depthwise_squeeze";
  Keep keep;
  ExpandDepthwise e = describe_expand_depthwise(op, expand, depthwise, keep);
  const Tensor& y = e.depthwise.y;
  const OnDevice here(y);
  const cuda::DeviceLimits limits = limits_of(op, here);
  const cuda::DepthwiseCall call{&e.depthwise.params, nullptr, true, false};
  const cuda::ExpandDepthwisePlan together = cuda::plan_expand_depthwise(e.expand.params, call, limits);
  if (together.fits) {
    void* stream = here.stream();
    const cuda::DepthwiseScratch scratch = cuda::depthwise_scratch(call, together.depthwise);
    const cuda::DepthwiseWork work = depthwise_work(op, scratch, 0, y, here, stream, keep);
    check_launch(op, cuda::launch_expand_depthwise(e.expand.params, call, together, work, stream));
    return {y, e.pooled};
  }
  give_expanded(e, expand.x);
  const cuda::PointwisePlan plan = cuda::plan_pointwise(e.expand.params, limits);
  check_launch(op, enqueue_pointwise(op, e.expand.params, plan, y, here, keep));
  check_launch(op, enqueue_depthwise(op, call, cuda::plan_depthwise(call, limits), y, here, keep));
  return {y, e.pooled};
}

// Three launches, or two without expansion: expand, depthwise with the gate, project.
void enqueue_block_in_three(const char* op, MBConv& block, const Tensor& x, const cuda::DeviceLimits& limits,
                            const OnDevice& here, Keep& keep) {
  give_expanded(block, x);
  give_depthwise_result(block, x);
  const cuda::DepthwiseCall depthwise{&block.depthwise.params, block.excites ? &block.se.params : nullptr, false,
                                      false};
  const PointwiseParams &expand = block.expand.params, &project = block.project.params;
  if (expand.weight.data != nullptr)
    check_launch(op, enqueue_pointwise(op, expand, cuda::plan_pointwise(expand, limits), x, here, keep));
  check_launch(op, enqueue_depthwise(op, depthwise, cuda::plan_depthwise(depthwise, limits), x, here, keep));
  check_launch(op, enqueue_pointwise(op, project, cuda::plan_pointwise(project, limits), x, here, keep));
}

// One launch of items from a queue.
void enqueue_blocks_as_items(const char* op, MBConv* blocks, const cuda::MBConvCall* calls,
                             const cuda::MBConvStackPlan& plan, const Tensor& x, const OnDevice& here, Keep& keep) {
  give_memory_in_turn(blocks, size_t(plan.count), cuda::kDepthwiseInTurn, cuda::kResultsInTurn, x, keep);
  void* stream = here.stream();
  cuda::MBConvQueueWork work;
  for (int i = 0; i < plan.count; ++i) {
    const cuda::DepthwiseScratch scratch = cuda::mbconv_queue_scratch(calls[i], plan.items[size_t(i)]);
    work.depthwise.emplace_back();
    work.depthwise.back().partial = scratch_floats(x, scratch.partial, keep);
    work.depthwise.back().hidden = scratch_floats(x, scratch.hidden, keep);
  }
  check_launch(op,
               cuda::acquire_counters(here.index(), stream, cuda::mbconv_queue_counters(calls, plan), &work.counters));
  check_launch(op, cuda::launch_mbconv_queue(calls, plan, work, stream));
}

// Blocks of which each reads what the one before it wrote: one launch for several, or for one, by clusters that hold an
// image or by items of a queue; else three for a block. The first block has its input.
Tensor run_blocks(const char* op, std::vector<MBConv>& blocks, const Tensor& x, const OnDevice& here) {
  cuda::DeviceLimits limits = limits_of(op, here);
  std::vector<cuda::MBConvCall> calls;
  for (const MBConv& block : blocks)
    calls.push_back({&block.expand.params, &block.depthwise.params, block.excites ? &block.se.params : nullptr,
                     &block.project.params});
  Tensor y = x;  // of the last block that was launched
  for (size_t done = 0; done < blocks.size();) {
    const std::vector<cuda::MBConvCall> rest(calls.begin() + int64_t(done), calls.end());
    const std::shared_ptr<const cuda::MBConvStackPlans> plans = cuda::plan_mbconv_stack(rest, limits);
    for (const cuda::MBConvStackPlan& plan : *plans) {
      const size_t end = done + size_t(plan.count);
      const bool queue = !plan.items.empty();
      Keep keep;
      Tensor input = y;
      for (size_t i = done; i < end; ++i) {
        const bool between = queue && i + 1 < end;  // its result is scratch memory
        if (i > 0 && (i == done || !queue)) give_input(blocks[i], input, keep);
        if (!between && !blocks[i].project.y.defined()) give_result(blocks[i], x);
        input = blocks[i].project.y;
      }
      const char* error = nullptr;
      if (queue)
        enqueue_blocks_as_items(op, &blocks[done], &calls[done], plan, y, here, keep);
      else if (!plan.clusters.empty())
        error = cuda::launch_mbconv_clusters(&calls[done], plan, here.stream());
      else
        enqueue_block_in_three(op, blocks[done], y, limits, here, keep);
      if (error == cuda::kTeamRefused && limits.largest_cluster > 1) {
        // 8 blocks are what a GPU with clusters has room for, as a rule; the largest there are, not always.
        limits.largest_cluster = limits.largest_cluster > 8 ? 8 : 1;
        break;
      }
      check_launch(op, error);
      y = input;
      // What is done gives its memory to the next blocks.
      for (; done < end; ++done)
        blocks[done].expand.y = blocks[done].depthwise.y = blocks[done].se.gate = blocks[done].project.y = Tensor();
    }
  }
  return y;
}

Tensor mbconv(const MBConvArguments& a) {
  constexpr const char* op = "mbconv";
  Keep keep;
  std::vector<MBConv> blocks{describe_mbconv(op, a, keep)};
  const Tensor y = blocks.front().project.y;
  return y.size(0) == 0 ? y : run_blocks(op, blocks, a.x, OnDevice(y));
}

Tensor mbconv_stack(const MBConvStackArguments& a) {
  constexpr const char* op = "mbconv_stack";
  Keep keep;
  std::vector<MBConv> blocks = describe_mbconv_stack(op, a, keep);
  if (a.x.size(0) > 0) return run_blocks(op, blocks, a.x, OnDevice(a.x));
  give_result(blocks.back(), a.x);
  return blocks.back().project.y;
}

// PyTorch's convolution of x: (N, Cin, H, W) with explicit padding, without bias.
Tensor convolve(const Tensor& x, const Tensor& weight, int64_t stride, const std::vector<int64_t>& padding) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  Tensor padded = x;
  const bool symmetric = padding[0] == padding[1] && padding[2] == padding[3];
  if (!symmetric) {
    const std::vector<int64_t> sides = {padding[2], padding[3], padding[0], padding[1]};
    std::array<StableIValue, 4> stack{from(x), from(sides), from(std::string("constant")),
                                      from(std::optional<double>())};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::pad", "", stack.data(), TORCH_ABI_VERSION));
    padded = to<Tensor>(stack[0]);
  }
  const std::vector<int64_t> zero = {0, 0}, one = {1, 1}, strides = {stride, stride};
  const std::vector<int64_t> inside = symmetric ? std::vector<int64_t>{padding[0], padding[2]} : zero;
  const Tensor same_type =
      weight.scalar_type() == x.scalar_type() ? weight : torch::stable::to(weight, x.scalar_type());
  std::array<StableIValue, 9> stack{from(padded),  from(same_type), from(OptionalTensor()),
                                    from(strides), from(inside),    from(one),
                                    from(false),   from(zero),      from(int64_t(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor conv_bn_act(const ConvArguments& a) {
  constexpr const char* op = "conv_bn_act";
  Keep keep;
  Conv c = make_conv(op, a, keep);
  const OnDevice here(c.y);
  const cuda::DeviceLimits limits = limits_of(op, here);
  const cuda::ConvPlan plan = cuda::plan_conv(c.params, limits);
  if (c.params.batch == 0) return c.y;
  if (plan.fused) {
    check_launch(op, cuda::launch_conv(c.params, plan, here.stream()));
    return c.y;
  }
  const Tensor sums = torch::stable::contiguous(convolve(a.x, a.weight, a.stride, a.padding),
                                                torch::headeronly::MemoryFormat::ChannelsLast);
  cuda::NormActParams pass;
  pass.x = sums.const_data_ptr(), pass.y = c.params.y;
  pass.norm = c.params.norm, pass.dtype = c.params.dtype, pass.activation = c.params.activation;
  pass.rows = c.params.batch * c.params.out_height * c.params.out_width, pass.channels = c.params.out_channels;
  check_launch(op, cuda::launch_norm_act(pass, limits, here.stream()));
  return c.y;
}

std::vector<int64_t> cuda_limits(int64_t device) {
  cuda::DeviceLimits l;
  check_launch("cuda_limits", cuda::device_limits(int(device), &l));
  return {l.capability,
          l.multiprocessors,
          l.shared_per_multiprocessor,
          l.shared_per_block,
          l.threads_per_multiprocessor,
          l.blocks_per_multiprocessor,
          l.registers_per_multiprocessor,
          l.largest_cluster};
}

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, EFFKERNELS_CUDA_KEY, m) {
  using namespace effkernels::ops;
  m.impl("depthwise_bn_act", TORCH_BOX(&signature::depthwise<&depthwise_bn_act>));
  m.impl("depthwise_bn_act_squeeze", TORCH_BOX(&signature::depthwise<&depthwise_bn_act_squeeze>));
  m.impl("squeeze_excite_gate", TORCH_BOX(&signature::squeeze_excite<&squeeze_excite_gate>));
  m.impl("depthwise_bn_act_gate", TORCH_BOX(&signature::depthwise_se<&depthwise_bn_act_gate>));
  m.impl("depthwise_bn_act_se", TORCH_BOX(&signature::depthwise_se<&depthwise_bn_act_se>));
  m.impl("pointwise_bn_act", TORCH_BOX(&signature::pointwise<&pointwise_bn_act>));
  m.impl("pointwise_bn_act_pool", TORCH_BOX(&signature::pointwise_pool<&pointwise_bn_act_pool>));
  m.impl("expand_depthwise_squeeze", TORCH_BOX(&signature::expand_depthwise<&expand_depthwise_squeeze>));
  m.impl("mbconv", TORCH_BOX(&signature::mbconv<&mbconv>));
  m.impl("mbconv_stack", TORCH_BOX(&signature::mbconv_stack<&mbconv_stack>));
  m.impl("conv_bn_act", TORCH_BOX(&signature::conv<&conv_bn_act>));
}

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_limits", TORCH_BOX(&effkernels::ops::cuda_limits));
}
