// Denormal numbers, below 1.2e-38, count as zero inside the kernels: the processor takes some hundred cycles for an
// operation on one, and a network with denormal weights would take 20 times as long. float16 has subnormal numbers of
// its own, down to 6e-8; in float32 they are ordinary numbers, and the conversions keep them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace effkernels::cpu::EFFKERNELS_ISA {

// Makes this thread read and write denormals as zero, and leaves it in its former mode. Only for the thread's own
// work: a thread that is started meanwhile, one of OpenMP's pool for example, would inherit the mode and keep it.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  DenormalsAreZero() : before_(_mm_getcsr()) {
    if ((before_ & kBits) != kBits) _mm_setcsr(before_ | kBits);
  }
  ~DenormalsAreZero() {
    if ((before_ & kBits) != kBits) _mm_setcsr(before_);
  }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  static constexpr unsigned kBits = 0x8040;  // of MXCSR: results flushed to zero, operands taken as zero
  unsigned before_;
#else
  DenormalsAreZero() {}  // elsewhere they are computed with, at whatever speed the processor does it
  ~DenormalsAreZero() {}
#endif
};

}  // namespace effkernels::cpu::EFFKERNELS_ISA
