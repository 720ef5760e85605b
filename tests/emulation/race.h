// The emulator's reports to the race checker (race.cpp). The other flavours run without it.
#pragma once
#include "engine.h"

namespace emulation::race {

#ifdef EFFKERNELS_EMULATION_RACE
void launch_begins();
void launch_ends(Traffic* traffic);
void block_begins(const Block& block);
void block_synchronised(const Block& block);
void cluster_synchronised(const Cluster& cluster);
void warp_synchronised(const Warp& warp, uint32_t mask);
// The current thread's fence, and its atomic operations: who acquires what was released sees what the fences cover.
void fence();
void release(const unsigned* at);
void acquire(const unsigned* at);
// Accesses that no compiled load or store makes.
void note_atomic(const unsigned* at, Where where);
void note_copy(const PendingCopy& copy, bool landed);
void note_read(const char* from, unsigned bytes, Where where);
#else
inline void launch_begins() {}
inline void launch_ends(Traffic*) {}
inline void block_begins(const Block&) {}
inline void block_synchronised(const Block&) {}
inline void cluster_synchronised(const Cluster&) {}
inline void warp_synchronised(const Warp&, uint32_t) {}
inline void fence() {}
inline void release(const unsigned*) {}
inline void acquire(const unsigned*) {}
inline void note_atomic(const unsigned*, Where) {}
inline void note_copy(const PendingCopy&, bool) {}
inline void note_read(const char*, unsigned, Where) {}
#endif

}  // namespace emulation::race
