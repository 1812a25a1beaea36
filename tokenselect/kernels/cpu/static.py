"""The cpu backend's stages as a plan runs them: operators of fixed shape, in memory that is lent.

All requests at once, over the whole capacity of the cache: what a request does not have is masked.
Nothing is read on the host, so that no branch depends on a value. All memory is from
`scratch.empty`, taken before a loop over chunks and used again in it. Where an operator would
make a tensor of a Python number, it gets a `number`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenselect.contract import AttentionOutput, Problem, Scores, Selection
from tokenselect.contract.config import MILLION
from tokenselect.kernels.cpu.rows import (
    Reader,
    chunks,
    prefix_view,
    rotator,
    scalar_like,
    slices,
)
from tokenselect.scratch import empty

# Logits that attention holds at once, if more than one query's.
_LOGITS_BYTES = 32 * 2**20
# Where padding is: after every query.
_NOWHERE = 2**62


def score(problem: Problem) -> Scores:
    """See `tokenselect.reference.score`; votes off the candidates are left as they come."""
    p, c, device, dtype = problem, problem.config, problem.q.device, problem.compute_dtype
    votes = empty((p.B, p.R, p.S, p.Lk), torch.float32, device)
    lse = empty((p.B, p.Hq), torch.float32, device)
    n, absent, outside = _regions(p)
    position = _query_positions(p, n)
    n_voters = min(c.n_query_means, p.Lq) * p.G
    n_rows = n_voters + (0 if n_voters == p.G else p.G)
    logits = empty((p.B, p.Hkv, n_rows, p.Lk), dtype, device)
    total = empty((p.B, p.S, p.Lk), dtype, device)
    for ballot, where in enumerate(c.ballots):
        at = position if where == "true" else scalar_like(c.n_local, position)
        voters = _means(p, _queries(p, where, position, at))
        _fill_logits(logits, p, voters, where, absent)
        lse.view(p.B, p.Hkv, p.G).copy_(_vote_(logits, n_voters, p, outside, n))
        of_selection = logits.view(p.B, p.S, -1, n_rows, p.Lk)[:, :, :, :n_voters]
        torch.sum(of_selection, (2, 3), out=total)
        votes[:, ballot].copy_(_pooled(total, p, outside))
    return Scores(votes, lse)


class _Regions(NamedTuple):
    n: Tensor  # (B,) int64
    absent: Tensor  # (B, Lk) bool: positions from n on
    outside: Tensor  # (B, Lk) bool: positions that are no candidates


def _regions(problem: Problem) -> _Regions:
    """Return `SelectConfig.regions` of every request."""
    p, c, device = problem, problem.config, problem.q.device
    n = _lengths(p)
    local_start, sink_end = (empty((p.B,), torch.int64, device) for _ in range(2))
    torch.sub(n, scalar_like(p.Lq - 1 + c.n_local, n), out=local_start).clamp_(min=0)
    torch.clamp(local_start, max=c.n_sink, out=sink_end)
    position = torch.arange(p.Lk, out=empty((p.Lk,), torch.int64, device), device=device)
    absent, outside, local = (empty((p.B, p.Lk), torch.bool, device) for _ in range(3))
    torch.ge(position, n[:, None], out=absent)
    torch.lt(position, sink_end[:, None], out=outside)
    outside.logical_or_(torch.ge(position, local_start[:, None], out=local))
    return _Regions(n, absent, outside)


def _lengths(problem: Problem) -> Tensor:
    """Return cache_seqlens (B,) int64, no less than 0 and no more than the capacity."""
    n = empty((problem.B,), torch.int64, problem.q.device)
    return n.copy_(problem.cache_seqlens).clamp_(0, problem.Lk)


def _query_positions(problem: Problem, n: Tensor) -> Tensor:
    """Return n - Lq, ..., n - 1 of each request: (B, 1, Lq)."""
    position = empty((problem.B, 1, problem.Lq), torch.int64, n.device)
    return torch.add(n[:, None, None], _newest(problem), out=position)


def _newest(problem: Problem) -> Tensor:
    newest = empty((problem.Lq,), torch.int64, problem.q.device)
    return torch.arange(-problem.Lq, 0, out=newest, device=newest.device)


def _queries(problem: Problem, where: str, position: Tensor, at: Tensor) -> Tensor:
    """Return the queries (B, Hkv, Lq, G, D), at `at` if `where` needs a rotation."""
    p = problem
    queries = empty((p.B, p.Hkv, p.Lq, p.G, p.D), p.compute_dtype, p.q.device)
    queries.copy_(p.q.unflatten(1, (p.Hkv, p.G)).transpose(2, 3))
    moving = rotator(p, where, p.B * p.S * p.Lq, p.B * p.Hq * p.Lq)
    if moving is not None:
        moving.rotate_(queries.view(p.B, p.S, -1, p.Lq, p.G, p.D), position, at)
    return queries


def _means(problem: Problem, queries: Tensor) -> Tensor:
    """Return the mean queries that vote, times the scale: (B * Hkv, rows, D).

    G rows for each run of queries, then, if there are several runs, G for the whole call.
    """
    p = problem
    runs = queries.tensor_split(min(p.config.n_query_means, p.Lq), dim=2)
    if len(runs) > 1:
        runs = (*runs, queries)
    means = empty((p.B, p.Hkv, len(runs), p.G, p.D), queries.dtype, queries.device)
    for i, run in enumerate(runs):
        factor = scalar_like(p.select_scale / run.shape[2], means)
        torch.sum(run, 2, out=means[:, :, i]).mul_(factor)
    return means.view(p.B * p.Hkv, -1, p.D)


def _fill_logits(
    logits: Tensor, problem: Problem, voters: Tensor, where: str, absent: Tensor
) -> None:
    """Fill logits (B, Hkv, rows, Lk) of voters over the cache; -inf if not finite, or absent."""
    p, n_rows = problem, voters.shape[1]
    width, tokens = chunks(p, p.Lk)
    reader = Reader(p, p.k_cache, tokens, 1)
    moving = rotator(p, where, tokens, tokens * p.Hkv)
    memory = empty((tokens * p.Hkv * n_rows,), voters.dtype, voters.device)
    infinite = empty((tokens * p.Hkv * n_rows,), torch.bool, voters.device)
    position = torch.arange(
        p.Lk, out=empty((p.Lk,), torch.int64, voters.device), device=voters.device
    )
    zero, softcap = scalar_like(0, position), scalar_like(p.softcap or 0.0, voters)
    for chunk in slices(p.Lk, width):
        keys = reader.run(position, chunk)
        if moving is not None:
            here = position[None, None, chunk]
            by_head = keys.view(p.B, 1, p.Hkv, -1, 1, p.D)
            moving.rotate_(by_head, here, here if where == "true" else zero)
        part = prefix_view(memory, p.B * p.Hkv, n_rows, keys.shape[1])
        # Not into the logits themselves: into a strided slice, bmm is slower.
        torch.bmm(voters, keys.transpose(1, 2), out=part)
        part = part.view(p.B, -1, keys.shape[1])
        part.masked_fill_(absent[:, None, chunk], -math.inf)
        part.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        if p.softcap is not None:
            lost = torch.isneginf(part, out=prefix_view(infinite, *part.shape))
            _cap_(part, softcap).masked_fill_(lost, -math.inf)
        logits.view(p.B, -1, p.Lk)[:, :, chunk].copy_(part)


def _vote_(logits: Tensor, n_voters: int, problem: Problem, outside: Tensor, n: Tensor) -> Tensor:
    """Turn the logits of the voters, in their place, into votes; the lse of the last G rows."""
    p, c = problem, problem.config
    stats = empty((4, p.B, p.Hkv, logits.shape[2], 1), logits.dtype, logits.device)
    if c.vote == "soft" and c.normalize == "visible":
        lse = _softmax_(logits, stats)
        return lse[:, :, -p.G :]
    whole = empty((p.B, p.Hkv, p.G, p.Lk), logits.dtype, logits.device)
    whole_stats = empty((4, p.B, p.Hkv, p.G, 1), logits.dtype, logits.device)
    lse = _exp_(whole.copy_(logits[:, :, -p.G :]), whole_stats).lse[..., 0]
    logits.masked_fill_(outside[:, None, None], -math.inf)
    if c.vote == "soft":
        _softmax_(logits, stats)
    elif c.vote == "hard":
        voters = logits[:, :, :n_voters]
        k = _budget(p, n)[:, None, None, None]
        voters.copy_(_best(voters, k, c.budget(p.Lk), outside[:, None, None]))
    return lse


def _softmax_(logits: Tensor, stats: Tensor) -> Tensor:
    """Apply softmax in place, zeros where all is -inf; return the lse. No logit is NaN or inf."""
    exps = _exp_(logits, stats)
    logits.mul_(exps.sum.reciprocal_().nan_to_num_(posinf=0.0))
    return exps.lse[..., 0]


class _Exps(NamedTuple):
    largest: Tensor
    sum: Tensor  # of exp(logits - largest), or of exp(logits) if the largest is infinite
    lse: Tensor


def _exp_(logits: Tensor, stats: Tensor) -> _Exps:
    """Turn logits (..., m) into exp(logits - largest); stats (4, ..., 1) is memory."""
    largest, shift, total, lse = stats
    torch.amax(logits, -1, keepdim=True, out=largest)
    shift.copy_(largest).nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
    torch.sum(logits.sub_(shift).exp_(), -1, keepdim=True, out=total)
    torch.log(total, out=lse).add_(shift)
    return _Exps(largest, total, lse)


def _cap_(logits: Tensor, softcap: Tensor) -> Tensor:
    """Keep logits within +-softcap."""
    return logits.div_(softcap).tanh_().mul_(softcap)


def _pooled(votes: Tensor, problem: Problem, outside: Tensor) -> Tensor:
    """Return the maximum of votes (B, S, Lk) over a window of candidates, doubling its span."""
    if problem.config.pool == 1:
        return votes
    reach = min(problem.config.pool // 2, problem.Lk - 1)
    votes.masked_fill_(outside[:, None], -math.inf)
    spare = empty(tuple(votes.shape), votes.dtype, votes.device)
    for ahead in (True, False):
        span = 1
        while span <= reach:
            step = min(span, reach + 1 - span)
            near, far = votes[..., :-step], votes[..., step:]
            spare.copy_(votes)
            torch.maximum(near, far, out=spare[..., :-step] if ahead else spare[..., step:])
            votes, spare, span = spare, votes, span + step
    return votes


def select(votes: Tensor, problem: Problem) -> Selection:
    """See `tokenselect.reference.select`: bit-exact, by threshold."""
    p, device = problem, problem.q.device
    shape = (p.B, p.S, p.Lk)
    n, absent, outside = _regions(p)
    excluded = empty(shape, torch.bool, device).copy_(outside[:, None])
    ranked = empty(shape, votes.dtype, device)
    largest = p.config.shares(p.Lk)
    for ballot, share in enumerate(_shares(p, n)):
        torch.nan_to_num(
            votes[:, ballot], nan=-math.inf, posinf=math.inf, neginf=-math.inf, out=ranked
        )
        ranked.masked_fill_(excluded, -math.inf)
        excluded.logical_or_(_best(ranked, share[:, None, None], largest[ballot], excluded))
    # Sink and window were excluded from the start, and what was chosen is excluded now.
    chosen = excluded.logical_and_(torch.logical_not(absent, out=absent)[:, None])
    rank = empty(shape, torch.int32, device).copy_(chosen).cumsum_(-1)
    places = empty((p.B, p.S, p.K), torch.int32, device)
    places.copy_(torch.arange(1, p.K + 1, out=empty((p.K,), torch.int32, device), device=device))
    positions = empty((p.B, p.S, p.K), torch.int32, device)
    torch.searchsorted(rank, places, out_int32=True, out=positions)
    padding = empty((p.B, p.S, p.K), torch.bool, device)
    positions.masked_fill_(torch.eq(positions, scalar_like(p.Lk, positions), out=padding), -1)
    return Selection(positions, empty((p.B, p.S), torch.int32, device).copy_(rank[..., -1]))


def _shares(problem: Problem, n: Tensor) -> list[Tensor]:
    """Return each ballot's share of the budgets of requests of n (B,) tokens: (B,) int64 each."""
    budget = _budget(problem, n)
    if problem.R == 1:
        return [budget]
    fixed = _part(problem.config.budget_rule.fixed_millionths, budget)
    return [fixed, budget.sub_(fixed)]


def _budget(problem: Problem, n: Tensor) -> Tensor:
    """Return the budgets of requests of n (B,) tokens."""
    rule = problem.config.budget_rule
    return _part(rule.millionths, n).clamp_(rule.least, rule.most)


def _part(millionths: int, count: Tensor) -> Tensor:
    """Return so many millionths of each count, rounded up."""
    million = scalar_like(MILLION, count)
    part = torch.mul(
        count,
        scalar_like(millionths, count),
        out=empty(tuple(count.shape), count.dtype, count.device),
    )
    part.add_(scalar_like(MILLION - 1, count))
    return torch.div(part, million, rounding_mode="floor", out=part)


def _best(votes: Tensor, k: Tensor, largest: int, excluded: Tensor) -> Tensor:
    """Return a mask of the k largest of votes (..., m), the lower place first among equals; or all.

    Of those not `excluded`, whose votes are -inf. No vote is NaN. k (B, 1, ...) is each row's, and
    no more than `largest`.
    """
    largest, shape, device = max(1, min(largest, votes.shape[-1])), tuple(votes.shape), votes.device
    best = empty(shape, torch.bool, device)
    row = (*shape[:-1], 1)
    top, where = (
        empty((*shape[:-1], largest), kind, device) for kind in (votes.dtype, torch.int64)
    )
    torch.topk(votes, largest, out=(top, where))
    least, last = empty(row, votes.dtype, device), empty(row, torch.int64, device)
    last.copy_(k).clamp_(1, largest).sub_(scalar_like(1, last))
    torch.gather(top, -1, last, out=least)
    # Their number by cumsum: to make one number of a long row, sum takes memory for its threads.
    rank = empty(shape, torch.int32, device).copy_(torch.gt(votes, least, out=best)).cumsum_(-1)
    n_above = empty(row, torch.int32, device).copy_(rank[..., -1:])
    # Of those that tie for the last places, the first.
    tied, early = (empty(shape, torch.bool, device) for _ in range(2))
    torch.eq(votes, least, out=tied).masked_fill_(excluded, False)
    rank.copy_(tied).cumsum_(-1).add_(n_above)
    most = empty(row, rank.dtype, device).copy_(k)
    tied.logical_and_(torch.le(rank, most, out=early))
    return best.logical_or_(tied)


def attend(problem: Problem, selection: Selection, out: Tensor | None = None) -> AttentionOutput:
    """See `tokenselect.reference.attend`: gathers the selected rows, for a block of queries."""
    p = problem
    if out is None:
        out = empty((p.B, p.Hq, p.Lq, p.Dv), p.q.dtype, p.q.device)
    lse = empty((p.B, p.Hq, p.Lq), torch.float32, p.q.device)
    if selection.positions.shape[2] == 0:
        return AttentionOutput(out.zero_(), lse.fill_(-math.inf))
    by_query = out.view(p.B, p.Hkv, p.G, p.Lq, p.Dv).transpose(2, 3)
    lse_by_query = lse.view(p.B, p.Hkv, p.G, p.Lq).transpose(2, 3)
    attention = _Attention(p, selection)
    for block in slices(p.Lq, attention.step):
        causal_mask = attention.causal_mask(block)
        weights, block_lse = attention.weights(block, causal_mask)
        lse_by_query[:, :, block].copy_(block_lse)
        by_query[:, :, block].copy_(attention.weighed(weights, block, causal_mask))
    return AttentionOutput(out, lse)


class _Attention:
    """A call's queries and what they attend to, and memory for a block of the queries."""

    def __init__(self, problem: Problem, selection: Selection) -> None:
        self.problem = p = problem
        device, dtype, M = p.q.device, p.compute_dtype, selection.positions.shape[2]
        n = _lengths(p)
        self.position = _query_positions(p, n)
        self.place, self.row = _places(p, selection)
        self.key_at, query_at = self.row, self.position
        if p.config.positions == "contiguous":
            self.key_at = torch.arange(
                M, out=empty((M,), torch.int64, device), device=device
            ).expand_as(self.row)
            count = empty((p.B, p.S, 1), torch.int64, device).copy_(selection.count[..., None])
            query_at = empty((p.B, p.S, p.Lq), torch.int64, device)
            torch.add(count, _newest(p), out=query_at)
        self.queries = _queries(p, p.config.positions, self.position, query_at)
        self.queries.mul_(scalar_like(p.scale, self.queries))
        # What no query of the call sees, and the queries that see nothing.
        self.unseen = empty((p.B, p.S, M), torch.bool, device)
        torch.gt(self.place, self.position[..., -1:], out=self.unseen)
        first = empty((p.B, p.S, 1), torch.int64, device)
        torch.amin(self.place, -1, keepdim=True, out=first)
        self.sees_nothing = empty((p.B, p.S, p.Lq), torch.bool, device)
        torch.gt(first, self.position, out=self.sees_nothing)

        width, tokens = chunks(p, M)
        self.chunks = slices(M, width)
        self.keys, self.values = (Reader(p, x, tokens, p.S) for x in (p.k_cache, p.v_cache))
        self.rotator = rotator(p, p.config.positions, tokens * p.S, tokens * p.Hkv)
        self.step, pairs = _query_blocks(p, M)
        self.logits_memory = empty((pairs * p.Hq,), dtype, device)
        self.mask_memory = empty((pairs * p.S,), torch.bool, device)
        self.stats_memory = empty((5, p.B * p.Hq * p.Lq), dtype, device)
        self.total_memory = empty((p.B * p.Hq * p.Lq * p.Dv,), dtype, device)
        part = min(pairs, tokens * p.Lq) * p.Hq
        self.part_memory = empty((part,), dtype, device)
        self.softcap = scalar_like(p.softcap or 0.0, self.queries)
        self.sinks = None
        if p.sink_logits is not None:
            self.sinks = empty((p.Hkv, 1, p.G, 1), dtype, device)
            self.sinks.copy_(p.sink_logits.view(p.Hkv, 1, p.G, 1))
        if p.Lq > 1:
            self.finite_memory = empty((tokens * p.Hkv * p.Dv,), dtype, device)
            self.other_part_memory = empty((part,), dtype, device)
            self.other_total_memory = empty((p.B * p.Hq * p.Lq * p.Dv,), dtype, device)
            self.one = scalar_like(1, self.queries)
            self.huge = scalar_like(torch.finfo(dtype).max, self.queries)

    def causal_mask(self, block: slice) -> Tensor:
        """Mark what each query does not see: (B, S, queries, M)."""
        position = self.position[:, :, block, None]
        B, S, M = self.place.shape
        causal_mask = prefix_view(self.mask_memory, B, S, position.shape[2], M)
        return torch.gt(self.place[:, :, None], position, out=causal_mask)

    def weights(self, block: slice, causal_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the softmax (B, Hkv, queries, G, M) of a block of queries; its lse (..., G)."""
        p = self.problem
        queries = self.queries[:, :, block]
        shape = (*queries.shape[:4], self.row.shape[2])
        logits = prefix_view(self.logits_memory, *shape)
        rows = queries.view(p.B * p.Hkv, -1, p.D)
        for chunk in self.chunks:
            keys = self.keys.read(self.row[:, :, chunk])
            if self.rotator is not None:
                by_head = keys.view(p.B, p.S, p.Hkv // p.S, -1, 1, p.D)
                self.rotator.rotate_(by_head, self.row[:, :, chunk], self.key_at[:, :, chunk])
            part = prefix_view(self.part_memory, *rows.shape[:2], keys.shape[1])
            torch.bmm(rows, keys.transpose(1, 2), out=part)
            logits.view(*rows.shape[:2], -1)[:, :, chunk].copy_(part)
        if p.softcap is not None:
            _cap_(logits, self.softcap)
        by_selection = logits.view(p.B, p.S, -1, *shape[2:])
        by_selection.masked_fill_(causal_mask[:, :, None, :, None], -math.inf)
        stats = self.stats_memory[:, : math.prod(shape[:4])].view(5, *shape[:4], 1)
        exps = _exp_(logits, stats[:4])
        return logits.mul_(self.factor_(exps, stats[4])), exps.lse[..., 0]

    def factor_(self, exps: _Exps, spare: Tensor) -> Tensor:
        """Return what makes weights of exps: one over their sum, the sink's exp included.

        A query whose logits are all -inf gets NaN, or 0 with a sink.
        """
        if self.sinks is None:
            return exps.sum.reciprocal_()
        largest = torch.maximum(exps.largest, self.sinks, out=spare)
        share = exps.largest.sub_(largest).exp_()
        sink = torch.sub(self.sinks, largest, out=spare).exp_()
        return share.div_(exps.sum.mul_(share).add_(sink))

    def weighed(self, weights: Tensor, block: slice, causal_mask: Tensor) -> Tensor:
        """Sum the values by weights (B, Hkv, queries, G, M); zeros where nothing is seen."""
        p, shape = self.problem, weights.shape[:4]
        rows = weights.view(p.B * p.Hkv, -1, weights.shape[4])
        total = prefix_view(self.total_memory, *rows.shape[:2], p.Dv).zero_()
        for chunk in self.chunks:
            values = self.values.read(self.row[:, :, chunk])
            by_head = values.view(p.B, p.S, p.Hkv // p.S, -1, p.Dv)
            by_head.masked_fill_(self.unseen[:, :, None, chunk, None], 0.0)
            if p.Lq == 1:  # the one query sees all that is left
                total.baddbmm_(rows[:, :, chunk], values)
            else:
                self.add_seen_(total, rows[:, :, chunk], values, causal_mask[..., chunk])
        by_selection = total.view(p.B, p.S, -1, *shape[2:], p.Dv)
        by_selection.masked_fill_(self.sees_nothing[:, :, None, block, None, None], 0.0)
        return total.view(*shape, p.Dv)

    def add_seen_(
        self, total: Tensor, weights: Tensor, values: Tensor, causal_mask: Tensor
    ) -> None:
        """Add weights times values, where a value that is not finite counts only if it is seen.

        In a product 0 * NaN is NaN. So only finite values meet the weights; the others are made
        again by numbers so large that their products overflow, or are zero where nobody sees.
        """
        p, huge = self.problem, torch.finfo(values.dtype).max
        finite = prefix_view(self.finite_memory, *values.shape)
        torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0, out=finite)
        total.baddbmm_(weights, finite)
        infinite = values.sub_(finite)
        # huge where seen with a weight, and where seen without.
        some = torch.sign(weights, out=prefix_view(self.part_memory, *weights.shape))
        none = prefix_view(self.other_part_memory, *weights.shape)
        by_selection = none.view(p.B, p.S, p.Hkv // p.S, -1, p.G, weights.shape[2])
        by_selection.copy_(causal_mask[:, :, None, :, None])
        torch.sub(self.one, none.add_(some), out=none).mul_(self.huge)
        some.mul_(self.huge)
        up = torch.nan_to_num(infinite, nan=huge, posinf=huge, neginf=0.0, out=finite)
        total.baddbmm_(some, up)
        down = torch.nan_to_num(infinite, nan=-huge, posinf=0.0, neginf=-huge, out=finite)
        total.baddbmm_(some, down)
        either = torch.nan_to_num(infinite, nan=huge, posinf=huge, neginf=huge, out=finite)
        nan = torch.bmm(none, either, out=prefix_view(self.other_total_memory, *total.shape))
        total.add_(nan).sub_(nan)  # NaN if it is infinite


def _places(problem: Problem, selection: Selection) -> tuple[Tensor, Tensor]:
    """Return positions (B, S, M), padding past every query; and the same clamped, to read."""
    shape, device = tuple(selection.positions.shape), problem.q.device
    place, row = (empty(shape, torch.int64, device) for _ in range(2))
    padding = empty(shape, torch.bool, device)
    torch.lt(place.copy_(selection.positions), scalar_like(0, place), out=padding)
    place.masked_fill_(padding, _NOWHERE)
    return place, torch.clamp(place, 0, problem.Lk - 1, out=row)


def _query_blocks(problem: Problem, M: int) -> tuple[int, int]:
    """Return how many queries are attended at once; an upper bound times B and M, likewise."""
    p = problem
    fitting = _LOGITS_BYTES // (p.Hq * p.compute_dtype.itemsize)
    step = min(max(1, fitting // (p.B * M)), p.Lq)
    return step, min(max(p.B * M, fitting), p.B * M * p.Lq)
