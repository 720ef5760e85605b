// CUDA's vector types, for a compiler that has no CUDA headers.
#pragma once
#include <cstdint>

struct alignas(8) int2 {
  int x;
  int y;
};
struct alignas(8) uint2 {
  unsigned x;
  unsigned y;
};
struct alignas(8) float2 {
  float x;
  float y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) int4 {
  int x;
  int y, z, w;
};
struct alignas(16) uint4 {
  unsigned x;
  unsigned y, z, w;
};
struct alignas(16) float4 {
  float x;
  float y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
