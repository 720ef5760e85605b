// The properties of the device for plans and launches. Plain C++: plans are built, and list launches, without CUDA.
// A function that calls CUDA returns null, or the text of CUDA's error.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace effkernels::cuda {

// The limits that a plan depends on: asked from the GPU, or read from a table of GPUs.
struct DeviceLimits {
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int shared_per_multiprocessor = 167936;  // bytes
  int shared_per_block = 166912;           // bytes, what a block may ask for at most
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  int registers_per_multiprocessor = 65536;
  int largest_cluster = 1;  // blocks; 1 where there are no clusters
};

// The limits of a device, which are asked once.
const char* device_limits(int device, DeviceLimits* limits);
// Makes a device the current one of this library's own CUDA runtime, which is not torch's, and gives its limits.
const char* enter_device(int device, DeviceLimits* limits);

// Blocks of the largest cluster that a kernel may ask for: 8 on every GPU with clusters (CUDA C++ Programming Guide,
// "Thread Block Clusters"); 16 on the data center GPUs of capability 9 and 10, for kernels that opt out of portability.
constexpr int largest_cluster(int capability) { return capability < 90 ? 1 : capability < 110 ? 16 : 8; }

// One launch of a plan: what `effkernels explain` prints. Grid and cluster are along x.
struct PlannedLaunch {
  const char* kernel;  // name as in the source, without template arguments
  int64_t grid = 1;
  int block_x = 1, block_y = 1;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool cooperative = false;
  int64_t workspace_bytes = 0;  // of scratch memory that the launch writes and reads back, each byte counted once
};
using PlannedLaunches = std::vector<PlannedLaunch>;

// Kernels and fills launched by this process, counted in the launch wrapper (compat.cuh).
inline std::atomic<int64_t>& launches() {
  static std::atomic<int64_t> count{0};
  return count;
}
inline void count_launch() { launches().fetch_add(1, std::memory_order_relaxed); }
inline int64_t launch_count() { return launches().load(std::memory_order_relaxed); }

// ceil(value / by) for value >= 0, by > 0
constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace effkernels::cuda
