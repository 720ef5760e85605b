#include "device.h"

#include <mutex>
#include <utility>

#include "compat.cuh"

namespace effkernels::cuda {
namespace {

constexpr int kFirstWithClusters = 90;
// What sm_90 and its successors allow: 8 blocks everywhere, 16 where a kernel opts out of portability.
constexpr int kLargestCluster = 16;

cudaError_t ask(int device, DeviceLimits* limits) {
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_block},
      {cudaDevAttrMaxThreadsPerMultiProcessor, &limits->threads_per_multiprocessor},
      {cudaDevAttrMaxBlocksPerMultiprocessor, &limits->blocks_per_multiprocessor},
      {cudaDevAttrMaxRegistersPerMultiprocessor, &limits->registers_per_multiprocessor},
  };
  for (const auto& [attribute, value] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  limits->capability = 10 * major + minor;
  limits->largest_cluster = limits->capability >= kFirstWithClusters ? kLargestCluster : 1;
  return cudaSuccess;
}

}  // namespace

const char* enter_device(int device, DeviceLimits* limits) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static DeviceLimits known[kDevices];
  static bool is_known[kDevices] = {};
  if (device < 0 || device >= kDevices) return "device index out of range; allowed: 0 to 63";
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!is_known[device]) {
    error = ask(device, &known[device]);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    is_known[device] = true;
  }
  *limits = known[device];
  return nullptr;
}

}  // namespace effkernels::cuda
