// The passes of a training block that go over an image element by element: statistics, norm with activation, the sums
// that the gradients of a norm and of a gate need, and the gradient of a norm's input.
//
// A task is a run of pixels, or an image and a block of channels where there are sums per image; which it is follows
// from the shape alone, and what tasks leave behind is added up in order: the same bits for any number of threads.
#include "training_steps.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

constexpr int64_t kPart = 512;  // pixels whose statistics are taken together: in the second-level cache
constexpr int64_t kRunPixels = 64;
constexpr int64_t kSumPixels = 8;  // added in float before they are added in double
constexpr int64_t kBlockVecs = 4;

}  // namespace

void statistics(const StatisticsParams& p, const Parallel& parallel) {
  const int64_t parts = ceil_div(p.pixels, kPart);
  const PartialStatistics partial(parts, p.channels);
  float* const memory = partial.memory.get();
  const int64_t vecs = partial.vecs;
  parallel_for(threads_for(parallel, double(p.pixels) * double(p.channels)), parts, [=](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t part = begin; part < end; part++) {
        const T* t = static_cast<const T*>(p.t) + part * kPart * p.channels;
        const int64_t pixels = min_of(kPart, p.pixels - part * kPart);
        for (int64_t v = 0; v < vecs; v++) {
          float* to = PartialStatistics::at(memory, vecs, part, v);
          partial_statistics(t + v * kLanes, p.channels, pixels, p.channels - v * kLanes, to, to + 2 * kLanes);
        }
      }
    });
  });
  partial.join(parts, [&](int64_t part) { return min_of(kPart, p.pixels - part * kPart); }, p.fold);
}

void norm_act(const NormActParams& p, const Parallel& parallel) {
  const Parallel threads = threads_for(parallel, double(p.batch * p.pixels) * double(p.channels));
  const int64_t vecs = ceil_div(p.channels, kLanes);
  if (!p.y) {  // the means
    parallel_for(threads, p.batch * vecs, [=](int64_t begin, int64_t end) {
      with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        with_activation(p.activation, [&](auto activation) {
          for (int64_t task = begin; task < end; task++) {
            const int64_t image = task / vecs, c = task % vecs * kLanes, n = p.channels - c;
            const NormLanes norm = lanes_of(p.norm, c, n);
            const T* t = static_cast<const T*>(p.t) + image * p.pixels * p.channels + c;
            DoubleSum total;
            for (int64_t i = 0; i < p.pixels; i += kSumPixels) {
              const int64_t stop = min_of(i + kSumPixels, p.pixels);
              Vec sum = {};
              for (int64_t k = i; k < stop; k++)
                sum += activate<decltype(activation)::value>(apply(norm, load_up_to(t + k * p.channels, n)));
              total.add(sum);
            }
            double lanes[kLanes];
            store(lanes, total.low), store(lanes + kLanes / 2, total.high);
            for (int64_t j = 0; j < min_of<int64_t>(kLanes, n); j++)
              p.pooled[image * p.channels + c + j] = lanes[j] / double(p.pixels);
          }
        });
      });
    });
    return;
  }
  const int64_t runs = ceil_div(p.pixels, kRunPixels);
  const bool past = is_past_caches(p.y, p.dtype, p.batch * p.pixels, p.channels);
  parallel_for(threads, p.batch * runs, [=](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      with_activation(p.activation, [&](auto activation) {
        for (int64_t task = begin; task < end; task++) {
          const int64_t image = task / runs, first = task % runs * kRunPixels;
          const int64_t pixels = min_of(kRunPixels, p.pixels - first);
          const int64_t offset = (image * p.pixels + first) * p.channels;
          for (int64_t v = 0; v < vecs; v++) {
            const int64_t c = v * kLanes, n = p.channels - c;
            const NormLanes norm = lanes_of(p.norm, c, n);
            const Vec factor = p.factor ? load_up_to(p.factor + image * p.channels + c, n) : splat(1.f);
            const T *t = static_cast<const T*>(p.t) + offset + c, *residual = static_cast<const T*>(p.residual);
            T* y = static_cast<T*>(p.y) + offset + c;
            if (residual) residual += offset + c;
            for (int64_t i = 0; i < pixels; i++) {
              Vec value = activate<decltype(activation)::value>(apply(norm, load_up_to(t + i * p.channels, n)));
              if (p.factor) value = value * factor;
              if (residual) value += load_up_to(residual + i * p.channels, n);
              store_past(y + i * p.channels, value, n, past);
            }
          }
        }
      });
    });
  });
}

void gradient_sums(const GradientSumsParams& p, const Parallel& parallel) {
  const int64_t vecs = ceil_div(p.channels, kLanes), blocks = ceil_div(vecs, kBlockVecs);
  const int64_t plane = p.batch * p.channels;
  const bool past = is_past_caches(p.y, p.dtype, p.batch * p.pixels, p.channels);
  parallel_for(
      threads_for(parallel, double(p.batch * p.pixels) * double(p.channels)), p.batch * blocks,
      [=](int64_t begin, int64_t end) {
        with_type(p.dtype, [&](auto type) {
          using T = decltype(type);
          with_activation(p.activation, [&](auto activation) {
            for (int64_t task = begin; task < end; task++) {
              const int64_t image = task / blocks, v0 = task % blocks * kBlockVecs;
              const int64_t v1 = min_of(vecs, v0 + kBlockVecs), offset = image * p.pixels * p.channels;
              DoubleSum totals[kBlockVecs][6];
              for (int64_t i = 0; i < p.pixels; i += kSumPixels)
                for (int64_t v = v0; v < v1; v++) {
                  const int64_t c = v * kLanes, n = p.channels - c, stop = min_of(i + kSumPixels, p.pixels);
                  const NormLanes norm = lanes_of(p.norm, c, n);
                  const T *g = static_cast<const T*>(p.g) + offset + c, *t = static_cast<const T*>(p.t) + offset + c;
                  T* to = p.y ? static_cast<T*>(p.y) + offset + c : nullptr;
                  const Vec factor = p.factor ? load_up_to(p.factor + image * p.channels + c, n) : splat(1.f);
                  Vec y = {}, gy = {}, ga = {}, a = {}, gah = {}, ah = {};
                  for (int64_t k = i; k < stop; k++) {
                    const Vec centred = load_up_to(t + k * p.channels, n) - norm.mean;
                    const Vec dy = load_up_to(g + k * p.channels, n), h = centred * norm.inverse_deviation;
                    const Sloped s = with_slope<decltype(activation)::value>(centred * norm.scale + norm.bias);
                    const Vec gs = dy * s.slope;
                    y += s.value, gy += dy * s.value, ga += gs, a += s.slope, gah += gs * h, ah += s.slope * h;
                    if (to) store_past(to + k * p.channels, s.value * factor, n, past);
                  }
                  DoubleSum* total = totals[v - v0];
                  total[0].add(y), total[1].add(gy), total[2].add(ga);
                  total[3].add(a), total[4].add(gah), total[5].add(ah);
                }
              for (int64_t v = v0; v < v1; v++)
                for (int which = 0; which < 6; which++) {
                  double lanes[kLanes];
                  store(lanes, totals[v - v0][which].low), store(lanes + kLanes / 2, totals[v - v0][which].high);
                  double* to = p.sums + which * plane + image * p.channels + v * kLanes;
                  for (int64_t j = 0; j < min_of<int64_t>(kLanes, p.channels - v * kLanes); j++) to[j] = lanes[j];
                }
            }
          });
        });
      });
}

void norm_backward(const NormBackwardParams& p, const Parallel& parallel) {
  const int64_t runs = ceil_div(p.pixels, kRunPixels), vecs = ceil_div(p.channels, kLanes);
  const bool past = is_past_caches(p.dt, p.dtype, p.batch * p.pixels, p.channels);
  parallel_for(threads_for(parallel, double(p.batch * p.pixels) * double(p.channels)), p.batch * runs,
               [=](int64_t begin, int64_t end) {
                 with_type(p.dtype, [&](auto type) {
                   using T = decltype(type);
                   with_activation(p.activation, [&](auto activation) {
                     for (int64_t task = begin; task < end; task++) {
                       const int64_t image = task / runs, first = task % runs * kRunPixels;
                       const int64_t pixels = min_of(kRunPixels, p.pixels - first);
                       const int64_t offset = (image * p.pixels + first) * p.channels;
                       for (int64_t v = 0; v < vecs; v++) {
                         const int64_t c = v * kLanes, n = p.channels - c;
                         const NormLanes norm = lanes_of(p.norm, c, n);
                         const Vec beta = lanes_of(p.beta, c, n), delta = lanes_of(p.delta, c, n);
                         Vec alpha = lanes_of(p.alpha, c, n);
                         if (p.factor) alpha = alpha * load_up_to(p.factor + image * p.channels + c, n);
                         const T* dy = static_cast<const T*>(p.dy) + offset + c;
                         const T* t = static_cast<const T*>(p.t) + offset + c;
                         T* dt = static_cast<T*>(p.dt) + offset + c;
                         for (int64_t i = 0; i < pixels; i++) {
                           const Vec centred = load_up_to(t + i * p.channels, n) - norm.mean;
                           Vec g = load_up_to(dy + i * p.channels, n);
                           if constexpr (decltype(activation)::value != Activation::kIdentity)
                             g = g * with_slope<decltype(activation)::value>(centred * norm.scale + norm.bias).slope;
                           store_past(dt + i * p.channels, alpha * g + beta * centred + delta, n, past);
                         }
                       }
                     }
                   });
                 });
               });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
