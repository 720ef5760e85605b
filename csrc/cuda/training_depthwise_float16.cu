// The depthwise kernels of training, forward, for float16.
#include "training_depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_train_depthwise<__half>(const TrainForwardArguments&, const Launch&);

}  // namespace effkernels::cuda
