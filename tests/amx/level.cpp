// In place of csrc/cpu/dispatch.cpp: the one level of this library. And what the tests read of the model (model.py).
#include <cstring>

#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/training.h"

namespace effkernels::cpu {

namespace amx_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const TrainingKernels training;
const TrainingKernels training{};  // no operator of this library trains
}  // namespace avx512

const Kernels& kernels() { return amx_bf16::table; }
bool set_isa(const char* name) { return std::strcmp(name, kernels().isa) == 0; }

}  // namespace effkernels::cpu

extern "C" __attribute__((visibility("default"))) void amx_model_counts(int64_t* counts) {
  counts[0] = amx_model::counts.configurations, counts[1] = amx_model::counts.releases;
  counts[2] = amx_model::counts.products;
}

extern "C" __attribute__((visibility("default"))) int amx_pays(int64_t pixels, int64_t out_channels,
                                                               int64_t in_channels) {
  return effkernels::cpu::amx_bf16::pays_by_tiles(pixels, out_channels, in_channels);
}
