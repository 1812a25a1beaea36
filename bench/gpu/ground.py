"""Where plans and CUDA graphs are checked, on what inputs, and how results are compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenselect
from bench.gpu.cases import Case, K, draw
from bench.gpu.device import Device, bits, same
from tokenselect import Plan, Problem, Rope, SelectConfig, SelectionCache, backends, register
from tokenselect.conformance.paging import scatter

THETA, MAX_REUSE = 0.9, 64
_NEAR = 0.1  # of plans to calls, on the CPU of a dry run only


class Differs(Exception):
    """What differs, and where."""


@dataclass(frozen=True)
class Ground:
    """Where the checks run. interface: None is CUDA's own graphs."""

    backend: str
    device: Device
    dry: bool = False
    quick: bool = False
    interface: Any = None

    @property
    def on_cuda(self) -> bool:
        return self.device.at.type == "cuda"

    @property
    def graphed(self) -> str:
        """The registered name of the backend that replays this one's plans."""
        name = f"{self.backend}-graphs"
        if name not in backends():
            made = tokenselect.cuda_graph(self.backend, name=name, interface=self.interface)
            register(name, made)
        return name

    def plans(self, problem: Problem) -> list[Plan]:
        """Plan for calls, and for replays."""
        return [tokenselect.plan(problem, backend) for backend in (self.backend, self.graphed)]

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return tokenselect.capture(step, interface=self.interface)

    def many(self, usual: int, dry: int, quick: int | None = None) -> int:
        return dry if self.dry else quick if self.quick and quick is not None else usual

    def problem(
        self, case: Case, *, page_size: int = 0, has_rope: bool = False, max_reuse: int = MAX_REUSE
    ) -> Problem:
        """Draw a case's problem, a small one in a dry run, maybe in pages or with a rope."""
        if self.dry:
            heads = {"Hq": 3, "Hkv": 1} if case.Hq == 9 else {"Hq": 4, "Hkv": 2}
            sizes = {"D": 32, "n": 112 if case.n < 128 * K else 160, "Lq": min(case.Lq, 8)}
            config = replace(case.config, k=16, n_sink=4, n_local=8)
            case = replace(case, config=config, **heads, **sizes)
        # A drawn problem has no rope, and its configuration none that needs one.
        p = draw(replace(case, config=SelectConfig()), self.device.at, torch.bfloat16)
        more: dict[str, Any] = {"max_reuse": max_reuse}
        k, v = p.k_cache, p.v_cache
        if has_rope:
            exponents = torch.arange(0, p.D, 2, device=k.device, dtype=torch.float32) / p.D
            more["rope"] = Rope(10000.0**-exponents)
        if page_size:  # in a random order
            random = torch.Generator().manual_seed(7)
            (k, v), table = scatter((k, v), page_size, random)
            more["block_table"] = table.to(k.device)
        return Problem.build(p.q, k, v, case.config, **more)


# --- calls, and what they give ---


class Call(NamedTuple):
    """Inputs of one call. poison: what the plans' memory is filled with before it."""

    what: str
    q: Tensor
    lengths: Tensor
    table: Tensor | None
    poison: int | None = None


def calls(p: Problem) -> Iterator[Call]:
    """What may change from call to call: queries, lengths, the block table; and what must not."""
    near = p.Lk - 6 * p.Lq - 8 - torch.arange(p.B, dtype=torch.int32, device=p.q.device)
    usual = Call("as captured", p.q, near, p.block_table)
    missing = near.clone()
    missing[p.B // 2] = 0
    yield usual
    yield usual._replace(what="as captured, again")
    yield usual._replace(what="longer", lengths=near + p.Lq)
    yield usual._replace(what="shorter", lengths=p.Lq + near // 3)
    yield usual._replace(what="a request of length 0", lengths=missing)
    yield usual._replace(what="at capacity", lengths=torch.full_like(near, p.Lk))
    yield usual._replace(what="other queries", q=p.q.roll(1, 1) - p.q)
    if p.block_table is not None:
        table = p.block_table.flip(1).contiguous()
        yield usual._replace(what="another block table", table=table)
    for poison in (0xFF, 0x7F):
        what = f"the plan's memory filled with 0x{poison:02X}"
        yield usual._replace(what=what, poison=poison)
        yield usual._replace(what=f"{what}, longer", lengths=near + p.Lq, poison=poison)


Given = dict[str, Tensor]


def given(out: Tensor, info: Any) -> Given:
    return {
        "out": out.clone(),
        "lse": info.lse.clone(),
        "positions": info.selection.positions.clone(),
        "count": info.selection.count.clone(),
        "reused": info.reused.clone(),
    }


def planned(p: Problem, plan: Plan, call: Call, cache: SelectionCache | None) -> Given:
    """A plan on a call's inputs; clones, since the plan's memory is overwritten."""
    for block in plan._scratch.blocks() if call.poison is not None else ():
        block.fill_(call.poison)
    more: dict[str, Any] = {"block_table": call.table, "cache": cache, "return_info": True}
    return given(*plan(call.q, p.k_cache, p.v_cache, call.lengths, **more))


def check_same(what: str, got: Given, right: Given, *, exact: bool = True) -> None:
    """Raise Differs unless both are bitwise the same; or nearly, where exact is not asked for."""
    for name, mine in got.items():
        theirs = right[name]
        if exact or name in ("count", "reused"):
            check_bits(f"{what}: {name}", mine, theirs)
        elif name != "positions":
            mine, theirs = (x.float().nan_to_num(0.0, 0.0, 0.0) for x in (mine, theirs))
            far = float((mine - theirs).abs().max())
            if not far <= _NEAR * (1 + float(theirs.abs().max())):
                raise Differs(f"{what}: {name} is {far:.3g} away")


def check_bits(what: str, got: Tensor, right: Tensor) -> None:
    if same(got, right):
        return
    if (got.shape, got.dtype) != (right.shape, right.dtype):
        raise Differs(f"{what}: {got.shape} {got.dtype}, not {right.shape} {right.dtype}")
    other = bits(got) != bits(right)
    first = tuple(other.nonzero()[0].tolist())
    raise Differs(
        f"{what}: {int(other.sum())} of {other.numel()} values differ, the first at {first}: "
        f"{got[first].item()!r}, not {right[first].item()!r}"
    )


def check_counts(what: str, mine: SelectionCache, theirs: SelectionCache) -> None:
    check_bits(f"{what}: hits", mine.hits.cpu(), theirs.hits.cpu())
    check_bits(f"{what}: misses", mine.misses.cpu(), theirs.misses.cpu())


def caches(count: int) -> list[SelectionCache]:
    return [SelectionCache(THETA, MAX_REUSE) for _ in range(count)]
