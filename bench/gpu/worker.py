"""The process that measures: cells one after the other, each told to the parent as it is done.

It may be killed, or die of a rival's kernel: the parent starts another for the cells that are left.
A line on stdout that begins with MARK is for the parent; any other is for people.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import Cpu, Cuda, Device
from bench.gpu.measure import (
    DeviceLost,
    Limits,
    Skipped,
    clock_floor,
    copy_rate,
    measure,
)
from bench.gpu.plan import cells, fits, seconds_for
from bench.run import NotEquivalent
from tokenselect import Backend, backends, register
from tokenselect.dispatch.registry import load

MARK = "@gpu@ "
LOST = 17  # the exit code of a process whose device was lost
Say = Callable[..., None]


@dataclass(frozen=True)
class Task:
    """What to measure. done: names of cells to leave out. banned: cell name to rivals' names."""

    backend: str
    ends_at: float  # time.time()
    dry: bool = False
    quick: bool = False
    measure_anyway: bool = False
    done: tuple[str, ...] = ()
    banned: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def named(backend: str) -> str:
    """The registered name of "name" or "package.module:ATTRIBUTE"."""
    if ":" not in backend:
        return backend
    from importlib import import_module

    module, _, attribute = backend.partition(":")
    value: Backend = getattr(import_module(module), attribute)
    if value.name not in backends():
        register(value.name, value)
    return value.name


def device_for(dry: bool) -> Device:
    if dry:
        torch.set_num_threads(1)
        return Cpu()
    return Cuda()


@torch.no_grad()
def work(task: Task, say: Say, device: Device | None = None) -> None:
    """Measure all cells of the task that the time allows.

    Says "start", "step", "rival", "cell", "skipped", "wrong" and "left out" as they come.
    """
    device = device or device_for(task.dry)
    backend = named(task.backend)
    load(backend)
    todo = [cell for cell in cells(quick=task.quick, dry=task.dry) if cell.name not in task.done]
    say("copy", rate=copy_rate(device, task.dry), floor=clock_floor(device))
    durations: list[float] = []
    wrong = False

    def left() -> float:
        return task.ends_at - time.time()

    for i, cell in enumerate(todo):
        if not fits(left(), durations):
            for late in todo[i:]:
                say("left out", cell=late.name, why="no time was left")
            return
        say("start", cell=cell.name)
        begun = time.time()
        limits = Limits(
            left,
            0.05 if task.dry else seconds_for(cell, left(), len(todo) - i),
            (2, 5) if task.dry else Limits.rounds,
            tuple(task.banned.get(cell.name, ())),
            # Once the backend was wrong no time is reported: where else it is wrong still helps.
            only_check=wrong and not task.measure_anyway,
            measure_anyway=task.measure_anyway,
        )
        try:
            result = measure(cell, device, backend, limits, say)
        except Skipped as skipped:
            say("skipped", cell=cell.name, why=str(skipped))
        except NotEquivalent as error:
            wrong = True
            say("wrong", cell=cell.name, why=str(error))
        except torch.cuda.OutOfMemoryError as error:
            say("skipped", cell=cell.name, why=str(error).split("\n")[0])
        else:
            seconds = time.time() - begun
            durations.append(seconds)
            wrong = wrong or "not_equivalent" in result
            say("cell", cell=cell.name, result=result | {"seconds": seconds})
        device.release()


def main(path: str) -> int:
    """Run the task in a file; the entry of the process."""
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))

    def say(event: str, **what: Any) -> None:
        print(MARK + json.dumps({"event": event, **what}), flush=True)

    try:
        work(task, say)
    except DeviceLost as error:
        say("lost", why=str(error))
        return LOST
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        say("died", why=f"{type(error).__name__}: {error}".split("\n")[0])
        return 1
    say("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
