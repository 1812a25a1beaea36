"""The process that measures: python -m bench.gpu.measure FOLDER

One case after the other: inputs, equivalence, baselines, then times of all contenders, alternating
in one run. The process may be killed, or die of a baseline's kernel: in the folder are its task,
the report, and what it does now, for another process to go on: see `bench.gpu.__main__`.
"""

import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenselect
from bench.checks import NotEquivalent, call
from bench.dense import Truth
from bench.gpu import baselines, steps, truth
from bench.gpu.baselines import Baseline, Inputs, Ready
from bench.gpu.cases import Case, cases, draw, fits, seconds_for
from bench.gpu.device import Device, device_for, same, tensors
from bench.gpu.page import MODES, Report, put
from bench.gpu.timing import (
    Contender,
    Limits,
    clock_floor,
    copy_rate,
    counted,
    ratios,
    summary,
    timed,
)
from bench.run import bytes_read
from tokenselect import Problem
from tokenselect.dispatch.registry import load, named

_SLOW = 5.0  # times the fastest dense one: such a baseline is timed a few times, not in a graph


class Skipped(Exception):
    """The case is not measured here, and nothing is wrong with that."""


class DeviceLost(Exception):
    """A baseline left the device unusable for this process: a new one has to do without it."""


def measure(
    case: Case, device: Device, backend: str, limits: Limits, note: Callable[..., None]
) -> dict[str, Any]:
    """Check a case and time it. Raises Skipped, or NotEquivalent if the backend is wrong."""
    needed, free = case.memory, device.free_bytes()
    if needed > free:
        raise Skipped(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    note(step="drawing inputs")
    problem = draw(case, device.at, torch.bfloat16)
    note(step="checking equivalence")
    several, exact = truth.exact_of(problem)
    report = {**case.facts(), "dtype": "bfloat16", "config": {}}
    report["config"] = {name: problem.config[name] for name in ("k", "n_sink", "n_local")}
    try:
        found = truth.check(problem, backend, several, exact)
    except NotEquivalent as error:
        if not limits.measure_anyway:
            raise
        report["not_equivalent"] = str(error)
        scores = tokenselect.score(problem, backend)
        selection = tokenselect.select(scores.votes, problem, "reference")
        found = truth.found_of(problem, scores, selection)
    device.synchronize()
    report |= {"checks": found.checks, "attended": found.gathered[0].shape[2]}
    if limits.only_check:
        return report | {"sides": [], "ratios": []}

    contenders = ours(problem, backend, found)
    inputs = Inputs(problem.q, problem.k_cache, problem.v_cache, problem.scale)
    over = Inputs(problem.q, *found.gathered, problem.scale)
    reads = bytes_read(problem, "dense")
    for baseline in baselines.dense(case.Lq, case.B):
        contenders.append(_try(baseline, inputs, exact, device, limits, note))
        contenders[-1].bytes = reads
    for baseline in baselines.over_gathered(case.Lq):
        contenders.append(_try(baseline, over, found.exact, device, limits, note, "gathered"))
    contenders += [_topk(problem, found), _copy(inputs)]
    if case.planned is not None:
        note(step="planning")
        try:
            contenders += planned(case, problem, backend, found, device, report)
        except NotEquivalent as error:
            if not limits.measure_anyway:
                raise
            report.setdefault("not_equivalent", str(error))

    note(step="warming up, capturing graphs")
    first = _warm_up(contenders, device, note)
    _set_slow_apart(contenders, first)
    truths = {"dense": exact, "gathered": found.exact}
    for one in contenders:
        if one.is_timed and "slow" not in one.notes:
            _note_who(one, note)
            _capture(one, device, truths.get(one.role))
            if case.planned and one.steps and one.captured:
                exactly = steps.is_exact(backend, device.at)
                run, checked = one.captured.replay, case.planned.checked
                one.steps.check(run, "replayed", checked, exact=exactly)
    note(step="timing")
    times = {mode: counted(contenders, mode, device, first, limits) for mode in MODES}
    report["sides"] = [summary(one, times) for one in contenders]
    report["ratios"] = ratios(contenders, times)
    return report


# --- the backend's ---


def ours(problem: Problem, backend: str, found: truth.Found) -> list[Contender]:
    """Return the whole call and its stages. A reused selection is attend alone."""
    runs: dict[str, Callable[[], Any]] = {
        "fresh": partial(call, problem, backend),
        "score": partial(tokenselect.score, problem, backend),
        "select": partial(tokenselect.select, found.scores.votes, problem, backend),
        "attend": partial(tokenselect.attend, problem, found.selection, backend),
    }
    contenders = []
    for name, run in runs.items():
        moved, by = bytes_of(problem, backend, name, found)
        role = "whole" if name == "fresh" else "stage"
        contenders.append(Contender(name, role, Ready(run), moved, {"bytes_by": by}))
    return contenders


def planned(
    case: Case,
    problem: Problem,
    backend: str,
    found: truth.Found,
    device: Device,
    report: dict[str, Any],
) -> list[Contender]:
    """Return planned steps, each checked against attention on the way.

    What a reader has to know of them goes into report["reuse"]. Where memory is short, or the
    backend has no plans, a note instead.
    """
    how, p, contenders = case.planned, problem, []
    assert how is not None
    report["reuse"] = {}
    if load(backend).static is None:
        return [_not_planned(f"{backend} has no stages that a plan can run")]
    try:
        layers = steps.copies(p, how.layers, device.free_bytes())
        out = tokenselect.plan(p, backend)(p.q, p.k_cache, p.v_cache, p.cache_seqlens)
        share = found.exact.share(out)
        if not share <= 1:
            raise NotEquivalent(f"a plan is {share:.3g} x the tolerance away from float64")
        report["reuse"] = {
            "layers": how.layers,
            "kv_copies": len({id(k) for k, _ in layers}),
            "max_reuse": how.max_reuse,
            "theta": steps.THETA,
            "group": steps.GROUP,
            "short": how.short,
            "share_of_budget": share,
        }
        for kind in steps.kinds(p, backend, how, layers):
            exact = steps.is_exact(backend, device.at)
            kind.check(kind.run, "called", how.checked, exact=exact)
            ready, notes = Ready(kind.run, kind.next), {"calls": kind.calls}
            one = Contender(kind.name, "planned", ready, None, notes, None, kind.calls, kind)
            of = {"hit": "attend", "hit, one layer": "attend", "miss": "fresh"}.get(kind.name)
            if of is not None:
                one.bytes, notes["bytes_by"] = bytes_of(p, backend, of, found)
            if kind.name == "short, own capacity":
                notes["is_baseline"] = True
            contenders.append(one)
    except torch.cuda.OutOfMemoryError as error:
        contenders.append(_not_planned(_told(error)))
    return contenders


def _not_planned(why: str) -> Contender:
    return Contender("planned", "planned", notes={"error": why})


def bytes_of(problem: Problem, backend: str, what: str, found: truth.Found) -> tuple[int, str]:
    """Return bytes that a stage moves by its own account, or has to read by bench.run's formula."""
    parts = ("score", "select", "attend") if what == "fresh" else (what,)
    try:
        module = f"tokenselect.kernels.{backend}"
        own = [importlib.import_module(f"{module}.{part}").bytes_moved for part in parts]
        return sum(sum(count(problem).values()) for count in own), "moved, by the kernels"
    except (ImportError, AttributeError):
        return bytes_read(problem, what, found.selection), "read, by bench.run"


# --- the others ---


def _try(
    baseline: Baseline,
    inputs: Inputs,
    exact: Truth,
    device: Device,
    limits: Limits,
    note: Callable[..., None],
    role: str = "dense",
) -> Contender:
    """Prepare a baseline and hold it to the truth; what goes wrong is noted."""
    one = Contender(baseline.name, role)
    if baseline.name in limits.banned:
        one.notes["error"] = "it ended the process that tried it, or did not return"
        return one
    if baseline.seconds_to_prepare and 2 * baseline.seconds_to_prepare > limits.left():
        one.notes["error"] = "left out: no time to prepare it"
        return one
    _note_who(one, note)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            one.ready = baseline.prepare(inputs)
            with one.ready.around():
                share = exact.share(one.ready.run())
        except Exception as error:  # it may fail in any way: what it says is the result
            one.notes["error"] = _told(error, caught)
            _check_alive(device, error)
            return one
    one.notes |= {"share_of_budget": share, "is_baseline": share <= 1}
    return one


def _check_alive(device: Device, error: Exception) -> None:
    """Some errors of a kernel stay: everything after them fails, whoever runs it."""
    try:
        device.synchronize()
        device.release()
    except Exception:
        raise DeviceLost(str(error).split("\n")[0]) from error


def _note_who(one: Contender, note: Callable[..., None]) -> None:
    """Note whom to blame if the process dies."""
    note(**{"step" if one.is_ours else "baseline": one.name})


def _told(error: Exception, caught: Sequence[warnings.WarningMessage] = ()) -> str:
    """The error's first line, and the first lines of the warnings that came with it."""
    lines = [f"{type(error).__name__}: {error}".split("\n")[0]]
    lines += dict.fromkeys(str(warning.message).split("\n")[0] for warning in caught)
    return "; ".join(lines)[:400]


def _topk(problem: Problem, found: truth.Found) -> Contender:
    """torch.topk of the candidates' votes, which finds as good ones, in no order."""
    sink_end, local_start = problem.config.regions(problem.Lk, problem.Lq)
    votes = found.scores.votes[:, 0, 0, sink_end:local_start]
    one = Contender("torch.topk", "topk", baselines.top_k(votes, problem.config.k))
    best = one.ready.run().values.sort(dim=1).values
    mine = found.selection.positions[:, 0].long()
    chosen = (mine >= sink_end) & (mine < local_start)
    if not (chosen.sum(1) == best.shape[1]).all():
        one.notes["error"] = "another number of candidates than select has"
        return one
    places = mine[chosen].view(len(best), -1) - sink_end
    one.notes["is_baseline"] = torch.equal(votes.gather(1, places).sort(dim=1).values, best)
    return one


def _copy(inputs: Inputs) -> Contender:
    """A copy on the device that moves as many bytes as there are in the keys."""
    keys = inputs.k.flatten()
    source = keys[: len(keys) // 2]
    moved = 2 * source.numel() * source.element_size()
    run = partial(torch.empty_like(source).copy_, source)
    return Contender("device copy", "copy", Ready(run), moved)


# --- before times ---


def _warm_up(
    contenders: Sequence[Contender], device: Device, note: Callable[..., None]
) -> dict[str, float]:
    """Return milliseconds of a second call of each, the first being warm-up."""
    first = {}
    for one in filter(lambda one: one.is_timed, contenders):
        _note_who(one, note)
        try:
            for _ in range(2):
                reading = timed(one, device.eager, one.ready.run)
                device.synchronize()
            first[one.name] = reading()
        except Exception as error:
            if one.is_ours:
                raise
            one.notes["error"] = _told(error)
            _check_alive(device, error)
    return first


def _set_slow_apart(contenders: Sequence[Contender], first: dict[str, float]) -> None:
    fastest = min((first[one.name] for one in contenders if one.role == "dense"
                   and one.notes.get("is_baseline") and one.name in first),
                  default=math.inf)  # fmt: skip
    for one in contenders:
        if one.role == "dense" and first.get(one.name, 0.0) > _SLOW * fastest:
            one.notes["slow"] = f"more than {_SLOW:g} times as slow as the fastest: no graph"


def _capture(one: Contender, device: Device, exact: Truth | None) -> None:
    """Capture a graph; hold its replay, into results filled with NaN before, to the eager result.

    Ours has to be bitwise the same. A baseline is held to the truth again.
    """
    begin = one.steps.begin if one.steps else lambda: None
    try:
        begin()
        with one.ready.around():
            expected = [x.clone() for x in tensors(one.ready.run())]
            one.captured = device.capture(one.ready.run)
    except Exception as error:  # a call that cannot be captured is timed eagerly only
        one.captured = None
        one.notes["graph_error"] = _told(error)
        _check_alive(device, error)
        return
    for x in tensors(one.captured.result):
        x.fill_(math.nan if x.is_floating_point() else -7)
    begin()
    with one.ready.around():
        one.captured.replay()
    device.synchronize()
    if one.is_ours and not same(one.captured.result, expected):
        raise NotEquivalent(f"{one.name}: a replayed graph gives another result than the call")
    if exact is not None:
        share = exact.share(one.captured.result)
        if not share <= 1 and one.notes["is_baseline"]:
            one.captured = None
            one.notes["graph_error"] = f"replayed, {share:.3g} x the tolerance away"


# --- the process ---


@dataclass
class Task:
    """What to measure, and where it is reported. banned: case name to baselines' names."""

    backend: str
    ends_at: float  # time.time()
    folders: list[str]
    dry: bool = False
    quick: bool = False
    measure_anyway: bool = False
    banned: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def work(task: Task, report: Report, note: Callable[..., None]) -> None:
    """Measure all cases of the task that the time allows and the report has nothing of."""
    device, backend = device_for(task.dry), named(task.backend)
    load(backend)
    todo = [case for case in cases(quick=task.quick, dry=task.dry) if case.name not in report.told]
    report.content["copy"].append(copy_rate(device, task.dry))
    report.content["clock_floor"] = clock_floor(device)
    durations: list[float] = []

    def left() -> float:
        return task.ends_at - time.time()

    for i, case in enumerate(todo):
        if not fits(left(), durations):
            for late in todo[i:]:
                report.leave_out(late.name, "no time was left")
            return
        print(f"→ {case.name}, {left():.0f} s left", flush=True)
        begun, note_here = time.time(), partial(note, cell=case.name)
        note_here()
        limits = Limits(
            left,
            0.05 if task.dry else seconds_for(case, left(), len(todo) - i),
            (2, 5) if task.dry else Limits.rounds,
            task.banned.get(case.name, ()),
            # Once the backend was wrong no time is reported: where else it is wrong still helps.
            only_check=bool(report.content["wrong"]) and not task.measure_anyway,
            measure_anyway=task.measure_anyway,
        )
        try:
            result = measure(case, device, backend, limits, note_here)
        except (Skipped, torch.cuda.OutOfMemoryError) as error:
            report.leave_out(case.name, str(error).split("\n")[0])
        except NotEquivalent as error:
            report.refute(case.name, str(error))
        else:
            durations.append(time.time() - begun)
            report.add(result | {"seconds": durations[-1]})
        note()
        device.release()


def main(name: str) -> None:
    """Run the task in a folder; the entry of the process."""
    folder = Path(name)
    task = Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))
    kept = folder / "report.json"
    content = json.loads(kept.read_text(encoding="utf-8"))
    report = Report(content, [Path(folder) for folder in task.folders], kept)
    work(task, report, lambda **what: put(folder / "now.json", what))


if __name__ == "__main__":
    main(sys.argv[1])
