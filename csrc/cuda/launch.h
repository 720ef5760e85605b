// What the adaptors call: the CUDA kernels behind plain C++, so that no torch header meets a CUDA header.
// Every function that launches returns null, or says what CUDA refused.
#pragma once
#include <cstdint>

#include "params.h"

namespace effkernels::cuda {

// How depthwise_bn_act cuts its work: see depthwise.cuh for what the words mean.
struct DepthwisePlan {
  int vector = 1;           // channels per thread
  int channel_vectors = 1;  // threads along the channels
  int lanes = 1;            // threads along the strips of output pixels
  int strip = 1;            // output pixels per thread and round, along a row
  int rounds = 1;           // strips per thread, one after the other
  bool unrolled = false;    // kernel size, stride and dilation known at compile time
  int strips = 1;           // strips of one image
  int out_height = 1;       // rows of one image: how many strips lie below each other
  int channel_groups = 1;   // blocks along the channels
  int tiles = 1;            // blocks along the strips of one image

  int64_t blocks(int64_t batch) const { return batch * tiles * channel_groups; }
  // Rows of channel sums that the caller provides for `pooled`: float32 (batch * tiles, channels). None for one tile.
  int64_t partial_rows(int64_t batch) const { return tiles > 1 ? batch * tiles : 0; }
};

// Output pixels per thread: 8 use every tap in registers 8 times; a stride of 2 or a large kernel needs so many input
// columns and taps at once that 4 are left.
constexpr int depthwise_strip(int kernel, int stride) { return kernel >= 7 || stride > 1 ? 4 : 8; }

// A pure function of the shapes, the alignment of the pointers and the number of multiprocessors. A plane of 2^31
// pixels or more gives a plan of 0 tiles, which launch_depthwise refuses.
DepthwisePlan plan_depthwise(const DepthwiseParams& params, int multiprocessors);

// `partial`: what partial_rows() asks for, where params.pooled is given; else null.
const char* launch_depthwise(const DepthwiseParams& params, const DepthwisePlan& plan, float* partial, void* stream);

// Null on success; asked once per device.
const char* multiprocessor_count(int device, int* count);

}  // namespace effkernels::cuda
