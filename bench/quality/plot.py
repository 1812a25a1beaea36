"""Pictures of a result, one PNG for each of its tasks that has something to show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot

from bench.quality.figures import Row, grouped


class Curves(NamedTuple):
    """What is drawn of a kind of task: `ys` by `x`, a line for all rows that agree in `by`."""

    by: tuple[str, ...]
    x: str
    ys: tuple[str, ...]


_DOCUMENTS = Curves(("variant", "context"), "size", ("kl", "perplexity"))
_CURVES = {
    "decode": _DOCUMENTS,
    "sparse": _DOCUMENTS,
    "reuse": Curves(("variant", "budget", "context"), "theta", ("hit_rate", "kl", "perplexity")),
    "needles": Curves(("hidden", "variant", "budget", "context"), "depth", ("share",)),
    "mass": Curves(
        ("variant", "budget", "document"), "layer", ("mass", "least of a head", "overlap of steps")
    ),
    "speed": Curves(("name",), "context", ("median",)),
}


def points(entry: dict[str, Any]) -> list[Row]:
    """Return what is drawn of a task's rows: their summary; of mass, each row's layers."""
    rows: list[Row] = entry["summary"]
    if entry["task"] == "speed":
        return [{**row, **c} for row in rows for c in row.get("contenders", ())]
    if entry["task"] == "needles":
        return [{**r, "share": r["right"] / r["tries"]} for r in rows if r["depth"] is not None]
    if entry["task"] == "mass":
        of_layers = [
            {"layer": i, "overlap of steps": row["by_step"][i], "heads": heads, **row}
            for row in entry["rows"]
            for i, heads in enumerate(row["mass"])
            if None not in heads
        ]
        return [
            of | {"mass": sum(of["heads"]) / len(of["heads"]), "least of a head": min(of["heads"])}
            for of in of_layers
        ]
    return rows


def plot(result: Path, out: Path) -> list[Path]:
    """Draw every task of a result into a folder; return the files written."""
    report = json.loads(result.read_text(encoding="utf-8"))
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, entry in report["entries"].items():
        if entry["task"] in _CURVES and (rows := points(entry)):
            figure = drawn(rows, *_CURVES[entry["task"]])
            model = report["model"]["file"] or report["model"]["name"]
            figure.suptitle(f"{report['name']}: {name}; {model}")
            written.append(out / f"quality-{report['name']}-{name}.png")
            figure.savefig(written[-1], dpi=120)
            pyplot.close(figure)
    return written


def drawn(rows: Sequence[Row], by: Sequence[str], x: str, ys: Sequence[str]) -> Any:
    """Draw each y by x, side by side; a row without an x is a level, dotted."""
    size = (6 * len(ys), 5)
    figure, (axes,) = pyplot.subplots(1, len(ys), figsize=size, squeeze=False, layout="constrained")
    for axis, y in zip(axes, ys, strict=True):
        for of, group in grouped(rows, by):
            label, known = " ".join(map(str, of.values())), [r for r in group if r[y] is not None]
            curve = sorted((r[x], r[y]) for r in known if r[x] is not None)
            axis.plot([at for at, _ in curve], [value for _, value in curve], "o-", label=label)
            for row in known:
                if row[x] is None:
                    axis.axhline(row[y], color="gray", linestyle=":")
        axis.set(xlabel=x, ylabel=y)
    axes[0].legend(fontsize="small")
    return figure
