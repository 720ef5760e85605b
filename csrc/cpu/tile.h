// A tile of rows times a packed panel of weights: what the products over pixels share (pointwise.cpp and
// expand_depthwise.cpp). Tiles and panels hold words of 32 bits along k: floats or, with avx512_bf16, pairs of bfloat16
// of two neighbouring k (operand.h).
#pragma once
#include "operand.h"
#include "product.h"

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

using Multiply = void (*)(const float*, const float*, int64_t, float*);

template <class Form, int Vecs>
inline Multiply pick_multiply(int rows) {  // the smallest that covers the rows: the others compute numbers nobody reads
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
}

// The division of `items` of some tiles each and N channels into tasks. Channels are cut in units of a cache line of
// the result, so that two threads never write the same line: with AVX-512 and float32 half a panel, which is the
// difference between 10.5 and 11 panels of 672 channels for each of two threads. Only the last panel of a task is
// narrower.
struct Cut {
  int64_t row_tasks, channel_tasks;
  int64_t items, channels, unit;
  int64_t row_begin(int64_t task) const { return items * (task / channel_tasks) / row_tasks; }
  int64_t row_end(int64_t task) const { return items * (task / channel_tasks + 1) / row_tasks; }
  int64_t channel_begin(int64_t task) const { return first_channel(task % channel_tasks); }
  int64_t channel_end(int64_t task) const { return first_channel(task % channel_tasks + 1); }

 private:
  int64_t first_channel(int64_t i) const {
    return min_of(channels, ceil_div(channels, unit) * i / channel_tasks * unit);
  }
};

// The model counts cycles per k of one task: a panel's share of packing, a tile's share of preparing, and the products.
inline Cut cut_tasks(int64_t items, int64_t tiles_per_item, int64_t channels, int64_t element_size, bool packed,
                     int threads) {
  const int64_t unit = min_of<int64_t>(kPanel, max_of<int64_t>(kLanes, 64 / element_size));
  const int64_t units = ceil_div(channels, unit);
  Cut best{1, 1, items, channels, unit};
  double best_cost = 0;
  for (int64_t c = 1; c <= min_of<int64_t>(threads, units); c++) {
    const int64_t r = max_of<int64_t>(1, min_of<int64_t>(threads / c, items));
    const double own_tiles = double(ceil_div(items, r) * tiles_per_item);
    const double own_panels = double(ceil_div(units, c) * unit) / kPanel;
    const double cost = own_panels * (packed ? 0. : 16.) + own_tiles * 3. + own_tiles * own_panels * kRows;
    if (c == 1 || cost < best_cost) best.row_tasks = r, best.channel_tasks = c, best_cost = cost;
  }
  return best;
}

// One row of the tile, a chunk every chunk_step: k elements of x, multiplied by the gate where there is one.
template <class Form, class T, class G>
inline void prepare_row(const T* x, const G* gate, int64_t k, float* tile_row, int64_t chunk_step) {
  static_assert(kChunk % kLanes == 0);
  for (int64_t word = 0, words = Form::words(k); word < words; word += kLanes)
    Form::prepare(x, gate, word, k, tile_row + word / kChunk * chunk_step + word % kChunk);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
