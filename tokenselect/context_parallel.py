"""Attention over a cache that is sharded by position: each rank holds some of the tokens.

Every rank has all queries. It scores its own tokens, and attends to those of them that are
selected. In between, the ranks send each other

maximum   of each head's logits
sum       of each head's exp(logit - maximum)       the denominator of the soft vote
best      votes and positions of k candidates       the k best of all are among them
out, lse  attention to what was selected of theirs  merged by lse

The selection has the same bits however the tokens are sharded: what makes a token's vote is added
up in one order wherever the token is, and a denominator is a sum of integers, which has no order.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect import api
from tokenselect.contract import AttentionOutput, Problem, SelectConfig, Selection, check_values
from tokenselect.contract.rules import refuse_grad
from tokenselect.dispatch import registry
from tokenselect.dispatch.ranks import Ranks, name_of
from tokenselect.dispatch.step import Step, without_autocast
from tokenselect.errors import InvalidProblem, UnsupportedProblem
from tokenselect.reference.rows import read
from tokenselect.reference.score import added
from tokenselect.reference.select import best
from tokenselect.rope import Rope
from tokenselect.scalars import is_integer
from tokenselect.selection_cache import SelectionCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# So many products of queries and keys are held at once.
_PRODUCTS = 2**22
# An odd number whose multiples, of different positions, have sums that hardly ever agree.
_MIX = 0x2545F4914F6CDD1D


class _Shard(NamedTuple):
    """This rank's tokens of one request: their positions (m,), ascending, and their slots (m,)."""

    at: Tensor
    slots: Tensor


class Alone:
    """The one rank of a cache that is not sharded: what `Ranks` is for several."""

    def gather(self, x: Tensor) -> Tensor:
        """Return x, in a row of its own."""
        return x[None]

    def check(self, *given: object, **more: object) -> None:
        """Agree."""


def context_parallel_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    token_positions: Tensor,
    cache_seqlens: Tensor,
    k: int | float | None = None,
    *,
    config: SelectConfig | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    max_seqlen: int | None = None,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    validate: bool | None = None,
    return_info: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, api.AttentionInfo]:
    """Do what `attention` does, with a cache of which each rank holds some of the tokens.

    q             (B, Hq, Lq, D), the same on every rank, as all that is not named here
    k_cache       this rank's keys: (B, Hkv, slots, D), slots >= 0; or paged, with a block_table
    v_cache       likewise with Dv
    token_positions
                  (slots,) or (B, slots) int32 or int64: the position of the token in each slot, in
                  any order; where no token is, -1. From n on they are left alone. A rank need not
                  hold any token of a request; together the ranks hold each one once
    cache_seqlens (B,) int32, the n of each request over all ranks
    max_seqlen    the largest n that a SelectionCache is to have room for; this call's if absent
    cache         a SelectionCache per rank; they stay equal
    process_group the ranks; absent: this process holds every token
    backend       what attends to the selected tokens; it also scores, if it declares `equal_keys`,
                  as native does; else torch's operators do
    validate      check lengths, and that each token is held once: None, on the CPU only

    Returns out, or (out, `AttentionInfo`) with positions of the whole request, on every rank.
    Raises InvalidProblem, UnsupportedProblem or RankFailed.

    >>> q, cached = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 99, 64)
    >>> n = torch.tensor([99], dtype=torch.int32)
    >>> context_parallel_attention(q, cached, cached, torch.arange(99), n, k=16).shape
    torch.Size([1, 8, 1, 64])
    """
    inputs = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits, "rope": rope}
    chosen = api.config_of(config, {"k": k}, settings)  # type: ignore[arg-type]  # checked there
    if cache is not None:
        inputs["max_reuse"] = api.max_reuse_of(cache)
    whole = _whole(q, k_cache, v_cache, chosen, cache_seqlens, max_seqlen, block_table, inputs)
    own = replace(whole, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    refuse_grad(own)
    _check_positions(own, token_positions)
    ranks = Alone() if process_group is None else Ranks(name_of(process_group))
    step = across(ranks, whole, own, token_positions, cache, backend, validate)
    return (step.out, api.info_of(whole, step, "context_parallel")) if return_info else step.out


def across(
    ranks: "Alone | Ranks",
    whole: Problem,
    own: Problem,
    token_positions: Tensor,
    cache: SelectionCache | None,
    backend: str,
    validate: bool | None,
) -> Step:
    """Run the step with whatever carries what the ranks send each other.

    whole, own  the problem of all ranks together, whose caches have shapes and no content; and
                with this rank's caches
    """
    reads = whole.q.device.type == "cpu" if validate is None else validate
    with torch.no_grad(), without_autocast(whole.q.device.type):
        # Where no backend can attend, all ranks say so, and not only those that get as far.
        one = whole.q.new_zeros((), dtype=whole.compute_dtype)
        tokens = [one.expand(whole.Hkv, 1, dim) for dim in (whole.D, whole.Dv)]
        queries, seen = one.expand(whole.Hq, 1, whole.D), one.expand(1, whole.S)
        registry.resolve(backend, _gathered(own, queries, tokens[0], tokens[1], seen)[0])
        shards = _shards(own, token_positions)
        if reads:
            _check_pages(own, shards)
            state = None if cache is None else cache.state(whole)
            theta = None if cache is None else cache.theta
            ranks.check(whole, state, theta, q=whole.q, sink_logits=whole.sink_logits)
            check_values(whole)
            _check_held(whole, shards, ranks)
        return _step(whole, own, shards, ranks, cache, backend)


def _whole(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    config: SelectConfig,
    cache_seqlens: Tensor,
    max_seqlen: int | None,
    block_table: Tensor | None,
    inputs: dict[str, Any],
) -> Problem:
    """Return the problem of all ranks together: its caches have shapes, and nothing in them.

    All rules are kept by it, and by one query over this rank's caches.
    """
    query, keys, values = q, k_cache, v_cache
    if all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k_cache, v_cache)):
        query = q[:, :, :1]
        if block_table is None and keys.shape[2] == values.shape[2] == 0:
            keys, values = (_stand_in(x, (*x.shape[:2], 1, x.shape[3])) for x in (keys, values))
    its = Problem.build(query, keys, values, config, block_table=block_table, **inputs)
    if max_seqlen is None:
        is_row = isinstance(cache_seqlens, Tensor) and cache_seqlens.numel() > 0
        Lk = max(q.shape[2], int(cache_seqlens.max()) if is_row else 1)
    else:
        Lk = max_seqlen
    if not is_integer(Lk) or not q.shape[2] <= Lk < 2**31:
        raise InvalidProblem(
            f"max_seqlen={Lk!r}, with Lq={q.shape[2]}",
            "max_seqlen is an integer, the largest n: Lq <= max_seqlen < 2**31",
            "pass as many tokens as a request may have on all ranks together, or leave it out",
        )
    if not isinstance(cache_seqlens, Tensor):
        raise InvalidProblem(
            f"cache_seqlens is a {type(cache_seqlens).__name__}",
            "cache_seqlens is (B,) int32: how many tokens each request has on all ranks together",
            "pass torch.tensor(lengths, dtype=torch.int32)",
        )
    keys, values = (_stand_in(x, (its.B, its.Hkv, Lk, x.shape[3])) for x in (k_cache, v_cache))
    whole = Problem.build(q, keys, values, config, cache_seqlens=cache_seqlens, **inputs)
    whys = []
    if config.vote == "hard":
        whys.append("vote='hard': each head's own best k would have to be merged too")
    if config.pool > 1:
        whys.append(f"pool={config.pool}: a token's neighbours may be on another rank")
    if q.dtype == torch.float64:
        whys.append("torch.float64: results of ranks are merged in float32")
    if whys:
        raise UnsupportedProblem(
            whole.describe(), {"context_parallel": whys}, "change the problem, or gather the cache"
        )
    return whole


def _stand_in(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of that shape, x's dtype and device, that takes no memory."""
    return x.new_zeros(()).expand(shape)


def _check_positions(own: Problem, positions: Tensor) -> None:
    """Raise InvalidProblem for positions of another cache."""
    slots = own.Lk
    came = f"token_positions is a {type(positions).__name__}"
    if isinstance(positions, Tensor):
        came = (
            f"token_positions is {tuple(positions.shape)} {positions.dtype} on {positions.device}"
        )
        fits = tuple(positions.shape) in ((slots,), (own.B, slots))
        if (
            fits
            and positions.dtype in (torch.int32, torch.int64)
            and positions.device == own.q.device
        ):
            return
    raise InvalidProblem(
        came,
        f"token_positions is ({slots},) or ({own.B}, {slots}), int32 or int64, on {own.q.device}",
        "say for each slot of this rank's cache which token is in it, -1 for none",
    )


def _shards(own: Problem, positions: Tensor) -> list[_Shard]:
    """Return the tokens of each request that are on this rank."""
    shards = []
    rows = positions.long().expand(own.B, positions.shape[-1])
    for row, n in zip(rows, own.cache_seqlens.tolist(), strict=True):
        slots = ((row >= 0) & (row < n)).nonzero()[:, 0]
        slots = slots[row[slots].argsort()]
        shards.append(_Shard(row[slots], slots))
    return shards


def _check_held(whole: Problem, shards: list[_Shard], ranks: "Alone | Ranks") -> None:
    """Raise InvalidProblem, on every rank, unless each position of each request is held once."""

    def marks(at: Tensor) -> Tensor:
        mixed = at * _MIX
        return torch.stack((at.new_tensor(len(at)), at.sum(), (mixed ^ (mixed >> 29)).sum()))

    held = ranks.gather(torch.stack([marks(shard.at) for shard in shards]))
    for b, n in enumerate(whole.cache_seqlens.tolist()):
        if not torch.equal(held[:, b].sum(0), marks(torch.arange(n, device=whole.q.device))):
            raise InvalidProblem(
                f"of request {b}, with n={n}, the ranks hold {held[:, b, 0].tolist()} tokens",
                "each of the positions 0 to n - 1 is held once, by one rank",
                "say in token_positions which token is in each slot, and -1 where there is none",
            )


def _check_pages(own: Problem, shards: list[_Shard]) -> None:
    """Raise InvalidProblem for a token of this rank in a page outside of the pool."""
    if own.block_table is None:
        return
    for b, shard in enumerate(shards):
        pages = own.block_table[b][shard.slots // own.page_size]
        outside = (pages < 0) | (pages >= own.k_cache.shape[0])
        if outside.any():
            at = int(outside.nonzero()[0, 0])
            raise InvalidProblem(
                f"token {int(shard.at[at])} of request {b} is in page {int(pages[at])}, with "
                f"n_pages={own.k_cache.shape[0]}",
                "every page in use is in the pool: 0 <= page < n_pages",
                "check block_table, and that token_positions is -1 where no token is",
            )


def _step(
    whole: Problem,
    own: Problem,
    shards: list[_Shard],
    ranks: "Alone | Ranks",
    cache: SelectionCache | None,
    backend: str,
) -> Step:
    """Score, select and attend, the Selection Cache around it."""
    lengths, reused = whole.cache_seqlens, None
    if cache is not None:
        state, reuse = cache.state(whole), registry.reuse_of(registry.load("cpu"))
        decision = reuse.decide_reuse(whole, state, cache.theta)
        lengths, reused = decision.cache_seqlens, decision.reused
    recomputed = lengths.tolist()
    voting = ranks if any(recomputed) else Alone()
    ballots, dense_lse = _score(own, shards, recomputed, voting, backend)
    selection = _select(whole, recomputed, ballots, voting)
    if cache is not None:
        reuse.update(whole, state, decision, selection)
    attended = _attend(own, shards, selection, ranks, backend)
    return Step(*attended, *selection, dense_lse, reused)


class _Ballots(NamedTuple):
    """Votes (R, S, m) float32 for the candidates of a request on this rank, at positions (m,)."""

    at: Tensor
    votes: Tensor


def _score(
    own: Problem,
    shards: list[_Shard],
    lengths: list[int],
    ranks: "Alone | Ranks",
    backend: str,
) -> tuple[list[_Ballots], Tensor]:
    """Return the votes for this rank's candidates of each request, and the lse of `Scores`.

    A softmax is taken of each row of logits, over the tokens of all ranks.
    """
    p, c, device = own, own.config, own.q.device
    rows, candidates, slices = [], [], []
    for b, (n, shard) in enumerate(zip(lengths, shards, strict=True)):
        held = shard if n else _Shard(shard.at[:0], shard.slots[:0])
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
        ballots.append(_Ballots(shards[b].at[inside], torch.stack(votes)))
    return ballots, (largest[:, -1] + total[:, -1].log()).float()


def _logits(own: Problem, b: int, n: int, held: _Shard, backend: str) -> Tensor:
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


def _select(
    whole: Problem, lengths: list[int], ballots: list[_Ballots], ranks: "Alone | Ranks"
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


def _attend(
    own: Problem,
    shards: list[_Shard],
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
            found = api.attend(*_gathered(p, queries, keys, values, seen), backend, validate=False)
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
    own: Problem, b: int, s: int, shard: _Shard, selection: Selection, newest: Tensor
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


def _gathered(
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
