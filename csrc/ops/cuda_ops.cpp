// CUDA's side of the operators: check and pack (check.h), then the kernel on torch's current stream.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launch.h"
#include "parameters.h"

namespace effkernels::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream on a device. The symbol lives in libtorch_cuda, which this library must not link so that it
// also loads where torch has no CUDA; a weak reference would stay null, because the loader searches only the
// dependencies of this library. So it is looked up, once, in the libtorch_cuda that the process has loaded.
void* current_stream(int32_t device) {
  using Getter = decltype(&aoti_torch_get_current_cuda_stream);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "effkernels: a CUDA tensor was given, but this torch has no CUDA part");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel could not be launched: ", error ? error : "");
}

void run_depthwise(const char* op, Depthwise& depthwise) {
  const int32_t device = depthwise.y.get_device_index();
  const DeviceGuard guard(device);
  int multiprocessors = 0;
  check_launch(op, cuda::multiprocessor_count(device, &multiprocessors));
  const DepthwiseParams& params = depthwise.params;
  const cuda::DepthwisePlan plan = cuda::plan_depthwise(params, multiprocessors);
  const int64_t partial_rows = params.pooled == nullptr ? 0 : plan.partial_rows(params.batch);
  Tensor partial = empty_matrix(depthwise.y, partial_rows, params.channels, ScalarType::Float);
  check_launch(op, cuda::launch_depthwise(params, plan, static_cast<float*>(partial.mutable_data_ptr()),
                                          current_stream(device)));
}

Tensor depthwise_bn_act(DEPTHWISE_PARAMETERS) {
  Keep keep;
  Depthwise d = make_depthwise("depthwise_bn_act", DEPTHWISE, keep);
  run_depthwise("depthwise_bn_act", d);
  return d.y;
}

std::tuple<Tensor, Tensor> depthwise_bn_act_squeeze(DEPTHWISE_PARAMETERS) {
  Keep keep;
  Depthwise d = make_depthwise("depthwise_bn_act_squeeze", DEPTHWISE, keep);
  Tensor pooled = empty_matrix(x, d.params.batch, d.params.channels, ScalarType::Float);
  d.params.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  run_depthwise("depthwise_bn_act_squeeze", d);
  return {d.y, pooled};
}

}  // namespace
}  // namespace effkernels::ops

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) {
  using namespace effkernels::ops;
  m.impl("depthwise_bn_act", TORCH_BOX(&depthwise_bn_act));
  m.impl("depthwise_bn_act_squeeze", TORCH_BOX(&depthwise_bn_act_squeeze));
}
