// Depthwise convolution, norm, activation and pooling in one pass over x and y.
//
// A task is one image, one band of rows and one block of channels (64 bytes of x). Its input rows pass through a ring
// of K rows in float32 (dilated: of (K - 1) * dilation + 1), each [vector][column][lane] with zero columns for the
// padding, so that the inner loop has no border. An output row is summed in strips of kStrip columns held in
// registers, one vector of channels at a time; norm, activation and pooling follow while the row is in the first-level
// cache. Bands are cut by the shape alone and their sums added in order: the same bits for any number of threads.
#include <cstdlib>
#include <new>

#include "activation.h"
#include "pack.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

constexpr int kBandRows = 28;  // 112 rows: four bands, two halo rows each

// out[Strip][kLanes] = sum over the window rows inside the image. Dilation 0: given at run time.
template <int K, int Stride, int Dilation, int Strip>
void sum_strip(const float* const* rows, const float* const* taps, int row_count, int64_t first, int64_t dilation,
               float* out) {
  if constexpr (Dilation != 0) dilation = Dilation;
  Vec sum[Strip];  // cleared by a loop: an initialiser would clear the stack, too
  for (int j = 0; j < Strip; j++) sum[j] = Vec{};
  for (int i = 0; i < row_count; i++) {
    const float* row = rows[i] + first * Stride * kLanes;
    for (int kx = 0; kx < K; kx++) {
      const Vec tap = load(taps[i] + kx * kLanes);
      for (int j = 0; j < Strip; j++) sum[j] += tap * load(row + (j * Stride + kx * dilation) * kLanes);
    }
  }
  for (int j = 0; j < Strip; j++) store(out + j * kLanes, sum[j]);
}

struct Strip {
  int columns;
  void (*sum)(const float* const*, const float* const*, int, int64_t, int64_t, float*);
};

// The strip that wastes the fewest columns, the longer one first: 7 for planes of 7, 14, 28, 56, 112.
template <int K, int Stride>
Strip pick_strip(int64_t out_width, int dilation) {
  if (dilation != 1) return {4, sum_strip<K, Stride, 0, 4>};
  if constexpr (K > 5) {
    return {4, sum_strip<K, Stride, 1, 4>};
  } else {
    const Strip all[] = {{8, sum_strip<K, Stride, 1, 8>},
                         {7, sum_strip<K, Stride, 1, 7>},
                         {6, sum_strip<K, Stride, 1, 6>},
                         {5, sum_strip<K, Stride, 1, 5>},
                         {4, sum_strip<K, Stride, 1, 4>}};
    Strip best = all[0];
    for (const Strip& s : all)
      if (round_up(out_width, s.columns) < round_up(out_width, best.columns)) best = s;
    return best;
  }
}

template <int K>
Strip pick_strip(const DepthwiseParams& p) {
  return p.stride == 1 ? pick_strip<K, 1>(p.out_width, p.dilation) : pick_strip<K, 2>(p.out_width, p.dilation);
}

Strip pick_strip(const DepthwiseParams& p) {  // the adaptor lets only these kernel sizes through
  switch (p.kernel) {
    case 3:
      return pick_strip<3>(p);
    case 5:
      return pick_strip<5>(p);
    case 7:
      return pick_strip<7>(p);
    default:
      return pick_strip<9>(p);
  }
}

// Sizes that every task shares.
struct Geometry {
  int64_t vecs;           // vectors of channels in a block
  int64_t block;          // channels in a block
  int64_t ring_rows;      // input rows held at a time
  int64_t columns;        // of a ring row, padding and the last strip's surplus included
  int64_t filled;         // of them, columns that hold pixels of the image, from pad_left on
  int64_t strip_columns;  // output columns, rounded up to whole strips
  int64_t row_size() const { return columns * vecs * kLanes; }
};

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

// y = activation(sum * scale + shift) for one row and one vector of channels; returns the row's sum of y.
template <class T, Activation A>
Vec write_row(const float* sum, int64_t pixels, Vec scale, Vec shift, T* y, int64_t stride, int64_t channels) {
  Vec total = {};
  if (channels >= kLanes) {
    for (int64_t i = 0; i < pixels; i++) {
      const Vec v = activate<A>(load(sum + i * kLanes) * scale + shift);
      total += v;
      store(y + i * stride, v);
    }
  } else {
    for (int64_t i = 0; i < pixels; i++) {
      const Vec v = activate<A>(load(sum + i * kLanes) * scale + shift);
      total += v;
      store_first(y + i * stride, v, int(channels));
    }
  }
  return total;
}

struct Workspace {
  float *weights, *scale, *shift, *ring, *sum;
};

// Rows [row_begin, row_end) of one image and one block of channels. band_sum: the sum of y per channel, or null.
template <class T, Activation A>
void run_band(const DepthwiseParams& p, const Geometry& g, const Strip& strip, int64_t image, int64_t c0,
              int64_t row_begin, int64_t row_end, const Workspace& w, float* band_sum) {
  const int64_t channels = min_of(g.block, p.channels - c0), span = g.ring_rows, taps = p.kernel * p.kernel;
  const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n + c0;
  T* y = static_cast<T*>(p.y) + (image * p.out_height * p.out_width) * p.channels + c0;
  Vec total[16] = {};
  int64_t loaded = max_of<int64_t>(0, row_begin * p.stride - p.pad_top);  // rows below it are in the ring or unneeded
  for (int64_t oy = row_begin; oy < row_end; oy++) {
    const int64_t top = oy * p.stride - p.pad_top;
    loaded = max_of(loaded, top);
    for (; loaded < min_of(top + span, p.height); loaded++)
      fill_row(x + loaded * p.x_stride_h, p.x_stride_w, g, channels,
               w.ring + loaded % span * g.row_size() + p.pad_left * kLanes);
    for (int64_t v = 0; v * kLanes < channels; v++) {
      const float *rows[9], *row_taps[9];
      int count = 0;
      for (int ky = 0; ky < p.kernel; ky++) {
        const int64_t iy = top + int64_t(ky) * p.dilation;
        if (iy < 0 || iy >= p.height) continue;
        rows[count] = w.ring + iy % span * g.row_size() + v * g.columns * kLanes;
        row_taps[count++] = w.weights + (c0 + v * kLanes) * taps + ky * p.kernel * kLanes;
      }
      for (int64_t ox = 0; ox < g.strip_columns; ox += strip.columns)
        strip.sum(rows, row_taps, count, ox, p.dilation, w.sum + ox * kLanes);
      const int64_t c = v * kLanes;
      total[v] += write_row<T, A>(w.sum, p.out_width, load(w.scale + c0 + c), load(w.shift + c0 + c),
                                  y + oy * p.out_width * p.channels + c, p.channels, channels - c);
    }
  }
  if (band_sum)
    for (int64_t v = 0; v * kLanes < channels; v++)
      store_up_to(band_sum + c0 + v * kLanes, total[v], channels - v * kLanes);
}

}  // namespace

void depthwise(const DepthwiseParams& p, const Parallel& parallel) {
  const int64_t taps = p.kernel * p.kernel, pixels = p.out_height * p.out_width;
  if (p.batch == 0 || p.channels == 0) return;
  const Strip strip = pick_strip(p);
  Geometry g;
  g.block = max_of<int64_t>(kLanes, p.dtype == DType::kFloat32 ? 16 : 32);
  g.vecs = min_of(g.block, round_up(p.channels, kLanes)) / kLanes;
  g.block = g.vecs * kLanes;
  g.ring_rows = int64_t(p.kernel - 1) * p.dilation + 1;
  g.strip_columns = round_up(p.out_width, strip.columns);
  g.columns = (g.strip_columns - 1) * p.stride + g.ring_rows;
  g.filled = max_of<int64_t>(0, min_of(p.width, g.columns - p.pad_left));
  const int64_t bands = ceil_div(p.out_height, kBandRows), blocks = ceil_div(p.channels, g.block);
  const int64_t padded = blocks * g.block;

  float* partial = nullptr;  // [image][band][channel], where more than one band adds to a mean
  if (p.pooled && bands > 1) {
    partial = static_cast<float*>(std::malloc(size_t(p.batch * bands * p.channels) * sizeof(float)));
    if (!partial) throw std::bad_alloc();
  }
  parallel_for(
      threads_for(parallel, p.batch * p.channels * pixels * taps), p.batch * bands * blocks,
      [=](int64_t begin, int64_t end) {
        const int64_t ring_size = g.ring_rows * g.row_size();
        const int64_t floats = padded * (taps + 2) + ring_size + g.strip_columns * kLanes;
        Workspace w;
        w.weights = static_cast<float*>(scratch(size_t(floats) * sizeof(float) + size_t(blocks)));
        w.scale = w.weights + padded * taps;
        w.shift = w.scale + padded;
        w.ring = w.shift + padded;
        w.sum = w.ring + ring_size;
        for (int64_t i = 0; i < ring_size; i++) w.ring[i] = 0.f;                   // the padding columns stay so
        bool* packed = reinterpret_cast<bool*>(w.sum + g.strip_columns * kLanes);  // blocks whose weights are here
        for (int64_t i = 0; i < blocks; i++) packed[i] = false;
        with_type(p.dtype, [&](auto type) {
          with_activation(p.activation, [&](auto activation) {
            // From the last task to the first: what the operator before wrote last is still in the cache.
            for (int64_t task = end - 1; task >= begin; task--) {
              const int64_t c0 = task % blocks * g.block, band = task / blocks % bands, image = task / (blocks * bands);
              if (!packed[task % blocks]) {
                for (int64_t c = c0; c < min_of(c0 + g.block, p.channels); c += kLanes)
                  pack_panel(p.weight, c, int(min_of<int64_t>(kLanes, p.channels - c)), taps, w.weights + c * taps);
                form_scale_shift(p.norm, c0, min_of(g.block, p.channels - c0), w.scale + c0, w.shift + c0);
                packed[task % blocks] = true;
              }
              float* sums = !p.pooled ? nullptr
                            : partial ? partial + (image * bands + band) * p.channels
                                      : p.pooled + image * p.channels;
              run_band<decltype(type), decltype(activation)::value>(
                  p, g, strip, image, c0, band * kBandRows, min_of((band + 1) * kBandRows, p.out_height), w, sums);
            }
          });
        });
      });
  if (!p.pooled) return;
  const float mean = 1.f / float(pixels);
  for (int64_t image = 0; image < p.batch; image++)
    for (int64_t c = 0; c < p.channels; c++) {
      float& pooled = p.pooled[image * p.channels + c];
      if (partial) {
        pooled = 0.f;
        for (int64_t band = 0; band < bands; band++) pooled += partial[(image * bands + band) * p.channels + c];
      }
      pooled *= mean;
    }
  std::free(partial);
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
