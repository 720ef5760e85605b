#include "check.h"

#include <sstream>

#include "../sizes.h"

namespace effkernels::ops {

using torch::headeronly::ScalarType;

namespace {

// A value by its name, or by a second name that messages do not list.
template <class Value>
struct Named {
  const char* name;
  Value value;
  const char* alias = "";
};

template <class Value>
Value pick(const char* op, const char* name, const std::string& given, std::initializer_list<Named<Value>> known) {
  std::string allowed;
  for (const Named<Value>& one : known) {
    if (given == one.name || (*one.alias && given == one.alias)) return one.value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(one.name);
  }
  STD_TORCH_CHECK(false, op, ": ", name, "='", given, "' is not known; allowed: ", allowed);
}

}  // namespace

std::string shape_of_sizes(const std::vector<int64_t>& sizes) {
  std::ostringstream out;
  const char* separator = "(";
  for (const int64_t size : sizes) out << separator << size, separator = ", ";
  out << (sizes.size() ? ")" : "()");
  return out.str();
}

std::string shape_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); i++) sizes.push_back(t.size(i));
  return shape_of_sizes(sizes);
}

void check_elements(const char* op, const char* name, std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) elements = product({elements, size > 1 ? size : 1});
  STD_TORCH_CHECK(elements <= kMostElements, op, ": ", name, " has shape ", shape_of_sizes(sizes),
                  "; allowed: sizes whose product is at most 2^54");
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    default:
      return "another type";
  }
}

DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", name_of(t.scalar_type()),
                      "; allowed: float32, float16, bfloat16");
  }
}

DType dtype_named(const char* op, const std::string& name) {
  return pick<DType>(op, "dtype", name,
                     {{"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}});
}

Activation activation_of(const char* op, const char* name, const std::string& given) {
  return pick<Activation>(op, name, given,
                          {{"identity", Activation::kIdentity},
                           {"relu", Activation::kRelu},
                           {"relu6", Activation::kRelu6},
                           {"silu", Activation::kSilu, "swish"},
                           {"hard_swish", Activation::kHardSwish, "hardswish"},
                           {"gelu", Activation::kGelu},
                           {"gelu_tanh", Activation::kGeluTanh}});
}

Gate gate_of(const char* op, const char* name, const std::string& given) {
  return pick<Gate>(op, name, given,
                    {{"sigmoid", Gate::kSigmoid}, {"hard_sigmoid", Gate::kHardSigmoid, "hardsigmoid"}});
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && (!x.is_cuda() || t.get_device_index() == x.get_device_index()), op,
                  ": ", name, " is on ", t.is_cuda() ? "CUDA" : "the CPU", ", the input on ",
                  x.is_cuda() ? "CUDA" : "the CPU", "; allowed: one device for all");
}

void check_image(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " has shape ", shape_of(x), "; allowed: four dimensions (N, C, H, W)");
  for (int64_t i = 0; i < 4; i++) {
    STD_TORCH_CHECK(i == 0 || x.size(i) > 0, op, ": ", name, " has shape ", shape_of(x),
                    "; allowed: at least one channel, row and column");
    STD_TORCH_CHECK(x.size(i) < kLargest, op, ": ", name, " has shape ", shape_of(x), "; allowed: sizes below 2^31");
  }
  check_elements(op, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

void check_pooled(const char* op, const Tensor& pooled) {
  STD_TORCH_CHECK(pooled.dim() == 2 && pooled.size(1) > 0, op, ": pooled has shape ", shape_of(pooled),
                  "; allowed: two dimensions (N, C), at least one channel");
  for (int64_t i = 0; i < 2; i++)
    STD_TORCH_CHECK(pooled.size(i) < kLargest, op, ": pooled has shape ", shape_of(pooled),
                    "; allowed: sizes below 2^31");
  check_elements(op, "pooled", {pooled.size(0), pooled.size(1)});
  STD_TORCH_CHECK(pooled.scalar_type() == ScalarType::Float, op, ": pooled has dtype ", name_of(pooled.scalar_type()),
                  "; allowed: float32");
}

void check_padding(const char* op, const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(padding.size() == 4, op, ": padding has ", padding.size(),
                  " numbers; allowed: four (top, bottom, left, right)");
  for (const int64_t p : padding)
    STD_TORCH_CHECK(p >= 0 && p < kLargest, op, ": padding=(", padding[0], ", ", padding[1], ", ", padding[2], ", ",
                    padding[3], "); allowed: four numbers from 0 to 2^31 - 1");
}

void check_depthwise_kernel(const char* op, int64_t height, int64_t width) {
  const auto fits = [](int64_t size) { return size >= 1 && size <= kLargestDepthwise; };
  STD_TORCH_CHECK(fits(height) && fits(width), op, ": weight is a depthwise kernel of ", height, "x", width,
                  "; allowed: 1 to ", kLargestDepthwise, " for its height and its width");
}

int64_t out_size(const char* op, const char* name, int64_t size, int64_t before, int64_t after, int64_t window,
                 int64_t stride) {
  const int64_t padded = size + before + after;
  STD_TORCH_CHECK(padded >= window, op, ": ", name, "=", size, " with padding ", before, " + ", after,
                  " is smaller than the window of ", window, "; allowed: at least one output");
  return (padded - window) / stride + 1;
}

}  // namespace effkernels::ops
