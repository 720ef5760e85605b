// The depthwise kernels of training, backward, for float16.
#include "training_depthwise_backward.cuh"

namespace effkernels::cuda {

template cudaError_t run_train_backward<__half>(const TrainBackwardArguments&, const Launch&);

}  // namespace effkernels::cuda
