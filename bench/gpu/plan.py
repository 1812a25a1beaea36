"""Which cells are measured, the important ones first, and what fits into the time there is."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.workloads import PAPER_SIZES
from tokenselect import SelectConfig

K = 1024
DRY = 1024  # a dry run's cells are about so much shorter


@dataclass(frozen=True)
class PlannedSteps:
    """How planned steps are measured in a cell: see `bench.gpu.reuse`.

    short    also a plan for the whole n at this length, beside a plan for no more than that
    checked  steps of each kind that are compared with attention before they are timed, about
    """

    layers: int = 16
    max_reuse: int = 64
    short: int | None = None
    checked: int = 12


@dataclass(frozen=True)
class Cell:
    """One shape to measure. All requests of a batch have n tokens: dense attention's best case.

    planned  a reuse cell: plans are measured in the same rounds
    """

    kind: Literal["decode", "prefill"]
    Hq: int
    Hkv: int
    D: int
    n: int
    B: int = 1
    Lq: int = 1
    is_headline: bool = False
    config: SelectConfig = PAPER_SIZES
    planned: PlannedSteps | None = None

    @property
    def geometry(self) -> str:
        return f"{self.Hq}/{self.Hkv}/{self.D}"

    @property
    def name(self) -> str:
        Lq = f" Lq {self.Lq}" if self.kind == "prefill" else ""
        return f"{self.kind} {self.geometry} n {tokens(self.n)} B {self.B}{Lq}"

    @property
    def cache_bytes(self) -> int:
        """Keys and values, in bfloat16."""
        return 2 * self.B * self.Hkv * self.n * self.D * 2

    def facts(self) -> dict[str, Any]:
        names = ("kind", "Hq", "Hkv", "D", "n", "B", "Lq", "is_headline")
        return {"name": self.name} | {name: getattr(self, name) for name in names}


def tokens(n: int) -> str:
    """131072 is 128K, 1048576 is 1M, 300 is 300."""
    for size, letter in ((K * K, "M"), (K, "K")):
        if n >= size and n % size == 0:
            return f"{n // size}{letter}"
    return str(n)


MAIN = (32, 8, 128)
GEOMETRIES = (MAIN, (28, 4, 128), (9, 3, 64))
CHUNK = 512


def cells(*, quick: bool = False, dry: bool = False) -> list[Cell]:
    """All cells, the least important last; those with targets alone, if quick."""
    found = [
        Cell("decode", *MAIN, 128 * K, is_headline=True, planned=PlannedSteps()),
        Cell("decode", *MAIN, K * K, is_headline=True, planned=PlannedSteps(short=32 * K)),
    ]
    found += [Cell("prefill", *MAIN, n, Lq=CHUNK, is_headline=True) for n in (128 * K, K * K)]
    if not quick:
        found.append(Cell("decode", *MAIN, 32 * K, planned=PlannedSteps()))
        found.append(Cell("decode", *MAIN, 128 * K, 8, planned=PlannedSteps()))
        found.append(Cell("decode", *MAIN, 512 * K))
        found.append(Cell("prefill", *MAIN, 512 * K, Lq=CHUNK))
        lengths = (128 * K, K * K, 512 * K, 32 * K)
        found += [Cell("decode", *heads, n) for heads in GEOMETRIES[1:] for n in lengths]
        for B in (8, 32):
            found += [Cell("decode", *heads, n, B) for heads in GEOMETRIES for n in lengths]
    once: dict[str, Cell] = {}
    for cell in found:
        once.setdefault(cell.name, cell)
    return [_shrunk(cell) for cell in once.values()] if dry else list(once.values())


def _shrunk(cell: Cell) -> Cell:
    config = replace(cell.config, k=64, n_sink=8, n_local=32)
    Lq = cell.Lq if cell.kind == "decode" else 16
    B = {1: 1, 8: 2, 32: 3}[cell.B]
    planned = cell.planned
    if planned is not None:
        short = planned.short and 224 + planned.short // DRY
        planned = PlannedSteps(layers=2, max_reuse=10, short=short, checked=5)
    return replace(cell, n=224 + cell.n // DRY, B=B, Lq=Lq, config=config, planned=planned)


def memory(cell: Cell) -> int:
    """Bytes that measuring a cell takes: its cache, half its keys again to copy, and the rest.

    The rest is the float64 truth, votes, results and graphs. A rival that needs more is tried, and
    listed as out of memory if it is.
    """
    return round(1.3 * cell.cache_bytes) + 2 * 2**30 + 64 * cell.B * cell.n


def seconds_for(cell: Cell, left: float, cells_left: int) -> float:
    """How long the timed rounds of a cell may take, with so much time left for so many cells."""
    share = 0.35 * left / max(1, cells_left)
    return min(5.0, max(2.0, share)) if cell.is_headline else min(2.5, max(0.4, share))


def fits(left: float, durations: Sequence[float]) -> bool:
    """Whether another cell is begun: what cells have taken so far is what the next may take."""
    expected = 1.5 * statistics.median(durations) if durations else 10.0
    return left >= expected + 2.0
