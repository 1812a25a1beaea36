"""What one step of the engine is to the layers that select: which requests attend how."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from tokenselect.contract import Problem, SelectConfig

# The packed copies for one call of vLLM's kernel hold no more tokens than this, or one request.
_PACKED_TOKENS = 16_384


class Batch(NamedTuple):
    """The requests of a step, as the host knows them.

    common    vLLM's CommonAttentionMetadata
    starts    where the queries of each request begin, and their end
    lengths   of each request, the new tokens included
    prompts, short, selecting
              the requests that read prompts, decode densely, and decode selecting
    """

    common: Any
    starts: list[int]
    lengths: list[int]
    prompts: list[int]
    short: list[int]
    selecting: list[int]


@dataclass
class Dense:
    """Requests that attend densely in one call of vLLM's kernel.

    tokens    of the step's queries, theirs
    metadata  as vLLM's kernel is given it; None: that of the step
    blocks    of these requests, where they are copied for it
    """

    tokens: Tensor | slice
    metadata: Any
    blocks: list[int] = field(default_factory=list)


@dataclass
class Decoding:
    """Requests that decode one token, in one call.

    tokens       of the step's queries, theirs
    lengths      of each request, the new token included
    seqlens      (B,) int32, those; zeros between, with `at`
    block_table  (B, blocks) int32
    select       what they attend to, in place of the layer's own options; None: those
    at           with Selection Caches, the row of each request in them; else None
    problem      of a layer that has attended in this step, and
    alike        what it shares with layers like it
    """

    tokens: Tensor | slice
    lengths: list[int]
    seqlens: Tensor
    block_table: Tensor
    select: SelectConfig | None
    at: Tensor | None = None
    problem: Problem | None = None
    alike: Any = None


@dataclass
class Division:
    """What the layers that select do in a step."""

    dense: list[Dense]
    decoding: list[Decoding]


class Rows:
    """Which rows of the Selection Caches belong to the requests that decode, from step to step.

    A request goes by the number that vLLM's model runner has for it, or, where none is told, by the
    block that its newest token is written to, which is its alone. A request goes on if it is as
    long as one of that name was, and a token more. That one has to have decoded in the step before:
    a request that was preempted, or had to wait, gets another row, and a new one has read a prompt
    before, which is no decoding.

    capacity  how many rows there are: after a step fewer than four for each of its requests
    """

    def __init__(self) -> None:
        self._row: dict[tuple[int, int], int] = {}  # by name and length
        self.capacity = 1

    def step(
        self, requests: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], list[bool], list[int] | None]:
        """Return each request's row, whether it begins there, and what order the rows get first.

        An order, for `SelectionCache.reorder`, if there are fewer rows now: which row comes to lie
        in each, in use or not; the first `capacity` stay. Else None, and no row moves.

        requests  of each that decodes: its name in the step before (the block of the token before
                  the newest), its name now, and its length
        """
        # A row that two requests could go on in is the first one's.
        found = [self._row.pop((before, n - 1), None) for before, _, n in requests]
        order = None
        if 0 < 4 * len(requests) <= self.capacity:
            kept = [row for row in found if row is not None]
            order = kept + [0] * (self.capacity - len(kept))
            front = iter(range(len(kept)))
            found = [None if row is None else next(front) for row in found]
            self.capacity = 1
        taken = {row for row in found if row is not None}
        free = (row for row in range(len(requests) + len(taken)) if row not in taken)
        at = [next(free) if row is None else row for row in found]
        self._row = {(name, n): row for (_, name, n), row in zip(requests, at, strict=True)}
        while self.capacity <= max(at, default=0):
            self.capacity *= 2
        return at, [row is None for row in found], order


def joined(spans: Sequence[range]) -> list[int] | slice:
    """Return all that lies in these: a slice where they follow one another."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return [i for span in spans for i in span]


def in_groups(requests: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut requests into groups that are packed at once."""
    groups: list[list[int]] = []
    held = 0
    for i in requests:
        if not groups or held + lengths[i] > _PACKED_TOKENS:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += lengths[i]
    return groups
