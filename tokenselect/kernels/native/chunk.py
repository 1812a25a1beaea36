"""Attention of many queries: matrix products over gathered rows, by torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenselect.contract import Problem

# The logits of a block of queries, of one KV head, stay in the processor's cache.
_BLOCK_BYTES = 4 * 2**20


def attend(
    problem: Problem,
    positions: Tensor,
    count: Tensor,
    out: Tensor,
    lse: Tensor,
    gather: Callable[[Problem, int, dict[str, Tensor]], None],
) -> None:
    """Fill out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) from positions (B, S, K) and count (B, S)."""
    p = problem
    columns = positions.shape[2]
    keys = torch.empty(p.Hkv, columns, p.D)
    values = torch.empty(p.Hkv, columns, p.Dv)
    by_group = out.view(p.B, p.Hkv, p.G, p.Lq, p.Dv), lse.view(p.B, p.Hkv, p.G, p.Lq)
    for b, n in enumerate(p.cache_seqlens.tolist()):
        if n == 0:
            out[b], lse[b] = 0.0, -math.inf
            continue
        rows = {"key_rows": keys, "value_rows": values}
        gather(p, b, {"positions": positions, "count": count} | rows)
        for g in range(p.Hkv):
            s = 0 if p.S == 1 else g
            m = int(count[b, s])
            queries = _queries(p, b, g, n, m)
            _attend_head(
                p, g, queries, keys[g, :m], values[g, :m], positions[b, s, :m], n,
                by_group[0][b, g], by_group[1][b, g],
            )  # fmt: skip


def _queries(p: Problem, b: int, g: int, n: int, m: int) -> Tensor:
    """Return the scaled queries (G, Lq, D) of a KV head, where they attend, as the keys are."""
    queries = p.q[b, g * p.G : (g + 1) * p.G].float()
    if p.rope is not None and p.needs_rotation(p.config.positions):
        at = torch.arange(n - p.Lq, n)
        to = at if p.config.positions == "original" else torch.arange(m - p.Lq, m)
        queries = p.rope.reposition(queries, at, to)
        if p.rope.interleaved:  # rotated keys have the first of each pair below the second
            first, second = p.rope.rotary_pairs(queries)
            queries = torch.cat((first, second, queries[..., p.rope.rotary_dim :]), dim=-1)
    return queries * p.scale


def _attend_head(
    p: Problem,
    g: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    n: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out (G, Lq, Dv) and lse (G, Lq) of one KV head."""
    m = len(positions)
    # Every query sees the positions before the call's own; only these few columns are masked.
    seen_by_all = int((positions <= n - p.Lq).sum())
    own = positions[seen_by_all:]
    sinks = None
    if p.sink_logits is not None:
        sinks = p.sink_logits[g * p.G : (g + 1) * p.G].float()[:, None, None]
    step = max(1, _BLOCK_BYTES // max(1, 4 * m * p.G))
    for start in range(0, p.Lq, step):
        block = slice(start, min(start + step, p.Lq))
        at = torch.arange(n - p.Lq, n)[block, None]
        hidden = own > at
        logits = (queries[:, block].flatten(0, 1) @ keys.T).unflatten(0, (p.G, -1))
        if p.softcap is not None:
            logits.div_(p.softcap).tanh_().mul_(p.softcap)
        logits[..., seen_by_all:].masked_fill_(hidden, -math.inf)
        block_lse = torch.logsumexp(logits, -1)
        if m == 0:
            block_lse.fill_(-math.inf)
        lse[:, block] = block_lse
        weights = _weights_(logits, sinks)
        weighted = _weighed(weights, values, hidden, seen_by_all)
        sees = torch.full_like(at[:, 0], seen_by_all > 0, dtype=torch.bool)
        sees |= (~hidden).any(-1)
        out[:, block] = weighted.masked_fill_(~sees[:, None], 0.0).to(out.dtype)


def _weights_(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Turn logits (G, queries, m) into their softmax, sinks (G, 1, 1) in the denominator."""
    if logits.shape[-1] == 0:
        return logits
    top = logits.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = top.masked_fill_(top == -math.inf, 0.0)
    logits.sub_(top).exp_()
    total = logits.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return logits.div_(total)


def _weighed(weights: Tensor, values: Tensor, hidden: Tensor, seen_by_all: int) -> Tensor:
    """Multiply weights (G, queries, m) and values (m, Dv), but for values that are hidden.

    In a product 0 * NaN is NaN: where a hidden value is not finite, queries go one by one.
    """
    own = values[seen_by_all:]
    if own.isfinite().all():
        return weights @ values
    total = weights[..., :seen_by_all] @ values[:seen_by_all]
    for i, out_of_sight in enumerate(hidden):
        seen = own[~out_of_sight]
        total[:, i] += weights[:, i, seen_by_all : seen_by_all + len(seen)] @ seen
    return total
