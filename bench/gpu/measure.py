"""The process that measures: python -m bench.gpu.measure FOLDER

One case after the other: inputs, equivalence, baselines, then times of all contenders, alternating
in one run; or a whole model. The process may be killed, or die of a baseline's kernel: in the
folder are its task, the report, and what it does now, for another process to go on: see
`bench.gpu.__main__`.
"""

import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenselect
from bench.checks import Found, NotEquivalent, call, check, found_of
from bench.dense import Request, requests, truth
from bench.gpu import baselines, model, steps
from bench.gpu.cases import Case, cases, fits, seconds_for
from bench.gpu.device import Device, Ready, device_for, hold, nearness, tensors
from bench.gpu.page import MODES, Report, put
from bench.gpu.timing import (
    Contender,
    alternate,
    clock_floor,
    copy_rate,
    ratios,
    set_slow_apart,
    summary,
)
from bench.run import bytes_read
from bench.workloads import make
from tokenselect import Problem
from tokenselect.dispatch.registry import load, named

MODEL = "a whole model"


class Skipped(Exception):
    """The case is not measured here, and nothing is wrong with that."""


class DeviceLost(Exception):
    """A baseline left the device unusable for this process: a new one has to do without it."""


@dataclass
class Task:
    """What to measure, and where it is reported.

    banned  case name to baselines' names
    model   a whole model, in place of the cases
    """

    backend: str
    ends_at: float  # time.time()
    folders: list[str]
    dry: bool = False
    quick: bool = False
    measure_anyway: bool = False
    model: bool = False
    banned: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Session:
    """A process at its task. now: what it is at, which tells whom to blame if it dies."""

    task: Task
    device: Device
    now: Path | None = None
    cell: str | None = None

    def left(self) -> float:
        """Return the seconds that remain."""
        return self.task.ends_at - time.time()

    def note(self, **what: str) -> None:
        """Note what is begun. Without a case, nothing is."""
        if self.now is not None:
            put(self.now, {"cell": self.cell, **what} if self.cell else {})

    @contextmanager
    def trying(self, one: Contender, note: str = "error") -> Iterator[None]:
        """Note an error of a contender and go on, but for one of ours that cannot be timed."""
        self.note(**{"step" if one.is_ours else "baseline": one.name})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:  # it may fail in any way: what it says is the result
                if one.is_ours and note == "error":
                    raise
                one.notes[note] = told(error, caught)
                self.check_alive(error)

    def check_alive(self, error: Exception) -> None:
        """Some errors of a kernel stay: everything after them fails, whoever runs it."""
        try:
            self.device.synchronize()
            self.device.release()
        except Exception:
            raise DeviceLost(str(error).split("\n")[0]) from error

    # --- one case ---

    def measure(self, case: Case, seconds: float, only_check: bool = False) -> dict[str, Any]:
        """Check a case and time it in `seconds`, both modes. Raises Skipped or NotEquivalent."""
        needed, free = case.memory, self.device.free_bytes()
        if needed > free:
            raise Skipped(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        self.note(step="drawing inputs")
        problem, backend = make(case, device=self.device.at), self.task.backend
        self.note(step="checking equivalence")
        several = requests(problem)
        exact = truth(several)
        config = {name: problem.config[name] for name in ("k", "n_sink", "n_local")}
        report = {**case.facts(), "dtype": "bfloat16", "config": config}
        try:
            found = check(problem, backend, several, exact)
        except NotEquivalent as error:
            if not self.task.measure_anyway:
                raise
            report["not_equivalent"] = str(error)
            scores = tokenselect.score(problem, backend)
            selection = tokenselect.select(scores.votes, problem, "reference")
            found = found_of(problem, scores, selection, several)
        self.device.synchronize()
        report |= {"checks": found.checks, "attended": int(found.selection.count.max())}
        if only_check:
            return report | {"sides": [], "ratios": []}

        cache = Request(problem.q, problem.k_cache, problem.v_cache, problem.scale)
        k, v = (torch.stack(x) for x in zip(*((r.k, r.v) for r in found.gathered), strict=True))
        contenders = [
            *ours(problem, backend, found),
            *baselines.dense(cache, exact, bytes_read(problem, "dense")),
            *baselines.over_gathered(Request(problem.q, k, v, problem.scale), found.exact),
            baselines.top_k(problem, found),
            baselines.copy(problem.k_cache),
        ]
        for one in contenders:
            self.prepare(one)
        if case.planned is not None:
            self.note(step="planning")
            try:
                planned = self.planned(case, problem, found, report)
            except NotEquivalent as error:
                if not self.task.measure_anyway:
                    raise
                report.setdefault("not_equivalent", str(error))
                planned = []
            for one in planned:
                self.prepare(one)
            contenders += planned
        set_slow_apart(contenders)
        for one in contenders:
            if one.is_timed and not one.is_slow:
                self.capture(one)
                if case.planned and one.steps and one.captured:
                    near = nearness(backend, self.device.at)
                    one.steps.check(one.captured.replay, "replayed", case.planned.checked, near)
        self.note(step="timing")
        rounds = (2, 5) if self.task.dry else (5, 60)
        times = {mode: alternate(contenders, mode, self.device, seconds, rounds) for mode in MODES}
        report["sides"] = [summary(one, times) for one in contenders]
        report["ratios"] = ratios(contenders, times)
        return report

    def planned(
        self, case: Case, problem: Problem, found: Found, report: dict[str, Any]
    ) -> list[Contender]:
        """Return planned steps, each checked against attention on the way.

        What a reader has to know of them goes into report["reuse"]. Where memory is short, or the
        backend has no plans, a note instead.
        """
        how, p, backend, contenders = case.planned, problem, self.task.backend, []
        assert how is not None
        report["reuse"] = {}
        if load(backend).static is None:
            return [_not_planned(f"{backend} has no stages that a plan can run")]
        try:
            layers = steps.copies(p, how.layers, self.device.free_bytes())
            out = tokenselect.plan(p, backend)(p.q, p.k_cache, p.v_cache, p.cache_seqlens)
            share = found.exact.share(out)
            if not share <= 1:
                raise NotEquivalent(f"a plan is {share:.3g} x the tolerance away from float64")
            report["reuse"] = asdict(how) | {"theta": steps.THETA, "group": steps.GROUP}
            report["reuse"] |= {"kv_copies": len({id(k) for k, _ in layers})}
            report["reuse"] |= {"share_of_tolerance": share}
            for kind in steps.kinds(p, backend, how, layers):
                ready, notes = Ready(kind.run, kind.next), {"calls": kind.calls}
                one = Contender(kind.name, "planned", ready, notes=notes, steps=kind)
                of = {"hit": "attend", "hit, one layer": "attend", "miss": "fresh"}.get(kind.name)
                if of is not None:
                    one.bytes, notes["bytes_by"] = bytes_of(p, backend, of, found)
                if kind.name == "short, own capacity":
                    notes["is_baseline"] = True
                contenders.append(one)
        except torch.cuda.OutOfMemoryError as error:
            contenders.append(_not_planned(told(error)))
        return contenders

    def prepare(self, one: Contender) -> None:
        """Make a contender ready and warm it up; hold a baseline to the truth."""
        if one.name in self.task.banned.get(self.cell or "", ()):
            one.notes["error"] = "it ended the process that tried it, or did not return"
        elif one.seconds and 2 * one.seconds > self.left():
            one.notes["error"] = "left out: no time to prepare it"
        if not one.is_timed:
            return
        with self.trying(one):
            if one.make is not None:
                one.ready = one.make()
            if one.exact is not None:
                with one.ready.around():
                    share = one.exact.share(one.ready.run())
                one.notes |= {"share_of_tolerance": share, "is_baseline": share <= 1}
            for _ in range(2):
                reading = one.timed(self.device.eager, one.ready.run)
                self.device.synchronize()
            one.first = reading()

    def capture(self, one: Contender) -> None:
        """Capture a graph; hold its replay, into results filled with NaN before, to the call's.

        Ours has to be bitwise the same. A baseline is held to the truth again. A call that cannot
        be captured is timed eagerly only.
        """
        begin = one.steps.begin if one.steps else lambda: None
        with self.trying(one, "graph_error"):
            begin()
            with one.ready.around():
                expected = [x.clone() for x in tensors(one.ready.run())]
                one.captured = self.device.capture(one.ready.run)
        if one.captured is None:
            return
        for x in tensors(one.captured.result):
            x.fill_(math.nan if x.is_floating_point() else -7)
        begin()
        with one.ready.around():
            one.captured.replay()
        self.device.synchronize()
        if one.is_ours:
            hold(f"{one.name}: a replayed graph", one.captured.result, expected)
        if one.exact is not None:
            share = one.exact.share(one.captured.result)
            if not share <= 1 and one.notes["is_baseline"]:
                one.captured = None
                one.notes["graph_error"] = f"replayed, {share:.3g} x the tolerance away"

    # --- all of them ---

    def work(self, report: Report) -> None:
        """Measure what the time allows of the task and the report has nothing of."""
        several = cases(quick=self.task.quick, dry=self.task.dry)
        todo = [case for case in several if case.name not in report.told]
        report.content["copy"].append(copy_rate(self.device, self.task.dry))
        report.content["clock_floor"] = clock_floor(self.device)
        durations: list[float] = []
        for i, case in enumerate(todo):
            if not fits(self.left(), durations):
                for late in todo[i:]:
                    report.leave_out(late.name, "no time was left")
                return
            print(f"→ {case.name}, {self.left():.0f} s left", flush=True)
            begun, self.cell = time.time(), case.name
            self.note()
            seconds = 0.05 if self.task.dry else seconds_for(case, self.left(), len(todo) - i)
            # Once the backend was wrong no time is reported: where else it is wrong still helps.
            only_check = bool(report.content["wrong"]) and not self.task.measure_anyway
            try:
                result = self.measure(case, seconds, only_check)
            except (Skipped, torch.cuda.OutOfMemoryError) as error:
                report.leave_out(case.name, str(error).split("\n")[0])
            except NotEquivalent as error:
                report.refute(case.name, str(error))
            else:
                durations.append(time.time() - begun)
                report.add(result | {"seconds": durations[-1]})
            self.cell = None
            self.note()
            self.device.release()

    def work_on_model(self, report: Report) -> None:
        """Measure a whole model, if the report has nothing of it."""
        if MODEL in report.told:
            return
        self.cell = MODEL
        self.note(step="measuring it")
        try:
            report.content["model"] = model.measure(self.task.backend, self.device, self.task.dry)
            report.write()
        except NotEquivalent as error:
            report.refute(MODEL, str(error))


def ours(problem: Problem, backend: str, found: Found) -> Iterator[Contender]:
    """Yield the whole call and its stages. A reused selection is attend alone."""
    runs: dict[str, Callable[[], Any]] = {
        "fresh": partial(call, problem, backend),
        "score": partial(tokenselect.score, problem, backend),
        "select": partial(tokenselect.select, found.scores.votes, problem, backend),
        "attend": partial(tokenselect.attend, problem, found.selection, backend),
    }
    for name, run in runs.items():
        moved, by = bytes_of(problem, backend, name, found)
        role = "whole" if name == "fresh" else "stage"
        yield Contender(name, role, Ready(run), moved, {"bytes_by": by})


def _not_planned(why: str) -> Contender:
    return Contender("planned", "planned", notes={"error": why})


def bytes_of(problem: Problem, backend: str, what: str, found: Found) -> tuple[int, str]:
    """Return bytes that a stage moves by its own account, or has to read by bench.run's formula."""
    module = f"tokenselect.kernels.{backend}.{'step' if what == 'fresh' else what}"
    try:
        moved = importlib.import_module(module).bytes_moved(problem)
        return sum(moved.values()), "moved, by the kernels"
    except (ImportError, AttributeError):
        return bytes_read(problem, what, found.selection), "read, by bench.run"


def told(error: Exception, caught: Sequence[warnings.WarningMessage] = ()) -> str:
    """Return the error's first line, and the first lines of the warnings that came with it."""
    lines = [f"{type(error).__name__}: {error}".split("\n")[0]]
    lines += dict.fromkeys(str(warning.message).split("\n")[0] for warning in caught)
    return "; ".join(lines)[:400]


@torch.no_grad()
def run(task: Task, report: Report, now: Path | None = None) -> None:
    """Run a task in this process."""
    task.backend = named(task.backend)
    load(task.backend)
    session = Session(task, device_for(task.dry), now)
    (session.work_on_model if task.model else session.work)(report)


def main(name: str) -> None:
    """Run the task in a folder; the entry of the process."""
    folder = Path(name)
    task = Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))
    kept = folder / "report.json"
    content = json.loads(kept.read_text(encoding="utf-8"))
    report = Report(content, [Path(folder) for folder in task.folders], kept)
    run(task, report, folder / "now.json")


if __name__ == "__main__":
    main(sys.argv[1])
