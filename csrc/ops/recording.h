// Recording the CPU kernels that operators run, to run them again without the operators.
//
// Between two kernels of a small network there is more to do than in them: Python, the dispatcher, checks, allocations.
// A recording leaves the kernels alone, with the same pointers. It falls into pieces, so that work of other operators
// can stand between them. The results of the recorded calls are in memory of the recording's own, used again within it
// as it was while recording; inputs and weights have to stay where they are. What an operator copies for itself (an
// input whose layout it cannot read) would be copied but once: it refuses instead.
//
// A recording is a tensor of one byte, and lives as long as one refers to it. No thread is ever in a state of recording
// between two calls: each recorded call names its recording, and `RecordingScope` is inside of that call. So nothing
// that ends a caller's work early, an interrupt of Python included, can leave a recording going.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "tensors.h"

namespace effkernels::ops {

struct Recording;

// The calls of this thread's operators are recorded while it lives. Raises if the tensor is no recording.
class RecordingScope {
 public:
  explicit RecordingScope(const Tensor& recording);
  ~RecordingScope();
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;

 private:
  std::shared_ptr<Recording> recording_;
};

// The memory of the recording that this thread is in; null where there is none.
std::shared_ptr<cpu::Pool> recording_memory();

bool is_recording();

// Raises where a copy would be made while recording.
void refuse_copy(const char* name);

void record(std::string layer, std::function<void(const cpu::Parallel&)> kernel, const Keep& keep);

// Memory that stays as long as the recording that this thread is in.
void* keep_memory(size_t bytes);

// A kernel and its sizes in one line, "pointwise batch=1 pixels=49 ...": for measurements by layer.
std::string layer_of(const DepthwiseParams& p);
std::string layer_of(const SqueezeExciteParams& p);
std::string layer_of(const ScaleParams& p);
std::string layer_of(const PointwiseParams& p);
std::string layer_of(const cpu::ExpandDepthwiseParams& p);
std::string layer_of(const ConvParams& p);

// Runs a kernel, and records it inside of a RecordingScope.
template <class Params>
void run(void (*kernel)(const Params&, const cpu::Parallel&), const Params& params, const cpu::Parallel& threads,
         const Keep& keep) {
  if (is_recording())
    record(layer_of(params), [kernel, params](const cpu::Parallel& parallel) { kernel(params, parallel); }, keep);
  kernel(params, threads);
}

// A recording is used by one thread at a time.
Tensor new_recording();
int64_t cut_recording(const Tensor& recording);  // ends a piece: its number, from 1; 0 where nothing was recorded
void replay_recording(const Tensor& recording, int64_t piece, const cpu::Parallel& threads);
std::vector<int64_t> recorded_bytes(const Tensor& recording);         // of results; of kept weights
std::string recorded_layers(const Tensor& recording, int64_t piece);  // one line a kernel
// The shortest time of each kernel of a piece among `rounds` replays of the whole piece, in nanoseconds.
std::vector<int64_t> time_recording(const Tensor& recording, int64_t piece, int64_t rounds,
                                    const cpu::Parallel& threads);

}  // namespace effkernels::ops
