// The launch of pointwise_bn_act and of pointwise_bn_act_pool.
#include "pointwise_pool.cuh"

#include <limits>

namespace effkernels::cuda {
namespace {

template <class T>
cudaError_t run(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work, const Launch& at) {
  return p.pools ? run_pointwise_pool<T>(p, plan, work, at) : run_pointwise<T>(p, plan, work, at);
}

}  // namespace

const char* launch_pointwise(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseWork& work,
                             void* stream) {
  if (p.batch * p.pixels * p.out_channels == 0) return nullptr;
  constexpr int64_t kMostChannels = 1 << 30;  // indices of channels, and a stage beyond them, have 32 bits
  if (p.in_channels > kMostChannels || p.out_channels > kMostChannels) return "more channels than 32 bits index";
  if (p.pools && p.pixels > kMostPooledPixels) return "more pixels than 32 bits index";
  if (plan.blocks > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  const Launch at = launch_of(planned_launches(p, plan)[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run<float>(p, plan, work, at);
      break;
    case DType::kFloat16:
      error = run<__half>(p, plan, work, at);
      break;
    case DType::kBFloat16:
      error = run<__nv_bfloat16>(p, plan, work, at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
