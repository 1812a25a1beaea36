"""The rules that a problem keeps, in the order in which they are checked; and those of what comes
with it: values, gradients, a selection, `out`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tokenselect.contract.config import (
    MILLION,
    Normalize,
    Positions,
    Scope,
    ScoreAt,
    SelectConfig,
    Vote,
)
from tokenselect.contract.results import Selection
from tokenselect.errors import InvalidProblem
from tokenselect.rope import Rope
from tokenselect.scalars import is_integer, is_number

if TYPE_CHECKING:
    from tokenselect.contract.problem import Problem


class _Rule(NamedTuple):
    """One rule: what came, if it is broken; what it says; what to do."""

    broken: Callable[[Problem], str | None]  # what came, or None where the rule holds
    rule: str
    fix: str


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} has shape {tuple(tensor.shape)}"


def _not_tensor(p: Problem) -> str | None:
    for name in _TENSORS:
        value = getattr(p, name)
        optional = name in ("cache_seqlens", "block_table", "sink_logits")
        if not (isinstance(value, Tensor) or (optional and value is None)):
            return f"{name} is a {type(value).__name__}"
    return None


def _wrong_rank(p: Problem) -> str | None:
    for name, rank in zip(_TENSORS, (4, 4, 4, 1, 2, 1), strict=True):
        value = getattr(p, name)
        if value is not None and value.dim() != rank:
            return f"{_shape(name, value)}, {value.dim()} dimensions"
    return None


def _empty(p: Problem) -> str | None:
    for name in ("q", "k_cache", "v_cache"):
        if 0 in getattr(p, name).shape:
            return _shape(name, getattr(p, name))
    if p.block_table is not None and p.block_table.shape[1] == 0:
        return _shape("block_table", p.block_table)
    return None


def _wrong_device(p: Problem) -> str | None:
    tensors = {name: getattr(p, name) for name in _TENSORS[1:]}
    tensors["rope.inv_freq"] = None if p.rope is None else p.rope.inv_freq
    for name, value in tensors.items():
        if value is not None and value.device != p.q.device:
            return f"{name} is on {value.device}, q on {p.q.device}"
    return None


def _wrong_dtype(p: Problem) -> str | None:
    if p.q.dtype not in DTYPES:
        return f"q is {p.q.dtype}"
    for name in ("k_cache", "v_cache"):
        if getattr(p, name).dtype != p.q.dtype:
            return f"{name} is {getattr(p, name).dtype}, q is {p.q.dtype}"
    return None


def _wrong_integer_dtype(p: Problem) -> str | None:
    for name in ("cache_seqlens", "block_table"):
        value = getattr(p, name)
        if value is not None and value.dtype != torch.int32:
            return f"{name} is {value.dtype}"
    return None


def _caches_differ(p: Problem) -> str | None:
    if p.k_cache.shape[:3] == p.v_cache.shape[:3]:
        return None
    return f"{_shape('k_cache', p.k_cache)}, {_shape('v_cache', p.v_cache)}"


def _wrong_batch(p: Problem) -> str | None:
    batched = ("k_cache",) if p.block_table is None else ("block_table",)
    for name in (*batched, "cache_seqlens"):
        value = getattr(p, name)
        if value is not None and value.shape[0] != p.B:
            return f"{_shape(name, value)}, {_shape('q', p.q)}: B={value.shape[0]} and B={p.B}"
    return None


def _choice(name: str, options: object) -> _Rule:
    """Return the rule that a setting is one of the options of a Literal."""
    allowed = get_args(options)
    return _Rule(
        lambda p: None if p.config[name] in allowed else f"{name}={p.config[name]!r}",
        f"{name} is one of {', '.join(map(repr, allowed))}",
        f"name one of them, or leave {name} out for {getattr(SelectConfig, name)!r}",
    )


def _integer(name: str, low: int) -> _Rule:
    """Return the rule that a setting is an integer of at least `low`."""

    def broken(p: Problem) -> str | None:
        value = p.config[name]
        return None if is_integer(value) and low <= value < 2**31 else f"{name}={value!r}"

    rule = f"{name} is an integer, {low} <= {name} < 2**31"
    return _Rule(broken, rule, f"pass an int of {low} or more")


def _wrong_k(p: Problem) -> str | None:
    k = p.config.k
    is_fraction = isinstance(k, float) and 0 < k < 1 and 0 < round(k * MILLION) < MILLION
    return None if is_fraction or (is_integer(k) and 0 <= k < 2**31) else f"k={k!r}"


def _wrong_k_max(p: Problem) -> str | None:
    k_max = p.config.k_max
    holds = k_max is None or (is_integer(k_max) and p.config.k_min <= k_max < 2**31)
    return None if holds else f"k_max={k_max!r}, k_min={p.config.k_min!r}"


def _k_out_of_bounds(p: Problem) -> str | None:
    c = p.config
    if isinstance(c.k, float) or c.k_min <= c.k <= (c.k if c.k_max is None else c.k_max):
        return None
    return f"k={c.k!r}, k_min={c.k_min!r}, k_max={c.k_max!r}"


_LARGEST = torch.finfo(torch.float32).max


def _factor(name: str, value: Callable[[Problem], object]) -> _Rule:
    """Return the rule that a value is None or a positive number that float32 holds."""

    def broken(p: Problem) -> str | None:
        got: Any = value(p)
        holds = got is None or (is_number(got) and 0 < got <= _LARGEST)
        return None if holds else f"{name}={got!r}"

    return _Rule(
        broken,
        f"{name} is None or a number > 0 that float32 holds",
        f"pass a number > 0, or leave {name} out",
    )


def _wrong_share(p: Problem) -> str | None:
    share = p.config.fixed_share
    return None if is_number(share) and 0 <= share <= 1 else f"fixed_share={share!r}"


RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda p: (
            None if isinstance(p.config, SelectConfig) else f"config is a {type(p.config).__name__}"
        ),
        "config is a tokenselect.SelectConfig",
        "say SelectConfig(**settings)",
    ),
    _Rule(
        lambda p: (
            None
            if is_integer(p.max_reuse) and 0 <= p.max_reuse < 2**31
            else f"max_reuse={p.max_reuse!r}"
        ),
        "max_reuse is an integer, 0 <= max_reuse < 2**31",
        "pass that of the SelectionCache, or leave it out",
    ),
    _Rule(
        _not_tensor,
        "q, k_cache and v_cache are tensors; cache_seqlens, block_table and sink_logits are "
        "tensors or None",
        "lengths as torch.tensor(lengths, dtype=torch.int32); of a model's cache object, one "
        "layer's keys and values",
    ),
    _Rule(
        lambda p: (
            None
            if p.rope is None or isinstance(p.rope, Rope)
            else f"rope is a {type(p.rope).__name__}"
        ),
        "rope is a tokenselect.Rope or None",
        "build it from the model: Rope(inv_freq)",
    ),
    _Rule(
        _wrong_rank,
        "q (B, Hq, Lq, D); k_cache and v_cache (B, Hkv, Lk, D), or (n_pages, page_size, Hkv, D) "
        "with a block_table; cache_seqlens (B,); block_table (B, max_pages); sink_logits (Hq,)",
        "add or drop the dimension; a decode query is q[:, :, None, :]",
    ),
    _Rule(_empty, "no dimension of q, of a cache or of block_table's pages is 0", "skip the call"),
    _Rule(_wrong_device, "all tensors are on one device", "move it there with .to(q.device)"),
    _Rule(
        _wrong_dtype,
        "q, k_cache and v_cache share one dtype: float32, bfloat16, float16 or float64",
        "convert what differs, say with q.to(k_cache.dtype)",
    ),
    _Rule(
        lambda p: (
            None
            if p.sink_logits is None or p.sink_logits.is_floating_point()
            else f"sink_logits is {p.sink_logits.dtype}"
        ),
        "sink_logits is floating point",
        "convert it with .float()",
    ),
    _Rule(
        _wrong_integer_dtype,
        "cache_seqlens and block_table are int32",
        "convert it with .to(torch.int32)",
    ),
    _Rule(
        _caches_differ,
        "k_cache and v_cache agree in all dimensions but the last",
        "check which tensor was permuted or sliced",
    ),
    _Rule(_wrong_batch, "every tensor has q's number of requests B", "give one row per request"),
    _Rule(
        lambda p: (
            None
            if p.k_cache.shape[3] == p.D
            else f"{_shape('q', p.q)}, {_shape('k_cache', p.k_cache)}"
        ),
        "q and k_cache have the same head dim D, their last dimension",
        "check for a missing projection or a permuted dimension",
    ),
    _Rule(
        lambda p: (
            None
            if p.Hq % p.Hkv == 0
            else f"{_shape('q', p.q)}, {_shape('k_cache', p.k_cache)}: Hq={p.Hq}, Hkv={p.Hkv}"
        ),
        "the number of query heads Hq is a multiple of the number of KV heads Hkv",
        "check the layout: q (B, Hq, Lq, D), k_cache (B, Hkv, Lk, D), pages "
        "(n_pages, page_size, Hkv, D)",
    ),
    _Rule(
        lambda p: (
            None
            if p.Lq <= p.Lk
            else f"q has Lq={p.Lq} queries, the cache holds at most Lk={p.Lk} tokens"
        ),
        "the Lq new tokens are in the cache: Lq <= Lk",
        "append the new keys and values before the call",
    ),
    _Rule(
        lambda p: None if p.Lk < 2**31 else f"the cache holds Lk={p.Lk} tokens per request",
        "positions are int32: Lk < 2**31",
        "split the request",
    ),
    _Rule(
        lambda p: (
            None
            if p.sink_logits is None or p.sink_logits.shape[0] == p.Hq
            else f"{_shape('sink_logits', p.sink_logits)}, {_shape('q', p.q)}"
        ),
        "sink_logits has one entry per query head: (Hq,)",
        "pass the layer's own sink logits",
    ),
    _Rule(
        _wrong_k,
        "k is an integer, 0 <= k < 2**31, or a fraction of the cached tokens: a float, 0.000001 to "
        "0.999999",
        "pass an int of 0 or more for so many tokens, or a float like 0.1 for a tenth of them",
    ),
    _integer("k_min", 0),
    _Rule(
        _wrong_k_max,
        "k_max is None or an integer, k_min <= k_max < 2**31",
        "pass an int of k_min or more, or leave k_max out",
    ),
    _Rule(
        _k_out_of_bounds,
        "k_min and k_max are bounds for a fraction; a k that is an integer lies within them",
        "leave k_min and k_max out, or pass k as a fraction",
    ),
    _integer("n_sink", 0),
    _integer("n_local", 1),
    _integer("pool", 1),
    _integer("n_query_means", 1),
    _Rule(
        lambda p: None if p.config.pool % 2 else f"pool={p.config.pool}",
        "pool is odd, so that its window has a centre",
        "pass the next odd number",
    ),
    _choice("vote", Vote),
    _choice("normalize", Normalize),
    _choice("scope", Scope),
    _choice("positions", Positions),
    _choice("score_at", ScoreAt),
    _factor("scale", lambda p: p.scale),
    _factor("select_scale", lambda p: p.config.select_scale),
    _factor("softcap", lambda p: p.softcap),
    _Rule(_wrong_share, "fixed_share is a share of k, in [0, 1]", "pass 0.25 for a quarter"),
    _Rule(
        lambda p: (
            None
            if p.rope is not None or (p.config.positions, p.config.score_at) == ("original", "true")
            else f"positions={p.config.positions!r}, score_at={p.config.score_at!r}, rope=None"
        ),
        "anything but positions='original' with score_at='true' moves keys, which needs a rope",
        "pass rope=tokenselect.Rope(inv_freq) with the model's inverse frequencies",
    ),
    _Rule(
        lambda p: (
            None
            if p.rope is None or p.rope.rotary_dim <= p.D
            else f"rope has {p.rope.rotary_dim} rotary dims, {_shape('q', p.q)}"
        ),
        "rotary_dim = 2 * len(inv_freq) is at most the head dim D",
        "pass one frequency per pair of rotated dims",
    ),
)


def check_values(problem: Problem) -> None:
    """Check what only the tensors' values show; on a GPU this waits for the device.

    Raises InvalidProblem for a length outside {0, Lq..Lk}, or a block table whose pages in use lie
    outside the pool. Entries beyond a request's last page are not looked at.
    """
    Lq, Lk, block_table = problem.Lq, problem.Lk, problem.block_table
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n != 0 and not Lq <= n <= Lk:
            raise InvalidProblem(
                f"cache_seqlens[{b}]={n}, with Lq={Lq} and Lk={Lk}",
                "n counts the Lq new tokens and fits the cache: Lq <= n <= Lk, or 0 for no request",
                "append the new tokens first, and pass the length after appending",
            )
    if block_table is None:
        return
    n_pages = problem.k_cache.shape[0]
    first = torch.arange(block_table.shape[1], device=block_table.device) * problem.page_size
    in_use = first < problem.cache_seqlens[:, None]
    outside = in_use & ((block_table < 0) | (block_table >= n_pages))
    if outside.any():
        b, page = (int(i) for i in outside.nonzero()[0])
        raise InvalidProblem(
            f"block_table[{b}, {page}]={int(block_table[b, page])}, with n_pages={n_pages}",
            f"every page in use is in the pool: 0 <= page < {n_pages}",
            "check the allocator; entries past ceil(n / page_size) may be anything",
        )


def refuse_grad(problem: Problem) -> None:
    """Raise InvalidProblem for tensors of a problem that a backward pass would go through."""
    inputs = {name: getattr(problem, name) for name in ("q", "k_cache", "v_cache", "sink_logits")}
    inputs["rope.inv_freq"] = None if problem.rope is None else problem.rope.inv_freq
    refuse_grad_of(inputs)


def refuse_grad_of(inputs: dict[str, Tensor | None]) -> None:
    """Raise InvalidProblem if a backward pass would go through one of these, by its name."""
    for argument, tensor in inputs.items():
        if tensor is None:
            continue
        if (torch.is_grad_enabled() and tensor.requires_grad) or _has_tangent(tensor):
            raise InvalidProblem(
                f"{argument} requires grad",
                "attention over a KV cache is for inference and has no derivative",
                "call it under torch.inference_mode() or torch.no_grad()",
            )


def _has_tangent(x: Tensor) -> bool:
    """Say whether forward-mode differentiation carries a tangent of x."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def check_selection(problem: Problem, selection: Selection, *, read: bool) -> None:
    """Raise InvalidProblem for a selection of another problem; `read`: by its values too."""
    if not isinstance(selection, Selection):
        raise InvalidProblem(
            f"selection is a {type(selection).__name__}",
            "a selection is a tokenselect.Selection",
            "pass Selection(positions, count), or what select(votes, problem) returns",
        )
    positions, count = selection
    shape = (problem.B, problem.S)
    if positions.shape[:2] != shape or positions.dim() != 3 or count.shape != shape:
        raise InvalidProblem(
            f"selection has positions {tuple(positions.shape)} and count {tuple(count.shape)}",
            f"positions are (B, S, K) and count (B, S), with B={shape[0]}, S={shape[1]}",
            "pass what select(votes, problem) returns",
        )
    for name, tensor in zip(Selection._fields, selection, strict=True):
        if tensor.dtype != torch.int32 or tensor.device != problem.q.device:
            raise InvalidProblem(
                f"selection.{name} is {tensor.dtype} on {tensor.device}",
                f"positions and count are torch.int32 on {problem.q.device}",
                "pass what select(votes, problem) returns",
            )
    if not read:
        return
    K = positions.shape[2]
    outside = (count < 0) | (count > K)
    if outside.any():
        b, s = (int(i) for i in outside.nonzero()[0])
        raise InvalidProblem(
            f"selection.count[{b}, {s}]={int(count[b, s])}, with K={K} places for positions",
            "count says how many of the K places are used: 0 <= count <= K",
            "pass what select(votes, problem) returns",
        )
    places = torch.arange(K, device=positions.device)
    padding = places >= count[..., None]
    n = problem.cache_seqlens[:, None, None]
    follows = torch.nn.functional.pad(positions[..., 1:] > positions[..., :-1], (1, 0), value=True)
    holds = torch.where(padding, positions == -1, (positions >= 0) & (positions < n) & follows)
    if not holds.all():
        b, s, place = (int(i) for i in (~holds).nonzero()[0])
        raise InvalidProblem(
            f"selection.positions[{b}, {s}, {place}]={int(positions[b, s, place])}, with "
            f"count={int(count[b, s])} and n={int(n[b])}",
            "positions are in 0..n-1 and strictly ascending, then padded with -1 from count on",
            "pass what select(votes, problem) returns",
        )


def _is_frozen(x: Tensor) -> bool:
    """Say whether x, made in inference mode, cannot be written to outside of it."""
    if torch.compiler.is_compiling():  # which does not trace the question
        return False
    return x.is_inference() and not torch.is_inference_mode_enabled()


def check_out(problem: Problem, out: object) -> None:
    """Raise InvalidProblem unless `out` can hold the result of a call."""
    p = problem
    shape, dtype, device = (p.B, p.Hq, p.Lq, p.Dv), p.q.dtype, p.q.device
    came = f"out is a {type(out).__name__}"
    if isinstance(out, Tensor) and (out.shape, out.dtype, out.device) != (shape, dtype, device):
        came = f"out is {tuple(out.shape)} {out.dtype} on {out.device}"
    elif isinstance(out, Tensor) and not out.is_contiguous():
        came = f"out has strides {out.stride()}"
    elif isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled():
        came = "out requires grad"
    elif isinstance(out, Tensor) and _is_frozen(out):
        came = "out was made in inference mode"
    elif isinstance(out, Tensor):
        return
    raise InvalidProblem(
        came,
        f"out is {shape} {dtype} on {device}, contiguous",
        "make it with torch.empty, or leave it out",
    )
