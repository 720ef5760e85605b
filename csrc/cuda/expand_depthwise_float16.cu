#include "expand_depthwise.cuh"

namespace effkernels::cuda {
template cudaError_t run_expand_depthwise<__half>(const ExpandDepthwiseArguments&, const Launch&);
}
