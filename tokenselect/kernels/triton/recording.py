"""Record what a stage launches, once for all calls of the same structure.

Launches follow from shapes, strides, dtypes and settings. So a stage's `launches` is called with
slots, which have a structure and nothing else, and its result is kept under that structure, with
numbers in the place of tensors. Each call puts its own tensors there. Nothing else can get into a
recording: no address, no value of a tensor, and no number that its key does not hold.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect.contract import CacheState, Problem
from tokenselect.kernels.triton import launch
from tokenselect.kernels.triton.configs import TABLE
from tokenselect.kernels.triton.launch import Asked, Launch, Source, Step
from tokenselect.kernels.triton.tables import Tables, tables

# Structures whose recordings are kept. A cache that grows brings a new one with each token.
_MOST = 1024
_ALIGNMENT = 256  # bytes, of memory: kernels are compiled for 16, caches have lines of 128


class Slot:
    """The structure of a tensor, in its place while launches are recorded."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self._strides, self.dtype, self.device = shape, strides, dtype, device

    def stride(self, dim: int | None = None) -> Any:
        return self._strides if dim is None else self._strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)


class Recording(NamedTuple):
    """A stage's steps. Its tensors are numbered: arguments, then memory, then tables.

    memory     what to allocate, and block_size: see `launch.memory`
    tables     numbers of an inv_freq, with limit and position: see `tables.tables`
    constants  what steps pick besides tensors; numbered after them
    result     the numbers of the tensors that the stage returns
    kind       the type of the result, None for none
    """

    memory: tuple[Asked, ...]
    block_size: int
    tables: tuple[tuple[int, int, int], ...]
    steps: tuple[Step, ...]
    constants: tuple[Any, ...]
    result: tuple[int, ...]
    kind: Any


_recordings: dict[Any, Recording] = {}


def run(launches: Callable[..., tuple[Any, list[Launch]]], *given: Any, **more: Any) -> Any:
    """Run the steps of `launches(*given, arch=, source=, **more)`, and return its result."""
    parts = [_parts(x) for x in (*given, *more.values())]
    tensors = [x for of, _ in parts for x in of]
    device = tensors[0].device
    arch = launch.arch(device)
    structure = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])
    # The sizes of an architecture, not only its name: tests change them.
    key = (launches, device, TABLE[arch], structure, *[settings for _, settings in parts])
    recording = _recordings.get(key)
    if recording is None:
        recording = _record(launches, given, more, arch)
        if len(_recordings) >= _MOST:
            _recordings.clear()
        _recordings[key] = recording
    tensors += launch.memory(recording.memory, recording.block_size, device)
    for inv_freq, limit, at in recording.tables:
        tensors += tables(tensors[inv_freq], limit, at)
    launch.run(recording.steps, tensors, recording.constants, device)
    return recording.kind and recording.kind(*[tensors[i] for i in recording.result])


def _parts(x: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the tensors of an argument, in order, and its other settings."""
    if isinstance(x, Problem):
        rope, inv_freq, rotation = x.rope, None, None
        if rope is not None:
            inv_freq, rotation = rope.inv_freq, (rope.interleaved, rope.cached, rope.scaling)
        return (
            (x.q, x.k_cache, x.v_cache, x.cache_seqlens, x.block_table, x.sink_logits, inv_freq),
            (rotation, x.scale, x.softcap, x.max_reuse, x.config),
        )
    if isinstance(x, CacheState):
        return x.tensors(), CacheState
    if isinstance(x, tuple):  # Selection or ReuseDecision
        return x, type(x)
    return ((x,), Tensor) if isinstance(x, Tensor) else ((), x)


def _with(x: Any, tensors: list[Any]) -> Any:
    """Return the argument with its tensors replaced."""
    if isinstance(x, Problem):
        *own, inv_freq = tensors
        rope = copy.copy(x.rope)
        if rope is not None:  # not by replace(), which would check that it is a tensor
            object.__setattr__(rope, "inv_freq", inv_freq)
        names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")
        return replace(x, rope=rope, **dict(zip(names, own, strict=True)))
    if isinstance(x, (CacheState, tuple)):
        return type(x)(*tensors)
    return tensors[0] if tensors else x


class _Recorder(Source):
    """Gives out slots, and records what was asked for."""

    def __init__(self) -> None:
        self.memory: list[Slot] = []
        self.table_requests: list[tuple[Any, int, int]] = []
        self.table_slots: list[Slot] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        strides = [math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
        self.memory.append(Slot(tuple(shape), tuple(strides), dtype, device))
        return self.memory[-1]

    def tables(self, inv_freq: Any, limit: int, at: int) -> Tables:
        self.table_requests.append((inv_freq, limit, at))
        made: list[Any] = [Slot((), (), torch.float32, inv_freq.device) for _ in Tables._fields]
        self.table_slots += made
        return Tables(*made)


def _record(
    launches: Callable[..., tuple[Any, list[Launch]]],
    given: tuple[Any, ...],
    more: dict[str, Any],
    arch: str,
) -> Recording:
    """Call `launches` with slots, and number what it asked for and returned."""
    inputs: list[Slot | None] = []

    def with_slots(x: Any) -> Any:
        slots = [
            None if t is None else Slot(t.shape, t.stride(), t.dtype, t.device)
            for t in _parts(x)[0]
        ]
        inputs.extend(slots)
        return _with(x, slots)

    recorder = _Recorder()
    slotted = [with_slots(x) for x in given]
    settings = {name: with_slots(x) for name, x in more.items()}
    result, todo = launches(*slotted, arch=arch, source=recorder, **settings)
    tensors = [*inputs, *recorder.memory, *recorder.table_slots]
    number = {id(slot): i for i, slot in enumerate(tensors) if slot is not None}
    constants: list[Any] = []

    def step(one: Launch) -> Step:
        options = launch.options(one, arch)
        arguments = {"PDL": False, **one.args, **one.constants, **options}
        picked = []
        for name in one.kernel.arg_names:
            value = arguments[name]
            if isinstance(value, Slot):
                picked.append(number[id(value)])
            else:
                picked.append(len(tensors) + len(constants))
                constants.append(value)
        apart = {name: x for name, x in options.items() if name not in one.kernel.arg_names}
        return Step(one.kernel, one.grid, itemgetter(*picked), apart, {})

    steps = tuple(step(one) for one in todo)
    memory, block_size = _placed(recorder.memory, [id(slot) for slot in result or ()])
    return Recording(
        memory=memory,
        block_size=block_size,
        tables=tuple((number[id(slot)], limit, at) for slot, limit, at in recorder.table_requests),
        steps=steps,
        constants=tuple(constants),
        result=() if result is None else tuple(number[id(slot)] for slot in result),
        kind=None if result is None else type(result),
    )


def _placed(slots: list[Slot], results: list[int]) -> tuple[tuple[Asked, ...], int]:
    """Return a place in one block for each slot but the results, and the block's size in bytes."""
    asked, size = [], 0
    for slot in slots:
        is_result = id(slot) in results
        asked.append(Asked(slot.shape, slot.dtype, None if is_result else size))
        if not is_result:
            size += math.ceil(slot.numel() * slot.dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
    return tuple(asked), size
