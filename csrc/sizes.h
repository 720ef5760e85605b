// Products of sizes. Callers may ask for any sizes at all: what 64 bits do not hold must not come out as a small
// number.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace effkernels {

// Elements of the largest tensor that an operator takes or makes, 64 PiB of float32: no memory holds it, and with so
// many elements bytes, strides and the multiply-adds of a depthwise kernel still fit into 64 bits.
inline constexpr int64_t kMostElements = int64_t(1) << 54;

// The product of sizes that are not negative; the largest number of 64 bits where it does not fit into them.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  bool fits = true;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    fits = fits && !__builtin_mul_overflow(result, size, &result);
  }
  return fits ? result : std::numeric_limits<int64_t>::max();
}

}  // namespace effkernels
