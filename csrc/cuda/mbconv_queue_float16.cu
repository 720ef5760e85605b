#include "mbconv_queue.cuh"

namespace effkernels::cuda {
template cudaError_t run_mbconv_queue<__half>(const MBConvQueueArguments&, const Launch&);
}
