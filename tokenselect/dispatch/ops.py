"""The custom operators, so that torch.compile(fullgraph=True) goes through a call.

A call of `attention` is one operator, for all backends: the backend's name is an argument. So is
each stage, for those who call it alone. A Problem travels as its tensors and settings, in the order
of `_SCHEMA`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tokenselect.contract import (
    CONFIG_NAMES,
    AttentionOutput,
    Backend,
    CacheState,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    check_values,
)
from tokenselect.dispatch.ranks import Ranks
from tokenselect.dispatch.registry import load, reuse_of
from tokenselect.dispatch.step import Step, run_step, without_autocast
from tokenselect.rope import Rope

_SCHEMA = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? sink_logits, Tensor? inv_freq, bool interleaved, str cached, float scaling, "
    "float scale, float? softcap, int max_reuse, "
    "Scalar k, int n_sink, int n_local, str vote, str normalize, str scope, float? select_scale, "
    "int pool, int n_query_means, str positions, str score_at, float fixed_share, "
    "int k_min, int? k_max"
)
# What every operator takes last: the backend, and whether to check lengths and block table.
_CALL = "str backend, bool validate"
_library = torch.library.Library("tokenselect", "DEF")
_PLAIN = (Tensor, Parameter)
_implementations: dict[str, Callable[..., Any]] = {}


def implementation(operator: Any) -> Callable[..., Any] | None:
    """Return what an operator of this library runs; None for another's."""
    return _implementations.get(operator.name())


def flattened(p: Problem) -> tuple[Any, ...]:
    """Return a problem's tensors and settings in the order of `_SCHEMA`."""
    rope = p.rope
    rotation: tuple[Any, ...] = (None, False, "rotated", 1.0)
    if rope is not None:
        rotation = (rope.inv_freq, rope.interleaved, rope.cached, float(rope.scaling))
    return (
        *(p.q, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.sink_logits),
        *rotation,
        *(p.scale, p.softcap, p.max_reuse),
        *(getattr(p.config, name) for name in CONFIG_NAMES),
    )


def rebuilt(*flat: Any) -> Problem:
    """Return the problem that `flattened` took apart."""
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


def attention(
    backend: str,
    problem: Problem,
    validate: bool,
    state: CacheState | None = None,
    theta: float | None = None,
    group: str | None = None,
) -> Step:
    """Run a whole step on the backend of that name; with the Selection Cache's state, update it.

    group  the name of the process group whose ranks hold the other heads

    As an operator where somebody has to see one; elsewhere that would be a fifth of a short call.
    """
    if not _is_watched(problem, state):
        with without_autocast(problem.q.device.type):
            return _run(problem, state, theta, group, backend, validate)
    flat = flattened(problem)
    if state is None:
        done = torch.ops.tokenselect.attention(*flat, group, backend, validate)
        return Step._make((*done, None))
    return Step(
        *torch.ops.tokenselect.attention_with_cache(
            *flat, *state.tensors(), theta, group, backend, validate
        )
    )


def _run(
    problem: Problem,
    state: CacheState | None,
    theta: float | None,
    group: str | None,
    name: str,
    validate: bool,
) -> Step:
    """Check values if they are to be, and run the step."""
    ranks = None if group is None else Ranks(group, looks=problem.q.device.type == "cpu")
    if validate:
        check_values(problem)
        if ranks:
            ranks.check(problem, state, theta)
    backend = load(name)
    reuse = None if state is None else reuse_of(backend)
    return run_step(problem, backend, reuse, state, theta, ranks=ranks)


def _is_watched(p: Problem, state: CacheState | None) -> bool:
    """Whether a compiler, trace, mode or profiler looks at operators, or a tensor needs one.

    Such are subclasses, meta tensors, and views with the negative bit, which no kernel looks at.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    given = [p.q, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.sink_logits]
    if p.rope is not None:
        given.append(p.rope.inv_freq)
    if state is not None:
        given += state.tensors()
    return any(
        x is not None and (type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor() or x.is_meta)
        for x in given
    )


def score(backend: str, problem: Problem, validate: bool) -> Scores:
    """Run the score stage of the backend of that name."""
    return Scores(*torch.ops.tokenselect.score(*flattened(problem), backend, validate))


def select(backend: str, votes: Tensor, problem: Problem, validate: bool) -> Selection:
    """Run the select stage of the backend of that name."""
    flat = flattened(problem)
    return Selection(*torch.ops.tokenselect.select(votes, *flat, backend, validate))


def attend(backend: str, problem: Problem, selection: Selection, validate: bool) -> AttentionOutput:
    """Run the attend stage of the backend of that name."""
    flat = flattened(problem)
    return AttentionOutput(*torch.ops.tokenselect.attend(*selection, *flat, backend, validate))


def _opened(args: tuple[Any, ...]) -> tuple[Problem, Backend]:
    """Return the problem, its values checked if they are to be, and the backend."""
    *flat, name, validate = args
    problem = rebuilt(*flat)
    if validate:
        check_values(problem)
    return problem, load(name)


def _attention(*args: Any) -> tuple[Tensor, ...]:
    *flat, group, name, validate = args
    return _run(rebuilt(*flat), None, None, group, name, validate)[:-1]


def _attention_with_cache(*args: Any) -> tuple[Tensor, ...]:
    *flat, query, positions, count, seqlen, hits, misses, theta, group, name, validate = args
    state = CacheState(query, positions, count, seqlen, hits, misses)
    return _run(rebuilt(*flat), state, theta, group, name, validate)  # type: ignore[return-value]


def _score(*args: Any) -> Scores:
    problem, backend = _opened(args)
    return backend.score(problem)  # type: ignore[operator]  # loaded: no longer a name


def _select(votes: Tensor, *args: Any) -> Selection:
    problem, backend = _opened(args)
    return backend.select(votes, problem)  # type: ignore[operator]  # loaded


def _attend(positions: Tensor, count: Tensor, *args: Any) -> AttentionOutput:
    problem, backend = _opened(args)
    return backend.attend(problem, Selection(positions, count))  # type: ignore[operator]  # loaded


def fake_step(p: Problem) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes that a step of `p` returns, without `reused`."""
    return (
        *_fake_attended(p),
        *_fake_selection(p),
        p.q.new_empty((p.B, p.Hq), dtype=torch.float32),
    )


def _fake_attended(p: Problem) -> AttentionOutput:
    out = p.q.new_empty((p.B, p.Hq, p.Lq, p.Dv))
    return AttentionOutput(out, p.q.new_empty((p.B, p.Hq, p.Lq), dtype=torch.float32))


def _fake_selection(p: Problem) -> Selection:
    positions = p.q.new_empty((p.B, p.S, p.K), dtype=torch.int32)
    return Selection(positions, p.q.new_empty((p.B, p.S), dtype=torch.int32))


def _fake_scores(p: Problem) -> Scores:
    votes = p.q.new_empty((p.B, p.R, p.S, p.Lk), dtype=torch.float32)
    return Scores(votes, p.q.new_empty((p.B, p.Hq), dtype=torch.float32))


def _fake_attention_with_cache(*args: Any) -> tuple[Tensor, ...]:
    p = rebuilt(*args[:-10])  # less six tensors of state, theta, group and what _CALL names
    return (*fake_step(p), p.q.new_empty((p.B,), dtype=torch.bool))


def define(name: str, schema: str, run: Any, fake: Any) -> None:
    """Add an operator to the namespace `tokenselect`. schema lacks its opening bracket."""

    def run_without_autocast(first: Tensor, *args: Any) -> Any:
        with without_autocast(first.device.type):
            return run(first, *args)

    _implementations[f"tokenselect::{name}"] = run_without_autocast
    _library.define(f"{name}({schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, _implementations[f"tokenselect::{name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenselect::{name}", fake, lib=_library)


_STEP = "Tensor, Tensor, Tensor, Tensor, Tensor"
_STATE = ", ".join(
    f"Tensor({mark}!) {name}"
    for mark, name in zip(
        "abcdef",
        ("query", "stored", "stored_count", "seqlen_at_selection", "hits", "misses"),
        strict=True,
    )
)
define(
    "attention",
    f"{_SCHEMA}, str? group, {_CALL}) -> ({_STEP})",
    _attention,
    lambda *args: fake_step(rebuilt(*args[:-3])),
)
define(
    "attention_with_cache",
    f"{_SCHEMA}, {_STATE}, float? theta, str? group, {_CALL}) -> ({_STEP}, Tensor)",
    _attention_with_cache,
    _fake_attention_with_cache,
)
define(
    "score",
    f"{_SCHEMA}, {_CALL}) -> (Tensor, Tensor)",
    _score,
    lambda *args: _fake_scores(rebuilt(*args[:-2])),
)
define(
    "select",
    f"Tensor votes, {_SCHEMA}, {_CALL}) -> (Tensor, Tensor)",
    _select,
    lambda votes, *args: _fake_selection(rebuilt(*args[:-2])),
)
define(
    "attend",
    f"Tensor sel_positions, Tensor sel_count, {_SCHEMA}, {_CALL}) -> (Tensor, Tensor)",
    _attend,
    lambda positions, count, *args: _fake_attended(rebuilt(*args[:-2])),
)
