"""The kinds of problem that a backend is checked on."""

from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import torch

from tokenselect.conformance.problems import Case
from tokenselect.contract import Problem, SelectConfig


@dataclass(frozen=True)
class Kind:
    """A problem up to its seed.

    has_these_lengths  False: a seed draws each request's, from half of the case's to all of it
    steps              so many calls with one SelectionCache; 0: one call without
    """

    case: Case
    has_these_lengths: bool = False
    steps: int = 0


_CONFIG = SelectConfig(k=24, n_sink=4, n_local=16)
# A decode step of grouped queries. The scale is twice the usual one: votes that differ.
_DECODE = Case(
    lengths=(160, 160), G=4, D=64, Dv=64, rotary_dim=64, scale=2 / 8, spare=0, config=_CONFIG
)
# For an interpreter, which takes seconds for a problem of the size above.
_SMALL = Case(
    lengths=(64,), D=32, Dv=32, rotary_dim=32, scale=0.35, spare=0, config=replace(_CONFIG, k=8)
)
_PAGES: dict[str, Any] = {"page_size": 16}
_RAGGED: dict[str, Any] = {"lengths": (160, 0, 1, 97)}
_EXTRAPOLATE: dict[str, Any] = {"positions": "contiguous", "score_at": "split"}


def _kind(
    base: Case = _DECODE, *, steps: int = 0, config: dict[str, Any] | None = None, **changes: Any
) -> Kind:
    case = replace(base, config=replace(base.config, **config or {}), **changes)
    return Kind(case, has_these_lengths="lengths" in changes or steps > 0, steps=steps)


KINDS: dict[str, Kind] = {
    "decode": _kind(),
    "multi-head": _kind(Hkv=8, G=1),
    "multi-query": _kind(Hkv=1, G=8),
    "three heads a group": _kind(G=3),
    "v of another width": _kind(Dv=32),
    "bfloat16": _kind(dtype=torch.bfloat16),
    "float16": _kind(dtype=torch.float16),
    "float64": _kind(dtype=torch.float64),
    "prefill chunk": _kind(Lq=9),
    "chunk of three query means": _kind(Lq=9, config={"n_query_means": 3}),
    "paged": _kind(**_PAGES),
    "paged prefill chunk": _kind(**_PAGES, Lq=9),
    "pages of one token": _kind(page_size=1),
    "ragged, one absent": _kind(**_RAGGED),
    "ragged and paged": _kind(**_RAGGED, **_PAGES),
    "fraction, ragged": _kind(**_RAGGED, config={"k": 0.15, "k_max": 16}),
    "votes that tie": _kind(content="few keys"),
    "all candidates selected": _kind(config={"k": 160}),
    "no candidate selected": _kind(config={"k": 0, "n_sink": 0, "n_local": 1}),
    "soft vote of candidates": _kind(config={"normalize": "candidates"}),
    "logit vote": _kind(config={"vote": "logit"}),
    "hard vote": _kind(config={"vote": "hard"}),
    "paper, eq. 7": _kind(config={"select_scale": 1.0}),
    "one selection a group": _kind(config={"scope": "group"}),
    "pool of 5": _kind(config={"pool": 5}),
    "softcap": _kind(softcap=5.0),
    "sink logits": _kind(has_sink_logits=True),
    "rope, raw keys": _kind(rope="raw"),
    "fixed scoring": _kind(rope="rotated", config={"score_at": "fixed"}),
    "extrapolate, rotated keys": _kind(rope="rotated", config=_EXTRAPOLATE),
    "extrapolate, raw keys": _kind(rope="raw", config=_EXTRAPOLATE),
    "extrapolate, paged chunk": _kind(**_PAGES, Lq=5, rope="rotated", config=_EXTRAPOLATE),
    "reuse over 9 steps": _kind(steps=9),
    "reuse, paged": _kind(**_PAGES, steps=9),
    "small decode": _kind(_SMALL),
    "small paged chunk": _kind(_SMALL, **_PAGES, Lq=3, dtype=torch.bfloat16),
    "small, extrapolate": _kind(_SMALL, rope="rotated", config=_EXTRAPOLATE),
    "small, reuse over 2 steps": _kind(_SMALL, lengths=(64, 64), steps=2),
}
# All that an interpreter gets, unless it is to be thorough.
INTERPRETED = tuple(kind for kind in KINDS if kind.startswith("small"))


@cache
def draw(kind: str, seed: int) -> Problem:
    """Return a problem of a kind, on the CPU; rows of the cache that hold no token are NaN."""
    chosen = KINDS[kind]
    lengths = chosen.case.lengths
    if not chosen.has_these_lengths:
        random = Random(seed)
        lengths = tuple(random.randint(n // 2, n) for n in lengths)
    return replace(chosen.case, lengths=lengths, seed=seed).problem()
