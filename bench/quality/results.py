"""Run what is missing of the cases, keep each on disk when it is done, and collect a result."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from bench.machine import cpu
from bench.quality import ruler, texts
from bench.quality.figures import beside_window
from bench.quality.session import Case, Session
from bench.quality.tasks import Settings, Task
from tokenselect.errors import InvalidProblem

SCHEMA = 3
ROOT = Path(__file__).parents[2]
Planned = Sequence[tuple[str, Case]]


# --- the store: finished cases, one JSON line each, so that a run may be cut off ---


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every finished case of every cases*.jsonl in a folder, by its sha.

    A torn last line is dropped with a word about it. Raises InvalidProblem for any other line that
    is no case.
    """
    several = [_parsed(path)[0] for path in sorted(folder.glob("cases*.jsonl"))]
    return {record["sha"]: record for records in several for record in records}


def _parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the cases of a file, and how many of its bytes they are: a last line may be torn."""
    found: list[dict[str, Any]] = []
    lines, size = path.read_bytes().splitlines(keepends=True), 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or not {"sha", "ran"} <= record.keys():
                raise ValueError
        except (ValueError, AttributeError):
            if number == len(lines):
                print(f"→ {path}: the last line is torn; its case runs again", file=sys.stderr)
                break
            raise InvalidProblem(
                f"{path}, line {number}: {line[:60]!r}",
                "every line but the last is a finished case",
                "delete the line; its case is then run again",
            ) from None
        found.append(record)
        size += len(line)
    return found, size


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """Open a file to append to, for one process at a time, without a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidProblem(
                f"{path}, which another run is writing",
                "one run writes to a file at a time",
                "share the work: --part 1/2 and --part 2/2, or use another --out",
            ) from None
        file.truncate(_parsed(path)[1])
        yield file


def append(file: TextIO, record: Mapping[str, Any]) -> None:
    """Write one line, for good."""
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())


# --- running ---


def planned(settings: Settings, session: Session) -> list[tuple[str, Case]]:
    """Return every case of the settings, with the name of the task that asks for it."""
    session.check_selects()
    return [
        (n, case) for n, task in settings.tasks.items() for case in task.cases(settings, session)
    ]


def works(cases: Planned, i: int = 1, n: int = 1) -> list[list[Case]]:
    """Return the cases of each work, each once; of n parts that are alike, the i-th, from 1."""
    found: dict[str, dict[str, Case]] = {}
    for _, case in cases:
        found.setdefault(case.work, {}).setdefault(case.sha, case)
    every = [list(unique.values()) for unique in found.values()]
    if n == 1:
        return every
    return sorted(every, key=lambda work: -sum(case.seconds for case in work))[i - 1 :: n]


def run(cases: Planned, session: Session, out: Path, i: int, n: int) -> None:
    """Run the cases that `out` lacks, or those of part i of n, and append each when it is done."""
    path = out / ("cases.jsonl" if n == 1 else f"cases-{i}.jsonl")
    ran = conditions()
    with appending(path) as file:
        done = read(out)
        mine = works(cases, i, n)
        total = sum(map(len, mine))
        mine = [[case for case in work if case.sha not in done] for work in mine]
        kept = total - sum(map(len, mine))
        print(f"→ {total} cases, {kept} of them done before; {path}", flush=True)
        if any(work[0].task == "ruler" for work in mine if work):
            ruler.need_lm_eval()
        expected = sum(case.seconds for work in mine for case in work)
        try:
            with tqdm(total=round(expected, 1), disable=None, bar_format="{l_bar}{bar}| {elapsed}, "
                      "{remaining} left") as bar:  # fmt: skip
                for work in filter(None, mine):
                    start = time.perf_counter()
                    for case, value in Task.kinds[work[0].task].run(work, session):
                        took = time.perf_counter() - start
                        record = {"sha": case.sha, "task": case.task, "key": dict(case.key)}
                        record |= {"value": value, "seconds": round(took, 2), "ran": ran}
                        append(file, record)
                        kept += 1
                        said = {**case.label, **value}.items()
                        few = [f"{k}={v}" for k, v in said if isinstance(v, float | int | str)]
                        bar.update(case.seconds)
                        bar.write(f"{kept}/{total} {case.task}: {' '.join(few)} ({took:.1f} s)")
                        start = time.perf_counter()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{kept} of {total} cases are kept, the same command goes on"
            ) from None


def collect(
    settings: Settings, cases: Planned, session: Session, out: Path, command: str
) -> dict[str, Any]:
    """Return all that `out` has of these cases: what ran where, and the rows of each task.

    Raises InvalidProblem if it has none.
    """
    done = read(out)
    every = {case.sha for _, case in cases}
    used = every & done.keys()
    if not used:
        raise InvalidProblem(
            f"{out} has none of the {len(every)} cases of {settings.name}",
            "collect gathers what run has left there, of the same settings, model and threads",
            "run them first, or give the --out and the other options of that run",
        )
    if len(done) > len(used):
        print(f"→ {len(done) - len(used)} cases in {out} belong to other settings: left out")
    if len(every) > len(used):
        print(f"→ {len(every) - len(used)} cases are still missing")
    tasks = {}
    for name, task in settings.tasks.items():
        rows: Any = [
            {**case.label, **done[case.sha]["value"]}
            for of, case in cases
            if of == name and case.sha in used
        ]
        tasks[name] = {
            "task": task.kind,
            "settings": asdict(task),
            "summary": task.summary(rows),
            "rows": beside_window(rows) if task.kind == "sparse" else rows,
        }
    named = {name for task in settings.tasks.values() for name in task.variants}
    count = Counter(json.dumps(done[sha]["ran"], sort_keys=True) for sha in used)
    return {
        "schema": SCHEMA,
        "kind": "quality",
        "name": settings.name,
        "date": date.today().isoformat(),
        "command": command,
        "ran": [json.loads(ran) | {"cases": n} for ran, n in sorted(count.items())],
        "model": session.describe(),
        "settings": {
            "name": settings.name,
            "split": settings.split,
            "texts": settings.texts,
            "dtype": settings.dtype,
            "variants": {n: v for n, v in settings.variants.items() if n in named},
        },
        "texts": {name: texts.provenance(name) for name in settings.texts},
        "missing": len(every) - len(used),
        "seconds": round(sum(done[sha]["seconds"] for sha in used)),
        "entries": tasks,
    }


# --- provenance: what cases ran on and with ---


def conditions() -> dict[str, Any]:
    """Return those of this process; every case keeps them."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "numpy", "lm_eval"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            assert name == "lm_eval", name
    return {
        "date": date.today().isoformat(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _git("rev-parse", "--short=12", "HEAD")
        + _changed("tokenselect", "bench/quality"),
    }


def source_tree() -> str:
    """Return git's hash of the committed tokenselect/, with "+" if it was changed since."""
    return _git("rev-parse", "--short=12", "HEAD:tokenselect") + _changed("tokenselect")


def _changed(*folders: str) -> str:
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *folders)
    return "+" if changes not in ("", "unknown") else ""


def _git(*arguments: str) -> str:
    """Return what git says of this checkout; "unknown" where there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
