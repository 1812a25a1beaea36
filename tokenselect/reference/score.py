"""Stage 1, score: how strongly the query heads vote for each candidate (TokenSelect, section 3.2).

qbar_h   = mean over i of q_{h,i}                                  the selection query
s_{h,j}  = softcap(select_scale * qbar_h . k_{h // G, j})          a logit, head by token
votes_j  = sum over h of softmax_j(s_h)                            the soft vote, eq. 7

The file starts with one head and one request. Then come several heads, runs of queries, ballots and
pages (`score`), and at last keys that move (`placed`). Equal keys get equal votes wherever they
are: what makes a vote is added up in one order.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect.contract import Problem, Scores, SelectConfig
from tokenselect.reference.rows import read
from tokenselect.reference.select import best


def logits(problem: Problem, query: Tensor, keys: Tensor) -> Tensor:
    """Return one head's logits (n,) of one query (D,) over keys (n, D); -inf if not finite."""
    s = problem.select_scale * added((keys * query).T)  # s_j = scale * qbar . k_j
    if problem.softcap is not None:
        capped = problem.softcap * torch.tanh(s / problem.softcap)
        return torch.where(s.isfinite(), capped, -math.inf)
    return torch.where(s.isfinite(), s, -math.inf)


def vote(s: Tensor, candidates: slice, c: SelectConfig) -> Tensor:
    """Return one head's votes for the candidates, from its logits s (n,)."""
    if c.vote == "logit":  # eq. 5
        return s[candidates]
    if c.vote == "hard":  # eq. 6
        votes = torch.zeros_like(s[candidates])
        votes[best(s[candidates], c.budget(len(s)))] = 1
        return votes
    if c.normalize == "candidates":  # eq. 7 over the candidates, as the released code has it
        return softmax(s[candidates])
    return softmax(s)[candidates]  # eq. 7


def score(problem: Problem) -> Scores:
    """Score every candidate of every request.

    Returns votes (B, R, S, Lk) float32, -inf off the candidates, and lse (B, Hq) float32: the
    natural log of the sum of exp(s) over all n positions, for the mean of all queries of the call.
    A logit that is not finite counts as -inf.
    """
    c = problem.config
    votes_shape = (problem.B, problem.R, problem.S, problem.Lk)
    device = problem.q.device
    votes = torch.full(votes_shape, -math.inf, dtype=torch.float32, device=device)
    lse = torch.full((problem.B, problem.Hq), -math.inf, dtype=torch.float32, device=device)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        sink_end, local_start = c.regions(n, problem.Lq)
        candidates = slice(sink_end, local_start)
        for ballot, score_at in enumerate(c.ballots):
            queries, keys = placed(problem, b, n, score_at)
            head_votes = []
            for h in range(problem.Hq):
                head_keys = keys[h // problem.G]
                runs = queries[h].tensor_split(min(c.n_query_means, problem.Lq))
                run_votes = [
                    vote(logits(problem, run.mean(0), head_keys), candidates, c) for run in runs
                ]
                head_votes.append(added(torch.stack(run_votes)))
                # The last ballot's stays: the true one of a split.
                lse[b, h] = logits(problem, queries[h].mean(0), head_keys).logsumexp(0)
            for s, voters in enumerate(torch.stack(head_votes).chunk(problem.S)):
                summed = added(voters)  # sum over h
                votes[b, ballot, s, candidates] = pooled(summed, c.pool).float()
    return Scores(votes, lse)


def placed(problem: Problem, b: int, n: int, score_at: str) -> tuple[Tensor, Tensor]:
    """Return queries (Hq, Lq, D) and keys (Hkv, n, D), placed where this ballot scores them.

    "true": each at its own position. "fixed": every key n_local before every query, so that content
    alone decides.
    """
    device = problem.q.device
    positions = torch.arange(n, device=device)
    query_positions = positions[n - problem.Lq :]
    keys = read(problem, problem.k_cache, b, positions)
    queries = problem.q[b].to(keys.dtype)
    rope = problem.rope
    if rope is None or not problem.needs_rotation(score_at):
        return queries, keys
    if score_at == "true":
        at, query_at = positions, query_positions
    else:
        at = torch.zeros_like(positions)
        query_at = torch.full_like(query_positions, problem.config.n_local)
    return rope.reposition(queries, query_positions, query_at), rope.reposition(keys, positions, at)


def added(x: Tensor) -> Tensor:
    """Sum x (m, L) over m, half onto half, in place: every column in the same order.

    A matrix product, and a sum of PyTorch's, add a column in an order that depends on its place.
    """
    while half := len(x) // 2:
        x[:half] += x[-half:]
        x = x[:-half]
    return x[0]


def softmax(s: Tensor) -> Tensor:
    """Return the softmax, zeros where every logit is -inf."""
    return torch.softmax(s, 0).nan_to_num(0.0)


def pooled(votes: Tensor, pool: int) -> Tensor:
    """Return the maximum over a centred window of `pool` candidates, clipped at the edges."""
    if pool == 1 or len(votes) == 0:
        return votes
    pool = min(pool, 2 * len(votes) - 1)
    return F.max_pool1d(votes[None, None], pool, stride=1, padding=pool // 2)[0, 0]
