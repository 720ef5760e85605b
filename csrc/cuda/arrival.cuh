// Blocks of one launch pass results to each other without waiting: they write, arrive at a counter, and the last
// one reads what all of them wrote. No block spins, so it works at any size on any GPU.
#pragma once
#include "compat.cuh"

namespace effkernels::cuda {

// Called by all threads of a block, and true for all of them in the block that comes last of `expected` at `counter`,
// which is zero again then. The last block can read what the blocks wrote before they arrived, by __ldcg:
// the cache of its own multiprocessor may hold older values. `flag`: one word of shared memory.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned expected, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1u) == expected - 1;
    if (last) atomicExch(counter, 0u);
    *flag = last;
  }
  __syncthreads();
  const bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// A barrier among blocks that are all resident (a cooperative launch): waits until `expected` blocks have come. Two
// counters, both zero before, and zero again once every block has left.
__device__ __forceinline__ void wait_for_all(unsigned* arrived, unsigned* left, unsigned expected) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(arrived, 1u);
    while (load_acquire(arrived) < expected) __nanosleep(32);
    if (atomicAdd(left, 1u) == expected - 1) {
      atomicExch(arrived, 0u);
      atomicExch(left, 0u);
    }
  }
  __syncthreads();
  __threadfence();
}

}  // namespace effkernels::cuda
