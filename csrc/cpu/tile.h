// A tile of rows times a packed panel of weights: what the products over pixels share (pointwise.cpp and
// expand_depthwise.cpp). Tiles and panels hold words of 32 bits along k: floats or, with avx512_bf16, pairs of bfloat16
// of two neighbouring k (operand.h).
#pragma once
#include "operand.h"
#include "product.h"
#include "shares.h"
#if defined(EFFKERNELS_ISA_AMX_BF16)
#include "amx.h"
#endif

namespace effkernels::cpu::EFFKERNELS_ISA {

inline constexpr int kChunk =
    16;  // k is walked in chunks: tile[chunk][row][kChunk], so that every offset is a constant

// acc[Rows][Vecs * kLanes] = tile (Rows x k) * panel (Vecs x k x kLanes), k in words. Sums of kBlock words are added up
// apart: one chain over 1152 channels would lose twice the bits that PyTorch's blocked product loses.
template <class Form, int Rows, int Vecs>
inline void multiply(const float* __restrict tile, const float* __restrict panel, int64_t k, float* __restrict acc) {
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    Vec sum[Rows][Vecs];  // cleared by a loop: an initialiser would clear the stack, too
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < Vecs; v++) sum[r][v] = Vec{};
    for (int64_t k0 = begin; k0 < min_of(begin + kBlock, k); k0 += kChunk, tile += kRows * kChunk) {
      const int n = int(min_of<int64_t>(kChunk, k - k0));
      for (int j = 0; j < n; j++, panel += kLanes) {
        Vec b[Vecs];
        for (int v = 0; v < Vecs; v++) b[v] = load(panel + v * k * kLanes);
        for (int r = 0; r < Rows; r++) {
          const Vec a = Form::splat_word(tile + r * kChunk + j);
          for (int v = 0; v < Vecs; v++) sum[r][v] = Form::multiply_add(sum[r][v], a, b[v]);
        }
      }
    }
    add_block<Rows, Vecs>(sum, begin == 0, acc);
  }
}

// W[n0 .. n0 + channels) as panels of kPanel, one after the other.
template <class Form>
inline void pack_panels(const Param& weight, int64_t n0, int64_t channels, int64_t k, float* packed) {
  for (int64_t c = 0; c < channels; c += kPanel)
    Form::pack(weight, n0 + c, int(min_of<int64_t>(kPanel, channels - c)), k, packed + c * Form::words(k));
}

#if defined(EFFKERNELS_ISA_AMX_BF16)
using Operand = TileRows;
#else
using Operand = const float*;  // a tile
inline const void* rows_in_place(const PointwiseParams&) { return nullptr; }
#endif
using Multiply = void (*)(Operand, const float*, int64_t, float*);

template <class Form, int Vecs>
inline Multiply pick_multiply(int rows) {  // the smallest that covers the rows: the others compute numbers nobody reads
#if defined(EFFKERNELS_ISA_AMX_BF16)
  return rows > kTileRows ? multiply_tiles<2, Vecs> : multiply_tiles<1, Vecs>;
#else
  if constexpr (kRows > 6) {
    if (rows > 12) return multiply<Form, kRows, Vecs>;
    if (rows > 10) return multiply<Form, 12, Vecs>;
    if (rows > 8) return multiply<Form, 10, Vecs>;
    if (rows > 7) return multiply<Form, 8, Vecs>;
    if (rows > 6) return multiply<Form, 7, Vecs>;
  }
  if (rows > 4) return multiply<Form, 6, Vecs>;
  if (rows > 2) return multiply<Form, 4, Vecs>;
  return rows > 1 ? multiply<Form, 2, Vecs> : multiply<Form, 1, Vecs>;
#endif
}

// What a thread holds while it works on a share of a product.
#if defined(EFFKERNELS_ISA_AMX_BF16)
using ProductScope = TileScope;
#else
struct ProductScope {};
#endif

// Channels of a product are divided in units of a cache line of the result, so that two threads never write the same
// line: with AVX-512 and float32 half a panel, which is the difference between 10.5 and 11 panels of 672 channels for
// each of two threads. Only the last panel of a share is narrower.
inline int64_t columns_unit(DType dtype) {
  return min_of<int64_t>(kPanel, max_of<int64_t>(kLanes, dtype == DType::kFloat32 ? 16 : 32));
}

// Cycles for each word of a row: packing a panel, preparing a tile, the product of both (by tiles: amx.h).
inline constexpr double kPackingCost = 16, kPreparingCost = kByTiles ? 7 : 3, kProductCost = kByTiles ? 4 : kRows;
// A product of fewer rows takes no less time: its chains wait for each other, or its tile is not full.
inline constexpr double kLeastRows = kByTiles ? 16 : 4;

// The smallest unit that is worth a share is half a tile by a unit of channels.
inline constexpr int64_t kUnitRows = kRows / 2;

// together: rows that a share has all or none of.
inline Grid divide_product(int64_t rows, int64_t channels, DType dtype, bool packed, int threads,
                           int64_t together = 1) {
  const int64_t unit = columns_unit(dtype), tile = together > 1 ? 1 : kRows;
  return divide_grid(rows / together, channels, unit, tile, threads, [=](double own, double units, bool cut) {
    const double own_rows = own * double(together);
    const double panel = double(unit) / kPanel, panels = units * panel;
    const double computed = max_of(own_rows, kLeastRows) * kProductCost / kRows;
    return (panels + (cut ? panel : 0.)) * (packed ? 0. : kPackingCost) +
           own_rows / kRows * kPreparingCost * (cut ? 2. : 1.) + computed * panels;
  });
}

// One row of the tile, a chunk every chunk_step: k elements of x, multiplied by the gate where there is one.
template <class Form, class T, class G>
inline void prepare_row(const T* x, const G* gate, int64_t k, float* tile_row, int64_t chunk_step) {
  static_assert(kChunk % kLanes == 0);
  for (int64_t word = 0, words = Form::words(k); word < words; word += kLanes)
    Form::prepare(x, gate, word, k, tile_row + word / kChunk * chunk_step + word % kChunk);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
