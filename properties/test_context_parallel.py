"""A sharded cache, over ranks that are threads here: the laws, and the same bits for any sharding.

tests/test_ranks.py runs it over processes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from properties import guard
from properties.backends import is_here
from properties.laws import LAWS
from properties.test_planted import SEARCH
from tokenselect import (
    AttentionOutput,
    Backend,
    Capability,
    InvalidProblem,
    Problem,
    SelectConfig,
    Selection,
    SelectionCache,
    UnsupportedProblem,
    run,
)
from tokenselect.conformance.laws.fitting import fitted
from tokenselect.conformance.laws.law import RAN
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.problems import Case
from tokenselect.conformance.tolerances import choice_finding, score_tolerance
from tokenselect.context_parallel import context_parallel_attention
from tokenselect.context_parallel.call import across
from tokenselect.context_parallel.shards import Alone
from tokenselect.dispatch import registry

CAPABILITY = Capability(
    dtypes=(torch.float32, torch.bfloat16, torch.float16), votes=("soft", "logit"), pools=(1,)
)
HOWS = ("blocks", "turns", "random", "one")


@pytest.fixture(autouse=True)
def _unguarded(_guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard stands in for a function of a module while a stage runs: for one thread at a time."""
    guard.take_off(monkeypatch)


class Thread(Alone):
    """A rank that is a thread: what is gathered lies in a list that all of them see."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier = rank, len(board), board, barrier

    def gather(self, x: Tensor) -> Tensor:
        self.board[self.rank] = x.clone()
        self.barrier.wait()
        found = torch.stack(self.board)
        self.barrier.wait()
        return found


def on_threads(size: int, run: Callable[[Alone], Any]) -> list[Any]:
    """What every rank returns."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def one(rank: int) -> Any:
        try:
            return run(Thread(rank, board, barrier))
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def owners(how: str, size: int, Lk: int, seed: int) -> Tensor:
    """Which rank has each position (Lk,): in runs, in turns, at random, or all on one."""
    at = torch.arange(Lk)
    if how == "blocks":
        return at * size // Lk
    if how == "turns":
        return at // (1 + seed % 3) % size
    if how == "one":
        return torch.full_like(at, seed % size)
    return torch.randint(size, (Lk,), generator=torch.Generator().manual_seed(seed))


def sharded(
    problem: Problem, how: str, size: int, seed: int = 0, caches: Any = None, backend: str = "cpu"
) -> Any:
    """Run the problem over so many ranks; every rank's result has the same bits."""
    p = problem
    owner = owners(how, size, p.Lk, seed)
    stand_in = [
        x.new_zeros(()).expand(p.B, p.Hkv, p.Lk, x.shape[3]) for x in (p.k_cache, p.v_cache)
    ]
    whole = replace(p, k_cache=stand_in[0], v_cache=stand_in[1], block_table=None)

    def step_of(ranks: Alone) -> Any:
        mine = owner == ranks.rank
        own, at = p, torch.arange(p.Lk).where(mine, -1)
        if not p.is_paged:  # only its own, in no order
            slots = mine.nonzero()[:, 0].flip(0)
            at = slots.int()
            own = replace(p, k_cache=p.k_cache[:, :, slots], v_cache=p.v_cache[:, :, slots])
        cache = caches[ranks.rank] if caches else None
        return across(ranks, whole, own, at, cache, backend, True)

    step, *others = on_threads(size, step_of)
    for other in others:
        assert all(bits(a, b) for a, b in zip(other[:4], step[:4], strict=True)), "ranks differ"
    return step


def bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(77.0), b.nan_to_num(77.0))


def over_ranks(problem: Problem) -> Any:
    """A fused step over three ranks, sharded in one of the ways."""
    how = HOWS[(problem.Lk + problem.D + problem.B) % len(HOWS)]
    step = sharded(problem, how, 3, seed=problem.Lk)
    selection = Selection(step.positions, step.counts)
    return AttentionOutput(step.out, step.lse), selection, step.dense_lse


BACKEND = Backend(
    "sharded", CAPABILITY, "reference", "reference", "reference", attend_fresh=over_ranks
)
OF_CALLS = [law for law in LAWS if law.holds.__module__.endswith((".attention", ".metamorphic"))]


@pytest.fixture
def backend() -> Any:
    registry.register(BACKEND.name, BACKEND)
    yield registry.load(BACKEND.name)
    registry._targets.pop(BACKEND.name)
    registry._loaded.pop(BACKEND.name)


@pytest.mark.parametrize("law", OF_CALLS, ids=lambda law: law.name)
def test_law(backend: Backend, law: Any) -> None:
    law.check(backend, settings(SEARCH, max_examples=10))
    assert RAN[backend.name, law.name] or law.name == "what_fits_is_not_moved"


@pytest.mark.parametrize("name", ["cpu", "native", "reference"])
@example(Case(lengths=(150, 90), D=64, content="few keys"), "turns", 3, 0)
@example(Case(lengths=(900,), D=24, G=4, dtype=torch.bfloat16, content="few keys"), "random", 4, 0)
@example(Case(lengths=(300,), D=80, Lq=5, content="few keys", softcap=2.0), "blocks", 5, 0)
@given(cases(), st.sampled_from(HOWS), st.integers(2, 5), st.integers(0, 99))
def test_a_selection_has_the_same_bits_for_any_sharding(
    name: str, case: Case, how: str, size: int, seed: int
) -> None:
    """By torch's operators, and by score stages of backends that declare `equal_keys`."""
    if not is_here(name):
        pytest.skip(f"{name} cannot run here")
    problem = fitted(case, BACKEND).problem()
    alone = sharded(problem, "one", 1, backend=name)
    step = sharded(problem, how, size, seed, backend=name)
    assert torch.equal(step.positions, alone.positions)
    assert torch.equal(step.counts, alone.counts)
    assert bits(step.dense_lse, alone.dense_lse)


@pytest.mark.parametrize("name", ["cpu", "native"])
@pytest.mark.parametrize("Lq", [1, 4])
def test_a_chunk_votes_by_a_mean_of_float32(backend: Backend, name: str, Lq: int) -> None:
    """What is cached in 16 bits is not what a mean is rounded to."""
    if not is_here(name):
        pytest.skip(f"{name} cannot run here")
    for seed in range(6):
        case = Case(
            lengths=(1500,), G=4, Lq=Lq, D=64, dtype=torch.bfloat16, seed=seed,
            config=SelectConfig(k=300, n_sink=2, n_local=4),
        )  # fmt: skip
        problem = case.problem()
        step = sharded(problem, "turns", 2, backend=name)
        selection = Selection(step.positions, step.counts)
        finding = choice_finding(problem, selection, score_tolerance(problem).votes)
        assert finding.holds, finding


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("n_without", [90, 30])
def test_where_no_logit_of_a_rank_is_finite(n_without: int, sinks: bool) -> None:
    problem = Case(lengths=(90,), has_sink_logits=sinks, seed=1).problem()
    problem.k_cache[:, :, :n_without] = -torch.inf
    problem.q.abs_()
    problem.v_cache[:, :, 0] = torch.nan if n_without == 30 else 1.0
    expected, info = run(problem, "reference", return_info=True)
    step = sharded(problem, "blocks", 3)
    assert torch.equal(step.positions, info.selection.positions)
    torch.testing.assert_close(step.out, expected, equal_nan=True)
    torch.testing.assert_close(step.lse, info.lse)


def test_bad_input_is_refused() -> None:
    q, k, v = (x for x in (torch.randn(2, 4, 1, 8), *torch.randn(2, 2, 2, 40, 8)))
    at, n = torch.arange(40), torch.tensor([40, 30], dtype=torch.int32)
    pages = torch.randn(20, 4, 2, 8)
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    paged = {"k_cache": pages, "v_cache": pages, "block_table": table}
    good = {"q": q, "k_cache": k, "v_cache": v, "token_positions": at, "cache_seqlens": n, "k": 8}
    context_parallel_attention(**good)
    context_parallel_attention(**good | paged)
    unused = table.clone()
    unused[1, 8:] = 999
    context_parallel_attention(**good | paged | {"block_table": unused})
    far = table.clone()
    far[1, 7] = 20
    for wrong in (
        {"q": None},
        {"q": [1.0]},
        {"q": q[:, :, 0]},
        {"k_cache": k[:1], "v_cache": v[:1]},
        {"k_cache": torch.cat((k, k)), "v_cache": torch.cat((v, v))},
        {"v_cache": v[:, :, :39]},
        {"v_cache": v.half()},
        {"cache_seqlens": [40, 30]},
        {"cache_seqlens": n.long()},
        {"cache_seqlens": n + 1},
        {"max_seqlen": 20},
        {"max_seqlen": 0},
        {"max_seqlen": "100"},
        {"max_seqlen": 40.5},
        {"token_positions": at[:39]},
        {"token_positions": at.float()},
        {"token_positions": at.roll(1) + (at == 3)},
        paged | {"block_table": table.long()},
        paged | {"block_table": table[0]},
        paged | {"block_table": torch.cat((table, table))},
        paged | {"block_table": far},
        paged | {"block_table": -table},
        {"process_group": "WORLD"},
        {"cache": "none"},
    ):
        with pytest.raises(InvalidProblem):
            context_parallel_attention(**good | wrong)
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert torch.equal(
        context_parallel_attention(**good | {"q": negated}), context_parallel_attention(**good)
    )
    for unsupported in (
        {"vote": "hard"},
        {"pool": 3},
        {"q": q.double(), "k_cache": k.double(), "v_cache": v.double()},
    ):
        with pytest.raises(UnsupportedProblem):
            context_parallel_attention(**good | unsupported)


@given(st.integers(0, 99), st.sampled_from(HOWS), st.integers(1, 4))
@settings(max_examples=10)
def test_caches_of_all_ranks_reuse_what_one_process_reuses(seed: int, how: str, size: int) -> None:
    case = Case(lengths=(80, 30), seed=seed, Hkv=2, G=3, max_reuse=4)
    whole = case.problem()
    caches = [SelectionCache(theta=0.8, max_reuse=4) for _ in range(size)]
    one = SelectionCache(theta=0.8, max_reuse=4)
    noise = torch.randn((6, *whole.q.shape), generator=torch.Generator().manual_seed(seed))
    for t, more in enumerate(noise):
        lengths = torch.tensor([74 + t, 20 + t * (t % 2)], dtype=torch.int32)
        q = whole.q + (0.3 * more if t != 3 else -2 * whole.q)
        problem = replace(whole, q=q, cache_seqlens=lengths)
        _, info = run(problem, "reference", cache=one, return_info=True)
        step = sharded(problem, how, size, seed, caches)
        assert torch.equal(step.reused, info.reused)
        assert torch.equal(step.positions, info.selection.positions)
    assert all(torch.equal(cache.hits, one.hits) for cache in caches)
    assert one.hits.sum() > 0 < one.misses.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_gives_a_number_the_same_bits_wherever_it_lies(dtype: torch.dtype) -> None:
    """What the bits of a selection rest on, besides sums and products."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype) * 20
    for function in (torch.exp, torch.tanh, torch.cos, torch.sin):
        expected = function(x)
        for start, length in ((0, 1), (1, 7), (3, 33), (17, 1000), (4999, 1)):
            assert torch.equal(
                function(x[start : start + length]), expected[start : start + length]
            )
        assert torch.equal(function(x.view(50, 100).T), expected.view(50, 100).T)
