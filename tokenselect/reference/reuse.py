"""The Selection Cache (algorithm 1): reuse a selection while the query has hardly turned.

reused  =  cos(qbar, qbar at the selection) >= theta, over all heads together, and
           Lq <= tokens appended since <= max_reuse, and the result fits the capacity K

A vote may differ in its last bits from backend to backend; a decision may not. So every backend
adds in the same order, in float64: rows of 512 (of 16, for a mean) onto one row, one after the
other, then that row half onto half. docs/semantics.md says where this departs from the paper.
"""

import torch
from torch import Tensor

from tokenselect.contract import CacheState, Problem, ReuseDecision, Selection


def decide_reuse(problem: Problem, state: CacheState, theta: float | None) -> ReuseDecision:
    """Decide which requests reuse their selection; none if theta is None. Changes nothing.

    A request that reuses gets the length 0: to score and select it is absent.
    """
    query = mean_query(problem)
    reused = torch.zeros_like(problem.cache_seqlens, dtype=torch.bool)
    for b, n in enumerate(problem.cache_seqlens.clamp(0, problem.Lk).tolist()):
        seqlen_at_selection = int(state.seqlen_at_selection[b])
        appended = n - seqlen_at_selection
        reused[b] = (
            theta is not None
            and seqlen_at_selection > 0
            and problem.Lq <= appended <= problem.max_reuse
            and int(state.count[b].max()) + appended <= problem.K
            and are_alike(query[b], state.query[b], theta)
        )
    return ReuseDecision(reused, problem.cache_seqlens.masked_fill(reused, 0), query)


def update(
    problem: Problem, state: CacheState, decision: ReuseDecision, selection: Selection
) -> None:
    """Complete the selections that are reused, in `selection`; store the others in `state`."""
    (positions, count), K = selection, selection.positions.shape[2]
    for b, n in enumerate(problem.cache_seqlens.clamp(0, problem.Lk).tolist()):
        if decision.reused[b]:  # the stored positions, and every position appended since
            appended = torch.arange(int(state.seqlen_at_selection[b]), n, device=positions.device)
            for s in range(problem.S):
                stored = state.positions[b, s, : int(state.count[b, s])]
                complete = torch.cat((stored, appended.int()))
                count[b, s] = len(complete)
                positions[b, s] = -1
                positions[b, s, : len(complete)] = complete[:K]
            state.hits[b] += n > 0
        else:
            state.query[b] = decision.query[b]
            state.positions[b, :, :K] = positions[b]
            state.count[b] = count[b]
            state.seqlen_at_selection[b] = n
            state.misses[b] += n > 0


def mean_query(problem: Problem) -> Tensor:
    """Return the mean of the queries as given, heads side by side: (B, Hq * D) float32."""
    if problem.Lq == 1:
        return problem.q[:, :, 0].flatten(1).float()
    queries = problem.q.double().transpose(1, 2).flatten(2)  # (B, Lq, Hq * D)
    mean = torch.stack([added(q, 16) * (1 / problem.Lq) for q in queries])
    return mean.float()


def are_alike(a: Tensor, b: Tensor, theta: float) -> bool:
    """Say whether the cosine of a and b (N,) float32 is at least theta.

    As dot * |dot| >= theta * |theta| * (a . a) * (b . b): without a root or a division, so that
    equal vectors have a cosine of exactly 1. No for a vector of zeros, or one that is not finite.
    """
    a, b = a.double(), b.double()
    dot, square = float(added(a * b, 512)), float(added(a * a, 512)) * float(added(b * b, 512))
    return 0 < square < float("inf") and dot * abs(dot) >= theta * abs(theta) * square


def added(x: Tensor, row: int) -> Tensor:
    """Sum x (L, ...) over L in the one order that every backend keeps."""
    padded = torch.cat((x, x.new_zeros((-len(x) % row, *x.shape[1:]))))
    total = torch.zeros_like(padded[:row])
    for start in range(0, len(padded), row):
        total += padded[start : start + row]
    while (half := len(total) // 2) > 0:
        total = total[:half] + total[half:]
    return total[0]
