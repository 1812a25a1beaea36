"""Memory that tells: canaries on both sides of what a kernel is given, poison where it must write.

The triton backend gets all its memory from one function, `launch.empty`. Under `watched` that
function lends tensors between margins of a pattern, filled with what a kernel must not rely on,
and inputs are copied in between such margins. After a stage every margin and every input has to be
as it was; what a stage is to write to, only its margins, and it is copied back. Under `run_twice`
two kinds of poison have to give bit-identical results.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tokenselect import Backend, Selection
from tokenselect.conformance.devices import carried, moved
from tokenselect.contract import CacheState, Reuse, ReuseDecision, StaticStages
from tokenselect.dispatch import registry

# In float32 and in half of the 16-bit floats it is a NaN with a payload that no arithmetic makes;
# as int32 it is far outside of any cache.
CANARY = 0x7FC5A5A5
MARGIN = 4096  # bytes on each side; a multiple of any alignment that torch gives
# Inputs of more bytes are not copied: a cache of gigabytes is mostly not there at all.
LARGE = 2**26


class Touched(AssertionError):
    """A kernel wrote where it may not."""


class Guard:
    """Lends memory, and tells whether it was used as it should be."""

    def __init__(self, poison: int) -> None:
        self.poison = poison
        self._lent: list[tuple[str, Tensor, int, Tensor | None]] = []

    def empty(
        self, shape: int | tuple[int, ...], dtype: torch.dtype, device: Any, what: str = "a buffer"
    ) -> Tensor:
        """Stands in for `launch.empty`: a contiguous tensor, poisoned."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = torch.Size(shape).numel() * dtype.itemsize
        words = -(-size // 4) + 2 * MARGIN // 4
        memory = torch.full((words,), CANARY, dtype=torch.int32, device=device)
        inner = torch.empty(0, dtype=dtype, device=device)
        inner.set_(memory.untyped_storage(), MARGIN // dtype.itemsize, shape)
        poisoned(inner, self.poison)
        name = f"{what} {shape} {dtype}".replace("torch.", "")
        self._lent.append((name, memory, size, None))
        return inner

    def lend(self, x: Tensor) -> Tensor:
        """A copy of a flat tensor between margins, to be written to."""
        return self.empty(tuple(x.shape), x.dtype, x.device, "an argument").copy_(x)

    def copy(self, x: Tensor) -> Tensor:
        """A copy of a flat tensor between margins, which nobody may write to."""
        if x.numel() * x.itemsize > LARGE:
            return x
        inner = self.empty(tuple(x.shape), x.dtype, x.device, "an input")
        inner.copy_(x)
        name, memory, size, _ = self._lent[-1]
        self._lent[-1] = name, memory, size, memory.clone()
        return inner

    def check(self) -> None:
        """Raises Touched if a margin or an input is not as it was."""
        for name, memory, size, before in self._lent:
            bytes_ = memory.view(torch.uint8)
            expected = torch.full_like(memory, CANARY) if before is None else before
            changed = bytes_ != expected.view(torch.uint8)
            if before is None:
                changed[MARGIN : MARGIN + size] = False
            if changed.any():
                first = int(changed.nonzero()[0]) - MARGIN
                only_read = "" if before is None else ", which is only to be read"
                raise Touched(f"byte {first} of {name} of {size} bytes was written{only_read}")


def poisoned(x: Tensor, kind: int) -> Tensor:
    """Fill x: NaN, extreme int32 and set bits; or the largest numbers, a 3 and cleared bits."""
    if x.dtype.is_floating_point:
        return x.fill_(torch.nan if kind == 0 else torch.finfo(x.dtype).max)
    if x.dtype not in (torch.int32, torch.int64):
        x.view(torch.uint8).fill_(0xFF if kind == 0 else 0)
        return x
    flat = x.view(-1)
    flat[0::2], flat[1::2] = (-(2**31), 2**31 - 1) if kind == 0 else (3, 3)
    return x


def run_guarded(
    launch: Any,
    stage: Callable[..., Any],
    *given: Any,
    poison: int = 0,
    changes: tuple[type, ...] = (),
) -> Any:
    """What a stage makes of copies of what it is given, in guarded memory.

    Arguments whose type it `changes` are written to afterwards, and returned if it returns them.
    """
    guard = Guard(poison)
    copies = [copied(x, guard.lend if isinstance(x, changes) else guard.copy) for x in given]
    with mock.patch.object(launch, "empty", guard.empty):
        results = stage(*copies)
    guard.check()
    own: dict[int, Tensor] = {}
    for mine, theirs in zip(given, copies, strict=True):
        if isinstance(mine, changes):
            for x, copy in zip(tensors(mine), tensors(theirs), strict=True):
                own[id(copy)] = x.copy_(copy)
    if not own or type(results) is tuple:  # of a fused step, which returns nothing that it changes
        return results
    return results and type(results)(*(own.get(id(x), x) for x in results))


def tensors(what: Tensor | CacheState | Selection) -> tuple[Tensor, ...]:
    if isinstance(what, CacheState):
        return what.tensors()
    return (what,) if isinstance(what, Tensor) else tuple(what)


def copied(what: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """Any argument of a stage on copies of its memory."""
    if isinstance(what, CacheState):
        return CacheState(*(carried(x, copy) for x in what.tensors()))
    if isinstance(what, ReuseDecision):
        return ReuseDecision(*(carried(x, copy) for x in what))
    return what if isinstance(what, (int, float)) else moved(what, copy)


def run_twice(launch: Any, stage: Callable[..., Any], *given: Any) -> Any:
    """What a stage makes of what it is given: the same bit for bit, whatever the memory holds."""
    results, again = (run_guarded(launch, stage, *given, poison=kind) for kind in (0, 1))
    for field, one, other in zip(results._fields, results, again, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        assert same.all(), f"{field}{(~same).nonzero()[0].tolist()} depends on what was in memory"
    return results


def watched(backend: Backend, launch: Any) -> Backend:
    """`backend` with each stage in guarded memory, under one poison and the other in turn.

    Those of a plan and the Selection Cache's steps too, where it has its own.
    """
    kinds = itertools.cycle((0, 1))

    def guarded(stage: Callable[..., Any], *changes: type) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            return run_guarded(launch, stage, *given, poison=next(kinds), changes=changes)

        return run

    stages = ("score", "select", "attend")
    own: dict[str, Any] = {name: guarded(getattr(backend, name)) for name in stages}
    for name, changes in {"attend_fresh": (), "attend_cached": (CacheState,)}.items():
        if getattr(backend, name) is not None:
            own[name] = guarded(getattr(backend, name), *changes)
    if backend.static is not None:
        # `out` is the one tensor that all but the first two are given by itself.
        changing = {"score": (), "select": (), "attend_cached": (CacheState, Tensor)}
        own["static"] = StaticStages(
            **{
                name: stage and guarded(stage, *changing.get(name, (Tensor,)))
                for name, stage in backend.static._asdict().items()
            }
        )
    if isinstance(backend.reuse, Reuse):
        update = guarded(backend.reuse.update, CacheState, Selection)
        own["reuse"] = Reuse(guarded(backend.reuse.decide_reuse), update)
    return replace(backend, **own)


def take_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backends as they are: guarded memory is new at each call, a plan's is not."""
    for name in ("triton", "native"):
        monkeypatch.delitem(registry._loaded, name, raising=False)  # `load` makes it again
