"""Bars of progress."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress

from examples.demo.measure import Tick


@contextmanager
def stage(bars: Progress, title: str, total: int) -> Iterator[Tick]:
    """Show a bar of `total` ticks, full at the end of the block."""
    task = bars.add_task(title, total=total)
    yield lambda n: bars.advance(task, n)
    bars.update(task, completed=total)
