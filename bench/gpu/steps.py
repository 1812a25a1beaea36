"""Planned decode steps as contenders: selections reused, recomputed, and both by turns.

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
from bench.checks import NotEquivalent
from bench.gpu.cases import PlannedSteps
from bench.gpu.device import hold, nearness
from tokenselect import Plan, Problem, SelectionCache

THETA = 0.9
GROUP = 5  # alike queries one after the other, of the mixed trace: 80 % hits

Layers = list[tuple[Tensor, Tensor]]  # the keys and values of each


@dataclass(frozen=True)
class Trace:
    """queries (1 + T, B, Hq, 1, D) and lengths (1 + T, B) of T steps, and of the one before them.

    width   steps that are one run
    misses  of `width` steps so many make a request's selection again
    """

    queries: Tensor
    lengths: Tensor
    width: int = 1
    misses: int = 1

    @property
    def n_runs(self) -> int:
        return (len(self.lengths) - 1) // self.width


def alike(problem: Problem, max_reuse: int, *, misses: int) -> Trace:
    """Return a trace of the same queries all the time."""
    queries = problem.q.expand(1 + max_reuse, -1, -1, -1, -1)
    return Trace(queries, _growing(problem, max_reuse, max_reuse), misses=misses)


def mixed(problem: Problem, max_reuse: int, seed: int = 0) -> Trace:
    """Return groups of 5 alike queries; a batch's requests begin theirs at different steps.

    The next group has the queries of a KV head's heads in another order, and each query of a group
    a little noise.
    """
    p, T = problem, max_reuse // GROUP * GROUP
    random = torch.Generator(p.q.device).manual_seed(seed)
    by_group = p.q.float().unflatten(1, (p.Hkv, p.G))
    queries = torch.stack([
        torch.stack([by_group[b].roll((t + b) // GROUP, 1).flatten(0, 1) for b in range(p.B)])
        for t in range(-1, T)
    ])  # fmt: skip
    noise = torch.randn(queries.shape, generator=random, device=p.q.device)
    queries += 0.02 * queries.std() * noise
    return Trace(queries.to(p.q.dtype), _growing(p, max_reuse, T), width=GROUP)


def _growing(problem: Problem, room: int, T: int) -> Tensor:
    """From the capacity less `room`, one token per step."""
    start = problem.Lk - room
    steps = torch.arange(start, start + T + 1, dtype=torch.int32, device=problem.q.device)
    return steps[:, None].expand(-1, problem.B).contiguous()


class Steps:
    """`width` steps of a trace through all layers, as one thing to run: into `out`.

    caches    a SelectionCache per layer, or none at all
    expected  (1 + T) of (B, Hq, 1, Dv): what each step of the trace has to give in every layer
    out       (width, layers, B, Hq, 1, Dv)
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        layers: Layers,
        trace: Trace,
        caches: Sequence[SelectionCache],
        expected: list[Tensor],
    ) -> None:
        self.name, self.trace, self.expected = name, trace, expected
        self._plan, self._layers, self._caches = plan, layers, caches
        self._q = trace.queries[: trace.width].clone()
        self._lengths = trace.lengths[: trace.width].clone()
        self.out = self._q.new_empty((trace.width, len(layers), *expected[0].shape))
        self._next_run = 0
        for (k, v), cache in zip(layers, caches, strict=False):
            # The step before the trace, which each cache has to have seen.
            plan(trace.queries[0], k, v, trace.lengths[0], cache=cache)
        self._before = [[x.clone() for x in state] for state in self._states()]

    @property
    def calls(self) -> int:
        return self.trace.width * len(self._layers)

    def _states(self) -> list[tuple[Tensor, ...]]:
        """What the caches decide by: everything but hits and misses."""
        return [cache._memory.tensors()[:4] for cache in self._caches]  # type: ignore[union-attr]

    def run(self) -> Tensor:
        for i in range(self.trace.width):
            for layer, (k, v) in enumerate(self._layers):
                cache = self._caches[layer] if self._caches else None
                where = self.out[i, layer]
                self._plan(self._q[i], k, v, self._lengths[i], cache=cache, out=where)
        return self.out

    def begin(self) -> None:
        """Go back to the start of the trace."""
        self._next_run = 0
        for state, before in zip(self._states(), self._before, strict=True):
            for tensor, was in zip(state, before, strict=True):
                tensor.copy_(was)

    @property
    def rows(self) -> slice:
        """The next run's steps among those of the trace."""
        first = 1 + self._next_run * self.trace.width
        return slice(first, first + self.trace.width)

    @contextmanager
    def next(self) -> Iterator[None]:
        """Put the inputs of the next run in place. Inside, exactly one run, but for captures."""
        if self._next_run == self.trace.n_runs:
            self.begin()
        self._q.copy_(self.trace.queries[self.rows])
        self._lengths.copy_(self.trace.lengths[self.rows])
        self._next_run += 1
        yield

    def reset_counts(self) -> None:
        self.begin()
        for cache in self._caches:
            cache.hits.zero_()
            cache.misses.zero_()

    def check_counts(self) -> None:
        """Raise NotEquivalent if what was run since `reset_counts` hit otherwise than it should."""
        width, misses = self.trace.width, self.trace.misses
        for layer, cache in enumerate(self._caches):
            pairs = zip(cache.hits.tolist(), cache.misses.tolist(), strict=True)
            for b, (hit, missed) in enumerate(pairs):
                if hit * misses != missed * (width - misses) or hit + missed == 0:
                    raise NotEquivalent(
                        f"layer {layer}, request {b}: {hit} hits and {missed} misses in what was "
                        f"timed, of which {misses} in {width} should have missed"
                    )

    def check(self, run: Callable[[], Any], how: str, checked: int, near: float) -> None:
        """Raise NotEquivalent unless `checked` steps give what attention gave, in every layer."""
        self.begin()
        for _ in range(min(self.trace.n_runs, max(1, checked // self.trace.width))):
            rows = self.rows
            self.out.fill_(math.nan)
            with self.next():
                run()
            for step, right in enumerate(self.expected[rows]):
                for layer, got in enumerate(self.out[step]):
                    what = f"{self.name}, {how}: step {rows.start + step}, layer {layer}"
                    hold(what, got, right, near)


def attended(problem: Problem, backend: str, trace: Trace, theta: float | None) -> list[Tensor]:
    """Return what attention gives at each step of a trace, called without any plan."""
    cache = SelectionCache(theta, problem.max_reuse) if problem.max_reuse else None
    outs = []
    for q, lengths in zip(trace.queries, trace.lengths, strict=True):
        at = replace(problem, q=q, cache_seqlens=lengths)
        outs.append(tokenselect.run(at, backend, cache=cache).clone())
    return outs


def copies(problem: Problem, layers: int, free_bytes: int) -> Layers:
    """Return each layer's keys and values: the problem's own and copies, which take turns.

    There are as many copies as fit into a quarter of the memory that is free: a baseline that
    expands heads in float32 takes most of it.
    """
    k, v = problem.k_cache, problem.v_cache
    room = free_bytes // 4 // ((k.numel() + v.numel()) * k.element_size())
    several = [(k, v)] + [(k.clone(), v.clone()) for _ in range(min(layers - 1, room))]
    return [several[layer % len(several)] for layer in range(layers)]


def kinds(problem: Problem, backend: str, planned: PlannedSteps, layers: Layers) -> Iterator[Steps]:
    """Yield what is measured of plans, each checked as it is called."""
    reusing = replace(problem, max_reuse=planned.max_reuse)
    plan, near = tokenselect.plan(reusing, backend), nearness(backend, problem.q.device)
    hits, misses = (alike(problem, planned.max_reuse, misses=count) for count in (0, 1))
    right: dict[int, list[Tensor]] = {}
    for name, trace, theta, count in (
        ("hit", hits, THETA, len(layers)),
        ("hit, one layer", hits, THETA, 1),
        ("miss", misses, None, len(layers)),
        ("mixed", mixed(problem, planned.max_reuse), THETA, len(layers)),
    ):
        caches = [SelectionCache(theta, planned.max_reuse) for _ in range(count)]
        if id(trace) not in right:
            right[id(trace)] = attended(reusing, backend, trace, theta)
        steps = Steps(name, plan, layers[:count], trace, caches, right[id(trace)])
        steps.check(steps.run, "called", planned.checked, near)
        yield steps
    if planned.short is not None:
        for steps in _short(problem, backend, planned.short, layers):
            steps.check(steps.run, "called", planned.checked, near)
            yield steps


def _short(problem: Problem, backend: str, n: int, layers: Layers) -> Iterator[Steps]:
    """Fresh selections at a length far below the capacity, beside a cache of just that length."""
    first = {id(k): tuple(x[:, :, :n].contiguous() for x in (k, v)) for k, v in layers}
    own_layers: Any = [first[id(k)] for k, _ in layers]
    k, v = own_layers[0]
    lengths = torch.full_like(problem.cache_seqlens, n)
    own = replace(problem, k_cache=k, v_cache=v, cache_seqlens=lengths)
    # One step at one length, again and again.
    trace = Trace(problem.q.expand(2, -1, -1, -1, -1), lengths.expand(2, -1).contiguous())
    expected = attended(own, backend, trace, None)
    for name, of, over in (("short", problem, layers), ("short, own capacity", own, own_layers)):
        yield Steps(name, tokenselect.plan(of, backend), over, trace, (), expected)
