// The depthwise kernels for float32.
#include "depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_depthwise<float>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
