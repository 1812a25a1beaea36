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
        content = path.read_bytes()
        for number, line in enumerate(content[: _whole(path, content)].splitlines(), 1):
            record = _cell(line)
            if record is None:
                raise InvalidProblem(
                    f"{path}, line {number}: {line[:60]!r}",
                    "every line but the last is a finished cell",
                    "delete the line; its cell is then run again",
                )
            found[record["sha"]] = record
    return found


def _cell(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"sha", "ran"} <= record.keys() else None


def _whole(path: Path, content: bytes) -> int:
    """How many bytes are whole lines: all but a last one that was cut off as it was written."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    if end and _cell(content[start:end]) is None:
        end = start
    if end < len(content):
        print(f"→ {path}: the last line is torn; its cell runs again", file=sys.stderr)
    return end


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A file to append to, held by one process at a time, without a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidProblem(
                f"{path}, which another run is writing",
                "one run writes to a file at a time",
                "share the work: --part 1/2 and --part 2/2, or use another --out",
            ) from None
        file.truncate(_whole(path, path.read_bytes()))
        yield file


def append(file: TextIO, record: dict[str, Any]) -> None:
    """Write one line, for good."""
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())
