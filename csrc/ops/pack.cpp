#include "pack.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "../sizes.h"
#include "recording.h"

namespace effkernels::ops {

using torch::headeronly::ScalarType;

namespace {

// A parameter of `sizes`, in float32 or x's type.
Param param_of(const char* op, const char* name, const Tensor& t, const Tensor& x, std::initializer_list<int64_t> sizes,
               Keep& keep) {
  bool same = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && t.size(i++) == size;
  if (!same) {
    std::ostringstream wanted;
    const char* separator = "";
    for (const int64_t size : sizes) wanted << separator << size, separator = ", ";
    STD_TORCH_CHECK(false, op, ": ", name, " has shape ", shape_of(t), "; allowed: (", wanted.str(), ")");
  }
  check_device(op, name, t, x);
  const DType dtype = dtype_of(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x.scalar_type(), op, ": ", name,
                  " has dtype ", name_of(t.scalar_type()), "; allowed: float32 or the input's ",
                  name_of(x.scalar_type()));
  keep.push_back(to_contiguous(t));
  return {keep.back().const_data_ptr(), dtype};
}

Param param_of(const char* op, const char* name, const OptionalTensor& t, const Tensor& x, int64_t size, Keep& keep) {
  return t ? param_of(op, name, *t, x, {size}, keep) : Param{};
}

// A matrix (rows, columns) that a 1x1 convolution may hold as (rows, columns, 1, 1).
Param matrix_of(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t rows, int64_t columns,
                Keep& keep) {
  return t.dim() == 4 ? param_of(op, name, t, x, {rows, columns, 1, 1}, keep)
                      : param_of(op, name, t, x, {rows, columns}, keep);
}

Norm norm_of(const char* op, const NormArguments& a, const Tensor& x, int64_t channels, Keep& keep) {
  STD_TORCH_CHECK(a.mean.has_value() == a.var.has_value(), op, ": ", a.prefix, "norm_mean and ", a.prefix,
                  "norm_var belong together; allowed: both or neither");
  STD_TORCH_CHECK(a.mean.has_value() || !(a.weight || a.bias), op, ": ", a.prefix, "norm_weight and ", a.prefix,
                  "norm_bias need ", a.prefix, "norm_mean and ", a.prefix,
                  "norm_var; allowed: all of the norm or none");
  STD_TORCH_CHECK(!a.mean.has_value() || (std::isfinite(a.eps) && a.eps >= 0), op, ": ", a.prefix, "norm_eps=", a.eps,
                  "; allowed: finite and not negative");
  const auto vector = [&](const char* name, const OptionalTensor& t) {
    return t ? param_of(op, (a.prefix + std::string(name)).c_str(), *t, x, {channels}, keep) : Param{};
  };
  const Param conv_bias = vector("bias", a.conv_bias);
  const Param mean = vector("norm_mean", a.mean), var = vector("norm_var", a.var);
  const Param weight = vector("norm_weight", a.weight), bias = vector("norm_bias", a.bias);
  return {conv_bias, weight, bias, mean, var, float(a.eps)};
}

// Everything of a depthwise convolution of an (n, c, h, w) tensor but the addresses of it and of the result; of `a.x`
// only the dtype and the device count.
Depthwise describe_depthwise(const char* op, const DepthwiseOpArguments& a, int64_t n, int64_t c, int64_t h, int64_t w,
                             Keep& keep) {
  STD_TORCH_CHECK(a.weight.dim() == 4 && a.weight.size(1) == 1, op, ": weight has shape ", shape_of(a.weight),
                  "; allowed: (C, 1, KH, KW)");
  const int64_t kernel_h = a.weight.size(2), kernel_w = a.weight.size(3);
  check_depthwise_kernel(op, kernel_h, kernel_w);
  STD_TORCH_CHECK(a.stride == 1 || a.stride == 2, op, ": stride=", a.stride, "; allowed: 1, 2");
  STD_TORCH_CHECK(a.dilation >= 1 && a.dilation < kLargest, op, ": dilation=", a.dilation, "; allowed: 1 to 2^31 - 1");
  check_padding(op, a.padding);

  Depthwise out;
  DepthwiseParams& p = out.params;
  p.dtype = dtype_of(op, "x", a.x);
  p.activation = activation_of(op, "activation", a.activation);
  p.weight = param_of(op, "weight", a.weight, a.x, {c, 1, kernel_h, kernel_w}, keep);
  p.norm = norm_of(op, a.norm, a.x, c, keep);
  p.batch = n, p.channels = c, p.height = h, p.width = w;
  p.kernel_h = int32_t(kernel_h), p.kernel_w = int32_t(kernel_w);
  p.stride = int32_t(a.stride), p.dilation = int32_t(a.dilation);
  p.out_height = out_size(op, "height", h, a.padding[0], a.padding[1], (kernel_h - 1) * a.dilation + 1, a.stride);
  p.out_width = out_size(op, "width", w, a.padding[2], a.padding[3], (kernel_w - 1) * a.dilation + 1, a.stride);
  p.pad_top = int32_t(a.padding[0]), p.pad_left = int32_t(a.padding[2]);
  check_elements(op, "the result", {n, c, p.out_height, p.out_width});
  return out;
}

void give_result(Depthwise& depthwise, const Tensor& like) {
  DepthwiseParams& p = depthwise.params;
  depthwise.y = empty_channels_last(like, p.batch, p.channels, p.out_height, p.out_width);
  p.y = depthwise.y.mutable_data_ptr();
}

// Everything of a 1x1 convolution of an (n, c, h, w) tensor but the addresses of it and of the result; of `a.x` only
// the dtype and the device count.
Pointwise describe_pointwise(const char* op, const PointwiseArguments& a, int64_t n, int64_t c, int64_t h, int64_t w,
                             Keep& keep) {
  const Tensor &x = a.x, &weight = a.weight;
  const std::string prefix = a.norm.prefix;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(2) == 1 && weight.size(3) == 1, op, ": ",
                  prefix, "weight has shape ", shape_of(weight), "; allowed: (Cout, Cin, 1, 1)");
  const int64_t out_channels = weight.size(0);
  check_elements(op, (prefix + "weight").c_str(), {out_channels, c});
  check_elements(op, prefix == "expand_" ? "the expanded tensor" : "the result", {n, out_channels, h, w});
  Pointwise out;
  PointwiseParams& p = out.params;
  p.dtype = dtype_of(op, "x", x);
  p.activation = activation_of(op, (prefix + "activation").c_str(), a.activation);
  p.weight = param_of(op, (prefix + "weight").c_str(), weight, x, {out_channels, c, 1, 1}, keep);
  p.norm = norm_of(op, a.norm, x, out_channels, keep);
  if (a.gate) {
    if (!a.gate->is_contiguous()) refuse_copy("gate");
    p.gate = param_of(op, "gate", *a.gate, x, {n, c}, keep);
  }
  p.allow_tf32 = a.allow_tf32;
  p.batch = n, p.pixels = h * w, p.in_channels = c, p.out_channels = out_channels;
  if (a.residual) {
    const Tensor& r = *a.residual;
    STD_TORCH_CHECK(r.dim() == 4 && r.size(0) == n && r.size(1) == out_channels && r.size(2) == h && r.size(3) == w, op,
                    ": residual has shape ", shape_of(r), "; allowed: the output's (", n, ", ", out_channels, ", ", h,
                    ", ", w, ")");
    STD_TORCH_CHECK(r.scalar_type() == x.scalar_type(), op, ": residual has dtype ", name_of(r.scalar_type()),
                    "; allowed: the input's ", name_of(x.scalar_type()));
    check_device(op, "residual", r, x);
    const Tensor residual_rows = to_rows(r, p.residual_stride_p);
    keep.push_back(residual_rows);
    p.residual = residual_rows.const_data_ptr(), p.residual_stride_n = residual_rows.stride(0);
  }
  return out;
}

// The same of x.
Pointwise describe_pointwise(const char* op, const PointwiseArguments& a, Keep& keep) {
  check_image(op, "x", a.x);
  Pointwise out = describe_pointwise(op, a, a.x.size(0), a.x.size(1), a.x.size(2), a.x.size(3), keep);
  PointwiseParams& p = out.params;
  const Tensor rows = to_rows(a.x, p.x_stride_p);
  keep.push_back(rows);
  p.x = rows.const_data_ptr(), p.x_stride_n = rows.stride(0);
  return out;
}

void give_result(Pointwise& pointwise, const Tensor& like, int64_t height, int64_t width) {
  pointwise.y = empty_channels_last(like, pointwise.params.batch, pointwise.params.out_channels, height, width);
  pointwise.params.y = pointwise.y.mutable_data_ptr();
}

// Everything but the address of the gate.
SqueezeExcite describe_squeeze_excite(const char* op, const Tensor& like, int64_t batch, int64_t channels,
                                      const SeArguments& a, ScalarType gate_dtype, Keep& keep) {
  STD_TORCH_CHECK((a.w_reduce.dim() == 2 || a.w_reduce.dim() == 4) && a.w_reduce.size(0) > 0, op,
                  ": w_reduce has shape ", shape_of(a.w_reduce), "; allowed: (R, C) or (R, C, 1, 1), R at least 1");
  const int64_t reduced = a.w_reduce.size(0);
  check_elements(op, "w_reduce", {reduced, channels});
  check_elements(op, "the hidden layer", {batch, reduced});
  // Mixed types: float32 or the gate's own type, so each parameter is checked against a tensor of that type.
  const Tensor typed = like.scalar_type() == gate_dtype ? like : empty_matrix(like, 0, 1, gate_dtype);
  SqueezeExcite out;
  SqueezeExciteParams& p = out.params;
  p.w_reduce = matrix_of(op, "w_reduce", a.w_reduce, typed, reduced, channels, keep);
  p.w_expand = matrix_of(op, "w_expand", a.w_expand, typed, channels, reduced, keep);
  p.b_reduce = param_of(op, "b_reduce", a.b_reduce, typed, reduced, keep);
  p.b_expand = param_of(op, "b_expand", a.b_expand, typed, channels, keep);
  p.activation = activation_of(op, a.activation_name, a.activation);
  p.gate_activation = gate_of(op, "gate_activation", a.gate_activation);
  p.batch = batch, p.channels = channels, p.reduced = reduced;
  p.gate_dtype = dtype_of(op, "gate", typed);
  return out;
}

void give_gate(SqueezeExcite& se, const Tensor& like, ScalarType gate_dtype) {
  se.gate = empty_matrix(like, se.params.batch, se.params.channels, gate_dtype);
  se.params.gate = se.gate.mutable_data_ptr();
}

}  // namespace

Depthwise make_depthwise(const char* op, const DepthwiseOpArguments& a, Keep& keep) {
  check_image(op, "x", a.x);
  Depthwise out = describe_depthwise(op, a, a.x.size(0), a.x.size(1), a.x.size(2), a.x.size(3), keep);
  give_result(out, a.x);
  const Tensor x = to_channels_last(a.x);
  keep.push_back(x);
  DepthwiseParams& p = out.params;
  p.x = x.const_data_ptr();
  p.x_stride_n = x.stride(0), p.x_stride_h = x.stride(2), p.x_stride_w = x.stride(3);
  return out;
}

SqueezeExcite make_squeeze_excite(const char* op, const Tensor& like, int64_t batch, int64_t channels,
                                  const SeArguments& a, ScalarType gate_dtype, Keep& keep) {
  SqueezeExcite out = describe_squeeze_excite(op, like, batch, channels, a, gate_dtype, keep);
  give_gate(out, like, gate_dtype);
  return out;
}

Pointwise make_pointwise(const char* op, const PointwiseArguments& a, Keep& keep) {
  Pointwise out = describe_pointwise(op, a, keep);
  give_result(out, a.x, a.x.size(2), a.x.size(3));
  return out;
}

Pointwise make_pointwise_pool(const char* op, const PointwiseArguments& a, Keep& keep) {
  Pointwise out = describe_pointwise(op, a, keep);
  PointwiseParams& p = out.params;
  p.pools = true;
  out.y = empty_matrix(a.x, p.batch, p.out_channels, a.x.scalar_type());
  p.y = out.y.mutable_data_ptr();
  return out;
}

ExpandDepthwise describe_expand_depthwise(const char* op, const PointwiseArguments& expand,
                                          const DepthwiseOpArguments& depthwise, Keep& keep) {
  const Tensor& x = expand.x;
  ExpandDepthwise out;
  out.expand = describe_pointwise(op, expand, keep);
  out.depthwise =
      describe_depthwise(op, depthwise, x.size(0), out.expand.params.out_channels, x.size(2), x.size(3), keep);
  give_result(out.depthwise, x);
  DepthwiseParams& d = out.depthwise.params;
  out.pooled = empty_matrix(x, d.batch, d.channels, ScalarType::Float);
  d.pooled = static_cast<float*>(out.pooled.mutable_data_ptr());
  return out;
}

namespace {

void give_expanded_to(Depthwise& depthwise, Pointwise& expand, const Tensor& x) {
  DepthwiseParams& d = depthwise.params;
  if (expand.params.weight.data == nullptr) {
    const PointwiseParams& p = expand.params;
    d.x = p.x, d.x_stride_n = p.x_stride_n, d.x_stride_h = d.width * p.x_stride_p, d.x_stride_w = p.x_stride_p;
    return;
  }
  give_result(expand, x, x.size(2), x.size(3));
  const Tensor& expanded = expand.y;
  d.x = expanded.const_data_ptr();
  d.x_stride_n = expanded.stride(0), d.x_stride_h = expanded.stride(2), d.x_stride_w = expanded.stride(3);
}

}  // namespace

void give_expanded(ExpandDepthwise& both, const Tensor& x) { give_expanded_to(both.depthwise, both.expand, x); }
void give_expanded(MBConv& block, const Tensor& x) { give_expanded_to(block.depthwise, block.expand, x); }

namespace {

// The first convolution of a block of an (n, c, h, w) tensor.
Pointwise describe_expansion(const char* op, const MBConvArguments& a, int64_t n, int64_t c, int64_t h, int64_t w,
                             Keep& keep) {
  const OptionalExpandArguments& given = a.expand;
  const OptionalTensor none;
  if (given.weight)
    return describe_pointwise(op, {a.x, *given.weight, given.norm, none, none, given.activation, a.project.allow_tf32},
                              n, c, h, w, keep);
  const NormArguments& norm = given.norm;
  STD_TORCH_CHECK(!(norm.conv_bias || norm.mean || norm.var || norm.weight || norm.bias), op,
                  ": expand_bias and expand_norm need expand_weight, which is None; allowed: None");
  Pointwise out;
  PointwiseParams& p = out.params;
  p.activation = activation_of(op, "expand_activation", given.activation);
  STD_TORCH_CHECK(p.activation == Activation::kIdentity, op, ": expand_activation='", given.activation,
                  "' needs expand_weight, which is None; allowed: identity");
  p.dtype = dtype_of(op, "x", a.x);
  p.batch = n, p.pixels = h * w, p.in_channels = p.out_channels = c;
  return out;
}

// Everything of a block of an (n, c, h, w) tensor but the addresses of it and of the result.
MBConv describe_mbconv(const char* op, const MBConvArguments& a, int64_t n, int64_t c, int64_t h, int64_t w,
                       Keep& keep) {
  const Tensor& x = a.x;
  MBConv out;
  out.expand = describe_expansion(op, a, n, c, h, w, keep);
  const int64_t channels = out.expand.params.out_channels;
  out.depthwise = describe_depthwise(op, a.depthwise, n, channels, h, w, keep);
  const DepthwiseParams& d = out.depthwise.params;
  const OptionalSeArguments& se = a.se;
  STD_TORCH_CHECK(se.w_reduce.has_value() == se.w_expand.has_value(), op,
                  ": w_reduce and w_expand belong together; allowed: both or neither");
  STD_TORCH_CHECK(se.w_reduce.has_value() || !(se.b_reduce || se.b_expand), op,
                  ": b_reduce and b_expand need w_reduce and w_expand; allowed: all of squeeze-and-excitation or none");
  out.excites = se.w_reduce.has_value();
  if (out.excites) {
    const SeArguments given{*se.w_reduce,  se.b_reduce,        *se.w_expand,   se.b_expand,
                            se.activation, se.gate_activation, "se_activation"};
    out.se = describe_squeeze_excite(op, x, n, channels, given, x.scalar_type(), keep);
  }
  out.project = describe_pointwise(op, a.project, n, channels, d.out_height, d.out_width, keep);
  out.project.params.x_stride_p = channels, out.project.params.x_stride_n = channels * d.out_height * d.out_width;
  return out;
}

void give_input(Pointwise& expand, const Tensor& x, Keep& keep) {
  const Tensor rows = to_rows(x, expand.params.x_stride_p);
  keep.push_back(rows);
  expand.params.x = rows.const_data_ptr(), expand.params.x_stride_n = rows.stride(0);
}

}  // namespace

MBConv describe_mbconv(const char* op, const MBConvArguments& a, Keep& keep) {
  const Tensor& x = a.x;
  check_image(op, "x", x);
  MBConv out = describe_mbconv(op, a, x.size(0), x.size(1), x.size(2), x.size(3), keep);
  give_input(out.expand, x, keep);
  give_result(out, x);
  return out;
}

std::vector<MBConv> describe_mbconv_stack(const char* op, const MBConvStackArguments& a, Keep& keep) {
  using A = MBConvStackArguments;
  const size_t count = a.tensors.size() / A::kTensors;
  const auto check = [&](const char* name, size_t given, size_t of_block) {
    STD_TORCH_CHECK(count > 0 && given == count * of_block, op, ": ", name, " has ", given,
                    " elements; allowed: ", of_block, " for each of the blocks, of which there is at least one");
  };
  check("tensors", a.tensors.size(), A::kTensors);
  check("norm_eps", a.norm_eps.size(), A::kNorms);
  check("sizes", a.sizes.size(), A::kSizes);
  check("activations", a.activations.size(), A::kActivations);
  check_image(op, "x", a.x);
  const int64_t n = a.x.size(0);
  int64_t c = a.x.size(1), h = a.x.size(2), w = a.x.size(3);
  const OptionalTensor none;
  const std::string identity = "identity";
  // Stands for what give_input sets: the allocator aligns all of it.
  void* const aligned = reinterpret_cast<void*>(uintptr_t(1) << 12);
  std::vector<MBConv> blocks;
  for (size_t i = 0; i < count; ++i) {
    const std::string name = std::string(op) + ": block " + std::to_string(i);
    const OptionalTensor* const t = a.tensors.data() + i * A::kTensors;
    const double* const eps = a.norm_eps.data() + i * A::kNorms;
    const int64_t* const sizes = a.sizes.data() + i * A::kSizes;
    const std::string* const activations = a.activations.data() + i * A::kActivations;
    STD_TORCH_CHECK(t[6] && t[16], name, ": weight or project_weight is None; allowed: a tensor");
    const std::vector<int64_t> padding(sizes + 1, sizes + 5);
    const NormArguments expand_norm{t[1], t[2], t[3], t[4], t[5], eps[0], "expand_"};
    const NormArguments norm{t[7], t[8], t[9], t[10], t[11], eps[1]};
    const NormArguments project_norm{t[17], t[18], t[19], t[20], t[21], eps[2], "project_"};
    MBConv block = describe_mbconv(name.c_str(),
                                   {a.x,
                                    {t[0], expand_norm, activations[0]},
                                    {a.x, *t[6], norm, sizes[0], padding, sizes[5], activations[1]},
                                    {t[12], t[13], t[14], t[15], activations[2], activations[3]},
                                    {a.x, *t[16], project_norm, none, none, identity, a.allow_tf32}},
                                   n, c, h, w, keep);
    PointwiseParams &expand = block.expand.params, &project = block.project.params;
    expand.x = aligned, expand.x_stride_p = c, expand.x_stride_n = c * h * w;
    const DepthwiseParams& d = block.depthwise.params;
    block.adds_input = sizes[6] != 0;
    if (block.adds_input) {
      STD_TORCH_CHECK(project.out_channels == c && d.out_height == h && d.out_width == w, name,
                      ": the block cannot add its input (", n, ", ", c, ", ", h, ", ", w, ") to its result (", n, ", ",
                      project.out_channels, ", ", d.out_height, ", ", d.out_width, "); allowed: the same shape");
      project.residual = aligned, project.residual_stride_p = c, project.residual_stride_n = expand.x_stride_n;
    }
    if (i == 0) give_input(block, a.x, keep);
    project.y = aligned;
    c = project.out_channels, h = d.out_height, w = d.out_width;
    blocks.push_back(std::move(block));
  }
  return blocks;
}

void give_input(MBConv& block, const Tensor& x, Keep& keep) {
  give_input(block.expand, x, keep);
  if (!block.adds_input) return;
  const PointwiseParams& expand = block.expand.params;
  PointwiseParams& project = block.project.params;
  project.residual = expand.x;
  project.residual_stride_p = expand.x_stride_p, project.residual_stride_n = expand.x_stride_n;
}

void give_result(MBConv& block, const Tensor& like) {
  const DepthwiseParams& d = block.depthwise.params;
  give_result(block.project, like, d.out_height, d.out_width);
}

void give_depthwise_result(MBConv& block, const Tensor& x) {
  give_result(block.depthwise, x);
  block.project.params.x = block.depthwise.y.const_data_ptr();
  if (!block.excites) return;
  give_gate(block.se, x, x.scalar_type());
  block.project.params.gate = {block.se.gate.const_data_ptr(), block.se.params.gate_dtype};
}

void give_memory_in_turn(MBConv* blocks, size_t count, size_t depthwise_in_turn, size_t results_in_turn,
                         const Tensor& x, Keep& keep) {
  const auto largest_of = [&](size_t first, size_t end, size_t turns, const auto& elements_of) {
    int64_t largest = 0;
    for (size_t i = first; i < end; i += turns) largest = std::max(largest, elements_of(blocks[i]));
    keep.push_back(empty_matrix(x, 1, largest, x.scalar_type()));
    return keep.back().mutable_data_ptr();
  };
  for (size_t turn = 0; turn < std::min(count, depthwise_in_turn); ++turn) {
    void* const d = largest_of(turn, count, depthwise_in_turn, [](const MBConv& block) {
      const DepthwiseParams& p = block.depthwise.params;
      return product({p.batch, p.out_height, p.out_width, p.channels});
    });
    for (size_t i = turn; i < count; i += depthwise_in_turn)
      blocks[i].depthwise.params.y = d, blocks[i].project.params.x = d;
  }
  for (size_t turn = 0; turn < std::min(count - 1, results_in_turn); ++turn) {
    void* const y = largest_of(turn, count - 1, results_in_turn, [](const MBConv& block) {
      const PointwiseParams& p = block.project.params;
      return product({p.batch, p.pixels, p.out_channels});
    });
    for (size_t i = turn; i + 1 < count; i += results_in_turn) {
      MBConv& reader = blocks[i + 1];
      blocks[i].project.params.y = y, reader.expand.params.x = y;
      if (reader.adds_input) reader.project.params.residual = y;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (!blocks[i].excites) continue;
    give_gate(blocks[i].se, x, x.scalar_type());
    blocks[i].project.params.gate = {blocks[i].se.gate.const_data_ptr(), blocks[i].se.params.gate_dtype};
  }
}

Conv make_conv(const char* op, const ConvArguments& a, Keep& keep) {
  const Tensor &x = a.x, &weight = a.weight;
  check_image(op, "x", x);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(2) > 0 && weight.size(3) > 0, op,
                  ": weight has shape ", shape_of(weight), "; allowed: (Cout, Cin, KH, KW)");
  for (int64_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(weight.size(i) < kLargest, op, ": weight has shape ", shape_of(weight),
                    "; allowed: sizes below 2^31");
  check_elements(op, "weight", {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  STD_TORCH_CHECK(a.stride >= 1 && a.stride < kLargest, op, ": stride=", a.stride, "; allowed: 1 to 2^31 - 1");
  check_padding(op, a.padding);
  const int64_t out_channels = weight.size(0), kh = weight.size(2), kw = weight.size(3);
  Conv out;
  ConvParams& p = out.params;
  p.dtype = dtype_of(op, "x", x);
  p.activation = activation_of(op, "activation", a.activation);
  p.weight = param_of(op, "weight", weight, x, {out_channels, c, kh, kw}, keep);
  p.norm = norm_of(op, a.norm, x, out_channels, keep);
  p.allow_tf32 = a.allow_tf32;
  p.batch = n, p.in_channels = c, p.out_channels = out_channels, p.height = h, p.width = w;
  p.kernel_h = int32_t(kh), p.kernel_w = int32_t(kw), p.stride = int32_t(a.stride);
  p.pad_top = int32_t(a.padding[0]), p.pad_left = int32_t(a.padding[2]);
  p.out_height = out_size(op, "height", h, a.padding[0], a.padding[1], kh, a.stride);
  p.out_width = out_size(op, "width", w, a.padding[2], a.padding[3], kw, a.stride);
  check_elements(op, "the result", {n, out_channels, p.out_height, p.out_width});
  p.x = x.const_data_ptr();
  p.x_stride_n = x.stride(0), p.x_stride_c = x.stride(1), p.x_stride_h = x.stride(2), p.x_stride_w = x.stride(3);
  out.y = empty_channels_last(x, n, out_channels, p.out_height, p.out_width);
  p.y = out.y.mutable_data_ptr();
  return out;
}

}  // namespace effkernels::ops
