// Kernels of the emulator's own tests (tests/test_emulation_*.py). The first part does something wrong on purpose, each
// kernel one thing; the second is right, and its results are held against the definitions.
#include "selftest.h"

#include "cuda/compat.cuh"

namespace effkernels::cuda {
namespace {

using emulation::SelfTestArguments;

unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }  // of a launch in one dimension

template <class T>
const T* input(const SelfTestArguments& p) {
  return static_cast<const T*>(p.input);
}
template <class T>
T* output(const SelfTestArguments& p) {
  return static_cast<T*>(p.output);
}

// ------------------------------------------------------------------------------------------------------------- faults
// Every thread reads what its neighbour wrote over the zero that was there.
template <bool kBarrier>
__global__ void rotate_block(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = 0.f;
  __syncthreads();
  shared[threadIdx.x] = input<float>(p)[threadIdx.x];
  if (kBarrier) __syncthreads();
  output<float>(p)[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

template <bool kBarrier>
__global__ void rotate_warp(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = 0.f;
  __syncwarp();
  shared[threadIdx.x] = input<float>(p)[threadIdx.x];
  if (kBarrier) __syncwarp();
  output<float>(p)[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// A block adds to the same word as the others, by `+=` or by an atomic.
template <bool kAtomic>
__global__ void count_blocks(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  int* counter = output<int>(p);
  if (kAtomic) {
    atomicAdd(counter, 1);
  } else {
    *counter += 1;
  }
}

// What the launch ahead wrote may be read after the wait.
enum class Overlap { kRight, kTooEarly, kNoWait };
template <Overlap kHow>
__global__ void overlapping(SelfTestArguments p) {
  float value = 0.f;
  if (kHow == Overlap::kTooEarly) value = load_global(input<float>(p) + threadIdx.x);
  if (kHow != Overlap::kNoWait || threadIdx.x != 3) wait_for_previous();
  allow_next();
  if (kHow != Overlap::kTooEarly && threadIdx.x != 3) value = load_global(input<float>(p) + threadIdx.x);
  if (threadIdx.x != 3) output<float>(p)[threadIdx.x] = value;
}

__global__ void read_uninitialised(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  if (threadIdx.x != 3) shared[threadIdx.x] = 1.f;
  __syncthreads();
  output<float>(p)[threadIdx.x] = shared[threadIdx.x];
}

// Element n + threadIdx.x, after (or before) the memory.
__global__ void write_global(SelfTestArguments p) { output<float>(p)[p.n + int(threadIdx.x)] = 1.f; }
__global__ void read_global(SelfTestArguments p) {
  output<float>(p)[threadIdx.x] = input<float>(p)[p.n + int(threadIdx.x)];
}
__global__ void write_shared(SelfTestArguments p) { dynamic_shared<float>()[p.n + int(threadIdx.x)] = 1.f; }
__global__ void read_shared(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = 1.f;
  __syncthreads();
  output<float>(p)[threadIdx.x] = shared[p.n + int(threadIdx.x)];
}

// 16 bytes at element n.
__global__ void read_vector_ldg(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  *output<uint4>(p) = __ldg(reinterpret_cast<const uint4*>(input<float>(p) + p.n));
}
__global__ void read_vector_ldcg(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  *output<uint4>(p) = __ldcg(reinterpret_cast<const uint4*>(input<float>(p) + p.n));
}
__global__ void write_vector_stcg(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  __stcg(reinterpret_cast<float4*>(output<float>(p) + p.n), make_float4(1, 2, 3, 4));
}
__global__ void read_vector_plain(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  *output<uint4>(p) = *reinterpret_cast<const uint4*>(input<float>(p) + p.n);
}
__global__ void copy_async_at(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  cp_async_16(shared_address(dynamic_shared<float>()), input<float>(p) + p.n);
  cp_async_commit();
  cp_async_wait<0>();
}
__global__ void copy_async_to(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  cp_async_16(shared_address(dynamic_shared<float>() + p.n), input<float>(p));
  cp_async_commit();
  cp_async_wait<0>();
}
__global__ void ldmatrix_at(SelfTestArguments p) {
  uint32_t result[4];
  ldmatrix_x4(result, shared_address(dynamic_shared<uint16_t>() + p.n));
  output<uint32_t>(p)[threadIdx.x] = result[0];
}

__global__ void diverge_block(SelfTestArguments) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void diverge_warp(SelfTestArguments) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(~0u, 1);
  }
}
__global__ void wait_apart(SelfTestArguments) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void spin_forever(SelfTestArguments p) {
  while (load_acquire(output<unsigned>(p)) != 7) __nanosleep(20);
}
// Waits for all blocks of the grid, which only a cooperative launch may.
__global__ void wait_for_grid(SelfTestArguments p) {
  if (threadIdx.x != 0) return;
  add_release(output<unsigned>(p), 1);
  while (load_acquire(output<unsigned>(p)) != gridDim.x) __nanosleep(20);
}

__global__ void shuffle_outside_mask(SelfTestArguments) { __shfl_sync(0xffu, 1, 0); }
__global__ void shuffle_from_outside_mask(SelfTestArguments) {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
__global__ void mma_without_a_lane(SelfTestArguments) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16<__half>(d, a, b);
}

__global__ void copy_async_not_waited_for(SelfTestArguments p) {
  cp_async_16(shared_address(dynamic_shared<float>()), p.input);
  cp_async_commit();
}
// Reads a copy before it waits for it.
template <bool kWaits>
__global__ void copy_async_used(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  cp_async_16(shared_address(shared + 4 * threadIdx.x), input<float>(p) + 4 * threadIdx.x);
  cp_async_commit();
  if (kWaits) cp_async_wait<0>();
  __syncthreads();
  output<float>(p)[threadIdx.x] = shared[threadIdx.x];
  __syncthreads();
  cp_async_wait<0>();
}
// A copy into what another thread may still read.
__global__ void copy_async_too_early(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = 1.f;
  __syncthreads();
  output<float>(p)[threadIdx.x] = shared[threadIdx.x];
  if (threadIdx.x == 0) cp_async_16(shared_address(shared + 4), p.input);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
}

// The last block to arrive adds what each block has left.
enum class Arrival { kRight, kNoFence, kNoAtomic };
template <Arrival kArrival>
__global__ void last_arrival(SelfTestArguments p) {
  float* sums = output<float>(p) + 2;
  unsigned* flag = dynamic_shared<unsigned>();
  if (threadIdx.x < 4) sums[blockIdx.x * 4 + threadIdx.x] = input<float>(p)[blockIdx.x * 4 + threadIdx.x];
  if (kArrival != Arrival::kNoFence) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* counter = output<unsigned>(p);
    *flag = kArrival == Arrival::kNoAtomic ? blockIdx.x == gridDim.x - 1 : atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (*flag == 0) return;
  __threadfence();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (unsigned i = 0; i < 4 * gridDim.x; ++i) total += __ldcg(sums + i);
  output<float>(p)[1] = total;
}

// Each block adds the first words of the cluster's shared memory.
enum class Dsmem { kRight, kNoFirstBarrier, kNoLastBarrier, kWrongRank };
template <Dsmem kWay>
__global__ void cluster_sum(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = input<float>(p)[global_thread()];
  if (kWay != Dsmem::kNoFirstBarrier) cluster_sync();
  float total = 0.f;
  for (int rank = 0; rank < p.n + (kWay == Dsmem::kWrongRank); ++rank)
    total += cluster_map(shared, unsigned(rank))[threadIdx.x];
  output<float>(p)[global_thread()] = total;
  if (kWay != Dsmem::kNoLastBarrier) cluster_sync();
}
// Keeps a pointer into the shared memory of rank 0, which leaves before it is used.
__global__ void cluster_read_after_exit(SelfTestArguments p) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = 1.f;
  const float* first = cluster_map(shared, 0u);
  cluster_sync();
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 100; ++i) __nanosleep(20);
  output<float>(p)[global_thread()] = first[threadIdx.x];
}

// ------------------------------------------------------------------------------------------------------- definitions
__global__ void copy_words(SelfTestArguments p) {
  for (unsigned i = global_thread(); int(i) < p.n; i += blockDim.x * gridDim.x)
    output<uint32_t>(p)[i] = input<uint32_t>(p)[i];
}
__global__ void copy_vectors(SelfTestArguments p) {
  for (unsigned i = global_thread(); int(i) < p.n; i += blockDim.x * gridDim.x)
    output<uint4>(p)[i] = __ldg(input<uint4>(p) + i);
}
__global__ void read_first_word(SelfTestArguments p) {
  if (input<float>(p)[0] == 12345.f) __syncwarp();
}
__global__ void last_block_to_start(SelfTestArguments p) {
  if (threadIdx.x == 0) atomicExch(output<int>(p), __float_as_int(static_cast<float>(blockIdx.x)));
}

// Lane l gets words 4l to 4l + 3.
template <bool kTransposed>
__global__ void ldmatrix_fragments(SelfTestArguments p) {
  uint16_t* shared = dynamic_shared<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i] = input<uint16_t>(p)[i];
  __syncthreads();
  uint32_t result[4];
  const SharedAddress row = shared_address(shared + 8 * threadIdx.x);
  kTransposed ? ldmatrix_x4_trans(result, row) : ldmatrix_x4(result, row);
  for (int i = 0; i < 4; ++i) output<uint32_t>(p)[4 * threadIdx.x + i] = result[i];
}

// d = a b + c from row-major a (16 x 16), b (16 x 8), c (16 x 8), lying one after another.
template <class T>
__global__ void mma_16_bit(SelfTestArguments p) {
  const uint16_t* a = input<uint16_t>(p);
  const uint16_t* b = a + 256;
  const float* c = reinterpret_cast<const float*>(b + 128);
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  float d[4];
  for (unsigned i = 0; i < 4; ++i) {
    const uint16_t* at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    fragment_a[i] = at[0] | uint32_t(at[1]) << 16;
    d[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  }
  for (unsigned i = 0; i < 2; ++i) {
    const uint16_t* at = b + (2 * t + 8 * i) * 8 + g;
    fragment_b[i] = at[0] | uint32_t(at[8]) << 16;
  }
  mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (unsigned i = 0; i < 4; ++i) output<float>(p)[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// d = a b + c from row-major a (16 x 8), b (8 x 8), c (16 x 8) in float32; n: whether the factors are rounded to TF32.
__global__ void mma_tf32(SelfTestArguments p) {
  const float* a = input<float>(p);
  const float* b = a + 128;
  const float* c = b + 64;
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto factor = [&](float x) { return p.n != 0 ? to_tf32(x) : __float_as_uint(x); };
  uint32_t fragment_a[4], fragment_b[2];
  float d[4];
  for (unsigned i = 0; i < 4; ++i) {
    fragment_a[i] = factor(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
    d[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  }
  for (unsigned i = 0; i < 2; ++i) fragment_b[i] = factor(b[(t + 4 * i) * 8 + g]);
  mma_m16n8k8_tf32(d, fragment_a, fragment_b);
  for (unsigned i = 0; i < 4; ++i) output<float>(p)[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// Four results a lane: from lane n, from lane ^ n, from n above, from n below, in segments of 8.
__global__ void shuffles(SelfTestArguments p) {
  const int value = input<int>(p)[threadIdx.x];
  int* to = output<int>(p) + 4 * threadIdx.x;
  to[0] = __shfl_sync(~0u, value, p.n, 8);
  to[1] = __shfl_xor_sync(~0u, value, p.n, 8);
  to[2] = __shfl_down_sync(~0u, value, unsigned(p.n), 8);
  to[3] = __shfl_up_sync(~0u, value, unsigned(p.n), 8);
}
// Three results a lane, over the half of the warp that the lane is in.
__global__ void votes(SelfTestArguments p) {
  const int value = input<int>(p)[threadIdx.x];
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned* to = output<unsigned>(p) + 3 * threadIdx.x;
  to[0] = __ballot_sync(mask, value);
  to[1] = unsigned(__any_sync(mask, value));
  to[2] = unsigned(__all_sync(mask, value));
}
// Every thread updates seven words.
__global__ void atomics(SelfTestArguments p) {
  unsigned* to = output<unsigned>(p);
  const unsigned me = global_thread();
  atomicAdd(&to[0], me);
  atomicInc(&to[1], 9u);
  atomicMax(&to[2], me * 7919u % 1000u);
  atomicMax(reinterpret_cast<int*>(&to[3]), int(me) - 5);
  atomicAdd(reinterpret_cast<int*>(&to[4]), -1);
  for (unsigned seen = load_acquire(&to[5]);;) {  // a product modulo 2^32, by compare and swap
    const unsigned before = atomicCAS(&to[5], seen, seen * 3u);
    if (before == seen) break;
    seen = before;
  }
  atomicExch(&to[6], 1234u);
}
// Each block writes its number, waits for the grid, and reads the number of the next one, n times over.
__global__ void grid_barrier(SelfTestArguments p) {
  unsigned* counter = output<unsigned>(p);
  unsigned* numbers = counter + 1;
  for (int round = 0; round < p.n; ++round) {
    if (threadIdx.x == 1) numbers[blockIdx.x] = 100u * unsigned(round) + blockIdx.x;
    for (int half = 1; half <= 2; ++half) {
      __syncthreads();
      if (threadIdx.x == 0) {
        add_release(counter, 1);
        while (load_acquire(counter) < gridDim.x * unsigned(2 * round + half)) __nanosleep(20);
      }
      __syncthreads();
      if (half == 1 && threadIdx.x == 2)
        numbers[gridDim.x + blockIdx.x] = __ldcg(&numbers[(blockIdx.x + 1) % gridDim.x]);
    }
  }
}

// Blocks draw numbers as they start. One with an odd number waits for the one before it, and passes on what it wrote:
// right, without a release of it, without an acquire, or waiting for the one after it, which may not have started.
enum class Queue { kRight, kNoFence, kNoAcquire, kLater };
template <Queue kQueue>
__global__ void queue_of_pairs(SelfTestArguments p) {
  unsigned* const drawn = output<unsigned>(p);
  unsigned* const done = drawn + 1;
  unsigned* const values = done + gridDim.x;
  unsigned* const number = dynamic_shared<unsigned>();
  if (threadIdx.x == 0) *number = atomicAdd(drawn, 1u);
  __syncthreads();
  const unsigned mine = *number, other = kQueue == Queue::kLater ? mine + 1 : mine - 1;
  unsigned value = 100u * mine + threadIdx.x;
  if (mine % 2 == (kQueue == Queue::kLater ? 0u : 1u)) {
    if (threadIdx.x == 1) {
      if constexpr (kQueue == Queue::kNoAcquire) {
        while (*static_cast<volatile unsigned*>(done + other) == 0) __nanosleep(20);
      } else {
        while (load_acquire(done + other) == 0) __nanosleep(20);
      }
    }
    __syncthreads();
    value = __ldcg(values + other * blockDim.x + threadIdx.x);
  }
  values[mine * blockDim.x + threadIdx.x] = value;
  if constexpr (kQueue != Queue::kNoFence) {
    __threadfence();
    __syncthreads();
  }
  if (threadIdx.x == 0) add_release(done + mine, 1);
}

// Element by element, n of them.
template <class From, class To, To (*kFunction)(From)>
__global__ void each(SelfTestArguments p) {
  for (int i = int(threadIdx.x); i < p.n; i += int(blockDim.x)) output<To>(p)[i] = kFunction(input<From>(p)[i]);
}
// The inputs follow each other, n pairs each.
template <class Pair>
__global__ void packed(SelfTestArguments p) {
  const Pair* x = input<Pair>(p);
  for (int i = int(threadIdx.x); i < p.n; i += int(blockDim.x)) {
    output<Pair>(p)[i] = __hfma2(x[i], x[p.n + i], x[2 * p.n + i]);
    output<Pair>(p)[p.n + i] = __hmul2(x[i], x[p.n + i]);
    output<Pair>(p)[2 * p.n + i] = __hadd2(x[i], x[p.n + i]);
  }
}
float quotient_of_three(float x) { return __fdividef(3.f, x); }
float exponential(float x) { return __expf(x); }

}  // namespace
}  // namespace effkernels::cuda

namespace emulation {

const std::map<std::string, SelfTest>& self_tests() {
  using namespace effkernels::cuda;
  static const std::map<std::string, SelfTest> table = {
      {"rotate_block", rotate_block<true>},
      {"rotate_block_without_barrier", rotate_block<false>},
      {"rotate_warp", rotate_warp<true>},
      {"rotate_warp_without_barrier", rotate_warp<false>},
      {"count_blocks", count_blocks<true>},
      {"count_blocks_without_atomic", count_blocks<false>},
      {"overlapping", overlapping<Overlap::kRight>},
      {"overlapping_too_early", overlapping<Overlap::kTooEarly>},
      {"overlapping_without_wait", overlapping<Overlap::kNoWait>},
      {"read_uninitialised", read_uninitialised},
      {"write_global", write_global},
      {"read_global", read_global},
      {"write_shared", write_shared},
      {"read_shared", read_shared},
      {"read_vector_ldg", read_vector_ldg},
      {"read_vector_ldcg", read_vector_ldcg},
      {"write_vector_stcg", write_vector_stcg},
      {"read_vector_plain", read_vector_plain},
      {"copy_async_at", copy_async_at},
      {"copy_async_to", copy_async_to},
      {"ldmatrix_at", ldmatrix_at},
      {"diverge_block", diverge_block},
      {"diverge_warp", diverge_warp},
      {"wait_apart", wait_apart},
      {"spin_forever", spin_forever},
      {"queue_of_pairs", queue_of_pairs<Queue::kRight>},
      {"queue_without_fence", queue_of_pairs<Queue::kNoFence>},
      {"queue_without_acquire", queue_of_pairs<Queue::kNoAcquire>},
      {"queue_of_later", queue_of_pairs<Queue::kLater>},
      {"wait_for_grid", wait_for_grid},
      {"shuffle_outside_mask", shuffle_outside_mask},
      {"shuffle_from_outside_mask", shuffle_from_outside_mask},
      {"mma_without_a_lane", mma_without_a_lane},
      {"copy_async_not_waited_for", copy_async_not_waited_for},
      {"copy_async_used", copy_async_used<true>},
      {"copy_async_used_without_wait", copy_async_used<false>},
      {"copy_async_too_early", copy_async_too_early},
      {"last_arrival", last_arrival<Arrival::kRight>},
      {"last_arrival_without_fence", last_arrival<Arrival::kNoFence>},
      {"last_arrival_without_atomic", last_arrival<Arrival::kNoAtomic>},
      {"cluster_sum", cluster_sum<Dsmem::kRight>},
      {"cluster_sum_without_first_barrier", cluster_sum<Dsmem::kNoFirstBarrier>},
      {"cluster_sum_without_last_barrier", cluster_sum<Dsmem::kNoLastBarrier>},
      {"cluster_sum_of_wrong_rank", cluster_sum<Dsmem::kWrongRank>},
      {"cluster_read_after_exit", cluster_read_after_exit},
      {"copy_words", copy_words},
      {"copy_vectors", copy_vectors},
      {"read_first_word", read_first_word},
      {"last_block_to_start", last_block_to_start},
      {"ldmatrix", ldmatrix_fragments<false>},
      {"ldmatrix_trans", ldmatrix_fragments<true>},
      {"mma_bfloat16", mma_16_bit<__nv_bfloat16>},
      {"mma_float16", mma_16_bit<__half>},
      {"mma_tf32", mma_tf32},
      {"shuffles", shuffles},
      {"votes", votes},
      {"atomics", atomics},
      {"grid_barrier", grid_barrier},
      {"float16_to_float", each<__half, float, __half2float>},
      {"float_to_float16", each<float, __half, __float2half_rn>},
      {"bfloat16_to_float", each<__nv_bfloat16, float, __bfloat162float>},
      {"float_to_bfloat16", each<float, __nv_bfloat16, __float2bfloat16_rn>},
      {"float_to_tf32", each<float, uint32_t, to_tf32>},
      {"tanh_approx", each<float, float, tanh_approx>},
      {"expf", each<float, float, exponential>},
      {"fdividef", each<float, float, quotient_of_three>},
      {"packed_float16", packed<__half2>},
      {"packed_bfloat16", packed<__nv_bfloat162>},
  };
  return table;
}

}  // namespace emulation
