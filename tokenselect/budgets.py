"""How far a backend may be from the truth, stage by stage; derived, not chosen.

The truth is the reference run in float64 on the same inputs. A budget is a first-order bound on
what float32 arithmetic (float64, for float64 inputs) in any order of addition can do to it, entry
by entry: no norm over a whole tensor, which would hide one wrong row. docs/numerics.md derives it.
Every measure is an error as a share of its budget, so that at most 1 holds.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenselect.contract import Attended, Problem, Scores, Selection
from tokenselect.reference import BACKEND as REFERENCE
from tokenselect.reference.attend import heads_of
from tokenselect.reference.attend import placed as placed_to_attend
from tokenselect.reference.cache import read
from tokenselect.reference.score import placed as placed_to_score


class Finding(NamedTuple):
    """The worst entry of a comparison: its error as a share of the budget, and what it is."""

    share: float
    where: str

    @property
    def holds(self) -> bool:
        return self.share <= 1


class Budget(NamedTuple):
    """truth and slack, of one shape: |result - truth| <= slack, entry by entry."""

    truth: Tensor
    slack: Tensor

    def compare(self, name: str, got: Tensor) -> Finding:
        """The entry of `got` that takes the largest share. Non-finite entries must be the same."""
        if got.shape != self.truth.shape:
            return Finding(math.inf, f"{name} is {tuple(got.shape)}, not {tuple(self.truth.shape)}")
        if got.numel() == 0:
            return Finding(0.0, name)
        got = got.double()
        same = (got == self.truth) | (got.isnan() & self.truth.isnan())
        share = torch.where(same, 0.0, (got - self.truth).abs() / self.slack)
        share = share.nan_to_num(nan=math.inf, posinf=math.inf)
        place = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
        values = f"{float(got[place]):.9g}, truth {float(self.truth[place]):.9g}"
        return Finding(
            float(share[place]), f"{name}{list(place)} = {values} +- {float(self.slack[place]):.3g}"
        )


class ScoreBudget(NamedTuple):
    """Budgets of `Scores`; votes (B, R, S, Lk), lse (B, Hq)."""

    votes: Budget
    lse: Budget

    def compare(self, scores: Scores) -> Finding:
        dtypes = _dtype_finding(("votes", scores.votes), ("lse", scores.lse))
        return max(
            dtypes,
            self.votes.compare("votes", scores.votes),
            self.lse.compare("lse", scores.lse),
        )


class AttendBudget(NamedTuple):
    """Budgets of `Attended`; out (B, Hq, Lq, Dv), lse (B, Hq, Lq)."""

    out: Budget
    lse: Budget
    dtype: torch.dtype

    def compare(self, attended: Attended) -> Finding:
        dtypes = _dtype_finding(("lse", attended.lse))
        if attended.out.dtype != self.dtype:
            dtypes = Finding(math.inf, f"out is {attended.out.dtype}, not {self.dtype}")
        return max(
            dtypes,
            self.out.compare("out", attended.out),
            self.lse.compare("lse", attended.lse),
        )


def _dtype_finding(*named: tuple[str, Tensor]) -> Finding:
    for name, tensor in named:
        if tensor.dtype != torch.float32:
            return Finding(math.inf, f"{name} is {tensor.dtype}, not torch.float32")
    return Finding(0.0, "")


def exact(problem: Problem) -> Problem:
    """The same problem in float64."""
    sinks = problem.sink_logits
    return replace(
        problem,
        q=problem.q.double(),
        k_cache=problem.k_cache.double(),
        v_cache=problem.v_cache.double(),
        sink_logits=None if sinks is None else sinks.double(),
    )


def unit_roundoff(problem: Problem) -> float:
    """Of the arithmetic inside: float32, or float64 for float64 inputs."""
    return torch.finfo(torch.promote_types(problem.q.dtype, torch.float32)).eps / 2


def score_budget(problem: Problem) -> ScoreBudget:
    """What `score(problem)` may return."""
    truth = exact(problem)
    votes, lse = REFERENCE.score(truth)  # type: ignore[operator]
    u, c = unit_roundoff(problem), problem.config
    vote_slack = torch.zeros_like(votes, dtype=torch.float64)
    lse_slack = torch.zeros_like(lse, dtype=torch.float64)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        candidates = slice(*c.regions(n, problem.Lq))
        for ballot, (score_at, _) in enumerate(c.ballots):
            queries, keys = placed_to_score(truth, b, n, score_at)
            keys = keys.repeat_interleave(problem.G, 0)
            error = _logit_error(problem, queries, keys, problem.select_scale)
            head_slack = torch.zeros_like(error[:, candidates])
            for run in queries.tensor_split(min(c.n_query_means, problem.Lq), dim=1):
                s = _logits(problem, run.mean(1, keepdim=True), keys, problem.select_scale)[:, 0]
                head_slack += _vote_slack(s, error, candidates, problem, u)
            slack = torch.stack([part.sum(0) for part in head_slack.chunk(problem.S)])
            if c.pool > 1 and slack.shape[1] > 0:
                slack = torch.nn.functional.max_pool1d(slack[:, None], c.pool, 1, c.pool // 2)[:, 0]
            rounding = votes[b, ballot, :, candidates].double().abs().nan_to_num(posinf=0.0) * (
                torch.finfo(torch.float32).eps
            )
            vote_slack[b, ballot, :, candidates] = slack + rounding
            s = _logits(problem, queries.mean(1, keepdim=True), keys, problem.select_scale)[:, 0]
            relative = _softmax_error(s, error, u).amax(1)
            lse_slack[b] = relative + 2**-23 * lse[b].double().abs().nan_to_num(posinf=0.0)
    return ScoreBudget(Budget(votes.double(), vote_slack), Budget(lse.double(), lse_slack))


def _logits(problem: Problem, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Float64 logits (H, L, n) of queries (H, L, D) over keys (H, n, D), -inf if not finite."""
    s = queries @ keys.transpose(1, 2) * scale
    capped = s if problem.softcap is None else problem.softcap * torch.tanh(s / problem.softcap)
    return torch.where(s.isfinite(), capped, -math.inf)


def _logit_error(problem: Problem, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Bound on the error of each logit (Hq, n): dot product, mean, rotation, scale, softcap."""
    largest_query = queries.norm(dim=-1).amax(-1, keepdim=True)
    terms = problem.D + problem.Lq + 24  # roundings: sums over D and Lq, two rotations, products
    error = unit_roundoff(problem) * terms * scale * largest_query * keys.norm(dim=-1)
    if problem.softcap is not None:
        error = error + 8 * unit_roundoff(problem) * problem.softcap
    finite: Tensor = error.nan_to_num(nan=0.0, posinf=0.0)  # such a logit counts as -inf, exactly
    return finite


def _softmax_error(s: Tensor, error: Tensor, u: float) -> Tensor:
    """Bound on the relative error of each exp(s - lse), from that of the logits; along dim -1."""
    if s.shape[-1] == 0:
        return torch.zeros_like(s)
    largest = s.abs().nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    sums = 40 + s.shape[-1] / 8  # additions in lanes or blocks, exp, division
    return error + error.amax(-1, keepdim=True) + u * (4 * largest + sums)


def _vote_slack(s: Tensor, error: Tensor, candidates: slice, problem: Problem, u: float) -> Tensor:
    """Bound on the error of each head's vote for each candidate: (Hq, candidates)."""
    c = problem.config
    if c.vote == "soft" and c.normalize == "visible":
        share = torch.softmax(s, -1).nan_to_num(0.0)[:, candidates]
        relative = _softmax_error(s, error, u)[:, candidates]
        return _soft_slack(share, relative, problem, u)
    s, error = s[:, candidates], error[:, candidates]
    if c.vote == "soft":
        share = torch.softmax(s, -1).nan_to_num(0.0)
        return _soft_slack(share, _softmax_error(s, error, u), problem, u)
    if c.vote == "logit":
        return error + u * problem.Hq * s.abs().nan_to_num(posinf=0.0)
    if c.k == 0 or c.k >= s.shape[-1]:
        return torch.zeros_like(s)
    # Hard votes: a head may take or leave what lies within the error of its k-th best.
    kth = s.topk(c.k, dim=-1).values[:, -1:]
    near = (s - kth).abs() <= 2 * error.amax(-1, keepdim=True)
    return (near & s.isfinite()).double()


def _soft_slack(share: Tensor, relative: Tensor, problem: Problem, u: float) -> Tensor:
    tiniest = torch.finfo(torch.float32).tiny  # exp may flush to zero below it
    return share * torch.expm1(relative + u * problem.Hq) + 2 * tiniest


def attend_budget(problem: Problem, selection: Selection) -> AttendBudget:
    """What `attend(problem, selection)` may return."""
    truth = exact(problem)
    out, lse = REFERENCE.attend(truth, selection)  # type: ignore[operator]
    u, dtype = unit_roundoff(problem), problem.q.dtype
    out_slack = torch.zeros_like(out)
    lse_slack = torch.zeros_like(lse, dtype=torch.float64)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        for s in range(problem.S):
            positions = selection.positions[b, s][: int(selection.count[b, s])].long()
            if n == 0 or len(positions) == 0:
                continue
            queries, keys = placed_to_attend(truth, b, n, positions)
            values = read(truth, truth.v_cache, b, positions)
            heads = list(heads_of(problem, s))
            groups = [h // problem.G for h in heads]
            newest = torch.arange(n - problem.Lq, n, device=positions.device)
            seen = positions <= newest[:, None]
            error = _logit_error(problem, queries[heads], keys[groups], problem.scale)
            error = error[:, None] * seen
            logits = _logits(problem, queries[heads], keys[groups], problem.scale)
            logits = logits.masked_fill(~seen, -math.inf)
            relative = _softmax_error(logits, error, u)
            if truth.sink_logits is not None:
                relative = relative + u * truth.sink_logits[heads].abs()[:, None, None]
            rounding = 2**-23 * lse[b, heads].double().abs().nan_to_num(posinf=0.0)
            lse_slack[b, heads] = relative.amax(-1) + rounding
            # Weights may be rounded to the cache's dtype before they meet the values.
            relative = relative + torch.finfo(dtype).eps / 2 + u * len(positions)
            met = values[groups].abs().nan_to_num(nan=0.0, posinf=0.0)
            weights = torch.softmax(logits, -1).nan_to_num(0.0)
            out_slack[b, heads] = (weights * torch.expm1(relative)) @ met
    smallest = torch.finfo(dtype).tiny
    out_slack = out_slack + out.abs().nan_to_num(posinf=0.0) * torch.finfo(dtype).eps + smallest
    return AttendBudget(Budget(out, out_slack), Budget(lse.double(), lse_slack), dtype)


def compare_selection(got: Selection, expected: Selection) -> Finding:
    """Bit-exact, or the first place where it is not."""
    for name, mine, theirs in zip(Selection._fields, got, expected, strict=True):
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            return Finding(
                math.inf,
                f"{name} is {tuple(mine.shape)} {mine.dtype}, "
                f"not {tuple(theirs.shape)} {theirs.dtype}",
            )
        if not torch.equal(mine, theirs):
            place = tuple(int(i) for i in (mine != theirs).nonzero()[0])
            values = f"{int(mine[place])}, not {int(theirs[place])}"
            return Finding(math.inf, f"{name}{list(place)} = {values}")
    return Finding(0.0, "selection")


def choice_finding(problem: Problem, selection: Selection, budget: Budget) -> Finding:
    """Whether a fresh selection is one that votes within `budget` could have made.

    Every chosen candidate's vote, raised by its slack, reaches every unchosen one's, lowered by
    its own; a split's first ballot likewise for what only it can have chosen. Sink and window are
    there, the count is right, positions ascend and are padded with -1.
    """
    c = problem.config
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        sink_end, local_start = c.regions(n, problem.Lq)
        size = local_start - sink_end
        expected = n - size + min(c.k, size)
        for s in range(problem.S):
            where = f"selection[{b}, {s}]"
            row, count = selection.positions[b, s], int(selection.count[b, s])
            head, tail = row[:count].long(), row[count:]
            if count != expected or (tail != -1).any() or (head.diff() <= 0).any():
                return Finding(math.inf, f"{where}: count {count}, expected {expected}: {row}")
            chosen = torch.zeros(n, dtype=torch.bool)
            if count > 0 and not (int(head[0]) >= 0 and int(head[-1]) < n):
                return Finding(math.inf, f"{where} leaves the request: {row}")
            chosen[head] = True
            if not (chosen[:sink_end].all() and chosen[local_start:].all()):
                return Finding(math.inf, f"{where} lacks a sink or local position: {row}")
            region = slice(sink_end, local_start)
            finding = _ballots_finding(
                problem,
                chosen[region],
                budget.truth[b, :, s, region],
                budget.slack[b, :, s, region],
            )
            if not finding.holds:
                return Finding(finding.share, f"{where}: {finding.where}")
    return Finding(0.0, "selection")


def _ballots_finding(problem: Problem, chosen: Tensor, truth: Tensor, slack: Tensor) -> Finding:
    """The choice among candidates (m,), from each ballot's votes and slack (R, m)."""
    upper, lower = truth + slack, truth - slack
    if chosen.all():
        return Finding(0.0, "all")
    explained = torch.zeros_like(chosen)
    for ballot, (_, share) in enumerate(problem.config.ballots[:-1]):
        if share == 0:
            continue
        # What must be chosen by this ballot, and what may have been.
        surely = lower[ballot] > upper[ballot].topk(share).values[-1]
        explained |= upper[ballot] >= lower[ballot].topk(share).values[-1]
        if not chosen[surely].all():
            return Finding(math.inf, f"a sure choice of ballot {ballot} is missing")
    least = upper[-1][chosen & ~explained]
    most = lower[-1][~chosen]
    if len(least) and len(most) and float(least.min()) < float(most.max()):
        return Finding(
            math.inf,
            f"a candidate with a vote of at most {float(least.min()):.9g} is chosen, "
            f"one of at least {float(most.max()):.9g} is not",
        )
    return Finding(0.0, "ballots")
