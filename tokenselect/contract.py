"""What every backend is given and what it must return. No algorithm lives here.

Letters, the same everywhere: B requests, Hq query heads, Hkv KV heads, G = Hq // Hkv, Lq queries
of this call, Lk cache capacity, n valid tokens of one request (the Lq new ones included), D head
dim of q and k, Dv head dim of v, k the budget, S selections a request (1, or Hkv), R ballots,
K capacity of a selection. A position is a token's index in its request; a slot is its row in a
paged cache. Query head h reads KV head h // G.
"""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from tokenselect.errors import InvalidProblem
from tokenselect.rope import Rope
from tokenselect.scalars import is_integer, is_number, plain

Vote = Literal["soft", "logit", "hard"]
Normalize = Literal["visible", "candidates"]
Scope = Literal["layer", "group"]
Positions = Literal["original", "contiguous"]
ScoreAt = Literal["true", "fixed", "split"]


@dataclass(frozen=True)
class SelectConfig:
    """What to select, and how. A mapping too: `attention(q, k_cache, v_cache, **config)`.

    k              budget: tokens selected by vote, >= 0
    n_sink         first positions, always attended, >= 0
    n_local        newest positions that every query of a call is sure to see, >= 1
    vote           "soft": softmax mass (paper, eq. 7); "logit": summed logits (eq. 5);
                   "hard": heads that have the token among their own k best (eq. 6)
    normalize      the soft vote's softmax runs over all "visible" tokens, or "candidates" only
    scope          one selection a "layer", or one a "group" of query heads (a KV head)
    select_scale   factor on the vote's logits; None: the attention's own scale
    pool           odd; votes become the maximum over that many neighbouring candidates
    n_query_means  the queries of a call are averaged in this many runs, each of which votes
    positions      attend at "original" positions, or "contiguous" (for length extrapolation)
    score_at       score candidates at their "true" distance, at one "fixed" distance of n_local,
                   or "split": part of k by fixed votes, then the rest by true ones
    fixed_share    that part, in [0, 1]; ceil(fixed_share * k) tokens

    Numbers may be numpy's, or tensors without a dimension on the CPU: they are kept as Python's.
    """

    k: int = 2048
    n_sink: int = 16
    n_local: int = 128
    vote: Vote = "soft"
    normalize: Normalize = "visible"
    scope: Scope = "layer"
    select_scale: float | None = None
    pool: int = 1
    n_query_means: int = 1
    positions: Positions = "original"
    score_at: ScoreAt = "true"
    fixed_share: float = 0.25

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            given = getattr(self, name)
            value = plain(given)
            if value is not given:
                object.__setattr__(self, name, value)

    @classmethod
    def faithful(cls, **changes: Any) -> Self:
        """Closest to dense attention inside the trained length: original and true positions."""
        return cls(**changes)

    @classmethod
    def extrapolate(cls, **changes: Any) -> Self:
        """Beyond the trained length: contiguous positions, split scoring. Needs a `rope`."""
        return cls(**{"positions": "contiguous", "score_at": "split"} | changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Equation 7 to the letter: logits without 1/sqrt(D), softmax over all tokens."""
        return cls(**{"select_scale": 1.0} | changes)

    def keys(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @property
    def ballots(self) -> tuple[tuple[Literal["fixed", "true"], int], ...]:
        """Each ballot's way of scoring and its share of k, in the order in which they choose."""
        if self.score_at == "split":
            fixed = math.ceil(self.fixed_share * self.k)
            return ("fixed", fixed), ("true", self.k - fixed)
        return ((self.score_at, self.k),)

    def regions(self, n: int, Lq: int) -> tuple[int, int]:
        """(end of the sink, start of the local window); the candidates lie between."""
        local_start = max(0, n - Lq + 1 - self.n_local)
        return min(self.n_sink, local_start), local_start


CONFIG_NAMES = tuple(field.name for field in fields(SelectConfig))
_NUMBERS = "k", "n_sink", "n_local", "select_scale", "pool", "n_query_means", "fixed_share"


@dataclass(frozen=True, eq=False)
class Problem:
    """One call's tensors and settings, checked. Make it with `Problem.build`.

    q             (B, Hq, Lq, D)
    k_cache       (B, Hkv, Lk, D), or paged (n_pages, page_size, Hkv, D); the new keys are in it
    v_cache       likewise with Dv
    cache_seqlens (B,) int32, contiguous: n of each request, 0 (one that is not there) or >= Lq
    block_table   None, or (B, max_pages) int32: position j lies in page
                  block_table[b, j // page_size], row j % page_size
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    rope: Rope | None
    max_reuse: int
    config: SelectConfig

    @classmethod
    def build(
        cls,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        config: SelectConfig,
        *,
        cache_seqlens: Tensor | None = None,
        block_table: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        rope: Rope | None = None,
        max_reuse: int = 0,
    ) -> Self:
        """Fill in the defaults and check everything that needs no tensor to be read.

        Raises InvalidProblem. Lengths and block tables are values: see `check_values`.
        """
        problem = cls(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=cache_seqlens,  # type: ignore[arg-type]  # filled in below
            block_table=block_table,
            scale=plain(scale),  # filled in below
            softcap=plain(softcap),
            sink_logits=sink_logits,
            rope=rope,
            max_reuse=plain(max_reuse),
            config=config,
        )
        for rule in _RULES:
            came = rule.broken(problem)
            if came is not None:
                raise InvalidProblem(came, rule.rule, rule.fix)
        if cache_seqlens is None:
            cache_seqlens = torch.full((problem.B,), problem.Lk, dtype=torch.int32, device=q.device)
        # Kernels read them one after the other.
        cache_seqlens = cache_seqlens.contiguous()
        factor = problem.D**-0.5 if scale is None else float(problem.scale)
        return replace(problem, cache_seqlens=cache_seqlens, scale=factor)

    @property
    def B(self) -> int:
        return self.q.shape[0]

    @property
    def Hq(self) -> int:
        return self.q.shape[1]

    @property
    def Lq(self) -> int:
        return self.q.shape[2]

    @property
    def D(self) -> int:
        return self.q.shape[3]

    @property
    def Dv(self) -> int:
        return self.v_cache.shape[3]

    @property
    def is_paged(self) -> bool:
        return self.block_table is not None

    @property
    def page_size(self) -> int:
        """Tokens a page; a contiguous cache is one page a request."""
        return self.k_cache.shape[1] if self.is_paged else self.k_cache.shape[2]

    @property
    def Hkv(self) -> int:
        return self.k_cache.shape[2] if self.is_paged else self.k_cache.shape[1]

    @property
    def G(self) -> int:
        return self.Hq // self.Hkv

    @property
    def Lk(self) -> int:
        if self.block_table is None:
            return self.k_cache.shape[2]
        return self.block_table.shape[1] * self.page_size

    @property
    def R(self) -> int:
        return len(self.config.ballots)

    @property
    def S(self) -> int:
        return 1 if self.config.scope == "layer" else self.Hkv

    @property
    def K(self) -> int:
        """Capacity of a selection: static, and never more than the cache holds."""
        c = self.config
        return min(c.n_sink + c.k + c.n_local + self.Lq - 1 + self.max_reuse, self.Lk)

    @property
    def select_scale(self) -> float:
        chosen = self.config.select_scale
        return self.scale if chosen is None else float(chosen)

    def moves(self, where: str) -> bool:
        """Whether vectors must be turned to score at, or attend at, `where`."""
        in_place = where in ("original", "true")
        return self.rope is not None and not (in_place and self.rope.cached == "rotated")

    def describe(self) -> str:
        """One line of shapes and settings, for errors and reports."""
        changed = {
            name: value
            for name, value in dict(self.config).items()
            if value != getattr(SelectConfig, name)
        }
        layout = f"pages of {self.page_size}" if self.is_paged else "contiguous"
        return (
            f"B={self.B} Hq={self.Hq} Hkv={self.Hkv} Lq={self.Lq} Lk={self.Lk} D={self.D} "
            f"Dv={self.Dv} {self.q.dtype} on {self.q.device} ({layout})"
            + "".join(f" {name}={value!r}" for name, value in changed.items())
        )


class Scores(NamedTuple):
    """votes (B, R, S, Lk) float32, -inf off the candidates, never NaN; lse (B, Hq) float32.

    lse is the natural log of the sum of exp(logit) over all n positions, of the mean query of the
    whole call, on the last ballot (the true one of a split); -inf where there is nothing to see.
    """

    votes: Tensor
    lse: Tensor


class Selection(NamedTuple):
    """positions (B, S, K) int32, strictly ascending, then padded with -1; count (B, S) int32."""

    positions: Tensor
    count: Tensor  # type: ignore[assignment]  # instead of tuple.count, which nobody needs here


class Attended(NamedTuple):
    """out (B, Hq, Lq, Dv) in q's dtype; lse (B, Hq, Lq) float32, natural log, sink_logits aside."""

    out: Tensor
    lse: Tensor


@dataclass(eq=False)
class Memory:
    """What a SelectionCache holds of one layer, a row a request: tensors that stay where they are.

    query      (B, Hq * D) float32, the mean query of the last fresh selection
    positions  (B, S, at least K) int32, that selection
    count      (B, S) int32, of that selection
    seen       (B,) int32, n when it was made; 0: nothing is stored
    hits       (B,) int64, how often the request reused its selection
    misses     (B,) int64, how often it selected afresh
    """

    query: Tensor
    positions: Tensor
    count: Tensor
    seen: Tensor
    hits: Tensor
    misses: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.positions, self.count, self.seen, self.hits, self.misses


class Decision(NamedTuple):
    """Which requests of a call reuse their selection.

    reused         (B,) bool
    cache_seqlens  (B,) int32, 0 where a selection is reused, else n: to `score` and `select`, a
                   request that reuses its selection is one that is not there
    query          (B, Hq * D) float32, the mean of the call's queries as given
    """

    reused: Tensor
    cache_seqlens: Tensor
    query: Tensor


class Reuse(NamedTuple):
    """The Selection Cache's two steps, before `score` and after `select`.

    decide(problem, memory, theta) -> Decision, and changes nothing
    keep(problem, memory, decision, fresh): stores the fresh selections; in `fresh`, writes in place
    those that are reused, and what was appended. problem has the true lengths
    """

    decide: Callable[[Problem, Memory, float | None], Decision]
    keep: Callable[[Problem, Memory, Decision, Selection], None]


class Planned(NamedTuple):
    """The stages as a plan runs them, and as a CUDA graph can hold them.

    They read no tensor on the host, have no shape that depends on a value, and take all memory from
    `workspace.empty`. Lengths and block tables may hold anything without a read or write outside
    of the tensors.

    score(problem) -> Scores; votes off the candidates may be anything
    select(votes, problem) -> Selection
    attend(problem, selection, out) -> Attended; out (B, Hq, Lq, Dv), contiguous, is written to and
    returned; None: attend takes memory for it
    """

    score: Callable[[Problem], Scores] | str
    select: Callable[[Tensor, Problem], Selection] | str
    attend: Callable[[Problem, Selection, Tensor | None], Attended] | str


@dataclass(frozen=True)
class Capability:
    """What a backend can run: for each property of a problem, the values that it takes.

    None means any value that the contract allows. `softcaps` and `sink_logits` hold False and
    True: without and with; `ropes` holds "none", "rotated" and "raw"; `query_lengths` is of Lq.
    """

    devices: Container[str] | None = None
    dtypes: Container[torch.dtype] | None = None
    head_dims: Container[int] | None = None
    group_sizes: Container[int] | None = None
    query_lengths: Container[int] | None = None
    layouts: Container[str] | None = None
    page_sizes: Container[int] | None = None
    softcaps: Container[bool] | None = None
    sink_logits: Container[bool] | None = None
    ropes: Container[str] | None = None
    votes: Container[str] | None = None
    normalizes: Container[str] | None = None
    scopes: Container[str] | None = None
    pools: Container[int] | None = None
    query_means: Container[int] | None = None
    positions: Container[str] | None = None
    score_ats: Container[str] | None = None
    deterministic: bool = True


@dataclass(frozen=True)
class Backend:
    """A name, what it can run, and the three stages.

    A stage given as a string is borrowed from the backend of that name; the registry fills it in
    and keeps the lender, whose limits then count too.

    planned  the stages as a plan runs them; None if they cannot be planned
    reuse    the Selection Cache's steps; those of the reference run on any device
    replays  makes, for one plan, what runs its steps without running their Python each time (see
             `tokenselect.graphs.Graphs`); None: steps run as they are
    """

    name: str
    capability: Capability
    score: Callable[[Problem], Scores] | str
    select: Callable[[Tensor, Problem], Selection] | str
    attend: Callable[[Problem, Selection], Attended] | str
    planned: Planned | None = None
    reuse: Reuse | str = "reference"
    replays: Callable[[], Any] | None = None
    lenders: tuple["Backend", ...] = ()


_NEEDS: tuple[tuple[str, Callable[[Problem], tuple[object, ...]], str], ...] = (
    ("device", lambda p: (p.q.device.type,), "devices"),
    ("dtype", lambda p: (p.q.dtype,), "dtypes"),
    ("head dim", lambda p: (p.D, p.Dv), "head_dims"),
    ("query heads per KV head", lambda p: (p.G,), "group_sizes"),
    ("number of queries", lambda p: (p.Lq,), "query_lengths"),
    ("cache layout", lambda p: ("paged" if p.is_paged else "contiguous",), "layouts"),
    ("page size", lambda p: (p.page_size,) if p.is_paged else (), "page_sizes"),
    ("softcap in use", lambda p: (p.softcap is not None,), "softcaps"),
    ("sink_logits in use", lambda p: (p.sink_logits is not None,), "sink_logits"),
    ("rope", lambda p: ("none" if p.rope is None else p.rope.cached,), "ropes"),
    ("vote", lambda p: (p.config.vote,), "votes"),
    ("normalize", lambda p: (p.config.normalize,), "normalizes"),
    ("scope", lambda p: (p.config.scope,), "scopes"),
    ("pool", lambda p: (p.config.pool,), "pools"),
    ("query means", lambda p: (min(p.config.n_query_means, p.Lq),), "query_means"),
    ("positions", lambda p: (p.config.positions,), "positions"),
    ("score_at", lambda p: (p.config.score_at,), "score_ats"),
)


def reasons(backend: Backend, problem: Problem) -> list[str]:
    """Why `backend` cannot run `problem`; empty if it can. Reads metadata only.

    Each reason says what the problem is and what the backend takes.
    """
    found = []
    for what, needed, name in _NEEDS:
        allowed = getattr(backend.capability, name)
        for value in needed(problem):
            if allowed is not None and value not in allowed:
                found.append(f"{what} is {value}; {backend.name} takes {listed(allowed)}")
    for lender in backend.lenders:
        found += [f"(stage borrowed from {lender.name}) {why}" for why in reasons(lender, problem)]
    return list(dict.fromkeys(found))


def listed(allowed: Container[object]) -> str:
    """The values of one limit of a capability, as text."""
    if isinstance(allowed, range):
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        return f"{allowed[0]} to {allowed[-1]}{step}" if allowed else "none"
    if isinstance(allowed, (tuple, list, set, frozenset)):
        return ", ".join(map(str, allowed)) or "none"
    return str(allowed)


# --- the checker: one table of rules, run in this order -------------------------------------


class _Rule(NamedTuple):
    broken: Callable[[Problem], str | None]  # what came, or None where the rule holds
    rule: str
    fix: str


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} has shape {tuple(tensor.shape)}"


def _not_tensor(p: Problem) -> str | None:
    for name in _TENSORS:
        value = getattr(p, name)
        optional = name in ("cache_seqlens", "block_table", "sink_logits")
        if not (isinstance(value, Tensor) or (optional and value is None)):
            return f"{name} is a {type(value).__name__}"
    return None


def _wrong_rank(p: Problem) -> str | None:
    for name, rank in zip(_TENSORS, (4, 4, 4, 1, 2, 1), strict=True):
        value = getattr(p, name)
        if value is not None and value.dim() != rank:
            return f"{_shape(name, value)}, {value.dim()} dimensions"
    return None


def _empty(p: Problem) -> str | None:
    for name in ("q", "k_cache", "v_cache"):
        if 0 in getattr(p, name).shape:
            return _shape(name, getattr(p, name))
    if p.block_table is not None and p.block_table.shape[1] == 0:
        return _shape("block_table", p.block_table)
    return None


def _wrong_device(p: Problem) -> str | None:
    tensors = {name: getattr(p, name) for name in _TENSORS[1:]}
    tensors["rope.inv_freq"] = None if p.rope is None else p.rope.inv_freq
    for name, value in tensors.items():
        if value is not None and value.device != p.q.device:
            return f"{name} is on {value.device}, q on {p.q.device}"
    return None


def _wrong_dtype(p: Problem) -> str | None:
    if p.q.dtype not in DTYPES:
        return f"q is {p.q.dtype}"
    for name in ("k_cache", "v_cache"):
        if getattr(p, name).dtype != p.q.dtype:
            return f"{name} is {getattr(p, name).dtype}, q is {p.q.dtype}"
    return None


def _wrong_integer_dtype(p: Problem) -> str | None:
    for name in ("cache_seqlens", "block_table"):
        value = getattr(p, name)
        if value is not None and value.dtype != torch.int32:
            return f"{name} is {value.dtype}"
    return None


def _caches_differ(p: Problem) -> str | None:
    if p.k_cache.shape[:3] == p.v_cache.shape[:3]:
        return None
    return f"{_shape('k_cache', p.k_cache)}, {_shape('v_cache', p.v_cache)}"


def _wrong_batch(p: Problem) -> str | None:
    batched = ("k_cache",) if p.block_table is None else ("block_table",)
    for name in (*batched, "cache_seqlens"):
        value = getattr(p, name)
        if value is not None and value.shape[0] != p.B:
            return f"{_shape(name, value)}, {_shape('q', p.q)}: B={value.shape[0]} and B={p.B}"
    return None


def _choice(name: str, options: object) -> _Rule:
    allowed = get_args(options)
    return _Rule(
        lambda p: None if p.config[name] in allowed else f"{name}={p.config[name]!r}",
        f"{name} is one of {', '.join(map(repr, allowed))}",
        f"name one of them, or leave {name} out for {getattr(SelectConfig, name)!r}",
    )


def _integer(name: str, low: int) -> _Rule:
    def broken(p: Problem) -> str | None:
        value = p.config[name]
        return None if is_integer(value) and low <= value < 2**31 else f"{name}={value!r}"

    rule = f"{name} is an integer, {low} <= {name} < 2**31"
    return _Rule(broken, rule, f"pass an int of {low} or more")


_LARGEST = torch.finfo(torch.float32).max


def _factor(name: str, value: Callable[[Problem], object]) -> _Rule:
    def broken(p: Problem) -> str | None:
        got: Any = value(p)
        holds = got is None or (is_number(got) and 0 < got <= _LARGEST)
        return None if holds else f"{name}={got!r}"

    return _Rule(
        broken,
        f"{name} is None or a number > 0 that float32 holds",
        f"pass a number > 0, or leave {name} out",
    )


def _wrong_share(p: Problem) -> str | None:
    share = p.config.fixed_share
    return None if is_number(share) and 0 <= share <= 1 else f"fixed_share={share!r}"


_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda p: (
            None if isinstance(p.config, SelectConfig) else f"config is a {type(p.config).__name__}"
        ),
        "config is a tokenselect.SelectConfig",
        "say SelectConfig(**settings)",
    ),
    _Rule(
        lambda p: (
            None
            if is_integer(p.max_reuse) and 0 <= p.max_reuse < 2**31
            else f"max_reuse={p.max_reuse!r}"
        ),
        "max_reuse is an integer, 0 <= max_reuse < 2**31",
        "pass that of the SelectionCache, or leave it out",
    ),
    _Rule(
        _not_tensor,
        "q, k_cache and v_cache are tensors; cache_seqlens, block_table and sink_logits are "
        "tensors or None",
        "lengths as torch.tensor(lengths, dtype=torch.int32); of a model's cache object, one "
        "layer's keys and values",
    ),
    _Rule(
        lambda p: (
            None
            if p.rope is None or isinstance(p.rope, Rope)
            else f"rope is a {type(p.rope).__name__}"
        ),
        "rope is a tokenselect.Rope or None",
        "build it from the model: Rope(inv_freq)",
    ),
    _Rule(
        _wrong_rank,
        "q (B, Hq, Lq, D); k_cache and v_cache (B, Hkv, Lk, D), or (n_pages, page_size, Hkv, D) "
        "with a block_table; cache_seqlens (B,); block_table (B, max_pages); sink_logits (Hq,)",
        "add or drop the dimension; a decode query is q[:, :, None, :]",
    ),
    _Rule(_empty, "no dimension of q, of a cache or of block_table's pages is 0", "skip the call"),
    _Rule(_wrong_device, "all tensors are on one device", "move it there with .to(q.device)"),
    _Rule(
        _wrong_dtype,
        "q, k_cache and v_cache share one dtype: float32, bfloat16, float16 or float64",
        "convert what differs, say with q.to(k_cache.dtype)",
    ),
    _Rule(
        lambda p: (
            None
            if p.sink_logits is None or p.sink_logits.is_floating_point()
            else f"sink_logits is {p.sink_logits.dtype}"
        ),
        "sink_logits is floating point",
        "convert it with .float()",
    ),
    _Rule(
        _wrong_integer_dtype,
        "cache_seqlens and block_table are int32",
        "convert it with .to(torch.int32)",
    ),
    _Rule(
        _caches_differ,
        "k_cache and v_cache agree in all dimensions but the last",
        "check which tensor was permuted or sliced",
    ),
    _Rule(_wrong_batch, "every tensor has q's number of requests B", "give one row a request"),
    _Rule(
        lambda p: (
            None
            if p.k_cache.shape[3] == p.D
            else f"{_shape('q', p.q)}, {_shape('k_cache', p.k_cache)}"
        ),
        "q and k_cache have the same head dim D, their last dimension",
        "check for a missing projection or a permuted dimension",
    ),
    _Rule(
        lambda p: (
            None
            if p.Hq % p.Hkv == 0
            else f"{_shape('q', p.q)}, {_shape('k_cache', p.k_cache)}: Hq={p.Hq}, Hkv={p.Hkv}"
        ),
        "the number of query heads Hq is a multiple of the number of KV heads Hkv",
        "check the layout: q (B, Hq, Lq, D), k_cache (B, Hkv, Lk, D), pages "
        "(n_pages, page_size, Hkv, D)",
    ),
    _Rule(
        lambda p: (
            None
            if p.Lq <= p.Lk
            else f"q has Lq={p.Lq} queries, the cache holds at most Lk={p.Lk} tokens"
        ),
        "the Lq new tokens are in the cache: Lq <= Lk",
        "append the new keys and values before the call",
    ),
    _Rule(
        lambda p: None if p.Lk < 2**31 else f"the cache holds Lk={p.Lk} tokens a request",
        "positions are int32: Lk < 2**31",
        "split the request",
    ),
    _Rule(
        lambda p: (
            None
            if p.sink_logits is None or p.sink_logits.shape[0] == p.Hq
            else f"{_shape('sink_logits', p.sink_logits)}, {_shape('q', p.q)}"
        ),
        "sink_logits has one entry a query head: (Hq,)",
        "pass the layer's own sink logits",
    ),
    _integer("k", 0),
    _integer("n_sink", 0),
    _integer("n_local", 1),
    _integer("pool", 1),
    _integer("n_query_means", 1),
    _Rule(
        lambda p: None if p.config.pool % 2 else f"pool={p.config.pool}",
        "pool is odd, so that its window has a centre",
        "pass the next odd number",
    ),
    _choice("vote", Vote),
    _choice("normalize", Normalize),
    _choice("scope", Scope),
    _choice("positions", Positions),
    _choice("score_at", ScoreAt),
    _factor("scale", lambda p: p.scale),
    _factor("select_scale", lambda p: p.config.select_scale),
    _factor("softcap", lambda p: p.softcap),
    _Rule(_wrong_share, "fixed_share is a share of k, in [0, 1]", "pass 0.25 for a quarter"),
    _Rule(
        lambda p: (
            None
            if p.rope is not None or (p.config.positions, p.config.score_at) == ("original", "true")
            else f"positions={p.config.positions!r}, score_at={p.config.score_at!r}, rope=None"
        ),
        "anything but positions='original' with score_at='true' moves keys, which needs a rope",
        "pass rope=tokenselect.Rope(inv_freq) with the model's inverse frequencies",
    ),
    _Rule(
        lambda p: (
            None
            if p.rope is None or p.rope.rotary_dim <= p.D
            else f"rope has {p.rope.rotary_dim} rotary dims, {_shape('q', p.q)}"
        ),
        "rotary_dim = 2 * len(inv_freq) is at most the head dim D",
        "pass one frequency a pair of rotated dims",
    ),
)


def check_values(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    *,
    Lq: int,
    Lk: int,
    page_size: int,
    n_pages: int,
) -> None:
    """Check what only the tensors' values show; on a GPU this waits for the device.

    Raises InvalidProblem for a length outside {0, Lq..Lk}, or a block table whose pages in use lie
    outside the pool. Entries beyond a request's last page are not looked at.
    """
    lengths = cache_seqlens.tolist()
    for b, n in enumerate(lengths):
        if n != 0 and not Lq <= n <= Lk:
            raise InvalidProblem(
                f"cache_seqlens[{b}]={n}, with Lq={Lq} and Lk={Lk}",
                "n counts the Lq new tokens and fits the cache: Lq <= n <= Lk, or 0 for no request",
                "append the new tokens first, and pass the length after appending",
            )
    if block_table is None:
        return
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    in_use = first < cache_seqlens[:, None]
    outside = in_use & ((block_table < 0) | (block_table >= n_pages))
    if outside.any():
        b, page = (int(i) for i in outside.nonzero()[0])
        raise InvalidProblem(
            f"block_table[{b}, {page}]={int(block_table[b, page])}, with n_pages={n_pages}",
            f"every page in use is in the pool: 0 <= page < {n_pages}",
            "check the allocator; entries past ceil(n / page_size) may be anything",
        )
