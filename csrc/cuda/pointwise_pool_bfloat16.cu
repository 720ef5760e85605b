#include "pointwise_pool.cuh"

namespace effkernels::cuda {
template cudaError_t run_pointwise_pool<__nv_bfloat16>(const PointwiseParams&, const PointwisePlan&,
                                                       const PointwiseWork&, const Launch&);
}
