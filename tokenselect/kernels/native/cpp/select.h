// Stage 2, select: exact, ties and all, in two steps that sort nothing.
//
// Votes are compared as integers of the same order. The k-th largest is found digit by digit; of
// those that equal it, the lower positions are taken until there are k.
#pragma once

#include "rows.h"

namespace TS_PATH {

// An integer of the order of a vote: -0.0 as 0.0, NaN as -inf; 0 is below all of them.
static inline uint32_t ordered(float x) {
  uint32_t bits;
  x = x == x ? x + 0.0f : -INF;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What is taken of a row: keys above `key`, and those that equal it before `ties_end`.
struct Cut {
  uint32_t key;
  int64_t ties_end;

  bool takes(uint32_t x, int64_t place) const {
    return x > key || (x == key && place < ties_end);
  }
};

// The cut that takes the k largest of m, or all if there are no more; key(place) is never 0.
template <class Key>
TS_APART static Cut find_cut(int64_t m, int64_t k, Key key) {
  if (k >= m) return {0, m};
  if (k <= 0) return {0xffffffffu, 0};
  constexpr int SHIFTS[] = {21, 10, 0}, WIDTHS[] = {11, 11, 10};
  uint32_t digits = 0, known = 0;
  int64_t left = k;  // still to be taken, of those that have these digits
  for (int step = 0; step < 3; ++step) {
    uint32_t counts[1 << 11] = {}, mask = (1u << WIDTHS[step]) - 1;
    for (int64_t i = 0; i < m; ++i) {
      uint32_t x = key(i);
      if ((x & known) == digits) ++counts[x >> SHIFTS[step] & mask];
    }
    uint32_t digit = mask;
    for (; counts[digit] < left; --digit) left -= counts[digit];
    digits |= digit << SHIFTS[step];
    known |= mask << SHIFTS[step];
  }
  int64_t end = 0;
  for (; left > 0; ++end) left -= key(end) == digits;
  return {digits, end};
}

// Keys and places, within the candidates, of those that may be chosen.
struct Listed {
  uint32_t key;
  int32_t place;
};

struct Selector {
  const Call& c;
  const float* votes;
  int64_t R, room;
  Listed* listed;
  uint32_t* tops;
  int32_t* chosen;

  static constexpr int64_t GROUP = 16;

  Selector(const Call& call, const float* from, int64_t longest, Arena& arena)
      : c(call), votes(from), R(call.score_at == ts::AT_BOTH ? 2 : 1) {
    room = ceil_div(longest, GROUP) * GROUP;
    listed = arena.take<Listed>(c.B * c.S * room);
    tops = arena.take<uint32_t>(c.B * c.S * (room / GROUP));
    chosen = arena.take<int32_t>(c.B * c.S * 2 * c.K);
  }

  // A bound that at least k candidates reach: the k-th largest of the largest of each GROUP.
  uint32_t bound(const float* row, int64_t m, int64_t k, uint32_t* top) const {
    int64_t groups = m / GROUP;
    if (groups < 2 * k) return 0;
    int64_t i = 0;
    for (; i + W <= groups; i += W) {
      vf largest[W];
      float found[W];
      TS_UNROLL for (int g = 0; g < W; ++g) {
        largest[g] = all(-INF);
        for (int64_t j = (i + g) * GROUP; j < (i + g + 1) * GROUP; j += W) {
          largest[g] = larger(load(row + j), largest[g]);  // which a NaN is not
        }
      }
      fold<Largest, W>(largest, found);
      TS_UNROLL for (int g = 0; g < W; ++g) top[i + g] = ordered(found[FOLDED_AT.place[g]]);
    }
    for (; i < groups; ++i) {
      uint32_t largest = 0;
      for (int64_t j = i * GROUP; j < (i + 1) * GROUP; ++j) {
        uint32_t x = ordered(row[j]);
        largest = x > largest ? x : largest;
      }
      top[i] = largest;
    }
    return find_cut(groups, k, [&](int64_t i) { return top[i]; }).key;
  }

  // List what reaches the bound, in the order of positions, but for the `n_taken` taken before.
  int64_t list(const float* row, int64_t m, uint32_t least_key, const uint32_t* top,
               const int32_t* taken, int64_t n_taken, Listed* to) const {
    int64_t listed = 0, next = 0;
    for (int64_t first = 0; first < m; first += GROUP) {
      int64_t end = min(first + GROUP, m);
      if (least_key > 0 && end - first == GROUP && top[first / GROUP] < least_key) continue;
      while (next < n_taken && taken[next] < first) ++next;
      for (int64_t j = first; j < end; ++j) {
        if (next < n_taken && taken[next] == j) {
          ++next;
          continue;
        }
        uint32_t x = ordered(row[j]);
        to[listed] = {x, (int32_t)j};
        listed += x >= least_key;
      }
    }
    return listed;
  }

  // Where every candidate is chosen, votes are not looked at.
  void select_all(int64_t row, int64_t n) const {
    int32_t* to = c.positions + row * c.K;
    for (int64_t j = 0; j < c.K; ++j) to[j] = j < n ? (int32_t)j : -1;
    c.count[row] = (int32_t)n;
  }

  TS_APART void select(int64_t b, int64_t s) const {
    int64_t n = length(c, b);
    Regions of = n > 0 ? regions(c, n) : Regions{0, 0};
    int64_t m = of.local_start - of.sink_end, row = b * c.S + s, n_chosen = 0;
    int64_t k = budget(c, n), fixed = part(c.fixed_millionths, k);
    if (m <= k) return select_all(row, n);
    Listed* entries = listed + row * room;
    uint32_t* top = tops + row * (room / GROUP);
    int32_t *taken = chosen + row * 2 * c.K, *next = taken + c.K;
    for (int64_t ballot = 0; ballot < R; ++ballot) {
      int64_t share = R == 1 ? k : ballot == 0 ? fixed : k - fixed;
      const float* from = votes + ((b * R + ballot) * c.S + s) * c.Lk + of.sink_end;
      // Of those that reach the bound, `n_chosen` may be taken already.
      uint32_t reached = bound(from, m, share + n_chosen, top);
      int64_t total = list(from, m, reached, top, taken, n_chosen, entries);
      Cut cut = find_cut(total, share, [&](int64_t i) { return entries[i].key; });
      int64_t merged = 0, old = 0;
      for (int64_t i = 0; i < total; ++i) {
        if (!cut.takes(entries[i].key, i)) continue;
        while (old < n_chosen && taken[old] < entries[i].place) next[merged++] = taken[old++];
        next[merged++] = entries[i].place;
      }
      while (old < n_chosen) next[merged++] = taken[old++];
      n_chosen = merged;
      int32_t* before = taken;
      taken = next, next = before;
    }
    int32_t* to = c.positions + row * c.K;
    int64_t count = 0;
    for (int64_t j = 0; j < of.sink_end; ++j) to[count++] = (int32_t)j;
    for (int64_t i = 0; i < n_chosen; ++i) to[count++] = taken[i] + (int32_t)of.sink_end;
    for (int64_t j = of.local_start; j < n; ++j) to[count++] = (int32_t)j;
    c.count[row] = (int32_t)count;
    for (int64_t i = count; i < c.K; ++i) to[i] = -1;
  }

  void run() const {
    ts::parallel(threads_for(c, c.B * c.S * room), c.B * c.S,
                 [&](int64_t unit) { select(unit / c.S, unit % c.S); });
  }
};

}  // namespace TS_PATH
