"""The public calls: check the problem, resolve the backend, run its stages."""

import difflib
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from tokenselect.contract import (
    CONFIG_NAMES,
    AttentionOutput,
    Normalize,
    Positions,
    Problem,
    Scope,
    ScoreAt,
    Scores,
    SelectConfig,
    Selection,
    Vote,
)
from tokenselect.contract.config import made
from tokenselect.contract.rules import check_out, check_selection, refuse_grad
from tokenselect.dispatch import ops, registry
from tokenselect.dispatch.ranks import sharing_heads, with_heads_of_all
from tokenselect.dispatch.step import Step
from tokenselect.errors import InvalidProblem
from tokenselect.rope import Rope
from tokenselect.scalars import plain
from tokenselect.selection_cache import SelectionCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AttentionInfo(NamedTuple):
    """What a call of `attention` did.

    lse            (B, Hq, Lq) float32, natural log, of the tokens attended to
    selection      the positions attended to
    retained_mass  (B, Hq) float32 in [0, 1]: the share of the dense softmax that falls on the
                   selection. NaN where it is not known: Lq > 1, a reused selection, scores at
                   fixed positions only, another select_scale, contiguous positions
    reused         (B,) bool: whose selection came from the cache
    backend        the name of the backend that ran
    """

    lse: Tensor
    selection: Selection
    retained_mass: Tensor
    reused: Tensor
    backend: str


class RareSettings(TypedDict, total=False):
    """The settings of `SelectConfig` that `attention` takes by name without listing them."""

    vote: Vote
    normalize: Normalize
    scope: Scope
    select_scale: float | None
    pool: int
    n_query_means: int
    fixed_share: float
    k_min: int
    k_max: int | None


@overload
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int | float | None = None,
    *,
    n_sink: int | None = None,
    n_local: int | None = None,
    positions: Positions | None = None,
    score_at: ScoreAt | None = None,
    config: SelectConfig | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: Literal[False] = False,
    **settings: Unpack[RareSettings],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int | float | None = None,
    *,
    n_sink: int | None = None,
    n_local: int | None = None,
    positions: Positions | None = None,
    score_at: ScoreAt | None = None,
    config: SelectConfig | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: Literal[True],
    **settings: Unpack[RareSettings],
) -> tuple[Tensor, AttentionInfo]: ...


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int | float | None = None,
    *,
    n_sink: int | None = None,
    n_local: int | None = None,
    positions: Positions | None = None,
    score_at: ScoreAt | None = None,
    config: SelectConfig | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    backend: str = "auto",
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: bool = False,
    **settings: Unpack[RareSettings],
) -> Tensor | tuple[Tensor, AttentionInfo]:
    """Attend to the sink, the k cached tokens that the heads vote for, and the local window.

    TokenSelect, arXiv 2411.02886, eq. 2 to 7 and algorithm 1; docs/semantics.md has it all.

    q            (B, Hq, Lq, D), the new tokens' queries; query i sits at position n - Lq + i
    k_cache      (B, Hkv, Lk, D), or paged (n_pages, page_size, Hkv, D), the new keys included;
                 any strides; q's dtype: float32, bfloat16, float16 or float64
    v_cache      likewise with Dv
    k, n_sink, n_local, positions, score_at, **settings
                 what to select: the fields of `SelectConfig`, with its defaults (k=2048); k=0.1 is
                 a tenth of each request's tokens
    config       a SelectConfig instead; a setting named both ways must be the same
    cache_seqlens (B,) int32, the n of each request, the new tokens included; Lk if absent
    block_table  (B, max_pages) int32, for a paged cache
    scale        factor on the logits, 1 / sqrt(D) if absent; softcap: softcap * tanh(. / softcap)
    sink_logits  (Hq,): one more logit per head in the softmax's denominator
    rope         how q and keys are rotated; needed to move them, or if they arrive raw
    cache        a SelectionCache, to reuse selections; one per layer
    process_group ranks that hold other heads of the layer, as many each: all heads vote together
    backend      a registered name, which never falls back, or "auto": see `explain`
    validate     check lengths and block table, which reads them: None, on the CPU only
    out          (B, Hq, Lq, Dv) contiguous, in q's dtype: written to and returned

    Returns out (B, Hq, Lq, Dv) in q's dtype; with return_info (out, `AttentionInfo`). There is no
    backward pass. Raises InvalidProblem, UnsupportedProblem or UnknownBackend, all ValueErrors.

    >>> q, cached = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 99, 64)
    >>> settings = {"k": 16, "n_sink": 4, "n_local": 8, "backend": "reference"}
    >>> out, info = attention(q, cached, cached, **settings, return_info=True)
    >>> out.shape, int(info.selection.count), info.backend
    (torch.Size([1, 8, 1, 64]), 28, 'reference')
    """
    named = {
        "k": k,
        "n_sink": n_sink,
        "n_local": n_local,
        "positions": positions,
        "score_at": score_at,
    }
    problem = Problem.build(
        q,
        k_cache,
        v_cache,
        config_of(config, named, settings),
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        rope=rope,
        max_reuse=max_reuse_of(cache),
    )
    return run(
        problem,
        backend,
        cache=cache,
        process_group=process_group,
        validate=validate,
        out=out,
        return_info=return_info,
    )


@overload
def run(
    problem: Problem,
    backend: str = "auto",
    *,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: Literal[False] = False,
) -> Tensor: ...


@overload
def run(
    problem: Problem,
    backend: str = "auto",
    *,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: Literal[True],
) -> tuple[Tensor, AttentionInfo]: ...


@overload
def run(
    problem: Problem,
    backend: str = "auto",
    *,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: bool,
) -> Tensor | tuple[Tensor, AttentionInfo]: ...


def run(
    problem: Problem,
    backend: str = "auto",
    *,
    cache: SelectionCache | None = None,
    process_group: "ProcessGroup | None" = None,
    validate: bool | None = None,
    out: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, AttentionInfo]:
    """Do what `attention` does, for a Problem that is built already.

    cache          a SelectionCache with the problem's max_reuse
    process_group  the ranks that hold the other heads

    Returns and raises what `attention` does.
    """
    name, reads = _ready(problem, backend, validate)
    if out is not None:
        check_out(problem, out)
    state, theta = None, None
    if cache is not None and max_reuse_of(cache) != problem.max_reuse:
        raise InvalidProblem(
            f"problem.max_reuse={problem.max_reuse}, the cache's is {max_reuse_of(cache)}",
            "a problem has room for as many appended tokens as its SelectionCache allows",
            "say Problem.build(..., max_reuse=cache.max_reuse), as attention does",
        )
    group, whole = None, problem
    if process_group is not None:
        group = sharing_heads(problem, process_group)
        whole = with_heads_of_all(problem, process_group.size())
    if cache is not None:
        state, theta = cache.state(whole), cache.theta
    step = ops.attention(name, problem, reads, state, theta, group)
    result = step.out if out is None else out.copy_(step.out)
    return (result, info_of(problem, step, name)) if return_info else result


def info_of(problem: Problem, step: Step, backend: str) -> AttentionInfo:
    """Return what `attention` tells about a step."""
    reused = step.reused
    if reused is None:
        reused = torch.zeros_like(problem.cache_seqlens, dtype=torch.bool)
    mass = _retained_mass(problem, step.dense_lse, step.lse, reused)
    return AttentionInfo(step.lse, Selection(step.positions, step.counts), mass, reused, backend)


def config_of(
    config: SelectConfig | None, named: dict[str, Any], rare: RareSettings
) -> SelectConfig:
    """Return the settings of a call, given whole, by name, or both ways if they agree."""
    given = {name: value for name, value in named.items() if value is not None} | dict(rare)
    for name in rare:
        if name not in CONFIG_NAMES:
            close = difflib.get_close_matches(name, CONFIG_NAMES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}{hint}")
    if config is None:
        return made(given)
    if not isinstance(config, SelectConfig):
        raise InvalidProblem(
            f"config is a {type(config).__name__}",
            "config is a tokenselect.SelectConfig",
            "say SelectConfig(**settings), or pass the settings by name",
        )
    for name, value in given.items():
        asked, has = plain(value), getattr(config, name)
        if not _are_equal(asked, has):
            raise InvalidProblem(
                f"{name}={asked!r}, config.{name}={has!r}",
                "a setting that is named both ways has one value",
                f"leave {name} out, or say dataclasses.replace(config, {name}={asked!r})",
            )
    return config


def _are_equal(a: Any, b: Any) -> bool:
    """Say whether two values of a setting are one; only what a setting can be is compared."""
    if not {type(a), type(b)} <= {int, float, str, type(None)}:
        return a is b
    return bool(a == b or (a != a and b != b))  # NaN


def score(problem: Problem, backend: str = "auto", validate: bool | None = None) -> Scores:
    """Run stage 1 alone: votes (B, R, S, Lk) float32 and lse (B, Hq) float32. See `Scores`."""
    name, reads = _ready(problem, backend, validate)
    return ops.score(name, problem, reads)


def select(
    votes: Tensor, problem: Problem, backend: str = "auto", validate: bool | None = None
) -> Selection:
    """Run stage 2 alone: from votes (B, R, S, Lk) float32 to a `Selection`; bit-exact.

    Ties go to the lower position, -0.0 equals 0.0, NaN counts as -inf.
    """
    name, reads = _ready(problem, backend, validate)
    shape = (problem.B, problem.R, problem.S, problem.Lk)
    if not isinstance(votes, Tensor):
        raise InvalidProblem(
            f"votes is a {type(votes).__name__}",
            f"votes are a tensor {shape} torch.float32",
            "pass score(problem).votes",
        )
    if votes.shape != shape or votes.dtype != torch.float32 or votes.device != problem.q.device:
        raise InvalidProblem(
            f"votes are {tuple(votes.shape)} {votes.dtype} on {votes.device}",
            f"votes of this problem are {shape} torch.float32 on {problem.q.device}",
            "pass score(problem).votes",
        )
    return ops.select(name, votes, problem, reads)


def attend(
    problem: Problem, selection: Selection, backend: str = "auto", validate: bool | None = None
) -> AttentionOutput:
    """Run stage 3 alone: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) over a given selection."""
    name, reads = _ready(problem, backend, validate)
    check_selection(problem, selection, read=reads)
    return ops.attend(name, problem, selection, reads)


def explain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int | float | None = None,
    *,
    config: SelectConfig | None = None,
    cache: SelectionCache | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> registry.Explanation:
    """Say which backend `attention` with the same arguments would run on, and why not the others.

    Runs nothing and reads no tensor. Print the result, or read .chosen and .passed_over.
    """
    for name in ("process_group", "validate", "out", "return_info"):
        arguments.pop(name, None)
    tensors = {name: arguments.pop(name) for name in _PROBLEM_ARGUMENTS if name in arguments}
    named = {"k": k} | {name: arguments.pop(name, None) for name in _NAMED}
    settings = config_of(config, named, arguments)  # type: ignore[arg-type]  # checked there
    problem = Problem.build(q, k_cache, v_cache, settings, max_reuse=max_reuse_of(cache), **tensors)
    return registry.explain(backend, problem)


_NAMED = "n_sink", "n_local", "positions", "score_at"
_PROBLEM_ARGUMENTS = "cache_seqlens", "block_table", "scale", "softcap", "sink_logits", "rope"


def max_reuse_of(cache: SelectionCache | None) -> int:
    """Return the cache's max_reuse, 0 without one; raise InvalidProblem for anything else."""
    if cache is None:
        return 0
    if not isinstance(cache, SelectionCache):
        raise InvalidProblem(
            f"cache is a {type(cache).__name__}",
            "cache is a tokenselect.SelectionCache or None",
            "make one per layer: SelectionCache(theta=0.9); "
            "keys and values go into k_cache, v_cache",
        )
    return cache.max_reuse


def _ready(problem: Problem, backend: str, validate: bool | None) -> tuple[str, bool]:
    """Return the name of the backend that runs the problem, and whether values are checked."""
    if not isinstance(problem, Problem):
        raise InvalidProblem(
            f"problem is a {type(problem).__name__}",
            "the stages take a tokenselect.Problem",
            "make one with Problem.build, or call attention",
        )
    refuse_grad(problem)
    reads = problem.q.device.type == "cpu" if validate is None else bool(validate)
    return registry.resolve(backend, problem), reads


def _retained_mass(problem: Problem, dense: Tensor, lse: Tensor, reused: Tensor) -> Tensor:
    """Return exp(lse of the selection - lse of all), or NaN where those are of other logits."""
    c = problem.config
    selected = lse[:, :, -1]
    is_known = (
        problem.Lq == 1
        and c.positions == "original"
        and c.score_at != "fixed"
        and problem.select_scale == problem.scale
    )
    if not is_known:
        return torch.full_like(dense, math.nan)
    known = ~reused[:, None] & dense.isfinite() & selected.isfinite()
    return torch.where(known, (selected - dense).exp().clamp(max=1.0), math.nan)
