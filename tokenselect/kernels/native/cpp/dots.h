// Dot products of a few queries with a few rows: the inner loop of scores and of attention.
#pragma once

#include "rows.h"

namespace TS_PATH {

// How many rows are taken at once with R queries: what the registers hold, as measured.
template <class E>
constexpr int rows_at_once(int R) {
  constexpr bool is_wide = sizeof(typename E::raw) == 4;
  if (R == 1) return 8;
  if (R == 2 || ACCUMULATORS == 16) return 4;
  return is_wide ? 2 : R == 3 ? 4 : 3;
}

// Of R queries with T rows at a time, so that a row's part is loaded and widened once for R. While
// rows are multiplied, those that are `ahead` of them are fetched.
template <class E, int R>
static inline void dots_of(const float* q, int64_t pitch, const typename E::raw* const* row,
                           const typename E::raw* const* ahead, int count, int64_t D, float* out,
                           int64_t stride) {
  constexpr int T = rows_at_once<E>(R), LINE = 64 / (int)sizeof(typename E::raw);
  static_assert(TILE % T == 0, "a tile is whole steps");
  for (int t0 = 0; t0 < count; t0 += T) {
    vf sums[T * R] = {};
    const typename E::raw *at[T], *next[T];
    TS_UNROLL for (int t = 0; t < T; ++t) at[t] = row[t0 + t], next[t] = ahead[t0 + t];
    if (LINE == 16) {  // more at once are not worth their instructions here, nor fewer below
      TS_UNROLL for (int t = 0; t < T; ++t) {
        for (int64_t d = 0; d < D; d += LINE) __builtin_prefetch(next[t] + d);
      }
    }
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      vf x[T];
      TS_UNROLL for (int t = 0; t < T; ++t) {
        x[t] = E::widen(at[t] + d);
        if (LINE == 32) __builtin_prefetch(next[t] + d);
      }
      TS_UNROLL for (int r = 0; r < R; ++r) {
        vf y = load(q + r * pitch + d);
        TS_UNROLL for (int t = 0; t < T; ++t) sums[t * R + r] += x[t] * y;
      }
    }
    if (d < D) {
      TS_UNROLL for (int t = 0; t < T; ++t) {
        vf x = widen_part<E>(at[t] + d, (int)(D - d));
        TS_UNROLL for (int r = 0; r < R; ++r) sums[t * R + r] += x * load(q + r * pitch + d);
      }
    }
    float found[(T * R + W - 1) / W * W];
    fold<Sum, T * R>(sums, found);
    // There is room for a whole tile, whatever `count` is.
    TS_UNROLL for (int i = 0; i < T * R; ++i) {
      out[i % R * stride + t0 + i / R] = found[FOLDED_AT.place[i]];
    }
  }
}

// out[r * stride + t] = q_r . row_t, for `rows` queries of `pitch` floats and t < count <= TILE;
// what is behind `count`, up to TILE, is written too.
template <class E>
TS_APART static void dots(const float* q, int64_t rows, int64_t pitch,
                        const typename E::raw* const* row, const typename E::raw* const* ahead,
                        int count, int64_t D, float* out, int64_t stride) {
  while (rows >= 4) {
    dots_of<E, 4>(q, pitch, row, ahead, count, D, out, stride);
    q += 4 * pitch, out += 4 * stride, rows -= 4, ahead = row;
  }
  if (rows == 3) dots_of<E, 3>(q, pitch, row, ahead, count, D, out, stride);
  if (rows == 2) dots_of<E, 2>(q, pitch, row, ahead, count, D, out, stride);
  if (rows == 1) dots_of<E, 1>(q, pitch, row, ahead, count, D, out, stride);
}

}  // namespace TS_PATH
