#include "expand_depthwise.cuh"

namespace effkernels::cuda {
template cudaError_t run_expand_depthwise<__nv_bfloat16>(const ExpandDepthwiseArguments&, const Launch&);
}
