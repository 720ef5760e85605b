// All inline PTX of the project.
#pragma once

namespace effkernels::cuda {

// One special-function instruction; largest relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float value) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// The dynamic shared memory of the block, aligned for 16-byte accesses.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

}  // namespace effkernels::cuda
