// The Selection Cache's two steps: decide before scoring, update after selecting.
//
// A decision has no tolerance, so its sums are float64 and in the order that the reference
// specifies (tokenselect/reference/reuse.py). Products of two float32 numbers are exact in float64:
// a fused multiplication and addition gives the same.
#pragma once

#include "rows.h"

namespace TS_PATH {

struct Reuser {
  const Call& c;
  float* query;          // (B, Hq * D), the mean of the call's queries
  int32_t* open_lengths;  // 0 where a selection is reused
  uint8_t* reused;

  Reuser(const Call& call, Arena& arena) : c(call) {
    query = c.mean_query ? c.mean_query : arena.take<float>(c.B * c.Hq * c.D);
    open_lengths = c.open_lengths ? c.open_lengths : arena.take<int32_t>(c.B);
    reused = c.reused;
  }

  template <class E>
  void decide() const {
    ts::parallel(threads_for(c, c.B * c.Hq * c.D * (c.Lq + 3)), c.B, [&](int64_t b) {
      for (int64_t h = 0; h < c.Hq; ++h) average<E>(b, h);
      reused[b] = c.has_theta && holds(b);
      open_lengths[b] = reused[b] ? 0 : c.lengths[b];
    });
  }

  // One head's mean query: rows of 16 queries, one after the other, then half onto half.
  template <class E>
  void average(int64_t b, int64_t h) const {
    const typename E::raw* from = (const typename E::raw*)c.q + b * c.q_request + h * c.q_head;
    float* to = query + b * c.Hq * c.D + h * c.D;
    for (int64_t d = 0; d < c.D; ++d) {
      if (c.Lq == 1) {
        to[d] = E::widen_one(from[d * c.q_dim]);
        continue;
      }
      double sums[16] = {};
      for (int64_t i = 0; i < c.Lq; ++i) {
        sums[i % 16] += (double)E::widen_one(from[i * c.q_token + d * c.q_dim]);
      }
      for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
      }
      to[d] = (float)(sums[0] * (1 / (double)c.Lq));
    }
  }

  bool holds(int64_t b) const {
    int64_t n = length(c, b), stored = c.stored_length[b], appended = n - stored, count = 0;
    for (int64_t s = 0; s < c.S; ++s) count = max(count, c.stored_count[b * c.S + s]);
    if (stored <= 0 || appended < c.Lq || appended > c.max_reuse) return false;
    if (count + appended > c.K) return false;
    const float* now = query + b * c.Hq * c.D;
    const float* then = c.stored_query + b * c.Hq * c.D;
    double product = dot(now, then), both = dot(now, now) * dot(then, then);
    double bound = c.theta * __builtin_fabs(c.theta) * both;
    return both > 0 && both < __builtin_inf() && product * __builtin_fabs(product) >= bound;
  }

  // 512 columns that add up one row after the other, then half onto half.
  double dot(const float* x, const float* y) const {
    constexpr int COLUMNS = 512;
    double sums[COLUMNS] = {};
    int64_t N = c.Hq * c.D;
    for (int64_t i = 0; i < N; i += COLUMNS) {
      int64_t m = min(COLUMNS, N - i);
      for (int64_t j = 0; j < m; ++j) sums[j] += (double)x[i + j] * (double)y[i + j];
    }
    for (int half = COLUMNS / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sums[j] += sums[half + j];
    }
    return sums[0];
  }

  // Complete the selections that are reused with what was appended; store the others.
  void update() const {
    ts::parallel(threads_for(c, c.B * c.S * c.columns), c.B, [&](int64_t b) {
      int64_t n = length(c, b), stored_n = c.stored_length[b];
      for (int64_t s = 0; s < c.S; ++s) {
        int32_t* to = c.positions + (b * c.S + s) * c.columns;
        int32_t* stored = c.stored + (b * c.S + s) * c.stored_columns;
        int32_t &count = c.count[b * c.S + s], &stored_count = c.stored_count[b * c.S + s];
        if (reused[b]) {
          int64_t total = stored_count + n - stored_n;
          for (int64_t r = 0; r < c.columns; ++r) {
            int64_t position = r < stored_count ? stored[r] : stored_n + r - stored_count;
            to[r] = r < total ? (int32_t)position : -1;
          }
          count = (int32_t)total;
        } else {
          memcpy(stored, to, (size_t)c.columns * sizeof *to);
          stored_count = count;
        }
      }
      (reused[b] ? c.hits : c.misses)[b] += n > 0;
      if (reused[b]) return;
      size_t size = (size_t)(c.Hq * c.D) * sizeof *query;
      memcpy(c.stored_query + b * c.Hq * c.D, query + b * c.Hq * c.D, size);
      c.stored_length[b] = (int32_t)n;
    });
  }
};

}  // namespace TS_PATH
