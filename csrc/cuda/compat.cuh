// The one header through which kernels reach CUDA: its types, and launch(). Kernels are plain CUDA C++ otherwise, so
// that tests/emulation, which has the same names for a CPU, runs the very same sources. No other file of csrc/cuda
// knows of the emulator. Kernels keep to dynamic shared memory: accesses to it are checked to the byte.
#pragma once
#ifdef EFFKERNELS_EMULATED
#include "emulated_ptx.cuh"
#include "emulator.cuh"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ptx.cuh"
#endif

#include <cstdint>

#include "device.h"

namespace effkernels::cuda {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;      // blocks of a cluster, along x; above 1 needs sm_90
  bool cooperative = false;  // every block resident at once, or the launch is refused
  bool overlaps = false;     // may start before the launch ahead of it has ended: its kernel calls wait_for_previous
};

// A launch as it was planned.
inline Launch launch_of(const PlannedLaunch& planned, void* stream) {
  Launch at;
  at.grid = dim3(static_cast<unsigned>(planned.grid));
  at.block = dim3(static_cast<unsigned>(planned.block_x), static_cast<unsigned>(planned.block_y));
  at.shared_bytes = static_cast<size_t>(planned.shared_bytes);
  at.stream = static_cast<cudaStream_t>(stream);
  at.cluster = static_cast<unsigned>(planned.cluster);
  at.cooperative = planned.cooperative;
  at.overlaps = !planned.cooperative;  // a grid that is resident as a whole has the GPU to itself
  return at;
}

// Lets a kernel take all the shared memory and the largest clusters that the current device has. Once per kernel and
// device: a limit for one launch would be that of a launch by another thread too, and cost a call of the driver each.
cudaError_t lift_limits(const void* kernel);

// Return whether the current device and its driver let launches overlap (programmatic dependent launch).
bool launches_may_overlap();

// The launch, or CUDA's error for a launch that it refuses.
template <class... Parameters, class... Arguments>
cudaError_t launch_uncounted(void (*kernel)(Parameters...), const Launch& at, const Arguments&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  constexpr unsigned kPortableCluster = 8;
  if (at.shared_bytes > kSharedWithoutAsking || at.cluster > kPortableCluster) {
    const cudaError_t error = lift_limits(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
#ifdef EFFKERNELS_EMULATED
  return emulation::launch({at.grid, at.block, at.shared_bytes, at.cluster, at.cooperative, at.overlaps},
                           [&] { kernel(Parameters(arguments)...); });
#else
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  config.attrs = attributes;
  if (at.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {at.cluster, 1, 1};
  }
  if (at.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (at.overlaps && launches_may_overlap()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (at.cluster > kPortableCluster) {
    // A GPU with disabled multiprocessors may have no room for so large a cluster: ask, the answer is cheap.
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidClusterSize;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
#endif
}

// The one way to launch a kernel. Every launch is counted (launch_count in device.h).
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& at, const Arguments&... arguments) {
  const cudaError_t error = launch_uncounted(kernel, at, arguments...);
  if (error == cudaSuccess) count_launch();
  return error;
}

}  // namespace effkernels::cuda
