#include "mbconv.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv<__half>(const MBConvArguments&, const Launch&);
}
