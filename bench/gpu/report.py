"""What a run found: the JSON, written anew after every cell, the targets, and the table."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bench.gpu.page import PLANNED, best, median, ratio_of, side_of, strongest

SCHEMA = 2  # since 2: reuse cells, whose planned sides are times of one call in `calls`
MODES = ("graph", "eager")


@dataclass(frozen=True)
class Target:
    """A figure that a cell is to reach, by graph replay, on the device that it was set for.

    what  "speed-up" of a side over the strongest dense attention, its "us", its "share" of the
          rate of a copy, or its "cost": 1 is that of a plan of no more capacity than is needed
    """

    cell: str
    of: str
    what: Literal["speed-up", "us", "share", "cost"]
    limit: float
    device: str = "H100"

    def text(self) -> str:
        if self.what == "us":
            return f"at most {self.limit:g} µs"
        if self.what == "share":
            return f"at least {self.limit:.0%} of the copy rate"
        if self.what == "cost":
            return f"at most {self.limit:g} times a small plan"
        return f"at least {self.limit:g} times as fast as dense"

    def reached(self, value: float) -> bool:
        return value <= self.limit if self.what in ("us", "cost") else value >= self.limit


_DECODE, _CHUNK = "decode 32/8/128 n {} B 1", "prefill 32/8/128 n {} B 1 Lq 512"
TARGETS = (
    Target(_DECODE.format("128K"), "fresh", "speed-up", 1.6),
    Target(_DECODE.format("1M"), "fresh", "speed-up", 1.75),
    Target(_DECODE.format("128K"), "attend", "us", 15.0),
    Target(_DECODE.format("1M"), "attend", "us", 15.0),
    Target(_DECODE.format("1M"), "select", "us", 60.0),
    Target(_DECODE.format("1M"), "score", "share", 0.8),
    Target(_DECODE.format("128K"), "hit", "us", 15.0),
    Target(_DECODE.format("1M"), "hit", "us", 15.0),
    Target(_DECODE.format("32K"), "hit", "us", 15.0),
    Target(_DECODE.format("128K"), "hit", "speed-up", 12.0),
    Target(_DECODE.format("1M"), "hit", "speed-up", 90.0),
    Target(_DECODE.format("128K"), "mixed", "speed-up", 6.0),
    Target(_DECODE.format("1M"), "short", "cost", 1.15),
    Target(_CHUNK.format("128K"), "fresh", "speed-up", 6.1),
    Target(_CHUNK.format("1M"), "fresh", "speed-up", 24.0),
)


def held(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside what was measured. reached is None where it was not, or elsewhere."""
    cells = {cell["name"]: cell for cell in report["cells"]}
    device = (report["machine"] or {}).get("device", "")
    rows = []
    for target in TARGETS:
        measured = {mode: _measured(target, report, cells.get(target.cell), mode)
                    for mode in MODES}  # fmt: skip
        value = measured["graph"]
        applies = value is not None and target.device in device
        rows.append(
            {
                "cell": target.cell,
                "of": target.of,
                "what": target.what,
                "target": target.text(),
                "for": target.device,
                **measured,
                "reached": target.reached(value) if applies and value is not None else None,
            }
        )
    return rows


def _measured(
    target: Target, report: dict[str, Any], cell: dict[str, Any] | None, mode: str
) -> float | None:
    if cell is None:
        return None
    if target.what == "speed-up":
        ratio = ratio_of(cell, target.of, mode, "dense")
        return ratio and ratio["median"]
    if target.what == "cost":
        ratio = ratio_of(cell, target.of, mode, "planned")
        return ratio and 1 / ratio["median"]
    found = side_of(cell, target.of)
    if found is None or mode not in found:
        return None
    if target.what == "us":
        return found[mode]["median_us"]
    rate = best_copy_rate(report, cell)
    return found[mode]["gb_per_s"] / rate if rate and "gb_per_s" in found[mode] else None


def best_copy_rate(report: dict[str, Any], cell: dict[str, Any]) -> float | None:
    """GB/s: the faster of the long copy of the run and the copy in the cell's own rounds."""
    rates = [rate["median_gb_per_s"] for rate in report["copy"]]
    copied = side_of(cell, "device copy")
    rates += [copied[mode]["gb_per_s"] for mode in MODES if copied and mode in copied]
    return max(rates, default=None)


@dataclass
class Report:
    """A run's findings, and the files they are in."""

    content: dict[str, Any]
    folders: list[Path] = field(default_factory=list)
    _written: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """No run takes another's name, and a red one shows in it."""
        device = (self.content["machine"] or {}).get("device", "unknown")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        day, _, time = self.content["date"].partition("T")
        red = "" if self.content["green"] else "-red"
        return f"{day}-{time[:5].replace(':', '')}-{slug}-gpu{red}.json"

    def write(self) -> list[Path]:
        """Write to every folder, whole or not at all; where it was written before, if elsewhere."""
        green = self.content["green"]
        self.content["targets"] = held(self.content) if green else []
        kept = dict(self.content)
        if not green:  # nothing is faster than anything
            kept["cells"] = [cell | {"ratios": []} for cell in kept["cells"]]
        text = json.dumps(kept, indent=1) + "\n"
        paths = []
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.name
            part = path.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
            paths.append(path)
        for path in set(self._written) - set(paths):
            path.unlink(missing_ok=True)
        self._written = list(paths)
        return paths


def tree_of(folder: Path) -> str:
    """What `git rev-parse COMMIT:folder` says of the folder's files, where git is not at hand."""
    entries = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name + "/" * path.is_dir()):
        if path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        if path.is_dir():
            if (tree := tree_of(path)) != _object("tree", b""):  # git keeps no empty folders
                entries.append((b"40000", path.name, tree))
        else:
            mode = b"100755" if os.access(path, os.X_OK) else b"100644"
            entries.append((mode, path.name, _object("blob", path.read_bytes())))
    return _object(
        "tree",
        b"".join(mode + b" " + name.encode() + b"\0" + bytes.fromhex(digest)
                 for mode, name, digest in entries),
    )  # fmt: skip


def _object(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}".encode() + b"\0" + content).hexdigest()


# --- for the terminal ---


def cell_table(cell: dict[str, Any], copy_gb_per_s: float | None) -> str:
    """One cell's times."""
    checks = ", ".join(f"{name} {value:.3g}" for name, value in cell["checks"].items())
    lines = [f"{cell['name']}: {cell['attended']} tokens attended to; {checks}"]
    if "not_equivalent" in cell:
        lines.append(f"  NOT EQUIVALENT: {cell['not_equivalent']}")
    lines.append(f"  {'µs, median (10 to 90 %)':52} {'graph':>29} {'eager':>29}  GB/s  of copy")
    for side in cell["sides"]:
        lines += _side_lines(side, copy_gb_per_s)
    return "\n".join(lines)


def overview(cells: Iterable[dict[str, Any]], *, ratios: bool) -> str:
    """A line a cell: our medians in microseconds, and what they are compared with."""
    head = f"  {'µs as graphs (eagerly)':34} {'fresh':>18} {'score':>8} {'select':>8} {'attend':>8}"
    lines = [f"{head} {'dense':>18}" + ("  speed-up fresh, reused" if ratios else "")]
    for cell in cells:
        fresh = f"{median(cell, 'fresh', 'graph')} ({median(cell, 'fresh', 'eager')})"
        dense = f"{strongest(cell, 'graph')} ({strongest(cell, 'eager')})"
        stages = [f"{median(cell, name, 'graph'):>8}" for name in ("score", "select", "attend")]
        line = f"  {cell['name']:34} {fresh:>18} {' '.join(stages)} {dense:>18}"
        if ratios:
            for of in ("fresh", "attend"):
                graph, eager = (ratio_of(cell, of, mode, "dense") for mode in MODES)
                line += f"  {_times(graph)} ({_times(eager)})"
            over = dict.fromkeys(r["to"] for r in map(partial(_fresh, cell), MODES) if r)
            line += f"  over {', '.join(over)}"
        lines.append(line)
    return "\n".join(lines)


def reuse_table(cells: Iterable[dict[str, Any]], *, ratios: bool) -> str:
    """A line a reuse cell: a planned call of one layer, and how far it is ahead of dense."""
    several = [cell for cell in cells if cell.get("reuse") and cell["sides"]]
    if not several:
        return ""
    head = f"  {'planned, µs a layer as graphs (eagerly)':40}"
    lines = [head + "".join(f" {name:>17}" for name in PLANNED)]
    for cell in several:
        line = f"  {cell['name']:40}"
        for name in PLANNED:
            both = f"{median(cell, name, 'graph')} ({median(cell, name, 'eager')})"
            line += f" {both:>17}"
        if ratios:
            for of in ("hit", "miss", "mixed"):
                line += f"  {of} {_times(ratio_of(cell, of, 'graph', 'dense'))}"
        lines.append(line)
    return "\n".join(lines)


def model_table(model: dict[str, Any], *, ratios: bool) -> str:
    """A line for each way a whole model attends: milliseconds a token."""
    if "sides" not in model:
        return f"  a whole model was not measured: {', '.join(model.values())}"
    lines = [f"  a model of {model['layers']} layers, {model['n']} tokens attended to, ms a token:"]
    for side in model["sides"]:
        line = f"  {side['name']:44} {side['median_ms']:8.2f}"
        for ratio in model["ratios"] if ratios else ():
            if ratio["of"] == side["name"]:
                line += f"  {ratio['median']:.2f} x {ratio['over']}"
        lines.append(line)
    return "\n".join(lines)


def _fresh(cell: dict[str, Any], mode: str) -> dict[str, Any] | None:
    return ratio_of(cell, "fresh", mode, "dense")


def _times(ratio: dict[str, Any] | None) -> str:
    return f"{ratio['median']:.2f} x" if ratio else "-"


def _side_lines(side: dict[str, Any], copy_gb_per_s: float | None) -> Iterator[str]:
    name = f"  {side['name']}" if side["role"] == "stage" else side["name"]
    if side["role"] == "planned":
        name = f"planned: {name}"
    if "error" in side:
        yield f"  {name:52} {side['error']}"
        return
    cells = [_time(side[mode]) if mode in side else "-" for mode in MODES]
    line = f"  {name:52} {cells[0]:>29} {cells[1]:>29}"
    rate = best(side).get("gb_per_s")
    if rate is not None:
        line += f" {rate:5.0f}" + (f" {rate / copy_gb_per_s:7.0%}" if copy_gb_per_s else "")
    if side.get("calls", 1) > 1:
        line += f"  a call, of {side['calls']} in a graph"
    if side.get("is_baseline") is False:
        line += f"  no baseline: {side.get('share_of_budget', 0):.3g} x the error budget"
    yield line
    for note in ("slow", "graph_error"):
        if note in side:
            yield f"      {side[note]}"


def _time(figures: dict[str, float]) -> str:
    median, p10, p90 = (figures[name] for name in ("median_us", "p10_us", "p90_us"))
    return f"{median:.1f} ({p10:.1f} to {p90:.1f})"


def target_table(rows: list[dict[str, Any]]) -> str:
    lines = ["targets, for an H100:"]
    for row in rows:
        verdict = {True: "reached", False: "MISSED", None: ""}[row["reached"]]
        graph, eager = (shown(row["what"], row[mode]) for mode in MODES)
        lines.append(
            f"  {row['cell']:34} {row['of']:7} {row['target']:36} graph {graph:>9} "
            f"eager {eager:>9}  {verdict}"
        )
    return "\n".join(lines)


def shown(what: str, value: float | None) -> str:
    if value is None:
        return "-"
    return {"us": f"{value:.1f} µs", "share": f"{value:.0%}"}.get(what, f"{value:.2f} x")
