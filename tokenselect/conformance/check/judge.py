"""One problem on one backend, held to the reference by the rules of the contract."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokenselect import api
from tokenselect.conformance.check.kinds import KINDS, draw
from tokenselect.conformance.devices import back, on
from tokenselect.conformance.paging import overwrite_unselected
from tokenselect.conformance.tolerances import (
    AttendTolerance,
    Finding,
    ScoreTolerance,
    attend_tolerance,
    choice_finding,
    compare_selection,
    score_tolerance,
)
from tokenselect.contract import AttentionOutput, Problem, Scores, Selection
from tokenselect.selection_cache import SelectionCache


def poisoned(problem: Problem, selection: Selection) -> Problem:
    """Return the same problem with NaN in every row that is not selected."""
    k_cache, v_cache = problem.k_cache.clone(), problem.v_cache.clone()
    for cache_ in (k_cache, v_cache):
        overwrite_unselected(problem, cache_, selection, torch.nan)
    return replace(problem, k_cache=k_cache, v_cache=v_cache)


class Outcome(NamedTuple):
    """The finding that counts of one backend on one problem, and the stage that it is of."""

    stage: str
    finding: Finding


class Truth(NamedTuple):
    """What one problem's scores may be, the reference's selection, what attending to it may be."""

    scores: ScoreTolerance
    selection: Selection
    attended: AttendTolerance


@cache
def truth(kind: str, seed: int) -> Truth:
    """Compute what the results of a problem are compared with."""
    problem = draw(kind, seed)
    scores = score_tolerance(problem)
    selection = _reference_selection(scores.votes.truth.float(), problem)
    return Truth(scores, selection, attend_tolerance(problem, selection))


def _reference_selection(votes: Tensor, problem: Problem) -> Selection:
    return api.select(votes, problem, backend="reference")


def judge(name: str, kind: str, seed: int, device: str) -> Outcome:
    """Run one problem on one backend, as far as the first stage that is wrong.

    What is raised counts as wrong.
    """
    checks = _reuse if KINDS[kind].steps else _stages
    worst = Outcome("", Finding(0.0, ""))
    try:
        for outcome in checks(name, kind, seed, device):
            if not outcome.finding.holds:
                return outcome
            worst = max(worst, outcome, key=lambda outcome: outcome.finding.share)
    except Exception as error:  # whatever a backend raises is a failure to report, not to die of
        return Outcome("running it", Finding(math.inf, f"{type(error).__name__}: {error}"))
    return worst


def _stages(name: str, kind: str, seed: int, device: str) -> Iterator[Outcome]:
    """Run each stage on the reference's input, then the whole call."""
    problem, expected = draw(kind, seed), truth(kind, seed)
    there = on(device, problem)

    scores = api.score(there, name)
    yield Outcome("score", expected.scores.compare(Scores(*back(*scores))))

    exact = expected.scores.votes.truth.float()
    tied = (exact * 8).round()
    for votes in (exact, tied):
        selection = Selection(*back(*api.select(votes.to(device), there, name)))
        found = compare_selection(selection, _reference_selection(votes, problem))
        yield Outcome("select", found)

    given = on(device, expected.selection)
    attended = api.attend(on(device, poisoned(problem, expected.selection)), given, name)
    yield Outcome("attend", expected.attended.compare(AttentionOutput(*back(*attended))))

    done = _call(name, problem, device)
    yield Outcome("attention", choice_finding(problem, done.selection, expected.scores.votes))
    if torch.equal(done.selection.positions, expected.selection.positions):
        allowed = expected.attended
    else:
        allowed = attend_tolerance(problem, done.selection)
    yield Outcome("attention", allowed.compare(done.attended))


def _reuse(name: str, kind: str, seed: int, device: str) -> Iterator[Outcome]:
    """Decode steps with one SelectionCache: queries alike, then one request's is another."""
    whole = draw(kind, seed)
    seen = SelectionCache(max_reuse=4)
    stored: dict[int, list[int]] = {}
    for step in range(KINDS[kind].steps):
        q = whole.q.clone()
        if step >= 6:
            q[0] = q[0].flip(-1)
        n = torch.full_like(whole.cache_seqlens, whole.Lk // 2 + step)
        problem = replace(whole, q=q, cache_seqlens=n, max_reuse=seen.max_reuse)
        done = _call(name, problem, device, seen)
        # A selection is stored at step 0, after four hits, and where the query changed.
        expected = [step not in (0, 5, 6), step not in (0, 5)]
        if done.reused.tolist() != expected:
            came = f"step {step}: reused {done.reused.tolist()}, not {expected}"
            yield Outcome("reuse", Finding(math.inf, came))
            return
        for b in range(problem.B):
            positions = done.selection.positions[b, 0, : int(done.selection.count[b, 0])].tolist()
            if expected[b] and positions != [*stored[b], int(n[b]) - 1]:
                came = f"step {step}: [{b}] attends to {positions}, stored were {stored[b]}"
                yield Outcome("reuse", Finding(math.inf, came))
            stored[b] = positions
        # To the rule of fresh choices, a request that reuses its selection is not there.
        fresh = Selection(
            done.selection.positions.masked_fill(done.reused[:, None, None], -1),
            done.selection.count.masked_fill(done.reused[:, None], 0),
        )
        chosen_by = replace(problem, cache_seqlens=n.masked_fill(done.reused, 0))
        votes = score_tolerance(chosen_by).votes
        yield Outcome("attention", choice_finding(chosen_by, fresh, votes))
        allowed = attend_tolerance(problem, done.selection)
        yield Outcome("attention", allowed.compare(done.attended))


class _Done(NamedTuple):
    attended: AttentionOutput
    selection: Selection
    reused: Tensor


def _call(name: str, problem: Problem, device: str, seen: SelectionCache | None = None) -> _Done:
    """Return what the whole call makes of a problem, back on the CPU."""
    out, info = api.run(on(device, problem), name, cache=seen, return_info=True)
    attended = AttentionOutput(*back(out, info.lse))
    return _Done(attended, Selection(*back(*info.selection)), info.reused.cpu())
