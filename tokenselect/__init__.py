"""Token-level KV-cache selection for long-context inference (TokenSelect, arXiv 2411.02886).

    out = tokenselect.attention(q, k_cache, v_cache, k=2048)

Start with `attention`; `explain` says what it would run on; `python -m tokenselect.check` tells
what this machine can do and whether it is right.
"""

from tokenselect.api import Info, attend, attention, explain, score, select
from tokenselect.contract import (
    Attended,
    Backend,
    Capability,
    Planned,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    reasons,
)
from tokenselect.errors import (
    InvalidProblem,
    NotCapturable,
    TokenSelectError,
    UnknownBackend,
    UnsupportedProblem,
)
from tokenselect.graph_safety import rehearse
from tokenselect.graphs import capture, cuda_graph
from tokenselect.plans import Plan, plan
from tokenselect.registry import Explanation, backends, register
from tokenselect.reuse import SelectionCache
from tokenselect.rope import Rope

__version__ = "0.1.0"

__all__ = [
    "Attended",
    "Backend",
    "Capability",
    "Explanation",
    "Info",
    "InvalidProblem",
    "NotCapturable",
    "Plan",
    "Planned",
    "Problem",
    "Rope",
    "Scores",
    "SelectConfig",
    "Selection",
    "SelectionCache",
    "TokenSelectError",
    "UnknownBackend",
    "UnsupportedProblem",
    "attend",
    "attention",
    "backends",
    "capture",
    "cuda_graph",
    "explain",
    "plan",
    "reasons",
    "register",
    "rehearse",
    "score",
    "select",
]
