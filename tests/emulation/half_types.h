// CUDA's 16-bit floating point types: conversions to the bit, arithmetic rounded once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector_types.h"

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

namespace emulation {

constexpr uint32_t kFloatInfinity = 0x7f800000;

// Without branches, so that a loop over many values is vectorised.
inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 to 127
  const uint32_t subnormal = __float_as_uint(static_cast<float>(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t special = kFloatInfinity | (magnitude << 13);  // infinity or NaN
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return __uint_as_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

// To nearest, ties to even; what is beyond the largest value becomes an infinity; a NaN becomes 0x7fff, as on the GPU.
inline uint16_t float_to_half_bits(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > kFloatInfinity) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520, halfway from the largest to the next
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 0.5 leaves multiples of 2^-24 in the lowest bits
    return uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t to_even = magnitude >> 13 & 1u;
  return uint16_t(sign | (magnitude - (112u << 23) + 0x0fffu + to_even) >> 13);
}

inline float bfloat16_bits_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > kFloatInfinity) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A float32 that rounds to every shorter format as `value` itself does: truncated, and made odd where that cut
// something off.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || static_cast<double>(nearest) == value) return nearest;
  uint32_t bits = __float_as_uint(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;
  return __uint_as_float(bits | 1u);
}

}  // namespace emulation

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x;
  __half y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x;
  __nv_bfloat16 y;
};

inline float __half2float(__half value) { return emulation::half_bits_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {emulation::float_to_half_bits(value)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return emulation::bfloat16_bits_to_float(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {emulation::float_to_bfloat16_bits(value)}; }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}

// The result of each packed operation is rounded once, as the GPU does it.
#define EMULATION_PACKED(Pair, Element, to_float, from_float)                                              \
  inline Element __hfma(Element a, Element b, Element c) {                                                 \
    return from_float(                                                                                     \
        emulation::round_to_odd(std::fma(double(to_float(a)), double(to_float(b)), double(to_float(c))))); \
  }                                                                                                        \
  inline Element __hmul(Element a, Element b) { return from_float(to_float(a) * to_float(b)); }            \
  inline Element __hadd(Element a, Element b) {                                                            \
    return from_float(emulation::round_to_odd(double(to_float(a)) + double(to_float(b))));                 \
  }                                                                                                        \
  inline Pair __hfma2(Pair a, Pair b, Pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }   \
  inline Pair __hmul2(Pair a, Pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }                     \
  inline Pair __hadd2(Pair a, Pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
EMULATION_PACKED(__half2, __half, __half2float, __float2half_rn)
EMULATION_PACKED(__nv_bfloat162, __nv_bfloat16, __bfloat162float, __float2bfloat16_rn)
#undef EMULATION_PACKED
