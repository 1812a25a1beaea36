"""Backend: a name, what it can run, and the stages; and why it cannot run a problem."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect.contract.problem import Problem
from tokenselect.contract.results import (
    AttentionOutput,
    CacheState,
    ReuseDecision,
    Scores,
    Selection,
)


class Reuse(NamedTuple):
    """The Selection Cache's two steps, before `score` and after `select`.

    decide_reuse(problem, state, theta) -> ReuseDecision, and changes nothing
    update(problem, state, decision, selection): completes in `selection`, in place, those that are
    reused with what was appended; stores the others in `state`. problem has the true lengths
    """

    decide_reuse: Callable[[Problem, CacheState, float | None], ReuseDecision]
    update: Callable[[Problem, CacheState, ReuseDecision, Selection], None]


class StaticStages(NamedTuple):
    """The stages as a plan runs them, and as a CUDA graph can hold them.

    They read no tensor on the host, have no shape that depends on a value, and take all memory from
    `scratch.empty`. Lengths and block tables may hold anything without a read or write outside
    of the tensors.

    score(problem) -> Scores; votes off the candidates may be anything
    select(votes, problem) -> Selection
    attend(problem, selection, out) -> AttentionOutput; out (B, Hq, Lq, Dv), contiguous, is written
    to and returned; None: attend takes memory for it
    attend_fresh, attend_cached: those of `Backend`, with `out` last; None: the stages in turn
    """

    score: Callable[[Problem], Scores] | str
    select: Callable[[Tensor, Problem], Selection] | str
    attend: Callable[[Problem, Selection, Tensor | None], AttentionOutput] | str
    attend_fresh: (
        Callable[[Problem, Tensor | None], tuple[AttentionOutput, Selection, Tensor]] | None
    ) = None
    attend_cached: (
        Callable[
            [Problem, CacheState, float | None, Tensor | None],
            tuple[AttentionOutput, Selection, Tensor, Tensor],
        ]
        | None
    ) = None


@dataclass(frozen=True)
class Capability:
    """What a backend can run: for each property of a problem, the values that it takes.

    None means any value that the contract allows. `softcaps`, `sink_logits` and `fractions` (a k
    that is one) hold False and True: without and with; `ropes` holds "none", "rotated" and "raw";
    `query_lengths` is of Lq. Two are promises: `deterministic`, the same call gives the same bits;
    `equal_keys`, of a head and without repositioning, equal keys have equal logits wherever they
    lie.
    """

    devices: Container[str] | None = None
    dtypes: Container[torch.dtype] | None = None
    head_dims: Container[int] | None = None
    group_sizes: Container[int] | None = None
    query_lengths: Container[int] | None = None
    layouts: Container[str] | None = None
    page_sizes: Container[int] | None = None
    softcaps: Container[bool] | None = None
    sink_logits: Container[bool] | None = None
    ropes: Container[str] | None = None
    fractions: Container[bool] | None = None
    votes: Container[str] | None = None
    normalizes: Container[str] | None = None
    scopes: Container[str] | None = None
    pools: Container[int] | None = None
    query_means: Container[int] | None = None
    positions: Container[str] | None = None
    score_ats: Container[str] | None = None
    deterministic: bool = True
    equal_keys: bool = False


@dataclass(frozen=True)
class Backend:
    """A name, what it can run, and the three stages.

    A stage given as a string is borrowed from the backend of that name; the registry fills it in
    and keeps the lender, whose limits then count too.

    attend_fresh
             score, select and attend in one: problem -> (AttentionOutput, Selection, the lse of
             `Scores`), which an ordinary call without a Selection Cache then takes; None: in turn
    attend_cached
             the same with one: (problem, state, theta) -> the three, and reused (B,) bool, with
             the steps of `reuse` around the stages; None: in turn
    static   the stages as a plan runs them; None if they cannot be planned
    reuse    the Selection Cache's steps; those of cpu are torch operators and run on any device
    unavailable
             why it cannot run on this machine at all; None if it can
    replays  makes, for one plan, what runs its steps without running their Python each time (see
             `tokenselect.plans.cuda_graph.Graphs`); None: steps run as they are
    """

    name: str
    capability: Capability
    score: Callable[[Problem], Scores] | str
    select: Callable[[Tensor, Problem], Selection] | str
    attend: Callable[[Problem, Selection], AttentionOutput] | str
    static: StaticStages | None = None
    reuse: Reuse | str = "cpu"
    replays: Callable[[], Any] | None = None
    attend_fresh: Callable[[Problem], tuple[AttentionOutput, Selection, Tensor]] | None = None
    attend_cached: (
        Callable[
            [Problem, CacheState, float | None],
            tuple[AttentionOutput, Selection, Tensor, Tensor],
        ]
        | None
    ) = None
    unavailable: str | None = None
    lenders: tuple["Backend", ...] = ()


_NEEDS: tuple[tuple[str, Callable[[Problem], tuple[object, ...]], str], ...] = (
    ("device", lambda p: (p.q.device.type,), "devices"),
    ("dtype", lambda p: (p.q.dtype,), "dtypes"),
    ("head dim", lambda p: (p.D, p.Dv), "head_dims"),
    ("query heads per KV head", lambda p: (p.G,), "group_sizes"),
    ("number of queries", lambda p: (p.Lq,), "query_lengths"),
    ("cache layout", lambda p: ("paged" if p.is_paged else "contiguous",), "layouts"),
    ("page size", lambda p: (p.page_size,) if p.is_paged else (), "page_sizes"),
    ("softcap in use", lambda p: (p.softcap is not None,), "softcaps"),
    ("sink_logits in use", lambda p: (p.sink_logits is not None,), "sink_logits"),
    ("rope", lambda p: ("none" if p.rope is None else p.rope.cached,), "ropes"),
    ("fractional k", lambda p: (isinstance(p.config.k, float),), "fractions"),
    ("vote", lambda p: (p.config.vote,), "votes"),
    ("normalize", lambda p: (p.config.normalize,), "normalizes"),
    ("scope", lambda p: (p.config.scope,), "scopes"),
    ("pool", lambda p: (p.config.pool,), "pools"),
    ("query means", lambda p: (min(p.config.n_query_means, p.Lq),), "query_means"),
    ("positions", lambda p: (p.config.positions,), "positions"),
    ("score_at", lambda p: (p.config.score_at,), "score_ats"),
)


def reasons(backend: Backend, problem: Problem) -> list[str]:
    """Say why `backend` cannot run `problem`; empty if it can. Reads metadata only.

    Each reason says what the problem is and what the backend takes.
    """
    found = [] if backend.unavailable is None else [backend.unavailable]
    for what, needed, name in _NEEDS:
        allowed = getattr(backend.capability, name)
        for value in needed(problem):
            if allowed is not None and value not in allowed:
                found.append(f"{what} is {value}; {backend.name} takes {listed(allowed)}")
    for lender in backend.lenders:
        found += [f"(stage borrowed from {lender.name}) {why}" for why in reasons(lender, problem)]
    return list(dict.fromkeys(found))


def listed(allowed: Container[object]) -> str:
    """Format the values of one limit of a capability."""
    if isinstance(allowed, range):
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        return f"{allowed[0]} to {allowed[-1]}{step}" if allowed else "none"
    if isinstance(allowed, (tuple, list, set, frozenset)):
        return ", ".join(map(str, allowed)) or "none"
    return str(allowed)
