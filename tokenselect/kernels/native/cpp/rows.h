// Rows of a cache: where they are, contiguous or paged, and how they are rotated.
#pragma once

#include "call.h"
#include "simd.h"

namespace TS_PATH {

using ts::Call;
using ts::MAX_DIM;
using ts::MAX_GROUP;

constexpr int TILE = 24;  // rows that are taken at once

// Tiles per block of scores, and per split of attention; and the steps of a cheap loop that one
// thread takes alone. Tests compile smaller ones, so that small problems have several.
#ifndef TS_BLOCK_TILES
#define TS_BLOCK_TILES 20
#define TS_SPLIT_TILES 10
#define TS_ALONE 65536
#endif

// Memory of a call, handed out in one order: the same code measures it, from address 0 on.
struct Arena {
  uintptr_t base;
  int64_t used;

  template <class T>
  T* take(int64_t count) {
    T* result = (T*)(base + (uintptr_t)used);
    used += ceil_div(count * (int64_t)sizeof(T), 64) * 64;
    return result;
  }
};

// Threads for so many steps of a cheap loop: waking others takes as long as some thousands.
static inline int64_t threads_for(const Call& c, int64_t steps) {
  return steps < TS_ALONE ? 1 : c.threads;
}

// Floats of a query's row: whole vectors, zeros behind D.
static inline int64_t padded(int64_t D) { return ceil_div(D, 16) * 16; }

static inline int64_t length(const Call& c, int64_t b) {
  return max(0, min(c.lengths[b], c.Lk));
}

// The first candidate, and the first position of the local window (semantics: regions).
struct Regions {
  int64_t sink_end, local_start;
};

static inline Regions regions(const Call& c, int64_t n) {
  int64_t local_start = max(0, n - c.Lq + 1 - c.n_local);
  return {min(c.n_sink, local_start), local_start};
}

// So many millionths of a count, rounded up.
static inline int64_t part(int64_t millionths, int64_t count) {
  return ceil_div(count * millionths, 1000000);
}

// How many tokens are selected by vote of a request of n.
static inline int64_t budget(const Call& c, int64_t n) {
  return min(max(part(c.millionths, n), c.least), c.most);
}

// A cache of elements E. A page that is not in the pool is read as page 0: nonsense, in bounds.
template <class E>
struct Cache {
  typedef typename E::raw raw;
  const Call& c;
  const raw* base;
  int64_t outer, head, token, dim, width;

  const raw* row(int64_t b, int64_t g, int64_t position) const {
    if (c.table == nullptr) return base + b * outer + g * head + position * token;
    uint32_t page = (uint32_t)position / (uint32_t)c.page_size;
    uint32_t slot = (uint32_t)position % (uint32_t)c.page_size;
    return base + page_of(b, page) * outer + g * head + slot * token;
  }

  int64_t page_of(int64_t b, int64_t page) const {
    int64_t entry = c.table[b * c.table_request + page * c.table_page];
    return entry >= 0 && entry < c.n_pages ? entry : 0;
  }
};

template <class E>
static inline Cache<E> keys_of(const Call& c) {
  return {c, (const typename E::raw*)c.k, c.k_outer, c.k_head, c.k_token, c.k_dim, c.D};
}

template <class E>
static inline Cache<E> values_of(const Call& c) {
  return {c, (const typename E::raw*)c.v, c.v_outer, c.v_head, c.v_token, c.v_dim, c.Dv};
}

// Up to TILE rows, each contiguous: in place, or copied where a row's elements lie apart.
template <class E>
struct Tile {
  typedef typename E::raw raw;
  const raw* row[TILE];
  alignas(64) raw copies[TILE * MAX_DIM];

  TS_APART void gather(const Cache<E>& cache) {
    if (cache.dim == 1) return;
    for (int t = 0; t < TILE; ++t) {
      raw* copy = copies + t * MAX_DIM;
      for (int64_t d = 0; d < cache.width; ++d) copy[d] = row[t][d * cache.dim];
      row[t] = copy;
    }
  }

  // Positions first to first + count - 1; the last one again in the places behind.
  TS_APART void take(const Cache<E>& cache, int64_t b, int64_t g, int64_t first, int count) {
    if (cache.c.table == nullptr) {
      for (int t = 0; t < TILE; ++t) row[t] = cache.row(b, g, first + min(t, count - 1));
    } else {
      int64_t page_size = cache.c.page_size, page = first / page_size, slot = first % page_size;
      const raw* start = cache.base + cache.page_of(b, page) * cache.outer + g * cache.head;
      for (int t = 0; t < TILE; ++t) {
        row[t] = start + slot * cache.token;
        if (t + 1 < count && ++slot == page_size) {
          slot = 0;
          start = cache.base + cache.page_of(b, ++page) * cache.outer + g * cache.head;
        }
      }
    }
    gather(cache);
  }

  // Listed positions. One that the request does not have is read as its last.
  TS_APART void take(const Cache<E>& cache, int64_t b, int64_t g, const int32_t* position,
                     int count, int64_t n) {
    for (int t = 0; t < TILE; ++t) {
      int64_t at = position[min(t, count - 1)];
      row[t] = cache.row(b, g, at >= 0 && at < n ? at : n - 1);
    }
    gather(cache);
  }
};

template <class E>
TS_APART static void widen_row(const typename E::raw* from, int64_t width, float* to) {
  int64_t d = 0;
  for (; d + W <= width; d += W) store(to + d, E::widen(from + d));
  for (; d < width; ++d) to[d] = E::widen_one(from[d]);
}

// --- rotations (semantics: positions; numerics: moving keys) ---

// cos and sin of `by` positions at every frequency, times a factor; from tables in float64 where
// they reach, of high and low digits of `by`, so that the angle is as exact as in float64.
TS_APART static void cos_sin(const Call& c, int64_t by, double factor, float* cos, float* sin) {
  int64_t size = by < 0 ? -by : by, half = c.half, high = size / ts::LOW, low = size % ts::LOW;
  double sign = by < 0 ? -1.0 : 1.0;
  if (high < c.n_high) {
    const double* a = c.cos_sin_table + low * 2 * half;
    const double* b = c.cos_sin_table + (ts::LOW + high) * 2 * half;
    for (int64_t i = 0; i < half; ++i) {
      cos[i] = (float)((a[i] * b[i] - a[half + i] * b[half + i]) * factor);
      sin[i] = (float)((a[i] * b[half + i] + a[half + i] * b[i]) * factor * sign);
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    double angle = (double)by * c.inv_freq[i];
    cos[i] = (float)(__builtin_cos(angle) * factor);
    sin[i] = (float)(__builtin_sin(angle) * factor);
  }
}

// Put the first of each pair of rotated dims below the second ones, as `rotate` has them. Queries
// and keys alike, so that a dot product does not change.
TS_APART static void split_pairs(const Call& c, float* x) {
  if (!c.interleaved) return;
  float apart[MAX_DIM];
  for (int64_t i = 0; i < c.half; ++i) {
    apart[i] = x[2 * i];
    apart[c.half + i] = x[2 * i + 1];
  }
  memcpy(x, apart, (size_t)(2 * c.half) * sizeof *x);
}

TS_APART static void rotate(const Call& c, float* x, const float* cos, const float* sin) {
  float *first = x, *second = x + c.half;
  for (int64_t i = 0; i < c.half; ++i) {
    float a = first[i], b = second[i];
    first[i] = a * cos[i] - b * sin[i];
    second[i] = a * sin[i] + b * cos[i];
  }
}

// A row, widened, and rotated by cos and sin (`by`, one after the other) if that is not null; what
// is `ahead` of it is fetched. In the order of split_pairs.
template <class E>
TS_APART static void widen_rotated(const Call& c, const typename E::raw* from,
                                   const typename E::raw* ahead, const float* by, float* to) {
  const int64_t half = c.half;
  if (c.interleaved || by == nullptr) {
    widen_row<E>(from, c.D, to);
    split_pairs(c, to);
    if (by) rotate(c, to, by, by + half);
    return;
  }
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = E::widen(from + i), b = E::widen(from + half + i);
    vf cos = load(by + i), sin = load(by + half + i);
    store(to + i, a * cos - b * sin);
    store(to + half + i, a * sin + b * cos);
    __builtin_prefetch(ahead + i);
    __builtin_prefetch(ahead + half + i);
  }
  for (; i < half; ++i) {
    float a = E::widen_one(from[i]), b = E::widen_one(from[half + i]);
    to[i] = a * by[i] - b * by[half + i];
    to[half + i] = a * by[half + i] + b * by[i];
  }
  widen_row<E>(from + 2 * half, c.D - 2 * half, to + 2 * half);
}

// Query i of a head, float32, zeros behind D, moved from its own position to `at`.
template <class E>
TS_APART static void query_row(const Call& c, int64_t b, int64_t h, int64_t i, bool moves,
                             int64_t n, int64_t at, float* to) {
  const typename E::raw* from =
      (const typename E::raw*)c.q + b * c.q_request + h * c.q_head + i * c.q_token;
  for (int64_t d = 0; d < c.D; ++d) to[d] = E::widen_one(from[d * c.q_dim]);
  for (int64_t d = c.D; d < padded(c.D); ++d) to[d] = 0;
  if (!moves) return;
  float cos[MAX_DIM / 2], sin[MAX_DIM / 2];
  cos_sin(c, c.is_raw ? at : at - (n - c.Lq + i), c.is_raw ? c.rope_scaling : 1.0, cos, sin);
  split_pairs(c, to);
  rotate(c, to, cos, sin);
}

}  // namespace TS_PATH
