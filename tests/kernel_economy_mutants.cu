// Kernels that are bad on purpose, one for each rule of benchmarks/kernel_economy/rules.py, and a good one.
// tests/test_kernel_economy.py compiles them and expects every rule to find its mutant. Nothing launches them.
#include "cuda/numeric.cuh"

using namespace effkernels;
using namespace effkernels::cuda;
using bfloat16 = __nv_bfloat16;

namespace mutants {

template <class T, int kBlocks>
__global__ void __launch_bounds__(128, kBlocks) good(const T* x, T* y) {
  wait_for_previous();
  float value[kVectorOf<T>];
  load(x + threadIdx.x * kVectorOf<T>, value);
  activate<T>(value, Activation::kSilu);
  store(y + threadIdx.x * kVectorOf<T>, value);
}

// Its sums need some two hundred registers: 1024 threads leave 64 to each, 128 threads enough.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) hungry(const T* x, T* y, int rounds) {
  wait_for_previous();
  float value[24][kVectorOf<T>];
#pragma unroll
  for (int i = 0; i < 24; ++i) load(x + (i * kThreads + threadIdx.x) * kVectorOf<T>, value[i]);
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 24; ++i)
#pragma unroll
      for (int j = 0; j < kVectorOf<T>; ++j) value[i][j] = fmaf(value[i][j], value[(i + 7) % 24][j], 1.f);
  }
#pragma unroll
  for (int i = 0; i < 24; ++i) store(y + (i * kThreads + threadIdx.x) * kVectorOf<T>, value[i]);
}

// An array indexed at run time cannot live in registers.
template <class T>
__global__ void __launch_bounds__(128) local_array(const T* x, T* y, const int* order) {
  wait_for_previous();
  float value[64];
  for (int i = 0; i < 64; ++i) value[order[i]] = to_float(x[i * 128 + threadIdx.x]);
  float sums[kVectorOf<T>] = {};
  for (int i = 0; i < 64; ++i) sums[0] += value[order[i] ^ 1] * value[i];
  store(y + threadIdx.x * kVectorOf<T>, sums);
}

template <class T>
__global__ void __launch_bounds__(128) scalar_loads(const T* x, T* y) {
  wait_for_previous();
  float value[kVectorOf<T>];
#pragma unroll
  for (int i = 0; i < kVectorOf<T>; ++i) value[i] = to_float(x[threadIdx.x * kVectorOf<T> + i]);
  activate<T>(value, Activation::kSilu);
  store(y + threadIdx.x * kVectorOf<T>, value);
}

// Reads through the read-only path what the launch ahead may still write.
template <class T>
__global__ void __launch_bounds__(128) read_only_loads(const T* x, T* y) {
  wait_for_previous();
  y[threadIdx.x] = __ldg(x + threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(128) does_not_wait(const T* x, T* y) {
  y[threadIdx.x] = x[threadIdx.x];
}

template <class T>
__global__ void __launch_bounds__(128) scalar_stores(const T* x, T* y) {
  wait_for_previous();
  float value[kVectorOf<T>];
  load(x + threadIdx.x * kVectorOf<T>, value);
#pragma unroll
  for (int i = 0; i < kVectorOf<T>; ++i) y[threadIdx.x + i * 128] = from_float<T>(value[i]);
}

// Swish by exponential and reciprocal: two special-function instructions where one is enough.
template <class T>
__global__ void __launch_bounds__(128) two_special_functions(const T* x, T* y) {
  wait_for_previous();
  float value[kVectorOf<T>];
  load(x + threadIdx.x * kVectorOf<T>, value);
#pragma unroll
  for (int i = 0; i < kVectorOf<T>; ++i) value[i] = __fdividef(value[i], 1.f + __expf(-value[i]));
  store(y + threadIdx.x * kVectorOf<T>, value);
}

// Sums whose order differs from run to run.
template <class T>
__global__ void __launch_bounds__(128) float_atomics(const T* x, float* y) {
  wait_for_previous();
  float value[kVectorOf<T>];
  load(x + threadIdx.x * kVectorOf<T>, value);
  atomicAdd(y, value[0]);
}

// Not bad: a product on the tensor cores, its factors by cp.async and ldmatrix.
template <class T>
__global__ void __launch_bounds__(32) product(const T* x, T* y) {
  wait_for_previous();
  T* tile = dynamic_shared<T>();
  const int vector = threadIdx.x * kVectorOf<T>;
  cp_async_16(shared_address(tile + vector), x + vector);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[2] = {0x3f803f80u, 0x3f803f80u};
  ldmatrix_x4(a, shared_address(tile + threadIdx.x % 16 * 16 + threadIdx.x / 16 * 8));
  float sums[4] = {};
  mma_m16n8k16<T>(sums, a, b);
  float result[kVectorOf<T>];
#pragma unroll
  for (int i = 0; i < kVectorOf<T>; ++i) result[i] = sums[i % 4];
  store(y + vector, result);
}

template __global__ void good<bfloat16, 1>(const bfloat16*, bfloat16*);
template __global__ void product<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void hungry<bfloat16, 128>(const bfloat16*, bfloat16*, int);
template __global__ void hungry<bfloat16, 1024>(const bfloat16*, bfloat16*, int);
template __global__ void local_array<bfloat16>(const bfloat16*, bfloat16*, const int*);
template __global__ void scalar_loads<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void read_only_loads<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void does_not_wait<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void scalar_stores<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void two_special_functions<bfloat16>(const bfloat16*, bfloat16*);
template __global__ void float_atomics<bfloat16>(const bfloat16*, float*);

}  // namespace mutants
