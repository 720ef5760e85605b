// conv_bn_act on CUDA, as the adaptor sees it: plain C++.
#pragma once
#include "device.h"

namespace effkernels::cuda {

// y = activation(norm(x)) over `rows` rows of `channels`, in place or not; norm.conv_bias included.
struct NormActParams {
  const void* x = nullptr;
  void* y = nullptr;
  Norm norm;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t rows = 0, channels = 0;
};

constexpr int kNormActThreads = 256;

struct NormActPlan {
  bool vectors = false;  // 16 bytes of channels per thread
  int threads_x = 1;     // along the channels
  int64_t channel_groups = 1, row_groups = 1;
};
NormActPlan plan_norm_act(const NormActParams& params, const DeviceLimits& limits);
PlannedLaunches planned_launches(const NormActParams& params, const NormActPlan& plan);
const char* launch_norm_act(const NormActParams& params, const NormActPlan& plan, void* stream);
const char* launch_norm_act(const NormActParams& params, const DeviceLimits& limits, void* stream);

// A warp of the fused kernels computes two rows of 16 output pixels, 32 channels at a time.
constexpr int kConvTileWidth = 16, kConvWarpRows = 2, kConvChannels = 32, kConvMostWarps = 8;
constexpr int kConvBlocks = 3;  // of kConvMostWarps warps on a multiprocessor, as the registers allow

// The variants of conv_stem. It reads x in units: the columns of 16 bytes of a plane, of all channels.
constexpr int kStemKernel = 3, kStemStride = 2, kStemChannels = 3;
constexpr int stem_unit(int element_bytes) { return 16 / element_bytes; }
// Units of a window's row, wherever in a unit the first output pixel begins.
constexpr int stem_units(int element_bytes) {
  const int columns = (kConvTileWidth - 1) * kStemStride + kStemKernel;
  return (2 * stem_unit(element_bytes) - 2 + columns) / stem_unit(element_bytes);
}

struct ConvPlan {
  bool fused = false;    // own kernel; else the caller convolves by PyTorch and launches norm_act on its result
  NormActPlan norm_act;  // where not fused, for a result that is aligned

  bool stem = false;       // conv_stem, which reads x by vectors; else conv
  bool planes = false;     // conv_stem: x is stored plane by plane (NCHW); else the channels of a pixel are adjacent
  int x_vector_bytes = 0;  // conv_stem: of x in one load, 16 or 8
  int lead = 0;            // conv_stem: columns from the beginning of a tile's window to its first output pixel

  int warps = 1;
  int taps = 0, padded_taps = 0;            // products of one output; as many as the instructions take
  int padded_channels = 0;                  // output channels, likewise
  int weight_stride = 0;                    // elements from one row of weights in shared memory to the next
  int window_height = 0, window_width = 0;  // of the input that a tile needs
  bool y_vectors = false;                   // 16-byte stores
  int tiles_y = 0, tiles_x = 0;
  int64_t tiles = 0;
  int tiles_per_block = 1;  // neighbours along a row, then the next row
  int64_t blocks = 0;
  int weight_bytes = 0, window_bytes = 0, shared_bytes = 0;
};

ConvPlan plan_conv(const ConvParams& params, const DeviceLimits& limits);
PlannedLaunches planned_launches(const ConvParams& params, const ConvPlan& plan);
const char* launch_conv(const ConvParams& params, const ConvPlan& plan, void* stream);  // plan.fused only

}  // namespace effkernels::cuda
