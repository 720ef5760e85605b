// depthwise_bn_act_se in one launch, for float32.
#include "depthwise_resident.cuh"

namespace effkernels::cuda {

template cudaError_t run_resident<float>(const DepthwiseArguments&, const Launch&);

}  // namespace effkernels::cuda
