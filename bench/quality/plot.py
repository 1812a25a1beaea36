"""Pictures of a result, one PNG for each entry of its settings that has something to show."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality.figures import grouped
from tokenselect.errors import InvalidProblem


def plot(result: Path, out: Path) -> list[Path]:
    """Draw every entry of a result into a folder; the files written."""
    try:
        report = json.loads(result.read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not (isinstance(report, dict) and report.get("kind") == "quality"):
        raise InvalidProblem(
            f"{result}: no result of bench.quality",
            "a result is the JSON that collect writes",
            "give such a file: OUT/quality-NAME.json, or one of bench/results",
        )
    try:
        import matplotlib
    except ImportError:
        raise InvalidProblem(
            "plot without matplotlib", "it draws with matplotlib", "make quality installs it"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, entry in report["entries"].items():
        draw = _DRAW.get(entry["task"])
        if draw is None or not entry["rows"]:
            continue
        figure = draw(pyplot, entry)
        figure.suptitle(
            f"{report['name']}: {name}; {report['model']['file'] or report['model']['name']}"
        )
        figure.tight_layout()
        path = out / f"quality-{report['name']}-{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    if not written:
        raise InvalidProblem(
            f"{result}: nothing to draw",
            f"pictures are of the rows of {', '.join(_DRAW)}",
            "run some of them, and collect",
        )
    return written


def _lines(
    axis: Any,
    x: str,
    y: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
) -> None:
    """A line for each label, with its levels as dotted ones; where each line is one point, a row
    for each instead, so that however many there are can be told apart."""
    if lines and all(len(points) == 1 for points in lines.values()):
        at = sorted({points[0][0] for points in lines.values()})
        axis.plot([points[0][1] for points in lines.values()], range(len(lines)), "o")
        axis.set_yticks(range(len(lines)), list(lines), fontsize="small")
        axis.invert_yaxis()
        axis.grid(axis="y", alpha=0.3)
        axis.set(xlabel=y, title=f"{x}: {', '.join(f'{value:,g}' for value in at)}")
        mark = axis.axvline
    else:
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(xlabel=x, ylabel=y)
        mark = axis.axhline
    for label, level in levels.items():
        mark(level, color="gray", linestyle=":", label=label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _documents(pyplot: Any, entry: dict[str, Any]) -> Any:
    """KL and perplexity by tokens attended to, a line for each way and context."""
    rows = [row for row in entry["summary"] if row["size"] is not None]
    dense = {
        f"dense, {row['context']:,} tokens": row["perplexity"]
        for row in entry["summary"]
        if row["way"] == "dense"
    }
    groups = grouped(rows, ("context", "way"))
    figure, axes = pyplot.subplots(1, 2, figsize=(14, max(5, 1 + 0.3 * len(groups))))
    for axis, name in zip(axes, ("kl", "perplexity"), strict=True):
        lines = {
            f"{way}, {context:,} tokens": [(row["size"], row[name]) for row in group]
            for (context, way), group in groups.items()
        }
        levels = dense if name == "perplexity" else {}
        _lines(axis, "tokens attended to", _NAMES[name], lines, levels)
    return figure


def _reuse(pyplot: Any, entry: dict[str, Any]) -> Any:
    """Hits, KL and perplexity by theta."""
    rows = [row for row in entry["summary"] if row["size"] is not None]
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    for axis, name in zip(axes, ("hit_rate", "kl", "perplexity"), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        never: dict[str, float | None] = {}
        for (context, way, budget), group in grouped(rows, ("context", "way", "budget")).items():
            label = f"{way} {budget}, {context:,} tokens"
            points = [(row["theta"], row[name]) for row in group if row["theta"] is not None]
            lines |= {label: points} if points else {}
            never |= {f"never reused: {label}": r[name] for r in group if r["theta"] is None}
        levels = {label: value for label, value in never.items() if value is not None}
        _lines(axis, "theta", _NAMES[name], lines, levels)
    return figure


def _needles(pyplot: Any, entry: dict[str, Any]) -> Any:
    """Share of right answers by depth and length, a field for each way and kind of text."""
    rows = [row for row in entry["summary"] if row["depth"] is not None]
    kinds = list(dict.fromkeys(row["hidden"] for row in rows))
    ways = list(dict.fromkeys((row["way"], row["budget"]) for row in rows))
    lengths = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    size = (2 + 3 * len(ways), 1 + 2.5 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), len(ways), figsize=size, squeeze=False)
    for i, kind in enumerate(kinds):
        for j, way in enumerate(ways):
            share = {
                (r["depth"], r["context"]): r["right"] / r["tries"]
                for r in rows
                if r["hidden"] == kind and (r["way"], r["budget"]) == way
            }
            none = float("nan")
            field = [[share.get((depth, length), none) for length in lengths] for depth in depths]
            axis = axes[i][j]
            drawn = axis.imshow(field, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axis.set(xlabel="tokens", ylabel="depth")
            axis.set_title(f"{kind}: {' '.join(way)}", fontsize="small")
        figure.colorbar(drawn, ax=axis, label="share of right answers")
    return figure


def _mass(pyplot: Any, entry: dict[str, Any]) -> Any:
    """Retained mass by layer and head, and overlap of layers, of the first document's rows."""
    groups = list(grouped(entry["rows"], ("context", "way", "budget")).items())
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 5 * len(groups)), squeeze=False)
    for (left, right), ((context, way, budget), group) in zip(axes, groups, strict=True):
        of = f"{way} {budget}, {context:,} tokens, {group[0]['document']}"
        none = float("nan")
        mass = [[none if x is None else x for x in layer] for layer in group[0]["mass"]]
        drawn = left.imshow(mass, vmin=0, vmax=1, aspect="auto")
        figure.colorbar(drawn, ax=left)
        left.set(xlabel="query head", ylabel="layer", title=f"retained mass: {of}")
        drawn = right.imshow(group[0]["by_layer"], vmin=0, vmax=1)
        figure.colorbar(drawn, ax=right)
        right.set(xlabel="layer", ylabel="layer", title="overlap of votes")
    return figure


def _speed(pyplot: Any, entry: dict[str, Any]) -> Any:
    """Milliseconds a token by cached tokens."""
    figure, axis = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in entry["summary"]:
        for side in row.get("sides", ()):
            lines.setdefault(side["name"], []).append((row["context"], 1e3 * side["median"]))
    _lines(axis, "tokens cached", "ms a token", lines, {})
    if any(len(points) > 1 for points in lines.values()):
        axis.set_ylim(bottom=0)
    return figure


_NAMES = {
    "kl": "KL from dense attention, nats",
    "perplexity": "perplexity",
    "hit_rate": "share of selections reused",
}
_DRAW: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "decode": _documents,
    "sparse": _documents,
    "reuse": _reuse,
    "needles": _needles,
    "mass": _mass,
    "speed": _speed,
}
