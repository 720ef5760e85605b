// Every activation alone, compiled to count what it costs an element: one vector read, activated, written.
#include "cuda/numeric.cuh"

namespace effkernels::cuda {

template <class T, int kActivation>
__global__ void activation(const T* from, T* to) {
  float value[kVectorOf<T>];
  load(from + threadIdx.x * kVectorOf<T>, value);
  activate<T>(value, static_cast<Activation>(kActivation));
  store(to + threadIdx.x * kVectorOf<T>, value);
}

#define EFFKERNELS_OF_TYPE(T, kActivation) template __global__ void activation<T, kActivation>(const T*, T*);
#define EFFKERNELS_EVERY_TYPE(kActivation) \
  EFFKERNELS_OF_TYPE(float, kActivation)   \
  EFFKERNELS_OF_TYPE(__half, kActivation)  \
  EFFKERNELS_OF_TYPE(__nv_bfloat16, kActivation)
EFFKERNELS_EVERY_TYPE(0)
EFFKERNELS_EVERY_TYPE(1)
EFFKERNELS_EVERY_TYPE(2)
EFFKERNELS_EVERY_TYPE(3)
EFFKERNELS_EVERY_TYPE(4)
EFFKERNELS_EVERY_TYPE(5)
EFFKERNELS_EVERY_TYPE(6)

}  // namespace effkernels::cuda
