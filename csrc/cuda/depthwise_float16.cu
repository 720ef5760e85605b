// The depthwise kernels for float16.
#include "depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_depthwise<__half>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
