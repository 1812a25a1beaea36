"""The Selection Cache: keep a selection while consecutive queries are alike (paper, algorithm 1).

A reused selection is the stored positions and every position appended since, so no token is ever
lost between the window and the selection. All state is tensors on the problem's device, which stay
where they are; who decides what is reused, and on what grounds: `tokenselect.reference.reuse`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import CONFIG_NAMES, CacheState, Problem
from tokenselect.errors import InvalidProblem, NotCapturable
from tokenselect.scalars import is_integer, is_number, plain


class SelectionCache:
    """The last selection of one attention layer, for each request of a batch, to be reused.

    theta      reuse where the cosine between the mean query of this call and that of the stored
               selection, over all heads, is at least theta, in [-1, 1]; None never reuses
    max_reuse  at most this many tokens may have been appended since

    A request reuses if also only new tokens were appended since its selection was made (an
    overwritten or cropped position selects again) and the result fits the capacity K, which
    only a selection made by a longer call can exceed. The caller owns it: one per layer, `reset`
    when a row of the batch is given to another request.

    >>> cache = SelectionCache(theta=0.9)
    >>> cache.theta, cache.max_reuse
    (0.9, 64)
    """

    def __init__(self, theta: float | None = 0.9, max_reuse: int = 64) -> None:
        self.theta = theta
        self.max_reuse = max_reuse
        self._geometry: dict[str, Any] | None = None
        self._memory: CacheState | None = None
        self._stays = False

    def __repr__(self) -> str:
        state = (
            "not used yet" if self._memory is None else f"B={len(self._memory.seqlen_at_selection)}"
        )
        return f"SelectionCache(theta={self.theta}, max_reuse={self.max_reuse}; {state})"

    @property
    def theta(self) -> float | None:
        """The least cosine at which a selection is reused; setting it checks it."""
        return self._theta

    @theta.setter
    def theta(self, theta: float | None) -> None:
        theta = plain(theta)
        if theta is not None and not (is_number(theta) and -1 <= theta <= 1):
            raise InvalidProblem(
                f"theta={theta!r}",
                "theta is a cosine in [-1, 1], or None for no reuse",
                "pass the paper's 0.9",
            )
        self._theta = theta

    @property
    def max_reuse(self) -> int:
        """How many tokens may have been appended at the most; setting it checks it."""
        return self._max_reuse

    @max_reuse.setter
    def max_reuse(self, max_reuse: int) -> None:
        max_reuse = plain(max_reuse)
        if not (is_integer(max_reuse) and 0 <= max_reuse < 2**31):
            raise InvalidProblem(
                f"max_reuse={max_reuse!r}",
                "max_reuse is an integer, 0 <= max_reuse < 2**31",
                "pass how many tokens may be appended before selecting again",
            )
        self._max_reuse = max_reuse

    @property
    def hits(self) -> Tensor:
        """(B,) int64 on the device: how often each request reused its selection."""
        return self._used().hits

    @property
    def misses(self) -> Tensor:
        """(B,) int64 on the device: how often each request selected again."""
        return self._used().misses

    def state(self, problem: Problem, *, stays: bool = False) -> CacheState:
        """Return the state that a backend's `Reuse` reads and writes; the first call makes it.

        Later calls get the same tensors, but for positions if a call has a larger K. Once asked for
        with stays=True, or while a step is captured, no tensor moves any more: a plan or a graph
        may hold on to them. See `Plan.prepare`.
        Raises InvalidProblem if the cache was made by another layer, batch or configuration, or
        has no room for K and must not move.
        """
        geometry = {
            "B": problem.B,
            "Hq": problem.Hq,
            "Hkv": problem.Hkv,
            "D": problem.D,
            "Dv": problem.Dv,
            "dtype": problem.q.dtype,
            "scale": problem.scale,
            "softcap": problem.softcap,
            "device": problem.q.device,
        } | {name: getattr(problem.config, name) for name in CONFIG_NAMES}
        if self._geometry is None or self._memory is None:
            _refuse_in_a_capture(problem, stays)
            positions = problem.q.new_empty((0, problem.S, problem.K), dtype=torch.int32)
            self._memory = _nothing_stored(positions, problem.B, problem.Hq * problem.D)
            self._geometry = geometry
        for name, value in geometry.items():
            if self._geometry[name] != value:
                fix = "make one cache per layer, or cache.reset() before another use"
                if self._stays:
                    fix = "make another cache; this one is in use by a plan or a graph and stays so"
                raise InvalidProblem(
                    f"cache holds selections made with {name}={self._geometry[name]}, "
                    f"this call has {name}={value}",
                    "a SelectionCache serves one layer, one batch and one configuration",
                    fix,
                )
        missing = problem.K - self._memory.positions.shape[2]
        if missing > 0:
            _refuse_in_a_capture(problem, stays)
            if self._stays:
                raise InvalidProblem(
                    f"cache has room for selections of K={problem.K - missing}, and is in use by "
                    f"a plan or a graph; this call has K={problem.K}",
                    "what a plan or a graph uses must not move",
                    "make a new SelectionCache, and plan.prepare(cache) for the largest first",
                )
            with torch.inference_mode(False):
                wider = self._memory.positions.new_full((problem.B, problem.S, problem.K), -1)
            wider[:, :, :-missing] = self._memory.positions
            self._memory.positions = _kept_in_place(wider)
        self._stays = self._stays or stays
        self._is_used(self._memory)
        return self._memory

    def reset(self, b: int | Tensor | None = None) -> None:
        """Forget request b, those that a (B,) bool tensor marks, or (None) all of them.

        All of them, and not in use by a plan or a graph: another layer or batch may then use it.
        """
        if b is None and not self._stays and not is_tried():
            self._geometry, self._memory = None, None
        b = plain(b)
        if self._memory is not None:
            if b is not None:
                _check_request(b, self._memory.seqlen_at_selection)
            self._is_used(self._memory)
            for tensor in (
                self._memory.seqlen_at_selection,
                self._memory.hits,
                self._memory.misses,
            ):
                if isinstance(b, Tensor):
                    tensor.masked_fill_(b, 0)
                else:
                    (tensor if b is None else tensor[b : b + 1]).zero_()

    def crop(self, lengths: Tensor) -> None:
        """Drop what saw tokens beyond `lengths` (B,), to which the requests were cut back.

        An appended token is attended to anyway, so a selection made at or before the cut stays.
        """
        if self._memory is not None:
            seen = self._memory.seqlen_at_selection
            _check_rows("lengths", lengths, seen)
            self._is_used(self._memory)
            seen.masked_fill_(seen > lengths, 0)

    def reorder(self, order: Tensor) -> None:
        """Make row b what row order[b] (B,) was: for beams, or a batch put together again."""
        if self._memory is not None:
            _check_rows("order", order, self._memory.seqlen_at_selection)
            self._is_used(self._memory)
            tensors = self._memory.tensors()
            try:
                picked = [tensor.index_select(0, order) for tensor in tensors]
            except IndexError:  # on a GPU, an assertion of the device
                raise InvalidProblem(
                    f"order={order.tolist()}, the cache holds B={len(order)} requests",
                    "every entry is the number of a request, 0 <= row < B",
                    "say for each row which row it was",
                ) from None
            for tensor, rows in zip(tensors, picked, strict=True):
                tensor.copy_(rows)

    def resize(self, B: int) -> None:
        """Serve batches of B requests from here on: the first B stay, more have nothing stored."""
        if not is_integer(B) or B < 1:
            raise InvalidProblem(
                f"resize({B!r})", "a batch has one request or more", "pass an int of 1 or more"
            )
        if self._memory is None or self._geometry is None:
            return
        if self._stays or is_tried():
            raise InvalidProblem(
                f"resize({B}) of a cache that a plan or a graph uses",
                "what a plan or a graph uses must not move",
                "make another SelectionCache",
            )
        before = self._memory
        self._memory = _nothing_stored(before.positions, B, before.query.shape[1])
        for to, held in zip(self._memory.tensors(), before.tensors(), strict=True):
            to[: len(held)] = held[:B]
        self._geometry["B"] = B

    def _is_used(self, memory: CacheState) -> None:
        """Note that a step reads or writes the state: what is captured meanwhile holds on to it."""
        if not torch.compiler.is_compiling():
            is_held = getattr(_tried, "is_captured", False) or _is_captured(
                memory.seqlen_at_selection
            )
            self._stays = self._stays or is_held
            used(memory)

    def _used(self) -> CacheState:
        if self._memory is None:
            raise InvalidProblem(
                "this SelectionCache has not been used yet, or was reset",
                "its state exists from the first attention call on",
                "call attention(..., cache=cache) first",
            )
        return self._memory


# Inside `rollback_caches`, in its thread: the memories in use, and what they held before.
_tried = threading.local()


@contextmanager
def rollback_caches(*, is_captured: bool = False) -> Iterator[None]:
    """Put Selection Caches back at the end to what they held before: for a step that is only tried.

    is_captured: a graph is made inside, which will go on to use their tensors.
    """
    outer, was_captured = getattr(_tried, "held", None), getattr(_tried, "is_captured", False)
    _tried.held = held = {} if outer is None else outer
    _tried.is_captured = was_captured or is_captured
    try:
        yield
    finally:
        _tried.held, _tried.is_captured = outer, was_captured
        if outer is None:
            for memory, copies in held.values():
                for tensor, copy in zip(memory.tensors(), copies, strict=True):
                    # A memory that got more places meanwhile keeps them.
                    tensor[..., : copy.shape[-1]].copy_(copy)


def is_tried() -> bool:
    """Say whether this is inside `rollback_caches`."""
    return getattr(_tried, "held", None) is not None


def used(memory: CacheState) -> None:
    """Note that `memory` is about to be written to: `rollback_caches` puts it back."""
    # What is compiled has run as it is written before, which noted it.
    if is_tried() and not torch.compiler.is_compiling():
        # By address: torch.compile hands on the tensors, and not the CacheState.
        held: dict[int, tuple[CacheState, list[Tensor]]] = _tried.held
        at = memory.seqlen_at_selection.data_ptr()
        if at not in held:
            held[at] = memory, [tensor.clone() for tensor in memory.tensors()]


def _refuse_in_a_capture(problem: Problem, stays: bool) -> None:
    """Refuse to make state inside a capture: each replay would make it again, empty."""
    if torch.compiler.is_compiling() and (stays or problem.q.device.type == "cuda"):
        raise InvalidProblem(
            "a SelectionCache is first used, or with a larger K, inside torch.compile",
            "its state is made outside, or it would lie in the memory of a graph",
            "call plan.prepare(cache) before, or the function once without torch.compile",
        )
    if not torch.compiler.is_compiling() and _is_captured(problem.q):
        raise NotCapturable(
            "the first use of a SelectionCache, or one with a larger K,",
            "its state is made before the capture, so that replays find what they kept",
            "run the step once before, or let tokenselect.capture do so",
        )


def _is_captured(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _nothing_stored(like: Tensor, B: int, width: int) -> CacheState:
    """Return the empty state of B requests.

    like   positions (any number, S, K) int32, on the device
    width  Hq * D
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return _kept_in_place(torch.zeros(shape, dtype=dtype, device=like.device))

    S, K = like.shape[1:]
    # State made in inference mode could not be updated outside of it.
    with torch.inference_mode(False):
        return CacheState(
            query=zeros(B, width, dtype=torch.float32),
            positions=zeros(B, S, K).fill_(-1),
            count=zeros(B, S),
            seqlen_at_selection=zeros(B),
            hits=zeros(B, dtype=torch.int64),
            misses=zeros(B, dtype=torch.int64),
        )


def _kept_in_place(state: Tensor) -> Tensor:
    """Do what torch._dynamo.mark_static_address does, without importing the whole compiler."""
    state._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return state


def _check_request(b: int | Tensor, rows: Tensor) -> None:
    """Raise InvalidProblem unless b names requests of the cache."""
    B = len(rows)
    if isinstance(b, Tensor):
        holds, came = b.shape == (B,) and b.dtype == torch.bool, _shape_of(b)
    else:
        holds, came = is_integer(b) and 0 <= b < B, f"={b!r}"
    if not holds:
        raise InvalidProblem(
            f"reset: b{came}, the cache holds B={B} requests",
            "b is the number of a request, 0 <= b < B, or a (B,) bool tensor, or None for all",
            "pass the row of the batch that another request will take",
        )


def _check_rows(name: str, given: Tensor, rows: Tensor) -> None:
    """Raise InvalidProblem unless `given` is (B,) integers."""
    integers = (torch.int32, torch.int64)
    if not isinstance(given, Tensor) or given.shape != rows.shape or given.dtype not in integers:
        raise InvalidProblem(
            f"{name}{_shape_of(given)}, the cache holds B={len(rows)} requests",
            f"{name} is a (B,) tensor of integers, one per request",
            "give every row of the batch an entry",
        )


def _shape_of(given: object) -> str:
    if isinstance(given, Tensor):
        return f" is {tuple(given.shape)} {given.dtype}"
    return f" is a {type(given).__name__}"
