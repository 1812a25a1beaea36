"""What a run found: the JSON, the targets, and the section on GPUs of docs/benchmarks.md.

Without torch. What is printed in a terminal are the same tables.
"""

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables import table

Json = dict[str, Any]
SCHEMA = 2  # since 2: planned figures are times of one call in `calls`
MODES = ("graph", "eager")
PLANNED = ("hit", "hit, one layer", "miss", "mixed", "short")
TITLES = {"fresh": "fresh", "attend": "reused", "select": "select", "score": "score"}
TITLES |= {name: f"planned: {name}" for name in PLANNED}

# --- the targets ---


# Of what a target is of: how it is told, how a figure is, and when it is reached.
_KINDS: dict[str, tuple[str, str, Callable[[float, float], bool]]] = {
    "speed-up": ("at least {:g} times as fast as dense", "{:.2f}", operator.ge),
    "us": ("at most {:g} µs", "{:.1f} µs", operator.le),
    "share": ("at least {:.0%} of the copy rate", "{:.0%}", operator.ge),
    "cost": ("at most {:g} times a small plan", "{:.2f}", operator.le),
}


@dataclass(frozen=True)
class Target:
    """A figure that a case is to reach, by graph replay, on the device that it was set for.

    what  "speed-up" over the strongest dense attention, "us", "share" of the rate of a copy, or
          "cost": 1 is that of a plan of no more capacity than is needed
    """

    case: str
    of: str
    what: str
    limit: float
    device: str = "H100"

    def measured(self, report: Json, case: Json, mode: str) -> float | None:
        """Return the figure of a case that the target is about, if there is one."""
        if self.what in ("speed-up", "cost"):
            role = {"speed-up": "dense", "cost": "planned"}[self.what]
            ratio = ratio_of(case, self.of, mode, role)
            median = ratio and ratio["median"]
            return 1 / median if median and self.what == "cost" else median
        found = side_of(case, self.of).get(mode)
        if self.what == "us" or not found:
            return found and found["median_us"]
        # The faster of the long copy of the run and the copy in the case's own rounds.
        rates = [rate["median_gb_per_s"] for rate in report["copy"]]
        rates += [x["gb_per_s"] for x in map(side_of(case, "device copy").get, MODES) if x]
        return found["gb_per_s"] / max(rates) if rates and "gb_per_s" in found else None


_DECODE, _CHUNK = "decode 32/8/128 n {} B 1", "prefill 32/8/128 n {} B 1 Lq 512"
TARGETS = tuple(
    Target(shape.format(n), of, what, limit)
    for shape, n, of, what, limit in (
        (_DECODE, "128K", "fresh", "speed-up", 1.6),
        (_DECODE, "1M", "fresh", "speed-up", 1.75),
        (_DECODE, "128K", "attend", "us", 15.0),
        (_DECODE, "1M", "attend", "us", 15.0),
        (_DECODE, "1M", "select", "us", 60.0),
        (_DECODE, "1M", "score", "share", 0.8),
        (_DECODE, "128K", "hit", "us", 15.0),
        (_DECODE, "1M", "hit", "us", 15.0),
        (_DECODE, "32K", "hit", "us", 15.0),
        (_DECODE, "128K", "hit", "speed-up", 12.0),
        (_DECODE, "1M", "hit", "speed-up", 90.0),
        (_DECODE, "128K", "mixed", "speed-up", 6.0),
        (_DECODE, "1M", "short", "cost", 1.15),
        (_CHUNK, "128K", "fresh", "speed-up", 6.1),
        (_CHUNK, "1M", "fresh", "speed-up", 24.0),
    )
)


def judged(report: Json) -> list[Json]:
    """Return each target beside what was measured. reached: None if it was not, or elsewhere."""
    cases = {case["name"]: case for case in report["cells"]}
    rows = []
    for target in TARGETS:
        text, _, is_reached = _KINDS[target.what]
        case = cases.get(target.case, {"sides": [], "ratios": []})
        measured = {mode: target.measured(report, case, mode) for mode in MODES}
        row = {"cell": target.case, "of": target.of, "what": target.what}
        row |= {"target": text.format(target.limit), "for": target.device, **measured}
        value, row["reached"] = measured["graph"], None
        if value is not None and target.device in report["machine"].get("device", ""):
            row["reached"] = is_reached(value, target.limit)
        rows.append(row)
    return rows


# --- the JSON ---


@dataclass
class Report:
    """A run's findings, and the files they are in, written anew with each.

    folders  where people look for them; red shows in the name
    kept     the same for another process, with what is no figure of a red run
    """

    content: Json
    folders: list[Path]
    kept: Path | None = None

    @property
    def told(self) -> set[str]:
        """The names of the cases that something was found of."""
        content = self.content
        several = (*content["wrong"], *content["left_out"])
        return {case["name"] for case in content["cells"]} | {case["cell"] for case in several}

    def name(self, *, green: bool) -> str:
        device = self.content["machine"].get("device", "unknown")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        day, _, time = self.content["date"].partition("T")
        return f"{day}-{time[:5].replace(':', '')}-{slug}-gpu{'' if green else '-red'}.json"

    def add(self, case: Json) -> None:
        """Add what was measured of a case.

        Times are shown as they come. What is faster than what is shown at the end: a later case may
        still turn the run red.
        """
        self.content["cells"].append(case)
        shown = times([case]) + planned([case | {"ratios": []}])
        print("\n".join(shown + (details(case) if case["is_headline"] else [])), flush=True)
        if "not_equivalent" in case:
            self.refute(case["name"], case["not_equivalent"])
        self.write()

    def refute(self, case: str, why: str) -> None:
        self.content["wrong"].append({"cell": case, "why": why})
        self.content["green"] = False
        print(f"✗ {case}: NOT EQUIVALENT: {why}", flush=True)
        self.write()

    def leave_out(self, case: str, why: str) -> None:
        self.content["left_out"].append({"cell": case, "why": why})
        print(f"  {case}: LEFT OUT: {why}", flush=True)
        self.write()

    def write(self) -> list[Path]:
        green = self.content["green"]
        self.content["targets"] = judged(self.content) if green else []
        if self.kept is not None:
            put(self.kept, self.content)
        shown = dict(self.content)
        if not green:  # nothing is faster than anything
            shown["cells"] = [case | {"ratios": []} for case in shown["cells"]]
        paths = [folder / self.name(green=green) for folder in self.folders]
        for path in paths:
            put(path, shown)
            path.with_name(self.name(green=not green)).unlink(missing_ok=True)
        return paths


def put(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def tree_of(folder: Path) -> str:
    """Return what `git rev-parse COMMIT:folder` says of its files, where git is not at hand."""

    def sha(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()

    def tree(folder: Path) -> bytes:
        entries = b""
        for path in sorted(folder.iterdir(), key=lambda path: path.name + "/" * path.is_dir()):
            if path.is_dir() and path.name != "__pycache__":
                if below := tree(path):  # git keeps no empty folders
                    entries += b"40000 " + path.name.encode() + b"\0" + sha("tree", below)
            elif path.is_file() and path.suffix != ".pyc":
                mode = b"100755 " if os.access(path, os.X_OK) else b"100644 "
                blob = sha("blob", path.read_bytes())
                entries += mode + path.name.encode() + b"\0" + blob
        return entries

    return sha("tree", tree(folder)).hex()


# --- the page ---


class Refused(ValueError):
    """A result that must not be shown as a measurement."""


def section(reports: Sequence[Json]) -> str:
    """Return the newest result of each device, the latest first, and what only older ones have."""
    latest_first = sorted(reports, key=lambda report: report["date"], reverse=True)
    parts: dict[str, list[str]] = {}
    told: set[tuple[str, str]] = set()
    for report in latest_first:
        of = report["machine"]["device"]
        cells = [case for case in report["cells"] if (of, case["name"]) not in told]
        told |= {(of, case["name"]) for case in cells}
        if of not in parts:
            parts[of] = [device(report)]
        elif cells:
            parts[of].append(_older(report, cells))
    several = [part for of in parts.values() for part in of]
    return "\n".join(several) or "No GPU figure has been measured yet.\n"


def _older(report: Json, cases: list[Json]) -> str:
    """Return what an older result has of cells that no newer one has."""
    names = {case["name"] for case in cases}
    judged = [row for row in report["targets"] if row["cell"] in names]
    lines = [f"#### On {report['date'][:10]}: cells that no later run measured", ""]
    lines += [_facts(report), "", *targets(judged), "", *speed_ups(cases), "", *times(cases)]
    return "\n".join([*lines, "", *planned(cases)]).rstrip("\n") + "\n"


def accept(report: Json) -> None:
    """Raise Refused for a dry run, and for a run whose checks did not pass."""
    if report.get("dry_run") is not False:
        raise Refused("a dry run measures nothing: its result does not belong in bench/results")
    if report.get("green") is not True:
        bad = [f"{check['name']} {check['status']}" for check in report.get("checks", ())
               if check["status"] not in ("passed", "skipped")]  # fmt: skip
        bad += [f"{case['cell']}: {case['why']}" for case in report.get("wrong", ())]
        why = "; ".join(bad) or "it says so itself"
        raise Refused(f"the checks of this run did not pass, so it shows nothing: {why}")
    if not report.get("cells"):
        raise Refused("this run measured nothing")


def device(report: Json) -> str:
    """Return one device's part."""
    machine, cases = report["machine"], report["cells"]
    lines = [f"### {report['date'][:10]}: {machine['device']}\n", _facts(report) + "\n"]
    lines += table(
        ("check", "result", "detail", "s"),
        [(c["name"], c["status"], c["detail"], f"{c['seconds']:.0f}") for c in report["checks"]],
    )
    lines += ["", *targets(report["targets"]), "", *speed_ups(cases), "", *times(cases)]
    lines += ["", *planned(cases)]
    for case in cases:
        if case["is_headline"]:
            lines += ["", f"#### {case['name']}", "", _case_facts(case), "", *details(case)]
    lines += ["", *model(report.get("model"))]
    lines += ["", "#### Not measured", "", *_absent(report), "", *_failed(cases)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _facts(report: Json) -> str:
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


def targets(rows: Iterable[Json]) -> list[str]:
    """Of every target what was measured."""
    words = {True: "reached", False: "missed", None: ""}
    lines = []
    for row in rows:
        figure = _KINDS[row["what"]][1]
        values = ["not measured" if row[m] is None else figure.format(row[m]) for m in MODES]
        words_of = (row["cell"], TITLES[row["of"]], row["target"])
        lines.append((*words_of, *values, words[row["reached"]]))
    return table(("cell", "of", "target, for an H100, as a graph", *MODES, ""), lines)


Column = tuple[str, str, str, str]  # head, of, mode, and the role over which a ratio is, or ""


def _by_case(title: str, cases: Iterable[Json], columns: Iterable[Column]) -> list[str]:
    """Return a table of medians in microseconds, and of ratios."""

    def cell(case: Json, of: str, mode: str, role: str) -> str:
        if role:
            return _ratio(ratio_of(case, of, mode, role))
        side = side_of(case, of)
        if of == "dense":  # the fastest that is exact
            able = [x for x in case["sides"] if x["role"] == "dense" and x.get("is_baseline")]
            able = [side for side in able if mode in side]
            side = min(able, key=lambda side: side[mode]["median_us"], default={})
        return f"{side[mode]['median_us']:.1f}" if mode in side else "-"

    rows = [(case["name"], *(cell(case, *which) for _, *which in columns)) for case in cases]
    return table((title, *(head for head, *_ in columns)), rows)


def speed_ups(cases: Iterable[Json]) -> list[str]:
    """Of every case how far selections are ahead of dense attention, and of which."""
    columns = [(f"{TITLES[of]}, {mode}", of, mode, "dense")
               for of in ("fresh", "attend") for mode in MODES]  # fmt: skip
    lines, over = _by_case("cell", cases, columns), ["over", "---"]
    for case in cases:
        ratios = [ratio_of(case, *which) for _, *which in columns]
        names = dict.fromkeys(f"{r['to']} ({r['mode']})" for r in ratios if r)
        over.append("; ".join(names) or "no dense one ran")
    return [f"{line} {end} |" for line, end in zip(lines, over, strict=True)]


def times(cases: Iterable[Json]) -> list[str]:
    """Of every case the medians, in microseconds: as graphs, and the two ends eagerly."""
    which = [(of, "graph") for of in ("fresh", "score", "select", "attend", "dense")]
    which += [("fresh", "eager"), ("dense", "eager")]
    return _by_case("µs", cases, [(f"{of}, {mode}", of, mode, "") for of, mode in which])


def planned(cases: Iterable[Json]) -> list[str]:
    """Of every case with plans, times as graphs and how far they are ahead of dense attention."""
    able = [case for case in cases if case.get("reuse") and case["sides"]]
    columns = [(name, name, "graph", "") for name in (*PLANNED, "short, own capacity")]
    ahead = {"hit over dense": "hit", "miss": "miss", "mixed": "mixed"}
    columns += [(head, of, "graph", "dense") for head, of in ahead.items()]
    return _by_case("planned, µs a call, graph", able, columns) if able else []


def model(model: Json | None) -> list[str]:
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
        "is busy. *Called*: from Python, on an idle device; DynamicCache copies what is cached for "
        "each token, TokenSelectCache does not. *Reused*: each layer reuses its selection. On a "
        "GPU the logits of captured, selected ways are those of `attention` bit for bit."
    )
    names = list(dict.fromkeys(ratio["over"] for ratio in model["ratios"]))
    rows = []
    for side in model["sides"]:
        ratios = {r["over"]: r for r in model["ratios"] if r["of"] == side["name"]}
        took = _spread(side, "_ms", 2)
        rows.append((side["name"], took, *(_ratio(ratios.get(name)) for name in names)))
    return [*title, told, "", *table(("", "ms a token", *(f"over {n}" for n in names)), rows)]


def _failed(cases: Iterable[Json]) -> list[str]:
    """Every baseline that did not run, or not exactly, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for side in case["sides"]:
            why = side.get("error") or side.get("graph_error")
            if side.get("is_baseline") is False:
                why = "no baseline: its error is over the budget"
            if why:
                found.setdefault((side["name"], _plain(why)), []).append(case["name"])
    rows = [(name, why, "; ".join(where)) for (name, why), where in found.items()]
    return table(("did not run, or not exactly", "why", "where"), rows) if rows else []


def _absent(report: Json) -> list[str]:
    """What a reader might look for and not find."""
    reasons: dict[str, list[str]] = {}
    for case in report["left_out"]:
        reasons.setdefault(_plain(case["why"]), []).append(case["cell"])
    rows = [("; ".join(cases), why) for why, cases in reasons.items()]
    return table(("not measured", "why"), rows) if rows else ["Every cell was measured."]


def _case_facts(case: Json) -> str:
    config = ", ".join(f"{name} {value}" for name, value in case["config"].items())
    checks = "; ".join(f"{name}: {value:.2g}" for name, value in case["checks"].items())
    told = f"{case['dtype']}, {config}; {case['attended']} tokens attended to. {checks}."
    if r := case.get("reuse"):
        told += (
            f" Planned: {r['layers']} layers over {r['kv_copies']} copies of the KV cache, "
            f"max_reuse {r['max_reuse']}, theta {r['theta']}."
        )
    return told


def details(case: Json) -> list[str]:
    """Every contender of a case."""
    rows = []
    for side in case["sides"]:
        name = {"stage": "… ", "planned": "planned: "}.get(side["role"], "") + side["name"]
        if "error" in side:
            rows.append((name, "-", "-", "", "", _plain(side["error"])))
            continue
        took = [_spread(side[mode], "_us", 1) if mode in side else "-" for mode in MODES]
        moved = f"{side['bytes'] / 1e6:.1f}" if side["bytes"] is not None else ""
        rate = (side.get("graph") or side.get("eager") or {}).get("gb_per_s")
        rows.append((name, *took, moved, f"{rate:.0f}" if rate else "", _plain(_remarks(side))))
    return table(("", "graph, µs", "eager, µs", "MB", "GB/s", "remarks"), rows)


def _remarks(side: Json) -> str:
    parts, share = [], side.get("share_of_tolerance")
    if share is not None:
        right = side["is_baseline"]
        parts.append(f"error {share:.2f} of the budget" if right
                     else f"no baseline: error {share:.3g} × the budget")  # fmt: skip
    if side.get("calls", 1) > 1:
        parts.append(f"a call, of {side['calls']} in a graph")
    return "; ".join(parts + [side[note] for note in ("slow", "graph_error") if note in side])


def _ratio(ratio: Json | None) -> str:
    return _spread(ratio, "", 2) if ratio else "-"


def _spread(figures: dict[str, float], unit: str, digits: int) -> str:
    median, p10, p90 = (f"{figures[name + unit]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({p10}–{p90})"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def side_of(case: Json, name: str) -> Json:
    return next((side for side in case["sides"] if side["name"] == name), {})


def ratio_of(case: Json, of: str, mode: str, role: str) -> Json | None:
    wanted = {"of": of, "mode": mode, "role": role}
    return next((r for r in case["ratios"] if wanted.items() <= r.items()), None)
