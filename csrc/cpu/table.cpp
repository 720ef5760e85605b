// The kernels of one instruction set, for dispatch.cpp.
#include "training.h"
#include "vector.h"

#if defined(EFFKERNELS_ISA_AVX512_BF16)
namespace effkernels::cpu::avx512 {
extern const TrainingKernels training;
}
#endif

namespace effkernels::cpu::EFFKERNELS_ISA {

void depthwise(const DepthwiseParams&, const Parallel&);
void squeeze_excite(const SqueezeExciteParams&, const Parallel&);
void scale(const ScaleParams&, const Parallel&);
void pointwise(const PointwiseParams&, const Parallel&);
void expand_depthwise(const ExpandDepthwiseParams&, const Parallel&);
void conv(const ConvParams&, const Parallel&);
void pack(const PointwiseParams&, float*);
Division divide_depthwise(const DepthwiseParams&, int);
Division divide_squeeze_excite(const SqueezeExciteParams&, int);
Division divide_pointwise(const PointwiseParams&, int);
Division divide_expand_depthwise(const ExpandDepthwiseParams&, int);
Division divide_conv(const ConvParams&, int);
#if defined(EFFKERNELS_ISA_AVX512_BF16)
using avx512::training;
#else
void statistics(const StatisticsParams&, const Parallel&);
void norm_act(const NormActParams&, const Parallel&);
void gradient_sums(const GradientSumsParams&, const Parallel&);
void norm_backward(const NormBackwardParams&, const Parallel&);
void depthwise_train(const DepthwiseTrainParams&, const Parallel&);
void depthwise_backward(const DepthwiseBackwardParams&, const Parallel&);

extern const TrainingKernels training;
constexpr TrainingKernels training{statistics,    norm_act,        gradient_sums,
                                   norm_backward, depthwise_train, depthwise_backward};
#endif

constexpr Divisions divisions{divide_depthwise, divide_squeeze_excite, divide_pointwise, divide_expand_depthwise,
                              divide_conv};

extern const Kernels table;
const Kernels table{EFFKERNELS_ISA_STRING(EFFKERNELS_ISA),
                    depthwise,
                    squeeze_excite,
                    scale,
                    pointwise,
                    expand_depthwise,
                    conv,
                    pack,
                    divisions,
                    training};

}  // namespace effkernels::cpu::EFFKERNELS_ISA
