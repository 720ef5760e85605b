// Depthwise convolution, norm, activation and pooling in one pass over x and y.
//
// The work is a line of output rows: of a block of channels (64 bytes of x), of all blocks of a band of rows, of all
// bands and images. A thread takes a run of it (shares.h). Within a band and a block the input rows pass through a ring
// of KH rows in float32 (dilated: of (KH - 1) * dilation + 1), each [vector][column][lane] with zero columns for the
// padding, so that the inner loop has no border. An output row is summed in strips of kStrip columns held in
// registers, one vector of channels at a time; norm, activation and pooling follow while the row is in the first-level
// cache. The sums of rows are added in order: the same bits for any number of threads.
#include "depthwise_rows.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

// out[columns][kLanes] = sum over the window rows inside the image, whole strips. Width, Dilation 0: given at run time.
// The loops over a strip are unrolled by order: left alone, GCC cleared eight sums by `rep stos` and kept them on the
// stack, and a 3x3 layer took 40 % longer (AVX-512, one thread).
template <int Width, int Stride, int Dilation, int Strip>
void sum_row(const float* const* rows, const float* const* taps, int row_count, int64_t columns, int64_t width,
             int64_t dilation, float* out) {
  if constexpr (Width != 0) width = Width;
  if constexpr (Dilation != 0) dilation = Dilation;
  for (int64_t first = 0; first < columns; first += Strip, out += Strip * kLanes) {
    Vec sum[Strip];
#pragma GCC unroll 8
    for (int j = 0; j < Strip; j++) sum[j] = Vec{};
    for (int i = 0; i < row_count; i++) {
      const float* row = rows[i] + first * Stride * kLanes;
      for (int64_t kx = 0; kx < width; kx++) {
        const Vec tap = load(taps[i] + kx * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < Strip; j++) sum[j] += tap * load(row + (j * Stride + kx * dilation) * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < Strip; j++) store(out + j * kLanes, sum[j]);
  }
}

// The strip that wastes the fewest columns, the longer one first: 7 for planes of 7, 14, 28, 56, 112.
template <int Width, int Stride>
Strip pick_strip(int64_t out_width, int dilation) {
  constexpr int kDilation = Width != 0;  // Width 0 runs at any dilation
  if (Width != 0 && dilation != 1) return {4, sum_row<Width, Stride, 0, 4>};
  if constexpr (Width > 5) {
    return {4, sum_row<Width, Stride, 1, 4>};
  } else {
    const Strip all[] = {{8, sum_row<Width, Stride, kDilation, 8>},
                         {7, sum_row<Width, Stride, kDilation, 7>},
                         {6, sum_row<Width, Stride, kDilation, 6>},
                         {5, sum_row<Width, Stride, kDilation, 5>},
                         {4, sum_row<Width, Stride, kDilation, 4>}};
    Strip best = all[0];
    for (const Strip& s : all)
      if (round_up(out_width, s.columns) < round_up(out_width, best.columns)) best = s;
    return best;
  }
}

template <int Width>
Strip pick_strip_of(const DepthwiseParams& p) {
  return p.stride == 1 ? pick_strip<Width, 1>(p.out_width, p.dilation) : pick_strip<Width, 2>(p.out_width, p.dilation);
}

// One input row, as float32, into the ring.
template <class T>
void fill_row(const T* x, int64_t stride_w, const Geometry& g, int64_t channels, float* row) {
  for (int64_t v = 0; v * kLanes < channels; v++, x += kLanes, row += g.columns * kLanes) {
    const int64_t n = channels - v * kLanes;
    if (n >= kLanes) {
      for (int64_t i = 0; i < g.filled; i++) store(row + i * kLanes, load(x + i * stride_w));
    } else {
      for (int64_t i = 0; i < g.filled; i++) store(row + i * kLanes, load_first(x + i * stride_w, int(n)));
    }
  }
}

// The same band without a ring, for a window or rows so large that the ring would take tens of megabytes
// (a dilation or a padding of thousands, rows of 100,000 pixels): every tap is read from x. `sum` has room for kRun
// pixels.
constexpr int64_t kRun = 64;

template <class T, Activation A>
void run_band_directly(const DepthwiseParams& p, const Means& means, int64_t image, int64_t row_begin, int64_t row_end,
                       int64_t c0, int64_t channels, const float* weights, const float* scale, const float* shift,
                       float* sum) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const bool whole = is_whole_band(p, row_begin, row_end);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + c0 + c;
    T* y = static_cast<T*>(p.y) + (image * p.out_height + row_begin) * p.out_width * p.channels + c0 + c;
    const int64_t count = min_of<int64_t>(kLanes, channels - c);
    DoubleSum total;
    for (int64_t oy = row_begin; oy < row_end; oy++) {
      DoubleSum row;
      for (int64_t begin = 0; begin < p.out_width; begin += kRun) {
        const int64_t run = min_of(kRun, p.out_width - begin);
        for (int64_t i = 0; i < run; i++) {
          const int64_t top = oy * p.stride - p.pad_top, left = (begin + i) * p.stride - p.pad_left;
          Vec acc = {};
          for (int64_t ky = 0; ky < p.kernel_h; ky++) {
            const int64_t iy = top + ky * p.dilation;
            if (iy < 0 || iy >= p.height) continue;
            for (int64_t kx = 0; kx < p.kernel_w; kx++) {
              const int64_t ix = left + kx * p.dilation;
              if (ix < 0 || ix >= p.width) continue;
              acc += load(weights + c * taps + (ky * p.kernel_w + kx) * kLanes) *
                     load_up_to(x + iy * p.x_stride_h + ix * p.x_stride_w, channels - c);
            }
          }
          store(sum + i * kLanes, acc);
        }
        const Vec by = load(scale + c), plus = load(shift + c);
        if (channels - c >= kLanes)
          write_row<T, A, true>(sum, run, by, plus, y, p.channels, kLanes, row);
        else
          write_row<T, A, false>(sum, run, by, plus, y, p.channels, channels - c, row);
        y += run * p.channels;
      }
      total.add(row);
      if (p.pooled && !whole) means.give_row(image, oy, c0 + c, count, row);
    }
    if (p.pooled && whole) means.give_band(image, row_begin / kBandRows, c0 + c, count, total);
  }
}

// The line of output rows: [image][band][block][row of the band].
struct Rows {
  int64_t out_height, block, channels;

  int64_t blocks() const { return ceil_div(channels, block); }
  struct Place {
    int64_t image, band_begin, band_end, block, row;  // rows of the image
  };
  Place place_of(int64_t unit) const {
    const int64_t of_image = unit % (out_height * blocks());
    const int64_t band_begin = of_image / (kBandRows * blocks()) * kBandRows;
    const int64_t band_end = min_of(band_begin + kBandRows, out_height);
    const int64_t of_band = of_image - band_begin * blocks(), rows = band_end - band_begin;
    return {unit / (out_height * blocks()), band_begin, band_end, of_band / rows, band_begin + of_band % rows};
  }
};

int64_t block_of(const DepthwiseParams& p) {
  return min_of(max_of<int64_t>(kLanes, p.dtype == DType::kFloat32 ? 16 : 32), round_up(p.channels, kLanes));
}

Line divide(const DepthwiseParams& p, int threads) {
  const double work = double(p.batch * p.channels * p.out_height * p.out_width) * double(p.kernel_h * p.kernel_w);
  return divide_line(p.batch * p.out_height * ceil_div(p.channels, block_of(p)), threads_for(threads, work));
}

}  // namespace

Strip pick_strip(const DepthwiseParams& p) {
  switch (p.kernel_w) {
    case 3:
      return pick_strip_of<3>(p);
    case 5:
      return pick_strip_of<5>(p);
    case 7:
      return pick_strip_of<7>(p);
    case 9:
      return pick_strip_of<9>(p);
    default:
      return pick_strip_of<0>(p);
  }
}

Division divide_depthwise(const DepthwiseParams& p, int threads) { return describe(divide(p, threads), 1); }

void depthwise(const DepthwiseParams& p, const Parallel& parallel) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.batch == 0 || p.channels == 0) return;
  const Strip strip = pick_strip(p);
  const Geometry g = make_geometry(p, strip, block_of(p));
  const int64_t blocks = ceil_div(p.channels, g.block), padded = blocks * g.block;
  const bool has_ring = g.fits();
  const Line line = divide(p, parallel.threads);
  const Rows all_rows{p.out_height, g.block, p.channels};
  std::vector<CutBand> cuts;
  for (int64_t share = 1; p.pooled && share < line.count; share++) {
    const Rows::Place at = all_rows.place_of(line.begin(share));
    const int64_t c0 = at.block * g.block, band = at.band_begin / kBandRows;
    const bool known =
        !cuts.empty() && cuts.back().image == at.image && cuts.back().band == band && cuts.back().c0 == c0;
    if (at.row != at.band_begin && !known) cuts.push_back({at.image, band, c0, min_of(g.block, p.channels - c0)});
  }
  MeansMemory memory;
  const Means means = place_means(p, cuts, memory);

  for_shares(parallel, line.count, [=](int64_t share) {
    const int64_t ring_size = has_ring ? g.ring_size() : 0, columns = has_ring ? g.strip_columns : kRun;
    const int64_t floats = padded * (taps + 2) + ring_size + columns * kLanes;
    float* weights = static_cast<float*>(scratch(size_t(floats) * sizeof(float) + size_t(blocks)));
    float *scale = weights + padded * taps, *shift = scale + padded, *ring = shift + padded;
    float* sum = ring + ring_size;
    for (int64_t i = 0; i < ring_size; i++) ring[i] = 0.f;           // the padding columns stay so
    bool* packed = reinterpret_cast<bool*>(sum + columns * kLanes);  // blocks whose weights are here
    for (int64_t i = 0; i < blocks; i++) packed[i] = false;
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      with_activation(p.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        // From the last rows to the first: what the operator before wrote last is still in the cache.
        for (int64_t end = line.end(share); end > line.begin(share);) {
          const Rows::Place last = all_rows.place_of(end - 1);
          const int64_t row_end = last.row + 1, rows = min_of(row_end - last.band_begin, end - line.begin(share));
          const int64_t row_begin = row_end - rows, image = last.image, c0 = last.block * g.block;
          const int64_t channels = min_of(g.block, p.channels - c0);
          end -= rows;
          if (!packed[last.block]) pack_block(p, c0, channels, weights + c0 * taps, scale + c0, shift + c0);
          packed[last.block] = true;
          if (!has_ring) {
            run_band_directly<T, kActivation>(p, means, image, row_begin, row_end, c0, channels, weights + c0 * taps,
                                              scale + c0, shift + c0, sum);
            continue;
          }
          const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + c0;
          run_band<T, kActivation>(p, g, strip, means, image, row_begin, row_end, c0, channels,
                                   {weights + c0 * taps, scale + c0, shift + c0, ring, sum},
                                   [&](int64_t row, int64_t to) {
                                     for (; row < to; row++)
                                       fill_row(x + row * p.x_stride_h, p.x_stride_w, g, channels,
                                                ring + row % g.ring_rows * g.row_size() + p.pad_left * kLanes);
                                     return row;
                                   });
        }
      });
    });
  });
  form_means(means, cuts, p.batch);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
