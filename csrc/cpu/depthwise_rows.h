// Rows of a depthwise convolution out of a ring of input rows in float32: what depthwise.cpp, which loads the rows, and
// expand_depthwise.cpp, which computes them, share.
#pragma once
#include <array>
#include <memory>

#include "../sizes.h"
#include "activation.h"
#include "pack.h"
#include "shares.h"

namespace effkernels::cpu {

// Output columns summed in registers at a time: sum(rows, taps, row_count, columns of the row, width, dilation, out).
struct Strip {
  int columns;
  void (*sum)(const float* const*, const float* const*, int, int64_t, int64_t, int64_t, float*);
};

namespace EFFKERNELS_ISA {

inline constexpr int kMostVecs = 8;   // of a block of channels
inline constexpr int kBandRows = 28;  // 112 rows: four bands, two halo rows each

// For the kernel's and the output's width, stride and dilation.
Strip pick_strip(const DepthwiseParams& p);  // in depthwise.cpp

// Sizes that every task shares.
struct Geometry {
  int64_t vecs;           // vectors of channels in a block
  int64_t block;          // channels in a block
  int64_t window;         // input rows that an output row reads, those between the taps of a dilated one included
  int64_t ring_rows;      // input rows held at a time
  int64_t columns;        // of a ring row, padding and the last strip's surplus included
  int64_t filled;         // of them, columns that hold pixels of the image, from pad_left on
  int64_t strip_columns;  // output columns, rounded up to whole strips
  int64_t row_size() const { return columns * vecs * kLanes; }
  int64_t ring_size() const { return ring_rows * row_size(); }
  bool fits() const {  // sizes of an absurd call may pass what memory, or 64 bits, hold
    constexpr int64_t kMostFloats = (int64_t(64) << 20) / int64_t(sizeof(float));
    return product({ring_rows, columns, block}) <= kMostFloats && strip_columns <= kMostFloats / kLanes;
  }
};

// For blocks of up to `block` channels, a multiple of kLanes; the ring holds one window, or the whole image.
inline Geometry make_geometry(const DepthwiseParams& p, const Strip& strip, int64_t block) {
  Geometry g;
  g.vecs = min_of(block, round_up(p.channels, kLanes)) / kLanes;
  g.block = g.vecs * kLanes;
  g.window = int64_t(p.kernel_h - 1) * p.dilation + 1;
  g.ring_rows = min_of(g.window, p.height);
  g.strip_columns = round_up(p.out_width, strip.columns);
  g.columns = (g.strip_columns - 1) * p.stride + int64_t(p.kernel_w - 1) * p.dilation + 1;
  g.filled = max_of<int64_t>(0, min_of(p.width, g.columns - p.pad_left));
  return g;
}

// The sum of a vector's lanes in double: its error does not grow with the number of addends.
struct DoubleSum {
  HalfVec low = {}, high = {};  // the first half of the lanes, the second
  EFFKERNELS_INLINE void add(Vec v) { low += low_half(v), high += high_half(v); }
  EFFKERNELS_INLINE void add(const DoubleSum& other) { low += other.low, high += other.high; }
};

// y = activation(sum * scale + shift) of a row of pixels, for a whole vector of channels or the first `channels` of
// one. The row is added to `total`: in float up to 16 of them, by four sums that take turns and meet in a tree, so that
// a chain has four links (equal values are added without rounding) and costs no more than one of 16; then in double.
// The loop is not unrolled: with four activations in flight B0's depthwise layers take 5 % longer, with the sums taking
// turns 2 % longer than with one chain for a whole row (AVX-512, one thread).
template <class T, Activation A, bool kWhole>
EFFKERNELS_INLINE void write_row(const float* sum, int64_t pixels, Vec scale, Vec shift, T* y, int64_t stride,
                                 int64_t channels, DoubleSum& total) {
  for (int64_t i = 0; i < pixels;) {
    Vec a = {}, b = {}, c = {}, d = {};
    const int64_t end = min_of<int64_t>(i + 16, pixels);
#pragma GCC unroll 1
    for (; i < end; i++) {
      const Vec v = activate<A, T>(load(sum + i * kLanes) * scale + shift);
      if constexpr (kWhole)
        store(y + i * stride, v);
      else
        store_first(y + i * stride, v, int(channels));
      const Vec next = a + v;
      a = b, b = c, c = d, d = next;
    }
    total.add((a + b) + (c + d));
  }
}

// The means of y per channel: the sums of a band's rows are added in order, then those of an image's bands. The thread
// that has a whole band adds up its rows as it goes. A band that the division cuts leaves the sums of its rows apart,
// and form_means adds those in the same order: the same bits for any number of threads. Where an image is one band that
// nobody cut, its mean is written at once.
struct Means {
  float* pooled = nullptr;        // null where no mean is asked for
  double* bands_apart = nullptr;  // [image][band][channel]
  double* rows_apart = nullptr;   // [image][row][channel], of cut bands alone
  int64_t bands = 1, channels = 0, out_height = 0;
  double per_pixel = 0;

  void give_band(int64_t image, int64_t band, int64_t c0, int64_t count, const DoubleSum& sum) const {
    double lanes[kLanes];
    store(lanes, sum.low), store(lanes + kLanes / 2, sum.high);
    for (int64_t i = 0; i < count; i++) give_band(image, band, c0 + i, lanes[i]);
  }
  void give_band(int64_t image, int64_t band, int64_t c, double sum) const {
    if (bands == 1)
      pooled[image * channels + c] = float(sum * per_pixel);
    else
      bands_apart[(image * bands + band) * channels + c] = sum;
  }
  void give_row(int64_t image, int64_t row, int64_t c0, int64_t count, const DoubleSum& sum) const {
    double lanes[kLanes];
    store(lanes, sum.low), store(lanes + kLanes / 2, sum.high);
    std::memcpy(rows_apart + (image * out_height + row) * channels + c0, lanes, size_t(count) * sizeof(double));
  }
};

// Channels [c0, c0 + count) of a band that no thread has as a whole.
struct CutBand {
  int64_t image, band, c0, count;
  std::array<int64_t, 4> key() const { return {image, band, c0, count}; }
  bool operator<(const CutBand& other) const { return key() < other.key(); }
  bool operator==(const CutBand& other) const { return key() == other.key(); }
};

// The memory of Means.
struct MeansMemory {
  std::unique_ptr<double[]> bands, rows;
};
inline Means place_means(const DepthwiseParams& p, const std::vector<CutBand>& cuts, MeansMemory& memory) {
  const int64_t bands = ceil_div(p.out_height, kBandRows);
  if (p.pooled && bands > 1) memory.bands.reset(new double[size_t(p.batch * bands * p.channels)]);
  if (p.pooled && !cuts.empty()) memory.rows.reset(new double[size_t(p.batch * p.out_height * p.channels)]);
  return {p.pooled,
          memory.bands.get(),
          memory.rows.get(),
          bands,
          p.channels,
          p.out_height,
          1. / (double(p.out_height) * double(p.out_width))};
}
inline void form_means(const Means& m, const std::vector<CutBand>& cuts, int64_t batch) {
  if (!m.pooled) return;
  for (const CutBand& cut : cuts) {
    const int64_t row_end = min_of((cut.band + 1) * kBandRows, m.out_height);
    const double* const first = m.rows_apart + cut.image * m.out_height * m.channels;
    constexpr int64_t kRun = 64;
    for (int64_t c = cut.c0; c < cut.c0 + cut.count; c += kRun) {
      const int64_t count = min_of(kRun, cut.c0 + cut.count - c);
      double sums[kRun] = {};
      for (int64_t row = cut.band * kBandRows; row < row_end; row++)
        for (int64_t i = 0; i < count; i++) sums[i] += first[row * m.channels + c + i];
      for (int64_t i = 0; i < count; i++) m.give_band(cut.image, cut.band, c + i, sums[i]);
    }
  }
  if (m.bands == 1) return;
  for (int64_t image = 0; image < batch; image++)
    for (int64_t c = 0; c < m.channels; c++) {
      double sum = 0;
      for (int64_t band = 0; band < m.bands; band++) sum += m.bands_apart[(image * m.bands + band) * m.channels + c];
      m.pooled[image * m.channels + c] = float(sum * m.per_pixel);
    }
}

// A block of channels: its packed weights [vector][tap][lane], its norm, the ring [row][vector][column][lane] with
// zeros in the padding columns, and room for one row of sums of one vector.
struct Block {
  const float *weights, *scale, *shift;
  float *ring, *sum;
};

inline void pack_block(const DepthwiseParams& p, int64_t c0, int64_t channels, float* weights, float* scale,
                       float* shift) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t c = 0; c < channels; c += kLanes)
    pack_panel(p.weight, c0 + c, int(min_of<int64_t>(kLanes, channels - c)), taps, weights + c * taps);
  form_scale_shift(p.norm, c0, channels, scale, shift);
}

// Input rows [begin, end) that output rows [row_begin, row_end) read.
struct InputRows {
  int64_t begin, end;
};
inline InputRows rows_of_band(const DepthwiseParams& p, const Geometry& g, int64_t row_begin, int64_t row_end) {
  const int64_t begin = max_of<int64_t>(0, row_begin * p.stride - p.pad_top);
  return {begin, min_of(p.height, (row_end - 1) * p.stride - p.pad_top + g.window)};
}

inline bool is_whole_band(const DepthwiseParams& p, int64_t row_begin, int64_t row_end) {
  return row_begin % kBandRows == 0 && (row_end == p.out_height || row_end - row_begin == kBandRows);
}

// Output rows [row_begin, row_end) of one image, of one band, and `channels` channels from c0 on, at most a block.
// fill(begin, end) is asked for input rows, ever larger ones, and returns the row up to which it filled the ring: end
// or, where the ring has room, beyond it.
template <class T, Activation A, class Fill>
inline void run_band(const DepthwiseParams& p, const Geometry& g, const Strip& strip, const Means& means, int64_t image,
                     int64_t row_begin, int64_t row_end, int64_t c0, int64_t channels, const Block& block,
                     const Fill& fill) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  T* y = static_cast<T*>(p.y) + (image * p.out_height * p.out_width) * p.channels + c0;
  const bool whole = is_whole_band(p, row_begin, row_end);
  DoubleSum total[kMostVecs];
  int64_t loaded = rows_of_band(p, g, row_begin, row_end).begin;  // rows below it are in the ring or unneeded
  for (int64_t oy = row_begin; oy < row_end; oy++) {
    const int64_t top = oy * p.stride - p.pad_top, end = min_of(top + g.window, p.height);
    if (loaded < end) loaded = fill(loaded, end);
    for (int64_t v = 0; v * kLanes < channels; v++) {
      const float *rows[kLargestDepthwise], *row_taps[kLargestDepthwise];
      int count = 0;
      for (int ky = 0; ky < p.kernel_h; ky++) {
        const int64_t iy = top + int64_t(ky) * p.dilation;
        if (iy < 0 || iy >= p.height) continue;
        rows[count] = block.ring + iy % g.ring_rows * g.row_size() + v * g.columns * kLanes;
        row_taps[count++] = block.weights + v * kLanes * taps + ky * p.kernel_w * kLanes;
      }
      strip.sum(rows, row_taps, count, g.strip_columns, p.kernel_w, p.dilation, block.sum);
      const int64_t c = v * kLanes;
      const Vec scale = load(block.scale + c), shift = load(block.shift + c);
      T* const to = y + oy * p.out_width * p.channels + c;
      DoubleSum row;
      if (channels - c >= kLanes)
        write_row<T, A, true>(block.sum, p.out_width, scale, shift, to, p.channels, kLanes, row);
      else
        write_row<T, A, false>(block.sum, p.out_width, scale, shift, to, p.channels, channels - c, row);
      if (whole)
        total[v].add(row);
      else if (p.pooled)
        means.give_row(image, oy, c0 + c, min_of<int64_t>(kLanes, channels - c), row);
    }
  }
  if (p.pooled && whole)
    for (int64_t v = 0; v * kLanes < channels; v++)
      means.give_band(image, row_begin / kBandRows, c0 + v * kLanes, min_of<int64_t>(kLanes, channels - v * kLanes),
                      total[v]);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels::cpu
