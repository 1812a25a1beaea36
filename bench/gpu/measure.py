"""One cell: inputs, equivalence, rivals, then times of both sides, alternating in one run."""

import importlib
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokenselect
from bench.dense import Truth
from bench.gpu import reuse, rivals, truth
from bench.gpu.device import Captured, Device, Reading, tensors
from bench.gpu.inputs import draw
from bench.gpu.plan import Cell, PlannedSteps, memory
from bench.gpu.report import MODES
from bench.gpu.rivals import Asked, Ready, Rival
from bench.run import NotEquivalent, bytes_read
from tokenselect import Problem
from tokenselect.dispatch.registry import load

_SLOW = 5.0  # times the fastest dense one: such a rival is timed a few times, and not in a graph
_SLOW_ROUNDS = 3
_FLUSH = 0.4e-3  # seconds that go with every timed call, about
DTYPE = torch.bfloat16


class Skipped(Exception):
    """The cell is not measured here, and nothing is wrong with that."""


class DeviceLost(Exception):
    """A rival left the device unusable for this process: a new one has to do without it."""


@dataclass
class Side:
    """One thing to time.

    role   "whole" (fresh), "stage", "planned", "dense", "gathered", "topk" or "copy"
    calls  so many calls are one run; times are divided by it
    kind   of a planned side: its steps, and what they have to give
    """

    name: str
    role: str
    ready: Ready
    bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    captured: Captured | None = None
    calls: int = 1
    kind: reuse.Kind | None = None

    @property
    def is_ours(self) -> bool:
        return self.role in ("whole", "stage", "planned")


@dataclass(frozen=True)
class Limits:
    """left: seconds that remain of the run. seconds and rounds: for timing this cell, both modes.

    banned: rivals that killed a process.
    """

    left: Callable[[], float]
    seconds: float
    rounds: tuple[int, int] = (5, 60)  # at least, at most
    banned: tuple[str, ...] = ()
    only_check: bool = False
    measure_anyway: bool = False


def measure(
    cell: Cell, device: Device, backend: str, limits: Limits, say: Callable[..., None]
) -> dict[str, Any]:
    """Check a cell and time it. Raises Skipped, or NotEquivalent if the backend is wrong."""
    needed, free = memory(cell), device.free_bytes()
    if needed > free:
        raise Skipped(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    say("step", text="drawing inputs")
    problem = draw(cell, device.at, DTYPE)
    say("step", text="checking equivalence")
    exact = truth.exact_of(problem)
    report = {**cell.facts(), "dtype": str(DTYPE).removeprefix("torch."), "config": {}}
    report["config"] = {name: problem.config[name] for name in ("k", "n_sink", "n_local")}
    try:
        found = truth.check(problem, backend, exact, device)
    except NotEquivalent as error:
        if not limits.measure_anyway:
            raise
        report["not_equivalent"] = str(error)
        found = _unchecked(problem, backend, exact)
    report |= {"checks": found.checks, "attended": found.gathered[0].shape[2]}
    if limits.only_check:
        return report | {"sides": [], "ratios": []}

    sides = ours(problem, backend, found)
    asked = Asked(problem.q, problem.k_cache, problem.v_cache, problem.scale)
    over = Asked(problem.q, *found.gathered, problem.scale)
    tried = partial(_try, device=device, say=say, limits=limits)
    reads = bytes_read(problem, "dense")
    for rival in rivals.dense(cell.Lq, cell.B):
        sides.append(tried(rival, asked, exact.dense, "dense", reads))
    for rival in rivals.over_gathered(cell.Lq):
        sides.append(tried(rival, over, found.exact, "gathered", None))
    sides.append(_topk(problem, found))
    sides.append(_copy(problem, asked))
    if cell.planned is not None:
        say("step", text="planning")
        try:
            of_plans, report["reuse"] = planned(problem, backend, cell.planned, found, device)
            sides += of_plans
        except NotEquivalent as error:
            if not limits.measure_anyway:
                raise
            report.setdefault("not_equivalent", str(error))

    say("step", text="warming up, capturing graphs")
    first = _warm_up(sides, device, say)
    _set_slow_apart(sides, first)
    truths = {"dense": exact.dense, "gathered": found.exact}
    for side in sides:
        if "error" not in side.notes and "slow" not in side.notes:
            _say_who(side, say)
            _capture(side, device, truths.get(side.role))
            if cell.planned is not None and side.kind is not None and side.captured is not None:
                exactly, replay = reuse.is_exact(backend, device.at), side.captured.replay
                reuse.hold(side.kind, replay, "replayed", cell.planned.checked, exact=exactly)
    say("step", text="timing")
    times = {mode: _counted(sides, mode, device, first, limits) for mode in MODES}
    report["sides"] = [summary(side, times) for side in sides]
    report["ratios"] = ratios(sides, times)
    return report


# --- our side ---


def ours(problem: Problem, backend: str, found: truth.Found) -> list[Side]:
    """The whole call and its stages. A reused selection is attend alone."""
    votes, selection = found.scores.votes, found.selection
    runs: dict[str, Callable[[], Any]] = {
        "fresh": partial(truth.attention, problem, backend),
        "score": partial(tokenselect.score, problem, backend),
        "select": partial(tokenselect.select, votes, problem, backend),
        "attend": partial(tokenselect.attend, problem, selection, backend),
    }
    sides = []
    for name, run in runs.items():
        role = "whole" if name == "fresh" else "stage"
        moved, by = bytes_of(problem, backend, name, found)
        sides.append(Side(name, role, Ready(run), moved, {"bytes_by": by}))
    return sides


def planned(
    problem: Problem, backend: str, how: PlannedSteps, found: truth.Found, device: Device
) -> tuple[list[Side], dict[str, Any]]:
    """Planned steps, each held to attention on the way. Where memory is short, a note instead."""
    exact = reuse.is_exact(backend, device.at)
    sides: list[Side] = []
    facts: dict[str, Any] = {}
    try:
        if load(backend).static is None:
            raise reuse.NoPlans(f"{backend} has no stages that a plan can run")
        layers = reuse.copies(problem, how.layers, device.free_bytes())
        facts = reuse.facts(how, layers)
        facts["share_of_budget"] = _planned_share(problem, backend, found)
        for kind in reuse.kinds(problem, backend, how, layers):
            reuse.hold(kind, kind.steps.run, "called", how.checked, exact=exact)
            sides.append(_planned_side(kind, problem, backend, found))
    except (torch.cuda.OutOfMemoryError, reuse.NoPlans) as error:
        sides.append(Side("planned", "planned", Ready(lambda: None)))
        sides[-1].notes["error"] = _told(error, ())
    return sides, facts


def _planned_side(kind: reuse.Kind, problem: Problem, backend: str, found: truth.Found) -> Side:
    steps = kind.steps
    side = Side(kind.name, "planned", Ready(steps.run, steps.next), calls=steps.calls, kind=kind)
    of = {"hit": "attend", "hit, one layer": "attend", "miss": "fresh"}.get(kind.name)
    if of is not None:
        side.bytes, side.notes["bytes_by"] = bytes_of(problem, backend, of, found)
    if kind.name == "short, own capacity":
        side.notes["is_baseline"] = True
    side.notes["calls"] = steps.calls
    return side


def _planned_share(problem: Problem, backend: str, found: truth.Found) -> float:
    """A planned fresh call against float64 on what was selected; raises NotEquivalent."""
    p = problem
    out = tokenselect.plan(p, backend)(p.q, p.k_cache, p.v_cache, p.cache_seqlens)
    share = found.exact.share(out)
    if not share <= 1:
        raise NotEquivalent(f"a plan is {share:.3g} x the error budget away from float64")
    return share


def bytes_of(problem: Problem, backend: str, what: str, found: truth.Found) -> tuple[int, str]:
    """Bytes that a stage moves by its own account, or has to read by the formula of bench.run."""
    parts = ("score", "select", "attend") if what == "fresh" else (what,)
    try:
        module = f"tokenselect.kernels.{backend}"
        own = [importlib.import_module(f"{module}.{part}").bytes_moved for part in parts]
        return sum(sum(count(problem).values()) for count in own), "moved, by the kernels"
    except (ImportError, AttributeError):
        return bytes_read(problem, what, found.selection), "read, by bench.run"


def _unchecked(problem: Problem, backend: str, exact: truth.Exact) -> truth.Found:
    """What a backend that is wrong made of a problem: only to be timed anyway."""
    scores = tokenselect.score(problem, backend)
    selection = truth.sorted_selection(scores.votes, problem)
    gathered = truth.gather(problem, selection)
    return truth.Found(scores, selection, exact.dense, gathered, {})


# --- the other side ---


def _try(
    rival: Rival,
    asked: Asked,
    exact: Truth,
    role: str,
    reads: int | None,
    *,
    device: Device,
    say: Callable[..., None],
    limits: Limits,
) -> Side:
    """Prepare a rival and hold it to the truth; what goes wrong is noted."""
    side = Side(rival.name, role, Ready(lambda: None), reads)
    if rival.name in limits.banned:
        side.notes["error"] = "it ended the process that tried it, or did not return"
        return side
    if rival.seconds_to_prepare and 2 * rival.seconds_to_prepare > limits.left():
        side.notes["error"] = "left out: no time to prepare it"
        return side
    say("rival", name=rival.name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            side.ready = rival.prepare(asked)
            with side.ready.around():
                share = exact.share(side.ready.run())
        except Exception as error:  # any rival may fail in any way: what it says is the result
            side.notes["error"] = _told(error, caught)
            _check_alive(device, error)
            return side
    side.notes |= {"share_of_budget": share, "is_baseline": share <= 1}
    return side


def _check_alive(device: Device, error: Exception) -> None:
    """Some errors of a kernel stay: everything after them fails, whoever runs it."""
    try:
        device.synchronize()
        device.release()
    except Exception:
        raise DeviceLost(str(error).split("\n")[0]) from error


def _say_who(side: Side, say: Callable[..., None]) -> None:
    """So that if the process dies, the parent knows of whom."""
    say("step" if side.is_ours else "rival", **{"text" if side.is_ours else "name": side.name})


def _told(error: Exception, caught: Sequence[warnings.WarningMessage]) -> str:
    """The error's first line, and the first lines of the warnings that came with it."""
    lines = [f"{type(error).__name__}: {error}".split("\n")[0]]
    lines += dict.fromkeys(str(warning.message).split("\n")[0] for warning in caught)
    return "; ".join(lines)[:400]


def _topk(problem: Problem, found: truth.Found) -> Side:
    """torch.topk of the candidates' votes, which finds as good ones, in no order."""
    sink_end, local_start = problem.config.regions(problem.Lk, problem.Lq)
    votes = found.scores.votes[:, 0, 0, sink_end:local_start]
    side = Side("torch.topk", "topk", rivals.top_k(votes, problem.config.k))
    best = side.ready.run().values.sort(dim=1).values
    mine = found.selection.positions[:, 0].long()
    chosen = (mine >= sink_end) & (mine < local_start)
    if not (chosen.sum(1) == best.shape[1]).all():
        side.notes["error"] = "another number of candidates than select has"
        return side
    places = mine[chosen].view(len(best), -1) - sink_end
    side.notes["is_baseline"] = torch.equal(votes.gather(1, places).sort(dim=1).values, best)
    return side


def _copy(problem: Problem, asked: Asked) -> Side:
    """A copy on the device that moves as many bytes as there are in the keys."""
    keys = asked.k.flatten()
    source = keys[: len(keys) // 2]
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Side("device copy", "copy", Ready(partial(target.copy_, source)), moved)


# --- times ---


def _timed(side: Side, clock: Callable[[Any], Reading], run: Any) -> Reading:
    with side.ready.around():
        return clock(run)


def _warm_up(sides: Sequence[Side], device: Device, say: Callable[..., None]) -> dict[str, float]:
    """Milliseconds of a second call of each, the first being warm-up."""
    first = {}
    for side in sides:
        if "error" in side.notes:
            continue
        _say_who(side, say)
        try:
            for _ in range(2):
                reading = _timed(side, device.eager, side.ready.run)
                device.synchronize()
            first[side.name] = reading()
        except Exception as error:
            if side.is_ours:
                raise
            side.notes["error"] = _told(error, ())
            _check_alive(device, error)
    return first


def _begin(side: Side) -> None:
    if side.kind is not None:
        side.kind.steps.begin()


def _set_slow_apart(sides: Sequence[Side], first: dict[str, float]) -> None:
    dense = [first[side.name] for side in sides if side.notes.get("is_baseline")
             and side.role == "dense" and side.name in first]  # fmt: skip
    fastest = min(dense, default=math.inf)
    for side in sides:
        if side.role == "dense" and first.get(side.name, 0.0) > _SLOW * fastest:
            side.notes["slow"] = f"more than {_SLOW:g} times as slow as the fastest: no graph"


def _capture(side: Side, device: Device, exact: Truth | None) -> None:
    """Capture a graph; hold its replay, into results filled with NaN before, to the eager result.

    Ours has to be bitwise the same. A rival is held to the truth again.
    """
    try:
        _begin(side)
        with side.ready.around():
            expected = [x.clone() for x in tensors(side.ready.run())]
            side.captured = device.capture(side.ready.run)
    except Exception as error:  # a call that cannot be captured is timed eagerly only
        side.captured = None
        side.notes["graph_error"] = _told(error, ())
        _check_alive(device, error)
        return
    for x in tensors(side.captured.result):
        x.fill_(math.nan if x.is_floating_point() else -7)
    _begin(side)
    with side.ready.around():
        side.captured.replay()
    device.synchronize()
    if side.is_ours and not truth.same(side.captured.result, expected):
        raise NotEquivalent(f"{side.name}: a replayed graph gives another result than the call")
    if exact is not None:
        share = exact.share(side.captured.result)
        if not share <= 1 and side.notes["is_baseline"]:
            side.captured = None
            side.notes["graph_error"] = f"replayed, {share:.3g} x the error budget away"


def _counted(
    sides: Sequence[Side], mode: str, device: Device, first: dict[str, float], limits: Limits
) -> dict[str, list[float]]:
    """`alternate`, after which planned steps have to have hit and missed as they are meant to."""
    several = {side.name: side.kind.steps for side in sides if side.kind is not None}
    for steps in several.values():
        steps.count_anew()
    times = alternate(sides, mode, device, first, limits)
    for name, steps in several.items():
        if times.get(name):
            try:
                steps.counted()
            except NotEquivalent as error:
                raise NotEquivalent(f"{name}, {mode}: {error}") from None
    return times


def alternate(
    sides: Sequence[Side], mode: str, device: Device, first: dict[str, float], limits: Limits
) -> dict[str, list[float]]:
    """Milliseconds of a call of each side, round by round, every other round in reverse order."""
    able = [side for side in sides if side.name in first and "error" not in side.notes]
    able = [side for side in able if side.captured is not None or mode == "eager"]
    slow = [side for side in able if "slow" in side.notes]
    times: dict[str, list[float]] = {side.name: [] for side in able}
    calls = {side.name: side.calls for side in able}
    usual = [side for side in able if "slow" not in side.notes]
    a_round = sum(first[side.name] / 1e3 + _FLUSH for side in usual)
    least, most = limits.rounds
    rounds = min(max(least, int(limits.seconds / 2 / max(a_round, 1e-9))), most)
    for i in range(rounds):
        order = usual + slow if i < _SLOW_ROUNDS else usual
        readings = {}
        for side in order if i % 2 == 0 else reversed(order):
            if mode == "graph":
                assert side.captured is not None
                readings[side.name] = _timed(side, device.queued, side.captured.replay)
            else:
                readings[side.name] = _timed(side, device.eager, side.ready.run)
        device.synchronize()
        for name, reading in readings.items():
            times[name].append(reading() / calls[name])
    return times


def spread(values: Sequence[float], unit: str = "") -> dict[str, float]:
    """Median, and the 10th and 90th percentile, linear between the ranks."""
    return {
        f"median{unit}": statistics.median(values),
        f"p10{unit}": percentile(values, 0.1),
        f"p90{unit}": percentile(values, 0.9),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Of the sorted values, that at `share` of the way from the first to the last."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(side: Side, times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """A side's figures, in microseconds, as they go into the JSON."""
    report = {"name": side.name, "role": side.role, "bytes": side.bytes, **side.notes}
    for mode in MODES:
        took = [1e3 * t for t in times[mode].get(side.name, ())]
        if took:
            report[mode] = spread(took, "_us") | {"rounds": len(took)}
            if side.bytes is not None:
                report[mode]["gb_per_s"] = side.bytes / report[mode]["median_us"] / 1e3
    return report


# What each of our figures is compared with: the fastest of that role that is right.
_AGAINST = {
    "fresh": ("dense",),
    "attend": ("dense", "gathered"),
    "select": ("topk",),
    **dict.fromkeys(("hit", "hit, one layer", "miss", "mixed"), ("dense",)),
    "short": ("planned",),
}


def ratios(sides: Sequence[Side], times: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """How many times as fast as its strongest rival each of ours is, mode by mode.

    A ratio is of two times of one round; the spread is that of the rounds.
    """
    found = []
    for mode in MODES:
        took = times[mode]
        for name, roles in _AGAINST.items():
            for role in roles:
                right = [side.name for side in sides if side.role == role
                         and side.notes.get("is_baseline") and took.get(side.name)]  # fmt: skip
                if not right or not took.get(name):
                    continue
                strongest = min(right, key=lambda rival: statistics.median(took[rival]))
                pairs = zip(took[strongest], took[name], strict=False)
                speed_up = spread([theirs / mine for theirs, mine in pairs])
                found.append({"of": name, "mode": mode, "role": role, "to": strongest, **speed_up})
    return found


def copy_rate(device: Device, dry: bool) -> dict[str, float]:
    """GB/s, read and written together, of a copy on the device far larger than its caches."""
    size = 2**24 if dry else min(2**31, device.free_bytes() // 8)
    source = torch.ones(size // 4, device=device.at)
    target: Tensor = torch.empty_like(source)
    run = partial(target.copy_, source)
    run()
    readings = [device.queued(run) for _ in range(10)]
    device.synchronize()
    rates = [2 * size / reading() / 1e6 for reading in readings]
    return spread(rates, "_gb_per_s") | {"bytes": 2 * size}


def clock_floor(device: Device) -> dict[str, float]:
    """Microseconds that a graph of the least work there is takes by the same clock."""
    one = torch.zeros(1, device=device.at)
    captured = device.capture(partial(one.add_, 1.0))
    readings = []
    for _ in range(30):
        readings.append(device.queued(captured.replay))
    device.synchronize()
    return spread([1e3 * reading() for reading in readings], "_us")
