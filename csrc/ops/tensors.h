// Memory of the adaptors: results, and inputs in a layout that the kernels take.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace effkernels::ops {

using torch::stable::Tensor;

// Keeps the tensors that a params struct points into alive, copies of the caller's where a layout had to change.
using Keep = std::vector<Tensor>;

// A 4-d output (N, C, H, W) with exact channels_last strides, and a matrix (N, C).
Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);
Tensor empty_matrix(const Tensor& like, int64_t n, int64_t c, torch::headeronly::ScalarType dtype);

// A contiguous (N, H, W, C) of like's dtype.
Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t h, int64_t w, int64_t c);

Tensor to_contiguous(const Tensor& t);

// x with channels next to each other; a copy where they are not.
Tensor to_channels_last(const Tensor& x);

// x and its stride from one pixel to the next, row by row; a copy where rows do not follow each other.
Tensor to_rows(const Tensor& x, int64_t& stride_p);

}  // namespace effkernels::ops
