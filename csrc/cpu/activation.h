// Activations and gates on vectors. exp by a polynomial of our own fit; NaN goes through every one of them, and
// infinities give what PyTorch's functions give: silu, hard_swish and both gelus of -inf are -inf * 0, NaN.
#pragma once
#include "vector.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

// The larger (smaller) of limit and x; NaN in x stays, as in relu of PyTorch.
EFFKERNELS_INLINE Vec at_least(float limit, Vec x) {
#if defined(__AVX512F__)
  return Vec(_mm512_max_ps(_mm512_set1_ps(limit), __m512(x)));
#elif defined(__AVX2__)
  return Vec(_mm256_max_ps(_mm256_set1_ps(limit), __m256(x)));
#else
  return splat(limit) > x ? splat(limit) : x;
#endif
}
EFFKERNELS_INLINE Vec at_most(float limit, Vec x) {
#if defined(__AVX512F__)
  return Vec(_mm512_min_ps(_mm512_set1_ps(limit), __m512(x)));
#elif defined(__AVX2__)
  return Vec(_mm256_min_ps(_mm256_set1_ps(limit), __m256(x)));
#else
  return splat(limit) < x ? splat(limit) : x;
#endif
}
EFFKERNELS_INLINE Vec clamp(Vec x, float low, float high) { return at_most(high, at_least(low, x)); }

// 2^t for t = x * factor in [-126, 127], relative error 1e-7; with fused multiply-adds t itself is never rounded. Both
// polynomials are least squares on Chebyshev points (relative error 2e-9) and exactly 1 at 0: an error of one sign in
// every element would add up in pooled means.
//
// For bfloat16 results, kShort, AVX-512: relative error 2e-6, a term of the polynomial less.
template <bool kShort = false>
EFFKERNELS_INLINE Vec exp2_within(Vec x, float factor = 1.f) {
#if defined(__AVX512F__)
  // t in sixteenths and a rest: degree 3 for the rest, and for the sixteenths a table that is one vector. Its entry i
  // has i sixteenths taken off its exponent: adding the number of sixteenths there puts them back, and the whole part
  // in. silu takes 7.3 cycles a vector; with scalef and a t of its own 8.8, by a polynomial of degree 6 10.8.
  const Vec table = {1.f,         1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                     1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                     1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
  const IntVec number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const IntVec sixteenths = (IntVec)table - (number << 19);
  const Vec magic = splat(786432.f);  // 1.5 * 2^19: adding it rounds to sixteenths, their number in the lowest bits
  const Vec sum = x * factor + magic, part = x * factor - (sum - magic);
  Vec p = kShort ? splat(0.240234330f) : part * 0.0555003137f + 0.240234330f;
  p = p * part + 0.693147182f;
  p = p * part + 1.f;
  const __m512i entry = _mm512_permutexvar_epi32(__m512i(sum), __m512i(sixteenths));
  return p * Vec(_mm512_add_epi32(entry, _mm512_slli_epi32(__m512i(sum), 19)));
#else
  // t = whole + part, |part| <= 1/2: degree 6 for the part, the whole into the exponent.
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec whole = (x * factor + magic) - magic, part = x * factor - whole;
  Vec p = part * 0.000153375769f + 0.00133998604f;
  p = p * part + 0.00961851953f;
  p = p * part + 0.05550329f;
  p = p * part + 0.240226466f;
  p = p * part + 0.693147206f;
  p = p * part + 1.f;
  const IntVec exponent = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  return p * (Vec)exponent;  // the bits, not the value
#endif
}

// What activate and the gates need to know of the type of a result: whether 13 bits are enough.
template <class T>
inline constexpr bool kIsShort = std::is_same_v<T, BFloat16>;

// v * sigmoid(x), v * 0 where sigmoid(x) is below the smallest normal number. A sigmoid of 1e-38 there would make a
// visible number of v = -1e38, and -infinity of v = -infinity, where the zero makes NaN.
//
// kShort, for bfloat16 results: relative error 2^-14, a 32nd of what rounding the result may add.
template <bool kShort = false>
EFFKERNELS_INLINE Vec times_sigmoid(Vec v, Vec x) {
#if defined(__AVX512F__)
  const Vec d = 1.f + exp2_within<kShort>(clamp(x, -88.f, 87.3f), -1.44269504f);
  const Vec r = Vec(_mm512_rcp14_ps(__m512(d)));  // 2^-14, squared by a Newton step; of x = -88 denormal: 0
  if constexpr (kShort) return v * r;
  return v * (r + r * (1.f - d * r));
#else
  constexpr float kLowest = -87.3f;  // below it exp2_within makes anything, which is not looked at
  const Vec d = 1.f + exp2_within(at_most(87.3f, x), -1.44269504f);
  return v / (x < splat(kLowest) ? splat(__builtin_inff()) : d);
#endif
}

// v / 6, correctly rounded but for rare ties: the product with the nearest float of 1/6 is 3e-8 too large everywhere.
EFFKERNELS_INLINE Vec sixth(Vec v) {
  const Vec q = v * (1.f / 6.f);
  return q + (v - 6.f * q) * (1.f / 6.f);
}

// 2^t for t <= 0, relative error 1e-7; 0 for t < -126.
EFFKERNELS_INLINE Vec exp2_of_negative(Vec t) {
#if defined(__AVX512F__)
  const __mmask16 inside = _mm512_cmp_ps_mask(__m512(t), _mm512_set1_ps(-126.f), _CMP_NLT_UQ);  // or NaN
  return Vec(_mm512_maskz_mov_ps(inside, __m512(exp2_within(t))));
#else
  return t < splat(-126.f) ? Vec{} : exp2_within(t);
#endif
}

// erfc(a) for a >= 0: exp(-a^2) times a polynomial of degree 10 in (a - 2) / (a + 2), fitted for [0, 10.5]; 0 beyond.
EFFKERNELS_INLINE Vec erfc_positive(Vec a) {
  a = at_most(10.5f, a);
  const Vec q = (a - 2.f) / (a + 2.f);
  Vec p = q * 3.29748679e-05f + 0.000147036471f;
  p = p * q + 2.73764076e-05f;
  p = p * q - 0.000972460964f;
  p = p * q - 0.000839610473f;
  p = p * q + 0.00699605749f;
  p = p * q + 0.00373161927f;
  p = p * q - 0.0789784782f;
  p = p * q + 0.241658267f;
  p = p * q - 0.427185851f;
  p = p * q + 0.255395676f;
  return p * exp2_of_negative(a * a * -1.44269504f);
}

// T is the type of the result.
template <Activation A, class T = float>
EFFKERNELS_INLINE Vec activate(Vec x) {
  if constexpr (A == Activation::kRelu) return at_least(0.f, x);
  if constexpr (A == Activation::kRelu6) return clamp(x, 0.f, 6.f);
  if constexpr (A == Activation::kSilu) return times_sigmoid<kIsShort<T>>(x, x);
  if constexpr (A == Activation::kHardSwish) return x * sixth(clamp(x + 3.f, 0.f, 6.f));
  if constexpr (A == Activation::kGelu) {  // x * normal distribution function of x
    const Vec a = x < splat(0.f) ? -x : x, half_tail = 0.5f * erfc_positive(a * 0.707106781f);
    return x * (x < splat(0.f) ? half_tail : 1.f - half_tail);
  }
  if constexpr (A == Activation::kGeluTanh)  // x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) loses nothing near zero
    return times_sigmoid<kIsShort<T>>(x, 1.59576912f * (x + 0.044715f * x * x * x));
  return x;
}

// Calls visit(std::integral_constant-like tag) with the activation as a constant.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
template <class Visit>
inline void with_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::kRelu:
      return visit(ActivationTag<Activation::kRelu>{});
    case Activation::kRelu6:
      return visit(ActivationTag<Activation::kRelu6>{});
    case Activation::kSilu:
      return visit(ActivationTag<Activation::kSilu>{});
    case Activation::kHardSwish:
      return visit(ActivationTag<Activation::kHardSwish>{});
    case Activation::kGelu:
      return visit(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return visit(ActivationTag<Activation::kGeluTanh>{});
    default:
      return visit(ActivationTag<Activation::kIdentity>{});
  }
}

EFFKERNELS_INLINE Vec apply_gate(Gate gate, Vec x) {
  return gate == Gate::kSigmoid ? times_sigmoid(splat(1.f), x) : sixth(clamp(x + 3.f, 0.f, 6.f));
}

// Scale and shift of channels [begin, begin + count), written to arrays padded to whole vectors.
inline void form_scale_shift(const Norm& norm, int64_t begin, int64_t count, float* scale, float* shift) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t c = begin + i, n = count - i;
    const Vec conv_bias = load_param(norm.conv_bias, c, n, 0.f);
    Vec s = splat(1.f), t = conv_bias;
    if (norm.mean.data) {
      const Vec variance = load_param(norm.var, c, n, 1.f) + norm.eps;
#if defined(__AVX512F__)
      const Vec deviation = Vec(_mm512_sqrt_ps(__m512(variance)));
#elif defined(__AVX2__)
      const Vec deviation = Vec(_mm256_sqrt_ps(__m256(variance)));
#else
      Vec deviation;
      for (int j = 0; j < kLanes; j++) deviation[j] = __builtin_sqrtf(variance[j]);
#endif
      s = load_param(norm.weight, c, n, 1.f) / deviation;
      t = load_param(norm.bias, c, n, 0.f) + (conv_bias - load_param(norm.mean, c, n, 0.f)) * s;
    }
    store(scale + i, s);
    store(shift + i, t);
  }
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
