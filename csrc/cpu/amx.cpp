// The level amx_bf16: products of bfloat16 by tiles where that pays (amx.h), all else by the kernels of avx512_bf16.
#include "amx.h"

#include "depthwise_rows.h"
#include "training.h"

namespace effkernels::cpu {

namespace avx512_bf16 {
Strip pick_strip(const DepthwiseParams&);
extern const Kernels table;
}  // namespace avx512_bf16
namespace avx512 {
extern const TrainingKernels training;
}

namespace EFFKERNELS_ISA {

void pointwise(const PointwiseParams&, const Parallel&);
void expand_depthwise(const ExpandDepthwiseParams&, const Parallel&);
void conv_by_windows(const ConvParams&, const Parallel&);
void pack(const PointwiseParams&, float*);
Division divide_pointwise(const PointwiseParams&, int);
Division divide_expand_depthwise(const ExpandDepthwiseParams&, int);
Division divide_conv_by_windows(const ConvParams&, int);

namespace {
const Kernels& vectors = avx512_bf16::table;
}

// expand_depthwise.cpp calls these, too.
Strip pick_strip(const DepthwiseParams& p) { return avx512_bf16::pick_strip(p); }
void depthwise(const DepthwiseParams& p, const Parallel& all) { vectors.depthwise(p, all); }
Division divide_depthwise(const DepthwiseParams& p, int threads) { return vectors.divisions.depthwise(p, threads); }

namespace {

bool by_tiles(const PointwiseParams& p) {
  return p.dtype == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16 &&
         pays_by_tiles(p.pixels, p.out_channels, p.in_channels);
}
bool by_tiles(const ExpandDepthwiseParams& p) { return by_tiles(p.expand); }
bool by_tiles(const ConvParams& p) {
  return p.dtype == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16 && goes_by_windows(p) &&
         pays_by_tiles(p.out_height * p.out_width, p.out_channels, p.in_channels * p.kernel_h * p.kernel_w);
}

constexpr Divisions divisions{
    divide_depthwise,
    [](const SqueezeExciteParams& p, int threads) { return vectors.divisions.squeeze_excite(p, threads); },
    [](const PointwiseParams& p, int threads) {
      return (by_tiles(p) ? divide_pointwise : vectors.divisions.pointwise)(p, threads);
    },
    [](const ExpandDepthwiseParams& p, int threads) {
      return (by_tiles(p) ? divide_expand_depthwise : vectors.divisions.expand_depthwise)(p, threads);
    },
    [](const ConvParams& p, int threads) {
      return (by_tiles(p) ? divide_conv_by_windows : vectors.divisions.conv)(p, threads);
    }};

}  // namespace

extern const Kernels table;
const Kernels table{
    EFFKERNELS_ISA_STRING(EFFKERNELS_ISA),
    depthwise,
    [](const SqueezeExciteParams& p, const Parallel& all) { vectors.squeeze_excite(p, all); },
    [](const ScaleParams& p, const Parallel& all) { vectors.scale(p, all); },
    [](const PointwiseParams& p, const Parallel& all) { (by_tiles(p) ? pointwise : vectors.pointwise)(p, all); },
    [](const ExpandDepthwiseParams& p, const Parallel& all) {
      (by_tiles(p) ? expand_depthwise : vectors.expand_depthwise)(p, all);
    },
    [](const ConvParams& p, const Parallel& all) { (by_tiles(p) ? conv_by_windows : vectors.conv)(p, all); },
    [](const PointwiseParams& p, float* packed) { (by_tiles(p) ? pack : vectors.pack)(p, packed); },
    divisions,
    avx512::training};

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels::cpu
