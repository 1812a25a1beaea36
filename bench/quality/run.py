"""Do what is missing of a plan, and gather what is there."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from bench.quality import plan, provenance, ruler, store, texts
from bench.quality.figures import Row, beside_window
from bench.quality.lab import Cell, Lab
from bench.quality.plan import TASKS, Entry, Settings
from tokenselect.errors import InvalidProblem

SCHEMA = 2
# Of a label, what the rest of it says already.
_KNOWN = ("kind", "size", "within_trained")


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
        if any(work[0].task == "ruler" for work in missing):
            ruler.need_lm_eval()
        ran = provenance.conditions()
        with Bar(missing) as bar:
            try:
                _run(missing, lab, file, ran, bar)
            except KeyboardInterrupt:
                kept = total - count + bar.count
                raise KeyboardInterrupt(
                    f"{kept} of {total} cells are kept, the same command goes on"
                ) from None
    return count


def _run(works: Sequence[Sequence[Cell]], lab: Lab, file: TextIO, ran: Row, bar: "Bar") -> None:
    """Run these, and append each cell's value when it is there."""
    for work in works:
        start = time.perf_counter()
        for cell, value in TASKS[work[0].task].run(work, lab):
            took = time.perf_counter() - start
            record = {"sha": cell.sha, "task": cell.task, "key": dict(cell.key)}
            record |= {"value": value, "seconds": round(took, 2), "ran": ran}
            store.append(file, record)
            bar.did(cell, value, took)
            start = time.perf_counter()


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
        label = ", ".join(
            f"{name}={v}"
            for name, v in cell.label.items()
            if name not in _KNOWN and v not in (None, "")
        )
        if self.is_watched:
            self.bar.set_postfix_str(f"{self.count} of {self.total}: {cell.task} {label}"[:70])
            self.bar.update(cell.seconds)
            return
        figures = ", ".join(said(value))
        print(
            f"{self.count}/{self.total} {cell.task}: {label}: {figures} ({took:.1f} s)", flush=True
        )


def said(value: Mapping[str, Any]) -> list[str]:
    """The figures of a cell that fit into a line."""
    found = [
        f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v!r}"
        for name, v in value.items()
        if isinstance(v, int | float | str)
    ]
    sides = value.get("sides", ())
    return found + [f"{side['name']!r} {1e3 * side['median']:.1f} ms" for side in sides]


def collect(
    planned: Sequence[tuple[Entry, Cell]], settings: Settings, lab: Lab, out: Path, command: str
) -> dict[str, Any]:
    """Everything the plan has in `out`: what ran where, and the rows of each entry.

    Raises InvalidProblem if there is nothing of it.
    """
    done = store.read(out)
    rows: dict[str, list[dict[str, Any]]] = {}
    every = {cell.sha for _, cell in planned}
    used = every & done.keys()
    missing = len(every) - len(used)
    if not used:
        raise InvalidProblem(
            f"{out} has none of the {len(every)} cells of {settings.name}",
            "collect gathers what run has left there, of the same settings, model and threads",
            "run them first, or give the --out and the other options of that run",
        )
    for entry, cell in planned:
        if cell.sha in used:
            row = {**cell.label, **done[cell.sha]["value"]}
            rows.setdefault(entry.name, []).append(row)
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
        "ran": provenance.together([done[sha] for sha in used]),
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
