"""A plan: the memory for a capacity, taken once, and then attention any number of times."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tokenselect import ops, registry
from tokenselect.api import Info, refuse_grad, retained_mass
from tokenselect.contract import Attended, Decision, Memory, Problem, Scores, Selection
from tokenselect.errors import InvalidProblem
from tokenselect.graphs import address, setting
from tokenselect.reuse import SelectionCache, used
from tokenselect.workspace import InOrder, Workspace, empty

_plans: WeakValueDictionary[int, "Plan"] = WeakValueDictionary()
_handles = itertools.count()

# What every call has in common with the problem that was planned.
_EQUAL = ("Lq", "Hq", "Hkv", "D", "Dv")


def plan(problem: Problem, backend: str = "auto") -> "Plan":
    """Plan attention for problems like this one, and smaller: see `Plan`.

    problem  gives the settings, the capacity (its B requests and its Lk tokens), and dtypes, layout
             and device. No value in its tensors matters. With a SelectionCache, say the cache's
             max_reuse in Problem.build.
    backend  a registered name, which never falls back, or "auto"; chosen here, once

    >>> from tokenselect import SelectConfig
    >>> q, cached = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 99, 64)
    >>> like = Problem.build(q, cached, cached, SelectConfig(k=16, n_sink=4, n_local=8))
    >>> step = plan(like)
    >>> step(q, cached, cached, torch.tensor([70], dtype=torch.int32)).shape, step.backend
    (torch.Size([1, 8, 1, 64]), 'cpu')

    Raises InvalidProblem, UnsupportedProblem (with the reasons of every backend tried) or
    UnknownBackend.
    """
    if not isinstance(problem, Problem):
        raise InvalidProblem(
            f"problem is a {type(problem).__name__}",
            "a plan is made for a tokenselect.Problem",
            "make one with Problem.build(q, k_cache, v_cache, SelectConfig(...))",
        )
    refuse_grad(problem)
    return Plan(problem, registry.resolve(backend, problem, planned=True))


class Plan:
    """Attention whose memory, backend and settings are fixed. Made by `tokenselect.plan`.

    A call allocates nothing and waits for nothing, so it can be captured in a CUDA graph; lengths,
    block tables and tensors may differ from call to call within the capacity. One plan serves any
    number of layers of one model, one after the other, each with a SelectionCache of its own.

    backend  the name of the backend
    bytes    of the memory that it holds
    """

    def __init__(self, problem: Problem, backend: str) -> None:
        chosen = registry.load(backend)
        assert chosen.planned is not None  # resolve saw to it
        rope = problem.rope
        if rope is not None:
            # The plan's own: it does not change, and tables made for it stay. Not in inference
            # mode, in which a tensor does not tell whether it was changed.
            with torch.inference_mode(False):
                rope = replace(rope, inv_freq=rope.inv_freq.clone())
        self.backend = backend
        self._stages = chosen.planned
        self._reuse = registry.reuse_of(chosen)
        self._like = replace(problem, rope=rope)
        self._workspace = Workspace()
        self._nobody = torch.zeros((problem.B,), dtype=torch.bool, device=problem.q.device)
        self._order = InOrder(problem.q.device)
        self._graphs = None if chosen.replays is None else chosen.replays()
        self._handle = next(_handles)
        _plans[self._handle] = self
        self._rehearse()

    @property
    def bytes(self) -> int:
        return self._workspace.bytes

    def __repr__(self) -> str:
        return f"Plan({self._like.describe()}; {self.backend}, {self.bytes} bytes)"

    def __deepcopy__(self, memo: Any) -> "Plan":
        """A plan for the same, with memory of its own: models that hold plans can be copied."""
        return Plan(self._like, self.backend)

    def prepare(self, *caches: SelectionCache) -> None:
        """Make the state of SelectionCaches, which then stays where it is, with room for this plan.

        A call does so too; but what torch.compile compiles cannot, and a cache for several plans
        has to be prepared for the one with the largest K first: the one with most queries.
        """
        for cache in caches:
            self._check_cache(self._like, cache)
            cache.memory(self._like, stays=True)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        *,
        block_table: Tensor | None = None,
        sink_logits: Tensor | None = None,
        cache: SelectionCache | None = None,
        out: Tensor | None = None,
        return_info: bool = False,
    ) -> Any:
        """Attend: see `tokenselect.attention`, with the settings of the plan.

        q              (B, Hq, Lq, D), B at most the plan's
        k_cache, v_cache
                       (B, Hkv, Lk, D) and Dv, or paged; Lk at most the plan's
        cache_seqlens  (B,) int32. Not checked, which would read it: a value out of range gives
                       nonsense for that request, and reads and writes nothing out of bounds
        block_table, sink_logits
                       as in `attention`, each if the planned problem has one
        cache          a SelectionCache with the plan's max_reuse; then B is the plan's, and a
                       request that is not there has length 0
        out            (B, Hq, Lq, Dv) contiguous, in q's dtype: written to and returned
        return_info    also return an `Info`, which allocates: its tensors are its own

        Without `out`, the result is the plan's own memory: the next call overwrites it. (Inside
        torch.compile, it is a tensor of its own.) Raises InvalidProblem.
        """
        like = self._like
        if not isinstance(cache_seqlens, Tensor) or not cache_seqlens.is_contiguous():
            came = f"is a {type(cache_seqlens).__name__}"
            if isinstance(cache_seqlens, Tensor):
                came = f"has strides {cache_seqlens.stride()}"
            raise InvalidProblem(
                f"cache_seqlens {came}",
                "a plan is given the length of every request: (B,) int32, contiguous, where q is",
                "pass torch.tensor(lengths, dtype=torch.int32, device=q.device)",
            )
        if (block_table is not None) != like.is_paged:
            words = {True: f"a paged cache, pages of {like.page_size}", False: "a contiguous cache"}
            raise InvalidProblem(
                f"the call has {'no ' if block_table is None else 'a '}block_table; "
                f"the plan was made for {words[like.is_paged]}",
                "calls differ from the planned problem in B, Lk and values only",
                "pass block_table= if the cache is paged, or make another plan for it",
            )
        problem = Problem.build(
            q,
            k_cache,
            v_cache,
            like.config,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            scale=like.scale,
            softcap=like.softcap,
            sink_logits=sink_logits,
            rope=like.rope,
            max_reuse=like.max_reuse,
        )
        self._check(problem, cache, out)
        refuse_grad(problem)
        # Of the plan's K, so that it never moves.
        memory = None if cache is None else cache.memory(like, stays=True)
        theta = None if cache is None else cache.theta
        if torch.compiler.is_compiling():
            result, *info = torch.ops.tokenselect.planned(
                *(problem.q, problem.k_cache, problem.v_cache, problem.cache_seqlens),
                *(block_table, sink_logits, [] if memory is None else list(memory.tensors())),
                *(theta, return_info, self._handle),
            )
            result = result if out is None else out.copy_(result)
        else:
            result, *info = self._run(problem, memory, theta, out, return_info)
        if not return_info:
            return result
        lse, dense, positions, count, reused = info
        mass = retained_mass(problem, dense, lse, reused)
        return result, Info(lse, Selection(positions, count), mass, reused, self.backend)

    def _run(
        self,
        problem: Problem,
        memory: Memory | None,
        theta: float | None,
        out: Tensor | None,
        with_info: bool,
    ) -> list[Tensor]:
        """out alone, in the plan's memory if it was not given; or, each in memory of its own, also
        lse, lse of all tokens, positions, count and reused.
        """

        def finish(done: tuple[Tensor, ...]) -> list[Tensor]:
            result = done[0] if out is None or done[0] is out else out.copy_(done[0])
            return [result, *(x.clone() for x in done[1:] if with_info)]

        with self._order.turn(), torch.no_grad(), _without_autocast(problem.q.device.type):
            if self._graphs is None:
                return finish(self._step(problem, memory, theta, out))
            return self._replayed(self._graphs, problem, memory, theta, finish)

    def _replayed(
        self,
        graphs: Any,
        problem: Problem,
        memory: Memory | None,
        theta: float | None,
        finish: Callable[[tuple[Tensor, ...]], list[Tensor]],
    ) -> list[Tensor]:
        """The step, captured for a size of batch that may be larger, and replayed."""
        rows = B = problem.B
        if problem.is_paged and graphs.batches:
            # The rows of a contiguous cache, in contrast, are those of the batch.
            rows = min([size for size in (*graphs.batches, self._like.B) if size >= B])

        def step(q: Tensor, lengths: Tensor, table: Tensor | None) -> tuple[Tensor, ...]:
            copied = replace(problem, q=q, cache_seqlens=lengths, block_table=table)
            return self._step(copied, memory, theta, None)

        tensors = () if memory is None else memory.tensors()
        key = (setting(problem), theta, *map(address, tensors))
        inputs = problem.q, problem.cache_seqlens, problem.block_table
        done: list[Tensor] = graphs.run(key, step, inputs, rows, finish=finish)
        return done

    def _step(
        self, problem: Problem, memory: Memory | None, theta: float | None, out: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The stages, and the Selection Cache's steps around them, each in its own memory.

        Returns out, lse, lse of all tokens, positions, count, reused.
        """
        section = self._workspace.section
        fresh, decision = problem, None
        if memory is not None:
            used(memory)
            with section("decide"):
                decision = Decision(*self._reuse.decide(problem, memory, theta))
            fresh = replace(problem, cache_seqlens=decision.cache_seqlens)
        score, select, attend = self._stages
        with section("score"):
            scores = Scores(*score(fresh))  # type: ignore[operator]  # loaded: no longer a name
        with section("select"):
            selection = Selection(*select(scores.votes, fresh))  # type: ignore[operator]  # loaded
        if memory is not None and decision is not None:
            with section("keep"):
                self._reuse.keep(problem, memory, decision, selection)
        if out is None:
            with section("out"):
                shape = (problem.B, problem.Hq, problem.Lq, problem.Dv)
                out = empty(shape, problem.q.dtype, problem.q.device)
        with section("attend"):
            attended = Attended(*attend(problem, selection, out))  # type: ignore[operator]  # loaded
        reused = self._nobody[: problem.B] if decision is None else decision.reused
        return (*attended, scores.lse, *selection, reused)

    def _rehearse(self) -> None:
        """Run once at capacity, every request absent: all memory is taken, all kernels compiled."""
        like = self._like
        nobody = torch.zeros((like.B,), dtype=torch.int32, device=like.q.device)
        problem = replace(like, cache_seqlens=nobody)
        memory = SelectionCache().memory(problem)
        with self._order.turn(), torch.no_grad(), _without_autocast(like.q.device.type):
            self._step(problem, memory, 0.9, None)
        self._workspace.seal()
        self._written = [_span(block) for block in self._workspace.blocks()]
        # Of the planned tensors nothing but shapes is needed from here on.
        self._like = replace(
            like,
            q=_stand_in(like.q),
            k_cache=_stand_in(like.k_cache),
            v_cache=_stand_in(like.v_cache),
            cache_seqlens=nobody,
            block_table=None if like.block_table is None else _stand_in(like.block_table),
            sink_logits=None if like.sink_logits is None else _stand_in(like.sink_logits),
        )

    def _check(self, problem: Problem, cache: SelectionCache | None, out: Tensor | None) -> None:
        """Raises InvalidProblem for what the plan was not made for."""
        like = self._like
        differing = [name for name in _EQUAL if getattr(problem, name) != getattr(like, name)]
        if problem.is_paged and problem.page_size != like.page_size:
            differing.append("page_size")
        planned = {name: getattr(like, name) for name in differing}
        given = {name: getattr(problem, name) for name in differing}
        for name in ("dtype", "device"):
            if getattr(problem.q, name) != getattr(like.q, name):
                planned[name], given[name] = getattr(like.q, name), getattr(problem.q, name)
        if (problem.sink_logits is None) != (like.sink_logits is None):
            words = {True: "none", False: "given"}
            planned["sink_logits"] = words[like.sink_logits is None]
            given["sink_logits"] = words[problem.sink_logits is None]
        if given:
            raise InvalidProblem(
                f"the call has {_listed(given)}; the plan was made for {_listed(planned)}",
                "calls differ from the planned problem in B, Lk and values only",
                "make another plan for it",
            )
        for name in ("B", "Lk"):
            if getattr(problem, name) > getattr(like, name):
                raise InvalidProblem(
                    f"the call has {name}={getattr(problem, name)}; "
                    f"the plan was made for {name}={getattr(like, name)}",
                    "B and Lk are at most those of the planned problem",
                    "make a plan of larger capacity",
                )
        if cache is not None:
            self._check_cache(problem, cache)
        if out is not None:
            _check_out(problem, out)
        if not torch.compiler.is_compiling():
            self._check_memory(problem, out)

    def _check_cache(self, problem: Problem, cache: SelectionCache) -> None:
        if not isinstance(cache, SelectionCache):
            raise InvalidProblem(
                f"cache is a {type(cache).__name__}",
                "cache is a tokenselect.SelectionCache or None",
                "make one a layer: SelectionCache(theta=0.9)",
            )
        if cache.max_reuse != self._like.max_reuse:
            raise InvalidProblem(
                f"cache.max_reuse={cache.max_reuse}; the plan was made for "
                f"max_reuse={self._like.max_reuse}",
                "a plan has room for as many appended tokens as its problem's max_reuse",
                "say Problem.build(..., max_reuse=cache.max_reuse)",
            )
        if problem.B != self._like.B:
            raise InvalidProblem(
                f"the call has B={problem.B} and a cache; the plan was made for B={self._like.B}",
                "with a SelectionCache every call has all requests of the plan, a row each",
                "give a request that is not there the length 0",
            )

    def _check_memory(self, problem: Problem, out: Tensor | None) -> None:
        """What is read must not be what is written: the plan's own memory, or out."""
        names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")
        given = {name: getattr(problem, name) for name in names}
        if out is not None:
            given["out"] = out
        for name, tensor in given.items():
            if tensor is None:
                continue
            first, last = _span(tensor)
            written = self._written
            if out is not None and name != "out":
                written = [*written, _span(out)]
            if any(first < end and start < last for start, end in written):
                raise InvalidProblem(
                    f"{name} shares memory with what the call writes to",
                    "a call overwrites its `out`, and what earlier calls of the plan returned",
                    "pass another out=, or clone() it",
                )


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses from x's first byte to after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start: int = x.data_ptr()
    return start, start + (reach + 1) * x.itemsize


def _stand_in(x: Tensor) -> Tensor:
    """A tensor of x's shape that takes no memory."""
    with torch.inference_mode(False):
        return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _check_out(problem: Problem, out: object) -> None:
    p = problem
    shape, dtype, device = (p.B, p.Hq, p.Lq, p.Dv), p.q.dtype, p.q.device
    came = f"out is a {type(out).__name__}"
    if isinstance(out, Tensor) and (out.shape, out.dtype, out.device) != (shape, dtype, device):
        came = f"out is {tuple(out.shape)} {out.dtype} on {out.device}"
    elif isinstance(out, Tensor) and not out.is_contiguous():
        came = f"out has strides {out.stride()}"
    elif isinstance(out, Tensor):
        return
    raise InvalidProblem(
        came,
        f"out is {shape} {dtype} on {device}, contiguous",
        "make it with torch.empty, or leave it out for the plan's own memory",
    )


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _without_autocast(device: str) -> Any:
    """Autocast would round logits to its dtype without a word."""
    return torch.autocast(device, enabled=False)


# --- the operator that torch.compile sees -------------------------------------------------


def _planned(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    sink_logits: Tensor | None,
    memory: list[Tensor],
    theta: float | None,
    with_info: bool,
    handle: int,
) -> tuple[Tensor, ...]:
    made = _plans[handle]
    problem = replace(
        made._like,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        sink_logits=sink_logits,
    )
    out = q.new_empty((problem.B, problem.Hq, problem.Lq, problem.Dv))
    made._check_memory(problem, None)
    held = Memory(*memory) if memory else None
    # What an operator returns is its own, and of a number that is laid down.
    _, *info = made._run(problem, held, theta, out, with_info)
    return out, *(info or [out.new_empty(0) for _ in Info._fields])


def _fake_planned(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, with_info, handle = rest
    out = q.new_empty((*q.shape[:3], v_cache.shape[3]))
    if not with_info:
        return out, *(q.new_empty(0) for _ in Info._fields)
    like = _plans[handle]._like
    p = replace(like, q=q, k_cache=k_cache, v_cache=v_cache, block_table=rest[1])
    rows = (p.B, p.S)
    return (
        out,
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(q.shape[:2], dtype=torch.float32),
        q.new_empty((*rows, p.K), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows[:1], dtype=torch.bool),
    )


ops.define(
    "planned",
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? sink_logits, Tensor(a!)[] memory, float? theta, bool with_info, int plan) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _planned,
    _fake_planned,
)
