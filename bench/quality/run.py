"""Do what is missing of a plan, and gather what is there."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import bench.run
from bench.quality import plan, store, texts
from bench.quality.figures import beside_window
from bench.quality.lab import Cell, Lab
from bench.quality.plan import TASKS, Entry, Settings

SCHEMA = 1
ROOT = Path(__file__).parents[2]


def run(
    planned: Sequence[tuple[Entry, Cell]], lab: Lab, out: Path, part: tuple[int, int] | None = None
) -> int:
    """Run the cells that `out` lacks, or those of a part of them; how many were run."""
    works = plan.works(cell for _, cell in planned)
    name = "cells.jsonl" if part is None else f"cells-{part[0]}.jsonl"
    if part is not None:
        works = plan.part(works, *part)
    with store.appending(out / name) as file:
        done = store.read(out)
        missing = [[cell for cell in work if cell.sha not in done] for work in works]
        missing = [work for work in missing if work]
        total = sum(len(work) for work in works)
        count = sum(len(work) for work in missing)
        print(f"→ {total} cells, {total - count} of them done before; {out / name}", flush=True)
        ran = conditions()
        with Bar(missing) as bar:
            for work in missing:
                start = time.perf_counter()
                for cell, value in TASKS[work[0].task].run(work, lab):
                    took = time.perf_counter() - start
                    record = {"sha": cell.sha, "task": cell.task, "key": dict(cell.key)}
                    record |= {"value": value, "seconds": round(took, 2), "ran": ran}
                    store.append(file, record)
                    bar.did(cell, value, took)
                    start = time.perf_counter()
    return count


class Bar:
    """Progress in seconds of the plan, with the time left; a line a cell where no one watches."""

    def __init__(self, works: Sequence[Sequence[Cell]]) -> None:
        self.count, self.total = 0, sum(len(work) for work in works)
        self.is_watched = sys.stderr.isatty()
        self.bar = tqdm(
            total=round(sum(cell.seconds for work in works for cell in work), 1),
            disable=not self.is_watched,
            bar_format="{percentage:3.0f} % {bar} {elapsed}, {remaining} left{postfix}",
            smoothing=0.1,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def did(self, cell: Cell, value: Mapping[str, Any], took: float) -> None:
        self.count += 1
        label = ", ".join(f"{v}" for v in cell.label.values() if v not in (None, ""))
        said = {name: v for name, v in value.items() if isinstance(v, int | float | str)}
        if self.is_watched:
            self.bar.set_postfix_str(f"{self.count} of {self.total}: {cell.task} {label}"[:70])
            self.bar.update(cell.seconds)
            return
        figures = ", ".join(
            f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v!r}"
            for name, v in said.items()
        )
        print(
            f"{self.count}/{self.total} {cell.task}: {label}: {figures} ({took:.1f} s)", flush=True
        )


def collect(
    planned: Sequence[tuple[Entry, Cell]], settings: Settings, lab: Lab, out: Path, command: str
) -> dict[str, Any]:
    """Everything the plan has in `out`: what ran where, and the rows of each entry."""
    done = store.read(out)
    rows: dict[str, list[dict[str, Any]]] = {}
    missing, used = 0, set()
    for entry, cell in planned:
        if cell.sha in done:
            record = done[cell.sha]
            used.add(cell.sha)
            rows.setdefault(entry.name, []).append({**cell.label, **record["value"]})
        else:
            missing += 1
    others = len(done) - len(used)
    if others:
        print(f"→ {others} cells in {out} belong to other settings, and are left out")
    if missing:
        print(f"→ {missing} cells are still missing")
    return {
        "schema": SCHEMA,
        "kind": "quality",
        "name": settings.name,
        "date": date.today().isoformat(),
        "command": command,
        "ran": [json.loads(one) for one in sorted({json.dumps(done[sha]["ran"]) for sha in used})],
        "model": lab.describe(),
        "settings": asdict(settings),
        "texts": {name: texts.provenance(name) for name in settings.texts},
        "missing": missing,
        "seconds": round(sum(done[sha]["seconds"] for sha in used)),
        "entries": {
            entry.name: {
                "task": entry.task,
                "settings": asdict(entry.settings),
                "summary": TASKS[entry.task].summary(rows.get(entry.name, [])),
                "rows": beside_window(rows[entry.name])
                if entry.task == "sparse" and entry.name in rows
                else rows.get(entry.name, []),
            }
            for entry in dict.fromkeys(entry for entry, _ in planned)
        },
    }


def conditions() -> dict[str, Any]:
    """What cells ran on and with; each keeps it."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "date": date.today().isoformat(),
        "cpu": bench.run._cpu(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "commit": commit(),
    }


def commit() -> str:
    """The commit that runs, "+" if tokenselect/ or bench/ was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "tokenselect", "bench/quality")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
