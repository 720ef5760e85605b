// Expand (1x1) and depthwise convolution, each with norm and activation, in one pass: the expanded tensor exists only
// as the ring of rows that the depthwise convolution reads, in float32, and never in memory.
//
// A thread has some output rows, of one image or more, by some expanded channels (Grid, in shares.h). It packs the
// weights of its channels, in panels of kPanel, until they fill kPackedBytes, then takes its rows band by band (as in
// depthwise.cpp): the input rows of the band become tiles once for all panels (prepare; where they do not fit, again
// for each panel), and for each panel the rows are multiplied, normalised, activated and written to the ring (expand)
// as the depthwise rows need them. The padding is zero because the ring's padding columns and the rows outside
// the image are zero after the activation.
//
// Sums, of products and of pooled values, run in the order of the two kernels apart: in float32 the results are the
// same bits, but for images of one pixel, which pointwise.cpp sums in another order. In the 16-bit types the expanded
// values are not rounded on the way.
#include <algorithm>

#include "depthwise_rows.h"
#include "memory.h"
#include "tile.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

void pointwise(const PointwiseParams&, const Parallel&);
void depthwise(const DepthwiseParams&, const Parallel&);

namespace {

// Tiles kept for all panels of a band. They may be in the third-level cache; computed again for each panel, the
// blocks of B4 at 48x48 and 24x24 take 10 to 25 % longer (one thread).
constexpr int64_t kPreparedBytes = 2 * 1024 * 1024;

// Input rows expanded at a time: the fewest that leave the fewest rows of the last tile empty.
int64_t pick_fill_rows(int64_t width) {
  int64_t best = 1;
  const auto computed = [=](int64_t rows) { return round_up(rows * width, kRows); };
  for (int64_t rows = 2; rows <= 7 && rows * width <= 4 * kRows; rows++)
    if (computed(rows) * best < computed(best) * rows) best = rows;
  return best;
}

// Sizes that every task shares.
struct Fills {
  int64_t rows;   // input rows of one fill of the ring
  int64_t tiles;  // of one fill
  int64_t tile_size;
  int64_t size() const { return tiles * tile_size; }
};

// Tiles of input rows [begin, end) of one image.
template <class T, class Form>
void prepare(const PointwiseParams& p, const Fills& f, int64_t width, int64_t image, int64_t begin, int64_t end,
             float* tiles) {
  const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + begin * width * p.x_stride_p;
  for (int64_t left = (end - begin) * width; left > 0; left -= kRows, tiles += f.tile_size)
    for (int r = 0; r < int(min_of<int64_t>(kRows, left)); r++, x += p.x_stride_p)
      prepare_row<Form>(x, static_cast<const T*>(nullptr), p.in_channels, tiles + r * kChunk, kRows * kChunk);
}

// activation(acc * scale + shift) of a tile into the ring; (row, column) is the tile's first pixel, then its last + 1.
template <class T, Activation A, int Vecs>
void expand(const float* acc, int count, const float* scale, const float* shift, const Geometry& g, int64_t width,
            float* ring, int64_t& row, int64_t& column) {
  while (count > 0) {
    const int run = int(min_of<int64_t>(count, width - column));
    float* place = ring + row % g.ring_rows * g.row_size() + column * kLanes;
    for (int v = 0; v < Vecs; v++) {
      const Vec a = load(scale + v * kLanes), b = load(shift + v * kLanes);
      for (int i = 0; i < run; i++)
        store(place + (v * g.columns + i) * kLanes, activate<A, T>(load(acc + (i * Vecs + v) * kLanes) * a + b));
    }
    acc += run * Vecs * kLanes, count -= run, column += run;
    if (column == width) column = 0, row++;
  }
}

using Expand = void (*)(const float*, int, const float*, const float*, const Geometry&, int64_t, float*, int64_t&,
                        int64_t&);

// Shared by all tasks.
struct Work {
  ExpandDepthwiseParams params;
  Strip strip;
  Geometry geometry;
  Fills fills;
  Means means;
  bool prepare_once;
  int64_t words;        // of a row of the product
  int64_t group, taps;  // panels whose weights are packed at a time; taps of a channel
};

// Scratch memory of a task: for a group of panels, and for the panel and the band in hand.
struct Workspace {
  const float* expand_weights;
  float *own_weights, *expand_scale, *expand_shift, *weights, *scale, *shift, *ring, *sum, *acc, *tiles;
};

Workspace make_workspace(const Work& w, int64_t band_fills) {
  const int64_t channels = w.group * kPanel;
  const int64_t sizes[] = {w.params.expand.packed ? 0 : channels * w.words,
                           channels,
                           channels,
                           channels * w.taps,
                           channels,
                           channels,
                           w.geometry.ring_size(),
                           w.geometry.strip_columns * kLanes,
                           kRows * kPanel,
                           (w.prepare_once ? band_fills : 1) * w.fills.size()};
  int64_t floats = 0;
  for (const int64_t size : sizes) floats += size;
  float* next = static_cast<float*>(scratch(size_t(floats) * sizeof(float)));
  const int64_t* size = sizes;
  const auto take = [&] {
    float* const place = next;
    next += *size++;
    return place;
  };
  Workspace s;
  s.own_weights = take(), s.expand_scale = take(), s.expand_shift = take();
  s.weights = take(), s.scale = take(), s.shift = take();
  s.ring = take(), s.sum = take(), s.acc = take(), s.tiles = take();
  return s;
}

// Output rows [row_begin, row_end) of a band by the channels [begin, end), whose weights are packed.
template <class T, class Form, Activation A>
void run_panels(const Work& w, const Workspace& s, int64_t image, int64_t row_begin, int64_t row_end, int64_t begin,
                int64_t end) {
  const PointwiseParams& e = w.params.expand;
  const DepthwiseParams& d = w.params.depthwise;
  const Fills& fills = w.fills;
  const InputRows input = rows_of_band(d, w.geometry, row_begin, row_end);
  if (w.prepare_once)
    for (int64_t row = input.begin, i = 0; row < input.end; row += fills.rows, i++)
      prepare<T, Form>(e, fills, d.width, image, row, min_of(row + fills.rows, input.end), s.tiles + i * fills.size());
  for (int64_t first = 0; first < end - begin; first += kPanel) {
    const int64_t channels = min_of<int64_t>(kPanel, end - begin - first);
    const bool wide = channels > kLanes;
    Expand expand_tile = nullptr;
    with_activation(e.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      expand_tile = wide ? expand<T, kActivation, kPanelVecs> : expand<T, kActivation, 1>;
    });
    const auto fill = [&](int64_t row, int64_t until) {
      while (row < until) {
        const int64_t stop = min_of(row + fills.rows, input.end), pixels = (stop - row) * d.width;
        const float* tile = s.tiles + (w.prepare_once ? (row - input.begin) / fills.rows * fills.size() : 0);
        if (!w.prepare_once) prepare<T, Form>(e, fills, d.width, image, row, stop, s.tiles);
        int64_t column = 0;
        for (int64_t done = 0; done < pixels; done += kRows, tile += fills.tile_size) {
          const int count = int(min_of<int64_t>(kRows, pixels - done));
          (wide ? pick_multiply<Form, kPanelVecs>(count) : pick_multiply<Form, 1>(count))(
              tile, s.expand_weights + first * w.words, w.words, s.acc);
          expand_tile(s.acc, count, s.expand_scale + first, s.expand_shift + first, w.geometry, d.width,
                      s.ring + d.pad_left * kLanes, row, column);
        }
      }
      return row;
    };
    run_band<T, A>(d, w.geometry, w.strip, w.means, image, row_begin, row_end, begin + first, channels,
                   {s.weights + first * w.taps, s.scale + first, s.shift + first, s.ring, s.sum}, fill);
  }
}

// The two kernels one after the other, the expanded tensor between them in memory: for a window whose ring would be
// larger than that (depthwise.cpp).
void expand_then_depthwise(const ExpandDepthwiseParams& params, const Parallel& all) {
  PointwiseParams e = params.expand;
  DepthwiseParams d = params.depthwise;
  const int64_t pixels = d.height * d.width;
  const int64_t bytes = product({d.batch, pixels, d.channels, d.dtype == DType::kFloat32 ? 4 : 2});
  if (bytes > int64_t(kMostBytes)) throw OutOfMemory("the expanded tensor", size_t(bytes));
  const std::unique_ptr<char[]> expanded(new char[size_t(bytes)]);
  e.y = expanded.get(), d.x = expanded.get();
  d.x_stride_w = d.channels, d.x_stride_h = d.width * d.channels, d.x_stride_n = pixels * d.channels;
  pointwise(e, all);
  depthwise(d, all);
}

// What follows from the sizes alone. fits: a ring of rows, else the two kernels are called one after the other.
Work make_work(const ExpandDepthwiseParams& params, bool& fits) {
  const PointwiseParams& e = params.expand;
  const DepthwiseParams& d = params.depthwise;
  Work w;
  w.params = params;
  with_operand_type(e.dtype, [&](auto type) {
    with_form<decltype(type)>(e.weight, [&](auto form) { w.words = decltype(form)::words(e.in_channels); });
  });
  w.strip = pick_strip(d);
  w.taps = d.kernel_h * d.kernel_w;
  w.fills.rows = pick_fill_rows(d.width);
  w.fills.tiles = ceil_div(w.fills.rows * d.width, kRows);
  w.fills.tile_size = kRows * round_up(w.words, kChunk);
  w.geometry = make_geometry(d, w.strip, kPanel);
  w.geometry.columns = max_of<int64_t>(w.geometry.columns, d.pad_left + d.width);  // whole rows are expanded
  w.geometry.filled = d.width;
  w.geometry.ring_rows += w.fills.rows - 1;
  fits = w.geometry.fits();
  return w;
}

// The cost is in cycles for each word of a row of the product: packing, preparing, the product, and the depthwise
// convolution. A share that begins or ends within a band expands the rows that its windows share with its neighbour's.
Grid divide(const Work& w, int threads) {
  const PointwiseParams& e = w.params.expand;
  const DepthwiseParams& d = w.params.depthwise;
  const int64_t unit = columns_unit(d.dtype);
  const double band = double(min_of<int64_t>(kBandRows, d.out_height)), stride = d.stride;
  const double halo = double(w.geometry.window) - stride, width = double(d.width);
  const double taps = double(w.taps * d.out_width) / double(w.words);
  const int used = threads_for(threads, double(d.batch * d.height * d.width * d.channels) * double(e.in_channels));
  return divide_grid(d.batch * d.out_height, d.channels, unit, 1, used, [=](double rows, double units, bool cut) {
    const double panel = double(unit) / kPanel, panels = units * panel;
    const double expanded = rows * stride + max_of(1., rows / band) * max_of(0., halo);
    const double pixels = expanded * width;
    return (panels + (cut ? panel : 0.)) * (e.packed ? 0. : kPackingCost) +
           pixels / kRows * (kPreparingCost * (cut ? 2. : 1.) + kProductCost * panels) +
           (cut ? 2. * max_of(0., halo) * width * panel * kProductCost / kRows : 0.) + rows * taps * panels;
  });
}

// Bands that a share has a part of.
std::vector<CutBand> cut_bands(const DepthwiseParams& d, const Grid& grid) {
  std::vector<CutBand> cuts;
  if (!d.pooled) return cuts;
  for (int64_t share = 0; share < grid.count; share++)
    for (const Rectangle& r : grid.share(share)) {  // every cut has a later side
      const int64_t image = r.row_begin / d.out_height, row = r.row_begin % d.out_height;
      if (row % kBandRows != 0)
        cuts.push_back({image, row / kBandRows, r.channel_begin, r.channel_end - r.channel_begin});
    }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  return cuts;
}

}  // namespace

Division divide_depthwise(const DepthwiseParams&, int);

Division divide_expand_depthwise(const ExpandDepthwiseParams& params, int threads) {
  bool fits;
  const Work w = make_work(params, fits);
  if (!fits) return divide_depthwise(params.depthwise, threads);
  const Grid grid = divide(w, threads);
  return describe(grid, params.depthwise.batch * grid.units() *
                            ceil_div(params.depthwise.out_height * params.depthwise.stride, w.geometry.window));
}

void expand_depthwise(const ExpandDepthwiseParams& params, const Parallel& all) {
  const PointwiseParams& e = params.expand;
  const DepthwiseParams& d = params.depthwise;
  if (d.batch == 0) return;
  bool fits;
  Work w = make_work(params, fits);
  if (!fits) return expand_then_depthwise(params, all);
  const int64_t packed_bytes = ((e.packed ? 0 : w.words) + w.taps) * kPanel * 4;
  w.group = max_of<int64_t>(1, min_of<int64_t>(ceil_div(d.channels, kPanel), kPackedBytes / packed_bytes));
  const Grid grid = divide(w, all.threads);
  const std::vector<CutBand> cuts = cut_bands(d, grid);
  MeansMemory memory;
  w.means = place_means(d, cuts, memory);
  const int64_t band_rows = (min_of<int64_t>(kBandRows, d.out_height) - 1) * d.stride + w.geometry.window;
  const int64_t band_fills = ceil_div(min_of(band_rows, d.height), w.fills.rows);
  w.prepare_once = product({band_fills, w.fills.size(), 4}) <= kPreparedBytes;

  for_shares(all, grid.count, [=](int64_t share) {
    const PointwiseParams& expand = w.params.expand;
    const DepthwiseParams& depthwise = w.params.depthwise;
    [[maybe_unused]] const ProductScope scope;
    Workspace s = make_workspace(w, band_fills);
    for (int64_t i = 0; i < w.geometry.ring_size(); i++) s.ring[i] = 0.f;  // the padding columns stay so
    for (const Rectangle& r : grid.share(share))
      for (int64_t first = r.channel_begin; first < r.channel_end; first += w.group * kPanel) {
        const int64_t channels = min_of(w.group * kPanel, r.channel_end - first);
        s.expand_weights = expand.packed ? expand.packed + first * w.words : s.own_weights;
        form_scale_shift(expand.norm, first, channels, s.expand_scale, s.expand_shift);
        pack_block(depthwise, first, channels, s.weights, s.scale, s.shift);
        with_operand_type(depthwise.dtype, [&](auto type) {
          with_form<decltype(type)>(expand.weight, [&](auto form) {
            using Form = decltype(form);
            if (!expand.packed) pack_panels<Form>(expand.weight, first, channels, expand.in_channels, s.own_weights);
            with_activation(depthwise.activation, [&](auto activation) {
              for (int64_t row = r.row_begin; row < r.row_end;) {
                const int64_t image = row / depthwise.out_height, begin = row % depthwise.out_height;
                const int64_t band_end = min_of((begin / kBandRows + 1) * kBandRows, depthwise.out_height);
                const int64_t end = min_of(band_end, begin + r.row_end - row);
                run_panels<decltype(type), Form, decltype(activation)::value>(w, s, image, begin, end, first,
                                                                              first + channels);
                row += end - begin;
              }
            });
          });
        });
      }
  });
  form_means(w.means, cuts, d.batch);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
