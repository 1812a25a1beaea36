"""Whether a backend is right on the very inputs that are timed. If not, no time means anything.

The truth is float64, on the device: `bench.dense` says what it is and how far float32 arithmetic
inside may be from it. Nothing of a backend runs under the default device that the truth is
computed under.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import tokenselect
from bench.checks import NotEquivalent, call, check_bound
from bench.dense import Request, Truth, requests, truth, votes
from tokenselect import Problem, Scores, Selection

# Dense attention by a backend gathers the whole cache: do it on a prefix.
_EVERYTHING = 32 * 1024
_ROWS = 8
# Of a vote, to its size; of an lse. Both far above what float32 arithmetic does to these inputs,
# and far below what rounded logits do.
_VOTE, _LSE = 1e-3, 1e-4


def exact_of(problem: Problem) -> tuple[list[Request], Truth]:
    """Return the requests, and dense attention in float64 for up to 8 queries of each head."""
    with problem.q.device:
        several = requests(problem)
        return several, truth(several, _ROWS)


@dataclass(frozen=True)
class Found:
    """What a backend made of a problem; checked, unless a wrong one is measured anyway.

    gathered  the selected keys and values, (B, Hkv, m, D) each, and `exact` attention to them
    """

    scores: Scores
    selection: Selection
    gathered: tuple[Tensor, Tensor]
    exact: Truth
    checks: dict[str, float] = field(default_factory=dict)


def check(problem: Problem, backend: str, several: list[Request], dense: Truth) -> Found:
    """Hold every stage and the whole call to the truth. Raises NotEquivalent."""
    checks = {"k for everything, share of budget": _everything(problem, backend)}
    scores = tokenselect.score(problem, backend)
    checks["worst vote, relative"] = _votes(problem, scores, several, dense)
    selection = tokenselect.select(scores.votes, problem, backend)
    sorted_votes = tokenselect.select(scores.votes, problem, "reference")
    for name, got, right in zip(Selection._fields, selection, sorted_votes, strict=True):
        if not torch.equal(got, right):
            raise NotEquivalent(f"select: {name} are not those of a stable sort of the votes")

    found = found_of(problem, scores, selection)
    attended = tokenselect.attend(problem, selection, backend)
    checks["attend, share of budget"] = share = found.exact.share(attended.out)
    if not share <= 1:
        raise NotEquivalent(f"attend is {share:.3g} x the tolerance away from float64")
    lse = attended.lse[:, :, found.exact.rows]
    checks["attend, worst lse"] = _near("attend's lse", lse, found.exact.lse)

    out, info = call(problem, backend, return_info=True)
    whole = (*info.selection, out, info.lse)
    for name, got, right in zip(
        ("positions", "count", "out", "lse"), whole, (*selection, *attended), strict=True
    ):
        if not torch.equal(got, right):
            raise NotEquivalent(f"attention's {name} differ from those of its stages, one by one")
    mass = check_bound("a fresh selection", out, info, dense)
    told = info.retained_mass
    if problem.Lq == 1 and not ((told - mass[:, :, 0]).abs() <= 1e-4).all():
        raise NotEquivalent("retained_mass is not the share of the softmax that was retained")
    checks["retained mass, least"] = float(mass.min())
    checks["retained mass, mean"] = float(mass.mean())
    return replace(found, checks=checks)


def found_of(problem: Problem, scores: Scores, selection: Selection) -> Found:
    """Gather what was selected, and compute attention to it in float64."""
    p, lengths = problem, set(selection.count.flatten().tolist())
    assert p.S == len(lengths) == 1, "cases have one selection per request, all as long"
    rows = selection.positions[:, 0, : lengths.pop()].long()
    k, v = (
        torch.stack([cache[b].index_select(1, rows[b]) for b in range(p.B)])
        for cache in (p.k_cache, p.v_cache)
    )
    with p.q.device:
        exact = truth([Request(p.q[b], k[b], v[b], p.scale) for b in range(p.B)], _ROWS)
    return Found(scores, selection, (k, v), exact)


def _everything(problem: Problem, backend: str) -> float:
    """With a budget for all tokens, attention is dense attention."""
    n = problem.cache_seqlens.clamp(max=_EVERYTHING)
    largest = min(problem.Lk, _EVERYTHING)
    prefix = replace(problem, cache_seqlens=n, config=replace(problem.config, k=largest))
    out = call(prefix, backend)
    with problem.q.device:
        share = truth(requests(prefix), _ROWS).share(out)
    if not share <= 1:
        raise NotEquivalent(
            f"attention(k={largest}), k for everything, is {share:.3g} x the tolerance away "
            "from dense attention in float64"
        )
    return share


def _votes(problem: Problem, scores: Scores, several: list[Request], dense: Truth) -> float:
    """Soft votes of a layer against float64's, and -inf off the candidates; the worst, relative."""
    worst = 0.0
    for b, request in enumerate(several):
        with problem.q.device:
            right = votes(request).sum(0)
        sink_end, local_start = problem.config.regions(len(right), problem.Lq)
        row = scores.votes[b, 0, 0]
        if not torch.isneginf(torch.cat((row[:sink_end], row[local_start:]))).all():
            raise NotEquivalent(f"score: request {b} has votes off the candidates")
        right, got = right[sink_end:local_start], row[sink_end:local_start].double()
        if len(right):
            # Votes below float32's normal range may be flushed to zero.
            error = (got - right).abs() / (right + torch.finfo(torch.float32).tiny / _VOTE)
            worst = max(worst, float(error.nan_to_num(nan=math.inf).max()))
    if not worst <= _VOTE:
        raise NotEquivalent(f"score: a vote is {worst:.3g} of its size away from float64")
    if problem.Lq == 1:
        _near("score's lse", scores.lse, dense.lse[:, :, 0])
    return worst


def _near(what: str, got: Tensor, right: Tensor) -> float:
    error = float((got.double() - right).abs().nan_to_num(nan=math.inf).max())
    if not error <= _LSE:
        raise NotEquivalent(f"{what} is {error:.3g} away from float64")
    return error
