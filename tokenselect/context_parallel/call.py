"""The call: check what each rank was given, and run the stages with what is sent between them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenselect import api
from tokenselect.context_parallel.attend import attend, gathered
from tokenselect.context_parallel.score import score, select
from tokenselect.context_parallel.shards import Alone, Shard
from tokenselect.contract import Problem, SelectConfig, check_values
from tokenselect.contract.rules import refuse_grad
from tokenselect.dispatch import registry
from tokenselect.dispatch.ranks import Ranks, name_of
from tokenselect.dispatch.step import Step, without_autocast
from tokenselect.errors import InvalidProblem, UnsupportedProblem
from tokenselect.rope import Rope
from tokenselect.scalars import is_integer
from tokenselect.selection_cache import SelectionCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# An odd number whose multiples, of different positions, have sums that hardly ever agree.
_MIX = 0x2545F4914F6CDD1D


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
        registry.resolve(backend, gathered(own, queries, tokens[0], tokens[1], seen)[0])
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


def _shards(own: Problem, positions: Tensor) -> list[Shard]:
    """Return the tokens of each request that are on this rank."""
    shards = []
    rows = positions.long().expand(own.B, positions.shape[-1])
    for row, n in zip(rows, own.cache_seqlens.tolist(), strict=True):
        slots = ((row >= 0) & (row < n)).nonzero()[:, 0]
        slots = slots[row[slots].argsort()]
        shards.append(Shard(row[slots], slots))
    return shards


def _check_held(whole: Problem, shards: list[Shard], ranks: "Alone | Ranks") -> None:
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


def _check_pages(own: Problem, shards: list[Shard]) -> None:
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
    shards: list[Shard],
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
    ballots, dense_lse = score(own, shards, recomputed, voting, backend)
    selection = select(whole, recomputed, ballots, voting)
    if cache is not None:
        reuse.update(whole, state, decision, selection)
    attended = attend(own, shards, selection, ranks, backend)
    return Step(*attended, *selection, dense_lse, reused)
