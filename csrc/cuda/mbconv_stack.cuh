// Several MBConv blocks in one launch: a cluster keeps its images from block to block.
//
//   images of a cluster    block 0           block 1                block n - 1
//   +----------------+     +--------+  L2    +--------+  L2         +--------+
//   | x              | --> | mbconv | -----> | mbconv | --> ... --> | mbconv | --> y
//   +----------------+     +--------+   y0   +--------+   y1        +--------+
//
// Each block of the network is computed as mbconv.cuh does it, with its own division of the channels. A cluster has as
// many blocks as the largest team; those without a share of the channels add their share of y. The images of a cluster
// are no other cluster's, so that no block waits for more than its own cluster.
//
// What passes from one block of the network to the next is written to memory and read again by the same cluster, from
// L2: the last barrier of a block makes it visible. No launch is between them. Between the two steps of that barrier
// the parameters of the next block are asked for, where its memory for them is no memory that other blocks still read.
//
// Traffic: that of mbconv for each block. Saved are the launches: their start, their end, the gaps between them.
//
// Limits (plan_mbconv_stack): kMostStackedBlocks, whose descriptions are the kernel's arguments; blocks that fit
// mbconv.
//
// Shared memory: that of the block that needs most.
#pragma once
#include "mbconv.cuh"

namespace effkernels::cuda {

struct MBConvStackArguments {
  int count;
  MBConvArguments blocks[kMostStackedBlocks];
};
static_assert(sizeof(MBConvStackArguments) <= 32764, "larger than the arguments of a kernel may be");

// The convolution of a block: calls f with its size, stride and window.
struct AnyConvolution {
  const MBConvArguments& a;

  template <class F>
  __device__ __forceinline__ void operator()(const F& f) const {
    a.depthwise.kernel_w == 3 ? of_size<3>(f) : of_size<5>(f);
  }

 private:
  template <int K, class F>
  __device__ __forceinline__ void of_size(const F& f) const {
    if (a.depthwise.stride == 2)
      f(Convolution<K, 2, kNarrowWindow>());
    else
      a.plan.window_columns == kWideWindow ? f(Convolution<K, 1, kWideWindow>())
                                           : f(Convolution<K, 1, kNarrowWindow>());
  }
};

template <class T>
__global__ void __launch_bounds__(kMBConvThreads, 1) mbconv_stack(const __grid_constant__ MBConvStackArguments a) {
  wait_for_previous();
  allow_next();
#pragma unroll 1
  for (int i = 0; i < a.count; ++i) {
    bool waits = i > 0;
    if (waits) {
      __syncthreads();  // parameters of the block before are not read any more
      if (a.blocks[i].plan.waits_first) cluster_wait(), waits = false;
    }
    compute_mbconv<T>(a.blocks[i], AnyConvolution{a.blocks[i]}, [waits] {
      if (waits) cluster_wait();
    });
  }
  cluster_wait();
}

// Instantiated in one file per type.
template <class T>
cudaError_t run_mbconv_stack(const MBConvStackArguments& a, const Launch& at) {
  return launch(mbconv_stack<T>, at, a);
}
extern template cudaError_t run_mbconv_stack<__half>(const MBConvStackArguments&, const Launch&);
extern template cudaError_t run_mbconv_stack<__nv_bfloat16>(const MBConvStackArguments&, const Launch&);

}  // namespace effkernels::cuda
