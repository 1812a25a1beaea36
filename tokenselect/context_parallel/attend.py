"""Attention to this rank's share of the selection, and the merging of all shares."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect import api
from tokenselect.context_parallel.shards import Alone, Shard
from tokenselect.contract import AttentionOutput, Problem, SelectConfig, Selection
from tokenselect.dispatch.ranks import Ranks
from tokenselect.reference.rows import read


def attend(
    own: Problem,
    shards: list[Shard],
    selection: Selection,
    ranks: "Alone | Ranks",
    backend: str,
) -> AttentionOutput:
    """Attend to this rank's tokens of the selection, and merge what all ranks have by lse."""
    p, device = own, own.q.device
    shape = (p.B, p.Hq, p.Lq)
    out = torch.zeros((*shape, p.Dv), dtype=torch.float32, device=device)
    lse = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
    for b, n in enumerate(p.cache_seqlens.tolist()):
        newest = torch.arange(n - p.Lq, n, device=device)
        chosen = [_chosen(p, b, s, shards[b], selection, newest) for s in range(p.S)]
        width = max(keys.shape[1] for _, keys, _, _ in chosen)
        if width > 0:
            queries, keys, values, _ = chosen[0]
            if p.S > 1:
                keys, values = (
                    torch.cat([F.pad(x[i], (0, 0, 0, width - x[i].shape[1])) for x in chosen])
                    for i in (1, 2)
                )
            seen = torch.stack([x[3] for x in chosen], 1)
            found = api.attend(*gathered(p, queries, keys, values, seen), backend, validate=False)
            out[b], lse[b] = found.out[:, :, 0].transpose(0, 1), found.lse[:, :, 0].T
            for i in lse[b].isneginf().any(0).nonzero()[:, 0].tolist():
                _weigh_nothing(out[b, :, i], lse[b, :, i], values, seen[i])
    of_all = ranks.gather(torch.cat((out, lse[..., None]), -1))
    return _merged(p, of_all[..., :-1], of_all[..., -1])


def _weigh_nothing(out: Tensor, lse: Tensor, values: Tensor, seen: Tensor) -> None:
    """Put 0 times the values into out (Hq, Dv) where no logit is finite: NaN if a value is not.

    Tokens of other ranks may have all of the weight.
    """
    tokens = torch.arange(values.shape[1], device=out.device) < seen.expand(len(values))[:, None]
    nothing = (0 * values).where(tokens[..., None], 0.0).sum(1)
    nothing = nothing.repeat_interleave(len(out) // len(values), 0)
    out.copy_(torch.where(lse.isneginf()[:, None], nothing, out))


def _chosen(
    own: Problem, b: int, s: int, shard: Shard, selection: Selection, newest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values (heads, tokens, dim), and how many tokens each query sees.

    The tokens are those of selection s on this rank, in order. So each query sees the first of
    them, up to its own position.
    """
    p, count = own, int(selection.count[b, s])
    at = selection.positions[b, s, :count].long()
    places = torch.isin(at, shard.at).nonzero()[:, 0]
    here = at[places]
    slots = shard.slots[torch.searchsorted(shard.at, here)]
    heads = slice(None) if p.S == 1 else slice(s, s + 1)
    queries = p.q[b].to(p.compute_dtype)
    keys, values = (read(p, cache, b, slots)[heads] for cache in (p.k_cache, p.v_cache))
    if p.rope is not None and p.needs_rotation(p.config.positions):
        to, query_to = here, newest
        if p.config.positions == "contiguous":
            to, query_to = places, newest - newest[-1] + count - 1
        queries = p.rope.reposition(queries, newest, query_to)
        keys = p.rope.reposition(keys, here, to)
    return queries, keys, values, torch.searchsorted(here, newest, right=True)


def gathered(
    own: Problem, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor
) -> tuple[Problem, Selection]:
    """Return a problem of which each query is a request, with the tokens as its cache.

    queries (Hq, Lq, D); keys, values (Hkv, m, D) and Dv; seen (Lq, S): how many of them, from the
    first on, a query attends to
    """
    Lq, m = len(seen), keys.shape[1]
    config = SelectConfig(k=m, n_sink=0, n_local=1, scope=own.config.scope)
    problem = Problem.build(
        queries.transpose(0, 1)[:, :, None],
        keys.expand(Lq, *keys.shape),
        values.expand(Lq, *values.shape),
        config,
        scale=own.scale,
        softcap=own.softcap,
    )
    place = torch.arange(m, dtype=torch.int32, device=seen.device).expand(*seen.shape, m)
    return problem, Selection(place.where(place < seen[..., None], -1), seen.int())


def _merged(own: Problem, outs: Tensor, lses: Tensor) -> AttentionOutput:
    """Merge attention to parts: outs (size, B, Hq, Lq, Dv) and lses (size, B, Hq, Lq)."""
    lse = lses.logsumexp(0)
    sink, total = own.sink_logits, lse
    if sink is not None:
        total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    out = torch.zeros_like(outs[0])
    for part, weight in zip(outs, (lses - total).exp(), strict=True):
        out += part * weight[..., None]
    out[own.cache_seqlens == 0] = 0.0
    return AttentionOutput(out.to(own.q.dtype), lse)
