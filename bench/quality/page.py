"""The tables of docs/quality.md, made from bench/results/quality-*.json: no figure is typed."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from bench.quality.figures import grouped

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
# What is above it on the page is written by hand.
MARK = "<!-- From here on made by python -m bench.quality page -->\n"

_TASKS = {
    "decode": "After a dense prefill of the context, {continuation} tokens of the text are fed one "
    "by one, from the same cache for each variant.",
    "reuse": "As decoding, with a Selection Cache in each layer. *Hits* is the share of steps and "
    "layers that reuse a selection.",
    "sparse": "Everything is read by the variant itself from the first token on, {chunk} tokens at "
    "a time; tokens from {counted_from:.0%} of the length on are counted. *Beats* is the number of "
    "documents where the variant is better than the best window of its size, of those where dense "
    "attention is better than that (beyond the trained length: of all).",
    "needles": "A number is hidden in a text, and asked for at its end; the variant reads all of "
    "it and writes the answer, greedily. *Filler* is a few sentences over and over, *natural* one "
    "of the texts, *multikey* filler with {keys} numbers under names, of which one is asked for.",
    "mass": "As decoding, {continuation} tokens. *Mass* is the share of a head's dense softmax "
    "that falls on its selection. *Overlap* is Jaccard's, of the tokens chosen by vote: between "
    "neighbouring steps, and between neighbouring layers.",
    "speed": "The contenders alternate token by token in one process, over caches of noise.",
    "ruler": "{samples} samples of each task.",
}


def page(results: Path = RESULTS) -> str:
    """Return what stands below MARK; reports first, and by name."""
    reports = [json.loads(p.read_text("utf-8")) for p in results.glob("quality-*.json")]
    reports.sort(key=lambda report: (report["settings"]["split"] != "report", report["name"]))
    return "\n".join(map(section, reports))


def write() -> None:
    """Put the tables on the page."""
    by_hand, mark, _ = PAGE.read_text("utf-8").partition(MARK)
    PAGE.write_text(by_hand + mark + "\n" + page(), encoding="utf-8")


def section(report: dict[str, Any]) -> str:
    """Return one result's part of the page."""
    model, settings, name = report["model"], report["settings"], report["name"]
    texts = ", ".join(f"{text} {facts['sha']}" for text, facts in report["texts"].items())
    length = model["trained_length"]
    trained = "a length not said" if length is None else f"{length:,} tokens"
    ran = (
        f"{r['cases']} cases on {r['date']}, on {r['cpu']}, {r['threads']} thread(s), with "
        f"{', '.join(f'{package} {version}' for package, version in r['versions'].items())} and "
        f"tokenselect at {r['commit']}"
        for r in report["ran"]
    )
    lines = [
        f"## {name}: {model['file'] or model['name']}\n",
        f"The split *{settings['split']}*; {report['seconds'] / 3600:.1f} hours in all. "
        f"{'; '.join(ran)}. The model: {model['architecture']}, "
        f"{model['layers']} layers, {model['heads']} heads on {model['kv_heads']}, "
        f"trained for {trained}, {model['dtype']}, sha256 {model['sha256'][:16]}. "
        f"Texts: {texts}. `{report['command']}`\n",
    ]
    if report["missing"]:
        lines.append(f"{report['missing']} cases of these settings have not been run.\n")
    for task, entry in report["entries"].items():
        if entry["rows"]:
            said = _TASKS[entry["task"]].format(**entry["settings"])
            lines += [f"### {name}: {task}\n", said + "\n"]
            for variant in entry["settings"]["variants"]:
                if variant in settings["variants"]:
                    of = settings["variants"][variant].items()
                    options = ", ".join(f"`{option}={value}`" for option, value in of)
                    lines.append(f"- {variant}: {options or 'the defaults'}")
            lines += ["", *_TABLES[entry["task"]](entry), ""]
    return "\n".join(lines)


# --- one task's tables ---


def _documents(entry: dict[str, Any]) -> list[str]:
    rows = [
        row | {"loss_95": None, "kl_95": None} if row["variant"] == "dense" else row
        for row in entry["summary"]
    ]
    reuse = any(row["hit_rate"] is not None for row in rows)
    beats = entry["task"] == "sparse" and any(row["gains"] is not None for row in rows)
    note = "Beyond the trained length, where dense attention is no measure: KL, agreement and the "
    note += "columns over dense say little there."
    beyond = any(row.get("within_trained") is False for row in entry["rows"])
    return [note, ""] * beyond + _table(
        rows,
        *_VARIANT,
        *[("theta", "{theta:g}"), ("hits", "{hit_rate:.1%}")] * reuse,
        ("documents", "{documents}"),
        ("perplexity", "{perplexity:.3f}"),
        ("over dense", "{loss:+.2%}"),
        ("95 %", "{loss_95[0]:+.1%} to {loss_95[1]:+.1%}"),
        ("worst", "{worst:+.2%}"),
        ("KL", "{kl:.4f}"),
        ("95 %", "{kl_95[0]:.4f} to {kl_95[1]:.4f}"),
        ("KL, largest", "{kl_max:.2f}"),
        ("closer", "{closer} of {documents}"),
        ("agreement", "{agreement:.1%}"),
        *[("beats", "{beats} of {gains}")] * beats,
    )


def _needles(entry: dict[str, Any]) -> list[str]:
    depths = sorted({row["depth"] for row in entry["summary"] if row["depth"] is not None})
    body = []
    for _, (every, *rows) in grouped(entry["summary"], ("hidden", "context", "variant", "budget")):
        at = {f"at {row['depth']:.0%}": f"{row['right']}/{row['tries']}" for row in rows}
        body.append(every | at)
    return _table(
        body,
        ("in", "{hidden}"),
        ("tokens", "{context:,}"),
        *_VARIANT[1:],
        ("right", "{right} of {tries}"),
        ("95 %", "{low:.0%} to {high:.0%}"),
        *((f"at {depth:.0%}", f"{{at {depth:.0%}}}") for depth in depths),
    )


def _mass(entry: dict[str, Any]) -> list[str]:
    return _table(
        entry["summary"],
        *_VARIANT,
        ("documents", "{documents}"),
        ("mass", "{mass:.3f}"),
        ("least of a head", "{least_of_a_head:.3f}"),
        ("overlap of steps", "{by_step:.3f}"),
        ("of layers", "{neighbours:.3f}"),
        unknown="not known",
    )


def _speed(entry: dict[str, Any]) -> list[str]:
    ms = ("median", "least", "largest")
    times = [
        row | c | {name: 1e3 * c[name] for name in ms}
        for row in entry["summary"]
        for c in row.get("contenders", ())
    ]
    bases = [name for name in times[0] if name.startswith("of ")] if times else []
    lines = _table(
        times,
        ("cached", "{context:,}"),
        ("", "{name}"),
        ("ms a token", "{median:.1f}"),
        ("least to largest", "{least:.1f} to {largest:.1f}"),
        *((base, f"{{{base}:.3f}}") for base in bases),
    )
    memory = [row for row in entry["summary"] if "peak_mib" in row]
    note = "Memory that one prefill of *new* tokens on top of *cached* ones adds at most to a "
    note += "process of its own, in which the cache has its room already."
    return (
        lines
        + ["", note, ""] * bool(memory)
        + _table(
            memory,
            ("new", "{new:,}"),
            ("cached", "{cached:,}"),
            *_VARIANT[1:],
            ("peak, MiB", "{peak_mib:.0f}"),
            ("cache, MiB", "{cache_mib:.0f}"),
        )
    )


def _ruler(entry: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(row["ruler"] for row in entry["summary"])
    body = [
        of | {row["ruler"]: row["score"] for row in rows}
        for of, rows in grouped(entry["summary"], ("context", "variant", "budget"))
    ]
    scores = ((name, f"{{{name}:.3f}}") for name in names)
    return _table(body, ("tokens", "{context:,}"), *_VARIANT[1:], *scores)


_VARIANT = (("context", "{context:,}"), ("variant", "{variant}"), ("budget", "{budget}"))
_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    **dict.fromkeys(("decode", "reuse", "sparse"), _documents),
    "needles": _needles,
    "mass": _mass,
    "speed": _speed,
    "ruler": _ruler,
}


def _table(
    rows: Sequence[Mapping[str, Any]], *columns: tuple[str, str], unknown: str = ""
) -> list[str]:
    """Return a table of columns: a head, and what of a row goes under it, `unknown` for None."""

    def filled(form: str, row: Mapping[str, Any]) -> str:
        names = [name.partition("[")[0] for _, name, _, _ in Formatter().parse(form) if name]
        is_known = all(row.get(name) is not None for name in names)
        return form.format(**row) if is_known else unknown

    lines = [[head for head, _ in columns], ["---"] * len(columns)]
    lines += [[filled(form, row) for _, form in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []
