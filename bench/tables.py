"""Markdown tables, which line up in a terminal too."""

from collections.abc import Iterable


def table(
    head: tuple[str, ...], rows: Iterable[tuple[str, ...]], is_padded: bool = False
) -> list[str]:
    """Return the lines of a Markdown table; padded, the columns line up in a terminal too."""
    lines = [head, ("---",) * len(head), *rows]
    widths = [max(map(len, column)) * is_padded for column in zip(*lines, strict=True)]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
