"""Tasks of RULER, by way; `bench.quality.ruler` makes and scores them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.quality import texts
from bench.quality.figures import Row
from bench.quality.lab import Cell, Lab
from bench.quality.reading import unknown
from bench.quality.ways import Budget, resolve_all


@dataclass(frozen=True)
class Settings:
    """tasks: those of `bench.quality.ruler`, all if none is named; samples of each task and length;
    the seed is that one of the split's."""

    ways: tuple[str, ...]
    lengths: tuple[int, ...] = field(metadata={"least": 1024})
    samples: int = field(metadata={"least": 1})
    tasks: tuple[str, ...] = field(default=(), metadata={"may_be_empty": True})
    seed: int = field(default=0, metadata={"least": 0})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    from bench.quality import ruler

    seed = texts.seeds(plan.split, settings.seed + 1)[-1]
    for length in settings.lengths:
        ways = resolve_all(settings.ways, plan.ways, settings.budgets, length)
        for task in settings.tasks or ruler.TASKS:
            if task not in ruler.TASKS:
                raise unknown("task of RULER", task, ruler.TASKS)
            what = {"ruler": task, "length": length, "samples": settings.samples, "seed": seed}
            for way in ways:
                yield Cell(
                    task="ruler",
                    key=lab.key | what | {"way": way.key},
                    label={"ruler": task, "context": length}
                    | way.label
                    | {"kind": way.kind, "size": way.size},
                    work=f"ruler {what} {way.key}",
                    seconds=0.006 * length * settings.samples,
                    way=way,
                    given=what,
                )


def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    from bench.quality import ruler  # lm-eval is only needed here

    for cell in cells:
        what = cell.given
        task, length = what["ruler"], what["length"]
        with cell.way.attached(lab.model):
            found = ruler.run(
                lab.model, lab.tokenizer, [task], [length], what["samples"], what["seed"]
            )
        yield cell, found[task][str(length)]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Scores without those of each sample."""
    return [{name: v for name, v in row.items() if name != "scores"} for row in rows]
