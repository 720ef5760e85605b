// The depthwise kernels for float16.
#include "depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_depthwise<__half>(const DepthwiseParams&, const DepthwisePlan&, float*, const Launch&);

}  // namespace effkernels::cuda
