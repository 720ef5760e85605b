#include "pointwise.cuh"

namespace effkernels::cuda {
template cudaError_t run_pointwise<float>(const PointwiseParams&, const PointwisePlan&, const PointwiseWork&,
                                          const Launch&);
}
