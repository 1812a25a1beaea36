"""What a backend is held to on the inputs that are timed, before any time counts."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.dense import Request, Truth, requests, truth, votes
from tokenselect import (
    AttentionInfo,
    Problem,
    Scores,
    Selection,
    SelectionCache,
    attend,
    attention,
    score,
    select,
)

# Dense attention over everything, by a backend, widens the whole cache: do it on a prefix.
_CHECK_TOKENS = 32 * 1024
# Of a vote, to its size; of an lse. Both far above what float32 arithmetic does to these inputs,
# and far below what rounded logits do.
_VOTE, _LSE = 1e-3, 1e-4
# The largest entry of a row of rounding errors, beside their root mean square.
_PEAK = 4.0


class NotEquivalent(Exception):
    """The backend's result is not what it has to be; its time would mean nothing."""


def call(
    problem: Problem, backend: str, cache: SelectionCache | None = None, return_info: bool = False
) -> Any:
    """Return what the problem's `attention` does."""
    p = problem
    return attention(
        p.q,
        p.k_cache,
        p.v_cache,
        config=p.config,
        cache_seqlens=p.cache_seqlens,
        block_table=p.block_table,
        cache=cache,
        backend=backend,
        return_info=return_info,
    )


def check_everything(problem: Problem, backend: str) -> float:
    """Hold a budget for all tokens to dense attention; return the error's share of the tolerance.

    On a prefix of the workload's own inputs, so that it fits in memory.
    """
    n = problem.cache_seqlens.clamp(max=_CHECK_TOKENS)
    k = int(n.max())
    prefix = replace(problem, cache_seqlens=n, config=replace(problem.config, k=k))
    share = truth(requests(prefix)).share(call(prefix, backend))
    if not share <= 1:
        raise NotEquivalent(
            f"attention(k={k}) on {backend}, k for everything, is {share:.3g} x the tolerance away "
            "from dense attention in float64"
        )
    return share


@dataclass(frozen=True)
class Found:
    """What a backend made of a problem; checked, unless a wrong one is measured anyway.

    gathered  each request with the selected keys and values alone, and `exact` attention to them
    """

    scores: Scores
    selection: Selection
    gathered: list[Request]
    exact: Truth
    checks: dict[str, float] = field(default_factory=dict)


def check(problem: Problem, backend: str, several: list[Request], exact: Truth) -> Found:
    """Hold every stage and the whole call to the truth. Raises NotEquivalent."""
    p, checks = (
        problem,
        {"k for everything, share of tolerance": check_everything(problem, backend)},
    )
    scores = score(p, backend)
    checks["worst vote, relative"] = _check_votes(p, scores, several)
    if p.Lq == 1:
        _near("score's lse", scores.lse, exact.lse[:, :, 0])
    selection = select(scores.votes, p, backend)
    sorted_votes = select(scores.votes, p, "reference")
    for name, got, right in zip(Selection._fields, selection, sorted_votes, strict=True):
        if not torch.equal(got, right):
            raise NotEquivalent(f"select: {name} are not those of a stable sort of the votes")

    found = found_of(p, scores, selection, several)
    attended = attend(p, selection, backend)
    checks["attend, share of tolerance"] = share = found.exact.share(attended.out)
    if not share <= 1:
        raise NotEquivalent(f"attend is {share:.3g} x the tolerance away from float64")
    lse = attended.lse[:, :, found.exact.rows]
    checks["attend, worst lse"] = _near("attend's lse", lse, found.exact.lse)

    out, info = call(p, backend, return_info=True)
    whole = (*info.selection, out, info.lse)
    for name, got, right in zip(
        ("positions", "count", "out", "lse"), whole, (*selection, *attended), strict=True
    ):
        if not torch.equal(got, right):
            raise NotEquivalent(f"attention's {name} differ from those of its stages, one by one")
    mass = check_bound("a fresh selection", out, info, exact)
    if p.Lq == 1 and not ((info.retained_mass - mass[:, :, 0]).abs() <= 1e-4).all():
        raise NotEquivalent("retained_mass is not the share of the softmax that was retained")
    checks |= {"retained mass, least": float(mass.min()), "retained mass, mean": float(mass.mean())}
    return replace(found, checks=checks)


def found_of(
    problem: Problem, scores: Scores, selection: Selection, several: list[Request]
) -> Found:
    """Gather what was selected, and compute attention to it in float64."""
    gathered = []
    for r, positions, count in zip(several, *selection, strict=True):
        length = int(count[0])
        assert (count == length).all(), "every selection of a request is as long"
        rows = positions[:, :length].long().repeat_interleave(len(r.k) // problem.S, 0)
        k, v = (torch.stack([x[i] for x, i in zip(kv, rows, strict=True)]) for kv in (r.k, r.v))
        gathered.append(replace(r, k=k, v=v))
    return Found(scores, selection, gathered, truth(gathered))


def _check_votes(problem: Problem, scores: Scores, several: list[Request]) -> float:
    """Soft votes against float64's, and -inf off the candidates; the worst, relative."""
    worst = 0.0
    for b, request in enumerate(several):
        for s, right in enumerate(votes(request).unflatten(0, (problem.S, -1)).sum(1)):
            sink_end, local_start = problem.config.regions(len(right), problem.Lq)
            row = scores.votes[b, 0, s]
            if not torch.isneginf(torch.cat((row[:sink_end], row[local_start:]))).all():
                raise NotEquivalent(f"score: request {b} has votes off the candidates")
            right, got = right[sink_end:local_start], row[sink_end:local_start].double()
            if len(right):
                # Votes below float32's normal range may be flushed to zero.
                error = (got - right).abs() / (right + torch.finfo(torch.float32).tiny / _VOTE)
                worst = max(worst, float(error.nan_to_num(nan=math.inf).max()))
    if not worst <= _VOTE:
        raise NotEquivalent(f"score: a vote is {worst:.3g} of its size away from float64")
    return worst


def _near(what: str, got: Tensor, right: Tensor) -> float:
    error = float((got.double() - right).abs().nan_to_num(nan=math.inf).max())
    if not error <= _LSE:
        raise NotEquivalent(f"{what} is {error:.3g} away from float64")
    return error


def check_reused(problem: Problem, backend: str, exact: Truth) -> SelectionCache:
    """Hold a cache filled one step earlier to being hit, and the result to its bound."""
    # Filled by the same queries.
    cache = SelectionCache(theta=0.5, max_reuse=max(64, problem.Lq))
    earlier = replace(problem, cache_seqlens=problem.cache_seqlens - problem.Lq)
    _, before = call(earlier, backend, cache, return_info=True)
    out, info = call(problem, backend, cache, return_info=True)
    if not info.reused.all():
        raise NotEquivalent("the selection of one step earlier was not reused")
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        appended = torch.arange(n - problem.Lq, n, dtype=torch.int32, device=out.device)
        for s in range(problem.S):
            (stored, reused) = (
                x.positions[b, s, : int(x.count[b, s])] for x in (before.selection, info.selection)
            )
            if not torch.equal(reused, torch.cat((stored, appended))):
                raise NotEquivalent("a reused selection is not the stored one and what came since")
    check_bound("a reused selection", out, info, exact)
    return cache


def check_bound(what: str, out: Tensor, info: AttentionInfo, exact: Truth) -> Tensor:
    """Hold |out - dense| to 2 * (1 - mass) * max |v| for every head, but for rounding.

    Returns the mass.
    """
    mass = torch.exp(info.lse[:, :, exact.rows].double() - exact.lse)
    error = (out[:, :, exact.rows].double() - exact.out).abs().amax(-1)
    slack = 2**-18 + (1 - mass).clamp(min=0)  # the lse are float32
    bound = 2 * slack * exact.largest[..., 0] + _PEAK * exact.tolerance
    if not ((mass <= 1 + 1e-4) & (error <= bound)).all():
        raise NotEquivalent(
            f"{what} is up to {float((error / bound).max()):.3g} x the bound "
            "2 * (1 - mass) * max |v| away from dense attention"
        )
    return mass.clamp(max=1)
