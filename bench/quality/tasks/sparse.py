"""Everything read by the way itself, from the first token on, in chunks; no logits are kept.

All ways read a document in lockstep with dense attention, each into a cache of its own. Beyond
the model's trained length dense attention is no measure of anything, and a cell says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.quality.figures import Against
from bench.quality.figures import against_dense as summary
from bench.quality.lab import Cell, Lab, fed, of_document
from bench.quality.ways import DENSE, Budget, resolve_all, selecting
from tokenselect.integrations.transformers import TokenSelectCache

__all__ = ["Settings", "cells", "run", "summary"]

# Caches that are held at once, in bytes.
_MEMORY = 4e9


@dataclass(frozen=True)
class Settings:
    """lengths: of documents; counted from: of the length; chunk: tokens fed together."""

    ways: tuple[str, ...]
    lengths: tuple[int, ...] = field(metadata={"least": 4})
    documents: int = field(metadata={"least": 1})
    counted_from: float = field(default=0.5, metadata={"least": 0, "most": 0.95})
    chunk: int = field(default=512, metadata={"least": 1})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    for length in settings.lengths:
        more = {"first": int(settings.counted_from * length), "chunk": settings.chunk}
        ways = resolve_all(settings.ways, plan.ways, settings.budgets, length)
        for document in lab.documents(plan.texts, plan.split, settings.documents, length + 1):
            for way in [DENSE, *selecting(ways)]:
                cell = of_document(lab, "sparse", document, length, way, 0.007 * length, **more)
                within = lab.trained is None or length <= lab.trained
                yield replace(cell, label={**cell.label, "within_trained": within})


@torch.inference_mode()
def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    selecting = [cell for cell in cells if cell.way.kind != "dense"]
    config = lab.config
    heads = config.num_hidden_layers * lab.kv_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * 4 * heads * width * cells[0].label["context"]
    at_once = max(1, int(_MEMORY / size) - 1)
    for start in range(0, max(1, len(selecting)), at_once):
        these = selecting[start : start + at_once]
        if start == 0:
            these += [cell for cell in cells if cell.way.kind == "dense"]
        yield from _lockstep(these, lab)


def _lockstep(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Read one document with dense attention and all these ways, a chunk at a time."""
    label, ids = cells[0].label, cells[0].given.ids
    length, first, chunk = label["context"], label["first"], label["chunk"]
    dense_cache = TokenSelectCache(lab.model, max_length=length)
    several = [
        (cell, TokenSelectCache(lab.model, max_length=length), Against())
        for cell in cells
        if cell.way.kind != "dense"
    ]
    of_dense = Against()
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        count = max(0, stop - max(first, start))  # the newest of them, which are counted
        tokens, following = ids[start:stop], ids[stop + 1 - count : stop + 1]
        with DENSE.attached(lab.model):
            dense = fed(lab.model, dense_cache, tokens, max(count, 1))
        if count:
            of_dense.add(dense, dense, following)
        for cell, cache, against in several:
            with cell.way.attached(lab.model):
                logits = fed(lab.model, cache, tokens, max(count, 1))
            if count:
                against.add(logits, dense, following)
    for cell in cells:
        if cell.way.kind == "dense":
            yield cell, of_dense.summary()
    for cell, _, against in several:
        yield cell, against.summary()
