// The depthwise kernels of training, backward, for bfloat16.
#include "training_depthwise_backward.cuh"

namespace effkernels::cuda {

template cudaError_t run_train_backward<__nv_bfloat16>(const TrainBackwardArguments&, const Launch&);

}  // namespace effkernels::cuda
