"""Tasks of RULER, by way; `bench.quality.ruler` makes and scores them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.quality import texts
from bench.quality.lab import Cell, Lab
from bench.quality.ways import Budget, resolve

TASKS = (
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe"),
)


@dataclass(frozen=True)
class Settings:
    """samples of each task and length; their seed belongs to the split."""

    ways: tuple[str, ...]
    lengths: tuple[int, ...] = field(metadata={"least": 500})
    samples: int = field(metadata={"least": 1})
    tasks: tuple[str, ...] = TASKS
    seed: int = field(default=0, metadata={"least": 0})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    seed = texts.seeds(plan.split, settings.seed + 1)[-1]
    for length in settings.lengths:
        ways = [
            resolve(name, plan.ways, budget, length)
            for name in settings.ways
            for budget in settings.budgets or (None,)
        ]
        unique = {str(way.key) + way.budget * (way.kind != "dense"): way for way in ways}
        for task in settings.tasks:
            what = {"ruler": task, "length": length, "samples": settings.samples, "seed": seed}
            for way in unique.values():
                yield Cell(
                    task="ruler",
                    key={"model": lab.fingerprint} | what | {"way": way.key},
                    label={"ruler": task, "context": length, "samples": settings.samples}
                    | way.label
                    | {"kind": way.kind, "size": way.size},
                    work=f"ruler {what} {way.key}",
                    seconds=0.006 * length * settings.samples,
                    way=way,
                    given=what,
                )


def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    from bench.quality import ruler

    for cell in cells:
        what = cell.given
        with cell.way.attached(lab.model):
            value = ruler.run(
                lab.model,
                lab.tokenizer,
                tasks=[what["ruler"]],
                lengths=[what["length"]],
                samples=what["samples"],
                seed=what["seed"],
            )
        yield cell, value
