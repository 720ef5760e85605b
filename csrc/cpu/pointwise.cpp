// Pointwise convolution as a matrix product: y (M x N) = epilogue(A (M x K) * W^T), W (N x K) as stored.
//
// A thread has some rows by some columns (Grid, in shares.h), walked in tiles of kRows rows by panels of kPanel
// columns. It packs its panels of W (transposed, so that one vector holds kLanes output channels of one k) until they
// fill kPackedBytes, then walks down its rows: a tile of A is converted to float32 and gated once (prepare), then
// multiplied with every packed panel (multiply), then norm, activation and residual are applied as the result is
// written (write). Sums run over k in order: nothing depends on the division.
//
// Images of one pixel, a classifier's, read every weight for next to no arithmetic: packing would cost more than the
// product. There the weights are read as stored, in vectors along k, kLanes output channels at a time of a block of
// kImages images. That goes by the pixels, not by the rows, for the same bits at any batch size.
#include <memory>

#include "memory.h"
#include "tile.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

struct Product {
  int64_t m, n, k;
  int64_t together;  // rows that a share has all or none of
  DType dtype;       // of x and the result
  Param weight;
  const float* packed;
  Norm norm;
  Activation activation;
  bool past;                   // the result goes past the caches
  const void* rows = nullptr;  // x where tiles are read from it as it is (amx.h)
};

Grid divide(const Product& p, int threads) {
  return divide_product(p.m, p.n, p.dtype, p.packed != nullptr,
                        threads_for(threads, double(p.m) * double(p.n) * double(p.k)), p.together);
}

// total += the sums of columns [0, columns) of activation(acc * scale + shift) over row_count rows.
template <class T, Activation A>
inline void add_rows(const float* acc, int row_count, int columns, const float* scale, const float* shift,
                     double* total) {
  const int width = int(round_up(columns, kLanes));
  for (int c = 0; c < columns; c += kLanes) {
    Vec sum = Vec{};
    for (int r = 0; r < row_count; r++)
      sum += activate<A, T>(load(acc + r * width + c) * load(scale + c) + load(shift + c));
    float of_tile[kLanes];
    store(of_tile, sum);
    for (int i = 0; i < kLanes; i++) total[c + i] += of_tile[i];
  }
}

// prepare(form, first_row, row_count, tile, row_step, chunk_step, rows): fills the tile, if there is one, chunk j of
// row r at r * row_step + j * chunk_step, and says where its rows go. Pools: `means` (images, N) gets the means over
// the rows of each image, `together` of them. An image is a thread's alone, its tiles begin at its first row, and their
// sums are added in double: the same bits for any number of threads and of images.
template <class T, class Form, bool Pools, class Prepare>
void matmul(const Product& p, const Parallel& all, const Prepare& prepare, T* means) {
  const int64_t panels = ceil_div(p.n, kPanel);
  const Grid grid = divide(p, all.threads);
  const int64_t words = Form::words(p.k), padded_words = round_up(words, kChunk);
  const int64_t fitting = max_of<int64_t>(1, min_of<int64_t>(panels, kPackedBytes / (words * kPanel * 4)));
  const int64_t group = p.packed ? panels : fitting;

  for_shares(all, grid.count, [=](int64_t share) {
    [[maybe_unused]] const ProductScope scope;
    const int64_t packed_size = p.packed ? 0 : group * words * kPanel, tile_size = kRows * padded_words;
    const int64_t totals = Pools ? group * kPanel : 0, doubled = sizeof(double) / sizeof(float);
    double* total = static_cast<double*>(scratch(
        size_t(doubled * totals + packed_size + tile_size + 2 * group * kPanel + kRows * kPanel) * sizeof(float)));
    float* own = reinterpret_cast<float*>(total + totals);
    float *tile = own + packed_size, *scale = tile + tile_size, *shift = scale + group * kPanel;
    float* acc = shift + group * kPanel;
    for (const Rectangle& r : grid.share(share))
      for (int64_t first = r.channel_begin; first < r.channel_end; first += group * kPanel) {
        const int64_t channels = min_of(group * kPanel, r.channel_end - first);
        const float* packed = p.packed ? p.packed + first * words : own;
        if (!p.packed) pack_panels<Form>(p.weight, first, channels, p.k, own);
        form_scale_shift(p.norm, first, channels, scale, shift);
        with_activation(p.activation, [&](auto activation) {
          // An image at a time, or all rows.
          const int64_t begin = r.row_begin * p.together, end = r.row_end * p.together;
          const int64_t run = Pools ? p.together : end - begin;
          for (int64_t top = begin; top < end; top += run) {
            if (Pools) std::memset(total, 0, size_t(totals) * sizeof(double));
            for (int64_t row = top; row < top + run; row += kRows) {
              const int row_count = int(min_of<int64_t>(kRows, top + run - row));
              Row<T> rows[kRows];
              const bool in_place = kByTiles && p.rows && row_count == kRows;
              prepare(Form{}, row, row_count, in_place ? nullptr : tile, kChunk, kRows * kChunk, rows);
              Operand operand = tile;
              if constexpr (kByTiles)
                if (in_place) operand = {static_cast<const T*>(p.rows) + row * p.k, p.k};
              const Multiply wide = pick_multiply<Form, kPanelVecs>(row_count);
              const Multiply narrow = pick_multiply<Form, 1>(row_count);
              for (int64_t c = 0; c < channels; c += kPanel) {
                const int columns = int(min_of<int64_t>(kPanel, channels - c));
                (columns > kLanes ? wide : narrow)(operand, packed + c * words, words, acc);
                constexpr Activation A = decltype(activation)::value;
                if constexpr (Pools)
                  add_rows<T, A>(acc, row_count, columns, scale + c, shift + c, total + c);
                else
                  write<T, A>(acc, rows, row_count, first + c, columns, scale + c, shift + c, p.past);
              }
            }
            for (int64_t c = 0; Pools && c < channels; c++)
              means[top / p.together * p.n + first + c] = from_float<T>(float(total[c] / double(p.together)));
          }
        });
      }
  });
}

constexpr int kFewRows = 4;                         // multiplied at a time with the weights as stored
constexpr int kFewChannels = kLanes == 16 ? 4 : 2;  // by these: kFewRows * kFewChannels chains
constexpr int kImages = 16;                         // a multiple of kFewRows, kept as float32

// total[r][c] = rows[r] times channel c, lane by lane. Sums of kBlock vectors are added up apart, as in tile.h.
template <class W, int Rows>
EFFKERNELS_INLINE void sum_along_k(const float* rows, int64_t row_size, const W* const* channels, int64_t k,
                                   Vec (&total)[Rows][kFewChannels]) {
  for (int64_t begin = 0; begin < k; begin += kBlock * kLanes) {
    const int64_t end = min_of(begin + kBlock * kLanes, k);
    Vec sum[Rows][kFewChannels];
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < kFewChannels; c++) sum[r][c] = Vec{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      Vec w[kFewChannels];
      for (int c = 0; c < kFewChannels; c++) w[c] = load(channels[c] + i);
      for (int c = 0; c < kFewChannels; c++) __builtin_prefetch(channels[c] + kFewChannels * k + i);  // the next ones
      for (int r = 0; r < Rows; r++) {
        const Vec a = load(rows + r * row_size + i);
        for (int c = 0; c < kFewChannels; c++) sum[r][c] += a * w[c];
      }
    }
    if (i < end)
      for (int c = 0; c < kFewChannels; c++) {
        const Vec w = load_first(channels[c] + i, int(end - i));
        for (int r = 0; r < Rows; r++) sum[r][c] += load(rows + r * row_size + i) * w;
      }
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < kFewChannels; c++) total[r][c] = begin == 0 ? sum[r][c] : total[r][c] + sum[r][c];
  }
}

// acc[Rows][kLanes] = rows[Rows][row_size] * W[n0 .. n0 + kLanes)^T, of W's `columns` channels from n0 on.
template <class W, int Rows>
void multiply_as_stored(const float* rows, int64_t row_size, const W* weight, int64_t n0, int columns, int64_t k,
                        float* acc) {
  Vec sums[Rows][kLanes];
  for (int c0 = 0; c0 < kLanes; c0 += kFewChannels) {
    if (c0 >= columns) {
      for (int r = 0; r < Rows; r++)
        for (int c = 0; c < kFewChannels; c++) sums[r][c0 + c] = Vec{};
      continue;
    }
    const W* channels[kFewChannels];  // those past the last one repeat it: nobody reads their sums
    for (int c = 0; c < kFewChannels; c++) channels[c] = weight + (n0 + min_of(c0 + c, columns - 1)) * k;
    Vec total[Rows][kFewChannels];
    sum_along_k<W, Rows>(rows, row_size, channels, k, total);
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < kFewChannels; c++) sums[r][c0 + c] = total[r][c];
  }
  for (int r = 0; r < Rows; r++) {
    transpose(sums[r]);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; i++) sums[r][i] += sums[r][i + width];
    store(acc + r * kLanes, sums[r][0]);
  }
}

template <class W>
auto pick_multiply_as_stored(int rows) {
  switch (rows) {
    case 1:
      return multiply_as_stored<W, 1>;
    case 2:
      return multiply_as_stored<W, 2>;
    case 3:
      return multiply_as_stored<W, 3>;
    default:
      return multiply_as_stored<W, 4>;
  }
}

// The line of output channels of all blocks of images, in units of kLanes channels; of kFewChannels where those would
// be few for each thread.
struct Columns {
  Line line;
  int64_t unit, of_block;  // channels of a unit; units of a block of images
};
Columns divide_as_stored(const Product& p, int threads) {
  const int used = threads_for(threads, double(p.m) * double(p.n) * double(p.k));
  const int64_t blocks = ceil_div(p.m, kImages);
  const int64_t unit = blocks * ceil_div(p.n, kLanes) >= 8 * used ? kLanes : kFewChannels;
  return {divide_line(blocks * ceil_div(p.n, unit), used), unit, ceil_div(p.n, unit)};
}

// 1280 -> 1000 channels of one image, weights in the third-level cache, AVX-512, two threads: 59 us, packed 153, by
// MKL 197. Of 128 images it takes 20 % longer than packed.
template <class T, class Prepare>
void matmul_as_stored(const Product& p, const Parallel& all, const Prepare& prepare) {
  const Columns columns = divide_as_stored(p, all.threads);
  for_shares(all, columns.line.count, [=](int64_t share) {
    const int64_t row_size = round_up(p.k, kChunk), input_size = min_of<int64_t>(p.m, kImages) * row_size;
    float* input = static_cast<float*>(scratch(size_t(input_size + (kFewRows + 2) * kLanes) * sizeof(float)));
    float *acc = input + input_size, *scale = acc + kFewRows * kLanes, *shift = scale + kLanes;
    int64_t prepared = -1;
    Row<T> rows[kImages];
    with_parameter_type<T>(p.weight.dtype, [&](auto weight_type) {
      using W = decltype(weight_type);
      with_activation(p.activation, [&](auto activation) {
        for (int64_t at = columns.line.begin(share), end = columns.line.end(share); at < end;) {
          const int64_t block = at / columns.of_block, n0 = at % columns.of_block * columns.unit;
          const int64_t units =
              min_of(min_of(kLanes / columns.unit, end - at), columns.of_block - at % columns.of_block);
          const int count = int(min_of(p.m - block * kImages, int64_t(kImages)));
          const int width = int(min_of<int64_t>(units * columns.unit, p.n - n0));
          at += units;
          if (block != prepared) prepare(Floats{}, block * kImages, count, input, row_size, kChunk, rows);
          prepared = block;
          form_scale_shift(p.norm, n0, width, scale, shift);
          for (int r = 0; r < count; r += kFewRows) {
            const int few = min_of(count - r, kFewRows);
            pick_multiply_as_stored<W>(few)(input + r * row_size, row_size, static_cast<const W*>(p.weight.data), n0,
                                            width, p.k, acc);
            write<T, decltype(activation)::value>(acc, rows + r, few, n0, width, scale, shift);
          }
        }
      });
    });
  });
}

Product product_of(const PointwiseParams& p) {
  return {p.batch * p.pixels,
          p.out_channels,
          p.in_channels,
          p.pools ? p.pixels : 1,
          p.dtype,
          p.weight,
          p.packed,
          p.norm,
          p.activation,
          !p.pools && is_past_caches(p.y, p.dtype, p.batch * p.pixels, p.out_channels),
          rows_in_place(p)};
}

Product product_of(const ConvParams& p, const void* turned_weight) {
  return {p.batch * p.out_height * p.out_width,
          p.out_channels,
          p.in_channels * p.kernel_h * p.kernel_w,
          1,
          p.dtype,
          {turned_weight, p.weight.dtype},
          nullptr,
          p.norm,
          p.activation,
          false};
}

}  // namespace

Division divide_pointwise(const PointwiseParams& p, int threads) {
  const Product product = product_of(p);
  if (p.pixels == 1) {
    const Columns columns = divide_as_stored(product, threads);
    return describe(columns.line, columns.unit);
  }
  const Grid grid = divide(product, threads);
  return describe(grid, (p.pools ? grid.rows : ceil_div(grid.rows, kUnitRows)) * grid.units());
}

void pointwise(const PointwiseParams& p, const Parallel& parallel) {
  const Product product = product_of(p);
  if (product.m == 0) return;
  with_operand_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_parameter_type<T>(p.gate.dtype, [&](auto gate_type) {
      using G = decltype(gate_type);
      const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
      const G* gate = static_cast<const G*>(p.gate.data);
      const auto prepare = [=](auto form, int64_t first, int count, float* tile, int64_t row_step, int64_t chunk_step,
                               Row<T>* rows) {
        int64_t image = first / p.pixels, pixel = first % p.pixels;
        for (int r = 0; r < count; r++) {
          if (tile)
            prepare_row<decltype(form)>(x + image * p.x_stride_n + pixel * p.x_stride_p,
                                        gate ? gate + image * p.in_channels : nullptr, p.in_channels,
                                        tile + r * row_step, chunk_step);
          if (!p.pools || p.pixels == 1) rows[r].y = static_cast<T*>(p.y) + (first + r) * p.out_channels;
          rows[r].residual = residual ? residual + image * p.residual_stride_n + pixel * p.residual_stride_p : nullptr;
          if (++pixel == p.pixels) pixel = 0, image++;
        }
      };
      if constexpr (!kByTiles)
        if (p.pixels == 1) return matmul_as_stored<T>(product, parallel, prepare);
      with_form<T>(p.weight, [&](auto form) {
        using Form = decltype(form);
        if (p.pools)
          matmul<T, Form, true>(product, parallel, prepare, static_cast<T*>(p.y));
        else
          matmul<T, Form, false>(product, parallel, prepare, static_cast<T*>(nullptr));
      });
    });
  });
}

// Weights (Cout, Cin, taps) to (Cout, taps, Cin): rows of the order in which a window of a channels_last image is read.
template <class W>
void turn_weights(const ConvParams& p, const Parallel& parallel, W* turned) {
  const int64_t taps = p.kernel_h * p.kernel_w, channels = p.in_channels, k = taps * channels;
  const W* weight = static_cast<const W*>(p.weight.data);
  parallel_for(threads_for(parallel, double(p.out_channels) * double(k)), p.out_channels,
               [=](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; n++)
                   for (int64_t tap = 0; tap < taps; tap++)
                     for (int64_t c = 0; c < channels; c++)
                       turned[n * k + tap * channels + c] = weight[n * k + c * taps + tap];
               });
}

Division divide_conv_by_windows(const ConvParams& p, int threads) {
  const Grid grid = divide(product_of(p, nullptr), threads);
  return describe(grid, ceil_div(grid.rows, kUnitRows) * grid.units());
}

// See conv.cpp. The window of an output pixel is copied to a row, K long, for all panels of output channels.
void conv_by_windows(const ConvParams& p, const Parallel& parallel) {
  const int64_t k = p.in_channels * p.kernel_h * p.kernel_w, pixels = p.out_height * p.out_width;
  const size_t weight_bytes = size_t(p.out_channels * k) * (p.weight.dtype == DType::kFloat32 ? 4 : 2);
  const std::unique_ptr<void, void (*)(void*)> turned(pool().allocate(weight_bytes),
                                                      [](void* data) { pool().release(data); });
  with_type(p.weight.dtype, [&](auto type) { turn_weights(p, parallel, static_cast<decltype(type)*>(turned.get())); });
  const Product product = product_of(p, turned.get());
  with_operand_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(p.x);
    const auto prepare = [=](auto form, int64_t first, int count, float* tile, int64_t row_step, int64_t chunk_step,
                             Row<T>* rows) {
      T window[kLongestWindow];
      const int64_t channels = p.in_channels, run = p.kernel_w * channels;
      int64_t image = first / pixels, oy = first % pixels / p.out_width, ox = first % p.out_width;
      for (int r = 0; r < count; r++) {
        const int64_t top = oy * p.stride - p.pad_top, left = ox * p.stride - p.pad_left;
        // Taps of a row of the window that are inside of the image.
        const int64_t begin = min_of<int64_t>(p.kernel_w, max_of<int64_t>(0, -left));
        const int64_t end = max_of(begin, min_of<int64_t>(p.kernel_w, p.width - left));
        for (int64_t ky = 0; ky < p.kernel_h; ky++) {
          T* to = window + ky * run;
          const int64_t iy = top + ky;
          const bool inside = iy >= 0 && iy < p.height && end > begin;
          const T* from = inside ? x + image * p.x_stride_n + iy * p.x_stride_h + (left + begin) * channels : nullptr;
          const int64_t zeros = inside ? begin * channels : run, copied = inside ? (end - begin) * channels : 0;
          std::memset(static_cast<void*>(to), 0, size_t(zeros) * sizeof(T));
          if (copied) std::memcpy(static_cast<void*>(to + zeros), from, size_t(copied) * sizeof(T));
          std::memset(static_cast<void*>(to + zeros + copied), 0, size_t(run - zeros - copied) * sizeof(T));
        }
        prepare_row<decltype(form)>(window, static_cast<const T*>(nullptr), k, tile + r * row_step, chunk_step);
        rows[r] = {static_cast<T*>(p.y) + (first + r) * p.out_channels, nullptr};
        if (++ox == p.out_width) ox = 0, oy++;
        if (oy == p.out_height) oy = 0, image++;
      }
    };
    with_form<T>(p.weight, [&](auto form) {
      matmul<T, decltype(form), false>(product, parallel, prepare, static_cast<T*>(nullptr));
    });
  });
}

void pack(const PointwiseParams& p, float* packed) {
  with_operand_type(p.dtype, [&](auto type) {
    with_form<decltype(type)>(
        p.weight, [&](auto form) { pack_panels<decltype(form)>(p.weight, 0, p.out_channels, p.in_channels, packed); });
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
