// Weights as stored, rows of k, to panels in which one vector holds kLanes rows of one k: [kLanes rows][k][lane].
#pragma once
#include "vector.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

constexpr int kAhead = 2 * kLanes;  // rows from a weight to the one to prefetch

// panel[v][k][lane] = W[n0 + v * kLanes + lane][k], zero beyond the columns: row n of any panel is n * k floats
// after row 0, for n a multiple of kLanes.
template <class T>
inline void pack_panel(const T* weight, int64_t n0, int columns, int64_t k, float* panel) {
  for (int group = 0; group < columns; group += kLanes, panel += kLanes * k) {
    const int rows = min_of(kLanes, columns - group);
    const T* source = weight + (n0 + group) * k;
    for (int64_t k0 = 0; k0 < k; k0 += kLanes) {
      const int64_t n = k - k0;
      Vec block[kLanes];
      if (rows == kLanes && n >= kLanes) {
        for (int i = 0; i < kLanes; i++) block[i] = load(source + i * k + k0);
        // The next panel's weights come from memory while this one is worked on: 5 % of B0 at batch 1.
        for (int i = 0; i < kLanes; i++) __builtin_prefetch(source + (i + kAhead) * k + k0, 0, 2);
      } else {
        for (int i = 0; i < kLanes; i++) block[i] = i < rows ? load_up_to(source + i * k + k0, n) : Vec{};
      }
      transpose(block);
      const int stored = int(min_of<int64_t>(kLanes, n));
      for (int i = 0; i < stored; i++) store(panel + (k0 + i) * kLanes, block[i]);
    }
  }
}

inline void pack_panel(const Param& weight, int64_t n0, int columns, int64_t k, float* panel) {
  with_type(weight.dtype, [&](auto type) {
    using W = decltype(type);
    pack_panel(static_cast<const W*>(weight.data), n0, columns, k, panel);
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
