"""What one step of the engine is to the layers that select: which requests attend how."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import Problem, SelectConfig

# The packed copies for one call of vLLM's kernel hold no more tokens than this, or one request.
_PACKED_TOKENS = 16_384


@dataclass
class Prompts:
    """Requests that read prompts, densely, in one call of vLLM's kernel over packed copies.

    tokens    of the step's queries, theirs
    blocks    their blocks, which are copied
    metadata  as vLLM's kernel is given it, over these copies
    """

    tokens: Tensor | slice
    blocks: list[int]
    metadata: Any


@dataclass
class Decoding:
    """Requests that decode one token, in one call.

    tokens       of the step's queries, theirs
    lengths      of each request, the new token included
    seqlens      (B,) int32, those; zeros between, with `at`
    block_table  (B, blocks) int32
    select       what they attend to, in place of the layer's own options; None: those
    at           with Selection Caches, the row of each request in them; else None
    begins       (B,) bool, rows of `at` that another request had; None if there are none
    problem      of a layer that has attended in this step, and
    alike        what it shares with layers like it
    """

    tokens: Tensor | slice
    lengths: list[int]
    seqlens: Tensor
    block_table: Tensor
    select: SelectConfig | None
    at: Tensor | None = None
    begins: Tensor | None = None
    problem: Problem | None = None
    alike: Any = None


class Rows:
    """Which rows of the Selection Caches belong to the requests that decode, from step to step.

    vLLM tells a backend no names. The block that a request's newest token is written to is its
    alone, so where the step before wrote a request's last token, that request goes on. It has to
    have decoded in that very step: one that was preempted, or had to wait, gets another row, and
    a new one has read a prompt before, which is no decoding.
    """

    def __init__(self) -> None:
        self._row: dict[tuple[int, int], int] = {}  # by newest block and length
        self.capacity = 1

    def step(self, requests: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[bool]]:
        """Return each request's row, and whether it begins there.

        requests  of each that decodes: the block of the token before the newest, the block of the
                  newest, and the length
        """
        found = [self._row.get((before, n - 1)) for before, _, n in requests]
        taken = {row for row in found if row is not None}
        free = (row for row in range(len(requests) + len(taken)) if row not in taken)
        at = [next(free) if row is None else row for row in found]
        self._row = {(block, n): row for (_, block, n), row in zip(requests, at, strict=True)}
        while self.capacity <= max(at, default=0):
            self.capacity *= 2
        return at, [row is None for row in found]


def tokens_of(starts: Sequence[int], requests: Sequence[int]) -> Tensor | slice:
    """Return where the queries of some requests lie: a slice where they follow one another."""
    spans = [range(starts[i], starts[i + 1]) for i in requests]
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return torch.tensor([token for span in spans for token in span], device="cpu")


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
