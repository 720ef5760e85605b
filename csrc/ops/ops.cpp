// Registers the schemas; cpu_ops.cpp, cuda_ops.cpp and plan_ops.cpp register what computes them.
#include "registry.h"
#include "schema.h"

EFFKERNELS_LIBRARY(EFFKERNELS_NAMESPACE, m) {
#define EFFKERNELS_DEFINE(schema) m.def(schema);
#define EFFKERNELS_DEFINE_KERNEL(name, arguments, results) \
  m.def(name "(" arguments ") -> " results);               \
  m.def("recorded_" name "(Tensor recording, " arguments ") -> " results);
  EFFKERNELS_KERNEL_SCHEMAS(EFFKERNELS_DEFINE_KERNEL)
  EFFKERNELS_SCHEMAS(EFFKERNELS_DEFINE)
#undef EFFKERNELS_DEFINE_KERNEL
#undef EFFKERNELS_DEFINE
}
