"""What the stages and the Selection Cache's steps return."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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


class AttentionOutput(NamedTuple):
    """out (B, Hq, Lq, Dv) in q's dtype; lse (B, Hq, Lq) float32, natural log, sink_logits aside."""

    out: Tensor
    lse: Tensor


@dataclass(eq=False)
class CacheState:
    """What a SelectionCache holds of one layer, one row per request: tensors that never move.

    query      (B, Hq * D) float32, the mean query of the stored selection
    positions  (B, S, at least K) int32, that selection
    count      (B, S) int32, of that selection
    seqlen_at_selection
               (B,) int32, n when it was made; 0: nothing is stored
    hits       (B,) int64, how often the request reused its selection
    misses     (B,) int64, how often it selected again
    """

    query: Tensor
    positions: Tensor
    count: Tensor
    seqlen_at_selection: Tensor
    hits: Tensor
    misses: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of it, in the order of the fields."""
        return (
            self.query,
            self.positions,
            self.count,
            self.seqlen_at_selection,
            self.hits,
            self.misses,
        )


class ReuseDecision(NamedTuple):
    """Which requests of a call reuse their selection.

    reused         (B,) bool
    cache_seqlens  (B,) int32, 0 where a selection is reused, else n: to `score` and `select`, a
                   request that reuses its selection is absent
    query          (B, Hq * D) float32, the mean of the call's queries as given
    """

    reused: Tensor
    cache_seqlens: Tensor
    query: Tensor
