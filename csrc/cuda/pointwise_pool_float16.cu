#include "pointwise_pool.cuh"

namespace effkernels::cuda {
template cudaError_t run_pointwise_pool<__half>(const PointwiseParams&, const PointwisePlan&, const PointwiseWork&,
                                                const Launch&);
}
