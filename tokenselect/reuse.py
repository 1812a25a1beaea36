"""The Selection Cache: keep a selection while consecutive queries are alike (paper, algorithm 1).

A reused selection is the stored positions and every position appended since, so no token is ever
lost between the window and the selection. All state is tensors on the problem's device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import CONFIG_NAMES, Problem, Selection
from tokenselect.errors import InvalidProblem


@dataclass(eq=False)
class _State:
    """One layer's memory, a row a request. seen == 0: nothing stored."""

    query: Tensor  # (B, Hq * D) float32, the mean query of the last fresh selection
    positions: Tensor  # (B, S, K) int32, that selection
    count: Tensor  # (B, S) int32
    seen: Tensor  # (B,) int32, n when it was made
    hits: Tensor  # (B,) int64
    misses: Tensor  # (B,) int64

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.positions, self.count, self.seen, self.hits, self.misses


class SelectionCache:
    """What one attention layer remembers of its last fresh selection, for each request of a batch.

    theta      reuse where the cosine between the mean query of this call and that of the stored
               selection, over all heads, is at least theta, in [-1, 1]; None never reuses
    max_reuse  at most this many tokens may have been appended since

    A request reuses if also only new tokens were appended since its selection was made (an
    overwritten or cropped position makes a fresh one) and the result fits the capacity K, which
    only a selection made by a longer call can exceed. The caller owns it: one a layer, and `reset`
    when a row of the batch is given to another request.

    >>> cache = SelectionCache(theta=0.9)
    >>> cache.theta, cache.max_reuse
    (0.9, 64)
    """

    def __init__(self, theta: float | None = 0.9, max_reuse: int = 64) -> None:
        is_number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        if theta is not None and not (is_number and -1 <= theta <= 1):
            raise InvalidProblem(
                f"theta={theta!r}",
                "theta is a cosine in [-1, 1], or None for no reuse",
                "pass the paper's 0.9",
            )
        is_integer = isinstance(max_reuse, int) and not isinstance(max_reuse, bool)
        if not (is_integer and 0 <= max_reuse < 2**31):
            raise InvalidProblem(
                f"max_reuse={max_reuse!r}",
                "max_reuse is an integer, 0 <= max_reuse < 2**31",
                "pass how many tokens may be appended before selecting afresh",
            )
        self.theta = theta
        self.max_reuse = max_reuse
        self._geometry: dict[str, Any] | None = None
        self._state: _State | None = None

    @property
    def hits(self) -> Tensor:
        """(B,) int64 on the device: how often each request reused its selection."""
        return self._used().hits

    @property
    def misses(self) -> Tensor:
        """(B,) int64 on the device: how often each request selected afresh."""
        return self._used().misses

    def lookup(self, problem: Problem) -> Tensor:
        """Which requests reuse their selection in this call: (B,) bool. Changes no state.

        Raises InvalidProblem if the cache was made by another layer, batch or configuration.
        """
        n = problem.cache_seqlens
        if self._state is None:
            return torch.zeros_like(n, dtype=torch.bool)
        state = self._matching(problem)
        if self.theta is None:
            return torch.zeros_like(n, dtype=torch.bool)
        query = _mean_query(problem)
        # cosine >= theta without a division, so that equal queries have a cosine of exactly 1.
        product, power = (query * state.query).sum(1).double(), query.square().sum(1).double()
        power = power * state.query.square().sum(1).double()
        alike = (power > 0) & power.isfinite() & (product >= self.theta * power.sqrt())
        appended = n - state.seen
        only_new = n - problem.Lq >= state.seen
        fits = state.count.amax(1) + appended <= problem.K
        is_known = (state.seen > 0) & only_new & (appended <= self.max_reuse) & fits
        return is_known & alike

    def update(self, problem: Problem, reused: Tensor, fresh: Selection) -> Selection:
        """This call's selection: the stored one and what was appended, or the fresh one, stored."""
        state = self._matching(problem)
        merged = self._extended(state, problem)
        positions = torch.where(reused[:, None, None], merged.positions, fresh.positions)
        count = torch.where(reused[:, None], merged.count, fresh.count)
        n = problem.cache_seqlens
        present = n > 0
        missed = ~reused
        width = problem.K
        stored = state.positions[:, :, :width]
        stored.copy_(torch.where(missed[:, None, None], fresh.positions, stored))
        state.query.copy_(torch.where(missed[:, None], _mean_query(problem), state.query))
        state.count.copy_(torch.where(missed[:, None], fresh.count, state.count))
        state.seen.copy_(torch.where(missed, n, state.seen))
        state.hits.add_(reused & present)
        state.misses.add_(missed & present)
        return Selection(positions, count)

    def reset(self, b: int | Tensor | None = None) -> None:
        """Forget request b, those a (B,) bool tensor marks, or (None) everything, geometry too."""
        if b is None:
            self._geometry, self._state = None, None
        elif self._state is not None:
            _check_request(b, self._state.seen)
            for tensor in (self._state.seen, self._state.hits, self._state.misses):
                tensor[b] = 0

    def crop(self, lengths: Tensor) -> None:
        """Tell that the requests were cut back to `lengths` (B,): drop what saw cropped tokens.

        An appended token is attended to anyway, so a selection made at or before the cut stays.
        """
        if self._state is not None:
            seen = self._state.seen
            _check_rows("lengths", lengths, seen)
            seen.copy_(torch.where(seen > lengths, 0, seen))

    def reorder(self, order: Tensor) -> None:
        """Row b becomes what row order[b] was: beams, or a batch put together anew. order (B,)."""
        if self._state is not None:
            _check_rows("order", order, self._state.seen)
            if order.device.type == "cpu" and not ((order >= 0) & (order < len(order))).all():
                raise InvalidProblem(
                    f"order={order.tolist()}, the cache holds B={len(order)} requests",
                    "every entry is the number of a request, 0 <= row < B",
                    "say for each row which row it was",
                )
            for tensor in self._state.tensors():
                tensor.copy_(tensor[order])

    def _used(self) -> _State:
        if self._state is None:
            raise InvalidProblem(
                "this SelectionCache has not been used yet, or was reset",
                "its state exists from the first attention call on",
                "call attention(..., cache=cache) first",
            )
        return self._state

    def _matching(self, problem: Problem) -> _State:
        geometry = {
            "B": problem.B,
            "Hq": problem.Hq,
            "Hkv": problem.Hkv,
            "D": problem.D,
            "Dv": problem.Dv,
            "dtype": problem.q.dtype,
            "scale": problem.scale,
            "softcap": problem.softcap,
            "device": problem.q.device,
        } | {name: getattr(problem.config, name) for name in CONFIG_NAMES}
        if self._geometry is None or self._state is None:
            self._geometry, self._state = geometry, self._empty(problem)
        for name, value in geometry.items():
            if self._geometry[name] != value:
                raise InvalidProblem(
                    f"cache holds selections made with {name}={self._geometry[name]}, "
                    f"this call has {name}={value}",
                    "a SelectionCache serves one layer, one batch and one configuration",
                    "make one cache a layer, or cache.reset() before another use",
                )
        missing = problem.K - self._state.positions.shape[2]
        if missing > 0:
            with torch.inference_mode(False):
                wider = self._state.positions.new_full((problem.B, problem.S, problem.K), -1)
            wider[:, :, :-missing] = self._state.positions
            self._state.positions = wider
        return self._state

    @staticmethod
    def _empty(problem: Problem) -> _State:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=problem.q.device)

        B, S = problem.B, problem.S
        # State made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            return _State(
                query=zeros(B, problem.Hq * problem.D, dtype=torch.float32),
                positions=zeros(B, S, problem.K) - 1,
                count=zeros(B, S),
                seen=zeros(B),
                hits=zeros(B, dtype=torch.int64),
                misses=zeros(B, dtype=torch.int64),
            )

    @staticmethod
    def _extended(state: _State, problem: Problem) -> Selection:
        """The stored positions, then seen, seen + 1, ..., n - 1."""
        K = problem.K
        place = torch.arange(K, dtype=torch.int32, device=problem.q.device)
        count, seen = state.count[:, :, None], state.seen[:, None, None]
        total = count + problem.cache_seqlens[:, None, None] - seen
        appended = torch.where(place < total, seen + place - count, -1)
        positions = torch.where(place < count, state.positions[:, :, :K], appended)
        return Selection(positions, total[:, :, 0])


def _check_request(b: int | Tensor, rows: Tensor) -> None:
    B = len(rows)
    if isinstance(b, Tensor):
        holds, came = b.shape == (B,) and b.dtype == torch.bool, _shape_of(b)
    else:
        is_integer = isinstance(b, int) and not isinstance(b, bool)
        holds, came = is_integer and 0 <= b < B, f"={b!r}"
    if not holds:
        raise InvalidProblem(
            f"reset: b{came}, the cache holds B={B} requests",
            "b is the number of a request, 0 <= b < B, or a (B,) bool tensor, or None for all",
            "pass the row of the batch that another request will take",
        )


def _check_rows(name: str, given: Tensor, rows: Tensor) -> None:
    integers = (torch.int32, torch.int64)
    if not isinstance(given, Tensor) or given.shape != rows.shape or given.dtype not in integers:
        raise InvalidProblem(
            f"{name}{_shape_of(given)}, the cache holds B={len(rows)} requests",
            f"{name} is a (B,) tensor of integers, one a request",
            "give every row of the batch an entry",
        )


def _shape_of(given: object) -> str:
    if isinstance(given, Tensor):
        return f" is {tuple(given.shape)} {given.dtype}"
    return f" is a {type(given).__name__}"


def _mean_query(problem: Problem) -> Tensor:
    """The mean of the queries as given, all heads side by side: (B, Hq * D) float32."""
    return problem.q.float().mean(2).flatten(1)
