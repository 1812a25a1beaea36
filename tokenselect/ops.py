"""The stages as custom operators, so that torch.compile(fullgraph=True) goes through them.

One operator a stage for all backends: the backend's name is an argument. A Problem travels as its
tensors and settings, in the order of `_SCHEMA`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import (
    CONFIG_NAMES,
    Attended,
    Backend,
    Decision,
    Memory,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    check_values,
)
from tokenselect.registry import load, reuse_of
from tokenselect.rope import Rope

_SCHEMA = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? sink_logits, Tensor? inv_freq, bool interleaved, str cached, float scaling, "
    "float scale, float? softcap, int max_reuse, "
    "int k, int n_sink, int n_local, str vote, str normalize, str scope, float? select_scale, "
    "int pool, int n_query_means, str positions, str score_at, float fixed_share"
)
_library = torch.library.Library("tokenselect", "DEF")
_implementations: dict[str, Callable[..., Any]] = {}


def implementation(operator: Any) -> Callable[..., Any] | None:
    """What an operator of this library runs; None for another's."""
    return _implementations.get(operator.name())


def _flat(p: Problem) -> tuple[Any, ...]:
    rope = p.rope
    turning: tuple[Any, ...] = (None, False, "rotated", 1.0)
    if rope is not None:
        turning = (rope.inv_freq, rope.interleaved, rope.cached, float(rope.scaling))
    return (
        *(p.q, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.sink_logits),
        *turning,
        *(p.scale, p.softcap, p.max_reuse),
        *(getattr(p.config, name) for name in CONFIG_NAMES),
    )


def _problem(*flat: Any) -> Problem:
    q, k_cache, v_cache, cache_seqlens, block_table, sink_logits, inv_freq = flat[:7]
    interleaved, cached, scaling, scale, softcap, max_reuse, *config = flat[7:]
    return Problem(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        rope=None if inv_freq is None else Rope(inv_freq, interleaved, cached, scaling),
        max_reuse=max_reuse,
        config=SelectConfig(*config),
    )


def score(backend: str, problem: Problem) -> Scores:
    """Run the score stage of the backend of that name."""
    return Scores(*torch.ops.tokenselect.score(*_flat(problem), backend))


def select(backend: str, votes: Tensor, problem: Problem) -> Selection:
    """Run the select stage of the backend of that name."""
    return Selection(*torch.ops.tokenselect.select(votes, *_flat(problem), backend))


def decide(backend: str, problem: Problem, memory: Memory, theta: float | None) -> Decision:
    """Run the first step of the Selection Cache, of the backend of that name."""
    flat = _flat(problem)
    return Decision(*torch.ops.tokenselect.decide(*memory.tensors(), *flat, theta, backend))


def keep(
    backend: str, problem: Problem, memory: Memory, decision: Decision, fresh: Selection
) -> None:
    """Run the second step of the Selection Cache: in place, in memory and in fresh."""
    flat = _flat(problem)
    torch.ops.tokenselect.keep(*memory.tensors(), *fresh, *decision, *flat, backend)


def attend(backend: str, problem: Problem, selection: Selection) -> Attended:
    """Run the attend stage of the backend of that name."""
    return Attended(*torch.ops.tokenselect.attend(*selection, *_flat(problem), backend))


def checked_seqlens(problem: Problem) -> Tensor:
    """problem.cache_seqlens, once `check_values` has passed; a copy, so that the check stays."""
    p = problem
    n_pages = p.k_cache.shape[0]
    checked: Tensor = torch.ops.tokenselect.checked_seqlens(
        p.cache_seqlens, p.block_table, p.Lq, p.Lk, p.page_size, n_pages
    )
    return checked


def _score(*args: Any) -> Scores:
    *flat, name = args
    backend: Backend = load(name)
    return backend.score(_problem(*flat))  # type: ignore[operator]  # loaded: no longer a name


def _select(votes: Tensor, *args: Any) -> Selection:
    *flat, name = args
    backend: Backend = load(name)
    return backend.select(votes, _problem(*flat))  # type: ignore[operator]  # loaded


def _attend(positions: Tensor, count: Tensor, *args: Any) -> Attended:
    *flat, name = args
    backend: Backend = load(name)
    selection = Selection(positions, count)
    return backend.attend(_problem(*flat), selection)  # type: ignore[operator]  # loaded


def _decide(*args: Any) -> Decision:
    *given, theta, name = args
    memory, flat = Memory(*given[:6]), given[6:]
    return reuse_of(load(name)).decide(_problem(*flat), memory, theta)


def _keep(*args: Any) -> None:
    *given, name = args
    memory, fresh, decision = Memory(*given[:6]), Selection(*given[6:8]), Decision(*given[8:11])
    reuse_of(load(name)).keep(_problem(*given[11:]), memory, decision, fresh)


def _checked_seqlens(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    Lq: int,
    Lk: int,
    page_size: int,
    n_pages: int,
) -> Tensor:
    check_values(cache_seqlens, block_table, Lq=Lq, Lk=Lk, page_size=page_size, n_pages=n_pages)
    return cache_seqlens.clone()


def _fake_score(*args: Any) -> Scores:
    p = _problem(*args[:-1])
    votes = p.q.new_empty((p.B, p.R, p.S, p.Lk), dtype=torch.float32)
    return Scores(votes, p.q.new_empty((p.B, p.Hq), dtype=torch.float32))


def _fake_select(votes: Tensor, *args: Any) -> Selection:
    p = _problem(*args[:-1])
    positions = p.q.new_empty((p.B, p.S, p.K), dtype=torch.int32)
    return Selection(positions, p.q.new_empty((p.B, p.S), dtype=torch.int32))


def _fake_attend(positions: Tensor, count: Tensor, *args: Any) -> Attended:
    p = _problem(*args[:-1])
    out = p.q.new_empty((p.B, p.Hq, p.Lq, p.Dv))
    return Attended(out, p.q.new_empty((p.B, p.Hq, p.Lq), dtype=torch.float32))


def _fake_decide(*args: Any) -> Decision:
    p = _problem(*args[6:-2])
    reused = p.q.new_empty((p.B,), dtype=torch.bool)
    afresh = p.q.new_empty((p.B,), dtype=torch.int32)
    return Decision(reused, afresh, p.q.new_empty((p.B, p.Hq * p.D), dtype=torch.float32))


def _fake_keep(*_: Any) -> None:
    return None


def _fake_checked_seqlens(cache_seqlens: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(cache_seqlens)


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with autocast off inside: it would round logits to its dtype without a word."""

    def wrapped(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(first, *args)
        return run(first, *args)

    return wrapped


def define(name: str, schema: str, run: Any, fake: Any) -> None:
    """Add an operator to the namespace `tokenselect`. schema lacks its opening bracket."""
    _implementations[f"tokenselect::{name}"] = _without_autocast(run)
    _library.define(f"{name}({schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, _implementations[f"tokenselect::{name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenselect::{name}", fake, lib=_library)


define("score", f"{_SCHEMA}, str backend) -> (Tensor, Tensor)", _score, _fake_score)
define(
    "select", f"Tensor votes, {_SCHEMA}, str backend) -> (Tensor, Tensor)", _select, _fake_select
)
define(
    "attend",
    f"Tensor sel_positions, Tensor sel_count, {_SCHEMA}, str backend) -> (Tensor, Tensor)",
    _attend,
    _fake_attend,
)
_MEMORY = "query", "positions", "count", "seen", "hits", "misses"
define(
    "decide",
    f"{', '.join(f'Tensor memory_{name}' for name in _MEMORY)}, {_SCHEMA}, float? theta, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _decide,
    _fake_decide,
)
define(
    "keep",
    f"{', '.join(f'Tensor({name[0]}!) memory_{name}' for name in _MEMORY)}, "
    "Tensor(x!) sel_positions, Tensor(y!) sel_count, Tensor reused, Tensor afresh, "
    f"Tensor mean_query, {_SCHEMA}, str backend) -> ()",
    _keep,
    _fake_keep,
)
define(
    "checked_seqlens",
    "Tensor cache_seqlens, Tensor? block_table, SymInt Lq, SymInt Lk, SymInt page_size, "
    "SymInt n_pages) -> Tensor",
    _checked_seqlens,
    _fake_checked_seqlens,
)
