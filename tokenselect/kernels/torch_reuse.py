"""The Selection Cache's two steps (paper, algorithm 1): decide before scoring, keep afterwards.

    reused  =  cos(qbar, stored qbar) >= theta, one cosine over all heads, and only new tokens
               were appended since, no more than max_reuse of them, and the result fits K

Unlike the stages, which answer for a number within a tolerance, a decision is right or wrong; so
its arithmetic is specified, and every backend takes the same decision from the same queries. Sums
are float64, of 512 columns that add up one after the other, then by halves; products of two float32
numbers are exact in it. All of it runs on the device and waits for nothing.
"""

import torch
from torch import Tensor

from tokenselect.contract import CacheState, Problem, ReuseDecision, Selection
from tokenselect.scratch import empty

# Queries of a call that are added up side by side; products of a cosine that are.
RUN = 16
COLUMNS = 512


def decide_reuse(problem: Problem, state: CacheState, theta: float | None) -> ReuseDecision:
    """Decide which requests reuse their selection; change nothing. theta None: none."""
    p, device = problem, problem.q.device
    query = mean_query(p)
    reused = empty((p.B,), torch.bool, device).fill_(theta is not None)
    if theta is not None:
        n, appended, fits = (empty((p.B,), torch.int32, device) for _ in range(3))
        torch.clamp(p.cache_seqlens, 0, p.Lk, out=n)
        torch.sub(n, state.seqlen_at_selection, out=appended)
        torch.amax(state.count, 1, out=fits).add_(appended)
        holds = empty((p.B,), torch.bool, device)
        reused &= torch.gt(state.seqlen_at_selection, 0, out=holds)
        reused &= torch.ge(appended, p.Lq, out=holds)
        reused &= torch.le(appended, p.max_reuse, out=holds)
        reused &= torch.le(fits, p.K, out=holds)
        # cos >= theta as cos * |cos| >= theta * |theta|: no root, and no division, so that equal
        # queries have a cosine of exactly 1.
        product, power, stored = dots(query, state.query)
        both, least = (empty((p.B,), torch.float64, device) for _ in range(2))
        torch.mul(power, stored, out=both)
        reused &= torch.gt(both, 0, out=holds)
        reused &= torch.lt(both, torch.inf, out=holds)
        torch.abs(product, out=least)
        product.mul_(least)
        least.fill_(theta * abs(theta)).mul_(both)
        reused &= torch.ge(product, least, out=holds)
    lengths = empty((p.B,), torch.int32, device).copy_(p.cache_seqlens).masked_fill_(reused, 0)
    return ReuseDecision(reused, lengths, query)


def update(
    problem: Problem, state: CacheState, decision: ReuseDecision, selection: Selection
) -> None:
    """Complete the selections that are reused, in `selection`; store the others in `state`.

    A reused selection is the stored positions and every position appended since.
    """
    p, device = problem, problem.q.device
    K = selection.positions.shape[2]
    rows, places = (p.B, p.S), (p.B, p.S, K)
    reused, query = decision.reused, decision.query
    n = torch.clamp(p.cache_seqlens, 0, p.Lk, out=empty((p.B,), torch.int32, device))
    place = torch.arange(K, out=empty((K,), torch.int32, device), device=device)
    stored = state.positions[:, :, :K]
    # Place r holds the stored position r, or, from count on, seen, seen + 1, ..., n - 1.
    ahead = torch.sub(
        state.seqlen_at_selection[:, None], state.count, out=empty(rows, torch.int32, device)
    )
    total = torch.sub(n[:, None], ahead, out=empty(rows, torch.int32, device))
    holds = empty(places, torch.bool, device)
    merged = torch.add(place, ahead[..., None], out=empty(places, torch.int32, device))
    torch.where(torch.lt(place, state.count[..., None], out=holds), stored, merged, out=merged)
    merged.masked_fill_(torch.ge(place, total[..., None], out=holds), -1)
    positions, count = selection
    torch.where(reused[:, None, None], merged, positions, out=positions)
    torch.where(reused[:, None], total, count, out=count)

    torch.where(reused[:, None, None], stored, positions, out=stored)
    torch.where(reused[:, None], state.query, query, out=state.query)
    torch.where(reused[:, None], state.count, count, out=state.count)
    torch.where(reused, state.seqlen_at_selection, n, out=state.seqlen_at_selection)
    present, counted = empty((p.B,), torch.bool, device), empty((p.B,), torch.int64, device)
    state.hits.add_(counted.copy_(torch.gt(n, 0, out=present).logical_and_(reused)))
    selected_again = torch.logical_not(reused, out=holds[:, 0, 0])
    state.misses.add_(counted.copy_(torch.gt(n, 0, out=present).logical_and_(selected_again)))


def mean_query(problem: Problem) -> Tensor:
    """Return the mean of the queries as given, heads side by side: (B, Hq * D) float32."""
    p, device = problem, problem.q.device
    query = empty((p.B, p.Hq * p.D), torch.float32, device)
    by_head = query.view(p.B, p.Hq, p.D)
    if p.Lq == 1:
        by_head.copy_(p.q[:, :, 0])
        return query
    sums, run = (empty((p.B, p.Hq, RUN, p.D), torch.float64, device) for _ in range(2))
    sums.zero_()
    for start in range(0, p.Lq, RUN):
        several = min(RUN, p.Lq - start)
        run[:, :, :several].copy_(p.q[:, :, start : start + several])
        sums[:, :, :several].add_(run[:, :, :several])
    share = empty((1,), torch.float64, device).fill_(1 / p.Lq)
    by_head.copy_(_halved(sums.transpose(2, 3)).mul_(share))
    return query


def dots(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a . b, a . a and b . b of each row of a and b (B, N) float32: (B,) float64 each."""
    B, N = a.shape
    n_chunks = -(-N // COLUMNS)
    x, y = (empty((B, N), torch.float64, a.device).copy_(side) for side in (a, b))
    products = empty((3, B, n_chunks * COLUMNS), torch.float64, a.device).zero_()
    for out, pair in zip(products, ((x, y), (x, x), (y, y)), strict=True):
        torch.mul(*pair, out=out[:, :N])
    chunks = products.view(3, B, n_chunks, COLUMNS)
    sums = chunks[:, :, 0]
    for i in range(1, n_chunks):
        sums.add_(chunks[:, :, i])
    product, power, stored = _halved(sums)
    return product, power, stored


def _halved(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two long: half onto half, in place."""
    size = x.shape[-1]
    while size > 1:
        size //= 2
        x[..., :size].add_(x[..., size : 2 * size])
    return x[..., 0]
