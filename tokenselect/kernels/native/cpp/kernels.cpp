// The stages of one path. This file is compiled once per path, TS_PATH being its name.
#include "attend.h"
#include "reuse.h"
#include "score.h"

namespace TS_PATH {

// The stages that a call names, in turn. With a null scratch, only measure it.
template <class E>
static int64_t run(const Call& c) {
  int64_t longest = 0, threads = c.threads;
  for (int64_t b = 0; b < c.B; ++b) longest = most(longest, length(c, b));
  if (c.is_static) longest = c.Lk;
  Arena arena{c.scratch, 0};
  bool measures = c.scratch == nullptr;
  const float* votes = c.votes;
  if (c.stages & ts::SCORE) {
    bool fused = c.stages & ts::SELECT;
    Scorer scorer(c, longest, arena, fused);
    votes = scorer.votes;
    if (!measures) scorer.run<E>(threads, !fused);
  }
  if (c.stages & ts::SELECT) {
    Selector selector(c, votes, longest, arena);
    if (!measures) selector.run(threads);
  }
  if (c.stages & (ts::ATTEND | ts::GATHER)) {
    Attender attender(c, arena);
    if (!measures && c.stages & ts::ATTEND) attender.run<E>(threads);
    if (!measures && c.stages & ts::GATHER) attender.gather<E>(threads);
  }
  return arena.used;
}

int64_t run_path(const Call& c) {
  if (c.dtype == ts::BFLOAT16) return run<BFloat16>(c);
  if (c.dtype == ts::FLOAT16) return run<Float16>(c);
  return run<Float32>(c);
}

}  // namespace TS_PATH
