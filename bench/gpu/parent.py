"""Watches over the worker: takes what it says, and starts another where one was lost.

A kernel of a rival may hang, or take the device's context with it. Such a rival is left out of
that cell, by name, and the cell tried again. A process that dies of anything else makes the cell
wrong.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.gpu.gate import INTERPRETED, ROOT, environment, stop
from bench.gpu.worker import MARK, Task

SILENCE = 100.0  # seconds in which a worker says nothing before it is taken to hang
_STARTS = 6  # workers in all
COMMAND = (sys.executable, "-m", "bench.gpu.worker")


@dataclass
class Watched:
    """Where the worker is, from what it has said."""

    cell: str | None = None
    rival: str | None = None
    text: str = ""
    done: list[str] = field(default_factory=list)
    banned: dict[str, list[str]] = field(default_factory=dict)
    ended: bool = False

    def take(self, event: str, what: dict[str, Any]) -> bool:
        """Note an event; whether it is one for the report."""
        if event in ("step", "rival"):
            self.rival, self.text = what.get("name"), what.get("text", "")
            return False
        if event == "start":
            self.cell, self.rival = what["cell"], None
            return False
        if event == "end":
            self.ended = True
            return False
        if event in ("cell", "wrong", "skipped", "left out"):
            self.done.append(what["cell"])
            self.cell = self.rival = None
        return event in ("copy", "cell", "wrong", "skipped", "left out")

    def lost(self, why: str) -> dict[str, Any] | None:
        """Blame someone for a worker that is gone: a rival is banned, or the cell is wrong."""
        if self.cell is None:
            return None
        if self.rival is not None:
            self.banned.setdefault(self.cell, []).append(self.rival)
            return None
        self.done.append(self.cell)
        at = f", {self.text}" if self.text else ""
        return {"cell": self.cell, "why": f"the process that measured it {why}{at}"}


def supervise(
    task: Task, take: Callable[[str, dict[str, Any]], None], say: Callable[[str], None]
) -> None:
    """Run the task in workers until all of it is done or its time is over."""
    watched = Watched()
    for _ in range(_STARTS):
        now = replace(task, done=tuple(watched.done), banned=watched.banned)
        why = _one(now, watched, take, say)
        if watched.ended:
            return
        blamed = f"{watched.rival}: " if watched.rival else ""
        say(f"✗ {watched.cell or 'the worker'}: {blamed}the process {why}")
        if why == _LATE:
            if watched.cell is not None:
                take("left out", {"cell": watched.cell, "why": "no time was left to finish it"})
            return
        if watched.cell is None and not watched.done:
            take("wrong", {"cell": "before the first cell", "why": f"the process {why}"})
            return
        wrong = watched.lost(why)
        if wrong is not None:
            take("wrong", wrong)
        watched.cell = watched.rival = None


_LATE = "was stopped: its time was over"


def _one(
    task: Task,
    watched: Watched,
    take: Callable[[str, dict[str, Any]], None],
    say: Callable[[str], None],
) -> str:
    """One worker, to its end; how it ended."""
    with tempfile.TemporaryDirectory(prefix="gpu-task-") as folder:
        path = Path(folder) / "task.json"
        path.write_text(task.to_json(), encoding="utf-8")
        process = subprocess.Popen(
            [*COMMAND, str(path)],
            cwd=ROOT,
            env=environment() | (INTERPRETED if task.dry else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        heard = time.time()
        try:
            while True:
                try:
                    line = lines.get(timeout=0.5)
                except queue.Empty:
                    if time.time() > task.ends_at + 3:
                        return _LATE
                    if time.time() - heard > SILENCE and not task.dry:  # an interpreter is slow
                        return f"was stopped: it said nothing for {SILENCE:.0f} s"
                    continue
                if line is None:
                    return f"ended with exit code {process.wait()}"
                heard = time.time()
                if not line.startswith(MARK):
                    say(f"    | {line.rstrip()}")
                    continue
                what = json.loads(line.removeprefix(MARK))
                event = what.pop("event")
                if event == "start":
                    say(f"→ {what['cell']}, {task.ends_at - time.time():.0f} s left")
                if watched.take(event, what):
                    take(event, what)
        finally:
            stop([process], patience=0.5)
            reader.join(5.0)


def _read(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
