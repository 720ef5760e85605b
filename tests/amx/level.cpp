// In place of csrc/cpu/dispatch.cpp: the level of this library, over the model or in instructions. And what the tests
// read of the model (model.py).
#include <atomic>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/training.h"

namespace effkernels::cpu {

namespace amx_bf16 {
extern const Kernels table;
}
#ifdef EFFKERNELS_HAVE_AMX_BF16
namespace amx_bf16_instructions {
extern const Kernels table;
}
#endif
namespace avx512 {
extern const TrainingKernels training;
const TrainingKernels training{};  // no operator of this library trains
}  // namespace avx512

namespace {
std::atomic<const Kernels*> current{&amx_bf16::table};
}

const Kernels& kernels() { return *current; }
bool set_isa(const char* name) {
  const Kernels* const all[] = {
#ifdef EFFKERNELS_HAVE_AMX_BF16
      &amx_bf16_instructions::table,
#endif
      &amx_bf16::table};
  for (const Kernels* table : all)
    if (std::strcmp(name, table->isa) == 0) return current = table, true;
  return false;
}

}  // namespace effkernels::cpu

extern "C" __attribute__((visibility("default"))) void amx_model_counts(int64_t* counts) {
  counts[0] = amx_model::counts.configurations, counts[1] = amx_model::counts.releases;
  counts[2] = amx_model::counts.products;
}

extern "C" __attribute__((visibility("default"))) int amx_pays(int64_t pixels, int64_t out_channels,
                                                               int64_t in_channels) {
  return effkernels::cpu::amx_bf16::pays_by_tiles(pixels, out_channels, in_channels);
}
