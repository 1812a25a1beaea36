"""How far a backend may be from the truth, stage by stage; derived, not chosen.

The truth is the reference run in float64 on the same inputs. A tolerance is a first-order bound on
what float32 arithmetic (float64, for float64 inputs) can do to it, entry by entry: no norm over a
whole tensor, which would hide one wrong row. docs/numerics.md derives it.
Every measure is an error as a share of its tolerance, so that at most 1 holds.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenselect.contract import AttentionOutput, Problem, Scores, Selection
from tokenselect.reference import BACKEND as REFERENCE
from tokenselect.reference.attend import heads_of
from tokenselect.reference.attend import placed as placed_to_attend
from tokenselect.reference.rows import read
from tokenselect.reference.score import placed as placed_to_score


class Finding(NamedTuple):
    """The worst entry of a comparison: its error as a share of the tolerance, and what it is."""

    share: float
    where: str

    @property
    def holds(self) -> bool:
        return self.share <= 1


class Tolerance(NamedTuple):
    """truth and slack, of one shape: |result - truth| <= slack, entry by entry."""

    truth: Tensor
    slack: Tensor

    def compare(self, name: str, got: Tensor) -> Finding:
        """Return the entry that uses most of its tolerance; non-finite ones must be equal."""
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


class ScoreTolerance(NamedTuple):
    """Tolerances of `Scores`; votes (B, R, S, Lk), lse (B, Hq)."""

    votes: Tolerance
    lse: Tolerance

    def compare(self, scores: Scores) -> Finding:
        dtypes = _dtype_finding(("votes", scores.votes), ("lse", scores.lse))
        return max(
            dtypes,
            self.votes.compare("votes", scores.votes),
            self.lse.compare("lse", scores.lse),
        )


class AttendTolerance(NamedTuple):
    """Tolerances of `AttentionOutput`; out (B, Hq, Lq, Dv), lse (B, Hq, Lq)."""

    out: Tolerance
    lse: Tolerance
    dtype: torch.dtype

    def compare(self, attended: AttentionOutput) -> Finding:
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
    """Return the same problem in float64."""
    sinks = problem.sink_logits
    return replace(
        problem,
        q=problem.q.double(),
        k_cache=problem.k_cache.double(),
        v_cache=problem.v_cache.double(),
        sink_logits=None if sinks is None else sinks.double(),
    )


def unit_roundoff(problem: Problem) -> float:
    """Return that of the dtype of computation: float32, or float64 for float64 inputs."""
    return torch.finfo(torch.promote_types(problem.q.dtype, torch.float32)).eps / 2


def score_tolerance(problem: Problem) -> ScoreTolerance:
    """Return what `score(problem)` may return."""
    truth = exact(problem)
    votes, lse = REFERENCE.score(truth)
    u, c = unit_roundoff(problem), problem.config
    vote_slack = torch.zeros_like(votes, dtype=torch.float64)
    lse_slack = torch.zeros_like(lse, dtype=torch.float64)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        candidates = slice(*c.regions(n, problem.Lq))
        for ballot, score_at in enumerate(c.ballots):
            queries, keys = placed_to_score(truth, b, n, score_at)
            keys = keys.repeat_interleave(problem.G, 0)
            head_slack = torch.zeros_like(keys[:, candidates, 0])
            for run in queries.tensor_split(min(c.n_query_means, problem.Lq), dim=1):
                s, error = _mean_logits(problem, run, keys)
                head_slack += _vote_slack(s, error, candidates, problem, u)
            slack = torch.stack([part.sum(0) for part in head_slack.chunk(problem.S)])
            if c.pool > 1 and slack.shape[1] > 0:
                pool = min(c.pool, 2 * slack.shape[1] - 1)
                slack = torch.nn.functional.max_pool1d(slack[:, None], pool, 1, pool // 2)[:, 0]
            rounding = _rounding(votes[b, ballot, :, candidates])
            vote_slack[b, ballot, :, candidates] = slack + rounding
            s, error = _mean_logits(problem, queries, keys)
            lse_slack[b] = _softmax_error(s, error, u).lse + _rounding(lse[b])
    return ScoreTolerance(Tolerance(votes.double(), vote_slack), Tolerance(lse.double(), lse_slack))


def _logits(problem: Problem, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return float64 logits (H, L, n) of queries (H, L, D) over keys (H, n, D)."""
    s = queries @ keys.transpose(1, 2) * scale
    return s if problem.softcap is None else problem.softcap * torch.tanh(s / problem.softcap)


def _mean_logits(problem: Problem, run: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (Hq, n) of the mean of queries (Hq, L, D), and bounds on their errors."""
    scale = problem.select_scale
    size = run.norm(dim=-1).mean(1, keepdim=True)  # at least the norm of the mean
    error = _logit_error(problem, size, keys, scale, averaged=run.shape[1])
    mean = run.mean(1, keepdim=True)
    is_finite = (mean @ keys.transpose(1, 2))[:, 0].isfinite()  # before a softcap would hide it
    s = torch.where(is_finite, _logits(problem, mean, keys, scale)[:, 0], -math.inf)
    return s, error[:, 0]


def _logit_error(
    problem: Problem, sizes: Tensor, keys: Tensor, scale: float, averaged: int = 1
) -> Tensor:
    """Return a bound on the errors of logits (H, L, n) of queries of norms `sizes` (H, L).

    The dot product and the mean by Cauchy-Schwarz; two rotations, the scale, the softcap.
    """
    roundings = _summing(problem.D) + _summing(averaged) + 24
    largest = scale * sizes[..., None] * keys.norm(dim=-1)[:, None]
    error = unit_roundoff(problem) * roundings * largest
    if problem.softcap is not None:
        error = error + 8 * unit_roundoff(problem) * largest.clamp(max=problem.softcap)
    finite: Tensor = error.nan_to_num(nan=0.0, posinf=0.0)  # such a logit counts as -inf, exactly
    return finite


def _summing(terms: int) -> float:
    """Return the roundings charged to a sum of `terms`: 4 sqrt(terms) (Higham, Mary 2019)."""
    return min(float(terms), 4 * math.sqrt(terms))


def _rounding(x: Tensor) -> Tensor:
    """Return what rounding finite values to float32 may do, twice."""
    return torch.finfo(torch.float32).eps * x.double().abs().nan_to_num(posinf=0.0)


class _SoftmaxError(NamedTuple):
    relative: Tensor  # of each exp(s - lse): (..., n)
    lse: Tensor  # absolute: (...)


def _softmax_error(s: Tensor, error: Tensor, u: float) -> _SoftmaxError:
    """Return bounds for a softmax over the last dim, from those on the errors of its logits."""
    if s.shape[-1] == 0:
        return _SoftmaxError(torch.zeros_like(s), s.sum(-1))
    largest, lse = s.amax(-1, keepdim=True), s.logsumexp(-1, keepdim=True)
    # exp rounds its argument, s less the largest or less lse, and its result.
    exp_error = error + u * (2 * (largest - s) + lse.abs() + 8)
    exp_error = torch.where(s > -math.inf, exp_error, 0.0)
    moved = (s + exp_error).logsumexp(-1, keepdim=True) - lse
    moved = moved.nan_to_num(nan=0.0) + u * (_summing(s.shape[-1]) + 8)
    size = largest.abs().nan_to_num(posinf=0.0)
    return _SoftmaxError(exp_error + moved, (moved + 2 * u * size)[..., 0])


def _vote_slack(s: Tensor, error: Tensor, candidates: slice, problem: Problem, u: float) -> Tensor:
    """Return a bound on the error of each head's vote for each candidate: (Hq, candidates)."""
    c = problem.config
    k = c.budget(s.shape[-1])
    if c.vote == "soft" and c.normalize == "visible":
        share = torch.softmax(s, -1).nan_to_num(0.0)[:, candidates]
        relative = _softmax_error(s, error, u).relative[:, candidates]
        return _soft_slack(share, relative, problem, u)
    s, error = s[:, candidates], error[:, candidates]
    if c.vote == "soft":
        share = torch.softmax(s, -1).nan_to_num(0.0)
        return _soft_slack(share, _softmax_error(s, error, u).relative, problem, u)
    if c.vote == "logit":
        return error + u * _summing(_voters(problem)) * s.abs().nan_to_num(posinf=0.0)
    if k == 0 or k >= s.shape[-1]:
        return torch.zeros_like(s)
    # Hard votes: what is among a head's k best may leave if the next one is near, and the reverse.
    best = s.topk(k + 1, dim=-1).values
    kth, following = best[:, -2:-1], best[:, -1:]
    reach = 2 * error.amax(-1, keepdim=True)
    near = torch.where(s >= kth, s - following <= reach, kth - s <= reach)
    return (near & s.isfinite()).double()


def _voters(problem: Problem) -> int:
    return problem.Hq * min(problem.config.n_query_means, problem.Lq)


def _soft_slack(share: Tensor, relative: Tensor, problem: Problem, u: float) -> Tensor:
    tiniest = torch.finfo(torch.float32).tiny  # exp may flush to zero below it
    return share * torch.expm1(relative + u * _summing(_voters(problem))) + 2 * tiniest


def attend_tolerance(problem: Problem, selection: Selection) -> AttendTolerance:
    """Return what `attend(problem, selection)` may return."""
    truth = exact(problem)
    out, lse = REFERENCE.attend(truth, selection)
    u, dtype = unit_roundoff(problem), problem.q.dtype
    # Below this, a weight or a result may vanish: float32 flushed to zero, or half a subnormal.
    finfo = torch.finfo(dtype)
    smallest = max(torch.finfo(torch.float32).tiny, finfo.smallest_normal * finfo.eps / 2)
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
            sizes = queries[heads].norm(dim=-1)
            error = _logit_error(problem, sizes, keys[groups], problem.scale)
            logits = _logits(problem, queries[heads], keys[groups], problem.scale)
            logits = logits.masked_fill(~seen, -math.inf)
            relative, lse_slack[b, heads] = _softmax_error(logits, error, u)
            weights = torch.softmax(logits, -1)
            if truth.sink_logits is not None:
                sinks = truth.sink_logits[heads, None, None].expand(-1, problem.Lq, 1)
                relative = relative + u * sinks.abs().nan_to_num(posinf=0.0)
                weights = torch.softmax(torch.cat((logits, sinks), -1), -1)[..., :-1]
            # Weights may be rounded to the cache's dtype before they meet the values.
            relative = relative + torch.finfo(dtype).eps / 2 + u * _summing(len(positions))
            met = values[groups].abs().nan_to_num(nan=0.0, posinf=0.0)
            flushed = smallest * (seen.double() @ met)
            spread = weights.nan_to_num(0.0) * torch.expm1(relative)
            out_slack[b, heads] = spread @ met + flushed
    lse_slack += _rounding(lse)
    out_slack += out.abs().nan_to_num(posinf=0.0) * torch.finfo(dtype).eps + smallest
    return AttendTolerance(Tolerance(out, out_slack), Tolerance(lse.double(), lse_slack), dtype)


def compare_selection(got: Selection, expected: Selection) -> Finding:
    """Compare bit for bit; return the first place that differs, or None."""
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


def choice_finding(problem: Problem, selection: Selection, tolerance: Tolerance) -> Finding:
    """Find whether votes within `tolerance` could have made a selection.

    Every chosen candidate's vote, raised by its slack, reaches every unchosen one's, lowered by
    its own; a split's first ballot likewise for what only it can have chosen. Sink and window are
    there, the count is right, positions ascend and are padded with -1.
    """
    c = problem.config
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        sink_end, local_start = c.regions(n, problem.Lq)
        size = local_start - sink_end
        expected = n - size + min(c.budget(n), size)
        for s in range(problem.S):
            where = f"selection[{b}, {s}]"
            row, count = selection.positions[b, s], int(selection.count[b, s])
            head, tail = row[:count].long(), row[count:]
            if count != expected or (tail != -1).any() or (head.diff() <= 0).any():
                return Finding(math.inf, f"{where}: count {count}, expected {expected}: {row}")
            chosen = row.new_zeros(n, dtype=torch.bool)
            if count > 0 and not (int(head[0]) >= 0 and int(head[-1]) < n):
                return Finding(math.inf, f"{where} leaves the request: {row}")
            chosen[head] = True
            if not (chosen[:sink_end].all() and chosen[local_start:].all()):
                return Finding(math.inf, f"{where} lacks a sink or local position: {row}")
            region = slice(sink_end, local_start)
            finding = _ballots_finding(
                c.shares(n),
                chosen[region],
                tolerance.truth[b, :, s, region],
                tolerance.slack[b, :, s, region],
            )
            if not finding.holds:
                return Finding(finding.share, f"{where}: {finding.where}")
    return Finding(0.0, "selection")


def _ballots_finding(
    shares: tuple[int, ...], chosen: Tensor, truth: Tensor, slack: Tensor
) -> Finding:
    """Return the choice among candidates (m,), from each ballot's votes and slack (R, m)."""
    upper, lower = truth + slack, truth - slack
    if chosen.all():
        return Finding(0.0, "all")
    explained = torch.zeros_like(chosen)
    *earlier, last_share = shares
    for ballot, share in enumerate(earlier):
        if share == 0:
            continue
        # Sure: better than all but share of the others can be. Explained: may be among the best.
        runner_up = upper[ballot].topk(share + 1).values[-1]
        if not chosen[lower[ballot] > runner_up].all():
            return Finding(math.inf, f"a sure choice of ballot {ballot} is missing")
        explained |= upper[ballot] >= lower[ballot].topk(share).values[-1]
    by_last = chosen & ~explained
    if int(by_last.sum()) > last_share:
        return Finding(math.inf, f"{int(by_last.sum())} choices are left to {last_share} votes")
    least, most = upper[-1][by_last], lower[-1][~chosen]
    if len(least) and len(most) and float(least.min()) < float(most.max()):
        return Finding(
            math.inf,
            f"a candidate with a vote of at most {float(least.min()):.9g} is chosen, "
            f"one of at least {float(most.max()):.9g} is not",
        )
    return Finding(0.0, "ballots")
