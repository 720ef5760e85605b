// The device and the stream of a CUDA operator's call. cuda_device.cpp asks torch; the tests' emulator answers itself.
#pragma once
#include "tensors.h"

namespace effkernels::ops {

// Makes the device of a tensor the current one, for as long as this object lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int index() const;
  void* stream() const;  // torch's current stream there, a cudaStream_t

 private:
  void* guard_;
  int index_;
};

}  // namespace effkernels::ops
