"""Which shapes are measured, the important ones first; what fits into the time; their inputs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.workloads import (
    _N_TOPICS,
    _QUERY,
    _RECENT_KEY,
    _SINK_KEY,
    _SPAN,
    _TOPIC_KEY,
    PAPER_SIZES,
    _noise,
)
from tokenselect import Problem, SelectConfig

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
class Case:
    """One shape to measure. All requests of a batch have n tokens: dense attention's best case.

    planned  plans are measured in the same rounds
    """

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
    def kind(self) -> str:
        return "decode" if self.Lq == 1 else "prefill"

    @property
    def name(self) -> str:
        Lq = f" Lq {self.Lq}" if self.Lq > 1 else ""
        n = next((f"{self.n // size}{letter}" for size, letter in ((K * K, "M"), (K, "K"))
                  if self.n % size == 0), self.n)  # fmt: skip
        return f"{self.kind} {self.Hq}/{self.Hkv}/{self.D} n {n} B {self.B}{Lq}"

    def facts(self) -> dict[str, Any]:
        names = ("name", "kind", "Hq", "Hkv", "D", "n", "B", "Lq", "is_headline")
        return {name: getattr(self, name) for name in names}

    @property
    def memory(self) -> int:
        """Bytes that measuring takes: the cache in bfloat16, a copy of some of it, and the rest.

        The rest is the float64 truth, votes, results and graphs. A baseline that needs more is
        tried, and listed as out of memory if it is.
        """
        cache = 2 * self.B * self.Hkv * self.n * self.D * 2
        return round(1.3 * cache) + 2 * 2**30 + 64 * self.B * self.n


def cases(*, quick: bool = False, dry: bool = False) -> list[Case]:
    """Return all cases, the least important last; those with targets alone, if quick."""
    found = [
        Case(*MAIN, 128 * K, is_headline=True, planned=PlannedSteps()),
        Case(*MAIN, K * K, is_headline=True, planned=PlannedSteps(short=32 * K)),
        *(Case(*MAIN, n, Lq=CHUNK, is_headline=True) for n in (128 * K, K * K)),
    ]
    if not quick:
        lengths = (128 * K, K * K, 512 * K, 32 * K)
        found += [
            Case(*MAIN, 32 * K, planned=PlannedSteps()),
            Case(*MAIN, 128 * K, 8, planned=PlannedSteps()),
            Case(*MAIN, 512 * K),
            Case(*MAIN, 512 * K, Lq=CHUNK),
            *(Case(*heads, n) for heads in GEOMETRIES[1:] for n in lengths),
            *(Case(*heads, n, B) for B in (8, 32) for heads in GEOMETRIES for n in lengths),
        ]
    once: dict[str, Case] = {}
    for case in found:
        once.setdefault(case.name, case)
    return [_shrunk(case) for case in once.values()] if dry else list(once.values())


def _shrunk(case: Case) -> Case:
    """Return a dry run's case, about 1024 times shorter."""
    config = replace(case.config, k=64, n_sink=8, n_local=32)
    planned = case.planned
    if planned is not None:
        short = planned.short and 224 + planned.short // K
        planned = PlannedSteps(layers=2, max_reuse=10, short=short, checked=5)
    Lq, B = min(case.Lq, 16), {1: 1, 8: 2, 32: 3}[case.B]
    return replace(case, n=224 + case.n // K, B=B, Lq=Lq, config=config, planned=planned)


def seconds_for(case: Case, left: float, cases_left: int) -> float:
    """How long the timed rounds of a case may take, with so much time left for so many cases."""
    share = 0.35 * left / max(1, cases_left)
    return min(5.0, max(2.0, share)) if case.is_headline else min(2.5, max(0.4, share))


def fits(left: float, durations: Sequence[float]) -> bool:
    """Whether another case is begun: what cases have taken so far is what the next may take."""
    expected = 1.5 * statistics.median(durations) if durations else 10.0
    return left >= expected + 2.0


# --- inputs: the recipe of `bench.workloads.make` on the device, a head at a time ---


def draw(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Return the case's problem. `make` draws on the CPU: other numbers, of the same kind."""
    random = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        shape = (case.B, case.Hkv, case.n, case.D)
        k_cache, v_cache = (_noise(shape, dtype, random) for _ in range(2))
        q = torch.randn(case.B, case.Hq, case.Lq, case.D, generator=random) * _QUERY["noise"]
        normal = torch.randn(case.B, case.Hkv, case.D, case.D, generator=random)
        directions = torch.linalg.qr(normal).Q
        for b in range(case.B):
            for g, heads in enumerate(q[b].unflatten(0, (case.Hkv, -1))):
                _plant(heads, k_cache[b, g], v_cache[b, g], directions[b, g], random)
    return Problem.build(q.to(dtype), k_cache, v_cache, case.config)


def _plant(
    q: Tensor, keys: Tensor, values: Tensor, directions: Tensor, random: torch.Generator
) -> None:
    """Add one KV head's structure to q (G, Lq, D), keys and values (n, D), in place."""
    n, D = keys.shape
    sink, recent = directions[0], directions[1]
    topics, contents = directions[2:].split(_N_TOPICS)[:2]
    pairs = torch.rand(len(q), _N_TOPICS, generator=random).argsort(1)[:, :2]
    aims = _QUERY["sink"] * sink + _QUERY["recent"] * recent
    aims = aims + _QUERY["first topic"] * topics[pairs[:, 0]]
    aims = aims + _QUERY["second topic"] * topics[pairs[:, 1]]
    q += math.sqrt(D) * aims[:, None]

    n_spans = max(_N_TOPICS, n // (64 * _SPAN))
    starts = torch.randint(max(1, n - _SPAN), (n_spans,), generator=random)
    strength = _TOPIC_KEY * torch.arange(1, n_spans + 1) ** -0.25
    topic = torch.randint(_N_TOPICS, (n_spans,), generator=random)
    topic[:_N_TOPICS] = torch.arange(_N_TOPICS)
    rows = (starts[:, None] + torch.arange(_SPAN)).clamp(max=n - 1).flatten()
    add_rows(keys, rows, (strength[:, None] * topics[topic]).repeat_interleave(_SPAN, 0))
    add_rows(values, rows, 2 * math.sqrt(D) * contents[topic].repeat_interleave(_SPAN, 0))

    age = torch.arange(min(n, 512) - 1, -1, -1)
    add_rows(keys, n - 1 - age, _RECENT_KEY * torch.exp(-age / 128)[:, None] * recent)
    add_rows(keys, torch.arange(min(n, 4)), (_SINK_KEY * sink).expand(min(n, 4), D))
    values[:4] *= 0.1


def add_rows(x: Tensor, rows: Tensor, what: Tensor) -> None:
    """Add in float32, rounded once: x[rows] += what, also where a row comes twice."""
    where, which = rows.unique(return_inverse=True)
    sums = torch.zeros(len(where), x.shape[1]).index_add_(0, which, what)
    x[where] = (x[where].float() + sums).to(x.dtype)
