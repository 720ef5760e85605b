// How the CPU's kernels of an operator would divide their work among threads: the same functions that the kernels use.
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../sizes.h"
#include "check.h"
#include "registry.h"

namespace effkernels::ops {
namespace {

using Shape = std::vector<int64_t>;

void check_sizes(const std::string& op, const Shape& sizes, size_t wanted) {
  STD_TORCH_CHECK(sizes.size() >= wanted, "cpu_plan: shape of ", op, " has ", sizes.size(),
                  " numbers; allowed: ", wanted, " or more, as cuda_plan takes them");
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0 && size < (int64_t(1) << 20), "cpu_plan: shape of ", op, " holds ", size,
                    "; allowed: 0 to 2^20 - 1");
}

// As check.cpp checks a tensor's sizes.
void check_elements(const std::string& op, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(product(sizes) <= kMostElements, "cpu_plan: a tensor of ", op,
                  " has too many elements; allowed: sizes whose product is at most 2^54");
}

int64_t out_size(int64_t size, int64_t before, int64_t after, int64_t window, int64_t stride) {
  STD_TORCH_CHECK(stride >= 1 && window >= 1 && size + before + after >= window, "cpu_plan: a size of ", size,
                  " with padding ", before, " + ", after, ", window ", window, ", stride ", stride,
                  "; allowed: at least one output");
  return (size + before + after - window) / stride + 1;
}

DepthwiseParams depthwise_of(const std::string& op, DType dtype, const Shape& s) {
  check_sizes(op, s, 13);
  STD_TORCH_CHECK(s[0] >= 1 && s[1] >= 1 && s[7] >= 1, "cpu_plan: batch ", s[0], ", channels ", s[1], ", dilation ",
                  s[7], " of ", op, "; allowed: 1 or more");
  check_depthwise_kernel("cpu_plan", s[4], s[5]);
  DepthwiseParams p;
  p.dtype = dtype, p.weight.dtype = dtype;
  p.batch = s[0], p.channels = s[1], p.height = s[2], p.width = s[3];
  p.kernel_h = int32_t(s[4]), p.kernel_w = int32_t(s[5]), p.stride = int32_t(s[6]), p.dilation = int32_t(s[7]);
  p.pad_top = int32_t(s[8]), p.pad_left = int32_t(s[10]);
  p.out_height = out_size(s[2], s[8], s[9], (s[4] - 1) * s[7] + 1, s[6]);
  p.out_width = out_size(s[3], s[10], s[11], (s[5] - 1) * s[7] + 1, s[6]);
  check_elements(op, {p.batch, p.channels, p.height, p.width});
  check_elements(op, {p.batch, p.channels, p.out_height, p.out_width});
  return p;
}

PointwiseParams pointwise_of(const std::string& op, DType dtype, int64_t batch, int64_t pixels, int64_t in_channels,
                             int64_t out_channels) {
  STD_TORCH_CHECK(batch >= 1 && pixels >= 1 && in_channels >= 1 && out_channels >= 1, "cpu_plan: a size of ", op,
                  " is 0; allowed: 1 or more");
  check_elements(op, {batch, pixels, in_channels});
  check_elements(op, {batch, pixels, out_channels});
  PointwiseParams p;
  p.dtype = dtype, p.weight.dtype = dtype;
  p.batch = batch, p.pixels = pixels, p.in_channels = in_channels, p.out_channels = out_channels;
  return p;
}

SqueezeExciteParams squeeze_excite_of(DType dtype, int64_t batch, int64_t channels, int64_t reduced) {
  STD_TORCH_CHECK(batch >= 1 && channels >= 1, "cpu_plan: batch ", batch, ", channels ", channels,
                  " of squeeze_excite_gate; allowed: 1 or more");
  check_elements("squeeze_excite_gate", {batch, channels});
  SqueezeExciteParams p;
  p.gate_dtype = dtype, p.w_reduce.dtype = p.w_expand.dtype = dtype;
  p.batch = batch, p.channels = channels, p.reduced = reduced;
  return p;
}

// A channels_last image, but for one of few channels the result is the same in any layout.
ConvParams conv_of(const std::string& op, DType dtype, const Shape& s) {
  check_sizes(op, s, 12);
  STD_TORCH_CHECK(s[0] >= 1 && s[1] >= 1 && s[2] >= 1, "cpu_plan: batch ", s[0], ", channels ", s[1], " to ", s[2],
                  " of ", op, "; allowed: 1 or more");
  ConvParams p;
  p.dtype = dtype, p.weight.dtype = dtype;
  p.batch = s[0], p.in_channels = s[1], p.out_channels = s[2], p.height = s[3], p.width = s[4];
  p.kernel_h = int32_t(s[5]), p.kernel_w = int32_t(s[6]), p.stride = int32_t(s[7]);
  p.pad_top = int32_t(s[8]), p.pad_left = int32_t(s[10]);
  p.out_height = out_size(s[3], s[8], s[9], s[5], s[7]), p.out_width = out_size(s[4], s[10], s[11], s[6], s[7]);
  check_elements(op, {p.batch, p.in_channels, p.height, p.width});
  check_elements(op, {p.batch, p.out_channels, p.out_height, p.out_width});
  check_elements(op, {p.in_channels, p.out_channels, p.kernel_h, p.kernel_w});
  p.x_stride_c = 1, p.x_stride_w = p.in_channels, p.x_stride_h = p.width * p.in_channels;
  p.x_stride_n = p.height * p.x_stride_h;
  return p;
}

// "pointwise units=140 shares=20,20,..." a line for each kernel.
class Lines {
 public:
  void add(const char* kernel, const cpu::Division& division) {
    text_ << kernel << " units=" << division.units << " shares=";
    for (size_t i = 0; i < division.shares.size(); i++) text_ << (i ? "," : "") << division.shares[i];
    text_ << '\n';
  }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
};

std::string cpu_plan(const std::string& op, const std::string& dtype_name, const Shape& s, int64_t threads) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "cpu_plan: threads=", threads, "; allowed: 1 to 1024");
  const DType dtype = dtype_named("cpu_plan", dtype_name);
  const cpu::Divisions& divisions = cpu::kernels().divisions;
  const int count = int(threads);
  Lines lines;
  if (op == "conv_bn_act") {
    lines.add("conv", divisions.conv(conv_of(op, dtype, s), count));
  } else if (op == "pointwise_bn_act" || op == "pointwise_bn_act_pool") {
    check_sizes(op, s, 5);
    PointwiseParams p = pointwise_of(op, dtype, s[0], s[1] * s[2], s[3], s[4]);
    p.pools = op == "pointwise_bn_act_pool";
    lines.add("pointwise", divisions.pointwise(p, count));
  } else if (op == "squeeze_excite_gate") {
    check_sizes(op, s, 3);
    lines.add("squeeze_excite", divisions.squeeze_excite(squeeze_excite_of(dtype, s[0], s[1], s[2]), count));
  } else if (op == "expand_depthwise_squeeze" || op == "mbconv") {
    const bool block = op == "mbconv";
    check_sizes(op, s, block ? 15 : 14);
    const DepthwiseParams depthwise = depthwise_of(op, dtype, s);
    if (block && s[13] == 0) {  // without expansion
      lines.add("depthwise", divisions.depthwise(depthwise, count));
    } else {
      const PointwiseParams expand = pointwise_of(op, dtype, s[0], s[2] * s[3], s[13], s[1]);
      lines.add("expand_depthwise", divisions.expand_depthwise({expand, depthwise}, count));
    }
    if (block && s[12])
      lines.add("squeeze_excite", divisions.squeeze_excite(squeeze_excite_of(dtype, s[0], s[1], s[12]), count));
    if (block) {
      const int64_t pixels = depthwise.out_height * depthwise.out_width;
      lines.add("pointwise", divisions.pointwise(pointwise_of(op, dtype, s[0], pixels, s[1], s[14]), count));
    }
  } else {
    STD_TORCH_CHECK(op == "depthwise_bn_act" || op == "depthwise_bn_act_squeeze" || op == "depthwise_bn_act_gate",
                    "cpu_plan: op='", op,
                    "'; allowed: conv_bn_act, depthwise_bn_act, depthwise_bn_act_squeeze, depthwise_bn_act_gate, "
                    "expand_depthwise_squeeze, mbconv, pointwise_bn_act, pointwise_bn_act_pool, squeeze_excite_gate");
    lines.add("depthwise", divisions.depthwise(depthwise_of(op, dtype, s), count));
    if (s[12])
      lines.add("squeeze_excite", divisions.squeeze_excite(squeeze_excite_of(dtype, s[0], s[1], s[12]), count));
  }
  return lines.text();
}

}  // namespace
}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_IMPL(EFFKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_plan", TORCH_BOX(&effkernels::ops::cpu_plan));
}
