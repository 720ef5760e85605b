#include "mbconv.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv<__nv_bfloat16>(const MBConvArguments&, const Launch&);
}
