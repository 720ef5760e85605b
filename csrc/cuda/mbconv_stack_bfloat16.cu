#include "mbconv_stack.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv_stack<__nv_bfloat16>(const MBConvStackArguments&, const Launch&);
}
