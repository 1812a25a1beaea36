"""Token-level KV-cache selection for long-context inference (TokenSelect, arXiv 2411.02886).

    out = tokenselect.attention(q, k_cache, v_cache, k=2048)

Start with `attention`; `explain` says what it would run on; `python -m tokenselect.check` tells
what this machine can do and whether it is right.
"""

from tokenselect.api import AttentionInfo, attend, attention, explain, run, score, select
from tokenselect.contract import (
    AttentionOutput,
    Backend,
    Capability,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    StaticStages,
    reasons,
)
from tokenselect.dispatch.registry import Explanation, backends, register
from tokenselect.errors import (
    InvalidProblem,
    NotCapturable,
    RankFailed,
    TokenSelectError,
    UnknownBackend,
    UnsupportedProblem,
)
from tokenselect.plans.cuda_graph import capture, cuda_graph
from tokenselect.plans.graph_safety import check_capturable
from tokenselect.plans.plan import Plan, plan
from tokenselect.rope import Rope
from tokenselect.selection_cache import SelectionCache

__version__ = "0.1.0"

__all__ = [
    "AttentionInfo",
    "AttentionOutput",
    "Backend",
    "Capability",
    "Explanation",
    "InvalidProblem",
    "NotCapturable",
    "Plan",
    "Problem",
    "RankFailed",
    "Rope",
    "Scores",
    "SelectConfig",
    "Selection",
    "SelectionCache",
    "StaticStages",
    "TokenSelectError",
    "UnknownBackend",
    "UnsupportedProblem",
    "attend",
    "attention",
    "backends",
    "capture",
    "check_capturable",
    "cuda_graph",
    "explain",
    "plan",
    "reasons",
    "register",
    "run",
    "score",
    "select",
]
