// The training kernels without pixels on CUDA, as the adaptor sees them: plain C++.
#pragma once
#include "../training_vector_params.h"
#include "device.h"

namespace effkernels::cuda {

constexpr int kVectorThreads = 256;
constexpr int64_t kMostExcited = 12 << 10;  // channels and hidden values of a gate, twice in shared memory
constexpr int64_t kMostProductChannels = 16 << 10;

// Null, or what CUDA refused.
const char* launch_running(const training::RunningParams& params, void* stream);
const char* launch_norm_gradient(const training::NormGradientParams& params, void* stream);
const char* launch_excite(const training::ExciteParams& params, void* stream);
const char* launch_excite_backward(const training::ExciteParams& params, void* stream);  // two launches
const char* launch_product_weights(const training::ProductGradientParams& params, void* stream);
const char* launch_product_gradient(const training::ProductGradientParams& params, void* stream);

}  // namespace effkernels::cuda
