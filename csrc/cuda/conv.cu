// The launches of conv_bn_act.
#include "conv_stem.cuh"

#include <limits>

#include "norm_act.cuh"

namespace effkernels::cuda {
namespace {

template <class T>
cudaError_t run_norm_act(const NormActParams& p, const NormActPlan& plan, const Launch& at) {
  return plan.vectors ? launch(norm_act<T, kVectorOf<T>>, at, p, plan) : launch(norm_act<T, 1>, at, p, plan);
}

template <class T>
cudaError_t run_conv(const ConvParams& p, const ConvPlan& plan, const Launch& at) {
  return plan.stem ? launch(conv_stem<T>, at, p, plan) : launch(conv<T>, at, p, plan);
}

}  // namespace

const char* launch_conv(const ConvParams& p, const ConvPlan& plan, void* stream) {
  if (!plan.fused) return "this convolution has no kernel of its own";
  const PlannedLaunches planned = planned_launches(p, plan);
  if (planned.empty()) return nullptr;
  const Launch at = launch_of(planned[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run_conv<float>(p, plan, at);
      break;
    case DType::kFloat16:
      error = run_conv<__half>(p, plan, at);
      break;
    case DType::kBFloat16:
      error = run_conv<__nv_bfloat16>(p, plan, at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_norm_act(const NormActParams& p, const NormActPlan& plan, void* stream) {
  const PlannedLaunches planned = planned_launches(p, plan);
  if (planned.empty()) return nullptr;
  if (planned[0].grid > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  const Launch at = launch_of(planned[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run_norm_act<float>(p, plan, at);
      break;
    case DType::kFloat16:
      error = run_norm_act<__half>(p, plan, at);
      break;
    case DType::kBFloat16:
      error = run_norm_act<__nv_bfloat16>(p, plan, at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_norm_act(const NormActParams& p, const DeviceLimits& limits, void* stream) {
  return launch_norm_act(p, plan_norm_act(p, limits), stream);
}

}  // namespace effkernels::cuda
