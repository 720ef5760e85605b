// depthwise_bn_act_se in one launch, for float16.
#include "depthwise_resident.cuh"

namespace effkernels::cuda {

template cudaError_t run_resident<__half>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
