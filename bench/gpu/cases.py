"""Which shapes are measured, the important ones first, and what fits into the time."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.workloads import Workload

K = 1024
MAIN = (32, 8, 128)
GEOMETRIES = (MAIN, (28, 4, 128), (9, 3, 64))
CHUNK = 512


@dataclass(frozen=True)
class PlannedSteps:
    """How planned steps are measured in a case: see `bench.gpu.steps`.

    short    also a plan for the whole n at this length, beside a plan for no more than that
    checked  steps of each kind that are compared with attention before they are timed, about
    """

    layers: int = 16
    max_reuse: int = 64
    short: int | None = None
    checked: int = 12


@dataclass(frozen=True)
class Case(Workload):
    """One shape to measure. All requests of a batch have n tokens: dense attention's best case.

    planned  plans are measured in the same rounds
    """

    is_headline: bool = False
    planned: PlannedSteps | None = None

    def lengths(self) -> list[int]:
        """Return the tokens of each request."""
        return [self.n] * self.B

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the case."""
        sizes = {name: getattr(self, name) for name in ("Hq", "Hkv", "D", "n", "B", "Lq")}
        kind = "decode" if self.Lq == 1 else "prefill"
        return {"name": self.name, "kind": kind, **sizes, "is_headline": self.is_headline}

    @property
    def memory(self) -> int:
        """Bytes that measuring takes: the cache in bfloat16, a copy of some of it, and the rest.

        The rest is the float64 truth, votes, results and graphs. A baseline that needs more is
        tried, and listed as out of memory if it is.
        """
        cache = 2 * self.B * self.Hkv * self.n * self.D * 2
        return round(1.3 * cache) + 2 * 2**30 + 64 * self.B * self.n


def case(heads: tuple[int, int, int], n: int, B: int = 1, Lq: int = 1, **more: Any) -> Case:
    """Return the case of these sizes, which are its name."""
    sizes = ((K * K, "M"), (K, "K"), (1, ""))
    short = next(f"{n // size}{letter}" for size, letter in sizes if n % size == 0)
    kind, chunk = ("prefill", f" Lq {Lq}") if Lq > 1 else ("decode", "")
    name = f"{kind} {'/'.join(map(str, heads))} n {short} B {B}{chunk}"
    return Case(name, *heads, n, B=B, Lq=Lq, **more)


def cases(*, quick: bool = False, dry: bool = False) -> list[Case]:
    """Return all cases, the least important last; those with targets alone, if quick."""
    found = [
        case(MAIN, 128 * K, is_headline=True, planned=PlannedSteps()),
        case(MAIN, K * K, is_headline=True, planned=PlannedSteps(short=32 * K)),
        *(case(MAIN, n, Lq=CHUNK, is_headline=True) for n in (128 * K, K * K)),
    ]
    if not quick:
        lengths = (128 * K, K * K, 512 * K, 32 * K)
        found += [
            case(MAIN, 32 * K, planned=PlannedSteps()),
            case(MAIN, 128 * K, 8, planned=PlannedSteps()),
            case(MAIN, 512 * K),
            case(MAIN, 512 * K, Lq=CHUNK),
            *(case(heads, n) for heads in GEOMETRIES[1:] for n in lengths),
            *(case(heads, n, B) for B in (8, 32) for heads in GEOMETRIES for n in lengths),
        ]
    once: dict[str, Case] = {}
    for one in found:
        once.setdefault(one.name, one)
    return [_shrunk(one) for one in once.values()] if dry else list(once.values())


def _shrunk(c: Case) -> Case:
    """Return a dry run's case, about 1024 times shorter."""
    config, planned = replace(c.config, k=64, n_sink=8, n_local=32), c.planned
    if planned is not None:
        short = planned.short and 224 + planned.short // K
        planned = PlannedSteps(layers=2, max_reuse=10, short=short, checked=5)
    more = {"is_headline": c.is_headline, "config": config, "planned": planned}
    B, Lq = {1: 1, 8: 2, 32: 3}[c.B], min(c.Lq, 16)
    return case((c.Hq, c.Hkv, c.D), 224 + c.n // K, B, Lq, **more)


def seconds_for(case: Case, left: float, cases_left: int) -> float:
    """How long the timed rounds of a case may take, with so much time left for so many cases."""
    share = 0.35 * left / max(1, cases_left)
    return min(5.0, max(2.0, share)) if case.is_headline else min(2.5, max(0.4, share))


def fits(left: float, durations: Sequence[float]) -> bool:
    """Whether another case is begun: what cases have taken so far is what the next may take."""
    expected = 1.5 * statistics.median(durations) if durations else 10.0
    return left >= expected + 2.0
