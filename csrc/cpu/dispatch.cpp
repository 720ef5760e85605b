// Run-time choice of the instruction set. Compiled for the baseline processor, once.
#include <atomic>
#include <cstring>

#include "kernels.h"

#ifdef EFFKERNELS_HAVE_AMX_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef EFFKERNELS_HAVE_AMX_BF16
namespace amx_bf16 {
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

#ifdef EFFKERNELS_HAVE_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef EFFKERNELS_HAVE_AMX_BF16
// Linux lets a process use tiles only if it has asked to: all its threads, and processes that it forks, may from then
// on. It refuses where a thread has a stack for signals that is too small for the state of the tiles, and kernels
// before 5.16 do not know the request.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of EDX
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile))
    return false;
  // A hypervisor may name the instructions and leave out what they work on: palette 1, eight tiles of 16 rows of 64
  // bytes. Without it every tile instruction is illegal.
  constexpr unsigned kPalettes = 0x1d;
  if (!__get_cpuid_count(kPalettes, 0, &a, &b, &c, &d) || a < 1) return false;
  if (!__get_cpuid_count(kPalettes, 1, &a, &b, &c, &d) || b >> 16 < 8 || (b & 0xffff) < 64 || (c & 0xffff) < 16)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

// The widest first.
template <class Visit>
const Kernels* first(Visit accept) {
#ifdef EFFKERNELS_HAVE_AMX_BF16
  if (accept(amx_bf16::table) && has_amx_bf16()) return &amx_bf16::table;  // permission is asked for where it is wanted
#endif
#ifdef EFFKERNELS_HAVE_AVX512_BF16
  if (has_avx512_bf16() && accept(avx512_bf16::table)) return &avx512_bf16::table;
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

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_relaxed);
  if (!chosen) {
    const Kernels* const widest = find("auto");
    if (current.compare_exchange_strong(chosen, widest, std::memory_order_relaxed)) chosen = widest;
  }
  return *chosen;
}

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) current.store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace effkernels::cpu
