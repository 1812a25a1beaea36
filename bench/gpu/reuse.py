"""Planned decode steps as sides of a cell: selections reused, made afresh, and both by turns.

A step is what a model does for one token: `layers` calls of one plan, each with a SelectionCache of
its own, and lengths that grow by one from step to step. Layers take turns at as many copies of the
KV cache as fit, so that no layer finds the rows that it reads in the L2 cache. Queries and lengths
of a step are put in place before it, which is not timed. After max_reuse tokens the lengths, and
what the caches remember, are put back to where they were at the start.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import tokenselect
from bench.gpu import truth
from bench.gpu.plan import PlannedSteps
from bench.run import NotEquivalent
from tokenselect import Plan, Problem, SelectionCache

THETA = 0.9
GROUP = 5  # alike queries one after the other, of the mixed trace: 80 % hits
_NEAR = 0.05  # what a backend may differ by whose plans compute in another order than its calls


class NoPlans(Exception):
    """The backend cannot be planned, so that there is nothing to measure of plans."""


@dataclass(frozen=True)
class Trace:
    """queries (1 + T, B, Hq, 1, D) and lengths (1 + T, B) of T steps, and of the one before them.

    width   steps that are one run
    misses  of `width` steps so many make a request's selection afresh
    """

    queries: Tensor
    lengths: Tensor
    width: int
    misses: int

    @property
    def n_runs(self) -> int:
        return (len(self.lengths) - 1) // self.width


def alike(problem: Problem, planned: PlannedSteps, *, misses: int) -> Trace:
    """The same queries all the time."""
    T = planned.max_reuse
    return Trace(problem.q.expand(1 + T, -1, -1, -1, -1), _growing(problem, T, T), 1, misses)


def mixed(problem: Problem, planned: PlannedSteps, seed: int = 0) -> Trace:
    """Groups of 5 alike queries; the groups of a batch's requests do not begin at the same step.

    The next group has the queries of a KV head's heads in another order, and each query of a group
    a little noise.
    """
    p, T = problem, planned.max_reuse // GROUP * GROUP
    random = torch.Generator(p.q.device).manual_seed(seed)
    by_group = p.q.float().unflatten(1, (p.Hkv, p.G))
    rows = []
    for t in range(-1, T):
        turns = [(t + b) // GROUP for b in range(p.B)]
        turned = [by_group[b].roll(turn, 1).flatten(0, 1) for b, turn in enumerate(turns)]
        rows.append(torch.stack(turned))
    queries = torch.stack(rows)
    noise = torch.randn(queries.shape, generator=random, device=p.q.device)
    queries += 0.02 * queries.std() * noise
    lengths = _growing(p, planned.max_reuse, T)
    return Trace(queries.to(p.q.dtype), lengths, GROUP, 1)


def constant(problem: Problem, n: int) -> Trace:
    """One step at one length, again and again."""
    lengths = torch.full((2, problem.B), n, dtype=torch.int32, device=problem.q.device)
    return Trace(problem.q.expand(2, -1, -1, -1, -1), lengths, 1, 1)


def _growing(problem: Problem, room: int, T: int) -> Tensor:
    """From the capacity less `room`, a token a step."""
    start = problem.Lk - room
    steps = torch.arange(start, start + T + 1, dtype=torch.int32, device=problem.q.device)
    return steps[:, None].expand(-1, problem.B).contiguous()


class Steps:
    """`width` steps of a trace through all layers, as one thing to run: into `out`.

    out (width, layers, B, Hq, 1, Dv). caches None: no SelectionCache at all.
    """

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[tuple[Tensor, Tensor]],
        trace: Trace,
        caches: Sequence[SelectionCache] | None,
    ) -> None:
        self.trace = trace
        self._plan, self._layers, self._caches = plan, layers, caches
        width, (_, B, Hq, Lq, _) = trace.width, trace.queries.shape
        self._q = trace.queries[:width].clone()
        self._lengths = trace.lengths[:width].clone()
        Dv = layers[0][1].shape[-1]
        self.out = self._q.new_empty((width, len(layers), B, Hq, Lq, Dv))
        self.at = 0  # the run that comes next
        self._before: list[list[Tensor]] = []
        if caches is not None:
            self._prime(caches)

    @property
    def calls(self) -> int:
        return self.trace.width * len(self._layers)

    def _prime(self, caches: Sequence[SelectionCache]) -> None:
        """The step before the trace, which each cache has to have seen."""
        for (k, v), cache in zip(self._layers, caches, strict=True):
            self._plan(self.trace.queries[0], k, v, self.trace.lengths[0], cache=cache)
        self._before = [[x.clone() for x in tensors] for tensors in self._memories()]

    def _memories(self) -> list[tuple[Tensor, ...]]:
        """What the caches decide by: everything but hits and misses."""
        memories = [cache._memory for cache in self._caches or ()]
        return [m.tensors()[:4] for m in memories if m is not None]

    def run(self) -> Tensor:
        for i in range(self.trace.width):
            for layer, (k, v) in enumerate(self._layers):
                cache = None if self._caches is None else self._caches[layer]
                where = self.out[i, layer]
                self._plan(self._q[i], k, v, self._lengths[i], cache=cache, out=where)
        return self.out

    def begin(self) -> None:
        """Back to the start of the trace."""
        self.at = 0
        for tensors, before in zip(self._memories(), self._before, strict=True):
            for tensor, was in zip(tensors, before, strict=True):
                tensor.copy_(was)

    def count_anew(self) -> None:
        self.begin()
        for cache in self._caches or ():
            cache.hits.zero_()
            cache.misses.zero_()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Puts the inputs of the next run in place. Inside, exactly one run, but for captures."""
        if self.at == self.trace.n_runs:
            self.begin()
        rows = self.rows
        self._q.copy_(self.trace.queries[rows])
        self._lengths.copy_(self.trace.lengths[rows])
        self.at += 1
        yield

    @property
    def rows(self) -> slice:
        """The next run's steps among those of the trace."""
        first = 1 + self.at * self.trace.width
        return slice(first, first + self.trace.width)

    def counted(self) -> None:
        """Raises NotEquivalent if what was run since `count_anew` did not hit as it should have."""
        width, misses = self.trace.width, self.trace.misses
        for layer, cache in enumerate(self._caches or ()):
            hit, missed = cache.hits.tolist(), cache.misses.tolist()
            for b, (hits, fresh) in enumerate(zip(hit, missed, strict=True)):
                if hits * misses != fresh * (width - misses) or hits + fresh == 0:
                    raise NotEquivalent(
                        f"layer {layer}, request {b}: {hits} hits and {fresh} misses in what was "
                        f"timed, of which {misses} in {width} should have missed"
                    )


def attended(problem: Problem, backend: str, trace: Trace, theta: float | None) -> list[Tensor]:
    """What `attention` gives at each step of a trace, called without any plan."""
    cache = None
    if problem.max_reuse:
        cache = SelectionCache(theta, problem.max_reuse)
    outs = []
    for q, lengths in zip(trace.queries, trace.lengths, strict=True):
        at = replace(problem, q=q, cache_seqlens=lengths)
        outs.append(truth.attention(at, backend, cache=cache).clone())
    return outs


@dataclass(frozen=True)
class Kind:
    """One side: its name, what it is run over, and what it must give at each step."""

    name: str
    steps: Steps
    expected: list[Tensor]


def hold(kind: Kind, run: Callable[[], Any], how: str, checked: int, *, exact: bool) -> None:
    """Raises NotEquivalent unless `checked` steps give what attention gave, in every layer."""
    steps = kind.steps
    steps.begin()
    for _ in range(min(steps.trace.n_runs, max(1, checked // steps.trace.width))):
        rows = steps.rows
        steps.out.fill_(math.nan)
        with steps.next():
            run()
        for step, right in enumerate(kind.expected[rows]):
            for layer, got in enumerate(steps.out[step]):
                if not _agree(got, right, exact=exact):
                    far = float((got.float() - right.float()).abs().max())
                    raise NotEquivalent(
                        f"{kind.name}, {how}: step {rows.start + step}, layer {layer} is "
                        f"{far:.3g} away from attention's result"
                        + (", and has to be bitwise the same" if exact else "")
                    )


def _agree(got: Tensor, right: Tensor, *, exact: bool) -> bool:
    if exact:
        return truth.same(got, right)
    return bool(((got.float() - right.float()).abs() <= _NEAR * right.float().abs().max()).all())


def is_exact(backend: str, at: torch.device) -> bool:
    """Whether a plan has to give the very bits of a call: everywhere but on the CPU of a dry run.

    There, the cpu backend's plans go over the whole capacity, in another order than its calls.
    """
    return at.type != "cpu" or backend == "triton"


def copies(problem: Problem, layers: int, free_bytes: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values: the problem's own and copies, which take turns.

    There are as many copies as fit into a third of the memory that is free: the rivals need some.
    """
    k, v = problem.k_cache, problem.v_cache
    room = free_bytes // 3 // ((k.numel() + v.numel()) * k.element_size())
    several = [(k, v)] + [(k.clone(), v.clone()) for _ in range(min(layers - 1, room))]
    return [several[layer % len(several)] for layer in range(layers)]


def shortened(problem: Problem, n: int) -> Problem:
    """The first n tokens, in a cache of that capacity."""
    k, v = (x[:, :, :n].contiguous() for x in (problem.k_cache, problem.v_cache))
    lengths = torch.full_like(problem.cache_seqlens, n)
    return replace(problem, k_cache=k, v_cache=v, cache_seqlens=lengths)


def kinds(
    problem: Problem, backend: str, planned: PlannedSteps, layers: list[tuple[Tensor, Tensor]]
) -> Iterator[Kind]:
    """What is measured of plans. Each has to be held to `expected` before it is timed."""
    room = replace(problem, max_reuse=planned.max_reuse)
    plan = tokenselect.plan(room, backend)

    def made(name: str, trace: Trace, theta: float | None, count: int, right: Any = None) -> Kind:
        caches = [SelectionCache(theta, planned.max_reuse) for _ in range(count)]
        steps = Steps(plan, layers[:count], trace, caches)
        return Kind(name, steps, right or attended(room, backend, trace, theta))

    hits, misses = (alike(problem, planned, misses=count) for count in (0, 1))
    hit = made("hit", hits, THETA, len(layers))
    yield hit
    yield made("hit, one layer", hits, THETA, 1, hit.expected)
    yield made("miss", misses, None, len(layers))
    yield made("mixed", mixed(problem, planned), THETA, len(layers))
    if planned.short is not None:
        yield from _short(problem, backend, planned.short, layers)


def _short(
    problem: Problem, backend: str, n: int, layers: list[tuple[Tensor, Tensor]]
) -> Iterator[Kind]:
    """Fresh selections at a length far below the capacity, beside a cache of just that length."""
    own = shortened(problem, n)
    fronts: dict[int, tuple[Tensor, Tensor]] = {}
    for k, v in {id(k): (k, v) for k, v in layers}.values():
        fronts[id(k)] = k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
    own_layers = [fronts[id(k)] for k, _ in layers]
    trace = constant(problem, n)
    expected = attended(own, backend, trace, None)
    for name, of, over in (("short", problem, layers), ("short, own capacity", own, own_layers)):
        plan = tokenselect.plan(replace(of, max_reuse=0), backend)
        yield Kind(name, Steps(plan, over, trace, None), expected)


def facts(planned: PlannedSteps, layers: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What a reader has to know of these sides; goes into the JSON."""
    return {
        "layers": planned.layers,
        "kv_copies": len({id(k) for k, _ in layers}),
        "max_reuse": planned.max_reuse,
        "theta": THETA,
        "group": GROUP,
        "short": planned.short,
    }
