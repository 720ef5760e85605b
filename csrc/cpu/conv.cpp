// Dense convolution without an unfolded copy of its input.
//
// The input rows of an output row are stored in float32 as planes, [channel][ring of KH rows][column], with zero
// columns for the padding, whatever layout x has: a contiguous NCHW image needs no conversion of its own. Then the
// window of tap (channel, ky, kx) for neighbouring outputs is a run of constant stride, and a tile of output columns by
// a panel of output channels is summed tap by tap in registers, as in pointwise.cpp. The work is a line of these tiles,
// row after row of all images, and a thread takes a run of it (shares.h).
//
// A channels_last image of more channels than a photograph is another matter: there a row of a window is one run of
// memory, and windows are copied to the rows of a tile (conv_by_windows, in pointwise.cpp), in bfloat16 as pairs.
#include "../sizes.h"
#include "product.h"
#include "shares.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

// acc[Columns][Vecs * kLanes] = windows starting at `first` times the panel. Stride 0: given at run time.
template <int Columns, int Vecs, int Stride>
void multiply(const float* const* taps, const float* __restrict panel, int64_t k, int64_t first, int64_t stride,
              float* __restrict acc) {
  if constexpr (Stride != 0) stride = Stride;
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    Vec sum[Columns][Vecs];
    for (int r = 0; r < Columns; r++)
      for (int v = 0; v < Vecs; v++) sum[r][v] = Vec{};
    for (int64_t i = begin; i < min_of(begin + kBlock, k); i++, panel += kLanes) {
      const float* window = taps[i] + first * stride;
      Vec b[Vecs];
      for (int v = 0; v < Vecs; v++) b[v] = load(panel + v * k * kLanes);
      for (int r = 0; r < Columns; r++) {
        const Vec a = splat(window[r * stride]);
        for (int v = 0; v < Vecs; v++) sum[r][v] += a * b[v];
      }
    }
    add_block<Columns, Vecs>(sum, begin == 0, acc);
  }
}

struct Tile {
  int columns;
  void (*wide)(const float* const*, const float*, int64_t, int64_t, int64_t, float*);
  void (*narrow)(const float* const*, const float*, int64_t, int64_t, int64_t, float*);
};

template <int Columns, int Stride>
constexpr Tile make_tile() {
  return {Columns, multiply<Columns, kPanelVecs, Stride>, multiply<Columns, 1, Stride>};
}

// The tile that computes the fewest columns past the end of a row, the longest first.
template <int Stride>
Tile pick_tile(int64_t out_width) {
  constexpr int kHalf = kRows / 2;
  const Tile all[] = {make_tile<kRows, Stride>(), make_tile<kRows - 2, Stride>(), make_tile<kHalf + 1, Stride>(),
                      make_tile<kHalf, Stride>()};
  Tile best = all[0];
  for (const Tile& tile : all)
    if (round_up(out_width, tile.columns) < round_up(out_width, best.columns)) best = tile;
  return best;
}

#if defined(__AVX512F__)
// Pixels of Channels interleaved values, 2 to 4, to planes, in whole vectors. Returns how many pixels that were.
template <int Channels, class T>
int64_t split_channels(const T* x, int64_t filled, float* row, int64_t plane) {
  __m512i lane[Channels];  // positions of a vector's lanes of one channel among the vectors loaded
  for (int c = 0; c < Channels; c++)
    lane[c] =
        _mm512_add_epi32(_mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(Channels)),
                         _mm512_set1_epi32(c));
  int64_t i = 0;
  for (; i + kLanes <= filled; i += kLanes, x += Channels * kLanes) {
    __m512 v[4];
    for (int j = 0; j < 4; j++) v[j] = __m512(load(x + min_of(j, Channels - 1) * kLanes));
    for (int c = 0; c < Channels; c++) {
      __m512 split = _mm512_permutex2var_ps(v[0], lane[c], v[1]);
      if constexpr (Channels > 2) {
        const __mmask16 later = _mm512_cmpge_epi32_mask(lane[c], _mm512_set1_epi32(2 * kLanes));
        split = _mm512_mask_blend_ps(later, split, _mm512_permutex2var_ps(v[2], lane[c], v[3]));
      }
      store(row + c * plane + i, Vec(split));
    }
  }
  return i;
}
#endif

// An input row to planes. A channels_last image of 3 channels, read one value after the other, would take a fifth of
// the stem.
template <class T>
void fill_row(const ConvParams& p, const T* x, int64_t filled, float* row, int64_t plane) {
  int64_t split = 0;
#if defined(__AVX512F__)
  if (p.x_stride_c == 1 && p.x_stride_w == p.in_channels) {
    if (p.in_channels == 2) split = split_channels<2>(x, filled, row, plane);
    if (p.in_channels == 3) split = split_channels<3>(x, filled, row, plane);
    if (p.in_channels == 4) split = split_channels<4>(x, filled, row, plane);
  }
#endif
  for (int64_t c = 0; c < p.in_channels; c++, x += p.x_stride_c, row += plane) {
    int64_t i = split;
    if (p.x_stride_w == 1)
      for (; i + kLanes <= filled; i += kLanes) store(row + i, load(x + i));
    for (; i < filled; i++) row[i] = to_float(x[i * p.x_stride_w]);
  }
}

// The windows of `count` neighbouring outputs of one row, the first at (top, left) of the image, as [tap][kGathered].
constexpr int kGathered = kRows / 2;

template <class T>
void gather_windows(const ConvParams& p, const T* x, int64_t top, int64_t left, int count, float* windows) {
  for (int64_t c = 0; c < p.in_channels; c++)
    for (int64_t ky = 0; ky < p.kernel_h; ky++)
      for (int64_t kx = 0; kx < p.kernel_w; kx++, windows += kGathered)
        for (int r = 0; r < kGathered; r++) {
          const int64_t iy = top + ky, ix = left + r * p.stride + kx;
          const bool inside = r < count && iy >= 0 && iy < p.height && ix >= 0 && ix < p.width;
          windows[r] = inside ? to_float(x[c * p.x_stride_c + iy * p.x_stride_h + ix * p.x_stride_w]) : 0.f;
        }
}

// Sizes that every thread shares.
struct Work {
  Tile tile;
  bool gathers;  // the windows of each tile
  int64_t columns, filled, ring_rows, row_tiles;
  Line line;
};

Work make_work(const ConvParams& p, int threads) {
  Work w;
  const Tile by_rows = p.stride == 1   ? pick_tile<1>(p.out_width)
                       : p.stride == 2 ? pick_tile<2>(p.out_width)
                                       : make_tile<kRows / 2, 0>();
  w.columns = (round_up(p.out_width, by_rows.columns) - 1) * p.stride + p.kernel_w;
  w.filled = max_of<int64_t>(0, min_of(p.width, w.columns - p.pad_left));
  w.ring_rows = min_of<int64_t>(p.kernel_h, p.height);
  // Rows are read for all tiles of an output row; where they are so long that they would take tens of megabytes (a
  // stride or a padding of thousands), the windows of each tile are gathered instead.
  constexpr int64_t kMostFloats = (int64_t(64) << 20) / int64_t(sizeof(float));
  w.gathers = product({p.in_channels + 1, w.columns, w.ring_rows}) > kMostFloats;
  w.tile = w.gathers ? make_tile<kGathered, 1>() : by_rows;
  w.row_tiles = ceil_div(p.out_width, w.tile.columns);
  const double pixels = double(p.batch * p.out_height * p.out_width);
  const double work = pixels * double(p.out_channels) * double(p.in_channels * p.kernel_h * p.kernel_w);
  w.line = divide_line(p.batch * p.out_height * w.row_tiles, threads_for(threads, work));
  return w;
}

}  // namespace

void conv_by_windows(const ConvParams& p, const Parallel& parallel);  // in pointwise.cpp
Division divide_conv_by_windows(const ConvParams& p, int threads);

Division divide_conv(const ConvParams& p, int threads) {
  return goes_by_windows(p) ? divide_conv_by_windows(p, threads) : describe(make_work(p, threads).line, 1);
}

void conv(const ConvParams& p, const Parallel& parallel) {
  const int64_t k = p.in_channels * p.kernel_h * p.kernel_w, n = p.out_channels;
  if (p.batch == 0) return;
  if (goes_by_windows(p)) return conv_by_windows(p, parallel);
  const Work w = make_work(p, parallel.threads);
  const Tile tile = w.tile;
  const bool gathers = w.gathers;
  const int64_t columns = w.columns, filled = w.filled, ring_rows = w.ring_rows;
  const int64_t plane = gathers ? 0 : columns * ring_rows, panels = ceil_div(n, kPanel);
  const int64_t group = max_of<int64_t>(1, min_of<int64_t>(panels, kPackedBytes / (k * kPanel * 4)));

  for_shares(parallel, w.line.count, [=](int64_t share) {
    const int64_t packed_size = group * k * kPanel;
    const int64_t rows_size = round_up(gathers ? k * kGathered : (p.in_channels + 1) * plane, kLanes);
    const int64_t floats = packed_size + 2 * group * kPanel + kRows * kPanel + rows_size;
    float* packed = static_cast<float*>(scratch(size_t(floats) * sizeof(float) + size_t(k) * sizeof(float*)));
    float *scale = packed + packed_size, *shift = scale + group * kPanel, *acc = shift + group * kPanel;
    float *input = acc + kRows * kPanel, *zeros = input + p.in_channels * plane;
    const float** taps = reinterpret_cast<const float**>(input + rows_size);
    for (int64_t i = 0; i < rows_size; i++) input[i] = 0.f;  // the padding columns and the row of zeros stay so
    for (int64_t g = 0; g < panels; g += group) {
      const int64_t g_end = min_of(g + group, panels);
      for (int64_t q = g; q < g_end; q++)
        pack_panel(p.weight, q * kPanel, int(min_of<int64_t>(kPanel, n - q * kPanel)), k,
                   packed + (q - g) * k * kPanel);
      form_scale_shift(p.norm, g * kPanel, min_of(n, g_end * kPanel) - g * kPanel, scale, shift);
      with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        with_activation(p.activation, [&](auto activation) {
          // Images outside, rows inside: in one loop over rows, a stem of B0 takes 5 % longer (AVX-512, one thread).
          const int64_t of_image = p.out_height * w.row_tiles, end = w.line.end(share);
          for (int64_t at = w.line.begin(share), next; at < end; at = next) {
            const int64_t image = at / of_image, begin = at - image * of_image;
            next = min_of((image + 1) * of_image, end);
            const int64_t row_begin = begin / w.row_tiles, row_end = ceil_div(next - image * of_image, w.row_tiles);
            const T* x = static_cast<const T*>(p.x) + image * p.x_stride_n;
            int64_t loaded = 0;
            for (int64_t oy = row_begin; oy < row_end; oy++) {
              const int64_t first_tile = oy == row_begin ? begin % w.row_tiles : 0;
              const int64_t ox_end = min_of(p.out_width, (next - image * of_image - oy * w.row_tiles) * tile.columns);
              const int64_t top = oy * p.stride - p.pad_top;
              loaded = max_of(loaded, top);
              for (; !gathers && loaded < min_of(top + p.kernel_h, p.height); loaded++)
                fill_row(p, x + loaded * p.x_stride_h, filled, input + loaded % ring_rows * columns + p.pad_left,
                         plane);
              for (int64_t i = 0; i < k; i++) {
                if (gathers) {
                  taps[i] = input + i * kGathered;
                  continue;
                }
                const int64_t kx = i % p.kernel_w, ky = i / p.kernel_w % p.kernel_h, c = i / p.kernel_w / p.kernel_h;
                const int64_t iy = top + ky;
                const bool inside = iy >= 0 && iy < p.height;
                taps[i] = (inside ? input + c * plane + iy % ring_rows * columns : zeros) + kx;
              }
              T* y = static_cast<T*>(p.y) + (image * p.out_height + oy) * p.out_width * n;
              for (int64_t ox = first_tile * tile.columns; ox < ox_end; ox += tile.columns) {
                const int count = int(min_of<int64_t>(tile.columns, p.out_width - ox));
                Row<T> rows[kRows];
                for (int r = 0; r < count; r++) rows[r] = {y + (ox + r) * n, nullptr};
                if (gathers) gather_windows(p, x, top, ox * p.stride - p.pad_left, count, input);
                const int64_t first = gathers ? 0 : ox, stride = gathers ? 1 : p.stride;
                for (int64_t q = g; q < g_end; q++) {
                  const int width = int(min_of<int64_t>(kPanel, n - q * kPanel));
                  (width > kLanes ? tile.wide : tile.narrow)(taps, packed + (q - g) * k * kPanel, k, first, stride,
                                                             acc);
                  write<T, decltype(activation)::value>(acc, rows, count, q * kPanel, width, scale + (q - g) * kPanel,
                                                        shift + (q - g) * kPanel);
                }
              }
            }
          }
        });
      });
    }
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
