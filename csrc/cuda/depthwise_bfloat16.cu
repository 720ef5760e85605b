// The depthwise kernels for bfloat16.
#include "depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_depthwise<__nv_bfloat16>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
