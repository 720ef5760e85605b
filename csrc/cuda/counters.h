// Counters by which the blocks of a launch find out which of them comes last. They are zero before every launch, and
// the launch that used them leaves them zero, so nothing ever has to be filled in between.
#pragma once
#include <cstdint>

namespace effkernels::cuda {

// `count` zeroed 32-bit counters for one launch on `stream`. Null on success, else what CUDA refused.
//
// Every stream has counters of its own: its launches follow each other and may share them. A launch that is being
// captured into a CUDA graph gets counters that belong to the graph, and are given back with it, because the graph may
// be replayed on any stream at any time. Memory is taken from CUDA, zeroed and kept in pieces of some 256 KB; only
// then, and never again for the same piece, does the host wait (for the zeroing alone, on a stream of its own).
const char* acquire_counters(int device, void* stream, int64_t count, unsigned** counters);

// Counters in pieces that are lent to a live graph, for tests: it returns to 0 when all graphs are gone.
int64_t counters_lent_to_graphs();

}  // namespace effkernels::cuda
