#include "training_check.h"

#include "registry.h"

namespace effkernels::ops {

using torch::headeronly::ScalarType;

bool on_device_of(const Tensor& t, const Tensor& like) {
  return t.is_cuda() == like.is_cuda() && (!t.is_cuda() || t.get_device_index() == like.get_device_index());
}

const float* floats(const char* op, const char* name, const Tensor& t, int64_t elements, const Tensor& image) {
  STD_TORCH_CHECK(
      on_device_of(t, image) && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == elements, op,
      ": ", name, " has ", t.numel(),
      " elements or is not contiguous float32 of the image's device; allowed: ", elements, " of them");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* floats(const char* op, const char* name, const OptionalTensor& t, int64_t elements, const Tensor& image) {
  return t ? floats(op, name, *t, elements, image) : nullptr;
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

Param parameter_of(const char* op, const char* name, const OptionalTensor& t, int64_t elements, const Tensor& image) {
  if (!t) return {};
  STD_TORCH_CHECK(on_device_of(*t, image) && t->is_contiguous() && t->numel() == elements, op, ": ", name, " has ",
                  t->numel(), " elements, or is not contiguous on the image's device; allowed: ", elements,
                  " of them there");
  return {t->const_data_ptr(), dtype_of(op, name, *t)};
}

namespace {

void check_nhwc(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous() && t.numel() > 0, op, ": ", name,
                  " is not a contiguous (N, H, W, C) with elements; allowed: that");
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_nhwc(op, name, t);
  bool same = t.scalar_type() == like.scalar_type() && on_device_of(t, like);
  for (int64_t i = 0; i < 4; i++) same = same && t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name,
                  " has another shape, dtype or device than the image it belongs to; allowed: the same");
}

training::NormVectors norm_of(const char* op, const TrainingNormArguments& a, const Tensor& image) {
  const bool given = bool(a.mean);
  STD_TORCH_CHECK(given == bool(a.inverse_deviation) && given == bool(a.scale) && given == bool(a.bias), op,
                  ": some of mean, inverse_deviation, scale and bias are given; allowed: all or none");
  const int64_t channels = image.size(3);
  return {floats(op, "mean", a.mean, channels, image),
          floats(op, "inverse_deviation", a.inverse_deviation, channels, image),
          floats(op, "scale", a.scale, channels, image), floats(op, "bias", a.bias, channels, image)};
}

// From the pool of results: fresh pages cost more than the work on them.
Tensor empty_as(const Tensor& like) { return empty_nhwc(like, like.size(0), like.size(1), like.size(2), like.size(3)); }

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// `pixels`: of the batch.
training::NormFold fold_of(const char* op, const TrainingFoldArguments& a, const Tensor& image, int64_t channels,
                           int64_t pixels, Tensor& vectors) {
  vectors = torch::stable::new_empty(image, {training::kNormRows, channels}, ScalarType::Float);
  training::NormFold fold;
  fold.weight = parameter_of(op, "norm_weight", a.weight, channels, image);
  fold.bias = parameter_of(op, "norm_bias", a.bias, channels, image);
  fold.eps = float(a.eps), fold.vectors = data_of<float>(vectors);
  fold.unbiased = pixels > 1 ? float(double(pixels) / double(pixels - 1)) : 1.f;
  return fold;
}

training::NormActParams norm_act_params(const char* op, const Tensor& t, const TrainingNormArguments& norm,
                                        const std::string& activation) {
  check_nhwc(op, "t", t);
  training::NormActParams p;
  p.batch = t.size(0), p.pixels = t.size(1) * t.size(2), p.channels = t.size(3);
  p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t), p.activation = activation_named(op, activation);
  p.norm = norm_of(op, norm, t);
  STD_TORCH_CHECK(p.norm.mean, op, ": mean is None; allowed: a tensor");
  return p;
}

// `kept`: the weight as the kernels take it, in float32 or in the type of t.
training::DepthwiseShape shape_of_depthwise(const char* op, const Tensor& t, const Tensor& weight, int64_t stride,
                                            const std::vector<int64_t>& padding, Tensor& kept) {
  check_nhwc(op, "t", t);
  training::DepthwiseShape s;
  s.dtype = dtype_of(op, "t", t);
  s.batch = t.size(0), s.height = t.size(1), s.width = t.size(2), s.channels = t.size(3);
  STD_TORCH_CHECK(on_device_of(weight, t) && weight.dim() == 4 && weight.size(0) == s.channels && weight.size(1) == 1 &&
                      weight.is_contiguous(),
                  op, ": weight is not a contiguous (C, 1, KH, KW) of the image's device; allowed: that");
  check_depthwise_kernel(op, weight.size(2), weight.size(3));
  s.kernel_h = int32_t(weight.size(2)), s.kernel_w = int32_t(weight.size(3)), s.stride = int32_t(stride);
  const bool as_it_is = weight.scalar_type() == ScalarType::Float || weight.scalar_type() == t.scalar_type();
  kept = as_it_is ? weight : torch::stable::to(weight, ScalarType::Float);
  s.weight = {kept.const_data_ptr(), dtype_of(op, "weight", kept)};
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

}  // namespace

TrainingStatistics make_training_statistics(const Tensor& t, const TrainingFoldArguments& fold) {
  constexpr const char* op = "training_statistics";
  check_nhwc(op, "t", t);
  TrainingStatistics out;
  training::StatisticsParams& p = out.params;
  p.t = t.const_data_ptr(), p.dtype = dtype_of(op, "t", t);
  p.channels = t.size(3), p.pixels = t.numel() / p.channels;
  p.fold = fold_of(op, fold, t, p.channels, p.pixels, out.vectors);
  return out;
}

TrainingProduct make_training_product(const TrainingProductArguments& a) {
  constexpr const char* op = "training_product";
  check_nhwc(op, "x", a.x);
  const int64_t batch = a.x.size(0), pixels = a.x.size(1) * a.x.size(2), in_channels = a.x.size(3);
  STD_TORCH_CHECK(a.weight.dim() == 4 && a.weight.size(0) > 0 && a.weight.size(1) == in_channels &&
                      a.weight.size(2) == 1 && a.weight.size(3) == 1 && a.weight.is_contiguous() &&
                      a.weight.scalar_type() == a.x.scalar_type() && on_device_of(a.weight, a.x),
                  op, ": weight has shape ", shape_of(a.weight), " and dtype ", name_of(a.weight.scalar_type()),
                  "; allowed: a contiguous (Cout, ", in_channels, ", 1, 1) of x's dtype and device");
  const int64_t out_channels = a.weight.size(0);
  TrainingProduct out;
  out.z = empty_nhwc(a.x, batch, a.x.size(1), a.x.size(2), out_channels);
  training::ProductParams& p = out.params;
  PointwiseParams& product = p.product;
  product.x = a.x.const_data_ptr(), product.y = out.z.mutable_data_ptr(), product.dtype = dtype_of(op, "x", a.x);
  product.weight = {a.weight.const_data_ptr(), product.dtype};
  product.norm.conv_bias = parameter_of(op, "conv_bias", a.conv_bias, out_channels, a.x);
  product.allow_tf32 = a.allow_tf32;
  product.batch = batch, product.pixels = pixels, product.in_channels = in_channels;
  product.out_channels = out_channels;
  product.x_stride_n = pixels * in_channels, product.x_stride_p = in_channels;
  p.norm = norm_of(op, a.norm, a.x), p.activation = activation_named(op, a.activation);
  p.factor = floats(op, "factor", a.factor, batch * in_channels, a.x);
  STD_TORCH_CHECK(p.norm.mean || !p.factor, op, ": factor is given without a norm; allowed: None");
  p.fold = fold_of(op, a.fold, a.x, out_channels, batch * pixels, out.vectors);
  return out;
}

TrainingNormAct make_training_norm_act(const Tensor& t, const TrainingNormArguments& norm,
                                       const std::string& activation, const OptionalTensor& factor,
                                       const OptionalTensor& residual) {
  constexpr const char* op = "training_norm_act";
  TrainingNormAct out;
  training::NormActParams& p = out.params;
  p = norm_act_params(op, t, norm, activation);
  if (residual) check_like(op, "residual", *residual, t), p.residual = residual->const_data_ptr();
  p.factor = floats(op, "factor", factor, p.batch * p.channels, t);
  out.y = empty_as(t);
  p.y = out.y.mutable_data_ptr();
  return out;
}

TrainingNormAct make_training_squeeze(const Tensor& t, const TrainingNormArguments& norm,
                                      const std::string& activation) {
  TrainingNormAct out;
  training::NormActParams& p = out.params;
  p = norm_act_params("training_squeeze", t, norm, activation);
  out.y = torch::stable::new_empty(t, {p.batch, p.channels}, ScalarType::Double);
  p.pooled = data_of<double>(out.y);
  return out;
}

TrainingGradientSums make_training_gradient_sums(const Tensor& g, const Tensor& t, const TrainingNormArguments& norm,
                                                 const std::string& activation, const OptionalTensor& factor,
                                                 bool with_y) {
  constexpr const char* op = "training_gradient_sums";
  const training::NormActParams shared = norm_act_params(op, t, norm, activation);
  check_like(op, "g", g, t);
  TrainingGradientSums out;
  training::GradientSumsParams& p = out.params;
  p.batch = shared.batch, p.pixels = shared.pixels, p.channels = shared.channels;
  p.g = g.const_data_ptr(), p.t = shared.t, p.dtype = shared.dtype;
  p.activation = shared.activation, p.norm = shared.norm;
  p.factor = floats(op, "factor", factor, p.batch * p.channels, t);
  out.sums = torch::stable::new_empty(t, {6, p.batch, p.channels}, ScalarType::Double);
  out.y = with_y ? empty_as(t) : torch::stable::new_empty(t, {0});
  p.sums = data_of<double>(out.sums), p.y = with_y ? out.y.mutable_data_ptr() : nullptr;
  return out;
}

TrainingNormBackward make_training_norm_backward(const Tensor& dy, const Tensor& t, const TrainingNormArguments& norm,
                                                 const std::string& activation, const Tensor& alpha, const Tensor& beta,
                                                 const Tensor& delta, const OptionalTensor& factor) {
  constexpr const char* op = "training_norm_backward";
  const training::NormActParams shared = norm_act_params(op, t, norm, activation);
  check_like(op, "dy", dy, t);
  TrainingNormBackward out;
  training::NormBackwardParams& p = out.params;
  p.batch = shared.batch, p.pixels = shared.pixels, p.channels = shared.channels;
  p.dy = dy.const_data_ptr(), p.t = shared.t, p.dtype = shared.dtype;
  p.norm = shared.norm, p.activation = shared.activation;
  p.alpha = floats(op, "alpha", alpha, p.channels, t), p.beta = floats(op, "beta", beta, p.channels, t);
  p.delta = floats(op, "delta", delta, p.channels, t);
  p.factor = floats(op, "factor", factor, p.batch * p.channels, t);
  out.dt = empty_as(t);
  p.dt = out.dt.mutable_data_ptr();
  return out;
}

TrainingDepthwise make_training_depthwise(const TrainingDepthwiseArguments& a) {
  constexpr const char* op = "training_depthwise";
  TrainingDepthwise out;
  training::DepthwiseTrainParams& p = out.params;
  p.shape = shape_of_depthwise(op, a.t, a.weight, a.stride, a.padding, out.weight);
  const training::DepthwiseShape& s = p.shape;
  p.t = a.t.const_data_ptr(), p.norm = norm_of(op, a.norm, a.t), p.activation = activation_named(op, a.activation);
  if (a.conv_bias) p.conv_bias = {floats(op, "conv_bias", *a.conv_bias, s.channels, a.t), DType::kFloat32};
  out.z = empty_nhwc(a.t, s.batch, s.out_height, s.out_width, s.channels);
  p.z = out.z.mutable_data_ptr();
  p.fold = fold_of(op, a.fold, a.t, s.channels, s.batch * s.out_height * s.out_width, out.vectors);
  return out;
}

TrainingDepthwiseBackward make_training_depthwise_backward(const TrainingDepthwiseBackwardArguments& a) {
  constexpr const char* op = "training_depthwise_backward";
  const Tensor& t = a.t;
  TrainingDepthwiseBackward out;
  training::DepthwiseBackwardParams& p = out.params;
  p.shape = shape_of_depthwise(op, t, a.weight, a.stride, a.padding, out.weight);
  const training::DepthwiseShape& s = p.shape;
  check_nhwc(op, "z", a.z);
  check_like(op, "g", a.g, a.z);
  STD_TORCH_CHECK(a.z.scalar_type() == t.scalar_type() && on_device_of(a.z, t) && a.z.size(0) == s.batch &&
                      a.z.size(1) == s.out_height && a.z.size(2) == s.out_width && a.z.size(3) == s.channels,
                  op, ": z is not what the convolution of t gives; allowed: its shape, dtype and device");
  p.g = a.g.const_data_ptr(), p.z = a.z.const_data_ptr(), p.t = t.const_data_ptr();
  p.factor = floats(op, "factor", a.factor, s.batch * s.channels, t);
  p.offset = floats(op, "offset", a.offset, s.batch * s.channels, t);
  p.alpha = floats(op, "alpha", a.alpha, s.channels, t), p.beta = floats(op, "beta", a.beta, s.channels, t);
  p.delta = floats(op, "delta", a.delta, s.channels, t);
  p.z_norm = norm_of(op, a.z_norm, t), p.norm = norm_of(op, a.norm, t);
  STD_TORCH_CHECK(p.z_norm.mean, op, ": z_mean is None; allowed: a tensor");
  p.z_activation = activation_named(op, a.z_activation), p.activation = activation_named(op, a.activation);
  STD_TORCH_CHECK(!p.norm.mean || p.activation == p.z_activation, op, ": activation='", a.activation,
                  "' differs from z_activation='", a.z_activation, "'; allowed: the same");
  out.dt = empty_as(t);
  out.dweight = torch::stable::new_empty(t, {s.channels, 1, s.kernel_h, s.kernel_w}, ScalarType::Float);
  out.sums = torch::stable::new_empty(t, {p.norm.mean ? 2 : 0, s.channels}, ScalarType::Double);
  p.dt = out.dt.mutable_data_ptr(), p.dweight = data_of<float>(out.dweight);
  p.sums = p.norm.mean ? data_of<double>(out.sums) : nullptr;
  return out;
}

}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_FRAGMENT(EFFKERNELS_NAMESPACE, m) {
  // The four vectors of a norm are those of training::NormVectors.
  m.def("training_statistics(Tensor t, Tensor? norm_weight, Tensor? norm_bias, float norm_eps) -> Tensor");
  m.def(
      "training_product(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? mean, Tensor? inverse_deviation, "
      "Tensor? scale, Tensor? bias, str activation, Tensor? factor, Tensor? norm_weight, Tensor? norm_bias, "
      "float norm_eps, bool allow_tf32) -> (Tensor, Tensor)");
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
      "str activation, Tensor weight, Tensor? conv_bias, int stride, int[] padding, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps) -> (Tensor, Tensor)");
  m.def(
      "training_depthwise_backward(Tensor g, Tensor z, Tensor z_mean, Tensor z_inverse_deviation, Tensor z_scale, "
      "Tensor z_bias, str z_activation, Tensor? factor, Tensor? offset, Tensor alpha, Tensor beta, Tensor delta, "
      "Tensor t, Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias, str activation, "
      "Tensor weight, int stride, int[] padding) -> (Tensor, Tensor, Tensor)");
}
