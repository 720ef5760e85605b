// Registers the schemas; cpu_ops.cpp, cuda_ops.cpp and plan_ops.cpp register what computes them.
#include "registry.h"
#include "schema.h"

EFFKERNELS_LIBRARY(EFFKERNELS_NAMESPACE, m) {
#define EFFKERNELS_DEFINE(schema) m.def(schema);
  EFFKERNELS_SCHEMAS(EFFKERNELS_DEFINE)
#undef EFFKERNELS_DEFINE
}
