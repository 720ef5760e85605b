// One small kernel around each wrapper of csrc/cuda/ptx.cuh, and around the limits of device.h, for
// tests/gpu/test_wrappers.py: compiled by nvcc where there is a GPU, and over the emulator everywhere.
#include <cstdio>
#include <cstring>
#include <exception>

#include "cuda/compat.cuh"
#include "cuda/device.h"

using namespace effkernels::cuda;
using bfloat16 = __nv_bfloat16;

namespace {

__global__ void tanh_kernel(const float* x, float* y) { y[threadIdx.x] = tanh_approx(x[threadIdx.x]); }

__global__ void to_tf32_kernel(const float* x, uint32_t* y) { y[threadIdx.x] = to_tf32(x[threadIdx.x]); }

// Thread i adds one to what the launch ahead wrote last of all: late, after the next launch has started.
__global__ void overlap_kernel(const uint4* x, uint4* y) {
  wait_for_previous();
  allow_next();
  const unsigned count = gridDim.x * blockDim.x, at = blockIdx.x * blockDim.x + threadIdx.x;
  uint4 value = load_global(x + (count - 1 - at));
  for (int i = 0; i < 20; ++i) __nanosleep(1000);
  value.x += 1, value.y += 1, value.z += 1, value.w += 1;
  y[at] = value;
}

// Thread i copies 16 bytes of which valid[i] count.
__global__ void cp_async_kernel(const uint4* x, const int* valid, uint4* y) {
  uint4* shared = dynamic_shared<uint4>();
  cp_async_16(shared_address(shared + threadIdx.x), x + threadIdx.x, valid[threadIdx.x]);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

// Thread i copies 16 bytes if copies[i], and once more valid[i] of them; else its places keep the number of the thread.
__global__ void cp_async_if_kernel(const uint4* x, const int* copies, const int* valid, uint4* y) {
  uint4* shared = dynamic_shared<uint4>();
  const unsigned thread = thread_here(), threads = blockDim.x;
  shared[thread] = shared[threads + thread] = make_uint4(thread, thread, thread, thread);
  __syncthreads();
  cp_async_16_if(copies[thread] != 0, shared_address(shared + thread), x + thread);
  cp_async_16_if(copies[thread] != 0, shared_address(shared + threads + thread), x + thread, valid[thread]);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x], y[threads + threadIdx.x] = shared[threads + threadIdx.x];
}

// y[i]: the byte a[i] * b[i] bytes after x.
__global__ void product_after_kernel(const unsigned char* x, const unsigned* a, const unsigned* b, int* y) {
  y[threadIdx.x] = *product_after(x, a[threadIdx.x], b[threadIdx.x]);
}

// Two groups; the first has landed once only the second may be missing.
__global__ void cp_async_groups_kernel(const uint4* x, uint4* y) {
  uint4* shared = dynamic_shared<uint4>();
  for (int group = 0; group < 2; ++group) {
    const int at = group * blockDim.x + threadIdx.x;
    cp_async_16(shared_address(shared + at), x + at);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();
  y[blockDim.x + threadIdx.x] = shared[blockDim.x + threadIdx.x];
}

// Four 8x8 matrices of 16-bit values, one after the other; y: four registers of each lane.
__global__ void ldmatrix_kernel(const uint32_t* x, uint32_t* y, int transposed) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < 128; i += 32) shared[i] = x[i];
  __syncwarp(0xffffffffu);
  const SharedAddress row = shared_address(shared + threadIdx.x * 4);  // a row is 8 values, 4 words
  uint32_t result[4];
  if (transposed) {
    ldmatrix_x4_trans(result, row);
  } else {
    ldmatrix_x4(result, row);
  }
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = result[i];
}

template <class T>
__device__ __forceinline__ uint32_t pair(T low, T high) {
  uint16_t halves[2];
  memcpy(&halves[0], &low, 2);
  memcpy(&halves[1], &high, 2);
  return halves[0] | uint32_t(halves[1]) << 16;
}

// d (16, 8) += a (16, 16) times b (16, 8), fragments as ptx.cuh says.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t from_a[4], from_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    from_a[i] = pair(at[0], at[1]);
    sums[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) from_b[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  mma_m16n8k16<T>(sums, from_a, from_b);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

// d (16, 8) += a (16, 8) times b (8, 8)
__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t from_a[4], from_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    from_a[i] = to_tf32(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
    sums[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) from_b[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
  mma_m16n8k8_tf32(sums, from_a, from_b);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

// Every block writes a value, waits until all have, and reads its neighbour's. All blocks are resident.
__global__ void acquire_kernel(unsigned* counter, unsigned* values, unsigned* y) {
  if (threadIdx.x != 0) return;
  values[blockIdx.x] = 100 + blockIdx.x;
  add_release(counter, 1u);
  while (load_acquire(counter) < gridDim.x) __nanosleep(32);
  y[blockIdx.x] = __ldcg(values + (blockIdx.x + 1) % gridDim.x);
}

// Every block of a cluster reads the shared memory of the next one.
__global__ void cluster_kernel(unsigned* y, unsigned cluster) {
  unsigned* shared = dynamic_shared<unsigned>();
  const unsigned rank = cluster_rank();
  shared[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
  cluster_sync();
  y[blockIdx.x * blockDim.x + threadIdx.x] = cluster_map(shared, (rank + 1) % cluster)[threadIdx.x];
  cluster_arrive();
  cluster_wait();  // nobody leaves while another still reads from it
}

template <class... Parameters, class... Arguments>
int run(void (*kernel)(Parameters...), Launch at, void* stream, const Arguments&... arguments) {
  at.stream = static_cast<cudaStream_t>(stream);
  try {
    return launch(kernel, at, arguments...);
  } catch (const std::exception& report) {  // of the emulator, about the kernel
    std::fprintf(stderr, "%s\n", report.what());
    return -1;
  }
}

Launch one_block(unsigned threads, size_t shared_bytes = 0) {
  return {dim3(threads ? 1 : 0), dim3(threads), shared_bytes};
}

}  // namespace

extern "C" {

int run_tanh(void* stream, const float* x, float* y, int count) {
  return run(tanh_kernel, one_block(count), stream, x, y);
}
int run_to_tf32(void* stream, const float* x, uint32_t* y, int count) {
  return run(to_tf32_kernel, one_block(count), stream, x, y);
}
// An even number of launches, to and fro between two buffers.
int run_overlap(void* stream, uint4* x, uint4* y, int blocks, int launches) {
  Launch at{dim3(blocks), dim3(128)};
  at.overlaps = true;
  for (int i = 0; i < launches; ++i) {
    const int error = i % 2 == 0 ? run(overlap_kernel, at, stream, x, y) : run(overlap_kernel, at, stream, y, x);
    if (error != 0) return error;
  }
  return 0;
}
int run_cp_async(void* stream, const uint4* x, const int* valid, uint4* y, int count) {
  return run(cp_async_kernel, one_block(count, 16 * count), stream, x, valid, y);
}
int run_product_after(void* stream, const unsigned char* x, const unsigned* a, const unsigned* b, int* y, int count) {
  return run(product_after_kernel, one_block(count, 0), stream, x, a, b, y);
}
int run_cp_async_if(void* stream, const uint4* x, const int* copies, const int* valid, uint4* y, int count) {
  return run(cp_async_if_kernel, one_block(count, 32 * count), stream, x, copies, valid, y);
}
int run_cp_async_groups(void* stream, const uint4* x, uint4* y, int count) {
  return run(cp_async_groups_kernel, one_block(count, 32 * count), stream, x, y);
}
int run_ldmatrix(void* stream, const uint32_t* x, uint32_t* y, int transposed) {
  return run(ldmatrix_kernel, one_block(32, 512), stream, x, y, transposed);
}
int run_mma_bfloat16(void* stream, const void* a, const void* b, float* d) {
  return run(mma_kernel<bfloat16>, one_block(32), stream, static_cast<const bfloat16*>(a),
             static_cast<const bfloat16*>(b), d);
}
int run_mma_float16(void* stream, const void* a, const void* b, float* d) {
  return run(mma_kernel<__half>, one_block(32), stream, static_cast<const __half*>(a), static_cast<const __half*>(b),
             d);
}
int run_mma_tf32(void* stream, const float* a, const float* b, float* d) {
  return run(mma_tf32_kernel, one_block(32), stream, a, b, d);
}
int run_acquire(void* stream, unsigned* counter, unsigned* values, unsigned* y, int blocks) {
  Launch at{dim3(blocks), dim3(32)};
  at.cooperative = true;
  return run(acquire_kernel, at, stream, counter, values, y);
}
int run_cluster(void* stream, unsigned* y, int blocks, int cluster) {
  Launch at{dim3(blocks), dim3(32), 128};
  at.cluster = cluster;
  return run(cluster_kernel, at, stream, y, static_cast<unsigned>(cluster));
}

// The limits in the order of the struct; null, or what CUDA refused.
const char* limits_of(int device, int* values) {
  DeviceLimits limits;
  const char* error = enter_device(device, &limits);
  const int found[] = {limits.capability,
                       limits.multiprocessors,
                       limits.shared_per_multiprocessor,
                       limits.shared_per_block,
                       limits.threads_per_multiprocessor,
                       limits.blocks_per_multiprocessor,
                       limits.registers_per_multiprocessor,
                       limits.largest_cluster};
  std::memcpy(values, found, sizeof(found));
  return error;
}
}
