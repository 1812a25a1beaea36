"""Scores of this rank's tokens, normalised over all ranks; and the choice among all ranks' best."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect import api
from tokenselect.context_parallel.shards import Alone, Shard
from tokenselect.contract import Problem, SelectConfig, Selection
from tokenselect.dispatch import registry
from tokenselect.dispatch.ranks import Ranks
from tokenselect.reference.score import added
from tokenselect.reference.select import best

# So many products of queries and keys are held at once.
_PRODUCTS = 2**22


class Ballots(NamedTuple):
    """Votes (R, S, m) float32 for the candidates of a request on this rank, at positions (m,)."""

    at: Tensor
    votes: Tensor


def score(
    own: Problem,
    shards: list[Shard],
    lengths: list[int],
    ranks: "Alone | Ranks",
    backend: str,
) -> tuple[list[Ballots], Tensor]:
    """Return the votes for this rank's candidates of each request, and the lse of `Scores`.

    A softmax is taken of each row of logits, over the tokens of all ranks.
    """
    p, c, device = own, own.config, own.q.device
    rows, candidates, slices = [], [], []
    for b, (n, shard) in enumerate(zip(lengths, shards, strict=True)):
        held = shard if n else Shard(shard.at[:0], shard.slots[:0])
        rows.append(_logits(p, b, n, held, backend))  # (V, Hq, m)
        start, stop = torch.searchsorted(held.at, held.at.new_tensor(c.regions(n, p.Lq))).tolist()
        candidates.append(slice(start, stop))
        inside = candidates[b] if c.normalize == "candidates" else slice(None)
        slices.append([inside] * (len(rows[b]) - 1) + [slice(None)])
    shape = (p.B, len(rows[0]), p.Hq)
    largest = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
    for b, found in enumerate(rows):
        for v, s in enumerate(found):
            if s[:, slices[b][v]].shape[1] > 0:
                largest[b, v] = s[:, slices[b][v]].amax(1)
    largest = ranks.gather(largest).amax(0)
    largest = largest.where(largest.isfinite(), 0.0)

    # exp(logit - largest) <= 1, as integers of which n fit into 63 bits.
    units = [2.0 ** (62 - n.bit_length()) for n in lengths]
    sums = torch.zeros(shape, dtype=torch.int64, device=device)
    weights = [(found - largest[b, ..., None]).exp_() for b, found in enumerate(rows)]
    for b, found in enumerate(weights):
        for v, w in enumerate(found):
            sums[b, v] = w[:, slices[b][v]].double().mul_(units[b]).round_().long().sum(1)
    of_all = ranks.gather(sums).sum(0)
    total = torch.stack([of.double() / unit for of, unit in zip(of_all, units, strict=True)])
    factor = (1 / total).where(total > 0, 0.0).float()

    ballots = []
    runs = min(c.n_query_means, p.Lq)
    for b, inside in enumerate(candidates):
        given = rows[b][..., inside]
        if c.vote == "soft":
            given = weights[b][..., inside] * factor[b, ..., None]
        votes = []
        for r in range(p.R):
            heads = added(given[r * runs : (r + 1) * runs].clone())
            votes.append(torch.stack([added(voters) for voters in heads.chunk(p.S)]))
        ballots.append(Ballots(shards[b].at[inside], torch.stack(votes)))
    return ballots, (largest[:, -1] + total[:, -1].log()).float()


def _logits(own: Problem, b: int, n: int, held: Shard, backend: str) -> Tensor:
    """Return logits (V, Hq, m) float32 of this rank's m tokens of request b; -inf if not finite.

    V rows: each ballot's runs of queries, in turn, and last, if that is another, the row of the
    lse: the mean of all queries on the last ballot, over all tokens.
    """
    p, c, device = own, own.config, own.q.device
    if len(held.at) == 0:
        V = len(c.ballots) * min(c.n_query_means, p.Lq) + _lse_is_apart(c, p.Lq)
        return p.q.new_empty((V, p.Hq, 0), dtype=torch.float32)
    stored = _keys(p, b, held.slots)
    newest = torch.arange(n - p.Lq, n, device=device)
    rows = []
    for score_at in c.ballots:
        queries, keys = p.q[b], stored
        if p.rope is not None and p.needs_rotation(score_at):
            at, query_at = held.at, newest
            if score_at == "fixed":
                at, query_at = torch.zeros_like(at), torch.full_like(newest, c.n_local)
            at, here = (F.pad(x, (0, 1)) for x in (at, held.at))
            queries = p.rope.reposition(queries.to(p.compute_dtype), newest, query_at)
            keys = p.rope.reposition(keys.to(p.compute_dtype), here, at)
        if p.Lq > 1:  # one query is its own mean, in the cache's dtype
            queries = queries.to(p.compute_dtype)
        runs = [*queries.tensor_split(min(c.n_query_means, p.Lq), 1)]
        if score_at == c.ballots[-1] and _lse_is_apart(c, p.Lq):
            runs.append(queries)
        means = [run.mean(1, keepdim=True) for run in runs]
        rows.append(_scored(p, torch.cat(means, 1).transpose(0, 1), keys, backend))
    return torch.cat(rows)


def _lse_is_apart(c: SelectConfig, Lq: int) -> bool:
    """Say whether no run that votes has the lse: several do, or over the candidates alone."""
    return min(c.n_query_means, Lq) > 1 or c.normalize == "candidates"


def _keys(own: Problem, b: int, slots: Tensor) -> Tensor:
    """Return the keys (Hkv, m + 1, D) in those slots of request b, and one more, of any content."""
    p, m = own, len(slots)
    if p.block_table is None:
        if p.Lk > m and torch.equal(slots, torch.arange(m, device=slots.device)):
            return p.k_cache[b][:, : m + 1]
        return p.k_cache[b][:, torch.cat((slots, slots[-1:]))]
    slots = torch.cat((slots, slots[-1:]))
    page = p.block_table[b][slots // p.page_size].long()
    return p.k_cache[page, slots % p.page_size].transpose(0, 1)


def _scored(own: Problem, queries: Tensor, keys: Tensor, backend: str) -> Tensor:
    """Return the logits (X, Hq, m) of queries (X, Hq, D) and keys (Hkv, m + 1, D), less the last.

    By a backend's score stage, where it gives a key the same logit wherever it lies: each head has
    a selection of its own, each KV head is a request, and all but the newest token are candidates.
    """
    p, (X, Hq, D), (Hkv, tokens, _) = own, queries.shape, keys.shape
    heads = X * Hq // Hkv
    by_group = queries.view(X, Hkv, Hq // Hkv, D).transpose(0, 1)
    one_each = keys.to(queries.dtype)[:, None].expand(Hkv, heads, tokens, D)
    problem = Problem.build(
        by_group.reshape(Hkv, heads, 1, D),
        one_each,
        one_each,
        SelectConfig(k=0, n_sink=0, n_local=1, vote="logit", scope="group"),
        scale=p.select_scale,
        softcap=p.softcap,
    )
    found = registry.load(registry.resolve(backend, problem))
    if found.capability.equal_keys and found.capability.deterministic:
        votes = api.score(problem, found.name, validate=False).votes[:, 0, :, :-1]
    else:
        votes = _dots(problem)
    m = tokens - 1
    return votes.reshape(Hkv, X, Hq // Hkv, m).transpose(0, 1).reshape(X, Hq, m)


def _dots(problem: Problem) -> Tensor:
    """Do what a score stage does there, with torch's operators, each sum in the same order."""
    p = problem
    out = p.q.new_empty((p.B, p.Hq, p.Lk - 1), dtype=torch.float32)
    factors = p.q[:, :, 0].to(p.compute_dtype).permute(2, 0, 1)[..., None]
    step = max(64, _PRODUCTS // p.q.numel())
    for start in range(0, p.Lk - 1, step):
        keys = p.k_cache[:, :1, start : min(start + step, p.Lk - 1)].to(p.compute_dtype)
        out[:, :, start : start + step] = added(keys.permute(3, 0, 1, 2) * factors)
    s = p.scale * out
    if p.softcap is not None:
        return (p.softcap * torch.tanh(s / p.softcap)).where(s.isfinite(), -math.inf)
    return s.where(s.isfinite(), -math.inf)


def select(
    whole: Problem, lengths: list[int], ballots: list[Ballots], ranks: "Alone | Ranks"
) -> Selection:
    """Choose, ballot after ballot, the k best of each rank's k best; the same on all ranks."""
    p, c, device = whole, whole.config, whole.q.device
    none = torch.empty(0, dtype=torch.int32, device=device)
    chosen = [[none] * p.S for _ in lengths]
    for r in range(p.R):
        shares = [c.shares(n)[r] if n else 0 for n in lengths]
        shape = (p.B, p.S, min(max(shares), p.Lk), 2)
        offered = torch.full(shape, -1, dtype=torch.int32, device=device)
        for b, (at, votes) in enumerate(ballots):
            for s in range(p.S):
                free = torch.isin(at, chosen[b][s], invert=True).nonzero()[:, 0]
                mine = free[best(votes[r, s, free], shares[b])]
                offered[b, s, : len(mine), 0] = at[mine].int()
                offered[b, s, : len(mine), 1] = votes[r, s, mine].view(torch.int32)
        of_all = ranks.gather(offered)
        for b, share in enumerate(shares):
            for s in range(p.S):
                at, votes = of_all[:, b, s].flatten(0, 1).unbind(1)
                order = at.argsort()[int((at < 0).sum()) :]  # of equal votes the lower position
                picked = order[best(votes[order].view(torch.float32), share)]
                chosen[b][s] = torch.cat((chosen[b][s], at[picked]))
    positions = torch.full((p.B, p.S, p.K), -1, dtype=torch.int32, device=device)
    count = torch.zeros((p.B, p.S), dtype=torch.int32, device=device)
    for b, n in enumerate(lengths):
        sink_end, local_start = c.regions(n, p.Lq)
        sink = torch.arange(sink_end, dtype=torch.int32, device=device)
        window = torch.arange(local_start, n, dtype=torch.int32, device=device)
        for s in range(p.S):
            selected = torch.cat((sink, chosen[b][s].sort().values, window))
            positions[b, s, : len(selected)] = selected
            count[b, s] = len(selected)
    return Selection(positions, count)
