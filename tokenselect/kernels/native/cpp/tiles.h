// Products of bfloat16 matrices in tiles of 16 rows of 64 bytes, added up in float32 (AMX).
#pragma once

#include "simd.h"

namespace TS_PATH {

// The right factor is packed in blocks of DEPTH rows and SIDE columns, one tile each: a line of it
// has two rows of the matrix, element by element in turn.
constexpr int SIDE = 16, DEPTH = 32, BLOCK_SIZE = SIDE * DEPTH;
// Rows of the left factor that are multiplied at once; columns of the right one, a multiple of it.
constexpr int AT_ONCE = 2 * SIDE;

// out (AT_ONCE, columns) = a (AT_ONCE, blocks * DEPTH) b (blocks * DEPTH, columns). Elements from
// one block of b to the next: `down` to the next rows, `right` to the next columns.
TS_APART static void multiply_in_loops(const uint16_t* a, int64_t a_pitch, const uint16_t* b,
                                       int64_t down, int64_t right, int64_t blocks,
                                       int64_t columns, float* out, int64_t pitch) {
  for (int64_t i = 0; i < AT_ONCE; ++i) {
    const uint16_t* row = a + i * a_pitch;
    for (int64_t j = 0; j < columns; j += W) {
      const uint16_t* column = b + j / SIDE * right + j % SIDE * 2;
      vf sums = {};
      for (int64_t k = 0; k < blocks * DEPTH; k += 2) {
        vu pairs;
        memcpy(&pairs, column + k / DEPTH * down + k % DEPTH / 2 * AT_ONCE, sizeof pairs);
        sums += (vf)(pairs << 16) * all(BFloat16::widen_one(row[k]));
        sums += (vf)(pairs & 0xffff0000u) * all(BFloat16::widen_one(row[k + 1]));
      }
      store(out + i * pitch + j, sums);
    }
  }
}

// Tests compile the loops in place of tiles, for processors that have none.
#if defined(TS_TILES_BY_LOOPS)
constexpr bool HAS_TILES = true;

static inline void open_tiles() {}
static inline void close_tiles() {}
constexpr auto multiply = multiply_in_loops;
#elif defined(__AMX_BF16__) || defined(__AMXBF16__)  // as clang++ 14 has it
constexpr bool HAS_TILES = true;

// What a tile is loaded from has to be in memory, which the intrinsics of some compilers leave out.
static inline void written() { __asm__ volatile("" ::: "memory"); }

// The shape of a thread's tiles: 16 rows of 64 bytes each, until they are closed.
static inline void open_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  written();
  _tile_loadconfig(&shape);
}
static inline void close_tiles() { _tile_release(); }

// The same; subnormal numbers, and products and sums below the normal ones, count as 0.
static inline void multiply(const uint16_t* a, int64_t a_pitch, const uint16_t* b, int64_t down,
                            int64_t right, int64_t blocks, int64_t columns, float* out,
                            int64_t pitch) {
  const int64_t a_bytes = 2 * a_pitch, out_bytes = 4 * pitch;
  written();
  for (int64_t j = 0; j < columns; j += AT_ONCE, b += 2 * right) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < blocks; ++k) {
      _tile_loadd(4, a + k * DEPTH, a_bytes);
      _tile_loadd(5, a + SIDE * a_pitch + k * DEPTH, a_bytes);
      _tile_loadd(6, b + k * down, 64);
      _tile_loadd(7, b + k * down + right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out + j, out_bytes);
    _tile_stored(1, out + j + SIDE, out_bytes);
    _tile_stored(2, out + SIDE * pitch + j, out_bytes);
    _tile_stored(3, out + SIDE * pitch + j + SIDE, out_bytes);
  }
  written();
}
#else
constexpr bool HAS_TILES = false;

static inline void open_tiles() {}
static inline void close_tiles() {}
constexpr auto multiply = multiply_in_loops;
#endif

}  // namespace TS_PATH
