"""The triton backend on bad lengths, tables and selections: `python -m properties.fenced`.

A process of its own, since what is wrong here ends it. On the CPU every tensor lies against pages
that nobody may touch, so that one stray read is a crash; on a GPU it lies between canaries. What
comes out for a bad request is its own affair; the requests beside it get what they get without it.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from properties.guard import copied, run_guarded
from properties.interpreter import hasten
from tokenselect import Backend, Problem, SelectConfig, Selection
from tokenselect.conformance.devices import device_of, on
from tokenselect.conformance.problems import Case
from tokenselect.contract import CacheState, ReuseDecision

_NOTHING, _PRIVATE, _ANONYMOUS, _NORESERVE = 0, 0x02, 0x20, 0x4000
_FENCE = 2**33  # bytes on each side; only addresses, no memory
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fences:
    """Lends memory that ends, or starts, where a fence does."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._maps: list[tuple[int, int]] = []

    def empty(self, shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        inner = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = inner + 2 * _FENCE
        start = _libc.mmap(None, whole, _NOTHING, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("no room for a fence")
        self._maps.append((start, whole))
        assert _libc.mprotect(start + _FENCE, inner, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        first = start + _FENCE + (inner - size if self.at_end else 0)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_uint8 * size).from_address(first)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(tuple(x.shape), x.dtype, x.device).copy_(x)

    def close(self) -> None:
        for start, size in self._maps:
            _libc.munmap(start, size)


def run(
    launch: Any,
    stage: Callable[..., Any],
    *given: Any,
    at_end: bool,
    changes: tuple[type, ...] = (),
) -> Any:
    """What a stage makes of copies in guarded memory; on the CPU, in memory between fences."""
    given = tuple(copied(x, torch.clone) if isinstance(x, changes) else x for x in given)
    if next(x for x in given if isinstance(x, Problem)).q.device.type != "cpu":
        return run_guarded(launch, stage, *given, poison=int(at_end), changes=changes)
    fences = Fences(at_end)
    with mock.patch.object(launch, "empty", fences.empty):
        results = stage(*(copied(x, fences.copy) for x in given))
    results = type(results)(*(x.clone() for x in results))
    fences.close()
    return results


SMALL = SelectConfig(k=5, n_sink=2, n_local=4)
CASES = {
    "raw": Case(
        lengths=(70, 66, 50),
        D=32,
        Dv=32,
        rope="raw",
        rotary_dim=16,
        config=SelectConfig.extrapolate(k=7, n_sink=2, n_local=3, pool=3, scope="group"),
    ),
    "decode": Case(lengths=(40, 37, 21), D=32, Dv=32, G=3, config=SMALL),
    "pages": Case(lengths=(40, 37, 21), D=40, Dv=32, page_size=16, dtype=torch.float16),
    "a chunk": Case(lengths=(70, 66, 50), D=32, Dv=48, Lq=5, page_size=1, dtype=torch.bfloat16),
    "strides": Case(lengths=(40, 37, 21), D=32, Dv=32, strides="sliced", Lq=2, max_reuse=4),
    "rotated": Case(
        lengths=(70, 66, 50),
        D=32,
        Dv=32,
        Lq=2,
        rope="rotated",
        page_size=16,
        softcap=2.0,
        has_sink_logits=True,
        config=SelectConfig.extrapolate(k=7, n_sink=2, n_local=3, normalize="candidates"),
    ),
}
LARGEST = 2**31 - 1
LEAST = -LARGEST - 1


def place(bad: int) -> int:
    """The request that gets a bad value: the first, before which a fence lies, or the last."""
    return 0 if bad < 0 else 2


def bad_problems(problem: Problem) -> Iterator[tuple[str, int, Problem]]:
    """One request is wrong: its length, or its pages."""
    for n in (problem.Lk + 1, LARGEST, -1, LEAST, problem.Lq - 1):
        lengths = problem.cache_seqlens.clone()
        lengths[place(n)] = n
        what = f"a length of {n}, Lk = {problem.Lk}"
        yield what, place(n), replace(problem, cache_seqlens=lengths)
    if problem.block_table is not None:
        n_pages = problem.k_cache.shape[0]
        for page in (-1, LEAST, n_pages, LARGEST, LARGEST // problem.page_size):
            table = problem.block_table.clone()
            table[place(page)] = page
            what = f"pages {page}, n_pages = {n_pages}"
            yield what, place(page), replace(problem, block_table=table)


def bad_selections(right: Selection, problem: Problem) -> Iterator[tuple[str, int, Selection]]:
    """One request is wrong: positions that are not its own, out of order, or their count."""
    n, K = int(problem.cache_seqlens[2]), right.positions.shape[2]
    for position in (LEAST, -2, n, problem.Lk, LARGEST):
        positions = right.positions.clone()
        positions[place(position), :, ::2] = position
        yield f"positions {position}", place(position), right._replace(positions=positions)
    backwards = right.positions.clone()
    backwards[2] = backwards[2].flip(-1)
    yield "positions backwards", 2, right._replace(positions=backwards)
    for size in (K + 1, LARGEST, -1, LEAST):
        count = right.count.clone()
        count[place(size)] = size
        yield f"a count of {size}, K = {K}", place(size), right._replace(count=count)


class Kept(NamedTuple):
    """All that `update` may change."""

    query: Tensor
    stored_positions: Tensor
    stored_count: Tensor
    seen: Tensor
    hits: Tensor
    misses: Tensor
    positions: Tensor
    count: Tensor


def remembered(problem: Problem, selection: Selection) -> CacheState:
    """As if each request had made `selection`, without its newest token, a call ago."""
    count = selection.count - 1
    zeros = torch.zeros_like(problem.cache_seqlens, dtype=torch.int64)
    query = problem.q.float().mean(2).flatten(1)
    seen = problem.cache_seqlens - problem.Lq
    return CacheState(query, selection.positions, count, seen, zeros, zeros.clone())


class _Stages:
    """What is run of a backend, by name; steps that change what they are given return it."""

    def __init__(self, backend: Backend) -> None:
        self.score, self.select, self.attend = backend.score, backend.select, backend.attend
        self._reuse = backend.reuse

    def decide_reuse(self, problem: Problem, memory: CacheState) -> ReuseDecision:
        return self._reuse.decide_reuse(problem, memory, 0.9)

    def update(
        self, problem: Problem, memory: CacheState, decision: ReuseDecision, fresh: Selection
    ) -> Kept:
        self._reuse.update(problem, memory, decision, fresh)
        return Kept(*memory.tensors(), *fresh)

    update_again = update


# What stages write to of what they are given.
_CHANGES = {"update": (CacheState, Selection), "update_again": (CacheState, Selection)}


def arguments(
    problem: Problem,
    votes: Tensor,
    selection: Selection,
    memory: CacheState,
    decision: ReuseDecision,
) -> dict[str, tuple[Any, ...]]:
    """What each stage is given of a problem. `update` meets requests that all reuse, and none."""
    none = decision._replace(reused=~decision.reused)
    return {
        "score": (problem,),
        "select": (votes, problem),
        "attend": (problem, selection),
        "decide_reuse": (problem, memory),
        "update": (problem, memory, decision, selection),
        "update_again": (problem, memory, none, selection),
    }


def check(backend: Backend, launch: Any, say: Callable[[str], None]) -> int:
    """Run them all, saying beforehand what is run. Returns how many there were."""
    device, stages = device_of(backend), _Stages(backend)
    many = 0
    for name, case in CASES.items():
        problem = on(device, replace(case, max_reuse=8).problem())
        votes = stages.score(problem).votes
        selection = stages.select(votes, problem)
        memory = remembered(problem, selection)
        decision = stages.decide_reuse(problem, memory)
        assert decision.reused.all(), "where nothing is reused, little is tried"
        has = (votes, selection, memory, decision)
        right = {
            stage: run(
                launch, getattr(stages, stage), *these, at_end=True, changes=_CHANGES.get(stage, ())
            )
            for stage, these in arguments(problem, *has).items()
        }
        calls = [
            (stage, what, b, these)
            for what, b, bad in bad_problems(problem)
            for stage, these in arguments(bad, *has).items()
        ]
        calls += [
            ("attend", what, b, (problem, bad))
            for what, b, bad in bad_selections(selection, problem)
        ]
        for stage, what, b, these in calls:
            say(f"{name}, {stage}: {what}")
            many += 1
            got = run(
                launch,
                getattr(stages, stage),
                *these,
                at_end=b > 0,
                changes=_CHANGES.get(stage, ()),
            )
            others = [i for i in range(problem.B) if i != b]
            for field, one, other in zip(got._fields, right[stage], got, strict=True):
                same = (one == other) | (one.isnan() & other.isnan())
                assert same[others].all(), f"{field} of another request changed"
    return many


def main() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from tokenselect.kernels.triton import BACKEND, launch

    if launch.INTERPRETED:
        hasten()
    many = check(BACKEND, launch, lambda line: print(line, flush=True))
    print(f"all {many} survived")


if __name__ == "__main__":
    main()
