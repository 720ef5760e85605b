// Recording the CPU kernels that operators run, to run them again without the operators.
//
// Between two kernels of a small network there is more to do than in them: Python, the dispatcher, checks, allocations.
// A recording leaves the kernels alone, with the same pointers. It holds for one thread from `begin_recording` to
// `end_recording`, and falls into pieces, so that work of other operators can stand between them. The results of the
// recorded calls lie in memory of the recording's own, used again within it as it was while recording; inputs and
// weights have to stay where they are. What an operator copies for itself (an input whose layout it cannot read) would
// be copied but once: it refuses instead.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "check.h"

namespace effkernels::ops {

// The memory of the recording of this thread; null where there is none.
std::shared_ptr<cpu::Pool>& recording_memory();

inline bool is_recording() { return recording_memory() != nullptr; }

// Raises where a copy would be made while recording.
void refuse_copy(const char* name);

void record(std::function<void(const cpu::Parallel&)> kernel, const Keep& keep);

// Memory that stays as long as the piece in the making; the thread must be recording.
void* keep_memory(size_t bytes);

// Runs a kernel, and records it where this thread records.
template <class Params>
void run(void (*kernel)(const Params&, const cpu::Parallel&), const Params& params, const cpu::Parallel& threads,
         const Keep& keep) {
  if (is_recording()) record([kernel, params](const cpu::Parallel& parallel) { kernel(params, parallel); }, keep);
  kernel(params, threads);
}

void begin_recording();
int64_t cut_recording();  // ends a piece and returns its number, 0 where nothing was recorded since the last cut
void end_recording();     // what was recorded since the last cut is lost
void replay_recording(int64_t piece, const cpu::Parallel& threads);
void free_recording(int64_t piece);
std::vector<int64_t> recorded_bytes(int64_t piece);  // results; kept weights: of its recording up to this piece

}  // namespace effkernels::ops
