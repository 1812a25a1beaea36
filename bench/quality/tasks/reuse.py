"""The Selection Cache over theta: how often it hits, and what that changes; as `decode`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from bench.quality.lab import Cell, Lab
from bench.quality.tasks import decode
from bench.quality.tasks.decode import run, summary
from bench.quality.ways import DENSE, Budget, resolve_all, selecting

__all__ = ["Settings", "cells", "run", "summary"]


@dataclass(frozen=True)
class Settings:
    """thetas: each on top of every way; theta=None, never reused, is always there to compare."""

    ways: tuple[str, ...]
    contexts: tuple[int, ...] = field(metadata={"least": 1})
    documents: int = field(metadata={"least": 1})
    thetas: tuple[float, ...] = field(metadata={"least": -1, "most": 1})
    held: int = field(default=128, metadata={"least": 1})
    max_reuse: int = field(default=64, metadata={"least": 0})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    for context in settings.contexts:
        several = [DENSE]
        for way in selecting(resolve_all(settings.ways, plan.ways, settings.budgets, context)):
            several.append(way.with_options(theta=None))
            several += [
                way.with_options(theta=theta, max_reuse=settings.max_reuse)
                for theta in settings.thetas
            ]
        for cell in decode.of_ways("decode", several, context, settings, plan, lab):
            options = cell.way.options
            theta = None if options is None else options.theta
            yield replace(cell, label={**cell.label, "theta": theta})
