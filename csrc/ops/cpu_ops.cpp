// The CPU's side of every operator: check and pack (check.h), then the kernel of the instruction set in use.
#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "recording.h"
#include "registry.h"
#include "signatures.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kFewPixels = 1024;

cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = int(torch::stable::get_num_threads());
  parallel.run = [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

// A recording of one image keeps the weights as the kernels lay them out, where a call would lay out more numbers than
// it is worth for so few pixels.
void keep_packed(PointwiseParams& p) {
  if (!is_recording() || p.batch != 1 || p.pixels == 1 || p.pixels > kFewPixels) return;
  auto* const packed = static_cast<float*>(keep_memory(size_t(cpu::packed_size(p.out_channels, p.in_channels)) * 4));
  cpu::kernels().pack(p, packed);
  p.packed = packed;
}

Tensor depthwise_bn_act(const DepthwiseOpArguments& a) {
  Keep keep;
  Depthwise d = make_depthwise("depthwise_bn_act", a, keep);
  run(cpu::kernels().depthwise, d.params, torch_threads(), keep);
  return d.y;
}

std::tuple<Tensor, Tensor> depthwise_bn_act_squeeze(const DepthwiseOpArguments& a) {
  Keep keep;
  Depthwise d = make_depthwise("depthwise_bn_act_squeeze", a, keep);
  Tensor pooled = empty_matrix(a.x, d.params.batch, d.params.channels, ScalarType::Float);
  d.params.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  run(cpu::kernels().depthwise, d.params, torch_threads(), keep);
  return {d.y, pooled};
}

Tensor squeeze_excite_gate(const Tensor& pooled, const SeArguments& a) {
  constexpr const char* op = "squeeze_excite_gate";
  Keep keep;
  check_pooled(op, pooled);
  SqueezeExcite s = make_squeeze_excite(op, pooled, pooled.size(0), pooled.size(1), a, a.w_expand.scalar_type(), keep);
  if (!pooled.is_contiguous()) refuse_copy("pooled");
  keep.push_back(pooled.is_contiguous() ? pooled : torch::stable::contiguous(pooled));
  s.params.pooled = static_cast<const float*>(keep.back().const_data_ptr());
  run(cpu::kernels().squeeze_excite, s.params, torch_threads(), keep);
  return s.gate;
}

std::tuple<Tensor, Tensor> depthwise_with_gate(const char* op, const DepthwiseOpArguments& depthwise,
                                               const SeArguments& se) {
  Keep keep;
  Depthwise d = make_depthwise(op, depthwise, keep);
  SqueezeExcite s =
      make_squeeze_excite(op, depthwise.x, d.params.batch, d.params.channels, se, depthwise.x.scalar_type(), keep);
  const Tensor pooled = empty_matrix(depthwise.x, d.params.batch, d.params.channels, ScalarType::Float);
  d.params.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  s.params.pooled = d.params.pooled;
  run(cpu::kernels().depthwise, d.params, torch_threads(), keep);
  run(cpu::kernels().squeeze_excite, s.params, torch_threads(), keep);
  return {d.y, s.gate};
}

std::tuple<Tensor, Tensor> depthwise_bn_act_gate(const DepthwiseOpArguments& depthwise, const SeArguments& se) {
  return depthwise_with_gate("depthwise_bn_act_gate", depthwise, se);
}

Tensor depthwise_bn_act_se(const DepthwiseOpArguments& depthwise, const SeArguments& se) {
  auto [y, gates] = depthwise_with_gate("depthwise_bn_act_se", depthwise, se);
  ScaleParams p;
  p.y = y.mutable_data_ptr(), p.gate = gates.const_data_ptr();
  p.dtype = dtype_of("depthwise_bn_act_se", "y", y);
  p.batch = y.size(0), p.channels = y.size(1), p.pixels = y.size(2) * y.size(3);
  run(cpu::kernels().scale, p, torch_threads(), {});
  return y;
}

Tensor pointwise_bn_act(const PointwiseArguments& a) {
  Keep keep;
  Pointwise p = make_pointwise("pointwise_bn_act", a, keep);
  keep_packed(p.params);
  run(cpu::kernels().pointwise, p.params, torch_threads(), keep);
  return p.y;
}

Tensor pointwise_bn_act_pool(const PointwiseArguments& a) {
  Keep keep;
  Pointwise p = make_pointwise_pool("pointwise_bn_act_pool", a, keep);
  keep_packed(p.params);
  run(cpu::kernels().pointwise, p.params, torch_threads(), keep);
  return p.y;
}

std::tuple<Tensor, Tensor> expand_depthwise_squeeze(const PointwiseArguments& expand,
                                                    const DepthwiseOpArguments& depthwise) {
  Keep keep;
  ExpandDepthwise e = describe_expand_depthwise("expand_depthwise_squeeze", expand, depthwise, keep);
  keep_packed(e.expand.params);
  run(cpu::kernels().expand_depthwise, cpu::ExpandDepthwiseParams{e.expand.params, e.depthwise.params}, torch_threads(),
      keep);
  return {e.depthwise.y, e.pooled};
}

// Three kernels: depthwise, with the expansion where there is one, the gate, project. `x`: of the block.
void run_block(MBConv& block, const Tensor& x, const Keep& keep) {
  give_depthwise_result(block, x);
  DepthwiseParams& depthwise = block.depthwise.params;
  Tensor pooled;
  if (block.excites) {
    pooled = empty_matrix(x, depthwise.batch, depthwise.channels, ScalarType::Float);
    depthwise.pooled = static_cast<float*>(pooled.mutable_data_ptr());
    block.se.params.pooled = depthwise.pooled;
  }
  if (block.expand.params.weight.data != nullptr) {
    keep_packed(block.expand.params);
    run(cpu::kernels().expand_depthwise, cpu::ExpandDepthwiseParams{block.expand.params, depthwise}, torch_threads(),
        keep);
  } else {
    give_expanded(block, x);
    run(cpu::kernels().depthwise, depthwise, torch_threads(), keep);
  }
  if (block.excites) run(cpu::kernels().squeeze_excite, block.se.params, torch_threads(), keep);
  keep_packed(block.project.params);
  run(cpu::kernels().pointwise, block.project.params, torch_threads(), keep);
}

Tensor mbconv(const MBConvArguments& a) {
  Keep keep;
  MBConv block = describe_mbconv("mbconv", a, keep);
  run_block(block, a.x, keep);
  return block.project.y;
}

Tensor mbconv_stack(const MBConvStackArguments& a) {
  Keep keep;
  std::vector<MBConv> blocks = describe_mbconv_stack("mbconv_stack", a, keep);
  Tensor x = a.x;
  for (MBConv& block : blocks) {
    give_input(block, x, keep);
    give_result(block, x);
    run_block(block, x, keep);
    x = block.project.y;
  }
  return x;
}

Tensor conv_bn_act(const ConvArguments& a) {
  Keep keep;
  Conv c = make_conv("conv_bn_act", a, keep);
  run(cpu::kernels().conv, c.params, torch_threads(), keep);
  return c.y;
}

std::string cpu_isa(const std::string& name) {
  STD_TORCH_CHECK(name.empty() || cpu::set_isa(name.c_str()), "cpu_isa: name='", name,
                  "' is not built or not on this machine; allowed: auto, plain, and what the processor has of avx2, "
                  "avx512, avx512_bf16, amx_bf16");
  return cpu::kernels().isa;
}

int64_t cpu_memory(int64_t limit) {
  if (limit >= 0) cpu::pool().set_limit(size_t(limit));
  if (limit == 0) cpu::free_scratch();
  return int64_t(cpu::pool().mapped());
}

// An operator with the recording in front of its arguments, into which its kernels are recorded.
template <auto op>
struct Recorded;

template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct Recorded<op> {
  static Result call(const Tensor& recording, Arguments... arguments) {
    const RecordingScope scope(recording);
    return op(arguments...);
  }
};

int64_t replay(const Tensor& recording, int64_t piece) {
  return replay_recording(recording, piece, torch_threads()), 0;
}

std::vector<int64_t> times(const Tensor& recording, int64_t piece, int64_t rounds) {
  return time_recording(recording, piece, rounds, torch_threads());
}

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, CPU, m) {
  using namespace effkernels::ops;
#define EFFKERNELS_IMPLEMENT(op, arguments)           \
  m.impl(#op, TORCH_BOX(&signature::arguments<&op>)); \
  m.impl("recorded_" #op, TORCH_BOX(&Recorded<&signature::arguments<&op>>::call));
  EFFKERNELS_IMPLEMENT(depthwise_bn_act, depthwise)
  EFFKERNELS_IMPLEMENT(depthwise_bn_act_squeeze, depthwise)
  EFFKERNELS_IMPLEMENT(squeeze_excite_gate, squeeze_excite)
  EFFKERNELS_IMPLEMENT(depthwise_bn_act_gate, depthwise_se)
  EFFKERNELS_IMPLEMENT(depthwise_bn_act_se, depthwise_se)
  EFFKERNELS_IMPLEMENT(pointwise_bn_act, pointwise)
  EFFKERNELS_IMPLEMENT(pointwise_bn_act_pool, pointwise_pool)
  EFFKERNELS_IMPLEMENT(expand_depthwise_squeeze, expand_depthwise)
  EFFKERNELS_IMPLEMENT(mbconv, mbconv)
  EFFKERNELS_IMPLEMENT(mbconv_stack, mbconv_stack)
  EFFKERNELS_IMPLEMENT(conv_bn_act, conv)
#undef EFFKERNELS_IMPLEMENT
}

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&effkernels::ops::cpu_isa));
  m.impl("cpu_memory", TORCH_BOX(&effkernels::ops::cpu_memory));
  m.impl("cpu_recording", TORCH_BOX(&effkernels::ops::new_recording));
  m.impl("cpu_recording_cut", TORCH_BOX(&effkernels::ops::cut_recording));
  m.impl("cpu_recording_replay", TORCH_BOX(&effkernels::ops::replay));
  m.impl("cpu_recording_bytes", TORCH_BOX(&effkernels::ops::recorded_bytes));
  m.impl("cpu_recording_layers", TORCH_BOX(&effkernels::ops::recorded_layers));
  m.impl("cpu_recording_times", TORCH_BOX(&effkernels::ops::times));
}
