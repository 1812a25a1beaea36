"""Stage 2, select: the sink, the candidates with the most votes, the local window.

selection  =  {j < n_sink}  u  {the k candidates with the largest votes_j}  u  {the newest}
"""

import torch
from torch import Tensor

from tokenselect.contract import Problem, Selection


def best(votes: Tensor, k: int) -> Tensor:
    """Return the places of the k largest of votes (L,), the lower place first among equals."""
    votes = votes.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(votes, descending=True, stable=True).indices[:k]


def select(votes: Tensor, problem: Problem) -> Selection:
    """Choose k candidates by votes (B, R, S, Lk) float32, ballot after ballot. Bit-exact.

    Each ballot fills its share of k from those not yet chosen. Equal votes: the lower position
    first; -0.0 equals 0.0; NaN counts as -inf. All candidates, if there are no more than k.
    Returns positions (B, S, K) int32, ascending, padded with -1, and count (B, S) int32.
    """
    c = problem.config
    shape = (problem.B, problem.S, problem.K)
    positions = torch.full(shape, -1, dtype=torch.int32, device=votes.device)
    count = torch.zeros(shape[:2], dtype=torch.int32, device=votes.device)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        sink_end, local_start = c.regions(n, problem.Lq)
        for s in range(problem.S):
            chosen = torch.zeros(n, dtype=torch.bool, device=votes.device)
            chosen[:sink_end] = True
            chosen[local_start:] = True
            for ballot, share in enumerate(c.shares(n)):
                free = torch.nonzero(~chosen)[:, 0]
                chosen[free[best(votes[b, ballot, s, free], share)]] = True
            selected = torch.nonzero(chosen)[:, 0]
            positions[b, s, : len(selected)] = selected
            count[b, s] = len(selected)
    return Selection(positions, count)
