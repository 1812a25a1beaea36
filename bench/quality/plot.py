"""Pictures of a result, one PNG for each of its tasks that has something to show."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from bench.quality.figures import Row, grouped

_NAMES = {
    "kl": "KL from dense attention, nats",
    "hit_rate": "share of selections reused",
    "size": "tokens attended to",
    "context": "tokens cached",
    "median": "seconds per token",
}


def plot(result: Path, out: Path) -> list[Path]:
    """Draw every task of a result into a folder; return the files written."""
    report = json.loads(result.read_text(encoding="utf-8"))
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, entry in report["entries"].items():
        if entry["rows"] and entry["task"] in _DRAW:
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
    """Draw each y by x, a line for each of what rows say under `by`; dotted, those without an x."""
    groups = [(" ".join(map(str, of.values())), group) for of, group in grouped(rows, by)]
    figure, (axes,) = _axes(1, len(ys), 6, max(5, 1 + 0.3 * len(groups)))
    for axis, y in zip(axes, ys, strict=True):
        for label, group in groups:
            points = sorted((r[x], r[y]) for r in group if r[x] is not None)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
            for level in [r[y] for r in group if r[x] is None and r[y] is not None]:
                axis.axhline(level, color="gray", linestyle=":", label=label)
        axis.set(xlabel=_NAMES.get(x, x), ylabel=_NAMES.get(y, y))
    axes[-1].legend(fontsize="small")
    return figure


def _documents(entry: dict[str, Any]) -> Any:
    return _curves(entry["summary"], ("variant", "context"), "size", "kl", "perplexity")


def _reuse(entry: dict[str, Any]) -> Any:
    by = ("variant", "budget", "context")
    return _curves(entry["summary"], by, "theta", "hit_rate", "kl", "perplexity")


def _speed(entry: dict[str, Any]) -> Any:
    rows = [row | c for row in entry["summary"] for c in row.get("contenders", ())]
    return _curves(rows, ("name",), "context", "median")


def _image(axis: Any, values: Any, **labels: Any) -> None:
    """Draw numbers from 0 to 1 in colours; None and NaN stay white."""
    values = [[math.nan if x is None else x for x in row] for row in values]
    drawn = axis.imshow(values, vmin=0, vmax=1, aspect="auto")
    axis.set(**labels)
    axis.figure.colorbar(drawn, ax=axis)


def _needles(entry: dict[str, Any]) -> Any:
    """Draw the share of right answers by depth and length, for each variant and kind of text."""
    rows = [row for row in entry["summary"] if row["depth"] is not None]
    groups = grouped(rows, ("hidden", "variant", "budget"))
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("context", "depth"))
    figure, (axes,) = _axes(1, len(groups), 3, 3)
    for axis, (of, group) in zip(axes, groups, strict=True):
        share = {(r["depth"], r["context"]): r["right"] / r["tries"] for r in group}
        field = [[share.get((depth, length)) for length in lengths] for depth in depths]
        _image(axis, field, xlabel="tokens", ylabel="depth", title=" ".join(of.values()),
               xticks=range(len(lengths)), xticklabels=[f"{n:,}" for n in lengths],
               yticks=range(len(depths)), yticklabels=[f"{d:.0%}" for d in depths])  # fmt: skip
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
    **dict(reuse=_reuse, needles=_needles, mass=_mass, speed=_speed),
}
