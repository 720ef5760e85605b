// All inline PTX of the project. tests/emulation/emulated_ptx.cuh has the same names for a CPU.
#pragma once
#include <cstdint>

namespace effkernels::cuda {

// One special-function instruction; largest relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float value) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// threadIdx.x, read where it is called: what follows from it is computed there, and not in front of all loops, where it
// would take registers.
__device__ __forceinline__ unsigned thread_here() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The address a * b bytes after `from`, by one instruction where the compiler takes four.
__device__ __forceinline__ const unsigned char* product_after(const unsigned char* from, unsigned a, unsigned b) {
  const unsigned char* result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(from));
  return result;
}

// The dynamic shared memory of the block, aligned for 16-byte accesses and for ldmatrix.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// An address of shared memory as the instructions below want it.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, asynchronously; bytes from `valid` on are written as zero and not
// read. Both addresses are multiples of 16. `from` must be a valid pointer even where valid is 0.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid)
               : "memory");
}
// The same where `copies`; without a branch, after which the compiler would put three instructions that do nothing.
__device__ __forceinline__ void cp_async_16_if(bool copies, SharedAddress to, const void* from, int valid) {
  asm volatile(
      "{\n.reg .pred copies;\nsetp.ne.b32 copies, %3, 0;\n@copies cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(valid), "r"(static_cast<int>(copies))
      : "memory");
}
// All 16.
__device__ __forceinline__ void cp_async_16_if(bool copies, SharedAddress to, const void* from) {
  asm volatile("{\n.reg .pred copies;\nsetp.ne.b32 copies, %2, 0;\n@copies cp.async.cg.shared.global [%0], [%1], 16;\n}"
               :
               : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(copies))
               : "memory");
}
// Closes the group of all copies since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest kPending groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values: lane 8m+i names row i of matrix m; lane l gets row l/4, columns 2(l%4) and +1.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row)
               : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&result)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row)
               : "memory");
}

// d += a * b, 16x16 by 16x8, sums in float32. With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and +1;  b[i]: rows 2t + 8i and +1, column g;
//   d[i]: row g + 8 (i / 2), column 2t + i % 2.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a * b, 16x8 by 8x8, factors in TF32 (from to_tf32), sums in float32. With g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 (i % 2), column t + 4 (i / 2);  b[i]: row t + 4i, column g;  d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Rounded to TF32's 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

// A read of global memory by a plain load. Not through the read-only path (__ldg): a launch may start before the one
// ahead of it has ended, and what is still being written is not read-only (wait_for_previous). The compiler is
// told that it is global memory, or it makes a generic load where it does not see where a pointer comes from.
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *from;
}

// Counters between blocks, at the scope of the GPU.
__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Programmatic dependent launch, sm_90 and later; elsewhere a launch starts after the one ahead of it has ended.
//   wait_for_previous: returns once the launch ahead has ended and what it wrote can be read. Every thread of every
//     kernel calls it before it touches global memory.
//   allow_next: once every block has called it or ended, the next launch may start, up to its own wait.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters, sm_90 and later. Elsewhere the kernels compile but trap: no plan launches them there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Every thread of every block of the cluster arrives and waits; orders shared and global memory among them. Not the
// .aligned form: the threads of a warp may come from different ways through the code.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same in two steps: what is between them must not depend on the other blocks, nor they on it.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The same place in the dynamic shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_map(T* pointer, unsigned rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
#else
__device__ __forceinline__ void cluster_sync() { __trap(); }
__device__ __forceinline__ void cluster_arrive() { __trap(); }
__device__ __forceinline__ void cluster_wait() { __trap(); }
__device__ __forceinline__ unsigned cluster_rank() {
  __trap();
  return 0;
}
template <class T>
__device__ __forceinline__ T* cluster_map(T* pointer, unsigned) {
  __trap();
  return pointer;
}
#endif

}  // namespace effkernels::cuda
