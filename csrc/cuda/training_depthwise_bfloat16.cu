// The depthwise kernels of training, forward, for bfloat16.
#include "training_depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_train_depthwise<__nv_bfloat16>(const TrainForwardArguments&, const Launch&);

}  // namespace effkernels::cuda
