"""What backends are tried on: a few numbers, a structure and a seed that make one problem.

A `Case` prints as Python that makes it again. Its tensors come from a seeded generator. Needs
torch alone.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenselect.conformance.paging import scatter
from tokenselect.contract import Problem, SelectConfig, Selection
from tokenselect.rope import Rope

Content = Literal[
    "normal", "integers", "equal", "zeros", "signed zeros", "needles", "ascending", "few keys"
]
# What is drawn. "few keys" is for a check of few problems, of which one has to tie.
CONTENTS: tuple[Content, ...] = (
    "normal",
    "integers",
    "equal",
    "zeros",
    "signed zeros",
    "needles",
    "ascending",
)
Strides = Literal["plain", "token-major", "sliced", "reversed dims"]
STRIDES: tuple[Strides, ...] = ("plain", "token-major", "sliced", "reversed dims")
# What lies in the cache where no token of the request is: past n, and in pages of nobody.
Filler = Literal["zeros", "nan", "inf"]
FILLERS: tuple[Filler, ...] = ("zeros", "nan", "inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem, in numbers. `problem()` makes it."""

    # Whether another problem of the kind may be tried instead, one that a backend takes.
    can_bend = True  # no field: as it is, it would be shown

    lengths: tuple[int, ...] = (40,)
    Hkv: int = 2
    G: int = 2
    Lq: int = 1
    D: int = 8
    Dv: int = 8
    dtype: torch.dtype = torch.float32
    page_size: int | None = None
    spare: int = 3
    content: Content = "normal"
    strides: Strides = "plain"
    filler: Filler = "nan"
    softcap: float | None = None
    scale: float | None = None
    has_sink_logits: bool = False
    rope: Literal["rotated", "raw"] | None = None
    rotary_dim: int = 8
    interleaved: bool = False
    rope_scaling: float = 1.0
    config: SelectConfig = field(default_factory=lambda: SelectConfig(k=8, n_sink=2, n_local=4))
    max_reuse: int = 0
    seed: int = 0

    def problem(self) -> Problem:
        """Return the problem, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        B, Hq, capacity = len(self.lengths), self.Hkv * self.G, max(*self.lengths, self.Lq, 1)
        capacity += self.spare
        q = content(self.content, (B, Hq, self.Lq, self.D), generator)
        k = content(self.content, (B, self.Hkv, capacity, self.D), generator)
        v = content(self.content, (B, self.Hkv, capacity, self.Dv), generator)
        if self.content == "needles":
            k = with_needles(k, q, generator)
        if self.content == "few keys":
            k = k[:, :, torch.arange(capacity, device="cpu") % 7]
        for b, n in enumerate(self.lengths):
            k[b, :, n:] = v[b, :, n:] = FILL[self.filler]
        q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        block_table = None
        if self.page_size is not None:
            (k, v), block_table = scatter((k, v), self.page_size, generator, FILL[self.filler])
            for b, n in enumerate(self.lengths):  # past the last page in use
                block_table[b, -(-n // self.page_size) :] = (-1, 2**31 - 1, -(2**31))[b % 3]
            block_table = strided(block_table, self.strides)
        # Some that take nearly all of the weight, and some that take none.
        sinks = None
        if self.has_sink_logits:
            sinks = 4 * torch.randn(Hq, generator=generator, device="cpu")
            sinks = strided(sinks.to(self.dtype) if self.seed % 2 else sinks, self.strides)
        return Problem.build(
            strided(q, self.strides),
            strided(k, self.strides),
            strided(v, self.strides),
            self.config,
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32, device="cpu"),
            block_table=block_table,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=sinks,
            rope=self._rope(),
            max_reuse=self.max_reuse,
        )

    def _rope(self) -> Rope | None:
        if self.rope is None:
            return None
        dims = min(self.rotary_dim, self.D - self.D % 2)
        inv_freq = 10000.0 ** (-torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)
        return Rope(inv_freq, self.interleaved, self.rope, self.rope_scaling)

    def __repr__(self) -> str:
        shown = {
            name: value for name, value in vars(self).items() if value != getattr(Case(), name)
        }
        return f"Case({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


FILL = {"zeros": 0.0, "nan": float("nan"), "inf": float("inf")}


def content(kind: Content, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float64 numbers of one kind; all kinds but "normal" are made to collide."""
    if kind in ("normal", "needles"):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if kind in ("integers", "few keys"):
        return torch.randint(-2, 3, shape, generator=generator, device="cpu").double()
    if kind == "signed zeros":
        signs = torch.randint(0, 2, shape, generator=generator, device="cpu").double() * 2 - 1
        return 0.0 * signs
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    rows = (*shape[:-2], 1, shape[-1])
    row = torch.randn(rows, generator=generator, dtype=torch.float64, device="cpu")
    if kind == "equal":
        return row.expand(shape).clone()
    rising = torch.linspace(0, 1, shape[-2], dtype=torch.float64, device="cpu")[:, None]
    return row.abs() * rising


def with_needles(k: Tensor, q: Tensor, generator: torch.Generator) -> Tensor:
    """Return keys of which a few point along a query, so that their logits reach the hundreds."""
    groups = q.shape[1] // k.shape[1]
    for _ in range(3):
        places = torch.randint(0, k.shape[2], (k.shape[0],), generator=generator, device="cpu")
        for b, place in enumerate(places.tolist()):
            k[b, :, place] = q[b, ::groups, 0] * 50
    return k


def strided(x: Tensor, kind: Strides) -> Tensor:
    """Return the same numbers under other strides."""
    if kind == "token-major" and x.ndim == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        fill = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), fill)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if kind == "reversed dims":
        dims = tuple(reversed(range(x.ndim)))
        return x.permute(dims).contiguous().permute(dims)
    return x


Votes = Literal["few values", "all equal", "signed zeros", "infinite", "nan", "rising", "normal"]
VOTES: tuple[Votes, ...] = (
    *("few values", "all equal", "signed zeros", "infinite", "nan", "rising", "normal"),
)


@dataclass(frozen=True)
class Ballots:
    """A problem, and votes for it that do not come from scoring: made to collide."""

    case: Case
    votes: Votes
    seed: int

    def make(self) -> tuple[Tensor, Problem]:
        """Return the votes and the problem."""
        problem = self.case.problem()
        generator = torch.Generator().manual_seed(self.seed)
        shape = (problem.B, problem.R, problem.S, problem.Lk)
        if self.votes == "few values":
            votes = torch.randint(0, 3, shape, generator=generator, device="cpu").float()
        elif self.votes == "all equal":
            votes = torch.full(shape, 0.5, device="cpu")
        elif self.votes == "signed zeros":
            signs = torch.randint(0, 2, shape, generator=generator, device="cpu").float() - 0.5
            votes = 0.0 * signs
        elif self.votes == "rising":
            votes = torch.arange(shape[-1], device="cpu").float().expand(shape).clone()
        else:
            votes = torch.randn(shape, generator=generator, device="cpu")
        if self.votes in ("infinite", "nan"):
            which = torch.randint(0, 3, shape, generator=generator, device="cpu")
            votes[which == 0] = -torch.inf
            votes[which == 1] = torch.nan if self.votes == "nan" else torch.inf
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            sink_end, local_start = problem.config.regions(n, problem.Lq)
            votes[b, :, :, :sink_end] = -torch.inf
            votes[b, :, :, local_start:] = -torch.inf
        return votes, problem


# So far out that a float32 angle is off by a thousandth of a radian; few heads, few candidates.
FAR = Case(lengths=(2**16,), Hkv=1, G=1, D=32, Dv=1, config=SelectConfig(8, 2, 4, vote="logit"))


@dataclass(frozen=True)
class Chosen:
    """A problem, and a selection that no vote need explain: any positions, also none."""

    case: Case
    density: float
    seed: int

    def make(self) -> tuple[Problem, Selection]:
        """Return the problem and the selection."""
        problem = self.case.problem()
        generator = torch.Generator().manual_seed(self.seed)
        shape = (problem.B, problem.S, problem.K)
        positions = torch.full(shape, -1, dtype=torch.int32, device="cpu")
        count = torch.zeros(shape[:2], dtype=torch.int32, device="cpu")
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            for s in range(problem.S):
                drawn = torch.rand(n, generator=generator, device="cpu") < self.density
                # Never position 0 alone: a padding of -1 read as row 0 must not be hidden.
                picked = drawn.nonzero()[:, 0][-problem.K :]
                positions[b, s, : len(picked)] = picked.int()
                count[b, s] = len(picked)
        return problem, Selection(positions, count)


def with_config(problem: Problem, **changes: Any) -> Problem:
    """Return the same problem under another configuration."""
    return replace(problem, config=replace(problem.config, **changes))
