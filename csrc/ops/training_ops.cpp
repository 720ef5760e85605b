// The CPU kernels of the training blocks as operators. effkernels/ops/training_steps.py calls them, and has the same in
// plain PyTorch; images are (N, H, W, C) and contiguous.
#include "../cpu/training.h"
#include "pack.h"
#include "registry.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;

cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = int(torch::stable::get_num_threads());
  parallel.run = [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

void check_nhwc(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.is_contiguous() && t.numel() > 0, op, ": ", name,
                  " is not a contiguous (N, H, W, C) of the CPU with elements; allowed: that");
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_nhwc(op, name, t);
  bool same = t.scalar_type() == like.scalar_type();
  for (int64_t i = 0; i < 4; i++) same = same && t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " has another shape or dtype than the image it belongs to; allowed: the same");
}

const float* floats(const char* op, const char* name, const Tensor& t, int64_t elements) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == elements, op,
                  ": ", name, " has ", t.numel(),
                  " elements or is not contiguous float32 of the CPU; allowed: ", elements, " of them");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* floats(const char* op, const char* name, const OptionalTensor& t, int64_t elements) {
  return t ? floats(op, name, *t, elements) : nullptr;
}

cpu::NormVectors norm_of(const char* op, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                         const OptionalTensor& scale, const OptionalTensor& bias, int64_t channels) {
  STD_TORCH_CHECK(bool(mean) == bool(inverse_deviation) && bool(mean) == bool(scale) && bool(mean) == bool(bias), op,
                  ": some of mean, inverse_deviation, scale and bias are given; allowed: all or none");
  return {floats(op, "mean", mean, channels), floats(op, "inverse_deviation", inverse_deviation, channels),
          floats(op, "scale", scale, channels), floats(op, "bias", bias, channels)};
}

Activation activation_named(const char* op, const std::string& name) {
  static const std::pair<const char*, Activation> known[] = {
      {"identity", Activation::kIdentity},    {"relu", Activation::kRelu},
      {"relu6", Activation::kRelu6},          {"silu", Activation::kSilu},
      {"hard_swish", Activation::kHardSwish}, {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh}};
  for (const auto& [text, value] : known)
    if (name == text) return value;
  STD_TORCH_CHECK(false, op, ": activation='", name,
                  "' is not known; allowed: identity, relu, relu6, silu, hard_swish, gelu, gelu_tanh");
}

// From the pool of results: fresh pages cost more than the work on them.
Tensor empty_as(const Tensor& like) { return empty_nhwc(like, like.size(0), like.size(1), like.size(2), like.size(3)); }
Tensor empty_vector(const Tensor& like, int64_t c) { return torch::stable::new_empty(like, {c}, ScalarType::Float); }

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> training_statistics(const Tensor& t) {
  constexpr const char* op = "training_statistics";
  check_nhwc(op, "t", t);
  const int64_t c = t.size(3);
  Tensor mean = empty_vector(t, c), var = empty_vector(t, c);
  cpu::StatisticsParams p;
  p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t), p.pixels = t.numel() / c, p.channels = c;
  p.mean = data_of<float>(mean), p.var = data_of<float>(var);
  cpu::kernels().training.statistics(p, torch_threads());
  return {mean, var};
}

cpu::NormActParams norm_act_params(const char* op, const Tensor& t, const OptionalTensor& mean,
                                   const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                                   const OptionalTensor& bias, const std::string& activation) {
  check_nhwc(op, "t", t);
  cpu::NormActParams p;
  p.batch = t.size(0), p.pixels = t.size(1) * t.size(2), p.channels = t.size(3);
  p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t), p.activation = activation_named(op, activation);
  p.norm = norm_of(op, mean, inverse_deviation, scale, bias, p.channels);
  STD_TORCH_CHECK(p.norm.mean, op, ": mean is None; allowed: a tensor");
  return p;
}

Tensor training_norm_act(const Tensor& t, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                         const OptionalTensor& scale, const OptionalTensor& bias, const std::string& activation,
                         const OptionalTensor& factor, const OptionalTensor& residual) {
  constexpr const char* op = "training_norm_act";
  cpu::NormActParams p = norm_act_params(op, t, mean, inverse_deviation, scale, bias, activation);
  if (residual) check_like(op, "residual", *residual, t), p.residual = residual->const_data_ptr();
  p.factor = floats(op, "factor", factor, p.batch * p.channels);
  Tensor y = empty_as(t);
  p.y = y.mutable_data_ptr();
  cpu::kernels().training.norm_act(p, torch_threads());
  return y;
}

Tensor training_squeeze(const Tensor& t, const OptionalTensor& mean, const OptionalTensor& inverse_deviation,
                        const OptionalTensor& scale, const OptionalTensor& bias, const std::string& activation) {
  constexpr const char* op = "training_squeeze";
  cpu::NormActParams p = norm_act_params(op, t, mean, inverse_deviation, scale, bias, activation);
  Tensor pooled = torch::stable::new_empty(t, {p.batch, p.channels}, ScalarType::Double);
  p.pooled = data_of<double>(pooled);
  cpu::kernels().training.norm_act(p, torch_threads());
  return pooled;
}

std::tuple<Tensor, Tensor> training_gradient_sums(const Tensor& g, const Tensor& t, const OptionalTensor& mean,
                                                  const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                                                  const OptionalTensor& bias, const std::string& activation,
                                                  const OptionalTensor& factor, bool with_y) {
  constexpr const char* op = "training_gradient_sums";
  check_nhwc(op, "t", t);
  check_like(op, "g", g, t);
  cpu::GradientSumsParams p;
  p.batch = t.size(0), p.pixels = t.size(1) * t.size(2), p.channels = t.size(3);
  p.g = g.const_data_ptr(), p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t);
  p.activation = activation_named(op, activation),
  p.norm = norm_of(op, mean, inverse_deviation, scale, bias, p.channels);
  Tensor sums = torch::stable::new_empty(t, {6, p.batch, p.channels}, ScalarType::Double);
  Tensor y = with_y ? empty_as(t) : torch::stable::new_empty(t, {0});
  p.factor = floats(op, "factor", factor, p.batch * p.channels);
  p.sums = data_of<double>(sums), p.y = with_y ? y.mutable_data_ptr() : nullptr;
  cpu::kernels().training.gradient_sums(p, torch_threads());
  return {sums, y};
}

Tensor training_norm_backward(const Tensor& dy, const Tensor& t, const OptionalTensor& mean,
                              const OptionalTensor& inverse_deviation, const OptionalTensor& scale,
                              const OptionalTensor& bias, const std::string& activation, const Tensor& alpha,
                              const Tensor& beta, const Tensor& delta, const OptionalTensor& factor) {
  constexpr const char* op = "training_norm_backward";
  check_nhwc(op, "t", t);
  check_like(op, "dy", dy, t);
  cpu::NormBackwardParams p;
  p.batch = t.size(0), p.pixels = t.size(1) * t.size(2), p.channels = t.size(3);
  p.dy = dy.const_data_ptr(), p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t);
  p.norm = norm_of(op, mean, inverse_deviation, scale, bias, p.channels),
  p.activation = activation_named(op, activation);
  p.alpha = floats(op, "alpha", alpha, p.channels);
  p.beta = floats(op, "beta", beta, p.channels), p.delta = floats(op, "delta", delta, p.channels);
  p.factor = floats(op, "factor", factor, p.batch * p.channels);
  Tensor dt = empty_as(t);
  p.dt = dt.mutable_data_ptr();
  cpu::kernels().training.norm_backward(p, torch_threads());
  return dt;
}

cpu::DepthwiseShape shape_of_depthwise(const char* op, const Tensor& t, const Tensor& weight, int64_t stride,
                                       const std::vector<int64_t>& padding) {
  check_nhwc(op, "t", t);
  cpu::DepthwiseShape s;
  s.dtype = dtype_of(op, "t", t);
  s.batch = t.size(0), s.height = t.size(1), s.width = t.size(2), s.channels = t.size(3);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(0) == s.channels && weight.size(1) == 1 &&
                      weight.is_contiguous(),
                  op, ": weight is not a contiguous (C, 1, KH, KW) of the CPU; allowed: that");
  check_depthwise_kernel(op, weight.size(2), weight.size(3));
  s.kernel_h = int32_t(weight.size(2)), s.kernel_w = int32_t(weight.size(3)), s.stride = int32_t(stride);
  s.weight = {weight.const_data_ptr(), dtype_of(op, "weight", weight)};
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride=", stride, "; allowed: 1, 2");
  STD_TORCH_CHECK(padding.size() == 4, op, ": padding has ", padding.size(), " numbers; allowed: 4");
  for (size_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(padding[i] >= 0 && padding[i] < (i < 2 ? s.kernel_h : s.kernel_w), op, ": padding=", padding[i],
                    "; allowed: 0 to the kernel's size less 1");
  s.pad_top = int32_t(padding[0]), s.pad_left = int32_t(padding[2]);
  s.out_height = (s.height + padding[0] + padding[1] - s.kernel_h) / stride + 1;
  s.out_width = (s.width + padding[2] + padding[3] - s.kernel_w) / stride + 1;
  STD_TORCH_CHECK(s.height + padding[0] + padding[1] >= s.kernel_h && s.width + padding[2] + padding[3] >= s.kernel_w,
                  op, ": the kernel is larger than the padded image; allowed: at most as large");
  return s;
}

std::tuple<Tensor, Tensor, Tensor> training_depthwise(const Tensor& t, const OptionalTensor& mean,
                                                      const OptionalTensor& inverse_deviation,
                                                      const OptionalTensor& scale, const OptionalTensor& bias,
                                                      const std::string& activation, const Tensor& weight,
                                                      const OptionalTensor& conv_bias, int64_t stride,
                                                      const std::vector<int64_t>& padding) {
  constexpr const char* op = "training_depthwise";
  cpu::DepthwiseTrainParams p;
  p.shape = shape_of_depthwise(op, t, weight, stride, padding);
  const cpu::DepthwiseShape& s = p.shape;
  p.t = t.const_data_ptr(), p.norm = norm_of(op, mean, inverse_deviation, scale, bias, s.channels),
  p.activation = activation_named(op, activation);
  if (conv_bias) p.conv_bias = {floats(op, "conv_bias", *conv_bias, s.channels), DType::kFloat32};
  Tensor z = empty_nhwc(t, s.batch, s.out_height, s.out_width, s.channels);
  Tensor z_mean = empty_vector(t, s.channels), z_var = empty_vector(t, s.channels);
  p.z = z.mutable_data_ptr(), p.mean = data_of<float>(z_mean), p.var = data_of<float>(z_var);
  cpu::kernels().training.depthwise_train(p, torch_threads());
  return {z, z_mean, z_var};
}

std::tuple<Tensor, Tensor, Tensor> training_depthwise_backward(
    const Tensor& g, const Tensor& z, const Tensor& z_mean, const Tensor& z_inverse_deviation, const Tensor& z_scale,
    const Tensor& z_bias, const std::string& z_activation, const OptionalTensor& factor, const OptionalTensor& offset,
    const Tensor& alpha, const Tensor& beta, const Tensor& delta, const Tensor& t, const OptionalTensor& mean,
    const OptionalTensor& inverse_deviation, const OptionalTensor& scale, const OptionalTensor& bias,
    const std::string& activation, const Tensor& weight, int64_t stride, const std::vector<int64_t>& padding) {
  constexpr const char* op = "training_depthwise_backward";
  cpu::DepthwiseBackwardParams p;
  p.shape = shape_of_depthwise(op, t, weight, stride, padding);
  const cpu::DepthwiseShape& s = p.shape;
  check_nhwc(op, "z", z);
  check_like(op, "g", g, z);
  STD_TORCH_CHECK(z.scalar_type() == t.scalar_type() && z.size(0) == s.batch && z.size(1) == s.out_height &&
                      z.size(2) == s.out_width && z.size(3) == s.channels,
                  op, ": z is not what the convolution of t gives; allowed: its shape and dtype");
  p.g = g.const_data_ptr(), p.z = z.const_data_ptr(), p.t = t.const_data_ptr();
  p.factor = floats(op, "factor", factor, s.batch * s.channels);
  p.offset = floats(op, "offset", offset, s.batch * s.channels);
  p.alpha = floats(op, "alpha", alpha, s.channels), p.beta = floats(op, "beta", beta, s.channels);
  p.delta = floats(op, "delta", delta, s.channels);
  p.z_norm = norm_of(op, z_mean, z_inverse_deviation, z_scale, z_bias, s.channels);
  p.norm = norm_of(op, mean, inverse_deviation, scale, bias, s.channels);
  p.z_activation = activation_named(op, z_activation), p.activation = activation_named(op, activation);
  STD_TORCH_CHECK(!p.norm.mean || p.activation == p.z_activation, op, ": activation='", activation,
                  "' differs from z_activation='", z_activation, "'; allowed: the same");
  Tensor dt = empty_as(t),
         dweight = torch::stable::new_empty(t, {s.channels, 1, s.kernel_h, s.kernel_w}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(t, {p.norm.mean ? 2 : 0, s.channels}, ScalarType::Double);
  p.dt = dt.mutable_data_ptr(), p.dweight = data_of<float>(dweight);
  p.sums = p.norm.mean ? data_of<double>(sums) : nullptr;
  cpu::kernels().training.depthwise_backward(p, torch_threads());
  return {dt, dweight, sums};
}

}  // namespace
}  // namespace effkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(effkernels, m) {
  // The four vectors of a norm are those of cpu::NormVectors.
  m.def("training_statistics(Tensor t) -> (Tensor, Tensor)");
  m.def(
      "training_norm_act(Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias, "
      "str activation, Tensor? factor, Tensor? residual) -> Tensor");
  m.def(
      "training_squeeze(Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias, "
      "str activation) -> Tensor");
  m.def(
      "training_gradient_sums(Tensor g, Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, "
      "Tensor? bias, str activation, Tensor? factor, bool with_y) -> (Tensor, Tensor)");
  m.def(
      "training_norm_backward(Tensor dy, Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, "
      "Tensor? bias, str activation, Tensor alpha, Tensor beta, Tensor delta, Tensor? factor) -> Tensor");
  m.def(
      "training_depthwise(Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias, "
      "str activation, Tensor weight, Tensor? conv_bias, int stride, int[] padding) -> (Tensor, Tensor, Tensor)");
  m.def(
      "training_depthwise_backward(Tensor g, Tensor z, Tensor z_mean, Tensor z_inverse_deviation, Tensor z_scale, "
      "Tensor z_bias, str z_activation, Tensor? factor, Tensor? offset, Tensor alpha, Tensor beta, Tensor delta, "
      "Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias, str activation, "
      "Tensor weight, int stride, int[] padding) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  using namespace effkernels::ops;
  m.impl("training_statistics", TORCH_BOX(&training_statistics));
  m.impl("training_norm_act", TORCH_BOX(&training_norm_act));
  m.impl("training_squeeze", TORCH_BOX(&training_squeeze));
  m.impl("training_gradient_sums", TORCH_BOX(&training_gradient_sums));
  m.impl("training_norm_backward", TORCH_BOX(&training_norm_backward));
  m.impl("training_depthwise", TORCH_BOX(&training_depthwise));
  m.impl("training_depthwise_backward", TORCH_BOX(&training_depthwise_backward));
}
