// Calls each CPU kernel once, with one thread, so that a tool can count the instructions of `counted_call`.
//
//   driver ISA              prints the name of each case, calls it once outside of counted_call and once in it
//   driver ISA CASE ROUNDS  calls one case so often, in counted_call
//
// No torch: the process starts in milliseconds, also in valgrind.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace effkernels;

namespace {

// Memory of a tensor, freed with the process. The bits of 1 are a number in every type that they are read as.
void* filled(int64_t elements, DType dtype) {
  const int64_t bytes = elements * (dtype == DType::kFloat32 ? 4 : 2);
  auto* const data = static_cast<unsigned char*>(std::aligned_alloc(64, size_t(bytes + 127) / 64 * 64));
  const uint32_t one = dtype == DType::kFloat32 ? 0x3f800000u : dtype == DType::kFloat16 ? 0x3c00u : 0x3f80u;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < elements; i++) std::memcpy(data + i * size, &one, size_t(size));
  return data;
}

Param parameter(int64_t elements, DType dtype) { return {filled(elements, dtype), dtype}; }

Norm norm(int64_t channels) {
  Norm n;
  n.weight = n.bias = n.mean = n.var = parameter(channels, DType::kFloat32);
  n.eps = 1e-3f;
  return n;
}

DepthwiseParams depthwise(DType dtype, int64_t channels, int64_t size, int kernel, int stride) {
  DepthwiseParams p;
  p.dtype = dtype, p.activation = Activation::kSilu;
  p.batch = 1, p.channels = channels, p.height = p.width = size;
  p.kernel_h = p.kernel_w = kernel, p.stride = stride, p.pad_top = p.pad_left = kernel / 2;
  p.out_height = p.out_width = (size - 1) / stride + 1;
  p.x = filled(size * size * channels, dtype), p.y = filled(p.out_height * p.out_width * channels, dtype);
  p.weight = parameter(channels * kernel * kernel, dtype), p.norm = norm(channels);
  p.pooled = static_cast<float*>(filled(channels, DType::kFloat32));
  p.x_stride_w = channels, p.x_stride_h = size * channels, p.x_stride_n = size * size * channels;
  return p;
}

PointwiseParams pointwise(DType dtype, int64_t in_channels, int64_t out_channels, int64_t size, bool gated) {
  PointwiseParams p;
  p.dtype = dtype, p.activation = gated ? Activation::kIdentity : Activation::kSilu;
  p.batch = 1, p.pixels = size * size, p.in_channels = in_channels, p.out_channels = out_channels;
  p.x = filled(p.pixels * in_channels, dtype), p.y = filled(p.pixels * out_channels, dtype);
  p.weight = parameter(in_channels * out_channels, dtype), p.norm = norm(out_channels);
  if (gated) p.gate = parameter(in_channels, dtype), p.residual = filled(p.pixels * out_channels, dtype);
  p.x_stride_p = in_channels, p.x_stride_n = p.pixels * in_channels;
  p.residual_stride_p = out_channels, p.residual_stride_n = p.pixels * out_channels;
  return p;
}

ConvParams conv(DType dtype, int64_t in_channels, int64_t out_channels, int64_t size, int stride) {
  ConvParams p;
  p.dtype = dtype, p.activation = Activation::kSilu;
  p.batch = 1, p.in_channels = in_channels, p.out_channels = out_channels, p.height = p.width = size;
  p.stride = stride, p.pad_top = p.pad_left = 1, p.out_height = p.out_width = (size - 1) / stride + 1;
  p.x = filled(size * size * in_channels, dtype), p.y = filled(p.out_height * p.out_width * out_channels, dtype);
  p.weight = parameter(in_channels * out_channels * 9, dtype), p.norm = norm(out_channels);
  p.x_stride_c = 1, p.x_stride_w = in_channels, p.x_stride_h = size * in_channels;
  p.x_stride_n = size * size * in_channels;
  return p;
}

SqueezeExciteParams squeeze_excite(DType dtype, int64_t channels, int64_t reduced) {
  SqueezeExciteParams p;
  p.gate_dtype = dtype, p.batch = 1, p.channels = channels, p.reduced = reduced;
  p.pooled = static_cast<const float*>(filled(channels, DType::kFloat32));
  p.w_reduce = p.w_expand = parameter(channels * reduced, dtype);
  p.b_reduce = p.b_expand = parameter(channels, DType::kFloat32);
  p.gate = filled(channels, dtype);
  return p;
}

struct Case {
  std::string name;
  std::function<void()> call;
};

std::vector<Case> all_cases() {
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Parallel alone;
  std::vector<Case> cases;
  const std::pair<const char*, DType> dtypes[] = {
      {"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}};
  for (const auto& [name, dtype] : dtypes) {
    const auto add = [&, type = std::string(name)](const char* of, auto kernel, auto params) {
      cases.push_back({std::string(of) + " " + type, [=] { kernel(params, alone); }});
    };
    add("stem 3->32 @56", kernels.conv, conv(dtype, 3, 32, 56, 2));
    add("conv 24->48 @14", kernels.conv, conv(dtype, 24, 48, 14, 1));
    add("depthwise 3x3 32 @28", kernels.depthwise, depthwise(dtype, 32, 28, 3, 1));
    add("depthwise 5x5/2 40 @28", kernels.depthwise, depthwise(dtype, 40, 28, 5, 2));
    for (const int kernel : {3, 5}) {
      cpu::ExpandDepthwiseParams p{pointwise(dtype, 40, 160, 14, false), depthwise(dtype, 160, 14, kernel, 1)};
      p.expand.y = nullptr, p.depthwise.x = nullptr;
      add(kernel == 3 ? "expand 40->160, 3x3 @14" : "expand 40->160, 5x5 @14", kernels.expand_depthwise, p);
    }
    add("project 96->24 @28", kernels.pointwise, pointwise(dtype, 96, 24, 28, true));
    add("head 96->256 @7", kernels.pointwise, pointwise(dtype, 96, 256, 7, false));
    add("classifier 512->100", kernels.pointwise, pointwise(dtype, 512, 100, 1, false));
    add("squeeze-and-excitation 240, 10", kernels.squeeze_excite, squeeze_excite(dtype, 240, 10));
  }
  return cases;
}

}  // namespace

// The tools find it by its name.
extern "C" __attribute__((noinline)) void counted_call(const std::function<void()>& call) { call(); }

int main(int count, char** arguments) {
  if ((count != 2 && count != 4) || !cpu::set_isa(arguments[1])) {
    std::fprintf(stderr, "usage: driver ISA [CASE ROUNDS]; ISA is one that was built and that this machine has\n");
    return 2;
  }
  const std::vector<Case> cases = all_cases();
  if (count == 4) {
    const Case& one = cases.at(size_t(std::atoi(arguments[2])));
    for (int round = std::atoi(arguments[3]); round > 0; round--) counted_call(one.call);
    return 0;
  }
  for (const Case& one : cases) {
    std::printf("%s\n", one.name.c_str());
    one.call();  // allocates scratch memory
    counted_call(one.call);
  }
  return 0;
}
