// The forms in which a product holds its operands: words of 32 bits along k.
//
// `Floats` holds one k a word, whatever the types of x and the weights. `Pairs` holds two neighbouring k of a bfloat16
// tensor as they are in memory, the first in the lower half, and zero after the last k. An instruction of avx512_bf16
// multiplies both and adds them to a float32 sum: twice the products of a multiply-add of floats, half the bytes, and
// no conversion of x. A gate is multiplied in float32 and the result rounded to bfloat16, as PyTorch does.
// `PairTiles` holds the same words for the tiles of amx_bf16 (amx.h), and zeros up to a whole tile of them.
#pragma once
#include "pack.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

struct Floats {
  static constexpr int64_t words(int64_t k) { return k; }
  EFFKERNELS_INLINE static Vec splat_word(const float* word) { return splat(*word); }
  EFFKERNELS_INLINE static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  template <class T>
  EFFKERNELS_INLINE static Vec load_words(const T* row, int64_t word, int64_t k) {
    return load_up_to(row + word, k - word);
  }
  // kLanes words of x times gate, from `word` on.
  template <class T, class G>
  EFFKERNELS_INLINE static void prepare(const T* x, const G* gate, int64_t word, int64_t k, float* to) {
    Vec v = load_words(x, word, k);
    if (gate) v *= load_words(gate, word, k);
    store(to, v);
  }
  // See pack_panel.
  static void pack(const Param& weight, int64_t n0, int columns, int64_t k, float* panel) {
    pack_panel(weight, n0, columns, k, panel);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int64_t words(int64_t k) { return ceil_div(k, 2); }
  EFFKERNELS_INLINE static Vec splat_word(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, 4);  // no number: arithmetic on it could change it
    return Vec(_mm512_castsi512_ps(_mm512_set1_epi32(bits)));
  }
  EFFKERNELS_INLINE static Vec multiply_add(Vec sum, Vec a, Vec b) {
    return Vec(_mm512_dpbf16_ps(__m512(sum), (__m512bh)a, (__m512bh)b));
  }
  EFFKERNELS_INLINE static Vec load_words(const BFloat16* row, int64_t word, int64_t k) {
    const int64_t left = k - 2 * word;
    if (left >= 2 * kLanes) return Vec(_mm512_loadu_ps(row + 2 * word));
    const __mmask32 some = left > 0 ? (__mmask32(1) << left) - 1 : 0;
    return Vec(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, row + 2 * word)));
  }
  template <class G>
  EFFKERNELS_INLINE static void prepare(const BFloat16* x, const G* gate, int64_t word, int64_t k, float* to) {
    if (!gate) return store(to, load_words(x, word, k));
    const int64_t i = 2 * word;
    const Vec low = load_up_to(x + i, k - i) * load_up_to(gate + i, k - i);
    Vec high = {};
    if (k - i > kLanes)
      high = load_up_to(x + i + kLanes, k - i - kLanes) * load_up_to(gate + i + kLanes, k - i - kLanes);
    store(to, Vec((__m512)_mm512_cvtne2ps_pbh(__m512(high), __m512(low))));
  }
  static void pack(const Param& weight, int64_t n0, int columns, int64_t k, float* panel) {
    pack_words(weight, n0, columns, k, words(k), panel);
  }
  // All words are stored, `all` of a column.
  static void pack_words(const Param& weight, int64_t n0, int columns, int64_t k, int64_t all, float* panel) {
    for (int group = 0; group < columns; group += kLanes, panel += kLanes * all) {
      const int rows = min_of(kLanes, columns - group);
      const BFloat16* source = static_cast<const BFloat16*>(weight.data) + (n0 + group) * k;
      for (int64_t word = 0; word < all; word += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; i++) block[i] = i < rows ? load_words(source + i * k, word, k) : Vec{};
        for (int i = 0; i < kLanes; i++) __builtin_prefetch(source + (i + kAhead) * k + 2 * word, 0, 2);
        transpose(block);
        const int stored = int(min_of<int64_t>(kLanes, all - word));
        for (int i = 0; i < stored; i++) store(panel + (word + i) * kLanes, block[i]);
      }
    }
  }
};
#endif

#if defined(EFFKERNELS_ISA_AMX_BF16)
struct PairTiles : Pairs {
  static constexpr int64_t words(int64_t k) { return round_up(Pairs::words(k), kLanes); }
  static void pack(const Param& weight, int64_t n0, int columns, int64_t k, float* panel) {
    pack_words(weight, n0, columns, k, words(k), panel);
  }
};
#endif

// Calls visit(T{}) with the C++ type of x, if a product of this level may have it.
template <class Visit>
inline void with_operand_type(DType dtype, Visit visit) {
#if defined(EFFKERNELS_ISA_AMX_BF16)
  (void)dtype;
  visit(BFloat16{});
#else
  with_type(dtype, visit);
#endif
}

// Calls visit(P{}) with the C++ type of a parameter where x is of type T: float32 or the same.
template <class T, class Visit>
inline void with_parameter_type(DType dtype, Visit visit) {
  if constexpr (!std::is_same_v<T, float>)
    if (dtype != DType::kFloat32) return visit(T{});
  (void)dtype;
  visit(float{});
}

// Calls visit(form) with the form of a product of x in T by that weight.
template <class T, class Visit>
inline void with_form(const Param& weight, Visit visit) {
#if defined(EFFKERNELS_ISA_AMX_BF16)
  (void)weight;
  visit(PairTiles{});
#else
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (weight.dtype == DType::kBFloat16) return visit(Pairs{});
#endif
  (void)weight;
  visit(Floats{});
#endif
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
