"""The processes that share one call: what they send each other.

Everything that is added up over ranks is added up in the order of the ranks, once, and then sent to
all: so all hold the same bits, and take the same decisions from them.
"""

import hashlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenselect.contract import Problem
from tokenselect.errors import InvalidProblem, RankFailed
from tokenselect.scratch import empty


class Ranks:
    """The ranks of a process group, by the group's name: torch.compile hands on that alone.

    rank, size  this process's number among them, and how many there are
    looks       whether a step may look at lengths, not to send votes where nobody votes: on a CPU,
                where that waits for nothing, and outside of a plan
    """

    def __init__(self, name: str, looks: bool = False) -> None:
        self._looks = looks
        self._group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
        self.rank, self.size = self._group.rank(), self._group.size()

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, one below the other: (size, *x.shape)."""
        mine = _contiguous(x)
        out = empty((self.size, *x.shape), x.dtype, x.device)
        self._run(_all_gather, out.view(-1), mine.view(-1))
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's x, added in the order of the ranks: x's shape.

        Each rank adds up one part and sends it to the others: two thirds or less of what `gather`
        would send from four ranks on.
        """
        part = -(-x.numel() // self.size)
        mine, theirs = (empty((self.size, part), x.dtype, x.device) for _ in range(2))
        mine.view(-1)[: x.numel()].view(x.shape).copy_(x)
        mine.view(-1)[x.numel() :].zero_()
        self._run(dist.all_to_all_single, theirs.view(-1), mine.view(-1))
        for row in theirs[1:]:
            theirs[0].add_(row)
        self._run(_all_gather, mine.view(-1), theirs[0])
        return mine.view(-1)[: x.numel()].view(x.shape)

    def whole(self, problem: Problem) -> Problem:
        """Return the problem with the queries of all ranks, theirs in the order of the ranks.

        What decides of a reuse is one mean query over all heads.
        """
        theirs = self.gather(problem.q)
        shape = (problem.B, self.size * problem.Hq, problem.Lq, problem.D)
        q = empty(shape, problem.q.dtype, problem.q.device)
        q.view(problem.B, self.size, *problem.q.shape[1:]).copy_(theirs.transpose(0, 1))
        return replace(problem, q=q)

    def votes(self, votes: Tensor, problem: Problem) -> Tensor:
        """Return the votes of all ranks' heads, pooled; off the candidates they may be anything.

        votes  (B, R, 1, Lk) float32, of this rank's heads, not pooled
        """
        if self._looks and not problem.cache_seqlens.any():
            return votes  # all reuse a selection
        total = self.sum(votes)
        return total if problem.config.pool == 1 else _pooled(total, problem)

    def check(self, problem: Problem, theta: float | None, **more: object) -> None:
        """Raise InvalidProblem, on every rank, unless all were given the same call.

        more  what has to be the same besides shapes, settings and lengths
        """
        p = problem
        what = {
            "B": p.B,
            "Hq": p.Hq,
            "Lq": p.Lq,
            "Lk": p.Lk,
            "D": p.D,
            "dtype": str(p.q.dtype),
            "softcap": p.softcap,
            "scale": p.scale,
            "max_reuse": p.max_reuse,
            "theta": theta,
            **p.config,
            "cache_seqlens": p.cache_seqlens.tolist(),
            **more,
        }
        digest = hashlib.sha256(repr(what).encode()).digest()[:8]
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(p.q.device)
        if bool((self.gather(mine) == mine).all()):
            return
        told: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(told, what, group=self._group)
        raise InvalidProblem(*differing(told))

    def _run(self, collective: Any, out: Tensor, given: Tensor) -> None:
        """Run a collective of torch.distributed."""
        try:
            collective(out, given, group=self._group)
        except RuntimeError as error:  # DistBackendError is one
            raise RankFailed(self.rank, self.size, str(error)) from error


def _all_gather(out: Tensor, given: Tensor, group: Any) -> None:
    # The name of it since torch 2.13, which warns of the other.
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, given, group=group)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else empty(tuple(x.shape), x.dtype, x.device).copy_(x)


def differing(told: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Return the parts of an error: what came to ranks that were told different things."""
    name = next(name for name in told[0] if any(of[name] != told[0][name] for of in told))
    other = next(rank for rank, of in enumerate(told) if of[name] != told[0][name])
    return (
        f"{name} is {told[0][name]} on rank 0 and {told[other][name]} on rank {other}",
        "the ranks of a process group make the same calls in the same order, each with its own "
        "heads or tokens",
        "give every rank the same lengths and settings",
    )


def _pooled(votes: Tensor, problem: Problem) -> Tensor:
    """Return the maximum over a centred window of candidates; read no length on the host.

    votes (B, R, S, Lk) float32, overwritten. Returns their shape: -inf off the candidates.
    """
    p, c, device = problem, problem.config, problem.q.device
    start, sink_end = (empty((p.B, 1), torch.int32, device) for _ in range(2))
    torch.add(p.cache_seqlens[:, None], 1 - p.Lq - c.n_local, out=start).clamp_(min=0)
    torch.clamp(start, max=c.n_sink, out=sink_end)
    at = torch.arange(p.Lk, out=empty((p.Lk,), torch.int32, device), device=device)
    off, late = (empty((p.B, p.Lk), torch.bool, device) for _ in range(2))
    torch.lt(at, sink_end, out=off).logical_or_(torch.ge(at, start, out=late))
    votes.masked_fill_(off[:, None, None], -torch.inf)
    best = empty(tuple(votes.shape), votes.dtype, device).copy_(votes)
    for by in range(1, min(c.pool // 2, p.Lk - 1) + 1):
        front, back = best[..., :-by], best[..., by:]
        torch.maximum(front, votes[..., by:], out=front)
        torch.maximum(back, votes[..., :-by], out=back)
    return best.masked_fill_(off[:, None, None], -torch.inf)


def name_of(group: object) -> str:
    """Return the name of a process group; raise InvalidProblem if it is none of this process's."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise InvalidProblem(
            f"process_group is a {type(group).__name__}",
            "process_group is a torch.distributed.ProcessGroup that this process belongs to",
            "pass torch.distributed.group.WORLD, or what new_group returned on its members",
        )
    return group.group_name


def sharing_heads(problem: Problem, group: object) -> str:
    """Return the name of a process group whose ranks may hold the problem's other heads."""
    if problem.config.scope != "layer":
        raise InvalidProblem(
            f"scope={problem.config.scope!r} with a process_group",
            "the heads of a process group make one selection; those of a KV head have their own",
            "leave process_group out: no rank needs another's votes",
        )
    return name_of(group)


def with_heads_of_all(problem: Problem, size: int) -> Problem:
    """Return a problem of the shapes that `Ranks.whole` returns, to make a cache's state for."""
    shape = (problem.B, size * problem.Hq, problem.Lq, problem.D)
    return replace(problem, q=problem.q[:, :1].expand(shape))
