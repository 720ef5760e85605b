// Where the operators are registered: namespace `effkernels`, CUDA's kernels under the key CUDA. The tests build the
// same adaptors over the CUDA emulator, under a namespace of its own and for tensors of the CPU.
#pragma once
#include <torch/csrc/stable/library.h>

#ifndef EFFKERNELS_NAMESPACE
#define EFFKERNELS_NAMESPACE effkernels
#define EFFKERNELS_CUDA_KEY CUDA
#endif

// One more level of macros, so that the names above are expanded before torch's macros paste them.
#define EFFKERNELS_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define EFFKERNELS_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define EFFKERNELS_LIBRARY_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
