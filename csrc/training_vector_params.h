// What the training kernels take that work on no pixels: vectors of channels, and matrices of the size of a weight.
// Vectors and matrices are contiguous.
#pragma once
#include "training_params.h"

namespace effkernels::training {

// A result in the type of the parameter whose gradient it is.
struct Result {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// The running statistics of norms after a batch: running = running * (1 - momentum) + statistic * momentum.
constexpr int kMostRunningNorms = 4;
struct RunningParams {
  struct OfNorm {
    Result mean, var;                // (C,)
    const float* vectors = nullptr;  // (kNormRows, C)
    int64_t* count = nullptr;        // batches, one more afterwards; null: not counted
    float momentum = 0.f, kept = 1.f;
    int64_t channels = 0;
  };
  OfNorm norms[kMostRunningNorms];
  int count = 0;
};

// From sums over the pixels of each image to the gradients of a norm's parameters and beta and delta of the gradient of
// its input: of `sums` 6 rows as gradient_sums gives them, or 2, that of dy and that of dy h. With factor and offset,
// (N, C) or null, dy is factor * g a' + offset * a'.
struct NormGradientParams {
  const double* sums = nullptr;  // (rows, N, C)
  int rows = 6;
  const float *factor = nullptr, *offset = nullptr, *scale = nullptr, *inverse_deviation = nullptr;
  double pixels = 1;         // of the batch
  bool batch = true;         // whether the norm uses the statistics of the batch; else beta = delta = 0
  Result weight, bias;       // (C,)
  float* vectors = nullptr;  // (2, C)
  int64_t images = 0, channels = 0;
};

// gate = gate_activation(w_expand @ activation(w_reduce @ means + b_reduce) + b_expand), and its gradients.
struct ExciteParams {
  Param w_reduce, b_reduce, w_expand, b_expand;  // (R, C), (R,), (C, R), (C,)
  Activation activation = Activation::kSilu;
  Gate gate_activation = Gate::kSigmoid;
  int64_t images = 0, channels = 0, reduced = 0;
  const double* means = nullptr;  // (N, C), forward
  float* gate = nullptr;          // (N, C), forward
  // Backward: the first two of the sums that gradient_sums gives, of y and of g y over `pixels` pixels of an image, and
  // the gradient of each of those y.
  const double *sums = nullptr, *gradient = nullptr;  // (N, C)
  double pixels = 1;
  float* offset = nullptr;                                          // (N, C)
  float *hidden = nullptr, *dhidden = nullptr, *dlogits = nullptr;  // scratch: (N, R), (N, R), (N, C)
  Result dw_reduce, db_reduce, dw_expand, db_expand;
};

// The matrices in the backward of t = W x + b and its norm (effkernels/ops/training_product.py).
struct ProductGradientParams {
  Param weight, bias;                                                                // (Cout, Cin), (Cout,)
  const float *mean = nullptr, *alpha = nullptr, *beta = nullptr, *delta = nullptr;  // (Cout,)
  int64_t in_channels = 0, out_channels = 0;
  // The weights by which dz reaches dx: (alpha W)' (Cin, Cout), W' beta W (Cin, Cin), W' (delta + beta (b - mean)).
  Result scaled, middle;
  float* shift = nullptr;  // (Cin,)
  // The gradient of the weight from g'x (Cout, Cin), mean (Cin,) and sum of products (Cin, Cin) of x, which is of
  // x - mean where `centred`. `batch`: as of NormGradientParams.
  const float *products = nullptr, *x_mean = nullptr, *squares = nullptr;
  double pixels = 1;
  bool centred = false, batch = true;
  Result dweight;  // (Cout, Cin)
};

}  // namespace effkernels::training
