"""The processes that share one call: what they send each other.

Everything that is added up over ranks is added up in the order of the ranks, once, and then sent to
all: so all hold the same bits, and take the same decisions from them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenselect.contract import CacheState, Problem
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
        try:
            resolve = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
            self._group = resolve(name)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise InvalidProblem(f"a process group that is gone: {error}", *_OF_A_GROUP) from None
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

    def check(
        self,
        problem: Problem,
        state: CacheState | None = None,
        theta: float | None = None,
        **more: Tensor | None,
    ) -> None:
        """Raise InvalidProblem, on every rank, unless all were given the same call.

        more  tensors that have to be the same, besides those of the Selection Cache and the rope
        """
        p = problem
        tensors = dict(more)
        what: dict[str, object] = {}
        if p.rope is not None:
            tensors["rope.inv_freq"] = p.rope.inv_freq
            what["rope"] = (p.rope.interleaved, p.rope.cached, float(p.rope.scaling))
        if state is not None:
            names = (field.name for field in fields(state))
            tensors |= zip((f"cache.{name}" for name in names), state.tensors(), strict=True)
        what["cache_seqlens"] = p.cache_seqlens.tolist()
        for name in ("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "softcap", "scale", "max_reuse"):
            what[name] = getattr(p, name)
        what |= {"dtype": p.q.dtype, "theta": theta, "a cache": state is not None, **p.config}
        # 30 and 30.0 are one softcap; but a k of 1 is no fraction.
        told = {name: repr(_as_float(name, value)) for name, value in what.items()}
        told |= {name: "nothing" if x is None else _digest(x) for name, x in tensors.items()}
        mine = torch.frombuffer(bytearray(_hash(repr(told).encode())[:8]), dtype=torch.int64)
        mine = mine.to(p.q.device)
        if bool((self.gather(mine) == mine).all()):
            return
        of_all: list[dict[str, str]] = [{}] * self.size
        with self._answered():
            dist.all_gather_object(of_all, told, group=self._group)
        raise InvalidProblem(*differing(of_all))

    def _run(self, collective: Any, out: Tensor, given: Tensor) -> None:
        """Run a collective of torch.distributed."""
        with self._answered():
            collective(out, given, group=self._group)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Raise RankFailed where torch.distributed says that others do not answer."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError is one
            raise RankFailed(self.rank, self.size, str(error)) from error


def _all_gather(out: Tensor, given: Tensor, group: Any) -> None:
    # The name of it since torch 2.13, which warns of the other.
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, given, group=group)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else empty(tuple(x.shape), x.dtype, x.device).copy_(x)


def differing(told: list[dict[str, str]]) -> tuple[str, str, str]:
    """Return the parts of an error: what came to ranks that were told different things."""
    names = dict.fromkeys(name for of in told for name in of)
    name = next(name for name in names if len({of.get(name) for of in told}) > 1)
    first, *others = [of.get(name, "nothing") for of in told]
    other = next(rank for rank, it in enumerate(others, 1) if it != first)
    return (
        f"{name} is {first} on rank 0 and {others[other - 1]} on rank {other}",
        "the ranks of a process group make the same calls in the same order, each with its own "
        "heads or tokens; what changes a SelectionCache is done on all of them",
        "give every rank the same lengths, settings and tensors",
    )


def _as_float(name: str, value: object) -> object:
    is_float = name in ("softcap", "scale", "theta", "select_scale", "fixed_share")
    return float(value) if is_float and value is not None else value  # type: ignore[arg-type]


def _digest(x: Tensor) -> str:
    """Return what a tensor's content is called, whatever its strides."""
    content = x.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return f"{tuple(x.shape)} {x.dtype} of SHA-256 {_hash(content.tobytes()).hex()[:12]}"


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


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
        raise InvalidProblem(f"process_group is a {type(group).__name__}", *_OF_A_GROUP)
    return group.group_name


_OF_A_GROUP = (
    "process_group is a torch.distributed.ProcessGroup that this process belongs to",
    "pass torch.distributed.group.WORLD, or what new_group returned on its members",
)


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
