// One product of tiles of any size, sum += a * b, by the model and, compiled without EFFKERNELS_AMX_MODEL, in
// instructions.
#include <cstdint>
#include <cstring>

#if defined(EFFKERNELS_AMX_MODEL)
#include <immintrin.h>

#include "tiles.h"
#define NAME amx_product_of_model
#else
#include <immintrin.h>
#define NAME amx_product_of_instructions
#endif

// a: rows x words, b: words x columns, sum: rows x columns, one row after the other.
extern "C" __attribute__((visibility("default"))) void NAME(int rows, int columns, int words, const void* a,
                                                            const void* b, void* sum) {
  alignas(64) unsigned char configuration[64] = {1};
  const int sizes[3][2] = {{rows, columns}, {rows, words}, {words, columns}};
  for (int tile = 0; tile < 3; tile++) {
    const uint16_t row_bytes = uint16_t(4 * sizes[tile][1]);
    std::memcpy(configuration + 16 + 2 * tile, &row_bytes, 2);
    configuration[48 + tile] = static_cast<unsigned char>(sizes[tile][0]);
  }
  asm volatile("" ::"r"(configuration) : "memory");  // GCC's intrinsics do not say what they read
  _tile_loadconfig(configuration);
  _tile_loadd(0, sum, 4 * columns);
  _tile_loadd(1, a, 4 * words);
  _tile_loadd(2, b, 4 * columns);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sum, 4 * columns);
  _tile_release();
}
