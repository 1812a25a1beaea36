"""What every backend is given and what it must return. No algorithm lives here.

Letters, the same everywhere: B requests, Hq query heads, Hkv KV heads, G = Hq // Hkv, Lq queries
of this call, Lk cache capacity, n valid tokens of one request (the Lq new ones included), D head
dim of q and k, Dv head dim of v, k the budget, S selections per request (1, or Hkv), R ballots,
K capacity of a selection. A position is a token's index in its request; a slot is its row in a
paged cache. Query head h reads KV head h // G.
"""

from tokenselect.contract.backend import (
    Backend,
    Capability,
    Reuse,
    StaticStages,
    listed,
    reasons,
)
from tokenselect.contract.config import (
    CONFIG_NAMES,
    Normalize,
    Positions,
    Scope,
    ScoreAt,
    SelectConfig,
    Vote,
)
from tokenselect.contract.problem import Problem
from tokenselect.contract.results import (
    AttentionOutput,
    CacheState,
    ReuseDecision,
    Scores,
    Selection,
)
from tokenselect.contract.rules import DTYPES, check_values

__all__ = [
    "CONFIG_NAMES",
    "DTYPES",
    "AttentionOutput",
    "Backend",
    "CacheState",
    "Capability",
    "Normalize",
    "Positions",
    "Problem",
    "Reuse",
    "ReuseDecision",
    "Scope",
    "ScoreAt",
    "Scores",
    "SelectConfig",
    "Selection",
    "StaticStages",
    "Vote",
    "check_values",
    "listed",
    "reasons",
]
