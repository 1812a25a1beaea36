"""Tokens decoded one by one after a dense prefill: what a way changes, from the very same cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.quality.figures import Against
from bench.quality.figures import against_dense as summary
from bench.quality.lab import Cell, Lab, fed, of_document, rewound
from bench.quality.ways import DENSE, Budget, Way, resolve_all, selecting
from tokenselect.integrations.transformers import TokenSelectCache

_CHUNK = 512

__all__ = ["Settings", "cells", "run", "summary"]


@dataclass(frozen=True)
class Settings:
    """contexts: tokens read densely; held: tokens then fed one by one, whatever a way foresaw."""

    ways: tuple[str, ...]
    contexts: tuple[int, ...] = field(metadata={"least": 1})
    documents: int = field(metadata={"least": 1})
    held: int = field(default=128, metadata={"least": 1})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    for context in settings.contexts:
        ways = resolve_all(settings.ways, plan.ways, settings.budgets, context)
        yield from of_ways("decode", [DENSE, *selecting(ways)], context, settings, plan, lab)


def of_ways(
    task: str, ways: Sequence[Way], context: int, settings: Any, plan: Any, lab: Lab
) -> Iterator[Cell]:
    """A cell for each document and way, at one context."""
    held = settings.held
    for document in lab.documents(plan.texts, plan.split, settings.documents, context + held + 1):
        for way in ways:
            seconds = 0.06 * held + (0.006 * context if way.kind == "dense" else 0)
            yield of_document(lab, task, document, context, way, seconds, held=held)


@torch.inference_mode()
def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context = cells[0].label["context"]
    ids = cells[0].given.ids
    prompt, held = ids[:context], ids[context:]
    cache = prefilled(lab, prompt, DENSE, len(held))
    dense, _ = decoded(lab, cache, held, DENSE)
    moves = False
    for cell in in_order(cells):
        # What is moved is cached otherwise, and needs a prefill of its own.
        if cell.way.moves != moves:
            moves, cache = cell.way.moves, None
            cache = prefilled(lab, prompt, cell.way.everything(len(ids)), len(held))
        is_dense = cell.way.kind == "dense"
        logits, reused = (dense, {}) if is_dense else decoded(lab, cache, held, cell.way)
        against = Against()
        against.add(logits, dense, held[1:])
        yield cell, against.summary() | reused


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Those that take the stock cache first, then those that move keys."""
    return sorted(cells, key=lambda cell: cell.way.moves)


def prefilled(lab: Lab, ids: Sequence[int], way: Way, more: int) -> TokenSelectCache:
    """A cache of these tokens, with room for more, read with `way` in chunks."""
    cache = TokenSelectCache(lab.model, max_length=len(ids) + more)
    with way.attached(lab.model):
        for start in range(0, len(ids), _CHUNK):
            fed(lab.model, cache, ids[start : start + _CHUNK])
    return cache


def decoded(
    lab: Lab, cache: TokenSelectCache, ids: Sequence[int], way: Way
) -> tuple[Tensor, dict[str, Any]]:
    """Logits (tokens, vocabulary) after each token but the last, and how often layers reused.

    The cache is afterwards as it was.
    """
    selecting = [layer for layer in cache.layers if hasattr(layer, "selections")]
    for layer in selecting:
        layer.selections.clear()
    with rewound(cache), way.attached(lab.model):
        logits = torch.cat([fed(lab.model, cache, (token,)) for token in ids[:-1]])
    counts = [layer.selections.counts() for layer in selecting]
    if way.options is None or way.options.theta is None:
        return logits, {}
    rates = [hits / (hits + misses) for hits, misses in counts]
    return logits, {"hit_rate": sum(rates) / len(rates), "hit_rate_of_layers": rates}
