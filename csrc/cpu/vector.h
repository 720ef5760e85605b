// One SIMD vector of floats, as wide as the instruction set that this file is compiled for, and how the three data
// types reach it. Everything is in the namespace of the instruction set: the linker must never mix two of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "denormals.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For what the inner loops call with vectors: left to itself, GCC makes calls of some, and every vector goes to memory.
#define EFFKERNELS_INLINE inline __attribute__((always_inline))

#define EFFKERNELS_ISA_STRING_(name) #name
#define EFFKERNELS_ISA_STRING(name) EFFKERNELS_ISA_STRING_(name)

namespace effkernels::cpu::EFFKERNELS_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef double HalfVec __attribute__((vector_size(kLanes * 4)));  // half as many doubles
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

EFFKERNELS_INLINE Vec splat(float v) { return v - Vec{}; }

// ------------------------------------------------------------------------------------------------ one element
inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(Half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 0x3ff;
  uint32_t u;
  float f;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact
    f = float(mantissa) * 5.9604644775390625e-08f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  }
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  if (v != v) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline Half from_float<Half>(float v) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // NaN
  if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past the largest half
  if (u < 0x38800000) {                                   // subnormal half: the sum's rounding does the work
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {uint16_t(sign | (u - 0x3f000000))};
  }
  return {uint16_t(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13))};
#endif
}

// ------------------------------------------------------------------------------------------------ whole vectors
EFFKERNELS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
EFFKERNELS_INLINE void store(double* p, HalfVec v) { std::memcpy(p, &v, sizeof(v)); }
EFFKERNELS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

#if defined(__AVX512F__)
EFFKERNELS_INLINE Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
EFFKERNELS_INLINE Vec load(const Half* p) {
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#if defined(__AVX512BF16__)
EFFKERNELS_INLINE __m256i narrow(Vec v, BFloat16) { return (__m256i)_mm512_cvtneps_pbh(__m512(v)); }
#else
EFFKERNELS_INLINE __m256i narrow(Vec v, BFloat16) {
  const __m512i u = _mm512_castps_si512(__m512(v));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(__m512(v), __m512(v), _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
#endif
EFFKERNELS_INLINE __m256i narrow(Vec v, Half) { return _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT); }
template <class T>
EFFKERNELS_INLINE void store(T* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}
EFFKERNELS_INLINE HalfVec low_half(Vec v) { return HalfVec(_mm512_cvtps_pd(_mm512_castps512_ps256(__m512(v)))); }
EFFKERNELS_INLINE HalfVec high_half(Vec v) { return HalfVec(_mm512_cvtps_pd(_mm512_extractf32x8_ps(__m512(v), 1))); }
// The first n lanes, 0 <= n <= kLanes; the others load as zero.
EFFKERNELS_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
EFFKERNELS_INLINE Vec load_first(const float* p, int n) { return Vec(_mm512_maskz_loadu_ps(first_lanes(n), p)); }
EFFKERNELS_INLINE Vec load_first(const BFloat16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
EFFKERNELS_INLINE Vec load_first(const Half* p, int n) {
  return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
EFFKERNELS_INLINE void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), __m512(v)); }
template <class T>
EFFKERNELS_INLINE void store_first(T* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, T{}));
}
#else
#if defined(__AVX2__)
EFFKERNELS_INLINE Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}
EFFKERNELS_INLINE Vec load(const Half* p) {
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
EFFKERNELS_INLINE void store(BFloat16* p, Vec v) {
  const __m256i u = _mm256_castps_si256(__m256(v));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(__m256(v), __m256(v), _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
EFFKERNELS_INLINE void store(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}
EFFKERNELS_INLINE HalfVec low_half(Vec v) { return HalfVec(_mm256_cvtps_pd(_mm256_castps256_ps128(__m256(v)))); }
EFFKERNELS_INLINE HalfVec high_half(Vec v) { return HalfVec(_mm256_cvtps_pd(_mm256_extractf128_ps(__m256(v), 1))); }
#else
EFFKERNELS_INLINE HalfVec low_half(Vec v) { return HalfVec{v[0], v[1]}; }
EFFKERNELS_INLINE HalfVec high_half(Vec v) { return HalfVec{v[2], v[3]}; }
template <class T>
EFFKERNELS_INLINE Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
EFFKERNELS_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; i++) p[i] = from_float<T>(v[i]);
}
#endif
template <class T>
EFFKERNELS_INLINE Vec load_first(const T* p, int n) {
  T all[kLanes] = {};
  for (int i = 0; i < n; i++) all[i] = p[i];
  return load(all);
}
template <class T>
EFFKERNELS_INLINE void store_first(T* p, Vec v, int n) {
  T all[kLanes];
  store(all, v);
  for (int i = 0; i < n; i++) p[i] = all[i];
}
#endif

template <class T>
EFFKERNELS_INLINE Vec load_up_to(const T* p, int64_t n) {  // n may pass kLanes
  return n >= kLanes ? load(p) : load_first(p, int(n));
}
template <class T>
EFFKERNELS_INLINE void store_up_to(T* p, Vec v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_first(p, v, int(n));
}

// Whether a kernel writes an image of so many pixels past the caches: where no cache keeps it until it is read, and a
// vector is a whole cache line, which then need not be read before it is overwritten. The backward of B0's depthwise
// convolutions, batch 16, takes 53 to 56 ms so, and 65 ms without (AVX-512, two threads).
inline bool is_past_caches(const void* y, DType dtype, int64_t pixels, int64_t channels) {
  constexpr int64_t kCached = int64_t(16) << 20;  // bytes
  const bool whole_lines = kLanes == 16 && dtype == DType::kFloat32 && channels % kLanes == 0;
  return whole_lines && reinterpret_cast<uintptr_t>(y) % 64 == 0 && pixels * channels > kCached / 4;
}
// Stores up to n lanes, past the caches where `past`, which is_past_caches found. BodyScope makes other threads see it.
template <class T>
EFFKERNELS_INLINE void store_past(T* p, Vec v, int64_t n, bool past) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    if (past) return _mm512_stream_ps(p, __m512(v));
#endif
  (void)past;
  store_up_to(p, v, n);
}

// Lanes [i, i + n) of a parameter in its own type; `missing` where it was not given.
EFFKERNELS_INLINE Vec load_param(const Param& param, int64_t i, int64_t n, float missing) {
  if (!param.data) return splat(missing);
  switch (param.dtype) {
    case DType::kFloat16:
      return load_up_to(static_cast<const Half*>(param.data) + i, n);
    case DType::kBFloat16:
      return load_up_to(static_cast<const BFloat16*>(param.data) + i, n);
    default:
      return load_up_to(static_cast<const float*>(param.data) + i, n);
  }
}

EFFKERNELS_INLINE float sum_of(Vec v) {
  for (int width = kLanes / 2; width > 1; width /= 2) {
    Vec w = v;
    for (int i = 0; i < width; i++) w[i] = v[i] + v[i + width];
    v = w;
  }
  return v[0] + v[1];
}

// In-register transpose of kLanes vectors.
#if defined(__AVX512F__)
EFFKERNELS_INLINE void transpose(Vec (&r)[kLanes]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(__m512(r[i]), __m512(r[i + 1]));
    t[i + 1] = _mm512_unpackhi_ps(__m512(r[i]), __m512(r[i + 1]));
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {  // u[4 g + j]: 128-bit lane q holds column 4 q + j of rows 4 g .. 4 g + 3
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = Vec(_mm512_shuffle_f32x4(a, b, 0x88));
    r[8 + j] = Vec(_mm512_shuffle_f32x4(a, b, 0xdd));
    r[4 + j] = Vec(_mm512_shuffle_f32x4(c, d, 0x88));
    r[12 + j] = Vec(_mm512_shuffle_f32x4(c, d, 0xdd));
  }
}
#elif defined(__AVX2__)
EFFKERNELS_INLINE void transpose(Vec (&r)[kLanes]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(__m256(r[i]), __m256(r[i + 1]));
    t[i + 1] = _mm256_unpackhi_ps(__m256(r[i]), __m256(r[i + 1]));
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = Vec(_mm256_permute2f128_ps(u[j], u[4 + j], 0x20));
    r[4 + j] = Vec(_mm256_permute2f128_ps(u[j], u[4 + j], 0x31));
  }
}
#else
EFFKERNELS_INLINE void transpose(Vec (&r)[kLanes]) {
  for (int i = 0; i < kLanes; i++)
    for (int j = i + 1; j < kLanes; j++) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}
#endif

// Calls visit(T{}) with the C++ type of a DType.
template <class Visit>
inline void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat16:
      return visit(Half{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    default:
      return visit(float{});
  }
}

constexpr int64_t kThreadWork = 1 << 14;  // multiply-adds of a thread: with fewer, waking it costs more than it saves

inline int threads_for(int threads, double work) {  // a double: 64 bits need not hold it
  return int(max_of(1., min_of(double(threads), work / double(kThreadWork))));
}
inline Parallel threads_for(const Parallel& parallel, double work) {
  return {threads_for(parallel.threads, work), parallel.run};
}

// Invariants while a body runs.
struct BodyScope {
  DenormalsAreZero mode;
  ~BodyScope() {
#if defined(__AVX512F__)
    _mm_sfence();  // what store_past wrote
#endif
    release_scratch();
  }
};

// Runs body(begin, end) over [0, tasks) on the adaptor's threads; alone where there is one task or one thread. In a
// body denormals are zero (denormals.h), and a kernel computes in bodies alone, but for adding up the sums of bands.
// Every thread works on its own copy of the body, which therefore captures by value: captured by reference, what it
// reads would share cache lines with the caller's stack, which the calling thread writes to all the while (the first
// expand of B0, two threads: 0.31 to 0.39 ms, by chance of the stack's address, instead of 0.21).
template <class Body>
inline void parallel_for(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (tasks == 1 || parallel.threads <= 1) {
    const BodyScope scope;
    return body(0, tasks);
  }
  parallel.run(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        const BodyScope scope;
        const Body mine = *static_cast<const Body*>(context);
        mine(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
