"""Markdown tables, which line up in a terminal too."""

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any


def table(
    head: tuple[str, ...], rows: Iterable[tuple[str, ...]], is_padded: bool = False
) -> list[str]:
    """Return the lines of a Markdown table; padded, the columns line up in a terminal too."""
    lines = [head, ("---",) * len(head), *rows]
    widths = [max(map(len, column)) * is_padded for column in zip(*lines, strict=True)]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def of_columns(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[tuple[str, str]],
    unknown: str = "",
    is_padded: bool = False,
) -> list[str]:
    """Return a table of columns: a head, and the form that a row fills; `unknown` for a None."""

    def cell(form: str, row: Mapping[str, Any]) -> str:
        names = [name.partition("[")[0] for _, name, _, _ in Formatter().parse(form) if name]
        is_known = all(row.get(name) is not None for name in names)
        return form.format_map(row) if is_known else unknown

    lines = [tuple(cell(form, row) for _, form in columns) for row in rows]
    return table(tuple(head for head, _ in columns), lines, is_padded) if rows else []
