"""Finished cells on disk: one JSON line each, appended and synced, so that a run may be cut off."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tokenselect.errors import InvalidProblem


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every finished cell of every cells*.jsonl in a folder, by its sha.

    A torn last line is dropped with a word about it. Raises InvalidProblem for any other line that
    is no cell.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("cells*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                if number == len(lines):
                    raise ValueError("no end of line")
                record = json.loads(line)
                found[record["sha"]] = record
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines) - (lines[-1] == b""):
                    raise InvalidProblem(
                        f"{path}, line {number}: {error}",
                        "every line but the last is a finished cell",
                        "delete the line; its cell is then run again",
                    ) from None
                print(f"→ {path}: the last line is torn; its cell runs again", file=sys.stderr)
    return found


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A file to append to, held by one process at a time, without a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidProblem(
                f"{path}, which another run is writing",
                "one run writes to a file at a time",
                "share the work: --part 1/2 and --part 2/2, or use another --out",
            ) from None
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        last = content[content.rfind(b"\n", 0, max(whole - 1, 0)) + 1 : whole]
        try:
            json.loads(last or b"{}")
        except ValueError:
            whole -= len(last)
        file.truncate(whole)
        yield file


def append(file: TextIO, record: dict[str, Any]) -> None:
    """Write one line, for good."""
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())
