"""What the properties are tried on: problems drawn as a few numbers, a structure and a seed.

A `Case` prints as Python that makes it again. Its tensors come from a seeded generator; what
Hypothesis draws and shrinks are shapes, settings and the kind of content.
"""

import random
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


def finest(case: Case, backend: Backend) -> Case:
    """In float64, for laws that are sharpest there; in float32, if the backend does not take it."""
    takes = [backend.capability.dtypes, *(lender.capability.dtypes for lender in backend.lenders)]
    has_float64 = all(dtypes is None or torch.float64 in dtypes for dtypes in takes)
    return replace(case, dtype=torch.float64 if has_float64 else torch.float32)


# Where a case may be bent to what a backend takes: the capability, the field, what to try instead.
# What stands there more than once is taken more often: a wide head costs time.
_HEAD_DIMS = (8, 16, 32, 32, 32, 64, 64, 80, 80, 96, 96, 40, 40, 128, 256)
_PAGE_SIZES = (1, 2, 16, 53, 64, 256)
_CASE_FIELDS = (
    ("dtypes", "dtype", DTYPES),
    ("head_dims", "D", _HEAD_DIMS),
    ("head_dims", "Dv", _HEAD_DIMS),
    ("group_sizes", "G", (1, 2, 3, 4, 7, 8, 12, 16, 32)),
    ("query_lengths", "Lq", (1, 2, 5)),
    ("page_sizes", "page_size", _PAGE_SIZES),
    ("sink_logits", "has_sink_logits", (False, True)),
)
_CONFIG_FIELDS = (
    ("votes", "vote", ("soft", "logit", "hard")),
    ("normalizes", "normalize", ("visible", "candidates")),
    ("scopes", "scope", ("layer", "group")),
    ("pools", "pool", (1, 3, 7)),
    ("query_means", "n_query_means", (1, 2, 3)),
    ("positions", "positions", ("original", "contiguous")),
    ("score_ats", "score_at", ("true", "fixed", "split")),
)


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


def fitted(drawn: Any, backend: Backend) -> Any:
    """`drawn`, bent to what the backend declares, so that a narrow one is tried as often.

    Where there is nothing to bend it to, the problem stays beyond the backend, and is counted so.
    """
    if not isinstance(drawn, Case):
        return replace(drawn, case=fitted(drawn.case, backend))
    case = drawn
    if case.workload is not None:
        return case
    if on_a_device():
        case = _fitted_once(case, _ON_A_DEVICE)
    for takes in (backend.capability, *(lender.capability for lender in backend.lenders)):
        case = _fitted_once(case, takes)
    return case


def _fitted_once(case: Case, takes: Capability) -> Case:
    def one_of(name: str, field: str, now: Any, options: tuple[Any, ...]) -> Any:
        allowed = getattr(takes, name)
        able = [option for option in options if allowed is None or option in allowed]
        # Each field on its own, so that D and Dv differ too.
        return random.Random(f"{field} {case.seed} {case.lengths}").choice(able) if able else now

    def pick(name: str, field: str, now: Any, options: tuple[Any, ...]) -> Any:
        allowed = getattr(takes, name)
        as_it_is = allowed is None or now is None or now in allowed
        return now if as_it_is else one_of(name, field, now, options)

    changes = {field: pick(name, field, getattr(case, field), options)
               for name, field, options in _CASE_FIELDS}  # fmt: skip
    config = {field: pick(name, field, case.config[field], options)
              for name, field, options in _CONFIG_FIELDS}  # fmt: skip
    if case.rotary_dim >= case.D - 1:  # all of it was turned, and is
        changes["rotary_dim"] = max(case.rotary_dim, changes["D"])
    if takes.layouts is not None:
        if case.page_size is not None and "paged" not in takes.layouts:
            changes["page_size"] = None
        if case.page_size is None and "contiguous" not in takes.layouts:
            changes["page_size"] = one_of("page_sizes", "page_size", None, _PAGE_SIZES)
    if takes.softcaps is not None and (case.softcap is not None) not in takes.softcaps:
        changes["softcap"] = None if False in takes.softcaps else 30.0
    if takes.ropes is not None and (case.rope or "none") not in takes.ropes:
        changes["rope"] = next((kind for kind in ("rotated", "raw") if kind in takes.ropes), None)
        if changes["rope"] is None:
            config |= {"positions": "original", "score_at": "true"}
    Lq = changes["Lq"]
    changes["lengths"] = tuple(n and max(n, Lq) for n in case.lengths)
    return replace(case, **changes, config=replace(case.config, **config))
