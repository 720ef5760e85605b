// Depthwise convolution, norm, activation and pooling in one pass over x and y.
//
// A task is one image, one band of rows and one block of channels (64 bytes of x). Its input rows pass through a ring
// of KH rows in float32 (dilated: of (KH - 1) * dilation + 1), each [vector][column][lane] with zero columns for the
// padding, so that the inner loop has no border. An output row is summed in strips of kStrip columns held in
// registers, one vector of channels at a time; norm, activation and pooling follow while the row is in the first-level
// cache. Bands are cut by the shape alone and their sums added in order: the same bits for any number of threads.
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
void run_band_directly(const DepthwiseParams& p, const Means& means, int64_t image, int64_t band, int64_t c0,
                       int64_t channels, const float* weights, const float* scale, const float* shift, float* sum) {
  const int64_t taps = p.kernel_h * p.kernel_w, row_end = min_of((band + 1) * kBandRows, p.out_height);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + c0 + c;
    T* y = static_cast<T*>(p.y) + (image * p.out_height + band * kBandRows) * p.out_width * p.channels + c0 + c;
    DoubleSum total;
    for (int64_t oy = band * kBandRows; oy < row_end; oy++)
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
          write_row<T, A, true>(sum, run, by, plus, y, p.channels, kLanes, total);
        else
          write_row<T, A, false>(sum, run, by, plus, y, p.channels, channels - c, total);
        y += run * p.channels;
      }
    if (p.pooled) means.give(image, band, c0 + c, min_of<int64_t>(kLanes, channels - c), total);
  }
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

void depthwise(const DepthwiseParams& p, const Parallel& parallel) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  if (p.batch == 0 || p.channels == 0) return;
  const Strip strip = pick_strip(p);
  const Geometry g = make_geometry(p, strip, max_of<int64_t>(kLanes, p.dtype == DType::kFloat32 ? 16 : 32));
  const int64_t blocks = ceil_div(p.channels, g.block), padded = blocks * g.block;
  const bool has_ring = g.fits();
  std::unique_ptr<double[]> apart;
  const Means means = place_means(p, apart);

  parallel_for(threads_for(parallel, double(p.batch * p.channels * p.out_height * p.out_width) * double(taps)),
               p.batch * means.bands * blocks, [=](int64_t begin, int64_t end) {
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
                     // From the last task to the first: what the operator before wrote last is still in the cache.
                     for (int64_t task = end - 1; task >= begin; task--) {
                       const int64_t c0 = task % blocks * g.block, band = task / blocks % means.bands;
                       const int64_t image = task / (blocks * means.bands), channels = min_of(g.block, p.channels - c0);
                       if (!packed[task % blocks])
                         pack_block(p, c0, channels, weights + c0 * taps, scale + c0, shift + c0);
                       packed[task % blocks] = true;
                       if (!has_ring) {
                         run_band_directly<T, decltype(activation)::value>(
                             p, means, image, band, c0, channels, weights + c0 * taps, scale + c0, shift + c0, sum);
                         continue;
                       }
                       const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + c0;
                       run_band<T, decltype(activation)::value>(
                           p, g, strip, means, image, band, c0, channels,
                           {weights + c0 * taps, scale + c0, shift + c0, ring, sum}, [&](int64_t row, int64_t row_end) {
                             for (; row < row_end; row++)
                               fill_row(x + row * p.x_stride_h, p.x_stride_w, g, channels,
                                        ring + row % g.ring_rows * g.row_size() + p.pad_left * kLanes);
                             return row;
                           });
                     }
                   });
                 });
               });
  form_means(means, p.batch);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
