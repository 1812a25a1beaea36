"""The section on GPUs of docs/benchmarks.md, made from bench/results; without torch."""

from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {"fresh": "fresh", "attend": "reused", "select": "select", "score": "score"}
PLANNED = ("hit", "hit, one layer", "miss", "mixed", "short")
TITLES |= {name: f"planned: {name}" for name in PLANNED}

_HEAD = """\
## On a GPU

Made by `make gpu` on a machine with an NVIDIA GPU. It checks first, and no figure comes of a run
whose checks do not pass: `tokenselect.check`, the properties, 20 repeats that have to be bitwise
the same, and compute-sanitizer where it is installed. Then, on the inputs that are timed, every
vote, the selection, and attention to it are held to float64, as is attention with a budget for
everything; so is each dense attention, by the budget in `bench/dense.py`.
"""

_NONE = """\
No GPU figure has been measured yet.
"""

_HOW = """\
*Fresh* is a whole call, *reused* is attention to a selection that is there already. A *graph* is
one call replayed as a CUDA graph, launched while the device is still busy: what the device takes.
*Eager* is the call as Python makes it, on an idle device, until its result is there. Before each
timed call the L2 cache is filled with other data. Both sides alternate, round by round; times are
medians with the 10th and 90th percentile, in microseconds; a speed-up is the median of the ratios
within a round, graph to graph and eager to eager, over the fastest dense attention of that cell
that is exact, which is named. All requests of a batch are equally long, dense attention's best
case. The rate of a copy counts what is read and what is written. *Moved* bytes are the backend's
own account of its kernels.

*Planned* figures are of `tokenselect.plan`: one call, that is one layer of a step, which is the
time of a graph of several layers divided by its calls. Every layer has a Selection Cache of its
own, and the layers take turns at so many copies of the KV cache as the cell's section says, since
one layer's rows in the L2 cache would help the next. Lengths grow by one from step to step, and
after `max_reuse` steps go back to the start. In a *hit* every request reuses its selection; in a
*miss* none does; in *mixed* queries are alike in groups of 5, so that four of five reuse, and a
graph holds 5 steps; *hit, one layer* is a graph of a single call. *Short* is a fresh selection at
32K tokens by a plan whose capacity is that of the cell; its cost is held to that of a plan of 32K.
Before times, every layer's results at 10 steps or more are compared bitwise with those of
`attention`, called and replayed; after, hits and misses are counted. The check *graphs* holds plans
and their CUDA graphs to attention without them, over the sizes, inputs and streams that vary.
"""


class Refused(ValueError):
    """A result that must not be shown as a measurement."""


def section(reports: Sequence[dict[str, Any]]) -> str:
    """The whole section, from the newest result of each device. Raises Refused."""
    for report in reports:
        accept(report)
    newest: dict[str, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda report: report["date"]):
        newest[report["machine"]["device"]] = report
    if not newest:
        return f"{_HEAD}\n{_NONE}"
    latest_first = sorted(newest.values(), key=lambda report: report["date"], reverse=True)
    return "\n".join([_HEAD, _HOW, *map(device, latest_first)])


def accept(report: dict[str, Any]) -> None:
    """Raises Refused for a dry run, and for a run whose checks did not pass."""
    if report.get("dry_run") is not False:
        raise Refused("a dry run measures nothing: its result does not belong in bench/results")
    if report.get("green") is not True:
        bad = [f"{check['name']} {check['status']}" for check in report.get("checks", ())
               if check["status"] not in ("passed", "skipped")]  # fmt: skip
        bad += [f"{cell['cell']}: {cell['why']}" for cell in report.get("wrong", ())]
        why = "; ".join(bad) or "it says so itself"
        raise Refused(f"the checks of this run did not pass, so it shows nothing: {why}")
    if not report.get("cells"):
        raise Refused("this run measured nothing")


def device(report: dict[str, Any]) -> str:
    """One device's part."""
    machine = report["machine"]
    lines = [f"### {report['date'][:10]}: {machine['device']}\n", _facts(report) + "\n"]
    lines += table(
        ("check", "result", "detail", "s"),
        [(c["name"], c["status"], c["detail"], f"{c['seconds']:.0f}") for c in report["checks"]],
    )
    cells = report["cells"]
    lines += ["", *_targets(report["targets"]), "", *_overview(cells), "", *_times(cells)]
    lines += ["", *_planned(cells)]
    for cell in cells:
        if cell["is_headline"]:
            lines += ["", f"#### {cell['name']}", "", _cell_facts(cell), "", *_details(cell)]
    lines += ["", *_model(report.get("model"))]
    lines += ["", "#### Not measured", "", *_absent(report), "", *_failed(cells)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _facts(report: dict[str, Any]) -> str:
    machine, source = report["machine"], report["source"]
    of = source["commit"] or "no commit known"
    copied = ", ".join(f"{rate['median_gb_per_s']:.0f}" for rate in report["copy"])
    floor = f"{report['clock_floor']['median_us']:.1f} µs" if report["clock_floor"] else "unknown"
    gib = f"{machine['memory_bytes'] / 2**30:.0f}" if machine.get("memory_bytes") else "?"
    told = (
        f"`{report['command']}` at {of} (tree of `tokenselect/`: `{source['tree']}`); driver "
        f"{machine['driver']}, CUDA {machine.get('cuda')}, torch {machine['torch']}, triton "
        f"{machine['triton']}, python {machine['python']}; {gib} GiB of memory. A long copy ran at "
        f"{copied} GB/s; a graph of the least work there is takes {floor} by the same clock."
    )
    if report["quick"]:
        told += " This was a quick run: fewer checks and cells."
    if not report["finished"]:
        told += " The run was cut off before its end."
    return told


def _targets(rows: Iterable[dict[str, Any]]) -> list[str]:
    words = {True: "reached", False: "missed", None: ""}

    def value(row: dict[str, Any], mode: str) -> str:
        got = row[mode]
        if got is None:
            return "not measured"
        written = {"us": f"{got:.1f} µs", "share": f"{got:.0%}"}
        return written.get(row["what"], f"{got:.2f}")

    return table(
        ("cell", "of", "target, for an H100, as a graph", "graph", "eager", ""),
        [
            (row["cell"], TITLES[row["of"]], row["target"], value(row, "graph"),
             value(row, "eager"), words[row["reached"]])
            for row in rows
        ],
    )  # fmt: skip


def _overview(cells: Iterable[dict[str, Any]]) -> list[str]:
    head = ("cell", "fresh, graph", "fresh, eager", "reused, graph", "reused, eager", "over")
    rows = []
    for cell in cells:
        ratios = [ratio_of(cell, of, mode, "dense") for of in ("fresh", "attend")
                  for mode in ("graph", "eager")]  # fmt: skip
        over = dict.fromkeys(f"{r['to']} ({r['mode']})" for r in ratios if r)
        rows.append((cell["name"], *map(_ratio, ratios), "; ".join(over) or "no dense one ran"))
    return table(head, rows)


def _times(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Of every cell the medians, in microseconds: as graphs, and the two ends eagerly."""
    parts = ("fresh", "score", "select", "attend")
    rows = []
    for cell in cells:
        found = [median(cell, name, "graph") for name in parts]
        found += [strongest(cell, "graph"), median(cell, "fresh", "eager")]
        rows.append((cell["name"], *found, strongest(cell, "eager")))
    head = ("µs", *(f"{name}, graph" for name in parts), "dense, graph", "fresh, eager")
    return table((*head, "dense, eager"), rows)


def _planned(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Of every reuse cell, times as graphs and how far they are ahead of dense attention."""
    rows = []
    for cell in cells:
        if cell.get("reuse") and cell["sides"]:
            found = [median(cell, name, "graph") for name in PLANNED]
            found.append(median(cell, "short, own capacity", "graph"))
            ahead = [ratio_of(cell, of, "graph", "dense") for of in ("hit", "miss", "mixed")]
            rows.append((cell["name"], *found, *map(_ratio, ahead)))
    head = ("planned, µs a call, graph", *PLANNED, "short, own capacity")
    return table((*head, "hit over dense", "miss", "mixed"), rows) if rows else []


def _model(model: dict[str, Any] | None) -> list[str]:
    """A whole model's times of a token."""
    if model is None:
        return []
    title = ["#### A whole model", ""]
    if "sides" not in model:
        return [*title, f"Not measured: {_plain(', '.join(model.values()))}"]
    config = ", ".join(f"{name} {value}" for name, value in model["config"].items())
    told = (
        f"A Llama of {model['layers']} layers with random weights (hidden size {model['hidden']}, "
        f"intermediate size {model['intermediate']}, heads {model['heads']}), in transformers "
        f"{model['transformers']}: one token after {model['n'] - 1} cached ones, {config}; medians "
        f"of {model['rounds']}. *Captured*: the whole step is one graph, launched while the device "
        "is busy. *Stock*: called from Python on an idle device, over a cache that is copied for "
        "every token. *Reused*: every layer reuses its selection. On a GPU the logits of the "
        "selected ways are those of `attention` bit for bit."
    )
    names = list(dict.fromkeys(ratio["over"] for ratio in model["ratios"]))
    rows = []
    for side in model["sides"]:
        ratios = {r["over"]: r for r in model["ratios"] if r["of"] == side["name"]}
        times = f"{side['median_ms']:.2f} ({side['p10_ms']:.2f}–{side['p90_ms']:.2f})"
        rows.append((side["name"], times, *(_ratio(ratios.get(name)) for name in names)))
    return [*title, told, "", *table(("", "ms a token", *(f"over {n}" for n in names)), rows)]


def _failed(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Every rival that did not run, or not exactly, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for side in cell["sides"]:
            why = side.get("error") or side.get("graph_error")
            if side.get("is_baseline") is False:
                why = "no baseline: its error is over the budget"
            if why:
                found.setdefault((side["name"], _plain(why)), []).append(cell["name"])
    rows = [(name, why, "; ".join(where)) for (name, why), where in found.items()]
    return table(("did not run, or not exactly", "why", "where"), rows) if rows else []


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['p10']:.2f}–{ratio['p90']:.2f})"


def _cell_facts(cell: dict[str, Any]) -> str:
    config = ", ".join(f"{name} {value}" for name, value in cell["config"].items())
    checks = "; ".join(f"{name}: {value:.2g}" for name, value in cell["checks"].items())
    told = f"{cell['dtype']}, {config}; {cell['attended']} tokens attended to. {checks}."
    if cell.get("reuse"):
        r = cell["reuse"]
        told += (
            f" Planned: {r['layers']} layers over {r['kv_copies']} copies of the KV cache, "
            f"max_reuse {r['max_reuse']}, theta {r['theta']}."
        )
    return told


def _details(cell: dict[str, Any]) -> list[str]:
    rows = []
    for side in cell["sides"]:
        name = f"… {side['name']}" if side["role"] == "stage" else side["name"]
        name = f"planned: {name}" if side["role"] == "planned" else name
        if "error" in side:
            rows.append((name, "-", "-", "", "", _plain(side["error"])))
            continue
        times = [_time(side.get(mode)) for mode in ("graph", "eager")]
        moved = f"{side['bytes'] / 1e6:.1f}" if side["bytes"] is not None else ""
        rate = best(side).get("gb_per_s")
        rows.append((name, *times, moved, f"{rate:.0f}" if rate else "", _plain(_verdict(side))))
    return table(("", "graph, µs", "eager, µs", "MB", "GB/s", "remarks"), rows)


def _verdict(side: dict[str, Any]) -> str:
    parts = []
    if side.get("share_of_budget") is not None:
        share = side["share_of_budget"]
        parts.append(f"error {share:.2f} of the budget")
        if not side["is_baseline"]:
            parts[-1] = f"no baseline: error {share:.3g} × the budget"
    if side.get("calls", 1) > 1:
        parts.append(f"a call, of {side['calls']} in a graph")
    parts += [side[note] for note in ("slow", "graph_error") if note in side]
    return "; ".join(parts)


def _time(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "-"
    median, p10, p90 = (figures[name] for name in ("median_us", "p10_us", "p90_us"))
    return f"{median:.1f} ({p10:.1f}–{p90:.1f})"


def _absent(report: dict[str, Any]) -> list[str]:
    """What a reader might look for and not find."""
    reasons: dict[str, list[str]] = {}
    for cell in report["left_out"]:
        reasons.setdefault(_plain(cell["why"]), []).append(cell["cell"])
    rows = [("; ".join(cells), why) for why, cells in reasons.items()]
    return table(("not measured", "why"), rows) if rows else ["Every cell was measured."]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


# --- finding things in a cell's report ---


def side_of(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((side for side in cell["sides"] if side["name"] == name), None)


def ratio_of(cell: dict[str, Any], of: str, mode: str, role: str) -> dict[str, Any] | None:
    wanted = {"of": of, "mode": mode, "role": role}
    return next((r for r in cell["ratios"] if wanted.items() <= r.items()), None)


def best(side: dict[str, Any]) -> dict[str, Any]:
    """A side's figures as a graph, or else eager."""
    return side.get("graph") or side.get("eager") or {}


def median(cell: dict[str, Any], name: str | None, mode: str) -> str:
    side = side_of(cell, name) if name else None
    return f"{side[mode]['median_us']:.1f}" if side and mode in side else "-"


def strongest(cell: dict[str, Any], mode: str) -> str:
    ratio = ratio_of(cell, "fresh", mode, "dense")
    return median(cell, ratio["to"] if ratio else None, mode)
