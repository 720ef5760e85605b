// The host side of CUDA over the memory of the CPU. Kernels run when they are launched, so streams have nothing to do.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

struct EmulatedUserObject {
  void* pointer;
  cudaHostFn_t destroy;
};

namespace emulation {
namespace {

struct Runtime {
  std::vector<Limits> devices{Limits{}};
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  std::map<void*, size_t> allocations;
  int failing_allocations = 0;
  uint64_t stream = 0, next_stream = 1u << 20;
  bool capturing = false, refuses_cooperative = false;
  unsigned room_for_cluster = ~0u;  // blocks
  int function_attributes = 0;
  cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
  std::vector<EmulatedUserObject> retained;
};
Runtime& runtime() {
  static Runtime r;
  return r;
}

// What CUDA does not let a thread call while a stream is being captured, unless the thread has relaxed its mode.
bool forbidden_while_capturing() {
  return runtime().capturing && runtime().thread_mode != cudaStreamCaptureModeRelaxed;
}

bool same(const Limits& a, const Limits& b) {
  return a.capability == b.capability && a.multiprocessors == b.multiprocessors &&
         a.shared_per_multiprocessor == b.shared_per_multiprocessor && a.shared_per_block == b.shared_per_block &&
         a.threads_per_multiprocessor == b.threads_per_multiprocessor &&
         a.blocks_per_multiprocessor == b.blocks_per_multiprocessor &&
         a.registers_per_multiprocessor == b.registers_per_multiprocessor && a.largest_cluster == b.largest_cluster &&
         a.registers_per_thread == b.registers_per_thread;
}

}  // namespace

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) runtime().last_error = error;
  return error;
}

int use_device(const Limits& limits) {
  std::vector<Limits>& devices = runtime().devices;
  const auto found = std::find_if(devices.begin(), devices.end(), [&](const Limits& d) { return same(d, limits); });
  runtime().device = static_cast<int>(found - devices.begin());
  if (found == devices.end()) devices.push_back(limits);
  return runtime().device;
}
int current_device() { return runtime().device; }
const Limits& current_limits() { return runtime().devices[size_t(runtime().device)]; }

void set_current_stream(uint64_t id) { runtime().stream = id; }
void* current_stream() { return reinterpret_cast<void*>(runtime().stream); }
void set_capturing(bool capturing) { runtime().capturing = capturing; }
int64_t allocated_bytes() {
  int64_t bytes = 0;
  for (const auto& [pointer, size] : runtime().allocations) bytes += int64_t(size);
  return bytes;
}
void fail_allocations(int count) { runtime().failing_allocations = count; }
void refuse_cooperative(bool refuse) { runtime().refuses_cooperative = refuse; }
void refuse_clusters_above(unsigned blocks) { runtime().room_for_cluster = blocks; }
int function_attributes_set() { return runtime().function_attributes; }

int destroy_user_objects() {
  const std::vector<EmulatedUserObject> objects = std::move(runtime().retained);
  runtime().retained.clear();
  for (const EmulatedUserObject& object : objects) object.destroy(object.pointer);
  return static_cast<int>(objects.size());
}

int blocks_per_multiprocessor(const Limits& limits, int threads, size_t shared_bytes) {
  const int warps = (threads + 31) / 32;
  const int by_threads = limits.threads_per_multiprocessor / (warps * 32);
  const int by_registers = limits.registers_per_multiprocessor / (warps * 32 * limits.registers_per_thread);
  const int by_shared =
      shared_bytes > size_t(limits.shared_per_block)
          ? 0
          : static_cast<int>(size_t(limits.shared_per_multiprocessor) / (shared_bytes + kReservedSharedPerBlock));
  return std::min({by_threads, by_registers, by_shared, limits.blocks_per_multiprocessor});
}

cudaError_t check_launch(const Limits& limits, const dim3& grid, const dim3& block, size_t shared_bytes,
                         unsigned cluster, bool cooperative) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kThreadsPerBlock || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > size_t(limits.shared_per_block)) return cudaErrorInvalidValue;
  if (cluster == 0 || cluster > unsigned(limits.largest_cluster)) return cudaErrorInvalidClusterSize;
  if (cluster > runtime().room_for_cluster) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster != 0) return cudaErrorInvalidConfiguration;
  if (cooperative && runtime().refuses_cooperative) return cudaErrorCooperativeLaunchTooLarge;
  const int resident = blocks_per_multiprocessor(limits, static_cast<int>(threads), shared_bytes);
  if (cooperative && uint64_t(grid.x) * grid.y * grid.z > uint64_t(resident) * unsigned(limits.multiprocessors))
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

cudaError_t set_function_attribute(cudaFuncAttribute attribute, int value) {
  const Limits& limits = current_limits();
  ++runtime().function_attributes;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && (value < 0 || value > limits.shared_per_block))
    return remember(cudaErrorInvalidValue);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && limits.largest_cluster == 1)
    return remember(cudaErrorNotSupported);
  return cudaSuccess;
}

cudaError_t largest_clusters(int* count, const cudaLaunchConfig_t* config) {
  const Limits& limits = current_limits();
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  if (cluster == 0 || cluster > unsigned(limits.largest_cluster)) return remember(cudaErrorInvalidClusterSize);
  const dim3& block = config->blockDim;
  const int resident =
      blocks_per_multiprocessor(limits, static_cast<int>(block.x * block.y * block.z), config->dynamicSmemBytes);
  // A cluster stays inside a group of multiprocessors, of which an H200 has some 16 to 18 in each.
  constexpr int kGroup = 16;
  *count = limits.multiprocessors / kGroup * (resident * kGroup / static_cast<int>(cluster));
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureImplicit:
      return "cudaErrorStreamCaptureImplicit";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    case cudaErrorUnknown:
      break;
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorUnknown:
      break;
  }
  return "unknown error";
}

cudaError_t cudaPeekAtLastError() { return runtime().last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime().last_error;
  runtime().last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(runtime().devices.size());
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(runtime().devices.size())) return remember(cudaErrorInvalidDevice);
  runtime().device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= static_cast<int>(runtime().devices.size())) return remember(cudaErrorInvalidDevice);
  const Limits& limits = runtime().devices[size_t(device)];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = limits.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = limits.threads_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = limits.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = limits.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = limits.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = limits.registers_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = limits.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = limits.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedSharedPerBlock;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = limits.largest_cluster > 1;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (forbidden_while_capturing()) return remember(cudaErrorStreamCaptureUnsupported);
  if (runtime().failing_allocations > 0) {
    --runtime().failing_allocations;
    return remember(cudaErrorMemoryAllocation);
  }
  constexpr size_t kAlignment = 256;
  *pointer = bytes == 0 ? nullptr : std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (bytes == 0) return cudaSuccess;
  if (*pointer == nullptr) return remember(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);
  runtime().allocations[*pointer] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (forbidden_while_capturing()) return remember(cudaErrorStreamCaptureUnsupported);
  if (runtime().allocations.erase(pointer) == 0) return remember(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (runtime().capturing) return remember(cudaErrorStreamCaptureImplicit);
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const bool captured = runtime().capturing && stream == static_cast<cudaStream_t>(current_stream());
  if (captured || forbidden_while_capturing()) return remember(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(runtime().next_stream++);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool captured = runtime().capturing && stream == static_cast<cudaStream_t>(current_stream());
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  const cudaError_t error = cudaStreamIsCapturing(stream, status);
  if (*status == cudaStreamCaptureStatusNone) return error;
  static char graph_being_captured;
  if (id != nullptr) *id = 1;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(&graph_being_captured);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return error;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, runtime().thread_mode);
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags) {
  if (references == 0 || flags != cudaUserObjectNoDestructorSync) return remember(cudaErrorInvalidValue);
  *object = new EmulatedUserObject{pointer, destroy};
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
  if (graph == nullptr || object == nullptr || flags != cudaGraphUserObjectMove) return remember(cudaErrorInvalidValue);
  runtime().retained.push_back(*object);
  delete object;
  return cudaSuccess;
}
