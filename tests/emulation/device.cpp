// The device and the stream of an operator's call, where the operators run on the emulator: csrc/ops/cuda_device.h.
#include "ops/cuda_device.h"

#include "runtime.h"

namespace effkernels::ops {

OnDevice::OnDevice(const Tensor&) : guard_(nullptr), index_(emulation::current_device()) {}
OnDevice::~OnDevice() = default;
int OnDevice::index() const { return index_; }
void* OnDevice::stream() const { return emulation::current_stream(); }

}  // namespace effkernels::ops
