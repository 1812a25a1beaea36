"""The yardstick itself: tolerances that are neither blind nor unfair."""

import math
from dataclasses import replace

import pytest
import torch

from tokenselect import AttentionOutput, Scores, SelectConfig, Selection
from tokenselect.conformance.problems import Case
from tokenselect.conformance.tolerances import (
    Tolerance,
    attend_tolerance,
    choice_finding,
    compare_selection,
    exact,
    score_tolerance,
)
from tokenselect.reference import BACKEND as REFERENCE

CASE = Case(lengths=(60, 9), config=SelectConfig(k=5, n_sink=2, n_local=4))


def test_comparison_is_entry_by_entry() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    got = truth.clone()
    got[700] = 2e-6
    finding = Tolerance(truth, torch.full_like(truth, 1e-6)).compare("x", got)
    assert not finding.holds
    assert finding.share == pytest.approx(2)
    assert "x[700]" in finding.where


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("right", [math.nan, math.inf, -math.inf, 0.0])
def test_what_is_not_finite_must_be_the_same(right: float, wrong: float) -> None:
    tolerance = Tolerance(torch.tensor([right], dtype=torch.float64), torch.tensor([0.5]).double())
    assert tolerance.compare("x", torch.tensor([right])).holds
    same = right == wrong or (math.isnan(right) and math.isnan(wrong))
    assert tolerance.compare("x", torch.tensor([wrong])).holds == same


def test_a_wrong_shape_or_dtype_is_a_finding() -> None:
    problem = CASE.problem()
    votes, lse = REFERENCE.score(problem)
    tolerance = score_tolerance(problem)
    assert tolerance.compare(Scores(votes, lse)).holds
    assert not tolerance.compare(Scores(votes[:, :, :, 1:], lse)).holds
    assert not tolerance.compare(Scores(votes.double(), lse)).holds
    selection = REFERENCE.select(votes, problem)
    out, lse = REFERENCE.attend(problem, selection)
    tolerance = attend_tolerance(problem, selection)
    assert tolerance.compare(AttentionOutput(out, lse)).holds
    assert not tolerance.compare(AttentionOutput(out.double(), lse)).holds
    assert not tolerance.compare(AttentionOutput(out, lse[..., None])).holds
    assert not compare_selection(
        Selection(selection.positions.long(), selection.count), selection
    ).holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("content", ["normal", "integers", "needles"])
def test_tolerances_are_tight_enough_to_mean_something(dtype: torch.dtype, content: str) -> None:
    """A hundred roundings of the arithmetic inside, not a percent of the value."""
    problem = replace(CASE, dtype=dtype, content=content).problem()
    tolerance = score_tolerance(problem).votes
    finite = tolerance.truth.isfinite()
    largest_logit = 8 * 50 * 8 if content == "needles" else 60
    u = 2.0**-24 if dtype != torch.float64 else 2.0**-23  # votes are float32 all the same
    assert (tolerance.slack[finite] <= 40 * largest_logit * u).all()
    assert (tolerance.slack[finite] > 0).all()


def test_truth_does_not_depend_on_the_dtype_it_came_in() -> None:
    problem = CASE.problem()
    again = exact(replace(problem, q=problem.q.double(), k_cache=problem.k_cache.double(),
                          v_cache=problem.v_cache.double()))  # fmt: skip
    assert torch.equal(score_tolerance(problem).votes.truth, REFERENCE.score(again).votes.double())


def test_choice_finds_a_swap_beyond_the_slack() -> None:
    problem = CASE.problem()
    tolerance = score_tolerance(problem).votes
    votes, _ = REFERENCE.score(problem)
    selection = REFERENCE.select(votes, problem)
    assert choice_finding(problem, selection, tolerance).holds
    sink_end, local_start = problem.config.regions(60, 1)
    row = votes[0, 0, 0, sink_end:local_start]
    order = row.argsort(descending=True) + sink_end
    swapped = selection.positions.clone()
    kept = [*range(sink_end), *order[:4].tolist(), int(order[5]), *range(local_start, 60)]
    swapped[0, 0, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int32)
    finding = choice_finding(problem, Selection(swapped, selection.count), tolerance)
    assert not finding.holds
    assert "is chosen" in finding.where
