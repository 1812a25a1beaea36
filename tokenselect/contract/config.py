"""SelectConfig: what to select, and how."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch

from tokenselect.scalars import plain

Vote = Literal["soft", "logit", "hard"]
Normalize = Literal["visible", "candidates"]
Scope = Literal["layer", "group"]
Positions = Literal["original", "contiguous"]
ScoreAt = Literal["true", "fixed", "split"]
# Fractions are taken to six decimals, as integers: so every backend computes the same budget.
MILLION = 10**6


class BudgetRule(NamedTuple):
    """What makes the budget of a request of n tokens, in integers.

    budget = min(max(ceil(n * millionths / 10**6), least), most); the first ballot of a split gets
    ceil(budget * fixed_millionths / 10**6) of it.
    """

    millionths: int
    least: int
    most: int
    fixed_millionths: int


@dataclass(frozen=True)
class SelectConfig:
    """What to select, and how. A mapping too: `attention(q, k_cache, v_cache, **config)`.

    k              budget: tokens selected by vote, >= 0; or, between 0 and 1, the fraction of a
                   request's cached tokens that are: see `budget`
    n_sink         first positions, always attended, >= 0
    n_local        newest positions that every query of a call is sure to see, >= 1
    vote           "soft": softmax mass (paper, eq. 7); "logit": summed logits (eq. 5);
                   "hard": heads that have the token among their own k best (eq. 6)
    normalize      the soft vote's softmax runs over all "visible" tokens, or "candidates" only
    scope          one selection per "layer", or per "group" of query heads (a KV head)
    select_scale   factor on the vote's logits; None: the attention's own scale
    pool           odd; votes become the maximum over that many neighbouring candidates
    n_query_means  the queries of a call are averaged in this many runs, each of which votes
    positions      attend at "original" positions, or "contiguous" (for length extrapolation)
    score_at       score candidates at their "true" distance, at one "fixed" distance of n_local,
                   or "split": part of k by fixed votes, then the rest by true ones
    fixed_share    that part, in [0, 1]; ceil(fixed_share * k) tokens
    k_min, k_max   bounds of the budget where k is a fraction; k_max None: no upper one

    Numbers may be numpy's, or tensors without a dimension on the CPU: they are kept as Python's.
    """

    k: int | float = 2048
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
    k_min: int = 0
    k_max: int | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            given = getattr(self, name)
            value = plain(given)
            if value is not given:
                object.__setattr__(self, name, value)

    @classmethod
    def faithful(cls, **changes: Any) -> Self:
        """Stay close to dense attention within the trained length: original, true positions."""
        return cls(**changes)

    @classmethod
    def extrapolate(cls, **changes: Any) -> Self:
        """Go beyond the trained length: contiguous positions, split scoring. Needs a `rope`."""
        return cls(**{"positions": "contiguous", "score_at": "split"} | changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Follow equation 7 literally: logits without 1/sqrt(D), softmax over all tokens."""
        return cls(**{"select_scale": 1.0} | changes)

    def keys(self) -> Iterator[str]:
        """Return the names of the settings: the mapping of `**config`."""
        return (field.name for field in fields(self))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @property
    def ballots(self) -> tuple[Literal["fixed", "true"], ...]:
        """Each ballot's way of scoring, in the order in which they choose."""
        return ("fixed", "true") if self.score_at == "split" else (self.score_at,)

    @property
    def budget_rule(self) -> BudgetRule:
        """`budget` and `shares` in integers, for kernels: a k that is no fraction bounds itself."""
        fixed = round(self.fixed_share * MILLION)
        if not isinstance(self.k, (float, torch.SymFloat)):  # the second in a trace
            return BudgetRule(0, self.k, self.k, fixed)
        most = 2**31 - 1 if self.k_max is None else self.k_max
        return BudgetRule(round(self.k * MILLION), self.k_min, most, fixed)

    def budget(self, n: int) -> int:
        """Return how many tokens are selected by vote of a request of n tokens.

        k, or ceil(k * n) within k_min and k_max if k is a fraction. Never falls as n grows.

        >>> SelectConfig(k=0.1, k_min=16).budget(100), SelectConfig(k=0.1, k_min=16).budget(201)
        (16, 21)
        """
        rule = self.budget_rule
        return min(max(_part(rule.millionths, n), rule.least), rule.most)

    def shares(self, n: int) -> tuple[int, ...]:
        """Return each ballot's share of the budget of a request of n tokens."""
        k = self.budget(n)
        if self.score_at != "split":
            return (k,)
        fixed = _part(self.budget_rule.fixed_millionths, k)
        return fixed, k - fixed

    def regions(self, n: int, Lq: int) -> tuple[int, int]:
        """Return (end of the sink, start of the local window); the candidates lie between."""
        local_start = max(0, n - Lq + 1 - self.n_local)
        return min(self.n_sink, local_start), local_start


def _part(millionths: int, count: int) -> int:
    """Return so many millionths of a count, rounded up."""
    return -(-count * millionths // MILLION)


CONFIG_NAMES = tuple(field.name for field in fields(SelectConfig))
_NUMBERS = (
    *("k", "n_sink", "n_local", "select_scale", "pool", "n_query_means", "fixed_share"),
    *("k_min", "k_max"),
)

_MADE: dict[tuple[Any, ...], SelectConfig] = {}
_KINDS = 1024


def made(settings: dict[str, Any]) -> SelectConfig:
    """Return SelectConfig(**settings): of settings that came before, the same one."""
    # 1, 1.0 and True are equal, and no equal settings.
    key = tuple((name, type(value), value) for name, value in settings.items())
    if torch.compiler.is_compiling() or not {kind for _, kind, _ in key} <= {int, float, str}:
        return SelectConfig(**settings)
    config = _MADE.get(key)
    if config is None:
        if len(_MADE) >= _KINDS:
            _MADE.clear()
        config = _MADE[key] = SelectConfig(**settings)
    return config
