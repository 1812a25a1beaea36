"""Settings, read from YAML, and the plan that they come to: every cell, in order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from bench.quality.lab import Cell, Lab
from bench.quality.reading import build, unknown
from bench.quality.tasks import decode, mass, needles, reuse, ruler, sparse, speed
from bench.quality.ways import STOCK
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers.options import NAMES

TASKS: dict[str, Any] = {
    "decode": decode,
    "sparse": sparse,
    "needles": needles,
    "mass": mass,
    "reuse": reuse,
    "speed": speed,
    "ruler": ruler,
}
FOLDER = Path(__file__).parent / "settings"


@dataclass(frozen=True)
class Entry:
    """One entry under `tasks`: its name, the task that runs it, and that task's settings."""

    name: str
    task: str
    settings: Any


@dataclass(frozen=True)
class Settings:
    """A whole file of settings.

    name   of the results
    split  "choose" or "report": which stretches of the texts and which seeds
    texts  kjv, pydoc, source, or paths of text files
    dtype  of the model's weights and of its cache
    ways   a name -> {attend: select (if absent), window or dense; preset; options of `enable`}
    tasks  a name -> {task: its kind (if absent, the name); that task's settings}
    """

    name: str
    split: Literal["choose", "report"]
    tasks: Mapping[str, Any]
    ways: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ("kjv", "pydoc", "source")
    dtype: Literal["float32", "bfloat16"] = "float32"


def load(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with changes "a.b=value" made to it; raises InvalidProblem."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = ", ".join(sorted(p.name for p in FOLDER.glob("*.yaml")))
        raise InvalidProblem(
            f"--settings {path}: {error.strerror}",
            "settings are a YAML file",
            f"write one, or use one of those in {FOLDER}: {shipped}",
        ) from None
    except yaml.YAMLError as error:
        raise InvalidProblem(f"{path}: {error}", "settings are YAML", "correct it") from None
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InvalidProblem(f"--set {change}", "it is NAME=VALUE", "write --set a.b=value")
        *parents, last = name.split(".")
        at = given
        for parent in parents:
            if not isinstance(at, dict) or parent not in at:
                raise unknown(f"--set {name}:", parent, at if isinstance(at, dict) else ())
            at = at[parent]
        at[last] = yaml.safe_load(value)
    return given


def read(given: object) -> Settings:
    """Check the settings but for what the model decides; raises InvalidProblem."""
    settings = build(Settings, given, "settings")
    for what in ("ways", "tasks"):
        for name, value in getattr(settings, what).items():
            if not isinstance(value, Mapping):
                raise InvalidProblem(
                    f"{what}.{name}: {value!r}", "it maps names to values", "write {name: value}"
                )
    for name, way in settings.ways.items():
        for option in way:
            if option not in {"attend", "preset", *NAMES}:
                raise unknown(f"ways.{name}:", option, {"attend", "preset", *NAMES})
    for entry in entries(settings):
        for way in entry.settings.ways:
            if way not in STOCK | dict(settings.ways):
                raise unknown(f"tasks.{entry.name}.ways:", way, STOCK | dict(settings.ways))
    return settings


def entries(settings: Settings, only: Iterable[str] = ()) -> list[Entry]:
    """The entries under `tasks`, or those named; raises InvalidProblem."""
    for name in only:
        if name not in settings.tasks:
            raise unknown("--only", name, settings.tasks)
    found = []
    for name, given in settings.tasks.items():
        task = given.get("task", name)
        if task not in TASKS:
            raise unknown(f"tasks.{name}: task", task, TASKS)
        own = {key: value for key, value in given.items() if key != "task"}
        parsed = build(TASKS[task].Settings, own, f"tasks.{name}")
        if name in only or not only:
            found.append(Entry(name, task, parsed))
    return found


def cells(settings: Settings, lab: Lab, only: Iterable[str] = ()) -> list[tuple[Entry, Cell]]:
    """Every cell of the settings, with the entry that asks for it."""
    return [
        (entry, cell)
        for entry in entries(settings, only)
        for cell in TASKS[entry.task].cells(entry.settings, settings, lab)
    ]


def part(works: Sequence[Sequence[Cell]], i: int, n: int) -> list[Sequence[Cell]]:
    """The i-th of n parts of the works, i from 1: each goes, longest first, to the least loaded.

    The same for everyone who asks, and together all works.
    """
    loads = [0.0] * n
    mine = set()
    seconds = [sum(cell.seconds for cell in work) for work in works]
    for w in sorted(range(len(works)), key=lambda w: (-seconds[w], w)):
        least = loads.index(min(loads))
        loads[least] += seconds[w]
        if least == i - 1:
            mine.add(w)
    return [work for w, work in enumerate(works) if w in mine]


def works(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells gathered by work, each once, in order of appearance."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault(cell.work, {}).setdefault(cell.sha, cell)
    return [list(unique.values()) for unique in found.values()]


def names() -> dict[str, list[str]]:
    """The settings' names of each task, for --help."""
    return {task: [f.name for f in fields(module.Settings)] for task, module in TASKS.items()}
