"""Settings, read from YAML, and the plan that they come to: every cell, in order."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from bench.quality.lab import Cell, Lab
from bench.quality.reading import build, unknown
from bench.quality.tasks import decode, mass, needles, reuse, ruler, sparse, speed
from bench.quality.ways import KINDS, STOCK, resolve
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers.options import NAMES, PRESETS

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
# What a name has to be, since files are named after it.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidProblem(f"{path}: {error}", "settings are YAML", "correct it") from None
    if not isinstance(given, dict):
        raise InvalidProblem(
            f"{path}: {given!r}", "settings map names to values", "write them as key: value lines"
        )
    for change in changes:
        _make(change, given)
    return given


def _make(change: str, given: dict[str, Any]) -> None:
    """The change "a.b=value", made to what is given."""
    name, equals, text = change.partition("=")
    if not equals:
        raise InvalidProblem(f"--set {change}", "it is NAME=VALUE", "write --set a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidProblem(f"--set {change}", "a value is YAML", "close or quote it") from None
    *parents, last = name.split(".")
    at = given
    for parent in parents:
        if parent not in at:
            raise unknown(f"--set {name}:", parent, at)
        at = at[parent]
        if not isinstance(at, dict):
            raise InvalidProblem(
                f"--set {name}: {parent} is {at!r}",
                "a dot leads into what maps names to values",
                f"set {parent} as a whole",
            )
    at[last] = value


def read(given: object) -> Settings:
    """Check the settings but for what the model decides; raises InvalidProblem."""
    settings = build(Settings, given, "settings")
    for what, name in (("name", settings.name), *(("tasks", name) for name in settings.tasks)):
        if not _NAME.fullmatch(str(name)):
            raise InvalidProblem(
                f"settings.{what}: {name!r}",
                "files are named after it: letters, digits, dots, dashes and underscores, and no "
                "dot or dash first",
                "give such a name; --out says where files go",
            )
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
        resolve(name, settings.ways, None, 0)
    for entry in entries(settings):
        for way in entry.settings.ways:
            if way not in STOCK | dict(settings.ways):
                raise unknown(f"tasks.{entry.name}.ways:", way, STOCK | dict(settings.ways))
            if entry.settings.budgets and "k" in settings.ways.get(way, {}):
                raise InvalidProblem(
                    f"ways.{way}.k, and tasks.{entry.name}.budgets",
                    "a budget says how many are chosen by vote, in place of k",
                    "leave one of the two out; {k: 512} is a budget too",
                )
    return settings


def entries(settings: Settings, only: Iterable[str] = ()) -> list[Entry]:
    """The entries under `tasks`, or those named; raises InvalidProblem."""
    for name in only:
        if name not in settings.tasks:
            raise unknown("--only", name, settings.tasks)
    found = []
    for name, given in settings.tasks.items():
        task = given.get("task", name)
        if not isinstance(task, str) or task not in TASKS:
            raise unknown(f"tasks.{name}: task", task, TASKS)
        own = {key: value for key, value in given.items() if key != "task"}
        parsed = build(TASKS[task].Settings, own, f"tasks.{name}")
        if name in only or not only:
            found.append(Entry(name, task, parsed))
    return found


def cells(settings: Settings, lab: Lab, only: Iterable[str] = ()) -> list[tuple[Entry, Cell]]:
    """Every cell of the settings, with the entry that asks for it; raises InvalidProblem."""
    if not lab.selects:
        raise InvalidProblem(
            f"--model {lab.path}: every layer has a window of its own",
            "layers of full attention select, and here is none: every way would be the same",
            "use another --model",
        )
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


def reference() -> str:
    """What settings may say, for --help."""

    def listed(head: str, names: Iterable[str]) -> str:
        return textwrap.fill(
            f"{head:<12}{', '.join(names)}", 80, subsequent_indent=14 * " ", initial_indent="  "
        )

    shipped = [path.name for path in sorted(FOLDER.glob("*.yaml"))]
    return "\n".join(
        [
            f"settings, of which {FOLDER} has some:",
            listed("", shipped),
            "what a file of settings says:",
            listed("", (f.name for f in fields(Settings))),
            "what each of its ways says, or some of it; there are always dense and window:",
            listed("attend", KINDS),
            listed("preset", PRESETS),
            listed("options", NAMES),
            "what each of its tasks says:",
            *(listed(task, (f.name for f in fields(TASKS[task].Settings))) for task in TASKS),
            'CONTRIBUTING.md, under "Quality", says what they mean.',
        ]
    )
