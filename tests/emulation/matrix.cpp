// ldmatrix and mma.sync on the warp, with the fragment layouts of PTX (csrc/cuda/ptx.cuh says them).
#include <cstring>

#include "emulated_ptx.cuh"
#include "engine.h"
#include "race.h"
#include "shared_address.h"

namespace effkernels::cuda {
namespace {

using namespace emulation;

constexpr unsigned kSlot = Collective::kSlotBytes;

template <class T, class Bytes>
T& slot(Bytes* slots, unsigned lane) {
  return *reinterpret_cast<T*>(slots + lane * kSlot);
}

struct MatrixRows {
  const char* row;     // what a lane brings
  uint32_t result[4];  // what it gets
};

template <bool kTransposed>
void load_matrices(char* slots) {
  uint16_t values[4][8][8];
  for (unsigned m = 0; m < 4; ++m)
    for (unsigned row = 0; row < 8; ++row) std::memcpy(values[m][row], slot<MatrixRows>(slots, 8 * m + row).row, 16);
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = kTransposed ? values[m][j][i] : values[m][i][j];
      const uint32_t high = kTransposed ? values[m][j + 1][i] : values[m][i][j + 1];
      slot<MatrixRows>(slots, lane).result[m] = low | high << 16;
    }
}

void ldmatrix(uint32_t (&result)[4], SharedAddress row, bool transposed, Where where) {
  const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  const MatrixRows own{checked_shared(row, 16, name, where), {}};
  const char* slots =
      warp_compute(~0u, &own, sizeof own, transposed ? load_matrices<true> : load_matrices<false>, name, where);
  std::memcpy(result, slot<const MatrixRows>(slots, lane()).result, sizeof result);
  const unsigned i = lane() / 4, j = 2 * (lane() % 4);
  for (unsigned m = 0; m < 4; ++m) {  // the lane that gets a value is the one that reads it
    const auto note = [&](unsigned from, unsigned column, unsigned bytes) {
      race::note_read(slot<const MatrixRows>(slots, 8 * m + from).row + 2 * column, bytes, where);
    };
    if (transposed) {
      note(j, i, 2);
      note(j + 1, i, 2);
    } else {
      note(i, j, 4);
    }
  }
}

// Fragments of one lane; `d` last, because it is what comes back.
struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

float first_float16(uint32_t pair) { return half_bits_to_float(uint16_t(pair)); }
float second_float16(uint32_t pair) { return half_bits_to_float(uint16_t(pair >> 16)); }
float first_bfloat16(uint32_t pair) { return __uint_as_float(pair << 16); }
float second_bfloat16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }  // the lower bits are not looked at

// d (16x8) += a (16 x kDepth) * b (kDepth x 8)
template <unsigned kDepth>
void multiply(char* slots, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float d[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = slot<Fragments>(slots, lane).d[i];
  for (unsigned row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (unsigned k = 0; k < kDepth; ++k)
      for (unsigned column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    for (unsigned column = 0; column < 8; ++column) d[row][column] += sum[column];
  }
  for (unsigned lane = 0; lane < kLanes; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      slot<Fragments>(slots, lane).d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

template <float (*kFirst)(uint32_t), float (*kSecond)(uint32_t)>
void multiply_16_bit(char* slots) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Fragments& own = slot<Fragments>(slots, lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      float* to = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      to[0] = kFirst(own.a[i]), to[1] = kSecond(own.a[i]);
    }
    for (unsigned i = 0; i < 2; ++i)
      b[2 * t + 8 * i][g] = kFirst(own.b[i]), b[2 * t + 8 * i + 1][g] = kSecond(own.b[i]);
  }
  multiply(slots, a, b);
}

void multiply_tf32(char* slots) {
  float a[16][8], b[8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Fragments& own = slot<Fragments>(slots, lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(own.a[i]);
    for (unsigned i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(own.b[i]);
  }
  multiply(slots, a, b);
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], void (*compute)(char*), const char* name,
         Where where) {
  Fragments own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  std::memcpy(own.d, d, sizeof d);
  const char* slots = warp_compute(~0u, &own, sizeof own, compute, name, where);
  std::memcpy(d, slot<const Fragments>(slots, lane()).d, sizeof d);
}

}  // namespace

void ldmatrix_x4(uint32_t (&result)[4], SharedAddress row, Where where) { ldmatrix(result, row, false, where); }
void ldmatrix_x4_trans(uint32_t (&result)[4], SharedAddress row, Where where) { ldmatrix(result, row, true, where); }

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  mma(d, a, b, multiply_16_bit<first_bfloat16, second_bfloat16>, "mma (bfloat16)", where);
}
void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  mma(d, a, b, multiply_16_bit<first_float16, second_float16>, "mma (float16)", where);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  mma(d, a, b, multiply_tf32, "mma (tf32)", where);
}

uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > kFloatInfinity) return 0x7fffffffu;
  if (magnitude == kFloatInfinity) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace effkernels::cuda
