// What the training kernels share: a norm's vectors, an activation with its slope, and partial statistics.
#pragma once
#include <cmath>
#include <memory>

#include "depthwise_rows.h"
#include "training.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

// The norm of a vector of channels.
struct NormLanes {
  Vec mean, inverse_deviation, scale, bias;
};
EFFKERNELS_INLINE Vec lanes_of(const float* p, int64_t c, int64_t n) { return p ? load_up_to(p + c, n) : Vec{}; }
EFFKERNELS_INLINE NormLanes lanes_of(const NormVectors& norm, int64_t c, int64_t n) {
  return {lanes_of(norm.mean, c, n), lanes_of(norm.inverse_deviation, c, n), lanes_of(norm.scale, c, n),
          lanes_of(norm.bias, c, n)};
}
EFFKERNELS_INLINE Vec apply(const NormLanes& norm, Vec t) { return (t - norm.mean) * norm.scale + norm.bias; }

struct Sloped {
  Vec value, slope;
};

// An activation and its derivative, as PyTorch's backward functions have it where the activation has a corner.
template <Activation A>
EFFKERNELS_INLINE Sloped with_slope(Vec x) {
  const Vec one = splat(1.f), zero = Vec{};
  if constexpr (A == Activation::kRelu) return {at_least(0.f, x), x > zero ? one : zero};
  if constexpr (A == Activation::kRelu6) return {clamp(x, 0.f, 6.f), x > zero ? (x < splat(6.f) ? one : zero) : zero};
  if constexpr (A == Activation::kSilu) {
    const Vec s = times_sigmoid(one, x), y = x * s;
    return {y, s + y * (1.f - s)};
  }
  if constexpr (A == Activation::kHardSwish) {
    const Vec slope = x * (1.f / 3.f) + 0.5f;
    return {activate<A>(x), x < splat(-3.f) ? zero : (x > splat(3.f) ? one : slope)};
  }
  if constexpr (A == Activation::kGelu) {
    const Vec a = x < zero ? -x : x, half_tail = 0.5f * erfc_positive(a * 0.707106781f);
    const Vec distribution = x < zero ? half_tail : 1.f - half_tail;
    return {x * distribution, distribution + x * exp2_of_negative(x * x * -0.72134752f) * 0.398942280f};
  }
  if constexpr (A == Activation::kGeluTanh) {
    // From the smaller of s and 1 - s, which loses nothing where s is close to 1 and the factor after it is large.
    const Vec u = 1.59576912f * (x + 0.044715f * x * x * x), tail = times_sigmoid(one, x < zero ? u : -u);
    const Vec s = x < zero ? tail : 1.f - tail;
    return {x * s, s + x * (tail * (1.f - tail)) * (1.59576912f * (1.f + 0.134145f * x * x))};
  }
  return {x, one};
}

// Mean, and sum of squared distances from it, of `pixels` pixels of one vector of channels, `stride` elements apart.
// Two passes over what is in the cache: nothing cancels, however far from zero the mean is.
template <class T>
EFFKERNELS_INLINE void partial_statistics(const T* t, int64_t stride, int64_t pixels, int64_t n, float* mean,
                                          float* squares) {
  Vec a = {}, b = {};
  int64_t i = 0;
  for (; i + 1 < pixels; i += 2) {
    a += load_up_to(t + i * stride, n);
    b += load_up_to(t + (i + 1) * stride, n);
  }
  if (i < pixels) a += load_up_to(t + i * stride, n);
  const Vec middle = (a + b) * (1.f / float(pixels));
  DoubleSum squares_sum, rest_sum;  // of distances from `middle`, which rounding leaves beside the mean
  for (i = 0; i < pixels;) {
    const int64_t end = min_of<int64_t>(i + 8, pixels);
    Vec of_squares = {}, of_rest = {};
    for (; i < end; i++) {
      const Vec d = load_up_to(t + i * stride, n) - middle;
      of_squares += d * d, of_rest += d;
    }
    squares_sum.add(of_squares), rest_sum.add(of_rest);
  }
  double lanes[2][kLanes];
  float sums[kLanes], rests[kLanes];
  store(lanes[0], squares_sum.low), store(lanes[0] + kLanes / 2, squares_sum.high);
  store(lanes[1], rest_sum.low), store(lanes[1] + kLanes / 2, rest_sum.high);
  for (int k = 0; k < kLanes; k++) {
    const double rest = lanes[1][k] / double(pixels), about_mean = lanes[0][k] - lanes[1][k] * rest;
    rests[k] = float(rest), sums[k] = about_mean > 0 ? float(about_mean) : 0.f;
  }
  store_up_to(mean, middle, n);
  store_up_to(squares, load(sums), n);
  store_up_to(mean + kLanes, load(rests), n);
}

// Partial statistics of a batch, in parts cut by the shape alone: [part][vector of channels] of mean, rest of the mean
// and squares. They are joined in order, in double (Chan, Golub and LeVeque 1979, equation 2.1).
struct PartialStatistics {
  std::unique_ptr<float[]> memory;
  int64_t channels = 0, vecs = 0;

  PartialStatistics(int64_t parts, int64_t channels) : channels(channels), vecs(ceil_div(channels, kLanes)) {
    memory.reset(new float[size_t(parts * vecs * 3 * kLanes)]);
  }
  static float* at(float* memory, int64_t vecs, int64_t part, int64_t vec) {
    return memory + (part * vecs + vec) * 3 * kLanes;
  }
  template <class Count>
  void join(int64_t parts, const Count& count_of, const NormFold& fold) const {
    for (int64_t c = 0; c < channels; c++) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t part = 0; part < parts; part++) {
        const float* p = at(memory.get(), vecs, part, c / kLanes) + c % kLanes;
        const double n = double(count_of(part)), m = double(p[0]) + double(p[kLanes]), d = m - mean;
        count += n;
        mean += d * n / count;
        squares += double(p[2 * kLanes]) + d * d * n * (count - n) / count;
      }
      const float var = float(squares / count), inverse = float(1.0 / std::sqrt(double(var + fold.eps)));
      const float rows[] = {float(mean),
                            var,
                            var * fold.unbiased,
                            inverse,
                            inverse * load_param(fold.weight, c, 1, 1.f)[0],
                            load_param(fold.bias, c, 1, 0.f)[0]};
      for (int row = 0; row < kNormRows; row++) fold.vectors[row * channels + c] = rows[row];
    }
  }
};

}  // namespace effkernels::cpu::EFFKERNELS_ISA
