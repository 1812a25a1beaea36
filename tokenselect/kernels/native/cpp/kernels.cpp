// The stages of one path. This file is compiled once per path, TS_PATH being its name.
#include "chunk.h"
#include "reuse.h"
#include "score.h"

namespace TS_PATH {

// Whether a step of one query selects everything, and its scores are the logits that it attends by.
// Then no vote decides anything, and attention finds the lse: nothing is scored before it. With a
// softcap an infinite logit counts in attention, and in scores it does not.
static bool attends_first(const Call& c) {
  constexpr int64_t STEP = ts::SCORE | ts::SELECT | ts::ATTEND;
  bool same_logits = c.select_scale == c.scale && c.score_at == ts::AT_TRUE && !c.contiguous;
  if (c.stages != STEP || c.is_static || c.Lq != 1 || !same_logits || c.softcap > 0) return false;
  for (int64_t b = 0; b < c.B; ++b) {
    int64_t n = length(c, b);
    Regions of = regions(c, n);
    if (of.local_start - of.sink_end > budget(c, n)) return false;
  }
  return true;
}

// Take the lse of attention for that of scores, and return whether it is: where a logit is not
// finite, attention has no finite lse, and scores leave it out.
static bool take_lse(const Call& c) {
  bool same = true;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t at = b * c.Hq; at < (b + 1) * c.Hq; ++at) {
      c.dense_lse[at] = c.out_lse[at];
      same &= length(c, b) == 0 || __builtin_isfinite(c.out_lse[at]);
    }
  }
  return same;
}

// The stages that a call names, in turn; or only measure the scratch that they need.
template <class E>
static int64_t run(const Call& c, bool measures) {
  Arena arena{measures ? 0 : (uintptr_t)c.scratch, 0};
  // To score and select, a request that reuses its selection is absent.
  Call open = c;
  bool reuses = c.stages & (ts::DECIDE | ts::UPDATE);
  Arena unused{0, 0};
  Reuser reuser(c, reuses ? arena : unused);
  if (c.stages & ts::DECIDE) {
    open.lengths = reuser.open_lengths;
    if (!measures) reuser.decide<E>();
  }
  int64_t longest = 0;
  for (int64_t b = 0; b < c.B; ++b) longest = max(longest, length(measures ? c : open, b));
  if (c.is_static) longest = c.Lk;
  auto score = [&] {
    bool fused = c.stages & ts::SELECT;
    Scorer scorer(open, longest, arena, fused);
    open.votes = scorer.votes;
    if (!measures) scorer.run<E>(!fused);
  };
  bool is_late = attends_first(c);
  if (c.stages & ts::SCORE && !is_late) score();
  if (c.stages & ts::SELECT) {
    Selector selector(open, open.votes, longest, arena);
    if (!measures) selector.run();
  }
  if (c.stages & ts::UPDATE && !measures) reuser.update();
  if (c.stages & (ts::ATTEND | ts::GATHER | ts::WEIGH)) {
    Attender attender(c, arena);
    ChunkAttender chunk(attender, arena);
    if (!measures && c.stages & ts::ATTEND) c.in_tiles ? chunk.run() : attender.run<E>();
    if (!measures && c.stages & ts::GATHER) attender.gather<E>();
    if (!measures && c.stages & ts::WEIGH) attender.weigh_rows();
  }
  if (is_late && (measures || !take_lse(c))) score();
  return arena.used;
}

bool has_tiles() { return HAS_TILES; }

int64_t run_path(const Call& c, bool measures) {
  if (c.dtype == ts::BFLOAT16) return run<BFloat16>(c, measures);
  if (c.dtype == ts::FLOAT16) return run<Float16>(c, measures);
  return run<Float32>(c, measures);
}

}  // namespace TS_PATH
