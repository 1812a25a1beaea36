"""Pictures of a result, one PNG for each of its tasks that has something to show."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from bench.quality.figures import Row, grouped
from tokenselect.errors import InvalidProblem

_NAMES = {
    "kl": "KL from dense attention, nats",
    "perplexity": "perplexity",
    "hit_rate": "share of selections reused",
    "size": "tokens attended to",
    "theta": "theta",
    "context": "tokens cached",
    "median": "seconds per token",
}


def plot(result: Path, out: Path) -> list[Path]:
    """Draw every task of a result into a folder; return the files written."""
    try:
        report = json.loads(result.read_text(encoding="utf-8"))
        entries = {n: e for n, e in report["entries"].items() if e["rows"] and e["task"] in _DRAW}
    except (ValueError, TypeError, KeyError):
        entries = {}
    if not entries:
        raise InvalidProblem(
            f"{result}: no result of bench.quality, or nothing to draw",
            f"a result is the JSON that collect writes, and pictures are of {', '.join(_DRAW)}",
            "give such a file: OUT/quality-NAME.json, or one of bench/results",
        )
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, entry in entries.items():
        figure = _DRAW[entry["task"]](entry)
        model = report["model"]["file"] or report["model"]["name"]
        figure.suptitle(f"{report['name']}: {name}; {model}")
        written.append(out / f"quality-{report['name']}-{name}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    size = (width * columns, height * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _curves(rows: Sequence[Row], by: Sequence[str], x: str, *ys: str) -> Any:
    """Draw each y by x, a line for each of what rows say under `by`.

    Rows without an x are levels, dotted. Where each line is one point, draw a row for each, so that
    many can be told apart.
    """
    groups = [(" ".join(map(str, of.values())), group) for of, group in grouped(rows, by)]
    figure, (axes,) = _axes(1, len(ys), 6, max(5, 1 + 0.3 * len(groups)))
    for axis, y in zip(axes, ys, strict=True):
        lines = {
            label: sorted((r[x], r[y]) for r in group if r[x] is not None)
            for label, group in groups
        }
        is_single = all(len(points) < 2 for points in lines.values())
        for label, points in lines.items():
            for at, value in points if is_single else ():
                axis.plot(value, f"{label}, {at:,g}", "o", color="C0")
            if points and not is_single:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xlabel(_NAMES[y if is_single else x])
        axis.set_ylabel(_NAMES[x if is_single else y])
        for label, group in groups:
            for level in [r[y] for r in group if r[x] is None and r[y] is not None]:
                mark = axis.axvline if is_single else axis.axhline
                mark(level, color="gray", linestyle=":", label=label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return figure


def _documents(entry: dict[str, Any]) -> Any:
    by = ("variant", "context")
    return _curves(entry["summary"], by, "size", "kl", "perplexity")


def _reuse(entry: dict[str, Any]) -> Any:
    by = ("variant", "budget", "context")
    return _curves(entry["summary"], by, "theta", "hit_rate", "kl", "perplexity")


def _speed(entry: dict[str, Any]) -> Any:
    rows = [row | c for row in entry["summary"] for c in row.get("contenders", ())]
    return _curves(rows, ("name",), "context", "median")


def _image(axis: Any, values: Any, **labels: str) -> Any:
    """Draw numbers from 0 to 1 in colours; None and NaN stay white."""
    values = [[math.nan if x is None else x for x in row] for row in values]
    drawn = axis.imshow(values, vmin=0, vmax=1, aspect="auto")
    axis.set(**labels)
    axis.figure.colorbar(drawn, ax=axis)


def _needles(entry: dict[str, Any]) -> Any:
    """Draw the share of right answers by depth and length, for each variant and kind of text."""
    rows = [row for row in entry["summary"] if row["depth"] is not None]
    groups = grouped(rows, ("hidden", "variant", "budget"))
    lengths = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    n_kinds = len({of["hidden"] for of, _ in groups})
    figure, axes = _axes(n_kinds, math.ceil(len(groups) / n_kinds), 3, 3)
    for axis, (of, group) in zip(axes.flat, groups, strict=False):
        share = {(r["depth"], r["context"]): r["right"] / r["tries"] for r in group}
        field = [[share.get((depth, length)) for length in lengths] for depth in depths]
        _image(axis, field, xlabel="tokens", ylabel="depth", title=" ".join(of.values()))
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    return figure


def _mass(entry: dict[str, Any]) -> Any:
    """Draw retained mass by layer and head, and overlap of layers, of the first document's rows."""
    groups = grouped(entry["rows"], ("context", "variant", "budget"))
    figure, axes = _axes(len(groups), 2, 5.5, 5)
    for (left, right), (of, (row, *_)) in zip(axes, groups, strict=True):
        title = f"retained mass: {' '.join(map(str, of.values()))}, {row['document']}"
        _image(left, row["mass"], xlabel="query head", ylabel="layer", title=title)
        _image(right, row["by_layer"], xlabel="layer", ylabel="layer", title="overlap of votes")
    return figure


_DRAW: dict[str, Callable[[dict[str, Any]], Any]] = {
    **dict.fromkeys(("decode", "sparse"), _documents),
    "reuse": _reuse,
    "needles": _needles,
    "mass": _mass,
    "speed": _speed,
}
