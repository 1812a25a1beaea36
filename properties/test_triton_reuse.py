"""The triton backend in a plan, and its Selection Cache: the reference's decisions, bit for bit.

All in guarded memory (see conftest.py), under one poison and the other in turn.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from properties.backends import chosen
from properties.guard import Guard, copied, poisoned
from tokenselect import Backend, Problem, SelectConfig, Selection
from tokenselect.conformance.devices import device_of, on
from tokenselect.conformance.laws.metamorphic import same
from tokenselect.conformance.problems import Case
from tokenselect.contract import CacheState, Reuse, ReuseDecision
from tokenselect.dispatch.registry import load
from tokenselect.kernels.cpu import BACKEND as CPU
from tokenselect.scratch import Scratch

CONFIG = SelectConfig(k=9, n_sink=2, n_local=3)
LARGEST = 2**31 - 1


@pytest.fixture(autouse=True)
def _triton_is_chosen(pytestconfig: pytest.Config) -> None:
    if "triton" not in chosen(pytestconfig):
        everything = not pytestconfig.getoption("--backend")
        assert not (everything and sys.platform == "linux"), "triton has to be tried on Linux"
        pytest.skip("this run is not about triton")


@pytest.fixture
def triton() -> Backend:
    return load("triton")


# --- the Selection Cache's two steps ----------------------------------------------------------


def call(q: Tensor, lengths: list[int], **config: Any) -> Problem:
    """A problem with these queries and lengths; nobody here reads its cache."""
    B, _, Lq, D = q.shape
    cache = torch.zeros(1, dtype=q.dtype).expand(B, 2, 60, D)
    n = torch.tensor(lengths, dtype=torch.int32)
    chosen_ = replace(CONFIG, **config)
    return Problem.build(q, cache, cache, chosen_, cache_seqlens=n, max_reuse=Lq + 5)


def remembering(problem: Problem, query: Tensor, seen: list[int], wider: int = 3) -> CacheState:
    """A memory of `query`, of selections of 5 tokens, or of fewer where fewer were seen."""
    B, S = problem.B, problem.S
    n = torch.tensor(seen, dtype=torch.int32)
    count = n.clamp(0, 5)[:, None].expand(B, S).contiguous()
    place = torch.arange(problem.K + wider, dtype=torch.int32)
    positions = torch.where(place < count[..., None], 2 * place, -1).int()
    numbers = torch.arange(B)
    return CacheState(query.float(), positions, count, n, 3 * numbers, 5 * numbers)


def as_the_reference_decides(
    reuse: Reuse, device: str, problem: Problem, memory: CacheState, theta: float | None
) -> ReuseDecision:
    right = CPU.reuse.decide_reuse(problem, memory, theta)
    there = (copied(x, lambda x: x.to(device)) for x in (problem, memory))
    for name, one, other in zip(
        right._fields, right, reuse.decide_reuse(*there, theta), strict=True
    ):
        other = other.cpu()
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        is_same = (one == other) & (one.signbit() == other.signbit()) | (
            one.isnan() & other.isnan()
        )
        assert is_same.all(), f"{name}{(~is_same).nonzero()[0].tolist()}, theta = {theta!r}"
    return right


def as_the_reference_keeps(
    reuse: Reuse,
    device: str,
    problem: Problem,
    memory: CacheState,
    decision: ReuseDecision,
    fresh: Selection,
) -> None:
    results = []
    for steps, where in ((CPU.reuse, "cpu"), (reuse, device)):
        given = [copied(x, lambda x, to=where: x.clone().to(to)) for x in (memory, fresh)]
        others = [copied(x, lambda x, to=where: x.to(to)) for x in (problem, decision)]
        steps.update(others[0], given[0], others[1], given[1])
        results.append([x.cpu() for x in (*given[0].tensors(), *given[1])])
    names = ("query", "stored positions", "stored count", "seen", "hits", "misses")
    for name, one, other in zip((*names, "positions", "count"), *results, strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)), name


def queries(seed: int, B: int, Hq: int, Lq: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, Hq, Lq, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(query: Tensor, seed: int) -> Tensor:
    """Queries with a cosine of about 0.9 to these."""
    noise = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))
    return query + 0.48 * noise * query.std()


def largest_theta(problem: Problem, memory: CacheState, cosine: float) -> float:
    """The last number at which the reference still reuses the one request's selection."""
    low, high = cosine - 1e-9, cosine + 1e-9
    while low < (middle := (low + high) / 2) < high:
        if CPU.reuse.decide_reuse(problem, memory, middle).reused:
            low = middle
        else:
            high = middle
    return low


def check_decisions(
    reuse: Reuse, device: str, dtype: torch.dtype, Hq: int, D: int, Lq: int
) -> None:
    """Around the very theta where the decision turns, and far from it."""
    q = queries(D + Lq, 6, Hq, 2 * Lq, 2 * D, dtype)[:, :, ::2, ::2]
    lengths, seen = [50, 70, -3, 50, 50, 50], [49 - Lq, 60 - Lq, 3, 48, 60, 50 - Lq]
    p = call(q, lengths)
    query = CPU.reuse.decide_reuse(p, None, None).query
    memory = remembering(p, near(query, D), seen)
    cosines = torch.cosine_similarity(query.double(), memory.query.double())
    for theta in (None, -1.0, 0.0, float(cosines[0])):
        as_the_reference_decides(reuse, device, p, memory, theta)
    p = call(q[-1:], lengths[-1:])
    memory = remembering(p, memory.query[-1:], seen[-1:])
    last = largest_theta(p, memory, float(cosines[-1]))
    around = (math.nextafter(last, -1), True), (last, True), (math.nextafter(last, 1), False)
    for theta, expected in around:
        decision = as_the_reference_decides(reuse, device, p, memory, theta)
        assert decision.reused.tolist() == [expected]
    alike = remembering(p, query[-1:], seen[-1:])
    assert as_the_reference_decides(reuse, device, p, alike, 1.0).reused.all()
    opposite = remembering(p, -near(query[-1:], D), seen[-1:])
    for theta in (-0.95, -float(cosines[-1]), -0.85, 0.5):
        as_the_reference_decides(reuse, device, p, opposite, theta)


def check(reuse: Reuse, device: str) -> None:
    """Some of all that is asked below, in a few seconds: enough to notice a mistake."""
    check_keeping(reuse, device, "group", 7, 9)
    for Hq, D, Lq in ((4, 80, 3), (8, 128, 1), (10, 64, 37)):
        check_decisions(reuse, device, torch.float32, Hq, D, Lq)


# Columns below 512, 512, more, and several times that.
SHAPES = ((2, 64, 1), (4, 80, 3), (4, 128, 16), (10, 64, 37), (8, 128, 1), (34, 64, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("Hq", "D", "Lq"), SHAPES)
def test_decisions_are_the_references(
    triton: Backend, Hq: int, D: int, Lq: int, dtype: torch.dtype
) -> None:
    check_decisions(triton.reuse, device_of(triton), dtype, Hq, D, Lq)


def neighbours(query: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Two stored queries, a rounding of one number apart: the reference reuses only the first.

    On the way from query to something else, number by number at the end.
    """
    there = -near(query, 5)
    problem = call(query.view(1, 4, 1, -1), [50])

    def is_reused(stored: Tensor) -> bool:
        memory = remembering(problem, stored[None], [48])
        return bool(CPU.reuse.decide_reuse(problem, memory, theta).reused)

    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if is_reused((query + middle * (there - query).double()).float()):
            low = middle
        else:
            high = middle
    inside, outside = ((query + at * (there - query).double()).float() for at in (low, high))
    for i in (inside != outside).nonzero()[:, 0].tolist():
        nearer = inside.clone()
        nearer[i] = outside[i]
        if not is_reused(nearer):
            return inside, nearer
        inside = nearer
    raise AssertionError("the decision does not turn")


@pytest.mark.parametrize("theta", [0.9, 0.999, 0.5, -0.3])
def test_stored_queries_a_rounding_apart(triton: Backend, theta: float) -> None:
    query = queries(3, 1, 4, 1, 160, torch.float32).flatten()
    stored = torch.stack(neighbours(query, theta))
    for i in range(4):
        stored = torch.cat((stored, stored[:2]))
        stored[-2:, i] = stored[-2:, i].nextafter(torch.tensor(torch.inf))
    p = call(query.view(1, 4, 1, 160).expand(len(stored), -1, -1, -1), [50] * len(stored))
    memory = remembering(p, stored, [48] * len(stored))
    decision = as_the_reference_decides(triton.reuse, device_of(triton), p, memory, theta)
    assert decision.reused[:2].tolist() == [True, False]


ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-40, 3e38, -3e38)


@pytest.mark.parametrize("Lq", [1, 5])
def test_queries_that_no_model_makes(triton: Backend, Lq: int) -> None:
    """All of their numbers, one of them, in the query, the stored one, or in both."""
    rows, stored = [], []
    for x, how in itertools.product(ODD, ("all", "one", "both")):
        query, other = queries(1, 2, 2, Lq, 64, torch.float32)
        query[:, 0 if how == "one" else slice(None)] = x
        rows.append(query)
        stored.append(query.mean(1) if how == "both" else other.mean(1))
    p = call(torch.stack(rows), [50] * len(rows))
    memory = remembering(p, torch.stack(stored).flatten(1), [44] * len(rows))
    for theta in (0.9, 0.0, -1.0):
        as_the_reference_decides(triton.reuse, device_of(triton), p, memory, theta)


LENGTHS = (LARGEST, -LARGEST - 1, -1, 0, 1, 2, 59, 60, 61)


@pytest.mark.parametrize("Lq", [1, 2])
def test_lengths_that_nobody_checked(triton: Backend, Lq: int) -> None:
    pairs = list(itertools.product(LENGTHS, (0, 1, 53, 54, 58, 60)))
    q = queries(0, 1, 2, Lq, 64, torch.float32).expand(len(pairs), -1, -1, -1)
    p = call(q, [n for n, _ in pairs], scope="group")
    query = CPU.reuse.decide_reuse(p, None, None).query
    memory = remembering(p, query, [seen for _, seen in pairs])
    memory.count[:, 1] += torch.arange(len(pairs)).int() % 11
    right = as_the_reference_decides(triton.reuse, device_of(triton), p, memory, 0.9)
    assert right.reused.any()
    assert not right.reused.all()


def check_keeping(reuse: Reuse, device: str, scope: str, wider: int, places: int) -> None:
    """Requests that reuse and that do not, some of them absent, and all in turn."""
    lengths = [50, 0, 55, 60, 0, 51, 70]
    q = queries(wider, len(lengths), 4, 1, 160, torch.bfloat16)
    p = call(q, lengths, scope=scope, k=places)
    memory = remembering(p, near(q.flatten(1).float(), 1), [49, 3, 50, 58, 0, 51, 60], wider)
    memory.count[-1] = 0
    generator = torch.Generator().manual_seed(wider)
    positions = torch.randint(-1, 60, (p.B, p.S, p.K), generator=generator).int()
    fresh = Selection(positions, positions.amax(2))
    decision = CPU.reuse.decide_reuse(p, memory, None)
    some = torch.tensor([True, False, True, False, True, True, True])
    for reused in (some, ~some, some | True, some & False):
        given = decision._replace(reused=reused)
        as_the_reference_keeps(reuse, device, p, memory, given, fresh)


@pytest.mark.parametrize("scope", ["layer", "group"])
@pytest.mark.parametrize("wider", [0, 7])
def test_what_is_kept_is_the_references(triton: Backend, scope: str, wider: int) -> None:
    check_keeping(triton.reuse, device_of(triton), scope, wider, 9)


def test_what_is_kept_by_several_programs(triton: Backend) -> None:
    """A few places and a few columns each."""
    from tokenselect.kernels.triton import reuse

    with mock.patch.object(reuse, "_PLACES", 16):
        check_keeping(triton.reuse, device_of(triton), "group", 5, 40)


def test_memory_that_lies_apart(triton: Backend) -> None:
    """Rows and columns of something larger: what is between them stays as it is."""

    def apart(x: Tensor) -> Tensor:
        larger = torch.full([2 * size for size in x.shape], 9, dtype=x.dtype)
        there = larger[tuple(slice(None, None, 2) for _ in x.shape)]
        return there.copy_(x)

    q = queries(0, 2, 4, 1, 64, torch.float32)
    p = call(q, [50, 52], scope="group")
    memory = remembering(p, q.flatten(1), [49, 50])
    memory = CacheState(*map(apart, memory.tensors()))
    decision = as_the_reference_decides(triton.reuse, device_of(triton), p, memory, 0.9)
    positions = apart(torch.arange(p.K).int().expand(2, 2, p.K))
    fresh = Selection(positions, apart(torch.full((2, 2), 4, dtype=torch.int32)))
    mixed = decision._replace(reused=torch.tensor([True, False]))
    as_the_reference_keeps(triton.reuse, device_of(triton), p, memory, mixed, fresh)
    if device_of(triton) == "cpu":
        triton.reuse.update(p, memory, mixed, fresh)
        for x in (*memory.tensors(), *fresh):
            between = tuple(slice(1, None, 2) for _ in x.shape)
            assert (
                x.as_strided([2 * s for s in x.shape], [s // 2 for s in x.stride()])[between] == 9
            ).all()


# --- the stages of a plan ---------------------------------------------------------------------

LONG = Case(lengths=(150, 0, 90), D=32, Dv=32, G=3, config=SelectConfig(k=40, n_sink=2, n_local=4))
PLANNED = {
    "decode": LONG,
    "chunk": replace(LONG, Lq=5, page_size=16, dtype=torch.float16),
    "pooled": replace(LONG, config=replace(LONG.config, pool=3, scope="group")),
    "candidates": replace(LONG, config=replace(LONG.config, normalize="candidates")),
    "split": replace(LONG, rope="rotated", config=SelectConfig.extrapolate(
        k=40, n_sink=2, n_local=4)),
    "split raw": replace(LONG, rope="raw", dtype=torch.bfloat16, config=SelectConfig.extrapolate(
        k=40, n_sink=70, n_local=4)),
    "sinks": replace(LONG, has_sink_logits=True, softcap=3.0),
}  # fmt: skip


def step(stages: Any, problem: Problem, out: Tensor | None = None) -> dict[str, Tensor]:
    """What the stages of a plan, or of a backend, make of a problem; but for the votes."""
    votes, lse = stages.score(problem)
    selection = stages.select(votes, problem)
    more = () if out is None else (out,)
    attended = stages.attend(problem, selection, *more)
    return {"lse of scores": lse, **selection._asdict(), **attended._asdict()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_gets_the_same_bits(triton: Backend, name: str) -> None:
    """Whatever lies off the candidates and in `out`, which is what is returned."""
    problem = on(device_of(triton), PLANNED[name].problem())
    right = step(triton, problem)
    for kind in (0, 1):
        out = poisoned(torch.empty_like(right["out"]), kind)
        got = step(triton.static, problem, out)
        assert got["out"] is out
        for field, result in got.items():
            same(triton, field, right[field], result)
    assert triton.static.attend(problem, Selection(*(right[x] for x in Selection._fields)), None)


@pytest.mark.parametrize("name", ["decode", "pooled", "split"])
def test_nothing_is_written_where_there_is_nothing_to_do(triton: Backend, name: str) -> None:
    """Of a request that is absent, and past the others' candidates: cost follows the length."""
    from tokenselect.kernels.triton import BACKEND, launch
    from tokenselect.kernels.triton.configs import TABLE

    problem = on(device_of(triton), replace(PLANNED[name], spare=300).problem())
    config = TABLE[launch.arch(problem.q.device)]
    block = max(config.tile, config.pool_block)
    with mock.patch.object(launch, "empty", Guard(1).empty):
        votes = BACKEND.static.score(problem).votes
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        local_start = problem.config.regions(n, problem.Lq)[1]
        beyond = votes[b, :, :, -(-local_start // block) * block :]
        assert beyond.numel()
        assert (beyond == torch.finfo(torch.float32).max).all()


def test_votes_off_the_candidates_are_not_looked_at(triton: Backend) -> None:
    problem = on(device_of(triton), LONG.problem())
    votes = triton.score(problem).votes
    right = triton.select(votes, problem)
    for value in (math.nan, math.inf, -math.inf, 1.0):
        other = votes.clone()
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            sink_end, local_start = problem.config.regions(n, problem.Lq)
            other[b, :, :, :sink_end] = other[b, :, :, local_start:] = value
        for field, result in triton.static.select(other, problem)._asdict().items():
            same(triton, field, getattr(right, field), result)


def test_sink_logits_that_lie_apart(triton: Backend) -> None:
    problem = on(device_of(triton), PLANNED["sinks"].problem())
    apart = problem.sink_logits.repeat_interleave(3)[::3]
    assert apart.stride(0) == 3
    right, got = step(triton, problem), step(triton, replace(problem, sink_logits=apart))
    for field, result in got.items():
        same(triton, field, right[field], result)


# --- memory, and the number of launches -------------------------------------------------------


class NoNewMemory(TorchDispatchMode):
    """Within, every operator has to return a view of what it is given."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        assert isinstance(result, Tensor), operator
        assert result.untyped_storage().data_ptr() in known, f"{operator} takes new memory"
        return result


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Kernels are named, not run: what is left is the host's own work.

    So the copies that Triton's interpreter makes of what a kernel is given are not met.
    """
    from tokenselect.kernels.triton import launch

    names: list[str] = []

    def record(steps: Sequence[Any], *_: Any) -> None:
        names.extend(one.kernel.fn.__name__.lstrip("_") for one in steps)

    with mock.patch.object(launch, "run", record):
        yield names


def a_plans_step(problem: Problem, memory: CacheState, out: Tensor) -> Callable[[Scratch], None]:
    """A step with its cache, as a plan runs it."""
    from tokenselect.kernels.triton import BACKEND

    def run(scratch: Scratch) -> None:
        with scratch.section("step"):
            BACKEND.static.attend_cached(problem, memory, 0.9, out)

    return run


# With `merge`, which a selection that one program attends to does without.
LAUNCHES = {"decode": 12, "chunk": 14, "pooled": 13, "split": 18, "split raw": 19, "sinks": 12}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_allocates_nothing_and_launches_little(name: str) -> None:
    from tokenselect.kernels.triton import BACKEND, attend, launch
    from tokenselect.kernels.triton.configs import TABLE

    device = device_of(BACKEND)
    problem = on(device, replace(PLANNED[name], max_reuse=8).problem())
    query = torch.ones(problem.B, problem.Hq * problem.D)
    memory = remembering(problem, query, [1] * problem.B)
    memory = copied(memory, lambda x: x.to(device))
    out = problem.q.new_empty(*problem.q.shape[:3], problem.Dv)
    run, scratch = a_plans_step(problem, memory, out), Scratch()
    with recorded() as names:
        run(scratch)
        scratch.seal()
        names.clear()
        with NoNewMemory():
            run(scratch)
    config = TABLE[launch.arch(problem.q.device)]
    is_whole = attend._split(config, problem.Lq * problem.G, problem.K) >= problem.K
    assert ("merge" in names) == (not is_whole), names
    assert len(names) == LAUNCHES[name] - is_whole, names
    assert scratch.bytes > 0


def test_new_memory_is_noticed() -> None:
    x = torch.ones(4)
    with NoNewMemory():
        x[2:].view(2, 1).copy_(x[:2, None])
        with pytest.raises(AssertionError, match="takes new memory"):
            x[::2].contiguous()


def test_a_workspaces_second_step_is_as_good_as_its_first() -> None:
    """The same memory again, with whatever the first step left in it."""
    from tokenselect.kernels.triton import BACKEND

    device = device_of(BACKEND)
    problem = on(device, replace(LONG, max_reuse=8).problem())
    run_on = [replace(problem, q=q) for q in (problem.q, problem.q + 1, problem.q)]
    scratch, results = Scratch(), []
    for p in run_on:
        memory = remembering(p, torch.ones(p.B, p.Hq * p.D), [148, 0, 90])
        memory = copied(memory, lambda x: x.to(device))
        out = p.q.new_empty(*p.q.shape[:3], p.Dv)
        a_plans_step(p, memory, out)(scratch)
        scratch.seal()
        results.append([out, *memory.tensors()])
    assert not torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0], results[2]))
