// The training operators on CUDA, as the adaptor sees them: plain C++.
#pragma once
#include "../training_params.h"
#include "device.h"
#include "pointwise.h"

namespace effkernels::cuda {

constexpr int kPassThreads = 256;
constexpr int kTrainDepthwiseThreads = 128;

// Blocks of a multiprocessor that the registers of a kernel leave room for.
constexpr int kPassBlocks = 3, kSumsBlocks = 2;
constexpr int kTrainForwardBlocks = 3, kTrainBackwardBlocks = 3;

// The kernels that a depthwise kernel of training is compiled for: square ones of 3 and 5, 0 for all others.
constexpr int trained_kernel(int height, int width, int vector) {
  return vector > 1 && height == width && (height == 3 || height == 5) ? height : 0;
}
// Output pixels of a thread, forward.
constexpr int trained_strip(int compiled, int stride) { return compiled > 0 && stride == 1 ? 7 : 4; }
// Backward a tile's columns are a multiple of this; a thread sums the taps over so many results at a time.
constexpr int kTrainStrip = 4;

// The division of a pass over the pixels of images. A block has the same channels in all of its pixels; its items are
// runs of `chunk` pixels of one image. training_pass.cuh explains the terms.
struct PassPlan {
  int vector = 1;                          // channels per thread
  int channel_vectors = 1;                 // threads along the channels
  int lanes = 1;                           // threads along the pixels
  int channel_groups = 1;                  // blocks along the channels
  int64_t chunk = 1, chunks = 1;           // pixels of an item, items of an image
  int64_t items = 0, items_per_block = 1;  // of the batch; of a block, one after the other
  int64_t tiles = 0;                       // blocks along the items
  int fan = 1;                             // training_statistics: blocks that are joined first
  int64_t shared_bytes = 0;

  int block_channels() const { return channel_vectors * vector; }
};

// The division of a depthwise kernel's work: training_tile.cuh explains the terms.
struct TrainDepthwisePlan {
  int vector = 1, channel_vectors = 1, lanes = 1, channel_groups = 1;  // as those of PassPlan
  int taps = 9;                                                        // of a channel
  int reach_rows = 0, reach_columns = 0;  // backward: results before the own one that an input pixel still reaches
  int columns = 1, column_tiles = 1;      // of a tile, in the units of the kernel; tiles beside each other
  int strips = 1;                         // of a row of a tile
  int rows = 1, bands = 1;                // of a band, likewise; bands below each other
  int step = 1;                           // rows of a step
  int tile_columns = 1, tile_rows = 1;    // of the input's ring, in pixels
  int z_columns = 1, z_rows = 1;          // backward: of the ring of the result's gradient
  int sum_lanes = 1;                      // backward: threads that share the sums of a row of taps
  int64_t items = 0, items_per_block = 1, tiles = 0;
  int fan = 1;  // blocks that are joined first
  int64_t shared_bytes = 0;

  int block_channels() const { return channel_vectors * vector; }
};

// Scratch memory of a launch, and counters that are zero before and after.
struct TrainingWork {
  float* partial = nullptr;
  unsigned* arrivals = nullptr;
};
struct TrainingScratch {
  int64_t partial = 0, arrivals = 0;  // elements
};

// Pure functions of sizes, types, alignments and the limits of the device.
PassPlan plan_statistics(const training::StatisticsParams& params, const DeviceLimits& limits);
PointwisePlan plan_training_product(const training::ProductParams& params, const DeviceLimits& limits);
PassPlan plan_norm_act(const training::NormActParams& params, const DeviceLimits& limits);
PassPlan plan_squeeze(const training::NormActParams& params, const DeviceLimits& limits);
PassPlan plan_gradient_sums(const training::GradientSumsParams& params, const DeviceLimits& limits);
PassPlan plan_norm_backward(const training::NormBackwardParams& params, const DeviceLimits& limits);
// Without tiles where the image has more pixels than 32-bit indices reach.
TrainDepthwisePlan plan_depthwise_train(const training::DepthwiseTrainParams& params, const DeviceLimits& limits);
TrainDepthwisePlan plan_depthwise_backward(const training::DepthwiseBackwardParams& params, const DeviceLimits& limits);

TrainingScratch statistics_scratch(const PassPlan& plan, int64_t channels);
TrainingScratch sums_scratch(const PassPlan& plan, int64_t batch, int64_t channels, int sums);
TrainingScratch depthwise_train_scratch(const TrainDepthwisePlan& plan, int64_t channels);
TrainingScratch depthwise_backward_scratch(const TrainDepthwisePlan& plan, int64_t channels);

constexpr int kGradientSums = 6;  // of an image and channel

// Null, or what CUDA refused.
const char* launch_statistics(const training::StatisticsParams& params, const PassPlan& plan, const TrainingWork& work,
                              void* stream);
const char* launch_training_product(const training::ProductParams& params, const PointwisePlan& plan,
                                    const PointwiseWork& work, void* stream);
const char* launch_norm_act(const training::NormActParams& params, const PassPlan& plan, void* stream);
const char* launch_squeeze(const training::NormActParams& params, const PassPlan& plan, const TrainingWork& work,
                           void* stream);
const char* launch_gradient_sums(const training::GradientSumsParams& params, const PassPlan& plan,
                                 const TrainingWork& work, void* stream);
const char* launch_norm_backward(const training::NormBackwardParams& params, const PassPlan& plan, void* stream);
const char* launch_depthwise_train(const training::DepthwiseTrainParams& params, const TrainDepthwisePlan& plan,
                                   const TrainingWork& work, void* stream);
const char* launch_depthwise_backward(const training::DepthwiseBackwardParams& params, const TrainDepthwisePlan& plan,
                                      const TrainingWork& work, void* stream);

}  // namespace effkernels::cuda
