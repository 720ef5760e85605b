// Denormal numbers, below 1.2e-38, count as zero inside the kernels: on many processors an operation on one takes many
// times as long, and no tolerance reaches down there. float16's own subnormal numbers, from 6e-8 on, are ordinary
// numbers in float32, and the conversions keep them.
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
