#include "mbconv_queue.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv_queue<__nv_bfloat16>(const MBConvQueueArguments&, const Launch&);
}
