// The kernels of one instruction set, for dispatch.cpp.
#include "vector.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

void depthwise(const DepthwiseParams&, const Parallel&);
void squeeze_excite(const SqueezeExciteParams&, const Parallel&);
void scale(const ScaleParams&, const Parallel&);
void pointwise(const PointwiseParams&, const Parallel&);
void expand_depthwise(const ExpandDepthwiseParams&, const Parallel&);
void conv(const ConvParams&, const Parallel&);
void pack(const Param&, int64_t, int64_t, float*);

extern const Kernels table;
const Kernels table{
    EFFKERNELS_ISA_STRING(EFFKERNELS_ISA), depthwise, squeeze_excite, scale, pointwise, expand_depthwise, conv, pack};

}  // namespace effkernels::cpu::EFFKERNELS_ISA
