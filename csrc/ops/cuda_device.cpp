#include "cuda_device.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace effkernels::ops {
namespace {

using torch::stable::accelerator::DeviceGuard;
using StreamGetter = decltype(&aoti_torch_get_current_cuda_stream);

// torch's current stream on a device. The symbol lives in libtorch_cuda, which this library must not link so that it
// also loads where torch has no CUDA; a weak reference would stay null, because the loader searches only the
// dependencies of this library. So it is looked up, once, in the libtorch_cuda that the process has loaded.
StreamGetter stream_getter() {
  static const StreamGetter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return getter;
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor)
    : guard_(new DeviceGuard(tensor.get_device_index())), index_(tensor.get_device_index()) {}

OnDevice::~OnDevice() { delete static_cast<DeviceGuard*>(guard_); }

int OnDevice::index() const { return index_; }

void* OnDevice::stream() const {
  STD_TORCH_CHECK(stream_getter() != nullptr, "effkernels: a CUDA tensor was given, but this torch has no CUDA part");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(stream_getter()(index_, &stream));
  return stream;
}

}  // namespace effkernels::ops
