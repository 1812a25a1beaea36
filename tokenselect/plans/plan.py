"""A plan: the memory for a capacity, taken once, and then attention any number of times."""

import secrets
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from tokenselect.api import AttentionInfo, info_of
from tokenselect.contract import CacheState, Problem
from tokenselect.contract.rules import check_out, refuse_grad
from tokenselect.dispatch import registry
from tokenselect.dispatch.ranks import Ranks, sharing_heads, with_heads_of_all
from tokenselect.dispatch.step import Step, run_step, without_autocast
from tokenselect.errors import InvalidProblem
from tokenselect.plans.cuda_graph import address, setting
from tokenselect.plans.operator import PLANS, extent, with_tensors
from tokenselect.plans.stream_order import StreamSerializer
from tokenselect.scratch import Scratch, empty
from tokenselect.selection_cache import SelectionCache, used

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What every call has in common with the problem that was planned.
_EQUAL = ("Lq", "Hq", "Hkv", "D", "Dv")


def plan(
    problem: Problem,
    backend: str = "auto",
    *,
    process_group: "ProcessGroup | None" = None,
) -> "Plan":
    """Plan attention for problems like this one, and smaller: see `Plan`.

    problem  gives the settings, the capacity (its B requests and its Lk tokens), and dtypes, layout
             and device. No value in its tensors matters. With a SelectionCache, say the cache's
             max_reuse in Problem.build.
    backend  a registered name, which never falls back, or "auto"; chosen here, once
    process_group
             ranks that hold other heads of the layer, as many each: every rank makes the same
             plans in the same order, and calls them so

    >>> from tokenselect import SelectConfig
    >>> q, cached = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 99, 64)
    >>> like = Problem.build(q, cached, cached, SelectConfig(k=16, n_sink=4, n_local=8))
    >>> step = plan(like, backend="cpu")
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
    group = None if process_group is None else sharing_heads(problem, process_group)
    return Plan(problem, registry.resolve(backend, problem, static=True), group)


class Plan:
    """Attention whose memory, backend and settings are fixed. Made by `tokenselect.plan`.

    A call allocates nothing and waits for nothing, so it can be captured in a CUDA graph; lengths,
    block tables and tensors may differ from call to call within the capacity. One plan serves any
    number of layers of one model, one after the other, each with a SelectionCache of its own.

    backend  the name of the backend
    bytes    of the memory that it holds
    """

    def __init__(self, problem: Problem, backend: str, group: str | None = None) -> None:
        chosen = registry.load(backend)
        assert chosen.static is not None  # resolve saw to it
        rope = problem.rope
        if rope is not None:
            # The plan's own: it does not change, and tables made for it stay. Not in inference
            # mode, in which a tensor does not tell whether it was changed.
            with torch.inference_mode(False):
                rope = replace(rope, inv_freq=rope.inv_freq.clone())
        self.backend = backend
        self._stages = chosen.static
        self._reuse = registry.reuse_of(chosen)
        self._group = group
        self._ranks = None if group is None else Ranks(group)
        self._like = replace(problem, rope=rope)
        self._scratch = Scratch()
        self._nobody = torch.zeros((problem.B,), dtype=torch.bool, device=problem.q.device)
        self._order = StreamSerializer(problem.q.device)
        self._graphs = None if chosen.replays is None else chosen.replays()
        self._checked: dict[Any, list[int]] = {}
        # Unlike any other process's: programs that were exported or cached hold it as a number.
        self._handle = secrets.randbits(62)
        PLANS[self._handle] = self
        self._warm_up()

    @property
    def bytes(self) -> int:
        """Bytes of the memory that it holds."""
        return self._scratch.bytes

    def __repr__(self) -> str:
        return f"Plan({self._like.describe()}; {self.backend}, {self.bytes} bytes)"

    def __deepcopy__(self, memo: Any) -> "Plan":
        """Return a plan for the same with its own memory: models that hold plans can be copied."""
        return Plan(self._like, self.backend, self._group)

    def prepare(self, *caches: SelectionCache) -> None:
        """Make the state of SelectionCaches, which then stays where it is, with room for this plan.

        A call does so too; but what torch.compile compiles cannot, and a cache for several plans
        has to be prepared for the one with the largest K first: the one with most queries.
        """
        for cache in caches:
            self._check_cache(self._like.B, cache)
            self._state(cache)

    def _state(self, cache: SelectionCache) -> CacheState:
        """Return the state of a cache, which the plan then holds on to."""
        return cache.state(self._of_all(self._like), stays=True)

    def _of_all(self, problem: Problem) -> Problem:
        """Return the problem, with as many heads as its ranks have together."""
        return problem if self._ranks is None else with_heads_of_all(problem, self._ranks.size)

    @overload
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
        return_info: Literal[False] = False,
    ) -> Tensor: ...

    @overload
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
        return_info: Literal[True],
    ) -> tuple[Tensor, AttentionInfo]: ...

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
    ) -> Tensor | tuple[Tensor, AttentionInfo]:
        """Attend: see `tokenselect.attention`, with the settings of the plan.

        q              (B, Hq, Lq, D), B at most the plan's
        k_cache, v_cache
                       (B, Hkv, Lk, D) and Dv, or paged; Lk at most the plan's
        cache_seqlens  (B,) int32. Not checked, which would read it: a value out of range gives
                       nonsense for that request, and reads and writes nothing out of bounds
        block_table, sink_logits
                       as in `attention`, each if the planned problem has one
        cache          a SelectionCache with the plan's max_reuse; then B is the plan's, and an
                       absent request has length 0
        out            (B, Hq, Lq, Dv) contiguous, in q's dtype: written to and returned
        return_info    also return an `AttentionInfo`, which allocates: its tensors are its own

        Without `out`, the result is the plan's own memory: the next call overwrites it. (Inside
        torch.compile, it is a tensor of its own.) Raises InvalidProblem.
        """
        given = q, k_cache, v_cache, cache_seqlens, block_table, sink_logits, out
        self._check(given, cache)
        like = self._like
        problem = with_tensors(like, *given[:-1])
        # Of the plan's K, so that it never moves.
        state = None if cache is None else self._state(cache)
        theta = None if cache is None else cache.theta
        if torch.compiler.is_compiling():
            result, *info = torch.ops.tokenselect.plan_step(
                *given[:-1],
                *([] if state is None else list(state.tensors()), theta, return_info, self._handle),
            )
            result = result if out is None else out.copy_(result)
        else:
            result, *info = self._run(problem, state, theta, out, return_info)
        if not return_info:
            return result  # type: ignore[no-any-return]
        return result, info_of(problem, Step(result, *info), self.backend)

    def _run(
        self,
        problem: Problem,
        state: CacheState | None,
        theta: float | None,
        out: Tensor | None,
        with_info: bool,
    ) -> list[Tensor]:
        """Return out alone, in the plan's memory if it was not given.

        With info, return all of a `Step`, the rest of it in memory of its own.
        """

        def finish(done: tuple[Tensor, ...]) -> list[Tensor]:
            result = done[0] if out is None or done[0] is out else out.copy_(done[0])
            return [result, *(x.clone() for x in done[1:] if with_info)]

        with self._order.turn(), torch.no_grad(), without_autocast(problem.q.device.type):
            if self._graphs is None:
                return finish(self._step(problem, state, theta, out))
            return self._replayed(self._graphs, problem, state, theta, finish)

    def _replayed(
        self,
        graphs: Any,
        problem: Problem,
        memory: CacheState | None,
        theta: float | None,
        finish: Callable[[tuple[Tensor, ...]], list[Tensor]],
    ) -> list[Tensor]:
        """Replay the step, captured for a batch that may be larger."""
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
        self, problem: Problem, state: CacheState | None, theta: float | None, out: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Run the stages, each in its own memory. Returns a `Step`, `reused` always a tensor."""
        if state is not None:
            used(state)
        section = self._scratch.section
        if out is None:
            with section("out"):
                shape = (problem.B, problem.Hq, problem.Lq, problem.Dv)
                out = empty(shape, problem.q.dtype, problem.q.device)
        stages = SimpleNamespace(**self._stages._asdict())
        for name in ("attend", "attend_fresh", "attend_cached"):
            stage = getattr(stages, name)
            setattr(stages, name, stage and partial(_into, stage, out))
        *done, reused = run_step(problem, stages, self._reuse, state, theta, section, self._ranks)
        return (*done, self._nobody[: problem.B] if reused is None else reused)

    def _warm_up(self) -> None:
        """Run once at capacity, every request absent: all memory is taken, all kernels compiled."""
        like = self._like
        nobody = torch.zeros((like.B,), dtype=torch.int32, device=like.q.device)
        problem = replace(like, cache_seqlens=nobody)
        if self._ranks is not None:
            self._ranks.check(problem)
        memory = SelectionCache().state(self._of_all(problem))
        with self._order.turn(), torch.no_grad(), without_autocast(like.q.device.type):
            self._step(problem, memory, 0.9, None)
            self._step(problem, None, None, None)
        self._scratch.seal()
        self._written = sorted(
            (block.data_ptr(), block.data_ptr() + block.numel()) for block in self._scratch.blocks()
        )
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

    def _check(self, given: tuple[Tensor | None, ...], cache: SelectionCache | None) -> None:
        """Raise InvalidProblem for what the plan was not made for.

        Tensors of the same shapes, strides, dtypes and devices as in a call before were checked in
        that; where they lie may differ each time.
        """
        if torch.compiler.is_compiling():
            self._check_kind(given, cache)
            return
        kind: Any = tuple(
            None
            if x is None
            else (
                *(x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_inference()),
                x.is_neg(),
            )
            for x in given
            if x is None or isinstance(x, Tensor)
        )
        kind = (*kind, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        sizes = self._checked.get(kind)
        if sizes is None:
            self._check_kind(given, cache)
            if len(self._checked) >= _KINDS:  # of a capacity that is asked for in many sizes
                self._checked.clear()
            sizes = self._checked[kind] = [0 if x is None else extent(x) for x in given]
        elif cache is not None:
            self._check_cache(given[0].shape[0], cache)  # type: ignore[union-attr]  # checked
        self._check_memory(given, sizes)

    def _check_kind(self, given: tuple[Tensor | None, ...], cache: SelectionCache | None) -> None:
        """Check what shapes, dtypes and devices show."""
        q, k_cache, v_cache, cache_seqlens, block_table, sink_logits, out = given
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
            q,  # type: ignore[arg-type]  # build says what is wrong with them
            k_cache,  # type: ignore[arg-type]
            v_cache,  # type: ignore[arg-type]
            like.config,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            scale=like.scale,
            softcap=like.softcap,
            sink_logits=sink_logits,
            rope=like.rope,
            max_reuse=like.max_reuse,
        )
        self._check_sizes(problem)
        for name, x in zip(_INPUTS, given, strict=False):
            # torch.compile traces no is_neg, and inductor reads such views as they lie in any code.
            if x is not None and not torch.compiler.is_compiling() and x.is_neg():
                raise InvalidProblem(
                    f"{name} is a view that is to be negated when it is read",
                    "a plan's kernels read memory as it is",
                    f"pass {name}.resolve_neg()",
                )
        if cache is not None:
            self._check_cache(problem.B, cache)
        if out is not None:
            check_out(problem, out)
        refuse_grad(problem)

    def _check_sizes(self, problem: Problem) -> None:
        """Raise InvalidProblem for other sizes, dtypes or devices than were planned."""
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

    def _check_cache(self, B: int, cache: SelectionCache) -> None:
        """Raise InvalidProblem for a SelectionCache that does not fit the plan."""
        if not isinstance(cache, SelectionCache):
            raise InvalidProblem(
                f"cache is a {type(cache).__name__}",
                "cache is a tokenselect.SelectionCache or None",
                "make one per layer: SelectionCache(theta=0.9)",
            )
        if cache.max_reuse != self._like.max_reuse:
            raise InvalidProblem(
                f"cache.max_reuse={cache.max_reuse}; the plan was made for "
                f"max_reuse={self._like.max_reuse}",
                "a plan has room for as many appended tokens as its problem's max_reuse",
                "say Problem.build(..., max_reuse=cache.max_reuse)",
            )
        if self._like.B != B:
            raise InvalidProblem(
                f"the call has B={B} and a cache; the plan was made for B={self._like.B}",
                "with a SelectionCache every call has all requests of the plan, one row each",
                "give an absent request the length 0",
            )

    def _check_memory(self, given: tuple[Tensor | None, ...], sizes: list[int]) -> None:
        """Reject inputs that alias the scratch memory or `out`."""
        *inputs, out = (
            None if x is None else (x.data_ptr(), x.data_ptr() + size)
            for x, size in zip(given, sizes, strict=True)
        )
        for name, span in zip((*_INPUTS, "out"), (*inputs, out), strict=True):
            if span is None:
                continue
            last = bisect_right(self._written, (span[1], 0)) - 1
            overlaps = last >= 0 and self._written[last][1] > span[0]
            if out is not None and name != "out":
                overlaps = overlaps or (out[0] < span[1] and span[0] < out[1])
            if overlaps:
                raise InvalidProblem(
                    f"{name} shares memory with what the call writes to",
                    "a call overwrites its `out`, and what earlier calls of the plan returned",
                    "pass another out=, or clone() it",
                )


_INPUTS = "q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits"
# So many kinds of call (shapes, strides, dtypes) are remembered as checked.
_KINDS = 256


def _into(stage: Callable[..., Any], out: Tensor, *given: Any) -> Any:
    """Run a stage that takes `out` last."""
    return stage(*given, out)


def _stand_in(x: Tensor) -> Tensor:
    """Return a tensor of x's shape that takes no memory."""
    with torch.inference_mode(False):
        return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
