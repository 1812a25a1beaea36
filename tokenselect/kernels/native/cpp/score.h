// Stage 1, score: one pass over the keys; what is kept is a float per head and token.
//
// The tokens of a request are cut into blocks. Of each block and head, what is kept is e^(s - top),
// top, the largest logit of the block, and the sum; a softmax's weight is then a product, without a
// second exp. Blocks depend on positions alone and are added up in their order, so that no result
// depends on the number of threads.
#pragma once

#include "dots.h"
#include "select.h"

namespace TS_PATH {

constexpr int BLOCK = TS_BLOCK_TILES * TILE;

// What one pass over the keys adds: the votes of one run of queries, or the lse, or both.
struct Pass {
  int64_t first, last;      // of the queries that are averaged
  bool votes, lse, is_new;  // is_new: the first votes
};

struct Scorer {
  const Call& c;
  int64_t G, R, blocks, pitch;
  float *queries, *exps, *top, *total, *inner_top, *inner_total, *factor, *offsets, *unpooled;
  Cut* cuts;
  float* votes;
  int32_t* queue;

  Scorer(const Call& call, int64_t longest, Arena& arena, bool own_votes) : c(call) {
    G = c.Hq / c.Hkv, R = c.score_at == ts::AT_BOTH ? 2 : 1;
    blocks = ceil_div(longest, BLOCK), pitch = padded(c.D);
    int64_t rows = R * c.B * c.Hq;
    queries = arena.take<float>(rows * pitch);
    exps = arena.take<float>(rows * blocks * BLOCK);
    top = arena.take<float>(rows * blocks);
    total = arena.take<float>(rows * blocks);
    inner_top = c.over_candidates ? arena.take<float>(rows * blocks) : top;
    inner_total = c.over_candidates ? arena.take<float>(rows * blocks) : total;
    factor = arena.take<float>(rows * blocks);
    offsets = arena.take<float>(R * TILE * 2 * c.half);
    cuts = arena.take<Cut>(c.vote == ts::HARD ? rows : 0);
    votes = own_votes ? arena.take<float>(c.B * R * c.S * c.Lk) : c.votes;
    unpooled = c.pool > 1 ? arena.take<float>(c.B * R * c.S * c.Lk) : nullptr;
    queue = arena.take<int32_t>(c.pool > 1 ? c.B * c.S * c.Lk : 0);
  }

  // Of two ballots, the first scores at the one distance.
  bool is_fixed(int64_t ballot) const {
    return c.score_at == ts::AT_FIXED || ballot + 1 < R;
  }
  bool rotates(int64_t ballot) const { return c.half > 0 && (is_fixed(ballot) || c.is_raw); }
  // Whether keys are read as they are: not rotated, and in the order of the queries' dims.
  bool in_place(int64_t ballot) const {
    return !rotates(ballot) || (direction(ballot) == 0 && !c.interleaved);
  }
  // Keys are rotated up to their positions, down from them, or not at all.
  int64_t direction(int64_t ballot) const {
    return (is_fixed(ballot) ? 0 : 1) - (c.is_raw ? 0 : 1);
  }
  // Rows: of a ballot, a request and a query head.
  int64_t row(int64_t ballot, int64_t b, int64_t h) const {
    return (ballot * c.B + b) * c.Hq + h;
  }
  float* votes_of(int64_t b, int64_t ballot, int64_t s) const {
    return votes + ((b * R + ballot) * c.S + s) * c.Lk;
  }
  // Where a pass adds up: what is pooled later is apart.
  float* sums_of(int64_t b, int64_t ballot, int64_t s) const {
    return unpooled ? unpooled + ((b * R + ballot) * c.S + s) * c.Lk : votes_of(b, ballot, s);
  }
  // A block's G rows of BLOCK, side by side.
  float* block_of(int64_t ballot, int64_t b, int64_t g, int64_t block) const {
    return exps + (row(ballot, b, g * G) * blocks + block * G) * BLOCK;
  }
  int64_t place(int64_t row, int64_t block) const { return row * blocks + block; }

  template <class E>
  void average(const Pass& pass, int64_t ballot, int64_t b, int64_t h) const {
    int64_t n = length(c, b);
    double sums[MAX_DIM] = {};
    float one[MAX_DIM];
    for (int64_t i = pass.first; i < pass.last; ++i) {
      int64_t at = is_fixed(ballot) ? c.n_local : n - c.Lq + i;
      query_row<E>(c, b, h, i, rotates(ballot), n, at, one);
      for (int64_t d = 0; d < c.D; ++d) sums[d] += one[d];
    }
    float* mean = queries + row(ballot, b, h) * pitch;
    double share = 1.0 / (double)(pass.last - pass.first);
    for (int64_t d = 0; d < pitch; ++d) mean[d] = d < c.D ? (float)(sums[d] * share) : 0.0f;
    // As keys that are read in place would be, were they rotated, by nothing.
    bool scales = rotates(ballot) && in_place(ballot) && c.is_raw;
    for (int64_t d = 0; scales && d < 2 * c.half; ++d) mean[d] *= (float)c.rope_scaling;
  }

  // Logits of a block and some KV heads, before scale and softcap: a tile of all of these heads
  // after the other, while the next one is fetched.
  template <class E>
  void products(int64_t ballot, int64_t b, int64_t g_first, int64_t g_end, int64_t first,
                int64_t m, int64_t block) const {
    const Cache<E> keys = keys_of<E>(c);
    Tile<E> tiles[2];
    RotatedTile rotated;
    int now = 0;
    tiles[0].take(keys, b, g_first, first, (int)min(TILE, m));
    for (int64_t t = 0; t < m; t += TILE) {
      for (int64_t g = g_first; g < g_end; ++g, now ^= 1) {
        bool is_last = g + 1 == g_end;
        int64_t t_next = is_last ? t + TILE : t, left = m - t_next;
        if (left > 0) {
          tiles[now ^ 1].take(keys, b, is_last ? g_first : g + 1, first + t_next,
                              (int)min(TILE, left));
        }
        const auto* rows = tiles[now].row;
        const auto* ahead = left > 0 && keys.dim == 1 ? tiles[now ^ 1].row : rows;
        const float* q = queries + row(ballot, b, g * G) * pitch;
        float* s = block_of(ballot, b, g, block) + t;
        int count = (int)min(TILE, m - t);
        if (!in_place(ballot)) {
          rotated_products<E>(rotated, ballot, q, first + t, rows, ahead, count, s);
        } else {
          dots<E>(q, G, pitch, rows, ahead, count, c.D, s, BLOCK);
        }
      }
    }
  }

  // Keys and queries of a tile that is rotated, and what both are rotated by.
  struct RotatedTile {
    alignas(64) float queries[MAX_GROUP * MAX_DIM], keys[TILE * MAX_DIM];
    float cos[MAX_DIM / 2], sin[MAX_DIM / 2];
  };

  // The same for keys that are rotated. A logit depends on the difference of two angles alone: so
  // the queries take that of a tile's first key, and the keys only what is left of theirs.
  template <class E>
  void rotated_products(RotatedTile& rotated, int64_t ballot, const float* q, int64_t first,
                        const typename E::raw* const* rows, const typename E::raw* const* ahead,
                        int count, float* s) const {
    int64_t up = direction(ballot);
    const float* by = offsets + ballot * TILE * 2 * c.half;
    const float* row[TILE];
    cos_sin(c, -up * first, c.is_raw ? c.rope_scaling : 1.0, rotated.cos, rotated.sin);
    memcpy(rotated.queries, q, (size_t)(G * pitch) * sizeof *q);
    for (int64_t r = 0; r < G; ++r) {
      rotate(c, rotated.queries + r * pitch, rotated.cos, rotated.sin);
    }
    for (int i = 0; i < TILE; ++i) {
      row[i] = rotated.keys + i * pitch;
      widen_rotated<E>(c, rows[i], ahead[i], up == 0 ? nullptr : by + i * 2 * c.half,
                       rotated.keys + i * pitch);
    }
    dots<Float32>(rotated.queries, G, pitch, row, row, count, c.D, s, BLOCK);
  }

  // The tables of rotations of keys by 0 to TILE - 1 positions.
  void prepare() const {
    for (int64_t ballot = 0; ballot < R; ++ballot) {
      for (int64_t i = 0; i < TILE && !in_place(ballot); ++i) {
        float* by = offsets + (ballot * TILE + i) * 2 * c.half;
        cos_sin(c, direction(ballot) * i, 1.0, by, by + c.half);
      }
    }
  }

  // A block of tokens of some KV heads. The second ballot finds the keys in the processor's cache.
  template <class E>
  void score_block(const Pass& pass, int64_t b, int64_t g_first, int64_t g_end,
                   int64_t block) const {
    int64_t first = block * BLOCK, m = min(BLOCK, length(c, b) - first);
    for (int64_t ballot = pass.votes ? 0 : R - 1; ballot < R; ++ballot) {
      products<E>(ballot, b, g_first, g_end, first, m, block);
      for (int64_t g = g_first; g < g_end; ++g) exponentiate(ballot, b, g, block, first, m);
    }
  }

  // Turn a block's logits into what is kept of them.
  TS_APART void exponentiate(int64_t ballot, int64_t b, int64_t g, int64_t block, int64_t first,
                       int64_t m) const {
    Regions of = regions(c, length(c, b));
    for (int64_t r = 0; r < G; ++r) {
      int64_t at = place(row(ballot, b, g * G + r), block);
      float* s = block_of(ballot, b, g, block) + r * BLOCK;
      top[at] = finish(s, m);
      if (c.vote != ts::SOFT) {
        total[at] = add_up(s, 0, m, top[at], nullptr);
      } else if (!c.over_candidates) {
        total[at] = add_up(s, 0, m, top[at], s);
      } else {
        total[at] = add_up(s, 0, m, top[at], nullptr);
        int64_t from = max(of.sink_end - first, 0), to = min(of.local_start - first, m);
        inner_top[at] = -INF;
        for (int64_t j = from; j < to; ++j) {
          inner_top[at] = s[j] > inner_top[at] ? s[j] : inner_top[at];
        }
        inner_total[at] = add_up(s, from, to, inner_top[at], s);
      }
    }
  }

  // Scale, cap, and give -inf to what is not finite and to what lies behind m; return the largest.
  TS_APART float finish(float* s, int64_t m) const {
    vf largest = all(-INF), scale = all((float)c.select_scale);
    for (int64_t j = m; j < ceil_div(m, W) * W; ++j) s[j] = -INF;
    for (int64_t j = 0; j < m; j += W) {
      vf x = load(s + j) * scale;
      vi finite = (vf)((vi)x & 0x7fffffff) < INF;
      if (c.softcap > 0) x = tanh(x / (float)c.softcap) * (float)c.softcap;
      x = select_lanes(finite, x, all(-INF));
      store(s + j, x);
      largest = larger(x, largest);
    }
    return maximum(largest);
  }

  // The sum of e^(s - top) over a range; `kept` gets the terms, if it is not null.
  TS_APART static float add_up(const float* s, int64_t from, int64_t to, float top, float* kept) {
    vf sums = {}, above = all(top > -INF ? top : 0.0f);
    int64_t j = from;
    for (; j + W <= to; j += W) {
      vf x = exp(load(s + j) - above);
      if (kept) store(kept + j, x);
      sums += x;
    }
    if (j < to) {
      float part[W];
      store(part, all(-INF));
      memcpy(part, s + j, (size_t)(to - j) * sizeof *s);
      vf x = exp(load(part) - above);
      store(part, x);
      if (kept) memcpy(kept + j, part, (size_t)(to - j) * sizeof *s);
      sums += x;
    }
    return sum(sums);
  }

  // Of a head's blocks: the lse, and by what a kept term becomes a weight of the softmax.
  TS_APART void normalize(const Pass& pass, int64_t ballot, int64_t b, int64_t h) const {
    int64_t n = length(c, b), used = ceil_div(n, BLOCK), head = row(ballot, b, h);
    if (pass.lse && ballot + 1 == R) {
      double sum;
      float largest = merged(top, total, head, used, sum);
      c.dense_lse[b * c.Hq + h] = sum > 0 ? (float)(largest + __builtin_log(sum)) : -INF;
    }
    if (!pass.votes) return;
    if (c.vote == ts::HARD) {
      Regions of = regions(c, n);
      auto key = [&](int64_t i) { return ordered(logit(ballot, b, h, of.sink_end + i)); };
      cuts[head] = find_cut(of.local_start - of.sink_end, budget(c, n), key);
    }
    if (c.vote != ts::SOFT) return;
    double sum;
    float largest = merged(inner_top, inner_total, head, used, sum);
    for (int64_t at = place(head, 0); at < place(head, used); ++at) {
      bool has_weight = inner_top[at] > -INF && sum > 0;
      factor[at] = has_weight ? (float)(__builtin_exp((double)inner_top[at] - largest) / sum) : 0;
    }
  }

  TS_APART float merged(const float* tops, const float* totals, int64_t head, int64_t used,
                        double& sum) const {
    float largest = -INF;
    for (int64_t at = place(head, 0); at < place(head, used); ++at) {
      largest = tops[at] > largest ? tops[at] : largest;
    }
    sum = 0;
    for (int64_t at = place(head, 0); at < place(head, used); ++at) {
      if (tops[at] > -INF) sum += totals[at] * __builtin_exp((double)tops[at] - largest);
    }
    return largest;
  }

  float logit(int64_t ballot, int64_t b, int64_t h, int64_t j) const {
    return block_of(ballot, b, h / G, j / BLOCK)[h % G * BLOCK + j % BLOCK];
  }

  // Add a block's votes up, head after head; a whole block, whatever of it are candidates.
  TS_APART void vote_block(const Pass& pass, int64_t ballot, int64_t b, int64_t block) const {
    int64_t n = length(c, b), first = block * BLOCK, m = min(BLOCK, n - first);
    int64_t heads = c.Hq / c.S, start = regions(c, n).sink_end;
    alignas(64) float sums[BLOCK];
    for (int64_t s = 0; s < c.S; ++s) {
      float* to = sums_of(b, ballot, s) + first;
      memset(sums, 0, sizeof sums);
      if (!pass.is_new) memcpy(sums, to, (size_t)m * sizeof *to);
      for (int64_t h = s * heads; h < (s + 1) * heads; ++h) {
        const float* x = block_of(ballot, b, h / G, block) + h % G * BLOCK;
        if (c.vote == ts::HARD) {
          const Cut& cut = cuts[row(ballot, b, h)];
          for (int64_t j = 0; j < m; ++j) {
            sums[j] += first + j >= start && cut.takes(ordered(x[j]), first + j - start);
          }
        } else {
          vf by = all(c.vote == ts::SOFT ? factor[place(row(ballot, b, h), block)] : 1.0f);
          for (int64_t j = 0; j < m; j += W) store(sums + j, load(sums + j) + load(x + j) * by);
        }
      }
      memcpy(to, sums, (size_t)m * sizeof *to);
    }
  }

  // The largest of each centred window of `pool` candidates, by a queue of those that may be it.
  TS_APART void pool_votes(int64_t b, int64_t ballot, int64_t s) const {
    Regions of = regions(c, length(c, b));
    int64_t m = of.local_start - of.sink_end, reach = min(c.pool / 2, m), read = 0;
    const float* from = sums_of(b, ballot, s) + of.sink_end;
    float* to = votes_of(b, ballot, s) + of.sink_end;
    int32_t* in_reach = queue + (b * c.S + s) * c.Lk;  // of one ballot after the other
    int64_t front = 0, back = 0;
    for (int64_t j = 0; j < m; ++j) {
      for (; read < m && read <= j + reach; ++read) {
        while (back > front && from[in_reach[back - 1]] <= from[read]) --back;
        in_reach[back++] = (int32_t)read;
      }
      while (in_reach[front] < j - reach) ++front;
      to[j] = from[in_reach[front]];
    }
  }

  // -inf to all places of a row that are no candidate's.
  void mask_others(int64_t b, int64_t ballot, int64_t s) const {
    int64_t n = length(c, b);
    Regions of = n > 0 ? regions(c, n) : Regions{0, 0};
    float* row = votes_of(b, ballot, s);
    for (int64_t j = 0; j < of.sink_end; ++j) row[j] = -INF;
    for (int64_t j = of.local_start; j < c.Lk; ++j) row[j] = -INF;
  }

  template <class E>
  void run_pass(const Pass& pass) const {
    int64_t rows = R * c.B * c.Hq;
    ts::parallel(threads_for(c, rows * (pass.last - pass.first) * c.D), rows, [&](int64_t unit) {
      int64_t h = unit % c.Hq, b = unit / c.Hq % c.B;
      if (length(c, b) > 0) average<E>(pass, unit / c.Hq / c.B, b, h);
    });
    // Where the heads of a token lie side by side, they are read together.
    int64_t together = c.k_head < c.k_token ? c.Hkv : 1, parts = c.Hkv / together;
    ts::parallel(c.threads, c.B * blocks * parts, [&](int64_t unit) {
      int64_t g = unit % parts * together, block = unit / parts % blocks, b = unit / parts / blocks;
      if (block * BLOCK < length(c, b)) score_block<E>(pass, b, g, g + together, block);
    });
    int64_t exps = c.vote == ts::HARD ? c.Lk : 16 * blocks;
    ts::parallel(threads_for(c, rows * exps), rows, [&](int64_t unit) {
      int64_t h = unit % c.Hq, b = unit / c.Hq % c.B;
      if (length(c, b) > 0) {
        normalize(pass, unit / c.Hq / c.B, b, h);
      } else if (pass.lse) {
        c.dense_lse[b * c.Hq + h] = -INF;
      }
    });
    if (!pass.votes) return;
    ts::parallel(threads_for(c, rows * blocks * BLOCK / 4), R * c.B * blocks, [&](int64_t unit) {
      int64_t block = unit % blocks, b = unit / blocks % c.B;
      if (block * BLOCK < length(c, b)) vote_block(pass, unit / blocks / c.B, b, block);
    });
  }

  template <class E>
  void run(bool masks) const {
    prepare();
    int64_t runs = min(c.runs, c.Lq);
    for (int64_t i = 0, first = 0; i < runs; ++i) {
      int64_t last = first + c.Lq / runs + (i < c.Lq % runs);
      run_pass<E>({first, last, true, runs == 1, i == 0});
      first = last;
    }
    if (runs > 1) run_pass<E>({0, c.Lq, false, true, false});
    if (!unpooled && !masks) return;
    ts::parallel(threads_for(c, c.B * R * c.S * c.Lk / 4), c.B * c.S, [&](int64_t unit) {
      for (int64_t ballot = 0; ballot < R; ++ballot) {
        int64_t b = unit / c.S, s = unit % c.S;
        if (unpooled && length(c, b) > 0) pool_votes(b, ballot, s);
        if (masks) mask_others(b, ballot, s);
      }
    });
  }
};

}  // namespace TS_PATH
