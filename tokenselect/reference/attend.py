"""Stage 3, attend: softmax attention of each query over the selected tokens it may see.

s_{h,i,j}  = softcap(scale * q_{h,i} . k_{h // G, j})              j selected, j <= n - Lq + i
out_{h,i}  = sum over j of softmax_j(s_{h,i}) v_{h // G, j}        eq. 2

The file starts with one query of one head. Then come requests, selections, heads and the causal
rule (`attend`), and at last keys that move (`placed`).
"""

import math

import torch
from torch import Tensor

from tokenselect.contract import AttentionOutput, Problem, Selection
from tokenselect.reference.rows import read


def attention(
    query: Tensor, keys: Tensor, values: Tensor, problem: Problem, sink_logit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out (Dv,) and lse of one query (D,) of one head over keys (n, D), values (n, Dv)."""
    s = capped(problem.scale * (keys @ query), problem.softcap)  # s_j
    return softmax_weights(s, sink_logit) @ values, s.logsumexp(0)  # eq. 2


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Keep logits within +-softcap (Gemma 2)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax_weights(logits: Tensor, sink_logit: Tensor | None) -> Tensor:
    """Return the softmax, a sink's logit in its denominator and without a value (gpt-oss)."""
    if sink_logit is None:
        return torch.softmax(logits, 0)
    return torch.softmax(torch.cat((logits, sink_logit.to(logits.dtype)[None])), 0)[:-1]


def attend(problem: Problem, selection: Selection) -> AttentionOutput:
    """Attend to the selected positions, causally.

    Returns out (B, Hq, Lq, Dv) in q's dtype and lse (B, Hq, Lq) float32, the natural log of the
    sum of exp(logit) over the tokens attended to (sink_logits aside). A query that sees nothing:
    zeros and -inf. Rows that are not selected are never read.
    """
    B, Hq, Lq, Dv = problem.B, problem.Hq, problem.Lq, problem.Dv
    out = torch.zeros((B, Hq, Lq, Dv), dtype=problem.q.dtype, device=problem.q.device)
    lse = torch.full((B, Hq, Lq), -math.inf, dtype=torch.float32, device=problem.q.device)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        for s in range(problem.S):
            positions = selection.positions[b, s][: int(selection.count[b, s])].long()
            queries, keys = placed(problem, b, n, positions)
            values = read(problem, problem.v_cache, b, positions)
            for h in heads_of(problem, s):
                g = h // problem.G
                sink_logit = None if problem.sink_logits is None else problem.sink_logits[h]
                for i in range(Lq):
                    seen = positions <= n - Lq + i
                    if seen.any():
                        out[b, h, i], lse[b, h, i] = attention(
                            queries[h, i], keys[g, seen], values[g, seen], problem, sink_logit
                        )
    return AttentionOutput(out, lse)


def heads_of(problem: Problem, s: int) -> range:
    """Return the query heads that attend to selection s: all of them, or one group."""
    heads = problem.Hq // problem.S
    return range(s * heads, (s + 1) * heads)


def placed(problem: Problem, b: int, n: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries (Hq, Lq, D) and selected keys (Hkv, count, D), placed where they attend.

    "original": each where it stands. "contiguous": the r-th selected key at r, and the queries
    at the last Lq of those places.
    """
    keys = read(problem, problem.k_cache, b, positions)
    queries = problem.q[b].to(keys.dtype)
    rope = problem.rope
    if rope is None or not problem.needs_rotation(problem.config.positions):
        return queries, keys
    newest = torch.arange(problem.Lq, device=positions.device) - problem.Lq
    query_positions = n + newest
    if problem.config.positions == "original":
        at, query_at = positions, query_positions
    else:
        at = torch.arange(len(positions), device=positions.device)
        query_at = len(positions) + newest
    return rope.reposition(queries, query_positions, query_at), rope.reposition(keys, positions, at)
