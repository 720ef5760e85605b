// CUDA C++ for a CPU: the names that kernels use, under which every thread is a fiber (scheduler.cpp). A kernel is
// compiled by an ordinary C++ compiler, with no CUDA headers. What it does wrong is thrown as std::runtime_error by the
// launch that ran it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // before __noinline__ is defined: the standard library spells an attribute like that
#include <string>
#include <type_traits>

#include "half_types.h"
#include "runtime.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#if EFFKERNELS_EMULATION_PLAIN
#define __forceinline__ inline __attribute__((always_inline))
#else
// Functions of their own: with its checks the compiler takes up to six times as long for what is all one.
#define __forceinline__ inline
#endif
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ _Pragma("GCC error \"kernels keep to dynamic shared memory: dynamic_shared<T>(), not __shared__\"")
#define __constant__ _Pragma("GCC error \"__constant__ memory is not emulated\"")

namespace emulation {

// A line of a kernel; as a default argument, that of the caller.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  bool overlaps = false;  // every thread calls wait_for_previous
};

struct BuiltIns {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern __attribute__((visibility("hidden"))) BuiltIns built_ins;

cudaError_t launch_erased(const LaunchShape& shape, void (*run)(const void*), const void* callable);

// Runs a kernel to its end. What a real launch refuses is returned; what the kernel does wrong is thrown.
template <class Callable>
cudaError_t launch(const LaunchShape& shape, const Callable& callable) {
  return launch_erased(shape, [](const void* c) { (*static_cast<const Callable*>(c))(); }, &callable);
}

// Collectives of a warp. `lane_values` are `bytes` bytes that the lane brings; what comes back are the slots of all
// lanes, Collective::kSlotBytes apart, in which lanes that have left the kernel are NaN.
const char* warp_meet(uint32_t mask, const void* lane_value, size_t bytes, const char* name, Where where);
void warp_barrier(uint32_t mask, Where where);
void block_barrier(Where where);
unsigned lane();
// Reads the value of lane `from`, or keeps the own one where `from` is out of the segment.
void shuffle(uint32_t mask, void* value, size_t bytes, unsigned from, bool inside, const char* name, Where where);
uint32_t ballot(uint32_t mask, bool predicate, const char* name, Where where);

enum class Update { kAdd, kIncrement, kExchange, kCompareAndSwap, kMaxUnsigned, kMaxSigned };
unsigned atomic_update(unsigned* to, Update update, unsigned value, unsigned compare, Where where);
void thread_fence();
void nanosleep(Where where);
void load_past_l1();
void check_aligned(const void* pointer, size_t bytes, const char* name, Where where);

// A relative error of at most `bound`, decided by the bits of the input.
float perturbed(float exact, float input, float bound);

// Inlined, so that what is found here is found at the line of the kernel.
template <class T>
__forceinline__ T load(const T* from, const char* name, Where where) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) check_aligned(from, sizeof(T), name, where);
  return *from;
}

}  // namespace emulation

inline const uint3& threadIdx = emulation::built_ins.thread_index;
inline const uint3& blockIdx = emulation::built_ins.block_index;
inline const dim3& blockDim = emulation::built_ins.block_size;
inline const dim3& gridDim = emulation::built_ins.grid_size;
constexpr int warpSize = 32;

#define EMULATION_HERE emulation::Where where = emulation::Where::here()

// ------------------------------------------------------------------------------------------ barriers, warp collectives
inline void __syncthreads(EMULATION_HERE) { emulation::block_barrier(where); }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_HERE) { emulation::warp_barrier(mask, where); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, EMULATION_HERE) {
  const unsigned segment = emulation::lane() & ~unsigned(width - 1);
  emulation::shuffle(mask, &value, sizeof value, segment | (unsigned(from) & unsigned(width - 1)), true, "__shfl_sync",
                     where);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATION_HERE) {
  const unsigned own = emulation::lane(), from = own ^ unsigned(lanes);
  const bool inside = (from & ~unsigned(width - 1)) <= (own & ~unsigned(width - 1));
  emulation::shuffle(mask, &value, sizeof value, from, inside, "__shfl_xor_sync", where);
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, EMULATION_HERE) {
  const unsigned own = emulation::lane();
  const bool inside = (own & unsigned(width - 1)) + by < unsigned(width);
  emulation::shuffle(mask, &value, sizeof value, own + by, inside, "__shfl_down_sync", where);
  return value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, EMULATION_HERE) {
  const unsigned own = emulation::lane();
  const bool inside = (own & unsigned(width - 1)) >= by;
  emulation::shuffle(mask, &value, sizeof value, own - by, inside, "__shfl_up_sync", where);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::ballot(mask, predicate != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::ballot(mask, predicate == 0, "__all_sync", where) == 0;
}

// ----------------------------------------------------------------------------------------------------- atomics, fences
inline unsigned atomicAdd(unsigned* to, unsigned value, EMULATION_HERE) {
  return emulation::atomic_update(to, emulation::Update::kAdd, value, 0, where);
}
inline int atomicAdd(int* to, int value, EMULATION_HERE) {
  return int(
      emulation::atomic_update(reinterpret_cast<unsigned*>(to), emulation::Update::kAdd, unsigned(value), 0, where));
}
inline unsigned atomicInc(unsigned* to, unsigned last, EMULATION_HERE) {
  return emulation::atomic_update(to, emulation::Update::kIncrement, last, 0, where);
}
inline unsigned atomicExch(unsigned* to, unsigned value, EMULATION_HERE) {
  return emulation::atomic_update(to, emulation::Update::kExchange, value, 0, where);
}
inline int atomicExch(int* to, int value, EMULATION_HERE) {
  return int(emulation::atomic_update(reinterpret_cast<unsigned*>(to), emulation::Update::kExchange, unsigned(value), 0,
                                      where));
}
inline unsigned atomicCAS(unsigned* to, unsigned compare, unsigned value, EMULATION_HERE) {
  return emulation::atomic_update(to, emulation::Update::kCompareAndSwap, value, compare, where);
}
inline int atomicCAS(int* to, int compare, int value, EMULATION_HERE) {
  return int(emulation::atomic_update(reinterpret_cast<unsigned*>(to), emulation::Update::kCompareAndSwap,
                                      unsigned(value), unsigned(compare), where));
}
inline unsigned atomicMax(unsigned* to, unsigned value, EMULATION_HERE) {
  return emulation::atomic_update(to, emulation::Update::kMaxUnsigned, value, 0, where);
}
inline int atomicMax(int* to, int value, EMULATION_HERE) {
  return int(emulation::atomic_update(reinterpret_cast<unsigned*>(to), emulation::Update::kMaxSigned, unsigned(value),
                                      0, where));
}
inline void __threadfence() { emulation::thread_fence(); }
inline void __nanosleep(unsigned, EMULATION_HERE) { emulation::nanosleep(where); }

// ------------------------------------------------------------------------------------------------------ loads, stores
template <class T>
__forceinline__ T __ldg(const T* from, EMULATION_HERE) {
  return emulation::load(from, "__ldg", where);
}
template <class T>
__forceinline__ T __ldcg(const T* from, EMULATION_HERE) {
  emulation::load_past_l1();
  return emulation::load(from, "__ldcg", where);
}
template <class T>
__forceinline__ void __stcg(T* to, T value, EMULATION_HERE) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) emulation::check_aligned(to, sizeof(T), "__stcg", where);
  *to = value;
}

// --------------------------------------------------------------------------------------------------------- arithmetic
// The error bounds of CUDA's programming guide, so that a tolerance which holds here holds on the GPU.
inline float __expf(float x) {
  const float ulps = 2.f + std::floor(std::fabs(1.173f * x));
  return emulation::perturbed(std::exp(x), x, ulps * 0x1p-23f);
}
inline float __fdividef(float x, float y) {
  if (std::fabs(y) > 0x1p126f && std::isfinite(y)) return std::isinf(x) ? __uint_as_float(0x7fffffffu) : x * 0.f;
  return emulation::perturbed(x / y, y, 0x1p-22f);
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
using std::max;
using std::min;
