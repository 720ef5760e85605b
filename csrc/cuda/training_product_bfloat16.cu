#include "training_product.cuh"

namespace effkernels::cuda {
template cudaError_t run_training_product<__nv_bfloat16>(const training::ProductParams&, const PointwisePlan&,
                                                         const PointwiseWork&, const Launch&);
}
