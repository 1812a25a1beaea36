// Stage 3, attend: softmax attention over the selected rows, read where they are.
//
// The selected positions are cut into splits of a fixed size. A split's logits are computed first,
// then its weights, relative to the split's largest logit, then the weighted values; the splits
// of a query are merged in their order.
#pragma once

#include "dots.h"

namespace TS_PATH {

constexpr int SPLIT = TS_SPLIT_TILES * TILE;

struct Attender {
  const Call& c;
  int64_t G, S, splits, pitch, width;
  float *queries, *parts, *rotations;

  Attender(const Call& call, Arena& arena) : c(call) {
    G = c.Hq / c.Hkv, S = c.S, splits = ceil_div(c.columns, SPLIT), pitch = padded(c.D);
    width = c.Dv + 2;  // the sum of weighted values, the largest logit, the sum of weights
    int64_t rows = c.stages & ts::ATTEND && !c.in_tiles ? c.B * c.Hq * c.Lq : 0;
    queries = arena.take<float>(rows * pitch);
    parts = arena.take<float>(rows * splits * width);
    rotations = arena.take<float>(moves() ? c.B * S * c.columns * 2 * c.half : 0);
  }

  bool moves() const { return c.half > 0 && (c.contiguous || c.is_raw); }
  const int32_t* row_of(int64_t b, int64_t s) const {
    return c.positions + (b * S + s) * c.columns;
  }
  int64_t count_of(int64_t b, int64_t s) const {
    return length(c, b) == 0 ? 0 : max(0, min(c.count[b * S + s], c.columns));
  }
  int64_t selection_of(int64_t g) const { return S == 1 ? 0 : g; }
  float* query(int64_t b, int64_t h, int64_t i) const {
    return queries + ((b * c.Hq + h) * c.Lq + i) * pitch;
  }
  float* part(int64_t b, int64_t h, int64_t i, int64_t split) const {
    return parts + (((b * c.Hq + h) * c.Lq + i) * splits + split) * width;
  }
  float* rotation(int64_t b, int64_t s, int64_t r) const {
    return rotations + ((b * S + s) * c.columns + r) * 2 * c.half;
  }

  // How many selected positions query i sees: they ascend, so it sees a prefix.
  TS_APART int64_t seen(int64_t b, int64_t s, int64_t i) const {
    const int32_t* positions = row_of(b, s);
    int64_t low = 0, high = count_of(b, s), newest = length(c, b) - c.Lq + i;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (positions[middle] <= newest) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  template <class E>
  void place_query(int64_t b, int64_t h, int64_t i) const {
    int64_t n = length(c, b), count = count_of(b, selection_of(h / G));
    int64_t at = c.contiguous ? count - c.Lq + i : n - c.Lq + i;
    query_row<E>(c, b, h, i, moves(), n, at, query(b, h, i));
  }

  // By what the r-th selected key is rotated, for all heads of a selection.
  void place_key(int64_t b, int64_t s, int64_t r) const {
    int64_t position = row_of(b, s)[r], at = c.contiguous ? r : position;
    float* by = rotation(b, s, r);
    double factor = c.is_raw ? c.rope_scaling : 1.0;
    cos_sin(c, c.is_raw ? at : at - position, factor, by, by + c.half);
  }

  // A tile of selected keys, widened and rotated.
  template <class E>
  void moved_keys(const typename E::raw* const* rows, const typename E::raw* const* ahead,
                  int64_t b, int64_t s, int64_t first, int count, float* wide,
                  int64_t stride) const {
    for (int t = 0; t < count; ++t) {
      widen_rotated<E>(c, rows[t], ahead[t], rotation(b, s, first + t), wide + t * stride);
    }
  }

  template <class E>
  void attend_split(int64_t b, int64_t g, int64_t i, int64_t split) const {
    int64_t n = length(c, b), s = selection_of(g), first = split * SPLIT;
    int64_t m = min(SPLIT, seen(b, s, i) - first);
    if (m <= 0) return;
    const int32_t* position = row_of(b, s) + first;
    const Cache<E> keys = keys_of<E>(c), values = values_of<E>(c);
    alignas(64) float weights[MAX_GROUP * SPLIT], wide[TILE * MAX_DIM];
    float q[MAX_GROUP * MAX_DIM];
    for (int64_t r = 0; r < G; ++r) {
      memcpy(q + r * pitch, query(b, g * G + r, i), (size_t)pitch * sizeof *q);
    }
    // Tiles in turn: while one is multiplied, the next one is fetched, the first values behind the
    // last keys.
    Tile<E> tiles[2];
    int64_t n_tiles = ceil_div(m, TILE);
    auto take = [&](int64_t tile) {
      int64_t t = tile % n_tiles * TILE;
      const Cache<E>& cache = tile < n_tiles ? keys : values;
      tiles[tile % 2].take(cache, b, g, position + t, (int)min(TILE, m - t), n);
      return cache.dim == 1;
    };
    take(0);
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      int64_t t = tile * TILE;
      int count = (int)min(TILE, m - t);
      const Tile<E>& now = tiles[tile % 2];
      const auto* ahead = take(tile + 1) ? tiles[(tile + 1) % 2].row : now.row;
      if (moves()) {
        const float* row[TILE];
        moved_keys<E>(now.row, ahead, b, s, first + t, count, wide, pitch);
        for (int j = 0; j < TILE; ++j) row[j] = wide + min(j, count - 1) * pitch;
        dots<Float32>(q, G, pitch, row, row, count, c.D, weights + t, SPLIT);
      } else {
        dots<E>(q, G, pitch, now.row, ahead, count, c.D, weights + t, SPLIT);
      }
    }
    for (int64_t r = 0; r < G; ++r) {
      float* to = part(b, g * G + r, i, split);
      weigh(weights + r * SPLIT, m, (float)c.scale, to + c.Dv);
      memset(to, 0, (size_t)c.Dv * sizeof *to);
    }
    for (int64_t tile = n_tiles; tile < 2 * n_tiles; ++tile) {
      int64_t t = (tile - n_tiles) * TILE;
      const Tile<E>& now = tiles[tile % 2];
      bool fetches = tile + 1 < 2 * n_tiles && take(tile + 1);
      float* to = part(b, g * G, i, split);
      add_values<E>(now.row, fetches ? tiles[(tile + 1) % 2].row : now.row,
                    (int)min(TILE, m - t), weights + t, to, part(b, g * G + 1, i, split) - to);
    }
  }

  // Turn logits, times a factor, into weights relative to the largest; found[0] gets that, found[1]
  // their sum. There is room for whole vectors.
  TS_APART void weigh(float* s, int64_t m, float factor, float* found) const {
    vf largest = all(-INF), scale = all(factor);
    for (int64_t j = 0; j < m; j += W) {
      vf x = load(s + j) * scale;
      if (c.softcap > 0) x = tanh(x / (float)c.softcap) * (float)c.softcap;
      store(s + j, x);
    }
    for (int64_t j = m; j < ceil_div(m, W) * W; ++j) s[j] = -INF;
    for (int64_t j = 0; j < m; j += W) largest = larger(load(s + j), largest);
    found[0] = maximum(largest);
    vf sums = {}, above = all(finite_or_zero(found[0]));
    for (int64_t j = 0; j < m; j += W) {
      vf x = exp(load(s + j) - above);
      store(s + j, x);
      sums += x;
    }
    found[1] = sum(sums);
  }

  // Of an infinite logit e^inf is inf, and its share NaN, as in dense attention.
  static float finite_or_zero(float x) { return x > -INF && x < INF ? x : 0.0f; }

  // to[r] += sum over t of weights[r, t] values[t], for the G rows of a group.
  template <class E>
  TS_APART void add_values(const typename E::raw* const* value, const typename E::raw* const* ahead,
                  int count, const float* weights, float* to, int64_t stride) const {
    int64_t rows = G;
    while (rows >= 4) {
      add_values_of<E, 4>(value, ahead, count, weights, to, stride);
      weights += 4 * SPLIT, to += 4 * stride, rows -= 4, ahead = value;
    }
    if (rows == 3) add_values_of<E, 3>(value, ahead, count, weights, to, stride);
    if (rows == 2) add_values_of<E, 2>(value, ahead, count, weights, to, stride);
    if (rows == 1) add_values_of<E, 1>(value, ahead, count, weights, to, stride);
  }

  template <class E, int R>
  void add_values_of(const typename E::raw* const* value, const typename E::raw* const* ahead,
                     int count, const float* weights, float* to, int64_t stride) const {
    constexpr int N = R == 1 ? 4 : 2;
    int64_t d = 0;
    for (; d + N * W <= c.Dv; d += N * W) {
      vf sums[R][N];
      TS_UNROLL for (int r = 0; r < R; ++r) {
        TS_UNROLL for (int v = 0; v < N; ++v) sums[r][v] = load(to + r * stride + d + v * W);
      }
      for (int t = 0; t < count; ++t) {
        vf x[N];
        TS_UNROLL for (int v = 0; v < N; ++v) {
          x[v] = E::widen(value[t] + d + v * W);
          __builtin_prefetch(ahead[t] + d + v * W);
        }
        TS_UNROLL for (int r = 0; r < R; ++r) {
          vf by = all(weights[r * SPLIT + t]);
          TS_UNROLL for (int v = 0; v < N; ++v) sums[r][v] += x[v] * by;
        }
      }
      TS_UNROLL for (int r = 0; r < R; ++r) {
        TS_UNROLL for (int v = 0; v < N; ++v) store(to + r * stride + d + v * W, sums[r][v]);
      }
    }
    for (; d < c.Dv; d += W) {
      int wide = (int)min(W, c.Dv - d);
      for (int r = 0; r < R; ++r) {
        vf sums = widen_part<Float32>(to + r * stride + d, wide);
        for (int t = 0; t < count; ++t) {
          sums += widen_part<E>(value[t] + d, wide) * all(weights[r * SPLIT + t]);
        }
        memcpy(to + r * stride + d, &sums, (size_t)wide * sizeof *to);
      }
    }
  }

  // By what a sum of weighted values is multiplied, with the sink's logit in the denominator; the
  // weights are relative to `above` and add up to `total`.
  double factor(int64_t h, float largest, double total) const {
    if (!c.sinks) return 1 / total;
    double sink = c.sinks[h], above = finite_or_zero(largest);
    if (sink == INF) return sink - sink;  // NaN, as softmax has it
    if (largest == -INF && sink > -INF) return 0;
    if (sink <= above) return 1 / (total + __builtin_exp(sink - above));
    double share = __builtin_exp(above - sink);
    return share / (total * share + 1);
  }

  // Merge the splits of one query.
  template <class E>
  void merge(int64_t b, int64_t h, int64_t i) const {
    int64_t count = seen(b, selection_of(h / G), i), used = ceil_div(count, SPLIT);
    float largest = -INF;
    for (int64_t k = 0; k < used; ++k) {
      float x = part(b, h, i, k)[c.Dv];
      largest = x > largest ? x : largest;
    }
    double total = 0, above = finite_or_zero(largest);
    float sums[MAX_DIM] = {};
    for (int64_t k = 0; k < used; ++k) {
      const float* x = part(b, h, i, k);
      double shrunk = x[c.Dv] == -INF ? 0 : __builtin_exp(finite_or_zero(x[c.Dv]) - above);
      total += x[c.Dv + 1] * shrunk;
      float by = (float)shrunk;
      for (int64_t d = 0; d < c.Dv; ++d) sums[d] += x[d] * by;
    }
    finish<E>(b, h, i, count, largest, total, sums);
  }

  // Write what a query that sees `count` keys has: weighted values and weights, added up.
  template <class E>
  void finish(int64_t b, int64_t h, int64_t i, int64_t count, float largest, double total,
              const float* sums) const {
    int64_t at = (b * c.Hq + h) * c.Lq + i;
    typename E::raw* out = (typename E::raw*)c.out + at * c.Dv;
    if (count == 0) {
      for (int64_t d = 0; d < c.Dv; ++d) out[d] = E::narrow(0.0f);
      c.out_lse[at] = -INF;
      return;
    }
    double by = factor(h, largest, total);
    c.out_lse[at] = total == 0 ? -INF : (float)(finite_or_zero(largest) + __builtin_log(total));
    for (int64_t d = 0; d < c.Dv; ++d) out[d] = E::narrow((float)(sums[d] * by));
  }

  template <class E>
  void run() const {
    int64_t rows = c.B * c.Hq * c.Lq;
    ts::parallel(threads_for(c, rows * c.D), rows, [&](int64_t unit) {
      int64_t i = unit % c.Lq, h = unit / c.Lq % c.Hq, b = unit / c.Lq / c.Hq;
      if (length(c, b) > 0) place_query<E>(b, h, i);
    });
    place_keys();
    ts::parallel(c.threads, c.B * splits * c.Hkv * c.Lq, [&](int64_t unit) {
      int64_t i = unit % c.Lq, g = unit / c.Lq % c.Hkv, split = unit / c.Lq / c.Hkv % splits;
      attend_split<E>(unit / c.Lq / c.Hkv / splits, g, i, split);
    });
    ts::parallel(threads_for(c, rows * splits * c.Dv), rows, [&](int64_t unit) {
      merge<E>(unit / c.Lq / c.Hq, unit / c.Lq % c.Hq, unit % c.Lq);
    });
  }

  void place_keys() const {
    if (!moves()) return;
    ts::parallel(c.threads, c.B * S * splits, [&](int64_t unit) {
      int64_t split = unit % splits, s = unit / splits % S, b = unit / splits / S;
      int64_t last = min(count_of(b, s), (split + 1) * SPLIT);
      for (int64_t r = split * SPLIT; r < last; ++r) place_key(b, s, r);
    });
  }

  // The rows of one request, (Hkv, columns, D) and (Hkv, columns, Dv) float32, keys where they
  // attend and in the order of `split_pairs`; for the matrix products of a chunk of queries.
  template <class E>
  void gather() const {
    int64_t b = c.request, n = length(c, b);
    place_keys();
    ts::parallel(c.threads, splits * c.Hkv, [&](int64_t unit) {
      int64_t g = unit % c.Hkv, split = unit / c.Hkv, s = selection_of(g);
      int64_t last = min(count_of(b, s), (split + 1) * SPLIT);
      Tile<E> tile;
      for (int64_t r = split * SPLIT; r < last; r += TILE) {
        int count = (int)min(TILE, last - r);
        float* key = c.key_rows + (g * c.columns + r) * c.D;
        float* value = c.value_rows + (g * c.columns + r) * c.Dv;
        tile.take(keys_of<E>(c), b, g, row_of(b, s) + r, count, n);
        if (moves()) {
          moved_keys<E>(tile.row, tile.row, b, s, r, count, key, c.D);
        } else {
          for (int t = 0; t < count; ++t) widen_row<E>(tile.row[t], c.D, key + t * c.D);
        }
        tile.take(values_of<E>(c), b, g, row_of(b, s) + r, count, n);
        for (int t = 0; t < count; ++t) widen_row<E>(tile.row[t], c.Dv, value + t * c.Dv);
      }
    });
  }

  // Turn logits (G, n_queries, columns) of a KV head, scaled already, into weights: zeros for what
  // a query does not see. Fills its lse, and `factors`, by which weighted values are multiplied.
  void weigh_rows() const {
    int64_t b = c.request, s = selection_of(c.group), m = count_of(b, s);
    ts::parallel(threads_for(c, G * c.n_queries * m), G * c.n_queries, [&](int64_t row) {
      int64_t h = c.group * G + row / c.n_queries, i = c.first_query + row % c.n_queries;
      int64_t visible = seen(b, s, i);
      float *to = c.logits + row * c.logits_pitch, found[2];
      weigh(to, visible, 1.0f, found);
      for (int64_t j = visible; j < m; ++j) to[j] = 0;
      float* lse = c.out_lse + (b * c.Hq + h) * c.Lq + i;
      *lse = found[1] == 0 ? -INF : finite_or_zero(found[0]) + (float)__builtin_log(found[1]);
      c.factors[row] = visible == 0 ? 0 : (float)factor(h, found[0], found[1]);
    });
  }
};

}  // namespace TS_PATH
