// depthwise_bn_act_se in one launch, for bfloat16.
#include "depthwise_resident.cuh"

namespace effkernels::cuda {

template cudaError_t run_resident<__nv_bfloat16>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
