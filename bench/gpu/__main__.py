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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import checks, page
from bench.gpu.cases import cases
from bench.gpu.measure import Task
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
    if not options.dry_run:
        os.environ.pop("TRITON_INTERPRET", None)
    machine = facts(options.dry_run)
    if "error" in machine:
        say(
            f"✗ no NVIDIA GPU that the torch of {sys.executable} can use: {machine['error']}\n"
            "Name the Python whose torch sees it: make gpu PYTHON=...; without a GPU, "
            "make gpu ARGS=--dry-run goes through all but CUDA."
        )
        return 1
    say(" ".join(f"{name} {value};" for name, value in machine.items() if value is not None))
    command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    report = _empty(options, machine, command)
    content = report.content

    def ended(code: int) -> int:
        report.content["seconds"] = seconds = round(time.time() - begun, 1)
        for path in report.write():
            say(f"wrote {path}")
        say(f"{seconds:.0f} s in all")
        return code

    say(f"→ checks, {options.check_seconds:.0f} s at most")
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as name:
        settings: dict[str, bool] = {"dry": options.dry_run, "quick": options.quick}
        wanted = checks.checks(options.backend, Path(name), **settings)
        content["checks"] = checks.run(wanted, options.check_seconds, Path(name), say)
    content["green"] = checks.is_green(content["checks"])
    report.write()
    for check in content["checks"]:
        if "tail" in check:
            say(f"\n✗ {check['name']} {check['status']}: {check['detail']}")
            say("\n".join(f"    {line}" for line in check["tail"]))
    if not content["green"] and not options.measure_anyway:
        say("\n✗ CHECKS DID NOT PASS: nothing is measured, no speed-up is reported.")
        return ended(1)
    if not content["green"]:
        say("\n✗ CHECKS DID NOT PASS. Measured anyway: the figures are for finding out why.")
    if options.checks_only:
        return ended(0 if content["green"] else 1)

    ends_at = begun + options.seconds - min(_TO_END + _FOR_MODEL, 0.3 * options.seconds)
    say(f"→ measuring, {ends_at - time.time():.0f} s")
    with tempfile.TemporaryDirectory(prefix="gpu-task-") as name:
        folders = [str(folder.absolute()) for folder in report.folders]
        anyway = options.measure_anyway
        task = Task(options.backend, ends_at, folders, **settings, measure_anyway=anyway)
        supervise(task, report, Path(name))
    report.kept, content = None, report.content
    for case in cases(**settings):
        if case.name not in report.told:
            report.leave_out(case.name, "the run ended before it")
    if content["green"]:
        say("→ a whole model")
        content["model"] = found = whole_model(options, begun + options.seconds - time.time())
        if "wrong" in found:
            report.refute("a whole model", found["wrong"])
    content["finished"] = True
    report.write()
    return ended(_summed_up(content, options))


def _empty(options: argparse.Namespace, machine: dict[str, Any], command: str) -> Report:
    content = {
        "schema": SCHEMA,
        "kind": "gpu",
        "dry_run": options.dry_run,
        "quick": options.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "backend": options.backend,
        "machine": machine,
        "source": {
            "commit": os.environ.get("TOKENSELECT_COMMIT") or commit(),
            "tree": tree_of(checks.ROOT / "tokenselect"),
        },
        "green": False,
        "finished": False,
        "checks": [],
        "copy": [],
        "clock_floor": None,
        "cells": [],
        "wrong": [],
        "left_out": [],
        "model": None,
    }
    also = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    return Report(content, [options.out, *also])


def _summed_up(content: dict[str, Any], options: argparse.Namespace) -> int:
    """Say what was found; return the exit code."""
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
    command = [sys.executable, "-m", "bench.gpu.checks", "facts", *(["--dry-run"] if dry else [])]
    return _asked(command, {}, 120.0, wrong="error", late="error")


def whole_model(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return what `bench.gpu.model` reports: times, or "left_out", or "wrong"."""
    command = [sys.executable, "-m", "bench.gpu.model", "--backend", options.backend]
    command += ["--dry-run"] if options.dry_run else []
    more = checks.INTERPRETED if options.dry_run else {}
    return _asked(command, more, max(_FOR_MODEL, seconds - _TO_END), wrong="wrong", late="left_out")


def _asked(
    command: list[str], more: dict[str, str], limit: float, *, wrong: str, late: str
) -> dict[str, Any]:
    """Return the JSON of a process's last line; or, as `wrong` or `late`, how it ended."""
    env = checks.environment() | more
    settings: dict[str, Any] = {"cwd": checks.ROOT, "env": env, "timeout": limit}
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", **settings)
    except subprocess.TimeoutExpired:
        return {late: f"it did not end in {limit:.0f} s"}
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if said.startswith("{"):
        return dict(json.loads(said))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {wrong: f"its process ended with exit code {done.returncode}: {last}"}


def supervise(task: Task, report: Report, folder: Path) -> None:
    """Run the task in a process, and in others for what is left if that is lost.

    A kernel of a baseline may hang, or take the device's context with it. Such a baseline is left
    out of that case, by name, and the case tried again. A process that dies of anything else makes
    the case wrong.
    """
    report.kept = folder / "report.json"
    report.write()
    now = folder / "now.json"
    for _ in range(_STARTS):
        page.put(folder / "task.json", asdict(task))
        page.put(now, {})
        more = checks.INTERPRETED if task.dry else {}
        process = checks.start((*COMMAND, str(folder)), more, None)
        try:
            why = _lost(process, now, task)
        finally:
            checks.stop(process, patience=0.5)
        report.content = json.loads(report.kept.read_text(encoding="utf-8"))
        if not why:
            return
        at = json.loads(now.read_text(encoding="utf-8"))
        case, what = at.get("cell"), at.get("baseline") or at.get("step")
        say(f"✗ {case or 'before a case'}, {what}: the process {why}")
        if why == _LATE:
            if case is not None:
                report.leave_out(case, "no time was left to finish it")
            return
        if case is not None and "baseline" in at:
            task.banned.setdefault(case, []).append(what)
        elif case is not None:
            report.refute(case, f"the process that measured it {why}, {what}")
        elif not report.told:
            report.refute("before the first case", f"the process {why}")
            return


def _lost(process: subprocess.Popen[Any], now: Path, task: Task) -> str:
    """Wait for a process to end; how it was lost, or "". now: the file that it keeps writing."""
    while process.poll() is None:
        if time.time() > task.ends_at + 3:
            return _LATE
        if time.time() - now.stat().st_mtime > SILENCE and not task.dry:  # an interpreter is slow
            return f"was stopped: nothing new for {SILENCE:.0f} s"
        time.sleep(0.2)
    return f"ended with exit code {process.returncode}" if process.returncode else ""


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # whatever the locale
    signal.signal(signal.SIGTERM, _as_interrupt)  # so that no child outlives a run that is stopped
    sys.exit(main())
