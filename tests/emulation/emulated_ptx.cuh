// The names of csrc/cuda/ptx.cuh for a CPU.
#pragma once
#include "emulator.cuh"

namespace emulation {

// As warp_meet; the last lane to arrive runs `compute` over the slots of the warp.
const char* warp_compute(uint32_t mask, const void* lane_value, size_t bytes, void (*compute)(char* slots),
                         const char* name, Where where);
char* shared_begin();

}  // namespace emulation

namespace effkernels::cuda {

// A relative error of up to 2^-11, as the instruction's.
inline float tanh_approx(float value) {
  constexpr float kBound = 0x1p-11f * 0.999f;  // and the rounding of the result
  const float result = emulation::perturbed(std::tanh(value), value, kBound);
  if (std::isinf(value)) return std::tanh(value);
  return result > 1.f ? 1.f : (result < -1.f ? -1.f : result);
}

inline unsigned thread_here() { return threadIdx.x; }
inline const unsigned char* product_after(const unsigned char* from, unsigned a, unsigned b) {
  return from + uint64_t(a) * b;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_begin());
}

// Counted from 2^16 below the shared memory of the block, so that 0 is none.
using SharedAddress = uint32_t;
SharedAddress shared_address(const void* pointer, EMULATION_HERE);

void cp_async_16(SharedAddress to, const void* from, int valid = 16, EMULATION_HERE);
inline void cp_async_16_if(bool copies, SharedAddress to, const void* from, int valid, EMULATION_HERE) {
  if (copies) cp_async_16(to, from, valid, where);
}
inline void cp_async_16_if(bool copies, SharedAddress to, const void* from, EMULATION_HERE) {
  if (copies) cp_async_16(to, from, 16, where);
}
void cp_async_commit();
void cp_async_wait_all_but(unsigned pending);
template <int kPending>
void cp_async_wait() {
  cp_async_wait_all_but(kPending);
}

void ldmatrix_x4(uint32_t (&result)[4], SharedAddress row, EMULATION_HERE);
void ldmatrix_x4_trans(uint32_t (&result)[4], SharedAddress row, EMULATION_HERE);

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulation::Where where);
void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulation::Where where);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATION_HERE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "factors of 16 bits");
  std::is_same_v<T, __nv_bfloat16> ? mma_bfloat16(d, a, b, where) : mma_float16(d, a, b, where);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATION_HERE);
uint32_t to_tf32(float value);

template <class T>
T load_global(const T* from, EMULATION_HERE) {
  return emulation::load(from, "load_global", where);
}

// A launch starts after the one ahead of it has ended. What is checked is that no thread of a launch that may overlap
// leaves without the wait and, by the race checker, that none touches global memory before it.
void wait_for_previous();
inline void allow_next() {}

// Others run before the load, so that a loop over it always ends or is reported.
unsigned load_acquire(const unsigned* from, EMULATION_HERE);
void add_release(unsigned* to, unsigned value, EMULATION_HERE);

void cluster_sync(EMULATION_HERE);
// Both steps are the second one: what a thread does between them is then ordered as if it came before the first. A
// thread that uses what another one does there is not found; one that writes to the same place is.
inline void cluster_arrive() {}
inline void cluster_wait(EMULATION_HERE) { cluster_sync(where); }
unsigned cluster_rank();
void* cluster_map_bytes(const void* pointer, unsigned rank, emulation::Where where);
template <class T>
T* cluster_map(T* pointer, unsigned rank, EMULATION_HERE) {
  return static_cast<T*>(cluster_map_bytes(pointer, rank, where));
}

}  // namespace effkernels::cuda
