// The depthwise convolution in training: forward with the statistics of its result, and backward for its input and its
// weight in one pass.
//
// Forward: depthwise_rows.h with a ring that norm and activation fill, so that each is computed once per input element;
// the statistics of a band are taken while it is in the cache.
//
// Backward: a task is one image and one vector of channels. It walks down the output rows. The gradient of a row before
// the norm, dz, is formed as it is loaded and goes into a ring of KH rows, each spread by the stride and set off so
// that the gradient of the input is a convolution of stride 1 by the turned kernel. A second ring has the rows of the
// input after its activation, with their slopes and normalised values. From both the row's part of dweight is summed in
// registers, K taps at a time, and the input rows that no later output row reaches are written. The parts of dweight
// and of the sums are one per image, added in order.
#include "training_steps.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

DepthwiseParams params_of(const DepthwiseShape& s) {
  DepthwiseParams p;
  p.weight = s.weight, p.dtype = s.dtype;
  p.batch = s.batch, p.channels = s.channels, p.height = s.height, p.width = s.width;
  p.out_height = s.out_height, p.out_width = s.out_width;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride = s.stride, p.dilation = 1;
  p.pad_top = s.pad_top, p.pad_left = s.pad_left;
  return p;
}

// dweight of one row of taps: sums[kx] += sum over ox of dz[ox] * input[ox * stride + kx]. Three taps are three chains
// of additions, fewer than the processor has under way; two columns at a time make them six. With a stride of 1 each
// vector of the input is loaded once and stays in a register for all its taps.
template <int Width>
void sum_taps(const float* dz, const float* input, int64_t columns, int64_t stride, int64_t width, Vec* sums) {
  constexpr int kTaps = Width ? Width : kLargestDepthwise;
  constexpr bool kTwoChains = Width == 3;
  if constexpr (Width) width = Width;
  Vec even[kTaps], odd[kTaps];
  for (int kx = 0; kx < kTaps; kx++) even[kx] = Vec{}, odd[kx] = Vec{};
  int64_t ox = 0;
  if constexpr (Width) {
    if (stride == 1) {
      Vec window[kTaps + 1];
      for (int kx = 0; kx < kTaps - 1; kx++) window[kx] = load(input + kx * kLanes);
      for (; ox + 1 < columns; ox += 2) {
        const Vec d = load(dz + ox * kLanes), e = load(dz + (ox + 1) * kLanes);
        for (int kx = kTaps - 1; kx <= kTaps; kx++) window[kx] = load(input + (ox + kx) * kLanes);
        for (int kx = 0; kx < kTaps; kx++) even[kx] += d * window[kx];
        for (int kx = 0; kx < kTaps; kx++) (kTwoChains ? odd : even)[kx] += e * window[kx + 1];
        for (int kx = 0; kx < kTaps - 1; kx++) window[kx] = window[kx + 2];
      }
    }
  }
  if constexpr (kTwoChains) {
    for (; ox + 1 < columns; ox += 2) {
      const Vec d = load(dz + ox * stride * kLanes), e = load(dz + (ox + 1) * stride * kLanes);
      const float *from = input + ox * stride * kLanes, *next = from + stride * kLanes;
      for (int kx = 0; kx < 3; kx++) even[kx] += d * load(from + kx * kLanes), odd[kx] += e * load(next + kx * kLanes);
    }
  }
  for (; ox < columns; ox++) {
    const Vec d = load(dz + ox * stride * kLanes);
    const float* from = input + ox * stride * kLanes;
    for (int64_t kx = 0; kx < width; kx++) even[kx] += d * load(from + kx * kLanes);
  }
  for (int64_t kx = 0; kx < width; kx++) sums[kx] += even[kx] + odd[kx];
}

using SumTaps = void (*)(const float*, const float*, int64_t, int64_t, int64_t, Vec*);
SumTaps pick_sum_taps(int width) {
  return width == 3 ? sum_taps<3> : width == 5 ? sum_taps<5> : width == 7 ? sum_taps<7> : sum_taps<0>;
}

// The sizes of a backward task.
struct Rings {
  int64_t dz_rows, dz_columns, dz_left;  // columns: floats / kLanes
  int64_t rows, columns;                 // of the input's ring
  int64_t out_columns;                   // of a row of the input's gradient, whole strips
  int64_t taps;

  int64_t dz_size() const { return dz_columns * kLanes; }
  int64_t row_size() const { return columns * kLanes; }
  int64_t floats(bool has_norm) const {
    return dz_rows * dz_size() + rows * row_size() * (has_norm ? 3 : 1) + out_columns * kLanes + 3 * taps * kLanes;
  }
};

Rings make_rings(const DepthwiseShape& s, const Strip& strip) {
  Rings r;
  r.taps = int64_t(s.kernel_h) * s.kernel_w;
  r.out_columns = round_up(s.width, strip.columns);
  r.dz_rows = s.kernel_h;
  r.dz_left = s.kernel_w - 1 - s.pad_left;
  r.dz_columns = max_of(r.out_columns + s.kernel_w - 1, (s.out_width - 1) * s.stride + r.dz_left + 1);
  r.rows = s.kernel_h + s.stride;
  r.columns = max_of(s.width + s.pad_left, (s.out_width - 1) * s.stride + s.kernel_w);
  return r;
}

template <class T, Activation Z, Activation A, bool kNorm>
struct BackwardTask {
  const DepthwiseBackwardParams& p;
  const DepthwiseShape& s;
  const Rings& r;
  const Strip& strip;
  SumTaps sum_taps_of_row;
  float *dz_ring, *values, *slopes, *normalised, *row, *turned;
  bool past;  // the gradient goes past the caches
  int64_t image, c, n;
  NormLanes z_norm, norm;
  Vec factor, offset, alpha, beta, delta;
  Vec taps[kLargestDepthwise * kLargestDepthwise];
  DoubleSum total, total_h;

  void load_dz(int64_t oy) {
    const int64_t at = ((image * s.out_height + oy) * s.out_width) * s.channels + c;
    const T *g = static_cast<const T*>(p.g) + at, *z = static_cast<const T*>(p.z) + at;
    float* to = dz_ring + oy % r.dz_rows * r.dz_size() + r.dz_left * kLanes;
    const Vec mean = z_norm.mean, scale = z_norm.scale, bias = z_norm.bias;
    const Vec f = factor, o = offset, a = alpha, b = beta, d = delta;
    const int64_t channels = s.channels, width = s.out_width, step = s.stride * kLanes, count = n;
    const int64_t ahead = oy + 1 < s.out_height ? width * channels : 0;
    for (int64_t ox = 0; ox < width; ox++, g += channels, z += channels, to += step) {
      __builtin_prefetch(g + ahead), __builtin_prefetch(z + ahead);  // of the next row
      const Vec centred = load_up_to(z, count) - mean;
      const Vec dy = (load_up_to(g, count) * f + o) * with_slope<Z>(centred * scale + bias).slope;
      store(to, a * dy + b * centred + d);
    }
  }

  void load_input(int64_t iy) {
    const T* t = static_cast<const T*>(p.t) + ((image * s.height + iy) * s.width) * s.channels + c;
    const int64_t slot = iy % r.rows * r.row_size() + s.pad_left * kLanes;
    const NormLanes lanes = norm;
    float* const value = values + slot;
    const int64_t channels = s.channels, width = s.width, count = n;
    const int64_t ahead = iy + 1 < s.height ? width * channels : 0;
    for (int64_t ix = 0; ix < width; ix++, t += channels) {
      __builtin_prefetch(t + ahead);
      const Vec x = load_up_to(t, count);
      if constexpr (kNorm) {
        const Vec centred = x - lanes.mean;
        const Sloped found = with_slope<A>(centred * lanes.scale + lanes.bias);
        store(value + ix * kLanes, found.value);
        store(slopes + slot + ix * kLanes, found.slope);
        store(normalised + slot + ix * kLanes, centred * lanes.inverse_deviation);
      } else {
        store(value + ix * kLanes, x);
      }
    }
  }

  void sum_weight(int64_t oy) {
    const float* dz = dz_ring + oy % r.dz_rows * r.dz_size() + r.dz_left * kLanes;
    for (int ky = 0; ky < s.kernel_h; ky++) {
      const int64_t iy = oy * s.stride - s.pad_top + ky;
      if (iy < 0 || iy >= s.height) continue;
      sum_taps_of_row(dz, values + iy % r.rows * r.row_size(), s.out_width, s.stride, s.kernel_w,
                      taps + ky * s.kernel_w);
    }
  }

  // The gradient of input row iy, from the rows of dz up to `loaded`.
  void write_row(int64_t iy, int64_t loaded) {
    const float *rows[kLargestDepthwise], *row_taps[kLargestDepthwise];
    int count = 0;
    for (int ky = 0; ky < s.kernel_h; ky++) {
      const int64_t reach = iy + s.pad_top - ky, oy = reach / s.stride;
      if (reach < 0 || reach % s.stride != 0 || oy >= loaded) continue;
      rows[count] = dz_ring + oy % r.dz_rows * r.dz_size();
      row_taps[count++] = turned + ky * s.kernel_w * kLanes;
    }
    strip.sum(rows, row_taps, count, r.out_columns, s.kernel_w, 1, row);
    T* dt = static_cast<T*>(p.dt) + ((image * s.height + iy) * s.width) * s.channels + c;
    if constexpr (!kNorm) {
      for (int64_t ix = 0; ix < s.width; ix++) store_past(dt + ix * s.channels, load(row + ix * kLanes), n, past);
    } else {
      // A row that nothing reads was never loaded, and its gradient is zero.
      const int64_t slot = iy % r.rows * r.row_size() + s.pad_left * kLanes;
      const float *slope = slopes + slot, *h = normalised + slot, *from = row;
      const int64_t channels = s.channels, width = s.width, lanes = n;
      Vec sum = {}, sum_h = {};
      for (int64_t ix = 0; ix < width; ix++) {
        const Vec dy = count ? load(from + ix * kLanes) * load(slope + ix * kLanes) : Vec{};
        store_past(dt + ix * channels, dy, lanes, past);
        sum += dy;
        if (count) sum_h += dy * load(h + ix * kLanes);
      }
      total.add(sum), total_h.add(sum_h);
    }
  }

  void run() {
    for (int64_t i = 0; i < r.taps; i++) taps[i] = Vec{};
    int64_t loaded = 0, written = 0;  // input rows
    for (int64_t oy = 0; oy < s.out_height; oy++) {
      load_dz(oy);
      const int64_t top = oy * s.stride - s.pad_top, end = min_of(top + s.kernel_h, s.height);
      for (loaded = max_of(loaded, max_of<int64_t>(0, top)); loaded < end; loaded++) load_input(loaded);
      sum_weight(oy);
      // Rows above the next window are complete.
      for (const int64_t complete = min_of(top + s.stride, s.height); written < complete; written++)
        write_row(written, oy + 1);
    }
    for (; written < s.height; written++) write_row(written, s.out_height);
  }
};

}  // namespace

void depthwise_train(const DepthwiseTrainParams& q, const Parallel& parallel) {
  DepthwiseParams p = params_of(q.shape);
  p.norm.conv_bias = q.conv_bias, p.y = q.z;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const Strip strip = pick_strip(p);
  const Geometry g = make_geometry(p, strip, max_of<int64_t>(kLanes, p.dtype == DType::kFloat32 ? 16 : 32));
  const int64_t blocks = ceil_div(p.channels, g.block), bands = ceil_div(p.out_height, kBandRows);
  const PartialStatistics partial(p.batch * bands, p.channels);
  float* const memory = partial.memory.get();
  const int64_t vecs = partial.vecs;
  const Means means;  // none
  parallel_for(threads_for(parallel, double(p.batch * p.channels * p.out_height * p.out_width) * double(taps)),
               p.batch * bands * blocks, [=](int64_t begin, int64_t end) {
                 const int64_t floats = g.block * (taps + 2) + g.ring_size() + g.strip_columns * kLanes;
                 float* weights = static_cast<float*>(scratch(size_t(floats) * sizeof(float)));
                 float *scale = weights + g.block * taps, *shift = scale + g.block, *ring = shift + g.block;
                 float* sum = ring + g.ring_size();
                 for (int64_t i = 0; i < g.ring_size(); i++) ring[i] = 0.f;
                 with_type(p.dtype, [&](auto type) {
                   using T = decltype(type);
                   with_activation(q.activation, [&](auto activation) {
                     for (int64_t task = begin; task < end; task++) {
                       const int64_t c0 = task % blocks * g.block, band = task / blocks % bands;
                       const int64_t image = task / (blocks * bands), channels = min_of(g.block, p.channels - c0);
                       pack_block(p, c0, channels, weights, scale, shift);
                       const T* t = static_cast<const T*>(q.t) + image * p.height * p.width * p.channels + c0;
                       const int64_t first = band * kBandRows, rows = min_of<int64_t>(kBandRows, p.out_height - first);
                       run_band<T, Activation::kIdentity>(
                           p, g, strip, means, image, first, first + rows, c0, channels,
                           {weights, scale, shift, ring, sum}, [&](int64_t row, int64_t row_end) {
                             for (; row < row_end; row++) {
                               const T* from = t + row * p.width * p.channels;
                               float* to = ring + row % g.ring_rows * g.row_size() + p.pad_left * kLanes;
                               for (int64_t c = 0; c < channels; c += kLanes, to += g.columns * kLanes) {
                                 const int64_t n = p.channels - c0 - c;
                                 const NormLanes norm = lanes_of(q.norm, c0 + c, n);
                                 for (int64_t i = 0; i < g.filled; i++) {
                                   const Vec x = load_up_to(from + i * p.channels + c, n);
                                   store(to + i * kLanes,
                                         q.norm.mean ? activate<decltype(activation)::value>(apply(norm, x)) : x);
                                 }
                               }
                             }
                             return row;
                           });
                       const T* z =
                           static_cast<const T*>(q.z) + (image * p.out_height + first) * p.out_width * p.channels;
                       for (int64_t c = c0; c < c0 + channels; c += kLanes) {
                         float* to = PartialStatistics::at(memory, vecs, image * bands + band, c / kLanes);
                         partial_statistics(z + c, p.channels, rows * p.out_width, p.channels - c, to, to + 2 * kLanes);
                       }
                     }
                   });
                 });
               });
  const int64_t last = p.out_height - (bands - 1) * kBandRows;
  partial.join(
      p.batch * bands, [&](int64_t part) { return (part % bands == bands - 1 ? last : kBandRows) * p.out_width; },
      q.fold);
}

void depthwise_backward(const DepthwiseBackwardParams& p, const Parallel& parallel) {
  const DepthwiseShape& s = p.shape;
  DepthwiseParams turned_params = params_of(s);
  turned_params.stride = 1, turned_params.out_width = s.width;
  const Strip strip = pick_strip(turned_params);
  const Rings rings = make_rings(s, strip);
  const int64_t vecs = ceil_div(s.channels, kLanes), taps = rings.taps;
  // [image][vector][tap][lane], and [image][2][vector][lane] of the sums.
  const std::unique_ptr<float[]> parts(new float[size_t(s.batch * vecs * taps * kLanes)]);
  const std::unique_ptr<double[]> sums(new double[size_t(s.batch * 2 * vecs * kLanes)]);
  float* const part = parts.get();
  double* const sum = sums.get();
  const SumTaps sum_taps_of_row = pick_sum_taps(s.kernel_w);
  const bool has_norm = p.norm.mean != nullptr;
  const bool past = is_past_caches(p.dt, s.dtype, s.batch * s.height * s.width, s.channels);
  parallel_for(
      threads_for(parallel, double(s.batch * s.channels * s.height * s.width) * double(taps)), s.batch * vecs,
      [=](int64_t begin, int64_t end) {
        const int64_t floats = rings.floats(has_norm);
        float* memory = static_cast<float*>(scratch(size_t(floats) * sizeof(float)));
        for (int64_t i = 0; i < floats; i++) memory[i] = 0.f;  // the columns between and beside the pixels stay so
        const auto take = [&](int64_t size) {
          float* const found = memory;
          memory += size;
          return found;
        };
        float* const dz_ring = take(rings.dz_rows * rings.dz_size());
        float* const values = take(rings.rows * rings.row_size());
        float* const slopes = has_norm ? take(rings.rows * rings.row_size()) : nullptr;
        float* const normalised = has_norm ? take(rings.rows * rings.row_size()) : nullptr;
        float* const row = take(rings.out_columns * kLanes);
        float* const packed = take(taps * kLanes);
        float* const turned = take(taps * kLanes);
        const auto run = [&](auto type, auto z_activation, auto activation, auto norm_tag) {
          using T = decltype(type);
          using Task =
              BackwardTask<T, decltype(z_activation)::value, decltype(activation)::value, decltype(norm_tag)::value>;
          for (int64_t task = begin; task < end; task++) {
            const int64_t image = task / vecs, c = task % vecs * kLanes, n = s.channels - c;
            pack_panel(s.weight, c, int(min_of<int64_t>(kLanes, n)), taps, packed);
            for (int ky = 0; ky < s.kernel_h; ky++)
              for (int kx = 0; kx < s.kernel_w; kx++)
                store(turned + (ky * s.kernel_w + s.kernel_w - 1 - kx) * kLanes,
                      load(packed + (ky * s.kernel_w + kx) * kLanes));
            const float *factor = p.factor ? p.factor + image * s.channels : nullptr,
                        *offset = p.offset ? p.offset + image * s.channels : nullptr;
            Task work{p,
                      s,
                      rings,
                      strip,
                      sum_taps_of_row,
                      dz_ring,
                      values,
                      slopes,
                      normalised,
                      row,
                      turned,
                      past,
                      image,
                      c,
                      n,
                      lanes_of(p.z_norm, c, n),
                      lanes_of(p.norm, c, n),
                      factor ? load_up_to(factor + c, n) : splat(1.f),
                      lanes_of(offset, c, n),
                      lanes_of(p.alpha, c, n),
                      lanes_of(p.beta, c, n),
                      lanes_of(p.delta, c, n),
                      {},
                      {},
                      {}};
            work.run();
            for (int64_t i = 0; i < taps; i++) store(part + (task * taps + i) * kLanes, work.taps[i]);
            double* to = sum + task * 2 * kLanes;
            store(to, work.total.low), store(to + kLanes / 2, work.total.high);
            store(to + kLanes, work.total_h.low), store(to + kLanes + kLanes / 2, work.total_h.high);
          }
        };
        with_type(s.dtype, [&](auto type) {
          with_activation(p.z_activation, [&](auto z_activation) {
            if (!has_norm)
              run(type, z_activation, ActivationTag<Activation::kIdentity>{}, std::false_type{});
            else if (p.activation == p.z_activation)
              run(type, z_activation, z_activation, std::true_type{});
          });
        });
      });
  for (int64_t c = 0; c < s.channels; c++) {
    const int64_t v = c / kLanes, lane = c % kLanes;
    for (int64_t i = 0; i < taps; i++) {
      double value = 0;
      for (int64_t image = 0; image < s.batch; image++) value += part[((image * vecs + v) * taps + i) * kLanes + lane];
      p.dweight[c * taps + i] = float(value);
    }
    if (!p.sums) continue;
    for (int which = 0; which < 2; which++) {
      double value = 0;
      for (int64_t image = 0; image < s.batch; image++) value += sum[((image * vecs + v) * 2 + which) * kLanes + lane];
      p.sums[which * s.channels + c] = value;
    }
  }
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
