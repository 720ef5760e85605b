// The host side of CUDA: errors, memory, streams, captures and occupancy, as far as the launch code of csrc/cuda uses
// them. A test sets the device and the state of the stream.
#pragma once
#include <cstddef>
#include <cstdint>

#include "vector_types.h"

#define CUDART_VERSION 13000  // whose signatures these are

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorUnknown = 999,
};
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaMalloc(void** pointer, size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
cudaError_t cudaFree(void* pointer);

using cudaStream_t = struct EmulatedStream*;
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
cudaError_t cudaMemset(void* pointer, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id);

using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphNode_t = struct EmulatedGraphNode*;
using cudaUserObject_t = struct EmulatedUserObject*;
using cudaHostFn_t = void (*)(void*);
struct cudaGraphEdgeData;
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};
constexpr unsigned cudaUserObjectNoDestructorSync = 1, cudaGraphUserObjectMove = 1;
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id = nullptr, cudaGraph_t* graph = nullptr,
                                     const cudaGraphNode_t** dependencies = nullptr,
                                     const cudaGraphEdgeData** edges = nullptr, size_t* count = nullptr);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count = 1,
                                      unsigned flags = 0);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

// The device that the host code sees. The values of an H200; registers_per_thread is what every kernel is taken to use.
struct Limits {
  int capability = 90, multiprocessors = 132;
  int shared_per_multiprocessor = 233472, shared_per_block = 232448;
  int threads_per_multiprocessor = 2048, blocks_per_multiprocessor = 32, registers_per_multiprocessor = 65536;
  int largest_cluster = 16;
  int registers_per_thread = 64;
};
constexpr int kThreadsPerBlock = 1024;
constexpr int kReservedSharedPerBlock = 1024;  // that CUDA itself takes of a multiprocessor for each block

// Makes a device of these limits the current one; equal limits are the same device, new ones the next device, so that
// what the host code keeps per device stays right.
int use_device(const Limits& limits);
int current_device();
const Limits& current_limits();

// The stream that the adaptors launch on, and whether it is being captured.
void set_current_stream(uint64_t id);
void* current_stream();
void set_capturing(bool capturing);
// Runs the destructors of the user objects that captured graphs keep alive, as destroying the graphs would.
int destroy_user_objects();
// Bytes of cudaMalloc that were not freed.
int64_t allocated_bytes();
// The next calls of cudaMalloc fail.
void fail_allocations(int count);
// From now on cooperative launches are refused, as under a limit of MPS or in a green context.
void refuse_cooperative(bool refuse);
void refuse_clusters_above(unsigned blocks);  // as a GPU with disabled multiprocessors does
// Calls of cudaFuncSetAttribute so far.
int function_attributes_set();

// Blocks of this size that a multiprocessor holds at once.
int blocks_per_multiprocessor(const Limits& limits, int threads, size_t shared_bytes);
// Whether a launch is within the limits, and what CUDA says where it is not.
cudaError_t check_launch(const Limits& limits, const dim3& grid, const dim3& block, size_t shared_bytes,
                         unsigned cluster, bool cooperative);
// Remembers an error for cudaGetLastError.
cudaError_t remember(cudaError_t error);

cudaError_t set_function_attribute(cudaFuncAttribute attribute, int value);
cudaError_t largest_clusters(int* count, const cudaLaunchConfig_t* config);

}  // namespace emulation

template <class Function>
cudaError_t cudaFuncSetAttribute(Function*, cudaFuncAttribute attribute, int value) {
  return emulation::set_function_attribute(attribute, value);
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Function*, int threads, size_t shared_bytes) {
  if (threads <= 0 || threads > emulation::kThreadsPerBlock) return emulation::remember(cudaErrorInvalidValue);
  *count = emulation::blocks_per_multiprocessor(emulation::current_limits(), threads, shared_bytes);
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Function*, const cudaLaunchConfig_t* config) {
  return emulation::largest_clusters(count, config);
}
