// Memory for the results of the CPU operators.
//
// malloc hands large blocks back to the system at once, so that every call pays for fresh pages again: 4 KiB at a time,
// a fault and a clearing each. For the 1.6 MB of B0's first depthwise layer that was 0.24 ms of work and 0.8 ms of
// page faults (one thread, virtual machine). This pool keeps what it mapped, in huge pages where the system has them,
// and hands it out first fit, lowest address first, so that it stays about as large as what was alive at once.
#pragma once
#include <cstddef>

namespace effkernels::cpu {

constexpr size_t kSmallestPooled = 64 * 1024;  // bytes; malloc serves smaller ones well

void* pool_allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void pool_release(void* data);      // from any thread

// What the pool may keep mapped while nobody uses it, in bytes; starts at 1 GiB.
void pool_set_limit(size_t bytes);
size_t pool_mapped();  // bytes mapped now, in use or not

}  // namespace effkernels::cpu
