"""What the properties are tried on: problems drawn as a few numbers, a structure and a seed.

A `Case` prints as Python that makes it again. Its tensors come from a seeded generator; what
Hypothesis draws and shrinks are shapes, settings and the kind of content.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bench.workloads import TINY, WORKLOADS
from bench.workloads import make as make_workload
from tokenselect import Backend, Capability, Problem, Rope, SelectConfig

# Page 0 and slot 0 are never handed out, so that a stray index shows.
Content = Literal["normal", "integers", "equal", "zeros", "signed zeros", "needles", "ascending"]
CONTENTS = ("normal", "integers", "equal", "zeros", "signed zeros", "needles", "ascending")
Strides = Literal["plain", "token-major", "sliced", "reversed dims"]
STRIDES = ("plain", "token-major", "sliced", "reversed dims")
# What lies in the cache where no token of the request is: past n, and in pages of nobody.
Filler = Literal["zeros", "nan", "inf"]
FILLERS = ("zeros", "nan", "inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem, in numbers. `problem()` makes it."""

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
    workload: str | None = None

    def problem(self) -> Problem:
        if self.workload is not None:
            return self._named()
        generator = torch.Generator().manual_seed(self.seed)
        B, Hq, capacity = len(self.lengths), self.Hkv * self.G, max(*self.lengths, self.Lq, 1)
        capacity += self.spare
        q = content(self.content, (B, Hq, self.Lq, self.D), generator)
        k = content(self.content, (B, self.Hkv, capacity, self.D), generator)
        v = content(self.content, (B, self.Hkv, capacity, self.Dv), generator)
        if self.content == "needles":
            k = with_needles(k, q, generator)
        for b, n in enumerate(self.lengths):
            k[b, :, n:] = v[b, :, n:] = FILL[self.filler]
        q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        block_table = None
        if self.page_size is not None:
            k, v, block_table = paged(k, v, self, generator)
        # Some that take nearly all of the weight, and some that take none.
        sinks = 4 * torch.randn(Hq, generator=generator) if self.has_sink_logits else None
        return Problem.build(
            strided(q, self.strides),
            strided(k, self.strides),
            strided(v, self.strides),
            self.config,
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32),
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
        inv_freq = 10000.0 ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        return Rope(inv_freq, self.interleaved, self.rope, self.rope_scaling)

    def _named(self) -> Problem:
        return make_workload(WORKLOADS[self.workload], seed=self.seed)

    def __repr__(self) -> str:
        shown = {
            name: value for name, value in vars(self).items() if value != getattr(Case(), name)
        }
        return f"Case({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


FILL = {"zeros": 0.0, "nan": float("nan"), "inf": float("inf")}


def content(kind: Content, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float64 numbers of one kind; all kinds but the first are made to collide."""
    if kind in ("normal", "needles"):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "integers":
        return torch.randint(-2, 3, shape, generator=generator).double()
    if kind == "signed zeros":
        signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return 0.0 * signs
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.float64)
    row = torch.randn(*shape[:-2], 1, shape[-1], generator=generator, dtype=torch.float64)
    if kind == "equal":
        return row.expand(shape).clone()
    rising = torch.linspace(0, 1, shape[-2], dtype=torch.float64)[:, None]
    return row.abs() * rising


def with_needles(k: Tensor, q: Tensor, generator: torch.Generator) -> Tensor:
    """Keys of which a few point along a query, so that their logits reach the hundreds."""
    groups = q.shape[1] // k.shape[1]
    for _ in range(3):
        places = torch.randint(0, k.shape[2], (k.shape[0],), generator=generator)
        for b, place in enumerate(places.tolist()):
            k[b, :, place] = q[b, ::groups, 0] * 50
    return k


def paged(
    k: Tensor, v: Tensor, case: Case, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same caches in pages, scattered over a pool with pages of nobody in it."""
    B, Hkv, capacity, _ = k.shape
    size = case.page_size
    per_request = -(-capacity // size)
    n_pages = B * per_request + 2
    order = torch.randperm(n_pages - 1, generator=generator)[: B * per_request] + 1
    block_table = order.view(B, per_request).int()
    pools = []
    for cache in (k, v):
        whole = torch.full((B, Hkv, per_request * size, cache.shape[-1]), FILL[case.filler])
        whole = whole.to(cache.dtype)
        whole[:, :, :capacity] = cache
        pages = whole.unflatten(2, (per_request, size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        pool = torch.full((n_pages, *pages.shape[1:]), FILL[case.filler], dtype=cache.dtype)
        pool[order] = pages
        pools.append(pool)
    for b, n in enumerate(case.lengths):
        block_table[b, -(-n // size) :] = (-1, 2**31 - 1, -(2**31))[b % 3]
    return *pools, block_table


def strided(x: Tensor, kind: Strides) -> Tensor:
    """The same numbers under other strides."""
    if kind == "token-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if kind == "reversed dims":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return x


def lengths(Lq: int, config: SelectConfig) -> st.SearchStrategy[int]:
    """n of a request: nothing, the new tokens alone, around each boundary, or plenty."""
    edges = [0, Lq, 63, 64, 65, 127, 128, 129]  # the last of a tile, and the first of the next
    for edge in (config.n_sink, config.n_sink + config.n_local + Lq - 1):
        edges += [edge - 1, edge, edge + 1, edge + config.k, edge + config.k + 1]
    allowed = sorted({n for n in edges if n == 0 or Lq <= n <= 150})
    return st.one_of(st.integers(Lq, 90), st.sampled_from(allowed))


@st.composite
def configs(draw: st.DrawFn, *, moved: bool, **fixed: Any) -> SelectConfig:
    chosen: dict[str, Any] = {
        "k": draw(st.sampled_from([0, 1, 2, 5, 8, 17, 200])),
        "n_sink": draw(st.sampled_from([0, 1, 3, 8])),
        "n_local": draw(st.sampled_from([1, 2, 5, 16])),
        "vote": draw(st.sampled_from(["soft", "soft", "logit", "hard"])),
        "normalize": draw(st.sampled_from(["visible", "candidates"])),
        "scope": draw(st.sampled_from(["layer", "group"])),
        "select_scale": draw(st.sampled_from([None, None, 1.0, 0.3])),
        "pool": draw(st.sampled_from([1, 1, 3, 7])),
        "n_query_means": draw(st.sampled_from([1, 1, 2, 3])),
    }
    if moved:
        chosen["positions"] = draw(st.sampled_from(["original", "contiguous"]))
        chosen["score_at"] = draw(st.sampled_from(["true", "fixed", "split"]))
        chosen["fixed_share"] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    return SelectConfig(**chosen | fixed)


@st.composite
def cases(draw: st.DrawFn, *, config: dict[str, Any] | None = None, **fixed: Any) -> Case:
    """Any problem that the contract allows, small. `config` and `fixed` pin settings."""
    rope = draw(st.sampled_from([None, None, "rotated", "raw"]))
    rope = fixed.pop("rope", rope)
    selection = draw(configs(moved=rope is not None, **config or {}))
    Lq = fixed.pop("Lq", None) or draw(st.sampled_from([1, 1, 1, 2, 5]))
    D = draw(st.sampled_from([2, 5, 8, 16]))
    G = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 7, 7, 12, 32]))
    drawn: dict[str, Any] = {
        "lengths": tuple(draw(st.lists(lengths(Lq, selection), min_size=1, max_size=3))),
        "Hkv": draw(st.sampled_from([1, 2, 3] if G < 12 else [1, 2])),
        "G": G,
        "Lq": Lq,
        "D": D,
        "Dv": draw(st.sampled_from([D, 1, 6])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "page_size": draw(st.sampled_from([None, None, None, 1, 2, 16, 53, 64, 256])),
        "spare": draw(st.sampled_from([0, 3])),
        "content": draw(st.sampled_from(CONTENTS)),
        "strides": draw(st.sampled_from(STRIDES)),
        "filler": draw(st.sampled_from(FILLERS)),
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.5])),
        "has_sink_logits": draw(st.booleans()),
        "rope": rope,
        "rotary_dim": draw(st.sampled_from([2, 8, 16])),
        "interleaved": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([1.0, 1.3])),
        "config": selection,
        "max_reuse": draw(st.sampled_from([0, 4])),
        "seed": draw(st.integers(0, 2**16)),
    }
    return Case(**drawn | fixed)


@dataclass(frozen=True)
class Ballots:
    """A problem, and votes for it that do not come from scoring: made to collide."""

    case: Case
    votes: Literal["few values", "all equal", "signed zeros", "infinite", "nan", "rising", "normal"]
    seed: int

    def make(self) -> tuple[Tensor, Problem]:
        problem = self.case.problem()
        generator = torch.Generator().manual_seed(self.seed)
        shape = (problem.B, problem.R, problem.S, problem.Lk)
        if self.votes == "few values":
            votes = torch.randint(0, 3, shape, generator=generator).float()
        elif self.votes == "all equal":
            votes = torch.full(shape, 0.5)
        elif self.votes == "signed zeros":
            votes = 0.0 * (torch.randint(0, 2, shape, generator=generator).float() - 0.5)
        elif self.votes == "rising":
            votes = torch.arange(shape[-1]).float().expand(shape).clone()
        else:
            votes = torch.randn(shape, generator=generator)
        if self.votes in ("infinite", "nan"):
            which = torch.randint(0, 3, shape, generator=generator)
            votes[which == 0] = -torch.inf
            votes[which == 1] = torch.nan if self.votes == "nan" else torch.inf
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            sink_end, local_start = problem.config.regions(n, problem.Lq)
            votes[b, :, :, :sink_end] = -torch.inf
            votes[b, :, :, local_start:] = -torch.inf
        return votes, problem


VOTES = ("few values", "all equal", "signed zeros", "infinite", "nan", "rising", "normal")


# So far out that a float32 angle is off by a thousandth of a radian; few heads, few candidates.
FAR = Case(lengths=(2**16,), Hkv=1, G=1, D=32, Dv=1, config=SelectConfig(8, 2, 4, vote="logit"))

# The benchmark's named shapes, at sizes that the reference can follow.
NAMED = tuple(Case(workload=workload.name) for workload in TINY)


def ballots() -> st.SearchStrategy[Ballots]:
    return st.builds(Ballots, cases(), st.sampled_from(VOTES), st.integers(0, 2**16))


@dataclass(frozen=True)
class Chosen:
    """A problem, and a selection that no vote need explain: any positions, also none."""

    case: Case
    density: float
    seed: int

    def make(self) -> tuple[Problem, Tensor, Tensor]:
        """The problem, positions and count."""
        problem = self.case.problem()
        generator = torch.Generator().manual_seed(self.seed)
        shape = (problem.B, problem.S, problem.K)
        positions = torch.full(shape, -1, dtype=torch.int32)
        count = torch.zeros(shape[:2], dtype=torch.int32)
        for b, n in enumerate(problem.cache_seqlens.tolist()):
            for s in range(problem.S):
                drawn = torch.rand(n, generator=generator) < self.density
                # Never position 0 alone: a padding of -1 read as row 0 must not be hidden.
                picked = drawn.nonzero()[:, 0][-problem.K :]
                positions[b, s, : len(picked)] = picked.int()
                count[b, s] = len(picked)
        return problem, positions, count


def chosen(**fixed: Any) -> st.SearchStrategy[Chosen]:
    """Any problem and any selection; `fixed` pins settings of the problem."""
    return st.builds(
        Chosen, cases(**fixed), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 2**16)
    )


def with_config(problem: Problem, **changes: Any) -> Problem:
    """The same problem under another configuration."""
    return replace(problem, config=replace(problem.config, **changes))


def by_token(problem: Problem, cache: Tensor) -> Tensor:
    """A view of a cache with a token's heads side by side, which `at` is an index of."""
    return cache if problem.is_paged else cache.transpose(1, 2)


def at(problem: Problem, b: int, positions: Tensor) -> tuple[Any, Tensor]:
    """Where `by_token` has request b's positions, as (len(positions), Hkv, width)."""
    positions = positions.long()
    if problem.block_table is None:
        return b, positions
    pages = problem.block_table[b][positions // problem.page_size].long()
    return pages, positions % problem.page_size


class CannotRun(Exception):
    """A problem is beyond what the backend declares: not a failure, but counted."""


# Where a case may be bent to what a backend takes: the field, what to try instead, and what a value
# needs of a capability. What stands there more than once is taken more often: a wide head costs
# time. None is taken where nothing else can be.
_Field = tuple[str, tuple[Any, ...], Callable[[Any], dict[str, Any]]]
_HEAD_DIMS = (8, 16, 32, 32, 32, 64, 64, 80, 80, 96, 96, 40, 40, 128, 256)
_CASE_FIELDS: tuple[_Field, ...] = (
    ("dtype", DTYPES, lambda x: {"dtypes": x}),
    ("D", _HEAD_DIMS, lambda x: {"head_dims": x}),
    ("Dv", _HEAD_DIMS, lambda x: {"head_dims": x}),
    ("G", (1, 2, 3, 4, 7, 8, 12, 16, 32), lambda x: {"group_sizes": x}),
    ("Lq", (1, 2, 5), lambda x: {"query_lengths": x}),
    (
        "page_size",
        (1, 2, 16, 53, 64, 256, None),
        lambda x: {"layouts": "paged", "page_sizes": x} if x else {"layouts": "contiguous"},
    ),
    ("softcap", (30.0, None), lambda x: {"softcaps": x is not None}),
    ("has_sink_logits", (False, True), lambda x: {"sink_logits": x}),
)
_ROPE: _Field = ("rope", ("rotated", "raw", None), lambda x: {"ropes": x or "none"})
_CONFIG_FIELDS: tuple[_Field, ...] = (
    ("vote", ("soft", "logit", "hard"), lambda x: {"votes": x}),
    ("normalize", ("visible", "candidates"), lambda x: {"normalizes": x}),
    ("scope", ("layer", "group"), lambda x: {"scopes": x}),
    ("pool", (1, 3, 7), lambda x: {"pools": x}),
    ("positions", ("original", "contiguous"), lambda x: {"positions": x}),
    ("score_at", ("true", "fixed", "split"), lambda x: {"score_ats": x}),
)
_ANYTHING = Capability()
# Keys move with a rope only.
_UNMOVED = Capability(positions=("original",), score_ats=("true",))
_MOVED = Capability(ropes=("rotated", "raw"))

# Under the profile `device`: each combination of these is another kernel to compile.
_ON_A_DEVICE = Capability(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=(64, 128, 80),
    group_sizes=(1, 4, 7),
    query_lengths=(1, 5),
    page_sizes=(1, 16),
    pools=(1, 3),
    query_means=(1, 2),
)


def on_a_device() -> bool:
    return settings.get_current_profile_name() == "device"


def fitted(drawn: Any, backend: Backend, about: Capability = _ANYTHING) -> Any:
    """`drawn`, bent to what the backend declares, so that a narrow one is tried as often.

    And to what a law is `about`. Named workloads are not bent. Raises CannotRun if no value of some
    field is both.
    """
    if not isinstance(drawn, Case):
        return replace(drawn, case=fitted(drawn.case, backend, about))
    if drawn.workload is not None:
        return drawn
    takes = [about, backend.capability, *(lender.capability for lender in backend.lenders)]

    def is_taken(needs: dict[str, Any], wish: Capability = _ANYTHING) -> bool:
        limits = (
            (getattr(x, name), value) for x in (*takes, wish) for name, value in needs.items()
        )
        return all(allowed is None or value in allowed for allowed, value in limits)

    def bent(now: Any, field: str, options: tuple[Any, ...], needs: Callable) -> Any:
        for wish in (_ON_A_DEVICE, _ANYTHING) if on_a_device() else (_ANYTHING,):
            if is_taken(needs(now), wish):
                return now
            able = [option for option in options if is_taken(needs(option), wish)]
            if able:
                # Each field on its own, so that D and Dv differ too.
                chance = random.Random(f"{field} {drawn.seed} {drawn.lengths}")
                return chance.choice([option for option in able if option is not None] or able)
        raise CannotRun(f"no {field} of {options} is for {backend.name} and the law")

    changes = {field[0]: bent(getattr(drawn, field[0]), *field) for field in _CASE_FIELDS}
    Lq = changes["Lq"]
    if not any(is_taken({"ropes": kept}) for kept in ("rotated", "raw")):
        takes.append(_UNMOVED)
    config = {field[0]: bent(drawn.config[field[0]], *field) for field in _CONFIG_FIELDS}
    means: _Field = ("n_query_means", (1, 2, 3), lambda x: {"query_means": min(x, Lq)})
    config["n_query_means"] = bent(drawn.config.n_query_means, *means)
    if (config["positions"], config["score_at"]) != ("original", "true"):
        takes.append(_MOVED)
    changes["rope"] = bent(drawn.rope, *_ROPE)
    if drawn.rotary_dim >= drawn.D - 1:  # all of it was turned, and is
        changes["rotary_dim"] = max(drawn.rotary_dim, changes["D"])
    changes["lengths"] = tuple(n and max(n, Lq) for n in drawn.lengths)
    return replace(drawn, **changes, config=replace(drawn.config, **config))
