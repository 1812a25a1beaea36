"""Contenders, timed by turns; and what is made of the times."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.checks import NotEquivalent
from bench.dense import Truth
from bench.gpu.device import Captured, Device, Reading, Ready
from bench.gpu.page import MODES
from bench.gpu.steps import Steps

_NOTHING = Ready(lambda: None)
_SLOW = 5.0  # times the fastest dense one: such a baseline is timed a few times, not in a graph
_SLOW_ROUNDS = 3
_FLUSH = 0.4e-3  # seconds that go with every timed call, about


@dataclass
class Contender:
    """One thing to time.

    role   "whole" (fresh), "stage", "planned", "dense", "gathered", "topk" or "copy"; of bench.run
           "selection", "stage" or "dense"
    ready  what is run; a baseline has `make` in its place, which takes about `seconds`
    exact  what a baseline's result is held to
    steps  planned ones, whose calls are one run; times are divided by how many they are
    notes  what goes into the JSON as it is; "error" if it cannot be timed
    first  milliseconds of a second call, the first being warm-up
    """

    name: str
    role: str
    ready: Ready = _NOTHING
    bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Ready] | None = None
    seconds: float = 0.0
    exact: Truth | None = None
    steps: Steps | None = None
    first: float = math.inf
    is_slow: bool = False
    captured: Captured | None = None

    @property
    def is_ours(self) -> bool:
        return self.role in ("whole", "stage", "planned")

    @property
    def is_timed(self) -> bool:
        return "error" not in self.notes

    def timed(self, clock: Callable[[Any], Reading], run: Any) -> Reading:
        """Return what a clock reads of a run, without what goes around it."""
        with self.ready.around():
            return clock(run)


def set_slow_apart(contenders: Sequence[Contender]) -> None:
    """Set which dense attentions are too slow for graphs and for many rounds."""
    dense = [one for one in contenders if one.role == "dense" and one.is_timed]
    fastest = min((one.first for one in dense if one.notes["is_baseline"]), default=math.inf)
    for one in dense:
        one.is_slow = one.first > _SLOW * fastest


def alternate(
    contenders: Sequence[Contender],
    mode: str,
    device: Device,
    seconds: float,
    rounds: tuple[int, int],
) -> dict[str, list[float]]:
    """Return milliseconds of a call of each, round by round, every other round in reverse order.

    rounds: at least, at most. Planned steps have to hit and miss in them as they are meant to.
    """
    able = [one for one in contenders
            if one.is_timed and (mode == "eager" or one.captured)]  # fmt: skip
    usual = [one for one in able if not one.is_slow]
    slow = [one for one in able if one.is_slow]
    planned = [one.steps for one in able if one.steps]
    for steps in planned:
        steps.reset_counts()
    a_round = sum(one.first / 1e3 + _FLUSH for one in usual)
    times: dict[str, list[float]] = {one.name: [] for one in able}
    for i in range(min(max(rounds[0], int(seconds / 2 / max(a_round, 1e-9))), rounds[1])):
        order = usual + slow if i < _SLOW_ROUNDS else usual
        readings = []
        for one in order if i % 2 == 0 else reversed(order):
            if mode == "eager":
                reading = one.timed(device.eager, one.ready.run)
            else:
                assert one.captured is not None
                reading = one.timed(device.queued, one.captured.replay)
            readings.append((one, reading))
        device.synchronize()
        for one, reading in readings:
            times[one.name].append(reading() / (one.steps.calls if one.steps else 1))
    for steps in planned:
        try:
            steps.check_counts()
        except NotEquivalent as error:
            raise NotEquivalent(f"{steps.name}, {mode}: {error}") from None
    return times


def spread(values: Sequence[float], unit: str = "") -> dict[str, float]:
    """Return the median, and the 10th and 90th percentile, linear between the ranks."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    median = statistics.median(values)
    return {f"median{unit}": median, f"p10{unit}": deciles[0], f"p90{unit}": deciles[-1]}


Times = dict[str, dict[str, list[float]]]  # by mode and name


def summary(one: Contender, times: Times) -> dict[str, Any]:
    """Return a contender's figures, in microseconds, as they go into the JSON."""
    report = {"name": one.name, "role": one.role, "bytes": one.bytes, **one.notes}
    if one.is_slow:
        report["slow"] = f"more than {_SLOW:g} times as slow as the fastest: no graph"
    for mode in MODES:
        took = [1e3 * t for t in times[mode].get(one.name, ())]
        if took:
            report[mode] = spread(took, "_us") | {"rounds": len(took)}
            if one.bytes is not None:
                report[mode]["gb_per_s"] = one.bytes / report[mode]["median_us"] / 1e3
    return report


# What each of our figures is compared with: the fastest of that role that is right.
_AGAINST = {
    "fresh": ("dense",),
    "attend": ("dense", "gathered"),
    "select": ("topk",),
    **dict.fromkeys(("hit", "hit, one layer", "miss", "mixed"), ("dense",)),
    "short": ("planned",),
}


def ratios(contenders: Sequence[Contender], times: Times) -> list[dict[str, Any]]:
    """How many times as fast as its strongest baseline each of ours is, mode by mode.

    A ratio is of two times of one round; the spread is that of the rounds.
    """
    found = []
    for mode, took in times.items():
        for name, role in ((name, role) for name, roles in _AGAINST.items() for role in roles):
            right = [one.name for one in contenders if one.role == role
                     and one.notes.get("is_baseline") and took.get(one.name)]  # fmt: skip
            if right and took.get(name):
                strongest = min(right, key=lambda name: statistics.median(took[name]))
                pairs = zip(took[strongest], took[name], strict=False)
                speed_up = spread([theirs / mine for theirs, mine in pairs])
                found.append({"of": name, "mode": mode, "role": role, "to": strongest, **speed_up})
    return found


def copy_rate(device: Device, dry: bool) -> dict[str, float]:
    """GB/s, read and written together, of a copy on the device far larger than its caches."""
    size = 2**24 if dry else min(2**31, device.free_bytes() // 8)
    source = torch.ones(size // 4, device=device.at)
    run = partial(torch.empty_like(source).copy_, source)
    run()
    readings = [device.queued(run) for _ in range(10)]
    device.synchronize()
    rates = [2 * size / reading() / 1e6 for reading in readings]
    return spread(rates, "_gb_per_s") | {"bytes": 2 * size}


def clock_floor(device: Device) -> dict[str, float]:
    """Microseconds that a graph of the least work there is takes by the same clock."""
    captured = device.capture(partial(torch.zeros(1, device=device.at).add_, 1.0))
    readings = [device.queued(captured.replay) for _ in range(30)]
    device.synchronize()
    return spread([1e3 * reading() for reading in readings], "_us")
