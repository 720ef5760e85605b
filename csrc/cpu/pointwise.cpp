// Pointwise convolution as a matrix product: y (M x N) = epilogue(A (M x K) * W^T), W (N x K) as stored.
//
// Work is cut into tiles of kRows rows by panels of kPanel columns. A task packs its panels of W (transposed, so that
// one vector holds kLanes output channels of one k) until they fill kPackedBytes, then walks down its rows: a tile of
// A is converted to float32 and gated once (prepare), then multiplied with every packed panel (multiply), then norm,
// activation and residual are applied as the result is written (write). Sums run over k in order: nothing depends on
// how tasks were cut.
#include "tile.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

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
  const Cut cut = cut_tasks(tiles, 1, panels, parallel.threads);
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
