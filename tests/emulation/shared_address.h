// Addresses of shared memory as ldmatrix and cp.async take them.
#pragma once
#include "emulated_ptx.cuh"

namespace effkernels::cuda {

constexpr SharedAddress kSharedBase = 1 << 16;

// The memory of `bytes` bytes at the address; a fault if they are not all in the block's shared memory, or misaligned.
char* checked_shared(SharedAddress address, unsigned bytes, const char* name, emulation::Where where);

}  // namespace effkernels::cuda
