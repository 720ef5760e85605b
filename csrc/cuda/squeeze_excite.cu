#include <limits>

#include "squeeze_excite.cuh"

namespace effkernels::cuda {
namespace {

template <class T>
cudaError_t run_scale(const ScaleParams& p, const ScalePlan& plan, const Launch& at) {
  const int64_t elements = p.batch * p.pixels * p.channels;
  return plan.vectors ? launch(scale_by_gate<T, kVectorOf<T>>, at, p, elements / kVectorOf<T>)
                      : launch(scale_by_gate<T, 1>, at, p, elements);
}

}  // namespace

const char* launch_squeeze_excite(const SqueezeExciteParams& p, const SqueezeExcitePlan& plan, void* stream) {
  if (p.batch == 0) return nullptr;
  if (plan.blocks > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  if (p.reduced > kMostReduced) return "more reduced channels than shared memory holds";
  if (p.channels > std::numeric_limits<int32_t>::max() / kMostImagesOfGate) return "more channels than 32 bits index";
  if (plan.shared_bytes > std::numeric_limits<int32_t>::max()) return "more reduced channels than shared memory holds";
  const Launch at = launch_of(planned_launches(p, plan)[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.gate_dtype) {
    case DType::kFloat32:
      error = launch(squeeze_excite_gate<float>, at, p, plan);
      break;
    case DType::kFloat16:
      error = launch(squeeze_excite_gate<__half>, at, p, plan);
      break;
    case DType::kBFloat16:
      error = launch(squeeze_excite_gate<__nv_bfloat16>, at, p, plan);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_scale(const ScaleParams& p, const ScalePlan& plan, void* stream) {
  if (p.batch * p.pixels * p.channels == 0) return nullptr;
  const Launch at = launch_of(planned_launches(p, plan)[0], stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run_scale<float>(p, plan, at);
      break;
    case DType::kFloat16:
      error = run_scale<__half>(p, plan, at);
      break;
    case DType::kBFloat16:
      error = run_scale<__nv_bfloat16>(p, plan, at);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
