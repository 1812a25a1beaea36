"""CUDA graphs: a step is captured once for its shapes, then replayed with new inputs.

A replay launches every kernel of the step at once, and runs none of its Python. So whatever differs
from call to call must be in the inputs, which are copied to where the graph reads them, or in the
key: a new key is a new capture. Before a capture the step is tried under `graph_safe`, which names
the operation that would wait for the device.
"""

import functools
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tokenselect.contract import Backend, Problem, Scores, Selection
from tokenselect.dispatch import ops, registry
from tokenselect.errors import InvalidProblem, NotCapturable
from tokenselect.plans.graph_safety import graph_safe
from tokenselect.plans.stream_order import StreamSerializer, recording_serializers
from tokenselect.scalars import is_integer, plain
from tokenselect.selection_cache import is_tried, rollback_caches


class Interface(Protocol):
    """What `Graphs` needs of CUDA. Tests put a recording of operators in its place."""

    def pool(self) -> Any:
        """Return a new pool of memory."""

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> None:
        """Run the step once outside of any capture."""

    def capture(
        self, step: Callable[[], Any], pool: Any, device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """Return what the step returned while captured, and what replays it."""


class Cuda:
    """torch.cuda's graphs."""

    def pool(self) -> Any:
        """Return a new pool of memory."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> None:
        """Run on a stream of its own, so that kernels are compiled and libraries set up."""
        if device.type != "cuda":
            raise InvalidProblem(
                f"tensors on {device}",
                "CUDA graphs are captured on a CUDA device",
                "move the tensors there, or run the step without a graph",
            )
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    step()
            finally:
                torch.cuda.current_stream().wait_stream(stream)

    def capture(
        self, step: Callable[[], Any], pool: Any, device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """Return what the step returned while captured, and the function that replays it."""
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            # torch's own context does not put the stream back if the capture fails.
            here = torch.cuda.stream(torch.cuda.current_stream())
            captured = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
            with here, captured:
                outputs = step()
        return outputs, graph.replay


def _padded(x: Tensor, rows: int) -> Tensor:
    """Return x with rows of zeros after its own."""
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))


def _cut(outputs: Any, B: int) -> Any:
    """Cut every result back to B rows."""
    return tree_map_only(Tensor, lambda x: x[:B], outputs)


def _place(error: BaseException) -> str:
    """Name the line that raised an error: the last that is neither torch's nor this library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [str(Path(module.__file__ or "").parent) for module in (torch, ops)]
    theirs = [frame for frame in frames if not frame.filename.startswith(tuple(own))]
    last = (theirs or frames)[-1]
    return f"`{last.line}` in {last.name}"


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Pool:
    """A pool of memory that several Graphs share, made when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: list[Any] = []

    def get(self) -> Any:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def drop(self) -> None:
        """Take a new one from now on: a capture that failed leaves its pool unusable."""
        self._made.clear()


# torch has one stream for captures, so there is one at a time.
_one_capture = threading.Lock()


class _Captured(NamedTuple):
    """orders: whose turns a replay takes. alive: see `Graphs.run`."""

    inputs: tuple[Tensor | None, ...]
    outputs: Any
    replay: Callable[[], None]
    orders: list[StreamSerializer]
    alive: Any


class Graphs:
    """Captured steps by key, in one pool of memory.

    batches    sizes of batch (dim 0 of every input) to capture for: a smaller one is padded with
               rows of zeros, and results are cut back. Empty: each size is captured as it comes
    limit      so many captures are kept, those used last
    interface  torch.cuda's graphs, or what stands for them in tests
    pool       of the memory that captures take
    """

    def __init__(
        self, batches: tuple[int, ...], limit: int, interface: Interface, pool: _Pool
    ) -> None:
        self.batches = tuple(sorted(batches))
        self.limit = limit
        self.captures = 0
        self._interface = interface
        self._pool = pool
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._order: StreamSerializer | None = None
        self._lock = threading.Lock()

    def bucket(self, B: int) -> int:
        """Return the batch that B requests are captured for, or raise InvalidProblem."""
        fitting = [size for size in self.batches if size >= B]
        if self.batches and not fitting:
            raise InvalidProblem(
                f"a batch of {B}, batches={self.batches}",
                "a step is captured for the sizes in batches, the largest included",
                "add a larger size to batches, or leave batches out",
            )
        return fitting[0] if fitting else B

    def run(
        self,
        key: Any,
        step: Callable[..., Any],
        inputs: tuple[Tensor | None, ...],
        rows: int | None = None,
        *,
        finish: Callable[[Any], Any] = lambda outputs: outputs,
        alive: Any = None,
    ) -> Any:
        """Replay step(*inputs), captured at the first call of its kind.

        rows: capture for so many in dim 0 of every input; None: for the shapes as they are.
        finish: what is done with the results, tensors in the graph's own memory, before anything
        else may overwrite them. Returns what it returns.
        alive: what the graph holds something made of, and key names by its address: it is kept, so
        that nothing else can come to lie there.
        While another step is tried or captured, this one becomes a part of that.
        """
        if torch.compiler.is_compiling():
            raise NotCapturable(
                "a captured step inside a function that torch.compile compiles",
                "torch.compile makes graphs of its own, with mode='reduce-overhead'",
                "compile the step, or capture it, or leave the call out of what is compiled",
            )
        (first, *_) = (x for x in inputs if x is not None)
        B = first.shape[0] if first.dim() else 1
        is_padded = rows is not None and rows > B
        if is_tried() or _is_captured(first.device):
            if is_padded:
                inputs = tuple(None if x is None else _padded(x, rows or B) for x in inputs)
            return finish(_cut(step(*inputs), B) if is_padded else step(*inputs))
        shapes = [None if x is None else _shape(x, rows) for x in inputs]
        kinds = [None if x is None else (x.dtype, x.device) for x in inputs]
        kind = (key, *shapes, *kinds)
        with self._lock:
            self._order = self._order or StreamSerializer(first.device)
        with self._order.turn(), torch.no_grad():
            found = self._captured.get(kind)
            if found is None:
                found = self._captured[kind] = self._capture(step, inputs, shapes, rows, alive)
                while len(self._captured) > self.limit:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(kind)
            with ExitStack() as turns:
                for order in found.orders:
                    turns.enter_context(order.turn())
                _fill(found.inputs, inputs)
                found.replay()
                return finish(_cut(found.outputs, B) if is_padded else found.outputs)

    def _capture(
        self,
        step: Callable[..., Any],
        inputs: tuple[Tensor | None, ...],
        shapes: list[tuple[int, ...] | None],
        rows: int | None,
        alive: Any,
    ) -> _Captured:
        """Try the step, run it once more as it is (kernels are compiled then), capture it."""
        # Not in inference mode, so that they can be written to outside of it.
        with torch.inference_mode(False):
            held = tuple(
                None if x is None or shape is None else x.new_zeros(shape)
                for x, shape in zip(inputs, shapes, strict=True)
            )
        _fill(held, inputs)
        (device, *_) = (x.device for x in held if x is not None)
        run = functools.partial(step, *held)
        with rollback_caches(is_captured=True), recording_serializers() as orders:
            versions = [None if x is None else x._version for x in held]
            with graph_safe(device):
                tried = run()
            for x in tree_leaves(tried):
                if rows is not None and isinstance(x, Tensor) and x.shape[:1] != (rows,):
                    raise InvalidProblem(
                        f"the captured step returns {tuple(x.shape)} for a batch of {rows}",
                        "with `batches`, dim 0 of every result is the batch, as it is cut back",
                        "return it with a row for each request, or leave batches out",
                    )
            for place, (x, before) in enumerate(zip(held, versions, strict=True)):
                if x is not None and x._version != before:
                    raise InvalidProblem(
                        f"the captured step writes to its argument {place}",
                        "arguments are copies for the graph: what is written there is lost",
                        "return it, or use a tensor that the step does not take as an argument",
                    )
            self._interface.warm_up(run, device)
            try:
                with ExitStack() as turns:
                    for order in sorted(orders, key=id):
                        turns.enter_context(order.turn())
                    turns.enter_context(_one_capture)
                    outputs, replay = self._interface.capture(run, self._pool.get(), device)
            except Exception as failed:
                self._pool.drop()
                # What ends a capture that failed raises in its turn.
                error = failed.__context__ if failed.__context__ is not None else failed
                if isinstance(error, NotCapturable):
                    raise error from None
                said = str(error).splitlines() or [type(error).__name__]
                raise NotCapturable(
                    f"the step, at {_place(error)},",
                    f"CUDA refused the capture: {said[0]}",
                    "the error above this one says more; run the step without a graph to find out",
                ) from error
        self.captures += 1
        return _Captured(held, outputs, replay, orders, alive)


def _shape(x: Tensor, rows: int | None) -> tuple[int, ...]:
    return tuple(x.shape) if rows is None else (rows, *x.shape[1:])


def _fill(held: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> None:
    """Copy inputs to where a graph reads them; absent rows are zeros."""
    for place, given in zip(held, inputs, strict=True):
        if place is None or given is None:
            continue
        if place.shape == given.shape:
            place.copy_(given)
        else:
            B = given.shape[0]
            place[:B].copy_(given)
            place[B:].zero_()


def capture(
    step: Callable[..., Any],
    *,
    batches: Iterable[int] = (),
    limit: int = 64,
    interface: Interface | None = None,
) -> Callable[..., Any]:
    """Return a function that replays `step` as one CUDA graph: layers, or a whole decode step.

    step       a function of tensors that returns a tensor or a tuple of them. Its arguments are
               copied to where the graph reads them. Every other tensor that it uses (weights, KV
               caches, Selection Caches) is read and written where it was at the first call: it
               must stay there, alive, and keep its shape.
    batches    if given, dim 0 of every argument and result is the batch: it is padded with rows of
               zeros (a request of length 0 is absent) to the next of these sizes
    limit      so many captures, one for each combination of shapes, are kept

    At the first call for each combination of shapes the step runs twice before it is captured, and
    what Selection Caches learn in that is undone; the step must be able to run again on the same
    inputs, and must not write to them. Results are the graphs' memory: the next call overwrites it.

    interface  of tests: what stands for torch.cuda's graphs

    Raises NotCapturable, which names the operation, for a step that waits for the device, and
    InvalidProblem for tensors that are not on a CUDA device.
    """
    graphs = _maker(batches, limit, interface)()

    @functools.wraps(step)
    def replayed(*inputs: Tensor) -> Any:
        if not inputs:
            raise InvalidProblem(
                "the captured step was given no tensor",
                "what differs from call to call comes as arguments, lengths at least",
                "pass the tensors that change; the rest is read where it lies",
            )
        for place, x in enumerate(inputs):
            if not isinstance(x, Tensor) or (x.dim() == 0 and graphs.batches):
                came = "has no dimension" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
                raise InvalidProblem(
                    f"argument {place} of the captured step {came}",
                    "a captured step takes tensors, with the batch first if there are `batches`",
                    "bind everything else before: capture(functools.partial(step, ...))",
                )
        sizes = {x.shape[0] for x in inputs} if graphs.batches else set()
        if len(sizes) > 1:
            raise InvalidProblem(
                f"arguments of the captured step with {sorted(sizes)} rows",
                "with `batches`, dim 0 of every argument is the batch",
                "give every argument a row for each request",
            )
        rows = graphs.bucket(sizes.pop()) if sizes else None
        return graphs.run(None, step, inputs, rows)

    replayed.graphs = graphs  # type: ignore[attr-defined]
    return replayed


def _maker(batches: Iterable[int], limit: int, interface: Interface | None) -> Callable[[], Graphs]:
    """Return what makes Graphs that share one pool of memory."""
    batches, limit = tuple(map(plain, batches)), plain(limit)
    used = Cuda() if interface is None else interface
    for size in (*batches, limit):
        if not is_integer(size) or size < 1:
            raise InvalidProblem(
                f"batches={batches}, limit={limit!r}",
                "batches are integers of 1 or more, and so is limit",
                "say batches=(1, 2, 4, 8), or leave them out",
            )
    return functools.partial(Graphs, batches, limit, used, _Pool(used.pool))


def cuda_graph(
    backend: Backend | str = "triton",
    *,
    name: str = "cuda_graph",
    batches: Iterable[int] = (),
    limit: int = 64,
    interface: Interface | None = None,
) -> Backend:
    """Return a backend that captures what `backend` does into CUDA graphs, and replays them.

    A plan of it is one graph: `tokenselect.plan(problem, backend="cuda_graph")`. New queries,
    lengths and block tables are copied in; caches are read where they lie, so another cache is
    another capture. Without a plan each stage is a graph of its own, and results are copied out.

    backend  one whose stages can be planned, or its name
    name     what to register it under, if not as the built-in one
    batches  for plans over paged caches: see `capture`
    limit    so many captures are kept, those used last
    interface  of tests: what stands for torch.cuda's graphs

    Raises InvalidProblem if `backend` cannot be planned.
    """
    inner = registry.load(backend) if isinstance(backend, str) else registry.resolved(backend)
    if inner.static is None:
        raise InvalidProblem(
            f"cuda_graph({inner.name!r})",
            "only a backend whose stages can be planned can be captured: its `static` is not None",
            "give it planned stages, or name another backend",
        )
    of_stages = _maker((), limit, interface)()
    devices = ("cuda",) if interface is None else inner.capability.devices
    planned: Any = inner.static

    def candidates_only(problem: Problem) -> Scores:
        return _minus_infinity_elsewhere(planned.score(problem), problem)

    def into_new_memory(problem: Problem, selection: Selection) -> Any:
        return planned.attend(problem, selection, None)

    def captured(stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*given: Any) -> Any:
            key, inputs, rebuilt = _split(given)
            (rope,) = (x.rope for x in given if isinstance(x, Problem))
            return of_stages.run(
                (stage, key),
                lambda *held: run(*rebuilt(held)),
                inputs,
                finish=lambda results: tree_map_only(Tensor, torch.clone, results),
                alive=rope,
            )

        return replayed

    return Backend(
        name,
        replace(inner.capability, devices=devices),
        score=captured("score", candidates_only),
        select=captured("select", planned.select),
        attend=captured("attend", into_new_memory),
        static=inner.static,
        reuse=inner.reuse,
        replays=_maker(batches, limit, interface),
        lenders=inner.lenders,
    )


def _minus_infinity_elsewhere(scores: Scores, problem: Problem) -> Scores:
    """Return static scores, -inf outside the candidates, where they may hold anything."""
    votes, lse = scores
    c, place = problem.config, torch.arange(problem.Lk, device=votes.device)
    n = problem.cache_seqlens.clamp(0, problem.Lk)[:, None, None, None]
    local_start = (n - problem.Lq + 1 - c.n_local).clamp(min=0)
    outside = (place < local_start.clamp(max=c.n_sink)) | (place >= local_start)
    return Scores(votes.masked_fill(outside, -torch.inf), lse)


_COPIED = ("q", "cache_seqlens", "block_table")


def address(x: Tensor | None) -> Any:
    """Return what a graph remembers of a tensor that it does not copy."""
    return None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)


def setting(problem: Problem) -> Any:
    """Return what a graph remembers of a problem, besides the tensors that are copied."""
    p, rope = problem, problem.rope
    turning = None
    if rope is not None:
        version = None if rope.inv_freq.is_inference() else rope.inv_freq._version
        turning = (address(rope.inv_freq), version, rope.interleaved, rope.cached, rope.scaling)
    read = address(p.k_cache), address(p.v_cache), address(p.sink_logits)
    return (*read, turning, p.scale, p.softcap, p.max_reuse, p.config)


def _split(given: tuple[Any, ...]) -> tuple[Any, tuple[Tensor | None, ...], Callable[..., Any]]:
    """Split a stage's arguments into a key, tensors to copy, and what puts them together."""
    (problem,) = (x for x in given if isinstance(x, Problem))
    inputs: list[Tensor | None] = [getattr(problem, name) for name in _COPIED]
    for x in given:
        if not isinstance(x, Problem):
            inputs += [x] if isinstance(x, Tensor) else list(x)

    def rebuilt(held: tuple[Tensor | None, ...]) -> list[Any]:
        copied, rest = dict(zip(_COPIED, held, strict=False)), list(held[len(_COPIED) :])
        parts: list[Any] = []
        for x in given:
            if isinstance(x, Problem):
                parts.append(replace(x, **copied))  # type: ignore[arg-type]
            elif isinstance(x, Tensor):
                parts.append(rest.pop(0))
            else:
                parts.append(Selection(*[rest.pop(0) for _ in x]))  # type: ignore[arg-type]
        return parts

    return setting(problem), tuple(inputs), rebuilt


def __getattr__(name: str) -> Any:
    if name == "BACKEND":  # made when it is asked for, since that imports triton
        return cuda_graph("triton")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
