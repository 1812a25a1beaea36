// Attention of a chunk of queries by products in tiles, of a bfloat16 cache that is read as it is.
//
// The selected rows are copied once, packed for tiles. Then each unit takes AT_ONCE queries of a KV
// head through the splits in their order: logits, weights relative to the split's largest logit,
// rounded to bfloat16, weighted values; what has been added up before shrinks with a new largest.
#pragma once

#include "attend.h"
#include "tiles.h"

namespace TS_PATH {

struct ChunkAttender {
  static constexpr int KEYS = (SPLIT + DEPTH - 1) / DEPTH * DEPTH;  // of a split

  const Attender& of;
  const Call& c;
  int64_t G, depth, width, splits;  // blocks of D, Dv rounded up to whole products
  uint16_t *keys, *values;
  int32_t* odd;

  ChunkAttender(const Attender& attender, Arena& arena) : of(attender), c(attender.c) {
    G = c.Hq / c.Hkv, depth = ceil_div(c.D, DEPTH), width = ceil_div(c.Dv, AT_ONCE) * AT_ONCE;
    splits = ceil_div(c.columns, KEYS);
    int64_t packed = c.in_tiles ? c.B * c.Hkv * splits : 0;
    keys = arena.take<uint16_t>(packed * keys_size());
    values = arena.take<uint16_t>(packed * values_size());
    odd = arena.take<int32_t>(packed);
  }

  int64_t keys_size() const { return KEYS * depth * DEPTH; }
  int64_t values_size() const { return KEYS * width; }
  int64_t place(int64_t b, int64_t g, int64_t split) const {
    return (b * c.Hkv + g) * splits + split;
  }

  // Keys as columns, values as rows; zeros up to a whole block. A value that is not finite and that
  // not every query sees makes a split odd: in a product its weight of 0 would make NaN of it.
  void pack(int64_t b, int64_t g, int64_t split) const {
    int64_t n = length(c, b), s = of.selection_of(g), first = split * KEYS, at = place(b, g, split);
    int64_t count = min(KEYS, of.count_of(b, s) - first);
    if (count <= 0) return;
    const int32_t* position = of.row_of(b, s) + first;
    const Cache<BFloat16> of_keys = keys_of<BFloat16>(c), of_values = values_of<BFloat16>(c);
    uint32_t* key_pairs = (uint32_t*)(keys + at * keys_size());
    uint32_t* value_pairs = (uint32_t*)(values + at * values_size());
    int64_t end = ceil_div(count, DEPTH) * DEPTH, seen_by_all = of.seen(b, s, 0) - first;
    uint32_t special = 0;
    Tile<BFloat16> tile;
    for (int64_t t0 = 0; t0 < end; t0 += TILE) {
      int64_t there = max(0, min(TILE, count - t0)), last = min(TILE, end - t0);
      if (there > 0) tile.take(of_keys, b, g, position + t0, (int)there, n);
      for (int64_t t = 0; t < last; ++t) {
        uint32_t row[MAX_DIM / 2] = {};
        if (t < there) memcpy(row, tile.row[t], (size_t)c.D * 2);
        uint32_t* to = key_pairs + (t0 + t) / SIDE * depth * (BLOCK_SIZE / 2) + (t0 + t) % SIDE;
        for (int64_t d = 0; d < depth * DEPTH / 2; ++d) to[d * SIDE] = row[d];
      }
      if (there > 0) tile.take(of_values, b, g, position + t0, (int)there, n);
      for (int64_t t = 0; t < last; t += 2) {
        uint16_t row[2][MAX_DIM] = {};
        for (int64_t i = 0; i < 2 && t + i < there; ++i) {
          memcpy(row[i], tile.row[t + i], (size_t)c.Dv * 2);
          if (t0 + t + i >= seen_by_all) special |= has_special(row[i]);
        }
        int64_t block = (t0 + t) / DEPTH * (width / SIDE), line = (t0 + t) % DEPTH / 2;
        for (int64_t d = 0; d < width; d += SIDE) {
          uint32_t* to = value_pairs + (block + d / SIDE) * (BLOCK_SIZE / 2) + line * SIDE;
          for (int64_t j = 0; j < SIDE; ++j) to[j] = row[0][d + j] | (uint32_t)row[1][d + j] << 16;
        }
      }
    }
    odd[at] = special != 0;
  }

  static uint32_t has_special(const uint16_t* row) {
    uint32_t found = 0;
    for (int d = 0; d < MAX_DIM; ++d) found |= (row[d] & 0x7f80) == 0x7f80;
    return found;
  }

  // A query's row of the cache's type, zeros behind D. Returns whether tiles may multiply it: what
  // they take for 0, a subnormal number or product, then changes no weight.
  bool place_query(int64_t b, int64_t h, int64_t i, uint16_t* to) const {
    const uint16_t* from =
        (const uint16_t*)c.q + b * c.q_request + h * c.q_head + i * c.q_token;
    float least = 0x1p-126f, largest = 0x1p64f / (float)(c.scale > 1 ? c.scale : 1);
    bool fits = c.scale < 0x1p64;
    for (int64_t d = 0; d < c.D; ++d) {
      to[d] = from[d * c.q_dim];
      float size = BFloat16::widen_one(to[d] & 0x7fff);
      fits &= size == 0 || (size >= least && size <= largest);
    }
    for (int64_t d = c.D; d < depth * DEPTH; ++d) to[d] = 0;
    return fits;
  }

  // Weights of `count` keys, rounded to the nearest, and zeros up to `end`. A NaN stays one: those
  // that are computed have no low bits to carry.
  static void narrow_row(const float* from, int64_t count, int64_t end, uint16_t* to) {
    for (int64_t j = 0; j < count; j += W) {  // the lanes behind are zeros, as `weigh` leaves them
      vu bits = (vu)load(from + j);
      vh narrow = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, vh);
      memcpy(to + j, &narrow, sizeof narrow);
    }
    for (int64_t j = ceil_div(count, W) * W; j < end; ++j) to[j] = 0;
  }

  // out = weights (count) times values of a split, one by one.
  void add_one_by_one(const float* weights, int64_t count, const uint16_t* from, float* out) const {
    for (int64_t d = 0; d < width; ++d) {
      float sum = 0;
      for (int64_t t = 0; t < count; ++t) {
        const uint16_t* block = from + (t / DEPTH * (width / SIDE) + d / SIDE) * BLOCK_SIZE;
        const uint16_t* line = block + t % DEPTH / 2 * AT_ONCE;
        sum += weights[t] * BFloat16::widen_one(line[d % SIDE * 2 + t % 2]);
      }
      out[d] = sum;
    }
  }

  void attend(int64_t b, int64_t g, int64_t first_row) const {
    int64_t s = of.selection_of(g), rows = min(AT_ONCE, G * c.Lq - first_row), widest = 0;
    alignas(64) uint16_t q[AT_ONCE * MAX_DIM], narrow[AT_ONCE * KEYS];
    alignas(64) float weights[AT_ONCE * KEYS], values_of_split[AT_ONCE * MAX_DIM];
    alignas(64) float sums[AT_ONCE * MAX_DIM] = {};
    int64_t sees[AT_ONCE];
    float largest[AT_ONCE], old[AT_ONCE], fresh[AT_ONCE];
    double total[AT_ONCE];
    memset(narrow, 0, sizeof narrow);
    auto multiply_queries = multiply;
    for (int64_t r = 0; r < AT_ONCE; ++r) {
      int64_t row = first_row + min(r, rows - 1), h = g * G + row / c.Lq, i = row % c.Lq;
      if (!place_query(b, h, i, q + r * depth * DEPTH)) multiply_queries = multiply_in_loops;
      sees[r] = of.seen(b, s, i), largest[r] = -INF, total[r] = 0;
      widest = max(widest, sees[r]);
    }
    open_tiles();
    for (int64_t split = 0; split * KEYS < widest; ++split) {
      int64_t first = split * KEYS, at = place(b, g, split);
      int64_t blocks = ceil_div(min(KEYS, widest - first), DEPTH);
      const uint16_t* packed = values + at * values_size();
      multiply_queries(q, depth * DEPTH, keys + at * keys_size(), BLOCK_SIZE, depth * BLOCK_SIZE,
                       depth, blocks * DEPTH, weights, KEYS);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t m = max(0, min(KEYS, sees[r] - first));
        float found[2] = {-INF, 0}, *to = weights + r * KEYS;
        if (m > 0) of.weigh(to, m, (float)c.scale, found);
        narrow_row(to, m, blocks * DEPTH, narrow + r * KEYS);
        if (odd[at]) add_one_by_one(to, m, packed, values_of_split + r * width);
        float top = found[0] > largest[r] ? found[0] : largest[r];
        double before = shrink(largest[r], top), now = shrink(found[0], top);
        total[r] = total[r] * before + found[1] * now;
        largest[r] = top, old[r] = (float)before, fresh[r] = (float)now;
      }
      if (!odd[at]) {
        multiply(narrow, KEYS, packed, width / SIDE * BLOCK_SIZE, BLOCK_SIZE, blocks, width,
                 values_of_split, width);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float *to = sums + r * width, *from = values_of_split + r * width;
        for (int64_t d = 0; d < width; ++d) to[d] = to[d] * old[r] + from[d] * fresh[r];
      }
    }
    close_tiles();
    for (int64_t r = 0; r < rows; ++r) {
      int64_t row = first_row + r, h = g * G + row / c.Lq, i = row % c.Lq;
      of.finish<BFloat16>(b, h, i, sees[r], largest[r], total[r], sums + r * width);
    }
  }

  // e^(from - to), for what was relative to one largest logit and is to be to another.
  static double shrink(float from, float to) {
    if (from == -INF) return 0;
    if (from == to) return 1;
    return __builtin_exp((double)Attender::finite_or_zero(from) - Attender::finite_or_zero(to));
  }

  void run() const {
    ts::parallel(c.threads, c.B * c.Hkv * splits, [&](int64_t unit) {
      pack(unit / splits / c.Hkv, unit / splits % c.Hkv, unit % splits);
    });
    int64_t units = ceil_div(G * c.Lq, AT_ONCE);
    ts::parallel(c.threads, c.B * c.Hkv * units, [&](int64_t unit) {
      attend(unit / units / c.Hkv, unit / units % c.Hkv, unit % units * AT_ONCE);
    });
  }
};

}  // namespace TS_PATH
