"""The public calls: check the problem, resolve the backend, run its stages."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect import ops, registry
from tokenselect.contract import (
    CONFIG_NAMES,
    Attended,
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
from tokenselect.errors import InvalidProblem
from tokenselect.reuse import SelectionCache
from tokenselect.rope import Rope


class Info(NamedTuple):
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


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int = 2048,
    *,
    n_sink: int = 16,
    n_local: int = 128,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    vote: Vote = "soft",
    normalize: Normalize = "visible",
    scope: Scope = "layer",
    select_scale: float | None = None,
    pool: int = 1,
    n_query_means: int = 1,
    rope: Rope | None = None,
    positions: Positions = "original",
    score_at: ScoreAt = "true",
    fixed_share: float = 0.25,
    cache: SelectionCache | None = None,
    backend: str = "auto",
    validate: bool | None = None,
    return_info: bool = False,
) -> Any:
    """Attend to the sink, the k cached tokens that the heads vote for, and the local window.

    TokenSelect, arXiv 2411.02886, eq. 2 to 7 and algorithm 1; docs/semantics.md has it all.

    q            (B, Hq, Lq, D), the new tokens' queries; query i sits at position n - Lq + i
    k_cache      (B, Hkv, Lk, D), or paged (n_pages, page_size, Hkv, D), the new keys included;
                 any strides; q's dtype: float32, bfloat16, float16 or float64
    v_cache      likewise with Dv
    k, n_sink, n_local, vote, normalize, scope, select_scale, pool, n_query_means, positions,
    score_at, fixed_share
                 what to select: see `SelectConfig`
    cache_seqlens (B,) int32, the n of each request, the new tokens included; Lk if absent
    block_table  (B, max_pages) int32, for a paged cache
    scale        factor on the logits, 1 / sqrt(D) if absent; softcap: softcap * tanh(. / softcap)
    sink_logits  (Hq,): one more logit a head in the softmax's denominator
    rope         how q and keys are rotated; needed to move them, or if they arrive raw
    cache        a SelectionCache, to reuse selections; one a layer
    backend      a registered name, which never falls back, or "auto": see `explain`
    validate     check lengths and block table, which reads them: None, on the CPU only

    Returns out (B, Hq, Lq, Dv) in q's dtype; with return_info (out, `Info`). There is no
    backward pass. Raises InvalidProblem, UnsupportedProblem or UnknownBackend, all ValueErrors.

    >>> q, cached = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 99, 64)
    >>> out, info = attention(q, cached, cached, k=16, n_sink=4, n_local=8, return_info=True)
    >>> out.shape, int(info.selection.count), info.backend
    (torch.Size([1, 8, 1, 64]), 28, 'cpu')
    """
    problem = Problem.build(
        q,
        k_cache,
        v_cache,
        SelectConfig(
            k=k,
            n_sink=n_sink,
            n_local=n_local,
            vote=vote,
            normalize=normalize,
            scope=scope,
            select_scale=select_scale,
            pool=pool,
            n_query_means=n_query_means,
            positions=positions,
            score_at=score_at,
            fixed_share=fixed_share,
        ),
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        rope=rope,
        max_reuse=_max_reuse(cache),
    )
    name, problem = _ready(problem, backend, validate)
    fresh, decision, memory = problem, None, None
    if cache is not None:
        memory = cache.memory(problem)
        decision = ops.decide(name, problem, memory, cache.theta)
        fresh = replace(problem, cache_seqlens=decision.cache_seqlens)
    scores = ops.score(name, fresh)
    selection = ops.select(name, scores.votes, fresh)
    if memory is not None and decision is not None:
        ops.keep(name, problem, memory, decision, selection)
    attended = ops.attend(name, problem, selection)
    if not return_info:
        return attended.out
    reused = torch.zeros_like(problem.cache_seqlens, dtype=torch.bool)
    reused = reused if decision is None else decision.reused
    mass = retained_mass(problem, scores.lse, attended.lse, reused)
    return attended.out, Info(attended.lse, selection, mass, reused, name)


def score(problem: Problem, backend: str = "auto", validate: bool | None = None) -> Scores:
    """Stage 1 alone: votes (B, R, S, Lk) float32 and lse (B, Hq) float32. See `Scores`."""
    name, problem = _ready(problem, backend, validate)
    return ops.score(name, problem)


def select(
    votes: Tensor, problem: Problem, backend: str = "auto", validate: bool | None = None
) -> Selection:
    """Stage 2 alone: from votes (B, R, S, Lk) float32 to a `Selection`; bit-exact.

    Ties go to the lower position, -0.0 equals 0.0, NaN counts as -inf.
    """
    name, problem = _ready(problem, backend, validate)
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
    return ops.select(name, votes, problem)


def attend(
    problem: Problem, selection: Selection, backend: str = "auto", validate: bool | None = None
) -> Attended:
    """Stage 3 alone: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) over a given selection."""
    name, problem = _ready(problem, backend, validate)
    _check_selection(problem, selection, read=_reads_values(problem, validate))
    return ops.attend(name, problem, selection)


def explain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: int = 2048,
    *,
    cache: SelectionCache | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> registry.Explanation:
    """Say which backend `attention` with the same arguments would run on, and why not the others.

    Runs nothing and reads no tensor. Print the result, or read .chosen and .passed_over.
    """
    arguments = {"k": k} | arguments
    config = {name: arguments.pop(name) for name in CONFIG_NAMES if name in arguments}
    for name in ("validate", "return_info"):
        arguments.pop(name, None)
    problem = Problem.build(
        q, k_cache, v_cache, SelectConfig(**config), max_reuse=_max_reuse(cache), **arguments
    )
    return registry.explain(backend, problem)


def _max_reuse(cache: SelectionCache | None) -> int:
    if cache is None:
        return 0
    if not isinstance(cache, SelectionCache):
        raise InvalidProblem(
            f"cache is a {type(cache).__name__}",
            "cache is a tokenselect.SelectionCache or None",
            "make one a layer: SelectionCache(theta=0.9); keys and values go into k_cache, v_cache",
        )
    return cache.max_reuse


def _ready(problem: Problem, backend: str, validate: bool | None) -> tuple[str, Problem]:
    """The backend's name, and the problem with its values checked where they are to be."""
    if not isinstance(problem, Problem):
        raise InvalidProblem(
            f"problem is a {type(problem).__name__}",
            "the stages take a tokenselect.Problem",
            "make one with Problem.build, or call attention",
        )
    refuse_grad(problem)
    name = registry.resolve(backend, problem)
    if _reads_values(problem, validate):
        problem = replace(problem, cache_seqlens=ops.checked_seqlens(problem))
    return name, problem


def refuse_grad(problem: Problem) -> None:
    """Raises InvalidProblem for tensors that a backward pass would want to go through."""
    inputs = {name: getattr(problem, name) for name in ("q", "k_cache", "v_cache", "sink_logits")}
    inputs["rope.inv_freq"] = None if problem.rope is None else problem.rope.inv_freq
    for argument, tensor in inputs.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise InvalidProblem(
                f"{argument} requires grad",
                "attention over a KV cache is for inference and has no backward pass",
                "call it under torch.inference_mode() or torch.no_grad()",
            )


def _reads_values(problem: Problem, validate: bool | None) -> bool:
    return problem.q.device.type == "cpu" if validate is None else validate


def _check_selection(problem: Problem, selection: Selection, *, read: bool) -> None:
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


def retained_mass(problem: Problem, dense: Tensor, lse: Tensor, reused: Tensor) -> Tensor:
    """exp(lse of the selection - lse of all), where both are of the same logits; else NaN."""
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
