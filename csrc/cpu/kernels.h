// The CPU kernels as a table of functions, one table per instruction set; dispatch.cpp chooses at run time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace effkernels::cpu {

// Threads, handed in by the adaptor (torch's own pool). `run` splits [0, tasks) into contiguous ranges and calls
// body(context, begin, end) for each. What a task computes never depends on how the ranges were cut, so results are
// bit-equal for any number of threads.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context) = nullptr;
};

// A 1x1 convolution and the depthwise one after it, for a kernel of both: the tensor between them is never in
// memory, so `expand.y` and `depthwise.x` are null. Two launches on CUDA, hence not in params.h.
struct ExpandDepthwiseParams {
  PointwiseParams expand;
  DepthwiseParams depthwise;
};

inline int64_t packed_size(int64_t rows, int64_t k) { return (rows + 31) / 32 * 32 * k; }  // for any width of vector

struct TrainingKernels;  // training.h

// How the work of a kernel is divided among threads (shares.h): the number of its smallest units, and the work of each
// thread that gets any, in a measure of the kernel's own.
struct Division {
  int64_t units = 0;
  std::vector<int64_t> shares;
};

// The divisions that the kernels use for a number of threads. They read sizes alone, no memory.
struct Divisions {
  Division (*depthwise)(const DepthwiseParams&, int threads);
  Division (*squeeze_excite)(const SqueezeExciteParams&, int threads);  // its second product, the larger part
  Division (*pointwise)(const PointwiseParams&, int threads);
  Division (*expand_depthwise)(const ExpandDepthwiseParams&, int threads);
  Division (*conv)(const ConvParams&, int threads);
};

struct Kernels {
  const char* isa;
  void (*depthwise)(const DepthwiseParams&, const Parallel&);
  void (*squeeze_excite)(const SqueezeExciteParams&, const Parallel&);
  void (*scale)(const ScaleParams&, const Parallel&);
  void (*pointwise)(const PointwiseParams&, const Parallel&);
  void (*expand_depthwise)(const ExpandDepthwiseParams&, const Parallel&);
  void (*conv)(const ConvParams&, const Parallel&);
  // Packs the weight of a product for `pointwise` and `expand_depthwise` of this table into packed_size floats, or
  // fewer.
  void (*pack)(const PointwiseParams&, float* packed);
  const Divisions& divisions;
  const TrainingKernels& training;
};

// The table in use: the widest instruction set of this machine, unless set_isa chose another.
const Kernels& kernels();

// "amx_bf16", "avx512_bf16", "avx512", "avx2", "plain", or "auto" for the widest. False: not built or not on this
// machine; nothing changes then.
bool set_isa(const char* name);

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call of scratch() or release_scratch().
// parallel_for (vector.h) releases that of a body at its end: what is larger than a thread may keep goes back then.
void* scratch(size_t bytes);
void release_scratch();
void free_scratch();  // of all threads that run no kernel

}  // namespace effkernels::cpu
