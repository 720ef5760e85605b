#include "device.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "compat.cuh"

namespace effkernels::cuda {
namespace {

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
  limits->largest_cluster = largest_cluster(limits->capability);
  return cudaSuccess;
}

}  // namespace

cudaError_t lift_limits(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> lifted;
  int device = 0, shared_per_block = 0, has_clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (lifted.count({kernel, device}) > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  if (error == cudaSuccess && has_clusters)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) lifted.insert({kernel, device});
  return error;
}

bool launches_may_overlap() {
  constexpr int kFirstDriver = 12030;  // the first that captures overlapping launches into graphs
  constexpr int kFirstCapability = 90;
  static const bool allowed = [] {
    const char* const setting = std::getenv("EFFKERNELS_OVERLAP_LAUNCHES");
    if (setting != nullptr && std::strcmp(setting, "0") == 0) return false;
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kFirstDriver;
  }();
  int device = 0;
  DeviceLimits limits;
  return allowed && cudaGetDevice(&device) == cudaSuccess && device_limits(device, &limits) == nullptr &&
         limits.capability >= kFirstCapability;
}

const char* device_limits(int device, DeviceLimits* limits) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static DeviceLimits known[kDevices];
  static bool is_known[kDevices] = {};
  if (device < 0 || device >= kDevices) return "device index out of range; allowed: 0 to 63";
  const std::lock_guard<std::mutex> lock(mutex);
  if (!is_known[device]) {
    const cudaError_t error = ask(device, &known[device]);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    is_known[device] = true;
  }
  *limits = known[device];
  return nullptr;
}

const char* enter_device(int device, DeviceLimits* limits) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  // Only where it is another: cudaSetDevice would put the primary context in the place of a green one.
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  return error == cudaSuccess ? device_limits(device, limits) : cudaGetErrorString(error);
}

}  // namespace effkernels::cuda
