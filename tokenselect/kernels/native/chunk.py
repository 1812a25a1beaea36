"""Attention of many queries: matrix products over gathered rows by torch, the rest in C++."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenselect.contract import Problem

# The logits of a block of queries, of one KV head, stay in the processor's cache.
_BLOCK_BYTES = 4 * 2**20
# Rows of logits are this many floats apart or a multiple: whole vectors of any width.
_PITCH = 16


def attend(
    problem: Problem,
    positions: Tensor,
    count: Tensor,
    out: Tensor,
    lse: Tensor,
    gather: Callable[..., None],
    weigh: Callable[..., None],
    empty: Callable[..., Tensor],
) -> None:
    """Fill out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) from positions (B, S, K) and count (B, S).

    gather, weigh  those stages of the library
    empty          `tokenselect.scratch.empty`, as the other stages take memory
    """
    p = problem
    columns = positions.shape[2]
    pitch = -(-columns // _PITCH) * _PITCH
    step = max(1, min(p.Lq, _BLOCK_BYTES // (4 * pitch * p.G)))
    device = p.q.device
    keys = empty((p.Hkv, columns, p.D), torch.float32, device)
    values = empty((p.Hkv, columns, p.Dv), torch.float32, device)
    memory = empty((p.G * step, pitch), torch.float32, device)
    factors = empty((p.G * step, 1), torch.float32, device)
    selection = {"positions": positions, "count": count}
    by_group = out.view(p.B, p.Hkv, p.G, p.Lq, p.Dv)
    for b, n in enumerate(p.cache_seqlens.tolist()):
        if n == 0:
            out[b], lse[b] = 0.0, -math.inf
            continue
        gather(p, selection | {"key_rows": keys, "value_rows": values}, request=b)
        for g in range(p.Hkv):
            s = 0 if p.S == 1 else g
            m = int(count[b, s])
            own = _own(p, n, positions[b, s, :m], values[g, :m])
            queries = _queries(p, b, g, n, m)
            for first in range(0, p.Lq, step):
                block = slice(first, min(first + step, p.Lq))
                rows = queries[:, block].flatten(0, 1)
                logits = torch.mm(rows, keys[g, :m].T, out=memory[: len(rows), :m])
                weigh(
                    p,
                    selection | {"logits": memory, "factors": factors, "out_lse": lse},
                    request=b, group=g, first_query=first, n_queries=block.stop - first,
                    logits_pitch=pitch,
                )  # fmt: skip
                weighted = _weighed(logits, values[g, :m], own, block, p.G)
                weighted *= factors[: len(rows)]
                by_group[b, g, :, block] = weighted.view(p.G, -1, p.Dv).to(out.dtype)


def _queries(p: Problem, b: int, g: int, n: int, m: int) -> Tensor:
    """Return the scaled queries (G, Lq, D) of a KV head, where they attend, as the keys are."""
    queries = p.q[b, g * p.G : (g + 1) * p.G].float()
    if p.rope is not None and p.needs_rotation(p.config.positions):
        at = torch.arange(n - p.Lq, n, device=p.q.device)
        to = at if p.config.positions == "original" else at - n + m
        queries = p.rope.reposition(queries, at, to)
        if p.rope.interleaved:  # rotated keys have the first of each pair below the second
            first, second = p.rope.rotary_pairs(queries)
            queries = torch.cat((first, second, queries[..., p.rope.rotary_dim :]), dim=-1)
    return queries * p.scale


def _own(p: Problem, n: int, positions: Tensor, values: Tensor) -> Tensor | None:
    """Return how many values each query sees (Lq,), if some that are not finite are not seen.

    Every query sees what was there before the call; of the call's own tokens, those up to its own.
    """
    before = int(torch.searchsorted(positions, n - p.Lq, right=True))
    if values[before:].isfinite().all():
        return None
    own = torch.arange(n - p.Lq, n, dtype=torch.int32, device=positions.device)
    return torch.searchsorted(positions, own, right=True)


def _weighed(weights: Tensor, values: Tensor, seen: Tensor | None, block: slice, G: int) -> Tensor:
    """Multiply weights (G * queries, m) and values (m, Dv), but for values that are not seen.

    In a product 0 * NaN is NaN: where a hidden value is not finite, queries go one by one.
    """
    if seen is None:
        return weights @ values
    by_query = weights.unflatten(0, (G, -1))
    parts = [by_query[:, i, :k] @ values[:k] for i, k in enumerate(seen[block].tolist())]
    return torch.stack(parts, dim=1).flatten(0, 1)
