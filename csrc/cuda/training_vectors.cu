// The launches of the training kernels without pixels.
#include "training_vectors.cuh"

#include <limits>

namespace effkernels::cuda {
namespace {

int64_t groups_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class Kernel, class Params>
const char* launch_vectors(Kernel kernel, const Params& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  if (blocks > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";
  Launch at;
  at.grid = dim3(static_cast<unsigned>(blocks));
  at.block = dim3(kVectorThreads);
  at.shared_bytes = static_cast<size_t>(shared_bytes);
  at.stream = static_cast<cudaStream_t>(stream);
  at.overlaps = true;
  const cudaError_t error = launch(kernel, at, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int64_t kFloat = sizeof(float), kDouble = sizeof(double), kWarps = kVectorThreads / 32;

const char* problem_of(const training::ExciteParams& p) {
  return p.channels + p.reduced > kMostExcited ? "more channels than shared memory holds" : nullptr;
}
const char* problem_of(const training::ProductGradientParams& p) {
  return p.in_channels > kMostProductChannels || p.out_channels > kMostProductChannels
             ? "more channels than shared memory holds"
             : nullptr;
}

}  // namespace

const char* launch_running(const training::RunningParams& p, void* stream) {
  int64_t blocks = 0;
  for (int norm = 0; norm < p.count; ++norm) blocks += groups_of(p.norms[norm].channels, kVectorThreads);
  return launch_vectors(training_running, p, blocks, 0, stream);
}

const char* launch_norm_gradient(const training::NormGradientParams& p, void* stream) {
  return launch_vectors(training_norm_gradient, p, groups_of(p.channels, 32), 2 * kVectorThreads * kDouble, stream);
}

const char* launch_excite(const training::ExciteParams& p, void* stream) {
  if (const char* problem = problem_of(p)) return problem;
  return launch_vectors(training_excite, p, p.images, (p.channels + p.reduced) * kFloat, stream);
}

const char* launch_excite_backward(const training::ExciteParams& p, void* stream) {
  if (const char* problem = problem_of(p)) return problem;
  const char* error =
      launch_vectors(training_excite_backward, p, p.images, 2 * (p.channels + p.reduced) * kFloat, stream);
  if (error != nullptr) return error;
  const int64_t blocks = groups_of(p.channels, 32) * groups_of(p.reduced, kWarps);
  return launch_vectors(training_excite_parameters, p, blocks, 0, stream);
}

const char* launch_product_weights(const training::ProductGradientParams& p, void* stream) {
  if (const char* problem = problem_of(p)) return problem;
  return launch_vectors(training_product_weights, p, p.in_channels, kWarps * kDouble + p.out_channels * kFloat, stream);
}

const char* launch_product_gradient(const training::ProductGradientParams& p, void* stream) {
  if (const char* problem = problem_of(p)) return problem;
  return launch_vectors(training_product_gradient, p, p.out_channels, kWarps * kDouble + p.in_channels * kFloat,
                        stream);
}

}  // namespace effkernels::cuda
