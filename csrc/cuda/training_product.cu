// The launch of the products of training.
#include "training_product.cuh"

#include <limits>

#include "training.h"

namespace effkernels::cuda {

const char* launch_training_product(const training::ProductParams& p, const PointwisePlan& plan,
                                    const PointwiseWork& work, void* stream) {
  constexpr int64_t kMostChannels = 1 << 30;  // indices of channels, and a stage beyond them, have 32 bits
  const PointwiseParams& product = p.product;
  if (product.in_channels > kMostChannels || product.out_channels > kMostChannels)
    return "more channels than 32 bits index";
  if (plan.blocks > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  const Launch at = launch_of(planned_launches(product, plan)[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (product.dtype) {
    case DType::kFloat32:
      error = run_training_product<float>(p, plan, work, at);
      break;
    case DType::kFloat16:
      error = run_training_product<__half>(p, plan, work, at);
      break;
    case DType::kBFloat16:
      error = run_training_product<__nv_bfloat16>(p, plan, work, at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
