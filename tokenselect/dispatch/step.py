"""One step of attention: the road that an ordinary call and a plan both take.

The stages run in turn; the Selection Cache decides before them and is updated before the last.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect.contract import (
    AttentionOutput,
    CacheState,
    Problem,
    Reuse,
    ReuseDecision,
    Scores,
    Selection,
)
from tokenselect.dispatch.ranks import Ranks


class Step(NamedTuple):
    """What a step computed.

    out        (B, Hq, Lq, Dv) in q's dtype
    lse        (B, Hq, Lq) float32, of the tokens attended to
    positions  (B, S, K) int32, and
    counts     (B, S) int32: the selection
    dense_lse  (B, Hq) float32, of all tokens; meaningless where the selection is reused
    reused     (B,) bool, or None without a Selection Cache
    """

    out: Tensor
    lse: Tensor
    positions: Tensor
    counts: Tensor
    dense_lse: Tensor
    reused: Tensor | None


_NOTHING: AbstractContextManager[None] = nullcontext()


def run_step(
    problem: Problem,
    stages: Any,
    reuse: Reuse | None = None,
    state: CacheState | None = None,
    theta: float | None = None,
    section: Callable[[str], AbstractContextManager[None]] = lambda name: _NOTHING,
    ranks: Ranks | None = None,
) -> Step:
    """Run score, select and attend of `stages`, around them decide_reuse and update if `state`.

    stages   a Backend, or anything with its three functions; its `attend_fresh`, if it has one,
             does the work of all three where there is no Selection Cache, and `attend_cached`
             where there is one
    section  entered around each part by its name: a plan lends each part its own memory
    ranks    processes with the other heads of the layer, which vote and decide together; then the
             stages run in turn, since votes are exchanged between them
    """
    shared = problem  # as all ranks together see it
    if state is None:
        fused = None if ranks else getattr(stages, "attend_fresh", None)
        if fused is not None:
            with section("step"):
                attended, selection, dense_lse = fused(problem)
            positions, counts = selection
            return Step(attended.out, attended.lse, positions, counts, dense_lse, None)
        recomputed, decision = problem, None
    else:
        cached = None if ranks else getattr(stages, "attend_cached", None)
        if cached is not None:
            with section("step"):
                attended, (positions, counts), dense_lse, reused = cached(problem, state, theta)
            return Step(attended.out, attended.lse, positions, counts, dense_lse, reused)
        assert reuse is not None
        with section("decide_reuse"):
            if ranks:
                shared = ranks.whole(problem)
            decision = ReuseDecision(*reuse.decide_reuse(shared, state, theta))
        recomputed = replace(problem, cache_seqlens=decision.cache_seqlens)
    own = recomputed
    if ranks:  # pooled is what all of them gave
        own = replace(recomputed, config=replace(recomputed.config, pool=1))
    with section("score"):
        scores = Scores(*stages.score(own))
    votes = scores.votes
    if ranks:
        with section("exchange"):
            votes = ranks.votes(votes, recomputed)
    with section("select"):
        selection = Selection(*stages.select(votes, recomputed))
    if state is not None and reuse is not None and decision is not None:
        with section("update"):
            reuse.update(shared, state, decision, selection)
    with section("attend"):
        attended = AttentionOutput(*stages.attend(problem, selection))
    reused = None if decision is None else decision.reused
    return Step(*attended, *selection, scores.lse, reused)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off inside, if it is on: it would round logits to its dtype."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING
