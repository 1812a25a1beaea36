"""The checks that come before any figure, each in a process of its own, all at the same time.

A check has passed, failed, not finished in time, or been skipped. Skipped is said loudly and lets
the figures through; failed and not finished do not.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.gpu.worker import named

ROOT = Path(__file__).parents[2]
Status = Literal["passed", "failed", "unfinished", "skipped"]
INTERPRETED = {"TRITON_INTERPRET": "1"}  # kernels on the CPU, of a dry run
_ALONE = 8.0  # seconds; beside many that begin, compute-sanitizer gets no hold of its program
_TAIL = 40  # lines of a check's output that go into the report if it did not pass


class Verdict(NamedTuple):
    status: Status
    detail: str


class Done(NamedTuple):
    """How a process ended. code is None if its time was over."""

    code: int | None
    output: str
    folder: Path


@dataclass(frozen=True)
class Check:
    """command None: skipped, and why is in `detail`. after: seconds that those before it have."""

    name: str
    command: tuple[str, ...] | None
    judge: Callable[[Done], Verdict]
    detail: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    after: float = 0.0


# --- which checks ---


def checks(backend: str, folder: Path, *, dry: bool, quick: bool) -> list[Check]:
    """The checks of a backend; `folder` is for what they write."""
    tools = ("--backend", backend, *(("--dry-run",) if dry else ()))
    probe = (sys.executable, "-m", "bench.gpu.probe")
    sanitized = [_sanitized(tool, (*probe, "small", *tools), dry=dry, quick=quick)
                 for tool in _TOOLS]  # fmt: skip
    others = [
        *_rules(probe, backend, tools, shards(os.cpu_count() or 1, quick=quick)),
        Check("determinism", (*probe, "determinism", *tools), by_exit_code),
        *_graphs(probe, tools, quick=quick),
        _properties(backend, folder, dry=dry, quick=quick),
    ]
    if not dry and any(check.command for check in sanitized):
        others[0] = replace(others[0], after=_ALONE)
    found = [*sanitized, *others]
    more = INTERPRETED if dry else {}
    return [replace(check, environment=check.environment | more) for check in found]


def _rules(
    probe: tuple[str, ...], backend: str, tools: tuple[str, ...], parts: int
) -> Iterator[Check]:
    """tokenselect.check, whole or in parts that compile side by side."""
    name = "tokenselect.check"
    if parts == 1 and ":" not in backend:  # the command itself knows registered names only
        command = (sys.executable, "-m", "tokenselect.check", "--backend", backend)
        yield Check(name, command, by_exit_code)
        return
    for part in range(1, parts + 1):
        shown = f"{name}-{part}-of-{parts}" if parts > 1 else name
        command = (*probe, "rules", *tools, "--part", str(part), "--of", str(parts))
        yield Check(shown, command, by_exit_code)


def shards(cores: int, *, quick: bool) -> int:
    """Compiling is what takes the time on a GPU. The properties take most cores, if not quick."""
    return 1 if cores < 12 else 8 if quick else 2


def _graphs(probe: tuple[str, ...], tools: tuple[str, ...], *, quick: bool) -> Iterator[Check]:
    """Plans and CUDA graphs, in two parts where there are cores to compile side by side."""
    if quick or shards(os.cpu_count() or 1, quick=quick) == 1:
        more = ("--quick",) if quick else ()
        yield Check("graphs", (*probe, "graphs", *tools, *more), by_exit_code)
        return
    for part in ("1", "2"):
        command = (*probe, "graphs", *tools, "--part", part, "--of", "2")
        yield Check(f"graphs-{part}-of-2", command, by_exit_code)


def by_exit_code(done: Done) -> Verdict:
    lines = [line for line in done.output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no output"
    if done.code is None:
        return Verdict("unfinished", f"no end in the time it had; last: {last}")
    if done.code == 0:
        return Verdict("passed", last)
    return Verdict("failed", f"exit code {done.code}; last: {last}")


def _properties(backend: str, folder: Path, *, dry: bool, quick: bool) -> Check:
    name = "properties"
    if quick:
        return Check(name, None, by_exit_code, "left out by --quick")
    missing = [module for module in ("pytest", "hypothesis")
               if importlib.util.find_spec(module) is None]  # fmt: skip
    if missing:
        # Not skipped: the properties are what a figure rests on.
        command = (sys.executable, "-c", f"raise SystemExit('no {' and no '.join(missing)} here')")
        return Check(name, command, by_exit_code)
    # Those tests that hold the backend to something: its name is in theirs. Mistakes that are
    # planted try the laws, and the laws are the same on a CPU.
    registered = named(backend)
    wanted = f"{registered} and not mistake"
    options = [
        *("properties", f"--backend={backend}", "--hypothesis-profile=device"),
        *("-q", "--tb=short", "-p", "no:cacheprovider", "-o", "minversion=7.0"),
        # Of packages in versions that nobody has seen here; an error is an error all the same.
        *("-o", "filterwarnings=default", f"--junitxml={folder / 'properties.xml'}"),
        *("-k", f"{wanted} and test_law and select" if dry else wanted),
    ]
    workers = parallel_workers(os.cpu_count() or 1)
    if not dry and workers > 1 and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
        # It looks at what its own process has run. `by_junit` counts over all of them.
        options += [
            "--deselect",
            f"properties/test_laws.py::test_backend_was_really_tried[{registered}]",
        ]
    return Check(name, (sys.executable, "-m", "pytest", *options), by_junit)


def parallel_workers(cores: int) -> int:
    """The other checks take seven processes, most of which end soon."""
    return max(1, min(12, cores - 4))


def by_junit(done: Done) -> Verdict:
    """What pytest wrote of its tests, also if its time was over; and whether much was run."""
    verdict = by_exit_code(done)
    path = done.folder / "properties.xml"
    counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
    laws = dict(counts)
    failed = []
    if path.exists():
        with contextlib.suppress(ET.ParseError):
            for case in ET.parse(path).getroot().iter("testcase"):
                kinds = {child.tag for child in case}
                outcome = "failed" if kinds & {"failure", "error"} else "passed"
                outcome = "skipped" if "skipped" in kinds else outcome
                counts[outcome] += 1
                if case.get("name", "").startswith("test_law["):
                    laws[outcome] += 1
                if outcome == "failed":
                    failed.append(case.get("name", "?"))
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if failed:
        return Verdict("failed", f"{said}: {', '.join(failed[:8])}")
    if verdict.status == "passed" and laws["passed"] < max(1, laws["skipped"]):
        return Verdict("failed", f"{said}: the backend ran less than half of the laws")
    return Verdict(verdict.status, said if verdict.status == "passed" else verdict.detail)


def _sanitized(name: str, command: tuple[str, ...], *, dry: bool, quick: bool) -> Check:
    """compute-sanitizer over the small calls. A dry run makes them once, without the tool."""
    environment, judge = _TOOLS[name]
    if quick:
        return Check(name, None, by_exit_code, "left out by --quick")
    if dry:
        again = name != next(iter(_TOOLS))
        why = "a dry run has no compute-sanitizer, and makes the same calls in memcheck"
        return Check(name, None if again else command, by_exit_code, why if again else "")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Check(name, None, by_exit_code, "no compute-sanitizer on PATH")
    options = ("--tool", name, "--target-processes", "application-only")
    return Check(name, (tool, *options, *command), judge, environment=environment)


def by_sanitizer(done: Done) -> Verdict:
    """Errors that it found count, and a program that fails under it; not that it does not work."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", done.output)
    if found and int(found[1]):
        first = re.search(r"=+ (Invalid .*|Program hit .*)", done.output)
        return Verdict("failed", f"{found[1]} errors, the first: {first[1] if first else '?'}")
    if found and done.code == 0:
        return Verdict("passed", "0 errors")
    plain = by_exit_code(done)
    if found or "illegal memory access" in done.output:
        return Verdict("failed", f"the program itself: {plain.detail}")
    return Verdict("skipped", f"compute-sanitizer came to no result: {plain.detail}")


def by_racecheck(done: Done) -> Verdict:
    """Hazards that are errors count. What it calls warnings may be no hazard: they are told."""
    found = re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)", done.output)
    if found and int(found[1]):
        first = re.search(r"=+ (Error: .*)", done.output)
        return Verdict("failed", f"{found[1]} hazards, the first: {first[1] if first else '?'}")
    if found and done.code == 0:
        return Verdict("passed", f"0 errors, {found[2]} warnings")
    plain = by_exit_code(done)
    if found:
        return Verdict("failed", f"the program itself: {plain.detail}")
    return Verdict("skipped", f"compute-sanitizer came to no result: {plain.detail}")


# The tools of compute-sanitizer: the environment they need, and who judges what they say. The
# allocator's pools would hide a read past the end of a tensor.
_TOOLS: dict[str, tuple[dict[str, str], Callable[[Done], Verdict]]] = {
    "memcheck": ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, by_sanitizer),
    "racecheck": ({}, by_racecheck),
}


# --- running them ---


@dataclass
class _Running:
    check: Check
    process: subprocess.Popen[bytes]
    log: Path
    begun: float


def run(
    wanted: list[Check], seconds: float, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run all at once; those that have not ended in time are stopped. A report on each."""
    running, reports = [], []
    ends_at = time.monotonic() + seconds
    late: set[str] = set()
    try:
        for check in wanted:
            if check.command is None:
                reports.append(_report(check, Verdict("skipped", check.detail), 0.0, ""))
                say(f"  {check.name}: SKIPPED: {check.detail}")
                continue
            time.sleep(check.after)
            log = folder / f"gpu-{check.name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    check.command,
                    cwd=ROOT,
                    # The problems are small, and each core has a process already.
                    env=environment() | {"OMP_NUM_THREADS": "1"} | check.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            running.append(_Running(check, process, log, time.monotonic()))
            say(f"  {check.name}: begun")
        while running:
            if time.monotonic() > ends_at and not late:
                late = {one.check.name for one in running}
                stop([one.process for one in running])
            for one in list(running):
                code = one.process.poll()
                if code is None:
                    continue
                took = time.monotonic() - one.begun
                text = one.log.read_text(encoding="utf-8", errors="replace")
                done = Done(None if one.check.name in late else code, text, folder)
                verdict = one.check.judge(done)
                reports.append(_report(one.check, verdict, took, text))
                running.remove(one)
                say(f"  {one.check.name}: {verdict.status} in {took:.0f} s: {verdict.detail}")
            time.sleep(0.05)
    finally:
        stop([one.process for one in running], patience=0)
    return reports


def environment() -> dict[str, str]:
    """Of a child: the checkout on its path, its output as it comes."""
    changed = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if os.environ.get("PYTHONPATH"):
        changed["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return {**os.environ, **changed}


def stop(processes: Sequence[subprocess.Popen[Any]], patience: float = 8.0) -> None:
    """End processes and their children: asked at first, so that pytest writes what it has."""
    for how, wait in ((signal.SIGINT, patience), (signal.SIGKILL, 5.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        ends_at = time.monotonic() + wait
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, ends_at - time.monotonic()))


def _report(check: Check, verdict: Verdict, seconds: float, output: str) -> dict[str, Any]:
    report: dict[str, Any] = {
        "name": check.name,
        "status": verdict.status,
        "detail": verdict.detail,
        "seconds": round(seconds, 1),
        "command": " ".join(_shown(check.command)) if check.command else None,
    }
    if verdict.status in ("failed", "unfinished"):
        report["tail"] = output.splitlines()[-_TAIL:]
    return report


def _shown(command: tuple[str, ...]) -> list[str]:
    """Without this machine's paths."""
    return [Path(word).name if word.startswith("/") else re.sub(r"=/\S*/", "=", word)
            for word in command]  # fmt: skip


def is_green(reports: list[dict[str, Any]]) -> bool:
    return bool(reports) and all(report["status"] in ("passed", "skipped") for report in reports)
