// The two small matrix products of squeeze-and-excitation, and the multiplication by the gate where it is asked for.
#include <memory>

#include "activation.h"
#include "pack.h"
#include "shares.h"

namespace effkernels::cpu::EFFKERNELS_ISA {
namespace {

// Sum over C of pooled[n][c] * w[r][c], four independent sums so that additions do not wait for each other.
template <class T>
float dot(const float* a, const T* b, int64_t count) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) sum[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  for (; i < count; i += kLanes) sum[0] += load_up_to(a + i, count - i) * load_up_to(b + i, count - i);
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

int used_threads(const SqueezeExciteParams& p, int threads) {
  return threads_for(threads, double(p.batch) * double(p.reduced) * double(p.channels));
}

// Of the second product: the images of a vector of channels, of all vectors.
Line divide_gates(const SqueezeExciteParams& p, int threads) {
  return divide_line(p.batch * ceil_div(p.channels, kLanes), used_threads(p, threads));
}

}  // namespace

Division divide_squeeze_excite(const SqueezeExciteParams& p, int threads) {
  return describe(divide_gates(p, threads), p.reduced);
}

void squeeze_excite(const SqueezeExciteParams& p, const Parallel& parallel) {
  if (p.batch == 0 || p.channels == 0) return;
  const int64_t hidden_stride = round_up(p.reduced, kLanes);
  const Line dots = divide_line(p.batch * p.reduced, used_threads(p, parallel.threads));
  const std::unique_ptr<float[]> own(new float[size_t(p.batch * hidden_stride)]());
  float* const hidden = own.get();

  for_shares(parallel, dots.count, [=](int64_t share) {
    with_type(p.w_reduce.dtype, [&](auto type) {
      const auto* weight = static_cast<const decltype(type)*>(p.w_reduce.data);
      for (int64_t task = dots.begin(share), end = dots.end(share); task < end; task++) {
        const int64_t n = task / p.reduced, r = task % p.reduced;
        hidden[n * hidden_stride + r] = dot(p.pooled + n * p.channels, weight + r * p.channels, p.channels);
      }
    });
  });
  parallel_for(Parallel{}, p.batch, [=](int64_t begin, int64_t end) {
    with_activation(p.activation, [&](auto activation) {
      for (int64_t n = begin; n < end; n++)
        for (int64_t r = 0; r < p.reduced; r += kLanes) {
          float* h = hidden + n * hidden_stride + r;
          store(h, activate<decltype(activation)::value>(load(h) + load_param(p.b_reduce, r, p.reduced - r, 0.f)));
        }
    });
  });
  const Line gates = divide_gates(p, parallel.threads);
  for_shares(parallel, gates.count, [=](int64_t share) {
    float* panel = static_cast<float*>(scratch(size_t(p.reduced * kLanes) * sizeof(float)));
    for (int64_t at = gates.begin(share), end = gates.end(share); at < end;) {
      const int64_t block = at / p.batch, first = at % p.batch, images = min_of(p.batch - first, end - at);
      const int64_t c = block * kLanes, channels = min_of<int64_t>(kLanes, p.channels - c);
      at += images;
      pack_panel(p.w_expand, c, int(channels), p.reduced, panel);
      const Vec bias = load_param(p.b_expand, c, channels, 0.f);
      for (int64_t n = first; n < first + images; n++) {
        const float* h = hidden + n * hidden_stride;
        Vec sum[4] = {};
        int64_t r = 0;
        for (; r + 4 <= p.reduced; r += 4)
          for (int j = 0; j < 4; j++) sum[j] += h[r + j] * load(panel + (r + j) * kLanes);
        for (; r < p.reduced; r++) sum[0] += h[r] * load(panel + r * kLanes);
        const Vec gate = apply_gate(p.gate_activation, ((sum[0] + sum[1]) + (sum[2] + sum[3])) + bias);
        with_type(p.gate_dtype, [&](auto type) {
          store_up_to(static_cast<decltype(type)*>(p.gate) + n * p.channels + c, gate, channels);
        });
      }
    }
  });
}

void scale(const ScaleParams& p, const Parallel& parallel) {
  const Parallel threads = threads_for(parallel, double(p.batch) * double(p.pixels) * double(p.channels));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.batch * p.pixels, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        T* y = static_cast<T*>(p.y) + row * p.channels;
        const T* gate = static_cast<const T*>(p.gate) + row / p.pixels * p.channels;
        for (int64_t c = 0; c < p.channels; c += kLanes) {
          const int64_t n = p.channels - c;
          store_up_to(y + c, load_up_to(y + c, n) * load_up_to(gate + c, n), n);
        }
      }
    });
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA
