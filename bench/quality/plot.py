"""Pictures of a result: a PNG for each of its tasks whose figures change with something."""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from bench.quality.figures import grouped

# Of a kind of task: a line for all rows that agree in these, what they are drawn by, and what is.
_DOCUMENTS = (("variant", "context"), "size", ("kl", "perplexity"))
_CURVES = {
    "decode": _DOCUMENTS,
    "sparse": _DOCUMENTS,
    "reuse": (("variant", "budget", "context"), "theta", ("hit_rate", "kl", "perplexity")),
    "needles": (("hidden", "variant", "budget", "context"), "depth", ("right",)),
    "lossless": (("name",), "context", ("ms", "accepted")),
    "speed": (("name",), "context", ("median",)),
}


def plot(result: Path, out: Path) -> list[Path]:
    """Draw the tasks of a result into a folder; return the files written."""
    report = json.loads(result.read_text(encoding="utf-8"))
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, entry in report["entries"].items():
        if entry["task"] not in _CURVES:
            continue
        by, x, ys = _CURVES[entry["task"]]
        rows = [row | one for row in entry["summary"] for one in row.get("contenders", [{}])]
        figure, axes = pyplot.subplots(
            1, len(ys), figsize=(6 * len(ys), 5), squeeze=False, layout="constrained"
        )
        for axis, y in zip(axes[0], ys, strict=True):
            for of, group in grouped([row for row in rows if row.get(x) is not None], by):
                curve = sorted((row[x], row[y]) for row in group if row[y] is not None)
                axis.plot(*zip(*curve, strict=True), "o-", label=" ".join(map(str, of.values())))
            for row in rows:  # dense, or without reuse; over all depths is no level
                if row.get(x) is None and x != "depth" and row.get(y) is not None:
                    axis.axhline(row[y], color="gray", linestyle=":")
            axis.set(xlabel=x, ylabel=y)
        axes[0, 0].legend(fontsize="small")
        figure.suptitle(f"{report['name']}: {name}; {report['model']['name']}")
        written.append(out / f"quality-{report['name']}-{name}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written
