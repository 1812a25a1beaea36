"""What a plan promises: attention as always, no memory taken, nothing read on the host; replays.

Without a GPU replays are those of `properties.recorded`, which is not CUDA; on one they are CUDA's.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from properties import guard
from properties.guard import poisoned
from properties.recorded import Recorded, opaque_kernels
from tokenselect import (
    AttentionInfo,
    Backend,
    NotCapturable,
    Plan,
    Problem,
    SelectConfig,
    Selection,
    SelectionCache,
    cuda_graph,
    plan,
    reasons,
)
from tokenselect.conformance.devices import back, device_of, on
from tokenselect.conformance.laws.fitting import CannotRun, fitted
from tokenselect.conformance.laws.law import RAN, able, of_the_profile
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.problems import Case
from tokenselect.conformance.tolerances import attend_tolerance, choice_finding, score_tolerance
from tokenselect.contract import StaticStages
from tokenselect.dispatch import registry
from tokenselect.dispatch.registry import load
from tokenselect.plans.graph_safety import graph_safe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SelectConfig(k=8, n_sink=2, n_local=4)
EXTRAPOLATE = SelectConfig.extrapolate(k=9, n_sink=2, n_local=4)


def drawn(lengths: tuple[int, ...], **more: Any) -> Case:
    """A case that every backend takes as it is."""
    return Case(lengths, **{"D": 32, "Dv": 48, "config": CONFIG} | more)


FEATURES = (
    drawn(lengths=(60, 0, 41)),
    drawn(lengths=(60, 33), Lq=5, page_size=4, dtype=torch.bfloat16, strides="token-major"),
    drawn(lengths=(90,), rope="rotated", config=EXTRAPOLATE, dtype=torch.float16),
    drawn(lengths=(70, 41), rope="raw", G=3, config=replace(EXTRAPOLATE, scope="group")),
    drawn(lengths=(60, 17), softcap=2.0, has_sink_logits=True, strides="sliced"),
    drawn(lengths=(60,), Lq=7, config=replace(CONFIG, n_query_means=3, pool=3), filler="inf"),
    drawn(lengths=(60,), config=replace(CONFIG, normalize="candidates", select_scale=1.0)),
    drawn(lengths=(60, 20), config=replace(CONFIG, vote="logit"), dtype=torch.float64),
    drawn(lengths=(60, 20, 0), config=replace(CONFIG, k=0.3, k_min=2)),
    drawn(lengths=(90, 30), rope="rotated", config=replace(EXTRAPOLATE, k=0.3, k_max=20)),
    drawn(lengths=(60, 20), config=replace(CONFIG, vote="hard", scope="group")),
)


@pytest.fixture(autouse=True)
def _unguarded(_guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    guard.take_off(monkeypatch)


def problem_of(case: Case, name: str) -> Problem:
    """The case where the backend runs, or CannotRun."""
    backend = load(name)
    device = device_of(backend)
    return able(backend, on(device, fitted(case, backend).problem()))


def called(planned: Plan, problem: Problem, **more: Any) -> tuple[Tensor, AttentionInfo]:
    """A plan on a problem; clones, on the CPU."""
    out, info = planned(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.cache_seqlens,
        block_table=problem.block_table,
        sink_logits=problem.sink_logits,
        return_info=True,
        **more,
    )
    out, lse, reused, *selection = (
        x.clone() for x in back(out, info.lse, info.reused, *info.selection)
    )
    return out, info._replace(lse=lse, reused=reused, selection=Selection(*selection))


def same(one: tuple[Tensor, AttentionInfo], other: tuple[Tensor, AttentionInfo]) -> bool:
    pairs = zip(
        (one[0], one[1].lse, one[1].reused, *one[1].selection),
        (other[0], other[1].lse, other[1].reused, *other[1].selection),
        strict=True,
    )
    return all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in pairs)


# --- a plan is attention --------------------------------------------------------------------


@pytest.mark.slow("triton")
def test_a_plan_chooses_what_the_votes_allow_and_attends_to_that(plannable: str) -> None:
    ran = 0

    def holds(case: Case) -> None:
        nonlocal ran
        with contextlib.suppress(CannotRun):
            problem = problem_of(case, plannable)
            out, info = called(plan(problem, plannable), problem)
            here = fitted(case, load(plannable)).problem()
            finding = choice_finding(here, info.selection, score_tolerance(here).votes)
            assert finding.holds, finding
            tolerance = attend_tolerance(here, info.selection)
            finding = max(tolerance.out.compare("out", out), tolerance.lse.compare("lse", info.lse))
            assert finding.holds, finding
            RAN[plannable, "plans"] += 1
            ran += 1

    for case in FEATURES:
        holds(case)
    search = settings(settings.default, max_examples=max(3, of_the_profile(40, plannable)))
    search(given(cases())(holds))()
    assert ran >= len(FEATURES) - 2


@pytest.mark.slow("triton")
@pytest.mark.parametrize("case", FEATURES, ids=range(len(FEATURES)))
def test_less_than_the_capacity_gives_the_bits_of_a_plan_of_that_size(
    plannable: str, case: Case
) -> None:
    """Fewer requests, fewer tokens, whatever the plan's memory holds."""
    with able_or_skip():
        problem = problem_of(case, plannable)
    # Bent to what the backend takes before it is made longer, since longer is bent otherwise.
    longer = replace(fitted(case, load(plannable)), lengths=(*case.lengths, 140, 3 + case.Lq))
    more = problem_of(longer, plannable)
    large = plan(more, plannable)
    expected = called(plan(problem, plannable), problem)
    for kind in (0, 1):
        poison(large, kind)
        assert same(called(large, problem), expected)


def poison(planned: Plan, kind: int) -> None:
    for block in planned._scratch.blocks():
        if kind == 0:
            block.fill_(0xFF)
        else:
            words = block[: len(block) // 4 * 4].view(torch.float32)
            poisoned(words, 1)


@contextlib.contextmanager
def able_or_skip() -> Iterator[None]:
    try:
        yield
    except CannotRun as why:
        pytest.skip(str(why))


# --- nothing is read on the host, and no memory is taken -------------------------------------


class NoNewMemory(TorchDispatchMode):
    """Raises at the first operator whose result lies in memory that was not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        given = tree_leaves((args, kwargs or {}))
        known = self.known | {
            x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                raise AssertionError(f"{function} took memory for {tuple(x.shape)} {x.dtype}")
        return result


def check_safe(call: Callable[[], Any], known: list[Tensor]) -> None:
    """Raises NotCapturable or AssertionError if the call is not what a graph can hold."""
    call()  # the first call of its kind makes views, and a SelectionCache its state
    with opaque_kernels(), graph_safe(torch.device(DEVICE)), NoNewMemory(known):
        call()
    if torch.cuda.is_available():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        return
    # Triton's interpreter copies tensors inside a kernel: those are not the step's.
    watched = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    recorded = profile(**watched)
    with opaque_kernels(run_them=False), recorded:
        call()
    events = [event for event in recorded.events() if event.name == "[memory]"]
    taken = [event for event in events if event.cpu_memory_usage > 0]
    # 4 or 8 bytes are a Python number that an operator made a tensor of: give it one from `empty`.
    assert not taken, f"{len(taken)} allocations inside operators, {taken[0].cpu_memory_usage} B"


@pytest.mark.slow("triton")
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("case", FEATURES, ids=range(len(FEATURES)))
def test_a_call_takes_no_memory_and_reads_nothing_on_the_host(
    plannable: str, case: Case, with_cache: bool
) -> None:
    with able_or_skip():
        problem = problem_of(replace(case, max_reuse=4 if with_cache else 0), plannable)
    planned, cache = plan(problem, plannable), None
    out = torch.empty((problem.B, problem.Hq, problem.Lq, problem.Dv), dtype=problem.q.dtype)
    out = out.to(problem.q.device)
    if with_cache:
        cache = SelectionCache(max_reuse=4)
        cache.state(problem)
    known = [out, *planned._scratch.blocks()]
    tensors = problem.q, problem.k_cache, problem.v_cache, problem.cache_seqlens
    more = {"block_table": problem.block_table, "sink_logits": problem.sink_logits}

    def call(given: Tensor | None = None) -> None:
        planned(*tensors, **more, cache=cache, out=given)

    check_safe(call, known)
    check_safe(lambda: call(out), known)
    if cache is not None:
        assert not cache.hits.any()  # the same lengths again: nothing was appended
        assert cache.misses.max() >= 2
        reset = torch.ones(problem.B, dtype=torch.bool, device=problem.q.device)
        with graph_safe(torch.device(DEVICE)):
            cache.crop(problem.cache_seqlens)
            cache.reset(reset)
            cache.reorder(torch.arange(problem.B, device=problem.q.device))


@pytest.mark.parametrize("hits", [False, True])
def test_hits_and_misses_alike_take_no_memory(plannable: str, hits: bool) -> None:
    problem = problem_of(drawn(lengths=(40, 40), max_reuse=10**6), plannable)
    planned = plan(problem, plannable)
    cache = SelectionCache(theta=-1.0 if hits else 1.0, max_reuse=10**6)
    n = problem.cache_seqlens.fill_(3)
    one = torch.ones_like(n)

    def call() -> None:
        n.add_(one)
        if not hits:
            problem.q.neg_()
        planned(
            problem.q,
            problem.k_cache,
            problem.v_cache,
            n,
            block_table=problem.block_table,
            sink_logits=problem.sink_logits,
            cache=cache,
        )

    call()
    check_safe(call, planned._scratch.blocks())
    assert (cache.hits if hits else cache.misses).min() >= 2
    assert (cache.misses if hits else cache.hits).max() <= 1


@pytest.mark.parametrize("wrong", ["item", "tolist", "nonzero", "mask", "bool", "new memory"])
def test_a_stage_that_is_not_safe_is_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load("cpu")
    yes = torch.tensor([True, False, True])

    def score(problem: Problem) -> Any:
        n = problem.cache_seqlens
        {
            "item": lambda: n[0].item(),
            "tolist": lambda: n.tolist(),
            "nonzero": lambda: n.nonzero(),
            "mask": lambda: n[yes],
            "bool": lambda: bool(yes[0]),
            "new memory": lambda: n + 1,
        }[wrong]()
        return right.static.score(problem)

    bent = replace(right, static=StaticStages(score, right.static.select, right.static.attend))
    monkeypatch.setitem(registry._loaded, "cpu", bent)
    problem = FEATURES[0].problem()
    planned = plan(problem, "cpu")
    tensors = problem.q, problem.k_cache, problem.v_cache, problem.cache_seqlens
    with pytest.raises((NotCapturable, AssertionError)) as caught:
        check_safe(lambda: planned(*tensors), planned._scratch.blocks())
    if wrong != "new memory":
        assert caught.type is NotCapturable
        operation = {"mask": "aten.index", "bool": "__bool__"}.get(wrong, wrong)
        assert operation in str(caught.value)


# --- replays -------------------------------------------------------------------------------


def graphs_over(name: str, **settings: Any) -> Backend:
    """A backend that replays; recorded replays where there is no GPU."""
    interface = None if device_of(load(name)) == "cuda" else Recorded()
    return cuda_graph(name, name=f"{name}-replayed", interface=interface, **settings)


@pytest.fixture
def replayed(plannable: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that replays the plannable one."""
    made = graphs_over(plannable)
    monkeypatch.setitem(registry._targets, made.name, made)
    monkeypatch.setitem(registry._loaded, made.name, made)
    return made.name


@pytest.mark.slow("triton")
@pytest.mark.parametrize("case", FEATURES, ids=range(len(FEATURES)))
def test_a_replay_gives_the_bits_of_a_plan(plannable: str, replayed: str, case: Case) -> None:
    """Lengths shorter and longer than at capture, none at all, other queries and block tables."""
    with able_or_skip():
        problem = problem_of(replace(case, filler="zeros", spare=20), plannable)
    eager, graph = plan(problem, plannable), plan(problem, replayed)
    n = problem.cache_seqlens
    generator = torch.Generator().manual_seed(1)
    other_q = torch.randn(problem.q.shape, generator=generator).to(problem.q)
    longer = torch.where(n > 0, n + 13, problem.Lq)
    calls = [
        problem,
        replace(problem, cache_seqlens=longer),
        replace(problem, cache_seqlens=(n - 9).clamp(min=problem.Lq)),
        replace(problem, cache_seqlens=torch.zeros_like(n)),
        replace(problem, q=other_q),
        replace(problem, cache_seqlens=torch.full_like(n, problem.Lq), q=other_q),
    ]
    if problem.block_table is not None:
        table = torch.randint(0, problem.k_cache.shape[0], problem.block_table.shape)
        calls.append(replace(problem, block_table=table.to(problem.block_table)))
    results = []
    for i, call in enumerate(calls):
        poison(graph, i % 2)
        results.append(called(graph, call))
        assert same(results[-1], called(eager, call)), f"call {i}"
    assert not same(results[0], results[4])
    assert graph._graphs.captures == 1


@pytest.mark.slow("triton")
def test_replays_keep_a_selection_cache(plannable: str, replayed: str) -> None:
    """Hits, misses and state after every step are those of the same steps run as they are."""
    shape = drawn(lengths=(70, 70, 70), max_reuse=4, filler="zeros")
    problem = problem_of(shape, plannable)
    plans = plan(problem, plannable), plan(problem, replayed)
    caches = SelectionCache(max_reuse=4), SelectionCache(max_reuse=4)
    generator = torch.Generator().manual_seed(0)
    q = problem.q
    for i in range(14):
        if i % 3 == 2:
            q = torch.randn(q.shape, generator=generator).to(problem.q)
        n = torch.tensor([20 + i, 0 if i == 9 else 30 + i, 60 - i], dtype=torch.int32)
        step = replace(problem, q=q, cache_seqlens=n.to(q.device))
        eager, graph = (
            called(one, step, cache=cache) for one, cache in zip(plans, caches, strict=True)
        )
        assert same(eager, graph), i
        pairs = zip(*(cache.state(problem).tensors() for cache in caches), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), i
        if i == 6:
            for cache in caches:
                cache.crop(torch.tensor([10, 40, 70], device=q.device))
                cache.reset(2)
    assert caches[0].hits.tolist() == caches[1].hits.tolist() != [0, 0, 0]
    assert plans[1]._graphs.captures == 1


@pytest.mark.slow("triton")
def test_a_batch_goes_into_the_next_larger_graph(
    plannable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphs_over(plannable, batches=(1, 2, 4))
    monkeypatch.setitem(registry._targets, made.name, made)
    monkeypatch.setitem(registry._loaded, made.name, made)
    shape = drawn(lengths=(60, 33, 20, 48, 9), page_size=16)
    problem = problem_of(shape, plannable)
    graph, eager = plan(problem, made.name), plan(problem, plannable)
    for B in (3, 1, 4, 2, 5, 3):
        rows = {
            name: getattr(problem, name)[5 - B :] for name in ("q", "cache_seqlens", "block_table")
        }
        part = replace(problem, **rows)
        assert same(called(graph, part), called(eager, part)), B
        out = part.q.new_empty((*part.q.shape[:3], part.Dv))
        assert same(called(graph, part, out=out), called(eager, part)), B
    # Of 1, 2, 4 and all 5 rows; with `out`, those that fit it exactly are graphs of their own.
    assert graph._graphs.captures <= 4 + 3 + 1


def test_each_stage_can_be_replayed_alone(plannable: str, replayed: str) -> None:
    """`attention` without a plan: three graphs; new queries and lengths without a capture."""
    backend, graph = load(plannable).static, load(replayed)
    problem = problem_of(drawn(lengths=(60, 33), page_size=16), plannable)
    for n in ([60, 33], [20, 0], [58, 7]):
        q = problem.q + n[1]
        p = replace(problem, q=q, cache_seqlens=problem.cache_seqlens.new_tensor(n))
        votes, lse = backend.score(p)
        votes = torch.where(load(plannable).score(p).votes == -torch.inf, -torch.inf, votes)
        selection = backend.select(votes, p)
        with opaque_kernels():
            pairs = [
                *zip((votes, lse), graph.score(p), strict=True),
                *zip(selection, graph.select(votes, p), strict=True),
                *zip(backend.attend(p, selection, None), graph.attend(p, selection), strict=True),
            ]
        assert all(torch.equal(a, b) for a, b in pairs)


# --- a test of these tests -------------------------------------------------------------------


def test_the_recording_shows_a_length_that_the_host_had_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mistake that a graph makes of a host read, behind the back of `graph_safe`."""
    right = load("cpu")

    def attend(problem: Problem, selection: Selection, out: Tensor | None) -> Any:
        with torch._C.DisableTorchFunction():
            seen = problem.cache_seqlens.tolist()
        frozen = torch.empty_like(problem.cache_seqlens)
        for row, n in zip(frozen, seen, strict=True):
            row.fill_(n)
        problem = replace(problem, cache_seqlens=frozen)
        return right.static.attend(problem, selection, out)

    bent = replace(right, static=right.static._replace(attend=attend))
    monkeypatch.setitem(registry._loaded, "cpu", bent)
    made = graphs_over("cpu")
    monkeypatch.setitem(registry._targets, made.name, made)
    monkeypatch.setitem(registry._loaded, made.name, made)
    problem = drawn(lengths=(60, 41), filler="zeros").problem()
    graph, eager = plan(problem, made.name), plan(problem, "cpu")
    shorter = replace(problem, cache_seqlens=problem.cache_seqlens - 20)
    assert same(called(graph, shorter), called(eager, shorter))
    assert not same(called(graph, problem), called(eager, problem))


def test_backends_that_cannot_be_planned_say_so() -> None:
    problem = FEATURES[0].problem()
    assert not reasons(load("reference"), problem)
    with pytest.raises(ValueError, match="reference takes calls without a plan"):
        plan(problem, "reference")
