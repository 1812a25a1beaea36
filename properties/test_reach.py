"""The strategies really reach what is hard: a property that never meets a tie proves nothing."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tokenselect import Backend, Capability, Problem, reasons
from tokenselect.conformance.laws import fitting
from tokenselect.conformance.laws.fitting import fitted
from tokenselect.conformance.laws.strategies import ballots, cases, chosen
from tokenselect.conformance.problems import Ballots, Case, Chosen
from tokenselect.reference import BACKEND as REFERENCE

# They test the strategies, which change seldom.
pytestmark = pytest.mark.slow

_DRAWS = settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def candidates(problem: Problem, b: int) -> int:
    n = int(problem.cache_seqlens[b])
    sink_end, local_start = problem.config.regions(n, problem.Lq)
    return local_start - sink_end


def budget(problem: Problem, n: int) -> int:
    return problem.config.budget(n)


def tenths(problem: Problem, n: int) -> int:
    """Return the fraction that is k of n tokens; -1 if k is none."""
    k = problem.config.k
    return math.ceil(round(10 * k) * n / 10) if isinstance(k, float) else -1


def some_request(holds: Callable[[Problem, int, int], bool]) -> Callable[[Case, Problem], bool]:
    """Some request b of n tokens for which it holds."""

    def of_case(case: Case, problem: Problem) -> bool:
        return any(holds(problem, b, n) for b, n in enumerate(case.lengths))

    return of_case


FEATURES: dict[str, Callable[[Case, Problem], bool]] = {
    "n = 0": lambda case, p: 0 in case.lengths,
    "only n = 0": lambda case, p: set(case.lengths) == {0},
    "n = Lq": lambda case, p: case.Lq in case.lengths,
    "0 < n < n_sink": lambda case, p: any(0 < n < p.config.n_sink for n in case.lengths),
    "ragged": lambda case, p: len(set(case.lengths)) > 1,
    "no candidates": some_request(lambda p, b, n: n > 0 and candidates(p, b) == 0),
    "k = 0 with candidates": some_request(lambda p, b, n: budget(p, n) == 0 < candidates(p, b)),
    "k = candidates": some_request(lambda p, b, n: 0 < budget(p, n) == candidates(p, b)),
    "k > candidates > 0": some_request(lambda p, b, n: budget(p, n) > candidates(p, b) > 0),
    "0 < k < candidates": some_request(lambda p, b, n: 0 < budget(p, n) < candidates(p, b)),
    "budgets that differ": lambda case, p: len(set(map(p.config.budget, case.lengths))) > 1,
    "a fraction within its bounds": some_request(lambda p, b, n: budget(p, n) == tenths(p, n)),
    "k_min": some_request(lambda p, b, n: budget(p, n) > tenths(p, n) >= 0),
    "k_max": some_request(lambda p, b, n: budget(p, n) < tenths(p, n)),
    "n_sink = 0": lambda case, p: p.config.n_sink == 0,
    "n_local = 1": lambda case, p: p.config.n_local == 1,
    "MHA": lambda case, p: case.G == 1,
    "GQA with odd G": lambda case, p: case.G in (3, 7) and case.Hkv > 1,
    "MQA": lambda case, p: case.Hkv == 1 and case.G > 1,
    "a chunk of queries": lambda case, p: case.Lq > 1,
    "D != Dv": lambda case, p: case.Dv != case.D,
    "odd D": lambda case, p: case.D % 2 == 1,
    "softcap": lambda case, p: case.softcap is not None,
    "sink logits": lambda case, p: case.has_sink_logits,
    "pool": lambda case, p: p.config.pool > 1,
    "several query means": lambda case, p: min(p.config.n_query_means, case.Lq) > 1,
    "group scope": lambda case, p: p.S > 1,
    "split": lambda case, p: p.R == 2,
    "contiguous": lambda case, p: p.config.positions == "contiguous",
    "fixed": lambda case, p: p.config.score_at == "fixed",
    "raw keys": lambda case, p: case.rope == "raw",
    "interleaved pairs": lambda case, p: p.rope is not None and case.interleaved,
    "partial rotary dims": lambda case, p: p.rope is not None and p.rope.rotary_dim < case.D,
    "a strided cache": lambda case, p: not p.k_cache.is_contiguous(),
    "a strided paged cache": lambda case, p: p.is_paged and not p.k_cache.is_contiguous(),
    "NaN beyond n": lambda case, p: case.filler == "nan" and bool(p.k_cache.isnan().any()),
    "inf beyond n": lambda case, p: case.filler == "inf" and bool(p.k_cache.isinf().any()),
    **{f"{vote} vote": lambda case, p, vote=vote: p.config.vote == vote
       for vote in ("soft", "logit", "hard")},
    **{f"normalize={kind}": lambda case, p, kind=kind: p.config.normalize == kind
       for kind in ("visible", "candidates")},
    **{f"G = {G}": lambda case, p, G=G: case.G == G for G in (12, 32)},
    **{f"pages of {size}": lambda case, p, size=size: case.page_size == size
       for size in (1, 2, 16, 53, 64, 256)},
    "past the first 128": lambda case, p: max(case.lengths) > 128,
    **{f"{dtype}": lambda case, p, dtype=dtype: case.dtype == dtype
       for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)},
}  # fmt: skip


def test_cases_reach_every_feature() -> None:
    reached: Counter[str] = Counter()

    @_DRAWS
    @given(case=cases())
    def draw(case: Case) -> None:
        problem = case.problem()
        reached.update(name for name, holds in FEATURES.items() if holds(case, problem))

    draw()
    rare = {name: reached[name] for name in FEATURES if reached[name] < 5}
    assert not rare, f"of 400 cases too few are of these kinds: {rare}"


# As narrow as kernels for a GPU are.
NARROW = Backend(
    "narrow",
    Capability(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims=range(32, 257),
        group_sizes=range(1, 33),
        query_lengths=range(1, 4097),
        page_sizes=range(1, 257),
        votes=("soft",),
        fractions=(False,),
    ),
    REFERENCE.score,
    REFERENCE.select,
    REFERENCE.attend,
)
# What such a backend's problems cannot have.
NOT_NARROW = {
    *("odd D", "logit vote", "hard vote", f"{torch.float64}"),
    *("budgets that differ", "a fraction within its bounds", "k_min", "k_max"),
}
NARROW_FEATURES: dict[str, Callable[[Case, Problem], bool]] = {
    **{name: holds for name, holds in FEATURES.items() if name not in NOT_NARROW},
    **{f"D = {D}": lambda case, p, D=D: case.D == D for D in (32, 40, 64, 80, 96, 128, 256)},
    **{f"Dv = {D}": lambda case, p, D=D: case.Dv == D for D in (32, 40, 64, 80, 96, 128, 256)},
    "all of D is turned": lambda case, p: p.rope is not None and p.rope.rotary_dim == case.D,
}


def test_cases_reach_every_feature_of_a_narrow_backend() -> None:
    """Bent to what it declares, they lose nothing else, and none is beyond it."""
    reached: Counter[str] = Counter()

    @_DRAWS
    @given(case=cases())
    def draw(case: Case) -> None:
        case = fitted(case, NARROW)
        problem = case.problem()
        assert not reasons(NARROW, problem)
        reached.update(name for name, holds in NARROW_FEATURES.items() if holds(case, problem))

    draw()
    rare = {name: reached[name] for name in NARROW_FEATURES if reached[name] < 5}
    assert not rare, f"of 400 cases too few are of these kinds: {rare}"


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_cases_are_bent_to_a_layout(layout: str) -> None:
    """Of pages of every size that is taken."""
    takes = Capability(layouts=(layout,), page_sizes=range(10, 257))
    narrow = replace(NARROW, capability=takes)
    sizes: Counter[int | None] = Counter()

    @settings(_DRAWS, max_examples=100)
    @given(case=cases())
    def draw(case: Case) -> None:
        case = fitted(case, narrow)
        assert not reasons(narrow, case.problem())
        sizes[case.page_size] += 1

    draw()
    assert set(sizes) == ({None} if layout == "contiguous" else {16, 53, 64, 256})


def test_the_profile_of_devices_draws_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each combination of these is another kernel to compile."""
    monkeypatch.setattr(fitting, "on_a_device", lambda: True)
    shapes: Counter[tuple] = Counter()

    @settings(_DRAWS, max_examples=100)
    @given(case=cases())
    def draw(case: Case) -> None:
        case = fitted(case, NARROW)
        assert not reasons(NARROW, case.problem())
        shapes[case.D, case.G, case.dtype] += 1
        assert case.Dv in (64, 80, 128)
        assert case.page_size in (None, 1, 16)

    draw()
    assert {D for D, _, _ in shapes} == {64, 80, 128}
    assert {G for _, G, _ in shapes} == {1, 4, 7}
    assert {dtype for _, _, dtype in shapes} == set(NARROW.capability.dtypes)


VOTES: dict[str, Callable[[torch.Tensor, int], bool]] = {
    "a tie across the k-th place": lambda row, k: 0 < k < len(row) and tie_at(row, k),
    "all votes equal": lambda row, k: len(row) > 2 and bool((row == row[0]).all()),
    "both zeros": lambda row, k: bool((row == 0).any()) and both_zeros(row),
    "-inf candidates": lambda row, k: bool((row == -torch.inf).any()),
    "+inf candidates": lambda row, k: bool((row == torch.inf).any()),
    "NaN": lambda row, k: bool(row.isnan().any()),
    "rising": lambda row, k: len(row) > k > 0 and bool((row.diff() > 0).all()),
}


def tie_at(row: torch.Tensor, k: int) -> bool:
    ordered = row.sort(descending=True).values
    return bool(ordered[k - 1] == ordered[k])


def both_zeros(row: torch.Tensor) -> bool:
    zeros = row[row == 0].signbit()
    return bool(zeros.any() and not zeros.all())


def rows_of_votes(votes: torch.Tensor, problem: Problem) -> list[tuple[torch.Tensor, int]]:
    """Return the candidates' votes of each ballot and selection, and the request's budget."""
    rows = []
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        sink_end, local_start = problem.config.regions(n, problem.Lq)
        of_request = votes[b, :, :, sink_end:local_start].flatten(0, 1)
        rows += [(row, problem.config.budget(n)) for row in of_request if len(row)]
    return rows


def test_ballots_reach_every_kind_of_tie() -> None:
    reached: Counter[str] = Counter()

    @_DRAWS
    @given(drawn=ballots())
    def draw(drawn: Ballots) -> None:
        votes, problem = drawn.make()
        for row, k in rows_of_votes(votes, problem):
            reached.update(name for name, holds in VOTES.items() if holds(row, k))

    draw()
    rare = {name: reached[name] for name in VOTES if reached[name] < 5}
    assert not rare, f"of 400 ballots too few are of these kinds: {rare}"


def test_scored_votes_tie_too() -> None:
    """Not only made-up votes collide: votes that the reference scores do."""
    reached: Counter[str] = Counter()

    @settings(_DRAWS, max_examples=150)
    @given(case=cases())
    def draw(case: Case) -> None:
        problem = case.problem()
        votes, _ = REFERENCE.score(problem)
        for row, k in rows_of_votes(votes, problem):
            for name in ("a tie across the k-th place", "all votes equal"):
                reached[name] += VOTES[name](row, k)

    draw()
    assert min(reached.values()) >= 5, reached


@pytest.mark.parametrize("empty", [True, False])
def test_selections_reach_none_and_some(empty: bool) -> None:
    reached = 0

    @settings(_DRAWS, max_examples=100)
    @given(drawn=chosen())
    def draw(drawn: Chosen) -> None:
        nonlocal reached
        problem, (_, count) = drawn.make()
        rows = count[problem.cache_seqlens > 0]
        reached += bool(((rows == 0) if empty else (rows > 0)).any())

    draw()
    assert reached >= 5
