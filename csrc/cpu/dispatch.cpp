// Run-time choice of the instruction set. Compiled for the baseline processor, once.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace effkernels::cpu {

namespace plain {
extern const Kernels table;
}
#ifdef EFFKERNELS_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef EFFKERNELS_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef EFFKERNELS_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

#ifdef EFFKERNELS_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The widest first.
template <class Visit>
const Kernels* first(Visit accept) {
#ifdef EFFKERNELS_HAVE_AVX512_BF16
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") && accept(avx512_bf16::table)) return &avx512_bf16::table;
#endif
#ifdef EFFKERNELS_HAVE_AVX512
  if (has_avx512() && accept(avx512::table)) return &avx512::table;
#endif
#ifdef EFFKERNELS_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      accept(avx2::table))
    return &avx2::table;
#endif
  return accept(plain::table) ? &plain::table : nullptr;
}

const Kernels* find(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
  return first([&](const Kernels& k) { return any || std::strcmp(name, k.isa) == 0; });
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{find("auto")};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) current().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace effkernels::cpu
