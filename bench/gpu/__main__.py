"""python -m bench.gpu: the checks, then the benchmark, in one command. See `make gpu`.

    python -m bench.gpu [--quick] [--dry-run] [--checks-only] [--seconds N]

Exit code 0: the checks passed and what the time allowed is measured. 1: a check did not pass, a
case was not equivalent or there is no GPU; no speed-up is reported.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import checks, page
from bench.gpu.cases import cases
from bench.gpu.measure import MODEL, Task
from bench.gpu.page import SCHEMA, Report, tree_of
from bench.machine import commit
from bench.page import RESULTS

FULL, QUICK, DRY = 480.0, 120.0, 60.0  # seconds in all
_FOR_CHECKS = 0.44  # of them, at most
_TO_END = 8.0  # kept back for the last writing
_FOR_MODEL = 25.0  # and for a whole model
SILENCE = 100.0  # seconds in which a process notes nothing before it is taken to hang
_STARTS = 6  # processes that measure, in all
_LATE = "was stopped: its time was over"
COMMAND = (sys.executable, "-m", "bench.gpu.measure")


def say(text: str) -> None:
    print(text, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="in 2 minutes: what has a target")
    parser.add_argument(
        "--dry-run", action="store_true", help="everything on the CPU, tiny; measures nothing"
    )
    parser.add_argument("--backend", help="triton; cpu in a dry run; or package.module:ATTRIBUTE")
    parser.add_argument("--seconds", type=float, help=f"in all ({FULL:g}; {QUICK:g} if quick)")
    parser.add_argument("--check-seconds", type=float, help=f"for the checks ({_FOR_CHECKS:.0%}%)")
    parser.add_argument("--checks-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--measure-anyway",
        action="store_true",
        help="also if a check does not pass, to find out why; no page takes such a result",
    )
    parser.add_argument("--out", type=Path, help=f"folder of the result ({RESULTS.name})")
    options = parser.parse_args(argv)
    usual = DRY if options.dry_run else QUICK if options.quick else FULL
    options.seconds = options.seconds or usual
    for_checks = 0.95 if options.checks_only else _FOR_CHECKS
    options.check_seconds = options.check_seconds or for_checks * options.seconds
    options.backend = options.backend or ("cpu" if options.dry_run else "triton")
    if options.out is None:  # what measures nothing does not belong among the results
        aside = options.dry_run or options.checks_only
        options.out = Path(tempfile.mkdtemp(prefix="gpu-run-")) if aside else RESULTS
    return options


def main(argv: Sequence[str] | None = None) -> int:
    begun, options = time.time(), arguments(argv)
    dry = options.dry_run
    if not dry:
        os.environ.pop("TRITON_INTERPRET", None)
    machine = facts(dry)
    if "error" in machine:
        say(
            f"✗ no NVIDIA GPU that the torch of {sys.executable} can use: {machine['error']}\n"
            "Name the Python whose torch sees it: make gpu PYTHON=...; without a GPU, "
            "make gpu ARGS=--dry-run goes through all but CUDA."
        )
        return 1
    say(" ".join(f"{name} {value};" for name, value in machine.items() if value is not None))
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "gpu",
        "dry_run": dry,
        "quick": options.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "backend": options.backend,
        "machine": machine,
        "source": {
            "commit": os.environ.get("TOKENSELECT_COMMIT") or commit(),
            "tree": tree_of(checks.ROOT / "tokenselect"),
        },
        **dict.fromkeys(("green", "finished"), False),
        **dict.fromkeys(("clock_floor", "model")),
        **{name: [] for name in ("checks", "copy", "cells", "wrong", "left_out")},
    }
    folders = [options.out, *([os.environ["OUT"]] if os.environ.get("OUT") else [])]
    report = Report(content, [Path(folder).absolute() for folder in folders])
    say(f"→ checks, {options.check_seconds:.0f} s at most")
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as name:
        wanted = checks.checks(options.backend, Path(name), dry=dry, quick=options.quick)
        content["checks"] = checks.run(wanted, options.check_seconds, Path(name), say)
    content["green"] = green = checks.is_green(content["checks"])
    report.write()
    for check in content["checks"]:
        if "tail" in check:
            say(f"\n✗ {check['name']} {check['status']}: {check['detail']}")
            say("\n".join(f"    {line}" for line in check["tail"]))
    if not green:
        anyway = "Measured anyway: the figures are for finding out why."
        nothing = "Nothing is measured, no speed-up is reported."
        say(f"\n✗ CHECKS DID NOT PASS. {anyway if options.measure_anyway else nothing}")
    code = 0 if green else 1
    if not options.checks_only and (green or options.measure_anyway):
        code = _measured(report, options, begun + options.seconds)
    report.content["seconds"] = seconds = round(time.time() - begun, 1)
    for path in report.write():
        say(f"wrote {path}")
    say(f"{seconds:.0f} s in all")
    return code


def _measured(report: Report, options: argparse.Namespace, ends_at: float) -> int:
    """Measure, and say what was found; return the exit code."""
    which = {"dry": options.dry_run, "quick": options.quick}
    cases_end = ends_at - min(_TO_END + _FOR_MODEL, 0.3 * options.seconds)
    task = Task(options.backend, cases_end, list(map(str, report.folders)), **which)
    task.measure_anyway = options.measure_anyway
    say(f"→ measuring, {task.ends_at - time.time():.0f} s")
    supervise(task, report)
    wanted = [case.name for case in cases(**which)]
    if report.content["green"]:
        say(f"→ {MODEL}")
        ends_at = max(time.time() + _FOR_MODEL, ends_at - _TO_END)
        supervise(replace(task, ends_at=ends_at, model=True), report)
        wanted += [MODEL] if report.content["model"] is None else []
    for name in wanted:
        if name not in report.told:
            report.leave_out(name, "the run ended before it")
    content = report.content
    content["finished"] = True
    report.write()
    if content["wrong"]:
        say(f"✗ NOT EQUIVALENT in {len(content['wrong'])} case(s): no speed-up is reported.")
    if not content["green"]:
        return 1
    if not content["cells"]:
        say("✗ nothing was measured.")
        return 1
    several = content["cells"]
    for lines in (page.speed_ups(several), page.times(several), page.planned(several),
                  page.model(content["model"]), page.targets(content["targets"])):  # fmt: skip
        say("\n".join(["", *lines]))
    if options.dry_run:
        path = options.out / "page.md"
        path.write_text(page.device(content), encoding="utf-8")
        say(f"wrote {path}")
    return 0


# --- other processes ---


def facts(dry: bool) -> dict[str, Any]:
    """Return what the device is; "error" if it cannot be used."""
    command = checks.probe("facts", *(["--dry-run"] if dry else []))
    asked = checks.Check("facts", command, checks.by_json)
    with tempfile.TemporaryDirectory(prefix="gpu-facts-") as name:
        (found,) = checks.run([asked], 120.0, Path(name), lambda _: None)
    told = found["detail"]
    return dict(json.loads(told)) if found["status"] == "passed" else {"error": told}


def supervise(task: Task, report: Report) -> None:
    """Run the task in a process, and in others for what is left if that is lost.

    A kernel of a baseline may hang, or take the device's context with it. Such a baseline is left
    out of that case, by name, and the case tried again. A process that dies of anything else makes
    the case wrong.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-task-") as name:
        report.kept, now = Path(name) / "report.json", Path(name) / "now.json"
        report.write()
        for _ in range(_STARTS):
            page.put(now.with_name("task.json"), asdict(task))
            page.put(now, {})
            process = checks.start((*COMMAND, name), checks.INTERPRETED if task.dry else {}, None)
            try:
                why = _lost(process, now, task)
            finally:
                checks.stop(process, patience=0.5)
            report.content = json.loads(report.kept.read_text(encoding="utf-8"))
            at = json.loads(now.read_text(encoding="utf-8"))
            if not why or _blamed(why, at, task, report):
                break
        report.kept = None


def _lost(process: subprocess.Popen[Any], now: Path, task: Task) -> str:
    """Wait for a process to end; how it was lost, or "". now: the file that it keeps writing."""
    while process.poll() is None:
        if time.time() > task.ends_at + 3:
            return _LATE
        if time.time() - now.stat().st_mtime > SILENCE and not task.dry:  # an interpreter is slow
            return f"was stopped: nothing new for {SILENCE:.0f} s"
        time.sleep(0.2)
    return f"ended with exit code {process.returncode}" if process.returncode else ""


def _blamed(why: str, at: dict[str, str], task: Task, report: Report) -> bool:
    """Blame what a lost process was at; whether that was the last of the task."""
    case, what = at.get("cell"), at.get("baseline") or at.get("step")
    say(f"✗ {case or 'before a case'}, {what}: the process {why}")
    if case is not None and why == _LATE:
        report.leave_out(case, "no time was left to finish it")
    elif case is not None and "baseline" in at:
        task.banned.setdefault(case, []).append(at["baseline"])
    elif case is not None:
        report.refute(case, f"the process that measured it {why}, {what}")
    elif why != _LATE and not report.told:
        report.refute("before the first case", f"the process {why}")
        return True
    return why == _LATE


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # whatever the locale
    signal.signal(signal.SIGTERM, _as_interrupt)  # so that no child outlives a run that is stopped
    sys.exit(main())
