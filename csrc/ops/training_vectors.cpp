#include "training_vectors.h"

#include "registry.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;

float* new_floats(const Tensor& like, std::initializer_list<int64_t> sizes, Tensor& to) {
  to = torch::stable::new_empty(like, sizes, ScalarType::Float);
  return static_cast<float*>(to.mutable_data_ptr());
}

// A result of the parameter's type, or of float32 where there is none.
training::Result new_result(const char* op, const char* name, const Tensor& like, const OptionalTensor& parameter,
                            std::initializer_list<int64_t> sizes, Tensor& to) {
  to = torch::stable::new_empty(like, sizes, parameter ? parameter->scalar_type() : ScalarType::Float);
  return {to.mutable_data_ptr(), dtype_of(op, name, to)};
}

Param matrix_of(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() >= 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name, " has shape ", shape_of(t),
                  "; allowed: (", rows, ", ", columns, ") or that with two more sizes of 1");
  return parameter_of(op, name, OptionalTensor(t), rows * columns, like);
}

const double* doubles(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Double && t.numel() > 0, op, ": ", name,
                  " is not contiguous float64 with elements; allowed: that");
  return static_cast<const double*>(t.const_data_ptr());
}

training::ExciteParams excite_params(const char* op, const TrainingExciteArguments& a, const Tensor& like,
                                     int64_t images, int64_t channels) {
  training::ExciteParams p;
  p.images = images, p.channels = channels, p.reduced = a.w_reduce.size(0);
  p.w_reduce = matrix_of(op, "w_reduce", a.w_reduce, p.reduced, channels, like);
  p.w_expand = matrix_of(op, "w_expand", a.w_expand, channels, p.reduced, like);
  p.b_reduce = parameter_of(op, "b_reduce", a.b_reduce, p.reduced, like);
  p.b_expand = parameter_of(op, "b_expand", a.b_expand, channels, like);
  p.activation = activation_named(op, a.activation);
  p.gate_activation = gate_of(op, "gate_activation", a.gate_activation);
  return p;
}

training::ProductGradientParams product_params(const char* op, const TrainingProductGradientArguments& a) {
  training::ProductGradientParams p;
  STD_TORCH_CHECK(a.weight.dim() == 4, op, ": weight has shape ", shape_of(a.weight), "; allowed: (Cout, Cin, 1, 1)");
  p.out_channels = a.weight.size(0), p.in_channels = a.weight.size(1);
  p.weight = matrix_of(op, "weight", a.weight, p.out_channels, p.in_channels, a.weight);
  p.bias = parameter_of(op, "conv_bias", a.conv_bias, p.out_channels, a.weight);
  p.mean = floats(op, "mean", a.mean, p.out_channels, a.weight);
  p.alpha = floats(op, "alpha", a.alpha, p.out_channels, a.weight);
  p.beta = floats(op, "beta", a.beta, p.out_channels, a.weight);
  p.delta = floats(op, "delta", a.delta, p.out_channels, a.weight);
  return p;
}

}  // namespace

training::RunningParams make_training_running(const std::vector<Tensor>& running, const std::vector<Tensor>& vectors,
                                              const std::vector<Tensor>& counts, const std::vector<double>& momenta) {
  constexpr const char* op = "training_running";
  const size_t norms = vectors.size();
  STD_TORCH_CHECK(norms > 0 && norms <= training::kMostRunningNorms && running.size() == 2 * norms &&
                      momenta.size() == norms && counts.size() <= norms,
                  op, ": running has ", running.size(), " tensors, vectors ", norms, ", counts ", counts.size(),
                  " and momenta ", momenta.size(), " numbers; allowed: two, one, at most one and one for each of 1 to ",
                  training::kMostRunningNorms, " norms");
  training::RunningParams p;
  p.count = int(norms);
  for (size_t i = 0; i < norms; i++) {
    training::RunningParams::OfNorm& norm = p.norms[i];
    STD_TORCH_CHECK(vectors[i].dim() == 2 && vectors[i].size(0) == training::kNormRows, op, ": vectors have shape ",
                    shape_of(vectors[i]), "; allowed: (", int(training::kNormRows), ", C)");
    norm.channels = vectors[i].size(1);
    norm.vectors = floats(op, "vectors", vectors[i], training::kNormRows * norm.channels, vectors[0]);
    training::Result* const results[] = {&norm.mean, &norm.var};
    for (size_t which = 0; which < 2; which++) {
      const Param own = parameter_of(op, "running", OptionalTensor(running[2 * i + which]), norm.channels, vectors[0]);
      *results[which] = {running[2 * i + which].mutable_data_ptr(), own.dtype};
    }
    norm.momentum = float(momenta[i]), norm.kept = float(1.0 - momenta[i]);
    if (i >= counts.size()) continue;
    STD_TORCH_CHECK(
        counts[i].numel() == 1 && counts[i].scalar_type() == ScalarType::Long && on_device_of(counts[i], vectors[0]),
        op, ": counts are not single int64 numbers on the device of the statistics; allowed: those");
    norm.count = static_cast<int64_t*>(counts[i].mutable_data_ptr());
  }
  return p;
}

TrainingNormGradient make_training_norm_gradient(const Tensor& sums, const OptionalTensor& factor,
                                                 const OptionalTensor& offset, const Tensor& scale,
                                                 const Tensor& inverse_deviation, int64_t pixels, bool batch,
                                                 const OptionalTensor& weight, const OptionalTensor& bias) {
  constexpr const char* op = "training_norm_gradient";
  TrainingNormGradient out;
  training::NormGradientParams& p = out.params;
  p.sums = doubles(op, "sums", sums);
  const bool per_image = sums.dim() == 3 && sums.size(0) == 6, whole = sums.dim() == 2 && sums.size(0) == 2;
  STD_TORCH_CHECK(per_image || whole, op, ": sums has shape ", shape_of(sums), "; allowed: (6, N, C) or (2, C)");
  STD_TORCH_CHECK(per_image || (!factor && !offset), op,
                  ": factor or offset is given with sums of the whole batch; allowed: None");
  p.rows = int(sums.size(0)), p.images = per_image ? sums.size(1) : 1, p.channels = sums.size(sums.dim() - 1);
  p.factor = floats(op, "factor", factor, p.images * p.channels, sums);
  p.offset = floats(op, "offset", offset, p.images * p.channels, sums);
  p.scale = floats(op, "scale", scale, p.channels, sums);
  p.inverse_deviation = floats(op, "inverse_deviation", inverse_deviation, p.channels, sums);
  STD_TORCH_CHECK(pixels > 0, op, ": pixels=", pixels, "; allowed: at least 1");
  p.pixels = double(pixels), p.batch = batch;
  p.weight = new_result(op, "weight", sums, weight, {p.channels}, out.weight);
  p.bias = new_result(op, "bias", sums, bias, {p.channels}, out.bias);
  p.vectors = new_floats(sums, {2, p.channels}, out.vectors);
  return out;
}

TrainingExcite make_training_excite(const Tensor& means, const TrainingExciteArguments& a) {
  constexpr const char* op = "training_excite";
  STD_TORCH_CHECK(means.dim() == 2, op, ": means has shape ", shape_of(means), "; allowed: (N, C)");
  TrainingExcite out;
  training::ExciteParams& p = out.params;
  p = excite_params(op, a, means, means.size(0), means.size(1));
  p.means = doubles(op, "means", means);
  p.gate = new_floats(means, {p.images, p.channels}, out.gate);
  return out;
}

TrainingExcite make_training_excite_backward(const Tensor& sums, int64_t pixels, const TrainingExciteArguments& a) {
  constexpr const char* op = "training_excite_backward";
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == 6, op, ": sums has shape ", shape_of(sums),
                  "; allowed: (6, N, C)");
  TrainingExcite out;
  training::ExciteParams& p = out.params;
  p = excite_params(op, a, sums, sums.size(1), sums.size(2));
  p.sums = doubles(op, "sums", sums), p.gradient = p.sums + p.images * p.channels;
  STD_TORCH_CHECK(pixels > 0, op, ": pixels=", pixels, "; allowed: at least 1");
  p.pixels = double(pixels);
  p.offset = new_floats(sums, {p.images, p.channels}, out.offset);
  p.dw_reduce = new_result(op, "w_reduce", sums, OptionalTensor(a.w_reduce), {p.reduced, p.channels}, out.dw_reduce);
  p.db_reduce = new_result(op, "b_reduce", sums, a.b_reduce, {p.reduced}, out.db_reduce);
  p.dw_expand = new_result(op, "w_expand", sums, OptionalTensor(a.w_expand), {p.channels, p.reduced}, out.dw_expand);
  p.db_expand = new_result(op, "b_expand", sums, a.b_expand, {p.channels}, out.db_expand);
  float* const scratch = new_floats(sums, {p.images, 2 * p.reduced + p.channels}, out.scratch);
  p.hidden = scratch, p.dhidden = scratch + p.images * p.reduced, p.dlogits = scratch + 2 * p.images * p.reduced;
  return out;
}

TrainingProductGradient make_training_product_weights(const TrainingProductGradientArguments& a) {
  constexpr const char* op = "training_product_weights";
  TrainingProductGradient out;
  training::ProductGradientParams& p = out.params;
  p = product_params(op, a);
  const OptionalTensor weight(a.weight);
  p.scaled = new_result(op, "weight", a.weight, weight, {p.in_channels, p.out_channels, 1, 1}, out.scaled);
  p.middle = new_result(op, "weight", a.weight, weight, {p.in_channels, p.in_channels, 1, 1}, out.middle);
  p.shift = new_floats(a.weight, {p.in_channels}, out.shift);
  return out;
}

TrainingProductGradient make_training_product_gradient(const TrainingProductGradientArguments& a,
                                                       const Tensor& products, const OptionalTensor& x_mean,
                                                       const OptionalTensor& squares, int64_t pixels, bool centred) {
  constexpr const char* op = "training_product_gradient";
  TrainingProductGradient out;
  training::ProductGradientParams& p = out.params;
  p = product_params(op, a);
  STD_TORCH_CHECK(x_mean.has_value() == squares.has_value(), op,
                  ": x_mean and squares belong together; allowed: both or neither");
  p.products = floats(op, "products", products, p.out_channels * p.in_channels, a.weight);
  p.x_mean = floats(op, "x_mean", x_mean, p.in_channels, a.weight);
  p.squares = floats(op, "squares", squares, p.in_channels * p.in_channels, a.weight);
  p.pixels = double(pixels), p.centred = centred, p.batch = x_mean.has_value();
  p.dweight =
      new_result(op, "weight", a.weight, OptionalTensor(a.weight), {p.out_channels, p.in_channels, 1, 1}, out.dweight);
  return out;
}

}  // namespace effkernels::ops

EFFKERNELS_LIBRARY_FRAGMENT(EFFKERNELS_NAMESPACE, m) {
  m.def("training_running(Tensor(a!)[] running, Tensor[] vectors, Tensor(b!)[] counts, float[] momenta) -> ()");
  m.def(
      "training_norm_gradient(Tensor sums, Tensor? factor, Tensor? offset, Tensor scale, Tensor inverse_deviation, "
      "int pixels, bool batch, Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "training_excite(Tensor means, Tensor w_reduce, Tensor? b_reduce, Tensor w_expand, Tensor? b_expand, "
      "str activation, str gate_activation) -> Tensor");
  m.def(
      "training_excite_backward(Tensor sums, int pixels, Tensor w_reduce, Tensor? b_reduce, Tensor w_expand, "
      "Tensor? b_expand, str activation, str gate_activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "training_product_weights(Tensor weight, Tensor? conv_bias, Tensor mean, Tensor alpha, Tensor beta, "
      "Tensor delta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "training_product_gradient(Tensor weight, Tensor? conv_bias, Tensor mean, Tensor alpha, Tensor beta, "
      "Tensor delta, Tensor products, Tensor? x_mean, Tensor? squares, int pixels, bool centred) -> Tensor");
}
