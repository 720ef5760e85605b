// What a training block computes per channel, and per image and channel: the gradients of a norm,
// squeeze-and-excitation forward and backward, and the small matrices of the expansion's backward
// (effkernels/ops/training_product.py). One launch each, in place of dozens of operators on vectors;
// squeeze-and-excitation's backward has a second one.
//
// Sums are in double and in a fixed order: a thread adds every so-manieth term, the threads of a warp or a block join
// theirs in order. Everything that is read is small and comes from the L2 cache.
//
// Limits: parameters in float32, float16 or bfloat16; 12288 channels and hidden values of a gate, 16384 channels of a
// product.
#pragma once
#include "numeric.cuh"
#include "training_slope.cuh"
#include "training_vectors.h"

namespace effkernels::cuda {

__device__ __forceinline__ void store_result(const training::Result& result, int64_t at, float value) {
  switch (result.dtype) {
    case DType::kFloat32:
      static_cast<float*>(result.data)[at] = value;
      break;
    case DType::kFloat16:
      static_cast<__half*>(result.data)[at] = from_float<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(result.data)[at] = from_float<__nv_bfloat16>(value);
      break;
  }
}

__device__ __forceinline__ float result_value(const training::Result& result, int64_t at) {
  switch (result.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(result.data)[at];
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(result.data)[at]);
    default:
      return to_float(static_cast<const __nv_bfloat16*>(result.data)[at]);
  }
}

// The running statistics of norms: a thread takes a channel of one.
__global__ void __launch_bounds__(kVectorThreads) training_running(const training::RunningParams p) {
  wait_for_previous();
  allow_next();
  int64_t block = blockIdx.x;
  for (int i = 0; i < p.count; ++i) {
    const training::RunningParams::OfNorm& norm = p.norms[i];
    const int64_t blocks = (norm.channels + kVectorThreads - 1) / kVectorThreads;
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    const int64_t channel = block * kVectorThreads + threadIdx.x;
    if (channel == 0 && norm.count != nullptr) ++*norm.count;
    if (channel >= norm.channels) return;
    const float* const own = norm.vectors + channel;
    const float mean = own[training::kMeanRow * norm.channels], var = own[training::kUnbiasedRow * norm.channels];
    store_result(norm.mean, channel, fmaf(mean, norm.momentum, result_value(norm.mean, channel) * norm.kept));
    store_result(norm.var, channel, fmaf(var, norm.momentum, result_value(norm.var, channel) * norm.kept));
    return;
  }
}

// The sum of the threads of a warp, in all of them.
__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum of all threads of a block, in all of them. `shared`: a double for each warp.
__device__ __forceinline__ double sum_of_block(double value, double* shared) {
  const int warps = blockDim.x / 32;
  value = sum_of_warp(value);
  __syncthreads();  // a sum before this one has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < warps; ++warp) total += shared[warp];
  return total;
}

// A block takes 32 channels, 8 threads share the images of one.
__global__ void __launch_bounds__(kVectorThreads) training_norm_gradient(const training::NormGradientParams p) {
  wait_for_previous();
  allow_next();
  constexpr int kLanes = kVectorThreads / 32;
  double* const shared = dynamic_shared<double>();  // (lanes, 2, 32)
  const int own = threadIdx.x % 32, lane = threadIdx.x / 32;
  const int64_t channel = int64_t(blockIdx.x) * 32 + own, plane = p.images * p.channels;
  const bool all = p.rows > 2;
  const double* const dy = p.sums + (all ? 2 : 0) * plane + channel;
  const double* const dyh = p.sums + (all ? 4 : 1) * plane + channel;
  double sum = 0, sum_h = 0;
  if (channel < p.channels)
    for (int64_t image = lane; image < p.images; image += kLanes) {
      const int64_t at = image * p.channels;
      const double factor = p.factor != nullptr ? p.factor[at + channel] : 1.0;
      sum += factor * dy[at], sum_h += factor * dyh[at];
      if (p.offset == nullptr) continue;
      const double offset = p.offset[at + channel];
      sum += offset * dy[plane + at], sum_h += offset * dyh[plane + at];
    }
  shared[lane * 64 + own] = sum, shared[lane * 64 + 32 + own] = sum_h;
  __syncthreads();
  if (lane > 0 || channel >= p.channels) return;
  for (int other = 1; other < kLanes; ++other) sum += shared[other * 64 + own], sum_h += shared[other * 64 + 32 + own];
  store_result(p.weight, channel, static_cast<float>(sum_h));
  store_result(p.bias, channel, static_cast<float>(sum));
  const double by = p.batch ? static_cast<double>(p.scale[channel]) * (-1.0 / p.pixels) : 0.0;
  p.vectors[channel] = static_cast<float>(sum_h * by) * p.inverse_deviation[channel];
  p.vectors[p.channels + channel] = static_cast<float>(sum * by);
}

// hidden = activation(w_reduce @ means + b_reduce) with its slope: a warp takes a row at a time. Ends with a barrier.
__device__ __forceinline__ void excite_hidden(const training::ExciteParams& p, const float* means, float* hidden,
                                              float* slopes) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t row = threadIdx.x / 32; row < p.reduced; row += warps) {
    double sum = 0;
    for (int64_t channel = lane; channel < p.channels; channel += 32)
      sum += static_cast<double>(parameter(p.w_reduce, row * p.channels + channel, 0.f)) * means[channel];
    sum = sum_of_warp(sum);
    if (lane > 0) continue;
    float value[1] = {static_cast<float>(sum + parameter(p.b_reduce, row, 0.f))}, slope[1];
    activate_with_slope<float>(value, slope, p.activation);
    hidden[row] = value[0];
    if (slopes != nullptr) slopes[row] = slope[0];
  }
  __syncthreads();
}

__device__ __forceinline__ float excite_logit(const training::ExciteParams& p, const float* hidden, int64_t channel) {
  double sum = parameter(p.b_expand, channel, 0.f);
  for (int64_t row = 0; row < p.reduced; ++row)
    sum += static_cast<double>(parameter(p.w_expand, channel * p.reduced + row, 0.f)) * hidden[row];
  return static_cast<float>(sum);
}

// A block takes an image.
__global__ void __launch_bounds__(kVectorThreads) training_excite(const training::ExciteParams p) {
  wait_for_previous();
  allow_next();
  float* const means = dynamic_shared<float>();
  float* const hidden = means + p.channels;
  const int64_t first = int64_t(blockIdx.x) * p.channels;
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += blockDim.x)
    means[channel] = static_cast<float>(p.means[first + channel]);
  __syncthreads();
  excite_hidden(p, means, hidden, nullptr);
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += blockDim.x)
    p.gate[first + channel] = apply_gate(excite_logit(p, hidden, channel), p.gate_activation);
}

// A block takes an image: forward again, then the gradients of the logits, of the hidden values before their activation
// and of the values that were averaged.
__global__ void __launch_bounds__(kVectorThreads) training_excite_backward(const training::ExciteParams p) {
  wait_for_previous();
  allow_next();
  float* const means = dynamic_shared<float>();
  float* const dlogits = means + p.channels;
  float* const hidden = dlogits + p.channels;
  float* const slopes = hidden + p.reduced;
  const int64_t first = int64_t(blockIdx.x) * p.channels, first_row = int64_t(blockIdx.x) * p.reduced;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += blockDim.x)
    means[channel] = static_cast<float>(p.sums[first + channel] / p.pixels);
  __syncthreads();
  excite_hidden(p, means, hidden, slopes);
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += blockDim.x) {
    const float logit = excite_logit(p, hidden, channel);
    float slope;
    if (p.gate_activation == Gate::kSigmoid) {
      const float gate = sigmoid<float>(logit);
      slope = gate * (1.f - gate);
    } else {
      slope = logit > -3.f && logit < 3.f ? 1.f / 6.f : 0.f;
    }
    dlogits[channel] = static_cast<float>(p.gradient[first + channel]) * slope;
    p.dlogits[first + channel] = dlogits[channel];
  }
  __syncthreads();
  for (int64_t row = threadIdx.x / 32; row < p.reduced; row += warps) {
    double sum = 0;
    for (int64_t channel = lane; channel < p.channels; channel += 32)
      sum += static_cast<double>(parameter(p.w_expand, channel * p.reduced + row, 0.f)) * dlogits[channel];
    sum = sum_of_warp(sum);
    if (lane > 0) continue;
    slopes[row] *= static_cast<float>(sum);
    p.dhidden[first_row + row] = slopes[row];
    p.hidden[first_row + row] = hidden[row];
  }
  __syncthreads();
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += blockDim.x) {
    double sum = 0;
    for (int64_t row = 0; row < p.reduced; ++row)
      sum += static_cast<double>(parameter(p.w_reduce, row * p.channels + channel, 0.f)) * slopes[row];
    p.offset[first + channel] = static_cast<float>(sum / p.pixels);
  }
}

// The gradients of the parameters: a block takes 32 channels and 8 hidden values, a thread the sum over the images.
__global__ void __launch_bounds__(kVectorThreads) training_excite_parameters(const training::ExciteParams p) {
  wait_for_previous();
  allow_next();
  constexpr int kRows = kVectorThreads / 32;
  const int64_t groups = (p.channels + 31) / 32;
  const int64_t channel = blockIdx.x % groups * 32 + threadIdx.x % 32;
  const int64_t row = blockIdx.x / groups * kRows + threadIdx.x / 32;
  if (channel >= p.channels || row >= p.reduced) return;
  double reduce = 0, expand = 0, reduce_bias = 0, expand_bias = 0;
#pragma unroll 4
  for (int64_t image = 0; image < p.images; ++image) {
    const double mean = static_cast<float>(p.sums[image * p.channels + channel] / p.pixels);
    const double dlogit = p.dlogits[image * p.channels + channel];
    const double dhidden = p.dhidden[image * p.reduced + row], hidden = p.hidden[image * p.reduced + row];
    reduce += dhidden * mean, expand += dlogit * hidden;
    reduce_bias += dhidden, expand_bias += dlogit;
  }
  store_result(p.dw_reduce, row * p.channels + channel, static_cast<float>(reduce));
  store_result(p.dw_expand, channel * p.reduced + row, static_cast<float>(expand));
  if (row == 0) store_result(p.db_expand, channel, static_cast<float>(expand_bias));
  if (channel == 0) store_result(p.db_reduce, row, static_cast<float>(reduce_bias));
}

// A block takes an input channel.
__global__ void __launch_bounds__(kVectorThreads) training_product_weights(const training::ProductGradientParams p) {
  wait_for_previous();
  allow_next();
  double* const sums = dynamic_shared<double>();                               // of each warp
  float* const column = reinterpret_cast<float*>(sums + kVectorThreads / 32);  // beta * the channel's weights
  const int64_t channel = blockIdx.x;
  double shift = 0;
  for (int64_t out = threadIdx.x; out < p.out_channels; out += blockDim.x) {
    const float weight = parameter(p.weight, out * p.in_channels + channel, 0.f);
    store_result(p.scaled, channel * p.out_channels + out, p.alpha[out] * weight);
    column[out] = p.beta[out] * weight;
    const double of_mean = static_cast<double>(parameter(p.bias, out, 0.f)) - p.mean[out];
    shift += weight * (p.delta[out] + p.beta[out] * of_mean);
  }
  shift = sum_of_block(shift, sums);
  if (threadIdx.x == 0) p.shift[channel] = static_cast<float>(shift);
  for (int64_t other = threadIdx.x; other < p.in_channels; other += blockDim.x) {
    double sum = 0;
#pragma unroll 4
    for (int64_t out = 0; out < p.out_channels; ++out)
      sum += static_cast<double>(column[out]) * parameter(p.weight, out * p.in_channels + other, 0.f);
    store_result(p.middle, channel * p.in_channels + other, static_cast<float>(sum));
  }
}

// A block takes an output channel. With the mean m and the products S of x,
//   dweight = alpha g'x + beta W (S - n m m') + n (delta + beta (W m + b - mean)) m'.
__global__ void __launch_bounds__(kVectorThreads) training_product_gradient(const training::ProductGradientParams p) {
  wait_for_previous();
  allow_next();
  double* const sums = dynamic_shared<double>();
  float* const row = reinterpret_cast<float*>(sums + kVectorThreads / 32);
  const int64_t out = blockIdx.x, first = out * p.in_channels;
  double product = 0;  // W m
  for (int64_t channel = threadIdx.x; channel < p.in_channels; channel += blockDim.x) {
    row[channel] = parameter(p.weight, first + channel, 0.f);
    if (p.batch) product += static_cast<double>(row[channel]) * p.x_mean[channel];
  }
  product = sum_of_block(product, sums);
  const double beta = p.beta[out];
  const double of_mean = p.delta[out] + beta * (product + parameter(p.bias, out, 0.f) - p.mean[out]);
  for (int64_t channel = threadIdx.x; channel < p.in_channels; channel += blockDim.x) {
    double gradient = static_cast<double>(p.alpha[out]) * p.products[first + channel];
    if (p.batch) {
      double sum = 0;
#pragma unroll 4
      for (int64_t other = 0; other < p.in_channels; ++other)
        sum += static_cast<double>(row[other]) * p.squares[other * p.in_channels + channel];
      const double mean = p.x_mean[channel];
      if (!p.centred) sum -= p.pixels * product * mean;
      gradient += beta * sum + p.pixels * of_mean * mean;
    }
    store_result(p.dweight, first + channel, static_cast<float>(gradient));
  }
}

}  // namespace effkernels::cuda
