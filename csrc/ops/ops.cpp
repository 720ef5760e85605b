// Registers the schemas; cpu_ops.cpp, cuda_ops.cpp and plan_ops.cpp register what computes them.
#include <string>

#include "registry.h"

namespace {

// The operators that kernels compute. The package reads the same file, which is a list of strings in Python too.
const char* const kSchemas[] = {
#include "../../effkernels/ops/schemas.inc"
};

}  // namespace

EFFKERNELS_LIBRARY(EFFKERNELS_NAMESPACE, m) {
  for (const std::string schema : kSchemas) {
    m.def(schema.c_str());
    // Once more for recordings (recording.h), with the recording in front of the arguments.
    std::string recorded = "recorded_" + schema;
    recorded.insert(recorded.find('(') + 1, "Tensor recording, ");
    m.def(recorded.c_str());
  }
  // The CPU kernels' instruction set: sets it (name not empty) and returns it.
  m.def("cpu_isa(str name) -> str");
  // The memory pool of CPU results: sets how many unused bytes it may keep (limit not negative), returns the bytes
  // mapped.
  m.def("cpu_memory(int limit) -> int");
  // How the CPU kernels of an operator divide their work among threads, a line each: cpu_plan_ops.cpp. Sizes as in
  // cuda_plan.
  m.def("cpu_plan(str op, str dtype, int[] shape, int threads) -> str");
  // Recordings of CPU kernels (recording.h). A recording is a tensor, and freed with the last tensor that refers to it.
  // cut ends a piece and returns its number, from 1, or 0 for an empty one. bytes: of results, of kept weights.
  m.def("cpu_recording() -> Tensor");
  m.def("cpu_recording_cut(Tensor recording) -> int");
  m.def("cpu_recording_replay(Tensor recording, int piece) -> int");
  m.def("cpu_recording_bytes(Tensor recording) -> int[]");
  // Of a piece: its kernels with their sizes, a line each, and their shortest times among `rounds` replays in ns.
  m.def("cpu_recording_layers(Tensor recording, int piece) -> str");
  m.def("cpu_recording_times(Tensor recording, int piece, int rounds) -> int[]");
  // The CUDA launches that an operator would make, one line each: plan_ops.cpp. Needs no GPU.
  m.def("cuda_plan(str op, str dtype, int[] shape, int[] limits) -> str");
  // The plans of stacks of blocks that this process keeps, so that no call makes them again.
  m.def("cuda_plans_kept() -> int");
  // The CUDA kernels and fills that this process has launched.
  m.def("cuda_launches() -> int");
  // The limits of a CUDA device, in the order that cuda_plan takes them.
  m.def("cuda_limits(int device) -> int[]");
}
