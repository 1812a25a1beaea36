"""Laws draw and judge on the CPU; a backend that runs elsewhere is taken its problems, here."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import AttentionOutput, Backend, Problem, Scores, Selection

_TENSORS = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")


def device_of(backend: Backend) -> str:
    """Return the first device that a backend names and that is here, or the CPU."""
    named = backend.capability.devices
    devices: Iterable[str] = named if isinstance(named, Iterable) else ()
    for device in devices:
        module = getattr(torch, device, None)
        if device == "cpu" or (module is not None and module.is_available()):
            return device
    return "cpu"


def span(x: Tensor) -> Tensor:
    """Return the memory from the start of x's storage to x's last element, as a flat tensor."""
    steps = zip(x.shape, x.stride(), strict=True)
    last = 0 if x.numel() == 0 else 1 + sum((size - 1) * stride for size, stride in steps)
    return x.as_strided((x.storage_offset() + last,), (1,), 0)


def carried(x: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x on a copy of its memory, with its strides, offset and what lies in between."""
    memory = copy(span(x))
    return memory.as_strided(x.shape, x.stride(), memory.storage_offset() + x.storage_offset())


def moved(what: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """Return a tensor, a Problem or a Selection on copies of its memory."""
    if isinstance(what, Problem):
        rope = what.rope and replace(what.rope, inv_freq=carried(what.rope.inv_freq, copy))
        tensors = {name: moved(getattr(what, name), copy) for name in _TENSORS}
        return replace(what, rope=rope, **tensors)
    if isinstance(what, Selection):
        return Selection(*(carried(x, copy) for x in what))
    return None if what is None else carried(what, copy)


def on(device: str, what: Any) -> Any:
    """Return a tensor, a Problem or a Selection on a device; itself, if it is for the CPU."""
    return what if device == "cpu" else moved(what, lambda x: x.to(device))


def back(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors on the CPU."""
    return tuple(x.cpu() for x in tensors)


def for_the_cpu(backend: Backend) -> Backend:
    """Return `backend` with stages that take problems to its device, and results to the CPU."""
    device = device_of(backend)
    if device == "cpu":
        return backend

    def score(problem: Problem) -> Scores:
        return Scores(*back(*backend.score(on(device, problem))))

    def select(votes: Tensor, problem: Problem) -> Selection:
        return Selection(*back(*backend.select(on(device, votes), on(device, problem))))

    def attend(problem: Problem, selection: Selection) -> AttentionOutput:
        return AttentionOutput(*back(*backend.attend(on(device, problem), on(device, selection))))

    return replace(_declared_for_the_cpu(backend), score=score, select=select, attend=attend)


def _declared_for_the_cpu(backend: Backend) -> Backend:
    return replace(
        backend,
        capability=replace(backend.capability, devices=("cpu",)),
        lenders=tuple(map(_declared_for_the_cpu, backend.lenders)),
    )
