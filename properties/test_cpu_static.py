"""The cpu backend's planned stages: every law, in poisoned memory; and what a plan asks of them."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from properties.guard import poisoned
from properties.laws import LAWS
from tokenselect import Backend, Problem, Scores, SelectConfig, Selection
from tokenselect.conformance.laws import law
from tokenselect.conformance.laws.law import Law
from tokenselect.conformance.problems import Ballots, Case
from tokenselect.conformance.tolerances import compare_selection
from tokenselect.dispatch import registry
from tokenselect.kernels.cpu import BACKEND as CPU
from tokenselect.kernels.cpu import rows, static
from tokenselect.scratch import Scratch, empty


def run(scratch: Scratch, stage: str, *given: Any) -> Any:
    with scratch.section(stage):
        return getattr(CPU.static, stage)(*given)


def poison(scratch: Scratch, kind: int) -> None:
    """In every block: NaN of any float, and -1; or the integers farthest out, and -0.0 or NaN."""
    for block in scratch.blocks():
        block.fill_(0xFF)
        words = block[: block.numel() // 4 * 4].view(torch.int32)
        if kind == 1 and words.numel():
            poisoned(words, 0)


# --- every law ---


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The planned stages as ordinary ones; each call runs in poisoned memory of its own."""
    kinds = itertools.cycle((0, 1))

    def stage(name: str, *more: None) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            scratch = Scratch()
            run(scratch, name, *given, *more)
            scratch.seal()
            poison(scratch, next(kinds))
            results = run(scratch, name, *given, *more)
            return type(results)(*(x.clone() for x in results))

        return call

    def score(problem: Problem) -> Scores:
        votes, lse = stage("score")(problem)
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            sink_end, local_start = problem.config.regions(n, problem.Lq)
            votes[b, :, :, :sink_end] = votes[b, :, :, local_start:] = -math.inf
        return Scores(votes, lse)

    made = Backend("cpu-planned", CPU.capability, score, stage("select"), stage("attend", None))
    monkeypatch.setitem(registry._loaded, made.name, made)
    return made


@pytest.mark.parametrize("law_", LAWS, ids=lambda law: law.name)
def test_law(backend: Backend, monkeypatch: pytest.MonkeyPatch, law_: Law) -> None:
    monkeypatch.setitem(law.SHARES, backend.name, 0.3)
    law_.check(backend)


@pytest.mark.slow
@pytest.mark.parametrize("law_", LAWS, ids=lambda law: law.name)
def test_law_in_small_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch, law_: Law) -> None:
    """Every chunk of tokens and block of queries has neighbours."""
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 0)
    far = law_.name == "keys_far_out_are_moved_exactly"
    monkeypatch.setattr(rows, "_LEAST_CHUNK", 1000 if far else 7)
    monkeypatch.setattr(static, "_LOGITS_BYTES", 0)
    monkeypatch.setitem(law.SHARES, backend.name, 0.15)
    law_.check(backend)


# --- what the laws seldom draw: as the ordinary stages have it ---


@pytest.mark.parametrize("lengths", [(60, 0, 33), (7,)])
@pytest.mark.parametrize("pool", [1, 3, 5, 7, 11, 13, 101])
def test_votes_are_pooled_over_any_window(backend: Backend, lengths: Any, pool: int) -> None:
    problem = Case(lengths=lengths, config=SelectConfig(5, 2, 4, pool=pool)).problem()
    votes, expected = backend.score(problem).votes, CPU.score(problem).votes
    assert torch.allclose(votes, expected, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["visible", "candidates"])
def test_heads_without_a_finite_logit_give_nothing(backend: Backend, normalize: str) -> None:
    config = SelectConfig(5, 2, 4, normalize=normalize)
    problem = Case(lengths=(60, 33), config=config).problem()
    problem.k_cache[0, 1], problem.k_cache[1, 0, :, 2:29] = torch.nan, torch.inf
    scores, expected = backend.score(problem), CPU.score(problem)
    assert torch.allclose(scores.votes, expected.votes, rtol=1e-5, atol=1e-8)
    assert torch.allclose(scores.lse, expected.lse)


@pytest.mark.parametrize("votes", ["infinite", "nan", "few values", "all equal"])
@pytest.mark.parametrize("k", [15, 30, 40, 50, 51])
def test_ties_are_those_of_candidates_alone(backend: Backend, votes: Any, k: int) -> None:
    """Ties at -inf too: of the sink, which is not up for choice, and of candidates."""
    for score_at in ("true", "split"):
        config = SelectConfig(k, 5, 4, score_at=score_at)
        drawn, problem = Ballots(Case(lengths=(60, 33), rope="raw", config=config), votes, k).make()
        finding = compare_selection(backend.select(drawn, problem), CPU.select(drawn, problem))
        assert finding.holds, finding


@pytest.mark.parametrize("Lq", [1, 3])
@pytest.mark.parametrize("sinks", [None, -torch.inf, torch.inf, torch.nan, -105.0, 200.0])
@pytest.mark.parametrize("low", [0.0, -1e4, -torch.inf])
def test_values_that_are_not_finite(
    backend: Backend, Lq: int, sinks: float | None, low: float
) -> None:
    """Seen or not, with a weight or without: inf, -inf or NaN is where it should be."""
    problem = Case(lengths=(60, 40), Lq=Lq, Dv=64, filler="zeros").problem()
    if sinks is not None:
        problem = replace(problem, sink_logits=torch.tensor([sinks, 0.0, 1.0, sinks]))
    generator = torch.Generator().manual_seed(0)
    problem.q.abs_()
    problem.k_cache[:, :, ::2] = low
    for value in (torch.inf, -torch.inf, torch.nan):
        chance = torch.rand(problem.v_cache.shape, generator=generator)
        problem.v_cache[chance < 0.01] = value
        chance = torch.rand(problem.v_cache[0, :, -8:].shape, generator=generator)
        problem.v_cache[0, :, -8:][chance < 0.1] = value
    positions = torch.arange(0, 60, 3, dtype=torch.int32).expand(2, 1, -1)
    positions = torch.cat((positions, torch.tensor([58, 59]).int().expand(2, 1, 2)), -1).sort(-1)[0]
    positions = positions.where(positions < problem.cache_seqlens[:, None, None], -1)
    selection = Selection(positions, (positions >= 0).sum(-1).int())
    attended, expected = backend.attend(problem, selection), CPU.attend(problem, selection)
    torch.testing.assert_close(attended.out, expected.out, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attended.lse, expected.lse, equal_nan=True)


# --- no memory, and no look at a value ---

EXTRAPOLATE = SelectConfig.extrapolate(k=8, n_sink=2, n_local=4, pool=3, scope="group")
CASES = {
    "plain": Case(lengths=(40, 0, 9)),
    "bfloat16": Case(lengths=(150, 3), dtype=torch.bfloat16, G=7, strides="token-major"),
    "pages": Case(lengths=(90, 7), page_size=16, dtype=torch.float16, Lq=5),
    "capped": Case(lengths=(40, 70), softcap=2.0, has_sink_logits=True, Lq=2, D=5, Dv=1),
    "hard": Case(lengths=(60, 9), config=SelectConfig(5, 2, 4, vote="hard", scope="group")),
    "fraction": Case(lengths=(60, 9, 0), config=SelectConfig(0.3, 2, 4, vote="hard", k_max=15)),
    "fraction, split": Case(lengths=(60, 9), rope="raw", config=replace(EXTRAPOLATE, k=0.3)),
    "logit": Case(lengths=(60,), Lq=5, config=SelectConfig(5, 2, 4, vote="logit", n_query_means=2)),
    "candidates": Case(lengths=(60,), config=SelectConfig(5, 2, 4, normalize="candidates")),
    "moved": Case(lengths=(60, 9), rope="rotated", config=EXTRAPOLATE, dtype=torch.bfloat16),
    "raw": Case(lengths=(60, 9), rope="raw", interleaved=True, Lq=5, page_size=1, rope_scaling=1.3),
    "raw, moved": Case(lengths=(60,), rope="raw", config=EXTRAPOLATE, dtype=torch.float64, D=16),
    "one head": Case(lengths=(600,), Hkv=1, G=1, D=2, Dv=2, spare=0),
    "everything": Case(lengths=(9,), config=SelectConfig(k=200, n_sink=0, n_local=1, pool=7)),
    "nothing": Case(lengths=(9,), config=SelectConfig(k=0, n_sink=0, n_local=1), strides="sliced"),
}


def steps(problem: Problem) -> Callable[[Scratch], tuple[Tensor, ...]]:
    """All stages of a call, one after the other."""

    def step(scratch: Scratch) -> tuple[Tensor, ...]:
        scores = run(scratch, "score", problem)
        selection = run(scratch, "select", scores.votes, problem)
        return *scores, *selection, *run(scratch, "attend", problem, selection, None)

    return step


class Watch(TorchDispatchMode):
    """Raises for operators that look at a value, or make memory that was not there."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.there = {x.untyped_storage().data_ptr() for x in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not looks, f"{func} looks at a value"
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            known = not isinstance(x, Tensor) or x.untyped_storage().data_ptr() in self.there
            assert known, f"{func} makes memory"
        return result


def allocations(step: Callable[[], Any]) -> list[str]:
    """What torch allocates meanwhile, in any operator: bytes, and where."""

    def walk(events: Iterable[Any], where: str) -> Iterable[str]:
        for event in events:
            if event.name == "[memory]" and event.extra_fields.alloc_size > 0:
                yield f"{event.extra_fields.alloc_size} bytes in {where}"
            yield from walk(event.children, event.name)

    watched = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with profile(**watched) as profiled:
        step()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    return list(walk(results.experimental_event_tree(), "no operator"))  # type: ignore[union-attr]


def hold_to(problem: Problem, step: Callable[[Scratch], Any]) -> None:
    """A second run takes no memory, and looks at nothing."""
    scratch = Scratch()
    step(scratch)
    scratch.seal()
    given = [x for x in vars(problem).values() if isinstance(x, Tensor)]
    if problem.rope is not None:
        given.append(problem.rope.inv_freq)
    with Watch([*given, *scratch.blocks()]):
        step(scratch)
    assert allocations(lambda: step(scratch)) == []


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_no_memory_and_looks_at_nothing(name: str) -> None:
    problem = CASES[name].problem()
    hold_to(problem, steps(problem))


def test_nor_does_one_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(rows, "_LEAST_CHUNK", 7)
    monkeypatch.setattr(static, "_LOGITS_BYTES", 0)
    for name in ("bfloat16", "pages", "raw"):
        problem = CASES[name].problem()
        hold_to(problem, steps(problem))


def test_nor_does_one_in_several_threads() -> None:
    problem = Case(lengths=(40_000,), Hkv=1, G=2, dtype=torch.bfloat16).problem()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        hold_to(problem, steps(problem))
    finally:
        torch.set_num_threads(threads)


BAD: dict[str, Callable[[Tensor], object]] = {
    "allocates a number": lambda x: x.mul_(2.0),
    "allocates inside": lambda x: x.add_(x.bfloat16().fill_(1)),
    "returns new memory": lambda x: x + x,
    "reads": lambda x: x.sum().item(),
    "has a branch": lambda x: bool(x[0] > 0),
    "chooses rows": lambda x: x[x > 0],
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_step_may_not_do_is_noticed(name: str) -> None:
    def step(scratch: Scratch) -> None:
        with scratch.section("a stage"):
            x = empty((4,), torch.float32, torch.device("cpu")).fill_(1.0)
            BAD[name](x)

    with pytest.raises(AssertionError):
        hold_to(CASES["plain"].problem(), step)


# --- the same memory for other lengths and shapes, and for values that no length has ---


def fresh(problem: Problem) -> list[Tensor]:
    return [x.clone() for x in steps(problem)(Scratch())]


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> None:
    for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7)), f"result {i}"


def with_lengths(problem: Problem, lengths: list[int]) -> Problem:
    return replace(problem, cache_seqlens=torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [0, 1])
def test_one_workspace_serves_lengths_longer_and_shorter(name: str, kind: int) -> None:
    problem = replace(CASES[name], filler="zeros").problem()
    n, least = problem.cache_seqlens.tolist(), problem.Lq
    scratch = Scratch()
    steps(with_lengths(problem, [max(least, length // 2) for length in n]))(scratch)
    scratch.seal()
    for lengths in (n, [problem.Lk] * problem.B, [least] * problem.B, [0] * problem.B, n):
        now = with_lengths(problem, lengths)
        poison(scratch, kind)
        same(steps(now)(scratch), fresh(now))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_fewer_requests_and_shorter_tables_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, small: bool
) -> None:
    """What was enough for more is enough for less: no question after memory grows."""
    if small:
        monkeypatch.setattr(rows, "_CHUNK_BYTES", 3000)
        monkeypatch.setattr(rows, "_LEAST_CHUNK", 7)
        monkeypatch.setattr(static, "_LOGITS_BYTES", 5000)
    case = CASES[name]
    problem = replace(case, lengths=(*case.lengths, 31, 20), page_size=case.page_size or 1)
    large = problem.problem()
    scratch = Scratch()
    steps(large)(scratch)
    scratch.seal()
    for B, pages in itertools.product(range(1, large.B + 1), (1, 2, 5, large.Lk)):
        table = large.block_table[:B, :pages]
        lengths = large.cache_seqlens[:B].clamp(max=table.shape[1] * large.page_size)
        if table.shape[1] * large.page_size >= large.Lq:
            less = replace(large, q=large.q[:B], block_table=table, cache_seqlens=lengths)
            poison(scratch, 0)
            same(steps(less)(scratch), fresh(less))


@pytest.mark.parametrize("name", CASES)
def test_lengths_and_tables_may_hold_anything(name: str) -> None:
    """torch itself raises for an index that is out of bounds. Nobody else's results change."""
    problem = replace(CASES[name], lengths=(50, 40, 30, 20, 7)).problem()
    lengths = problem.cache_seqlens.tolist()
    lengths[1:] = [-(2**31), 2**31 - 1, problem.Lk + 1, problem.Lq - 1 or -1]
    odd = with_lengths(problem, lengths)
    if problem.block_table is not None:
        table = problem.block_table.clone()
        table[1:, ::2], table[1:, 1::2] = -(2**31), 2**31 - 1
        odd = replace(odd, block_table=table)
    expected, got = fresh(problem), fresh(odd)
    for mine, theirs in zip(expected, got, strict=True):
        # Votes off the candidates, too, are the same: only this request's own matter.
        assert torch.equal(mine[0].nan_to_num(7), theirs[0].nan_to_num(7))
    positions, count = got[2:4]
    assert (count[1] == 0).all()
    assert (positions[1] == -1).all()
    assert (got[4][1] == 0).all()
    assert (positions < problem.Lk).all()
    if problem.block_table is None:  # as long as the cache can hold
        full = fresh(with_lengths(problem, [problem.Lk] * problem.B))
        for mine, theirs in zip(full, got, strict=True):
            assert torch.equal(mine[2:4].nan_to_num(7), theirs[2:4].nan_to_num(7))


def test_attend_takes_any_number_of_columns_and_writes_where_it_is_told() -> None:
    problem = CASES["capped"].problem()
    for columns in (0, 1, 3, 100):
        positions = torch.arange(columns, dtype=torch.int32).expand(2, 1, -1).contiguous()
        positions[..., 30:] = -1
        selection = Selection(positions, (positions >= 0).sum(-1).int())
        out = torch.full((*problem.q.shape[:3], problem.Dv), torch.nan)
        attended = run(Scratch(), "attend", problem, selection, out)
        assert attended.out is out
        expected = CPU.attend(problem, selection)  # type: ignore[operator]
        assert torch.allclose(out, expected.out, atol=1e-6)
        assert torch.allclose(attended.lse, expected.lse, atol=1e-6)
