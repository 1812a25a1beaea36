"""What a backend is held to on the inputs that are timed, before any time counts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.dense import Request, Truth, requests, truth, votes
from tokenselect import AttentionInfo, Problem, Selection, SelectionCache, attention

# Dense attention over everything, by a backend, widens the whole cache: do it on a prefix.
_CHECK_TOKENS = 32 * 1024
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
    if share > 1:
        raise NotEquivalent(
            f"attention(k={k}) on {backend}, k for everything, is {share:.3g} x the tolerance away "
            "from dense attention in float64"
        )
    return share


def check_fresh(
    problem: Problem, backend: str, several: list[Request], exact: Truth
) -> tuple[Selection, Tensor]:
    """Hold a fresh selection to the best tokens there are, and its result to its bound.

    Returns the selection and the retained mass (B, Hq, rows).
    """
    p = problem
    out, info = call(p, backend, return_info=True)
    mass = check_bound("a fresh selection", out, info, exact)
    told = info.retained_mass
    if p.Lq == 1 and not ((told - mass[:, :, 0]).abs() <= 1e-4).all():
        raise NotEquivalent("retained_mass is not the share of the softmax that was retained")
    for b, request in enumerate(several):
        for s, share in enumerate(votes(request).unflatten(0, (p.S, -1)).sum(1)):
            candidates = slice(*p.config.regions(len(share), p.Lq))
            chosen = info.selection.positions[b, s, : int(info.selection.count[b, s])].long()
            taken = torch.zeros_like(share).index_fill_(0, chosen, 1)[candidates]
            best = share[candidates].topk(min(p.config.k, len(taken))).values.sum()
            if float((share[candidates] * taken).sum()) < float(best) * (1 - 1e-5):
                raise NotEquivalent(f"the selection of request {b} is not the one with most votes")
    return info.selection, mass


def check_reused(problem: Problem, backend: str, exact: Truth) -> SelectionCache:
    """Hold a cache filled one step earlier to being hit, and the result to its bound."""
    # Filled by the same queries.
    cache = SelectionCache(theta=0.5, max_reuse=max(64, problem.Lq))
    call(replace(problem, cache_seqlens=problem.cache_seqlens - problem.Lq), backend, cache)
    out, info = call(problem, backend, cache, return_info=True)
    if not info.reused.all():
        raise NotEquivalent("the selection of one step earlier was not reused")
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
