// Dot products of a few queries with a few rows: the inner loop of scores and of attention.
#pragma once

#include "rows.h"

namespace TS_PATH {

// Of R queries with T rows at a time, so that a row's part is loaded and widened once for R.
template <class E, int R, int T>
static inline void dots_of(const float* q, int64_t pitch, const typename E::raw* const* row,
                           int count, int64_t D, float* out, int64_t stride) {
  for (int t0 = 0; t0 < count; t0 += T) {
    vf sums[T * R] = {};
    const typename E::raw* at[T];
    TS_UNROLL for (int t = 0; t < T; ++t) at[t] = row[t0 + t];  // behind `count`: rows again
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      vf x[T];
      TS_UNROLL for (int t = 0; t < T; ++t) x[t] = E::widen(at[t] + d);
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
    lane_sums<T * R>(sums, found);
    for (int t = 0; t < T && t0 + t < count; ++t) {
      for (int r = 0; r < R; ++r) out[r * stride + t0 + t] = found[t * R + r];
    }
  }
}

// out[r * stride + t] = q_r . row_t, for `rows` queries of `pitch` floats and t < count <= TILE.
template <class E>
static inline void dots(const float* q, int64_t rows, int64_t pitch,
                        const typename E::raw* const* row, int count, int64_t D, float* out,
                        int64_t stride) {
  while (rows >= 4) {
    dots_of<E, 4, ACCUMULATORS / 4>(q, pitch, row, count, D, out, stride);
    q += 4 * pitch, out += 4 * stride, rows -= 4;
  }
  if (rows == 3) dots_of<E, 3, 4>(q, pitch, row, count, D, out, stride);
  if (rows == 2) dots_of<E, 2, ACCUMULATORS / 2>(q, pitch, row, count, D, out, stride);
  if (rows == 1) dots_of<E, 1, 8>(q, pitch, row, count, D, out, stride);
}

}  // namespace TS_PATH
