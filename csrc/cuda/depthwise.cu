// The plan of depthwise_bn_act and its launch.
#include <algorithm>
#include <limits>

#include "depthwise.cuh"

namespace effkernels::cuda {
namespace {

constexpr int64_t kMostPixels = 1 << 29;  // of a plane, a window or a padding: their sums are formed in 32 bits

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int vector_of(DType dtype) { return dtype == DType::kFloat32 ? kVectorOf<float> : kVectorOf<__half>; }

bool vectors_fit(const DepthwiseParams& p, int vector) {
  const auto divides = [vector](int64_t value) { return value % vector == 0; };
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  // The stride of a dimension of size 1 is never used, and may be anything.
  return divides(p.channels) && (p.batch == 1 || divides(p.x_stride_n)) && (p.height == 1 || divides(p.x_stride_h)) &&
         (p.width == 1 || divides(p.x_stride_w)) && aligned(p.x) && aligned(p.y);
}

// Threads along the channels: the largest divisor, so that no thread idles; a fixed 8 where the count has no divisor
// that fills a cache line.
int threads_along_channels(int64_t vectors) {
  for (int count = kMaxChannelVectors; count >= 4; --count)
    if (vectors % count == 0) return count;
  return static_cast<int>(std::min<int64_t>(vectors, 8));
}

}  // namespace

DepthwisePlan plan_depthwise(const DepthwiseParams& p, int multiprocessors) {
  DepthwisePlan plan;
  const int widest = vector_of(p.dtype);
  plan.vector = vectors_fit(p, widest) ? widest : 1;
  plan.unrolled = plan.vector == widest && p.dilation == 1 && (p.stride == 1 || p.stride == 2);
  plan.strip = plan.unrolled ? depthwise_strip(p.kernel, p.stride) : 1;

  const int64_t vectors = divide_up(p.channels, plan.vector);
  plan.channel_vectors = threads_along_channels(vectors);
  plan.channel_groups = static_cast<int>(divide_up(vectors, plan.channel_vectors));

  const int64_t window = int64_t(p.kernel - 1) * p.dilation + 1;
  if (p.out_height * p.out_width > kMostPixels || p.height * p.width > kMostPixels ||
      std::max<int64_t>({window, p.pad_top, p.pad_left}) > kMostPixels) {
    plan.tiles = 0;
    return plan;
  }
  const int64_t strips = divide_up(p.out_width, plan.strip) * p.out_height;
  plan.strips = static_cast<int>(strips);
  plan.out_height = static_cast<int>(p.out_height);
  plan.lanes = static_cast<int>(std::min<int64_t>(kDepthwiseThreads / plan.channel_vectors, strips));
  // More rounds share the prologue (taps, scale and shift) among more pixels, as long as every multiprocessor still
  // has some eight blocks to hide the latency of its loads with.
  const int64_t single_round = p.batch * plan.channel_groups * divide_up(strips, plan.lanes);
  constexpr int64_t kBlocksPerMultiprocessor = 8, kMostRounds = 8;
  plan.rounds = static_cast<int>(
      std::clamp<int64_t>(single_round / (kBlocksPerMultiprocessor * multiprocessors), 1, kMostRounds));
  plan.tiles = static_cast<int>(divide_up(strips, int64_t(plan.lanes) * plan.rounds));
  return plan;
}

const char* launch_depthwise(const DepthwiseParams& p, const DepthwisePlan& plan, float* partial, void* stream) {
  if (p.batch == 0 || p.channels == 0 || p.out_height == 0 || p.out_width == 0) return nullptr;
  if (plan.tiles == 0) return "the image has more pixels than 32-bit indices reach";
  const int64_t blocks = plan.blocks(p.batch);
  if (blocks > std::numeric_limits<int32_t>::max()) return "more blocks than one launch can hold";

  Launch at;
  at.grid = dim3(static_cast<unsigned>(blocks));
  at.block = dim3(plan.channel_vectors, plan.lanes);
  at.shared_bytes = depthwise_shared_bytes(p, plan);
  at.stream = static_cast<cudaStream_t>(stream);

  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = run_depthwise<float>(p, plan, partial, at);
      break;
    case DType::kFloat16:
      error = run_depthwise<__half>(p, plan, partial, at);
      break;
    case DType::kBFloat16:
      error = run_depthwise<__nv_bfloat16>(p, plan, partial, at);
      break;
  }
  if (error == cudaSuccess && p.pooled != nullptr && plan.tiles > 1) {
    constexpr int kThreads = 128;
    const Launch mean{dim3(static_cast<unsigned>(divide_up(p.batch * p.channels, kThreads))), dim3(kThreads), 0,
                      at.stream};
    error = launch(depthwise_mean<kThreads>, mean, p, partial, plan.tiles);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* multiprocessor_count(int device, int* count) {
  constexpr int kDevices = 64;
  static int known[kDevices] = {};  // the same value whoever writes it
  if (device >= 0 && device < kDevices && known[device] != 0) {
    *count = known[device];
    return nullptr;
  }
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device >= 0 && device < kDevices) known[device] = *count;
  return nullptr;
}

}  // namespace effkernels::cuda
