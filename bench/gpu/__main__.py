"""python -m bench.gpu: the checks, then the benchmark, in one command. See `make gpu`.

    python -m bench.gpu [--quick] [--dry-run] [--checks-only] [--seconds N]

Exit code 0: the checks passed and what the time allowed is measured. 1: a check did not pass, a
cell was not equivalent or there is no GPU; no speed-up is reported.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import gate, worker
from bench.gpu.page import device as device_section
from bench.gpu.parent import supervise
from bench.gpu.report import (
    SCHEMA,
    Report,
    best_copy_rate,
    cell_table,
    model_table,
    overview,
    reuse_table,
    target_table,
    tree_of,
)
from bench.gpu.worker import Task
from bench.page import RESULTS
from bench.run import _commit

FULL, QUICK, DRY = 480.0, 120.0, 60.0  # seconds in all
_FOR_CHECKS = 0.44  # of them, at most
_TO_END = 8.0  # kept back for the last writing
_FOR_MODEL = 25.0  # and for a whole model


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
    asked = parser.parse_args(argv)
    usual = DRY if asked.dry_run else QUICK if asked.quick else FULL
    asked.seconds = asked.seconds or usual
    for_checks = 0.95 if asked.checks_only else _FOR_CHECKS
    asked.check_seconds = asked.check_seconds or for_checks * asked.seconds
    asked.backend = asked.backend or ("cpu" if asked.dry_run else "triton")
    if asked.out is None:  # what measures nothing does not belong among the results
        aside = asked.dry_run or asked.checks_only
        asked.out = Path(tempfile.mkdtemp(prefix="gpu-run-")) if aside else RESULTS
    return asked


def main(
    argv: Sequence[str] | None = None,
    *,
    run_gate: Callable[..., list[dict[str, Any]]] = gate.run,
    measure: Callable[..., None] = supervise,
    model: Callable[[argparse.Namespace, float], dict[str, Any]] | None = None,
) -> int:
    begun, model = time.time(), model or whole_model
    asked = arguments(argv)
    if not asked.dry_run:
        os.environ.pop("TRITON_INTERPRET", None)
    machine = facts(asked.dry_run)
    if isinstance(machine, str):
        say(
            f"✗ no NVIDIA GPU that the torch of {sys.executable} can use: {machine}\n"
            "Name the Python whose torch sees it: make gpu PYTHON=...; without a GPU, "
            "make gpu ARGS=--dry-run goes through all but CUDA."
        )
        return 1
    say(" ".join(f"{name} {value};" for name, value in machine.items() if value is not None))
    command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    report = _empty(asked, machine, command)
    content = report.content

    say(f"→ checks, {asked.check_seconds:.0f} s at most")
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
        wanted = gate.checks(asked.backend, Path(folder), dry=asked.dry_run, quick=asked.quick)
        content["checks"] = run_gate(wanted, asked.check_seconds, Path(folder), say)
    content["green"] = gate.is_green(content["checks"])
    report.write()
    if not content["green"]:
        _say_red(content["checks"])
        if not asked.measure_anyway:
            say("\n✗ CHECKS DID NOT PASS: nothing is measured, no speed-up is reported.")
            return _ended(report, begun, 1)
        say("\n✗ CHECKS DID NOT PASS. Measured anyway: the figures are for finding out why.")
    if asked.checks_only:
        return _ended(report, begun, 0 if content["green"] else 1)

    ends_at = begun + asked.seconds - min(_TO_END + _FOR_MODEL, 0.3 * asked.seconds)
    task = Task(
        asked.backend, ends_at, asked.dry_run, asked.quick, measure_anyway=asked.measure_anyway
    )
    say(f"→ measuring, {ends_at - time.time():.0f} s")
    take = partial(_take, report)
    measure(task, take, say)
    told = {cell["name"] for cell in content["cells"]}
    told |= {cell["cell"] for cell in (*content["wrong"], *content["left_out"])}
    for cell in worker.cells(quick=asked.quick, dry=asked.dry_run):
        if cell.name not in told:
            take("left out", {"cell": cell.name, "why": "the run ended before it"})
    if content["green"]:
        say("→ a whole model")
        content["model"] = found = model(asked, begun + asked.seconds - time.time())
        if "wrong" in found:
            take("wrong", {"cell": "a whole model", "why": found["wrong"]})
    content["finished"] = True
    report.write()
    return _ended(report, begun, _summed_up(report, asked))


def _empty(asked: argparse.Namespace, machine: dict[str, Any], command: str) -> Report:
    content = {
        "schema": SCHEMA,
        "kind": "gpu",
        "dry_run": asked.dry_run,
        "quick": asked.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "backend": asked.backend,
        "machine": machine,
        "source": {
            "commit": os.environ.get("TOKENSELECT_COMMIT") or _commit(),
            "tree": tree_of(gate.ROOT / "tokenselect"),
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
    return Report(content, [asked.out, *also])


def _say_red(checks: list[dict[str, Any]]) -> None:
    for check in checks:
        if check["status"] in ("failed", "unfinished"):
            say(f"\n✗ {check['name']} {check['status']}: {check['detail']}")
            say("\n".join(f"    {line}" for line in check.get("tail", ())))


def _take(report: Report, event: str, what: dict[str, Any]) -> None:
    """Put what the worker found into the report, and on paper at once.

    Times are shown as they come. What is faster than what is shown at the end: a later cell may
    still turn the run red.
    """
    content = report.content
    if event == "copy":
        content["copy"].append(what["rate"])
        content["clock_floor"] = what["floor"]
        return
    if event == "cell":
        result = what["result"]
        content["cells"].append(result)
        if "not_equivalent" in result:
            content["wrong"].append({"cell": result["name"], "why": result["not_equivalent"]})
        if result["is_headline"] or "not_equivalent" in result:
            say(cell_table(result, best_copy_rate(content, result)))
        else:
            say(overview([result], ratios=False))
            if planned := reuse_table([result], ratios=False):
                say(planned)
    elif event == "wrong":
        content["wrong"].append({"cell": what["cell"], "why": what["why"]})
        say(f"✗ {what['cell']}: NOT EQUIVALENT: {what['why']}")
    else:
        content["left_out"].append({"cell": what["cell"], "why": what["why"]})
        say(f"  {what['cell']}: LEFT OUT: {what['why']}")
    if content["wrong"]:
        content["green"] = False
    report.write()


def _summed_up(report: Report, asked: argparse.Namespace) -> int:
    """Say what was found; the exit code."""
    content = report.content
    say("")
    if content["cells"]:
        say(overview(content["cells"], ratios=content["green"]))
        if planned := reuse_table(content["cells"], ratios=content["green"]):
            say(planned)
    if content["model"]:
        say(model_table(content["model"], ratios=content["green"]))
    if content["left_out"]:
        say(f"left out: {'; '.join(cell['cell'] for cell in content['left_out'])}")
    if content["wrong"]:
        say(f"✗ NOT EQUIVALENT in {len(content['wrong'])} cell(s): no speed-up is reported.")
    if not content["green"]:
        return 1
    if not content["cells"]:
        say("✗ nothing was measured.")
        return 1
    say(target_table(content["targets"]))
    if asked.dry_run:
        page = asked.out / "page.md"
        page.write_text(device_section(content), encoding="utf-8")
        say(f"wrote {page}")
    return 0


def facts(dry: bool) -> dict[str, Any] | str:
    """What the device is, asked in another process; or what that said instead."""
    command = [sys.executable, "-m", "bench.gpu.probe", "facts", *(["--dry-run"] if dry else [])]
    settings: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    try:
        done = subprocess.run(command, cwd=gate.ROOT, env=gate.environment(), **settings)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        if isinstance(error, subprocess.TimeoutExpired):
            return "asking for it took more than 2 minutes"
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def whole_model(asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What `bench.gpu.model` reports: sides, or why it was left out, or what is wrong."""
    command = [sys.executable, "-m", "bench.gpu.model", "--backend", asked.backend]
    command += ["--dry-run"] if asked.dry_run else []
    settings: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "cwd": gate.ROOT}
    settings["env"] = gate.environment() | (gate.INTERPRETED if asked.dry_run else {})
    limit = max(_FOR_MODEL, seconds - _TO_END)
    try:
        done = subprocess.run(command, timeout=limit, **settings)
    except subprocess.TimeoutExpired:
        return {"left_out": f"it did not end in {limit:.0f} s"}
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if said.startswith("{"):
        return dict(json.loads(said))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"wrong": f"the process that measured it ended with exit code {done.returncode}: {last}"}


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _ended(report: Report, begun: float, code: int) -> int:
    report.content["seconds"] = round(time.time() - begun, 1)
    for path in report.write():
        say(f"wrote {path}")
    say(f"{report.content['seconds']:.0f} s in all")
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # whatever the locale
    signal.signal(signal.SIGTERM, _as_interrupt)  # so that no child outlives a run that is stopped
    sys.exit(main())
