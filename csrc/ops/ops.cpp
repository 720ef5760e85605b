// Registers the schemas; cpu_ops.cpp and cuda_ops.cpp register what computes them.
#include <torch/csrc/stable/library.h>

#include "schema.h"

STABLE_TORCH_LIBRARY(effkernels, m) {
#define EFFKERNELS_DEFINE(schema) m.def(schema);
  EFFKERNELS_SCHEMAS(EFFKERNELS_DEFINE)
#undef EFFKERNELS_DEFINE
}
