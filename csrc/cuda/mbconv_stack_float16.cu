#include "mbconv_stack.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv_stack<__half>(const MBConvStackArguments&, const Launch&);
}
