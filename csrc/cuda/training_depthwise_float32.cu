// The depthwise kernels of training, forward, for float32.
#include "training_depthwise.cuh"

namespace effkernels::cuda {

template cudaError_t run_train_depthwise<float>(const TrainForwardArguments&, const Launch&);

}  // namespace effkernels::cuda
