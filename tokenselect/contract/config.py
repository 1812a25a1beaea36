"""SelectConfig: what to select, and how."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from tokenselect.scalars import plain

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
    scope          one selection per "layer", or per "group" of query heads (a KV head)
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
    def ballots(self) -> tuple[tuple[Literal["fixed", "true"], int], ...]:
        """Each ballot's way of scoring and its share of k, in the order in which they choose."""
        if self.score_at == "split":
            fixed = math.ceil(self.fixed_share * self.k)
            return ("fixed", fixed), ("true", self.k - fixed)
        return ((self.score_at, self.k),)

    def regions(self, n: int, Lq: int) -> tuple[int, int]:
        """Return (end of the sink, start of the local window); the candidates lie between."""
        local_start = max(0, n - Lq + 1 - self.n_local)
        return min(self.n_sink, local_start), local_start


CONFIG_NAMES = tuple(field.name for field in fields(SelectConfig))
_NUMBERS = "k", "n_sink", "n_local", "select_scale", "pool", "n_query_means", "fixed_share"
