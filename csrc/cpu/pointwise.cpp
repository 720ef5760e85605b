// Pointwise convolution as a matrix product: y (M x N) = epilogue(A (M x K) * W^T), W (N x K) as stored.
//
// Work is cut into tiles of kRows rows by panels of kPanel columns. A task packs its panels of W (transposed, so that
// one vector holds kLanes output channels of one k) until they fill kPackedBytes, then walks down its rows: a tile of
// A is converted to float32 and gated once (prepare), then multiplied with every packed panel (multiply), then norm,
// activation and residual are applied as the result is written (write). Sums run over k in order: nothing depends on
// how tasks were cut.
#include "product.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

constexpr int kChunk = 16;  // k is walked in chunks: tile[chunk][row][kChunk], so that every offset is a constant

// acc[Rows][Vecs * kLanes] = tile (Rows x k) * panel (k x Vecs * kLanes). Sums of kBlock products are added up apart:
// one chain over 1152 channels would lose twice the bits that PyTorch's blocked product loses.
template <int Rows, int Vecs>
void multiply(const float* __restrict tile, const float* __restrict panel, int64_t k, float* __restrict acc) {
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    Vec sum[Rows][Vecs];  // cleared by a loop: an initialiser would clear the stack, too
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < Vecs; v++) sum[r][v] = Vec{};
    for (int64_t k0 = begin; k0 < min_of(begin + kBlock, k); k0 += kChunk, tile += kRows * kChunk) {
      const int n = int(min_of<int64_t>(kChunk, k - k0));
      for (int j = 0; j < n; j++, panel += Vecs * kLanes) {
        Vec b[Vecs];
        for (int v = 0; v < Vecs; v++) b[v] = load(panel + v * kLanes);
        for (int r = 0; r < Rows; r++) {
          const Vec a = splat(tile[r * kChunk + j]);
          for (int v = 0; v < Vecs; v++) sum[r][v] += a * b[v];
        }
      }
    }
    add_block<Rows, Vecs>(sum, begin == 0, acc);
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, float*);

template <int Vecs>
Multiply pick_multiply(int rows) {  // the smallest that covers the rows: the others compute numbers nobody reads
  if constexpr (kRows > 6) {
    if (rows > 12) return multiply<kRows, Vecs>;
    if (rows > 10) return multiply<12, Vecs>;
    if (rows > 8) return multiply<10, Vecs>;
    if (rows > 7) return multiply<8, Vecs>;
    if (rows > 6) return multiply<7, Vecs>;
  }
  if (rows > 4) return multiply<6, Vecs>;
  if (rows > 2) return multiply<4, Vecs>;
  return rows > 1 ? multiply<2, Vecs> : multiply<1, Vecs>;
}

// How M row tiles and P panels are cut into tasks. The model counts cycles per k of one task: a panel's share of
// packing, a tile's share of preparing, and the products.
struct Cut {
  int64_t row_tasks, panel_tasks;
};
Cut cut_tasks(int64_t tiles, int64_t panels, int threads) {
  Cut best{1, 1};
  double best_cost = 0;
  for (int64_t p = 1; p <= min_of<int64_t>(threads, panels); p++) {
    const int64_t r = max_of<int64_t>(1, min_of<int64_t>(threads / p, tiles));
    const double own_tiles = double(ceil_div(tiles, r)), own_panels = double(ceil_div(panels, p));
    const double cost = own_panels * 10. + own_tiles * 1.5 * kRows + own_tiles * own_panels * kRows;
    if (p == 1 || cost < best_cost) best = {r, p}, best_cost = cost;
  }
  return best;
}

struct Product {
  int64_t m, n, k;
  Param weight;
  Norm norm;
  Activation activation;
};

// prepare(first_row, row_count, tile, rows): fills the tile and says where its rows go.
template <class T, class Prepare>
void matmul(const Product& p, const Parallel& all, const Prepare& prepare) {
  const Parallel parallel = threads_for(all, p.m * p.n * p.k);
  const int64_t tiles = ceil_div(p.m, kRows), panels = ceil_div(p.n, kPanel);
  const Cut cut = cut_tasks(tiles, panels, parallel.threads);
  const int64_t padded_k = round_up(p.k, kChunk);
  const int64_t group = max_of<int64_t>(1, min_of<int64_t>(panels, kPackedBytes / (p.k * kPanel * 4)));

  parallel_for(parallel, cut.row_tasks * cut.panel_tasks, [=](int64_t task_begin, int64_t task_end) {
    const int64_t packed_size = group * p.k * kPanel, tile_size = kRows * padded_k;
    float* packed = static_cast<float*>(
        scratch(size_t(packed_size + tile_size + 2 * group * kPanel + kRows * kPanel) * sizeof(float)));
    float *tile = packed + packed_size, *scale = tile + tile_size, *shift = scale + group * kPanel;
    float* acc = shift + group * kPanel;
    for (int64_t task = task_begin; task < task_end; task++) {
      const int64_t row_task = task / cut.panel_tasks, panel_task = task % cut.panel_tasks;
      const int64_t tile_begin = tiles * row_task / cut.row_tasks, tile_end = tiles * (row_task + 1) / cut.row_tasks;
      const int64_t panel_begin = panels * panel_task / cut.panel_tasks;
      const int64_t panel_end = panels * (panel_task + 1) / cut.panel_tasks;
      for (int64_t g = panel_begin; g < panel_end; g += group) {
        const int64_t g_end = min_of(g + group, panel_end);
        for (int64_t q = g; q < g_end; q++)
          pack_panel(p.weight, q * kPanel, int(min_of<int64_t>(kPanel, p.n - q * kPanel)), p.k,
                     packed + (q - g) * p.k * kPanel);
        form_scale_shift(p.norm, g * kPanel, min_of(p.n, g_end * kPanel) - g * kPanel, scale, shift);
        with_activation(p.activation, [&](auto activation) {
          for (int64_t t = tile_begin; t < tile_end; t++) {
            const int row_count = int(min_of<int64_t>(kRows, p.m - t * kRows));
            Row<T> rows[kRows];
            prepare(t * kRows, row_count, tile, rows);
            const Multiply wide = pick_multiply<kPanelVecs>(row_count), narrow = pick_multiply<1>(row_count);
            for (int64_t q = g; q < g_end; q++) {
              const int columns = int(min_of<int64_t>(kPanel, p.n - q * kPanel));
              (columns > kLanes ? wide : narrow)(tile, packed + (q - g) * p.k * kPanel, p.k, acc);
              write<T, decltype(activation)::value>(acc, rows, row_count, q * kPanel, columns, scale + (q - g) * kPanel,
                                                    shift + (q - g) * kPanel);
            }
          }
        });
      }
    }
  });
}

template <class T, class G>
void prepare_row(const T* x, const G* gate, int64_t k, float* tile_row) {
  for (int64_t k0 = 0; k0 < k; k0 += kLanes) {
    Vec v = load_up_to(x + k0, k - k0);
    if (gate) v *= load_up_to(gate + k0, k - k0);
    store(tile_row + k0 / kChunk * (kRows * kChunk) + k0 % kChunk, v);
  }
}

}  // namespace

void pointwise(const PointwiseParams& p, const Parallel& parallel) {
  const Product product{p.batch * p.pixels, p.out_channels, p.in_channels, p.weight, p.norm, p.activation};
  if (product.m == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_type(p.gate.dtype, [&](auto gate_type) {
      using G = decltype(gate_type);
      const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
      const G* gate = static_cast<const G*>(p.gate.data);
      matmul<T>(product, parallel, [=](int64_t first, int count, float* tile, Row<T>* rows) {
        int64_t image = first / p.pixels, pixel = first % p.pixels;
        for (int r = 0; r < count; r++) {
          prepare_row(x + image * p.x_stride_n + pixel * p.x_stride_p, gate ? gate + image * p.in_channels : nullptr,
                      p.in_channels, tile + r * kChunk);
          rows[r].y = static_cast<T*>(p.y) + (first + r) * p.out_channels;
          rows[r].residual = residual ? residual + image * p.residual_stride_n + pixel * p.residual_stride_p : nullptr;
          if (++pixel == p.pixels) pixel = 0, image++;
        }
      });
    });
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
