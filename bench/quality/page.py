"""The tables of docs/quality.md, made from bench/results/quality-*.json: no figure is typed."""

import json
from pathlib import Path
from typing import Any

from bench.page import RESULTS
from bench.quality.figures import Row, grouped
from bench.tables import of_columns

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
    "of the texts.",
    "mass": "As decoding, {continuation} tokens. *Mass* is the share of a head's dense softmax "
    "that falls on its selection. *Overlap* is Jaccard's, of the tokens chosen by vote: between "
    "neighbouring steps, and between neighbouring layers.",
    "lossless": "After a context that was read densely, {new_tokens} tokens are written greedily, "
    "by stock attention, and by `Lossless` from a variant's drafts, in turns from equal caches; "
    "{turns} times in all, each after that many more tokens of the text. *Drafted* and *accepted* "
    "are of a round; *same tokens* as the first way's.",
    "speed": "The contenders alternate token by token in one process, over caches of noise.",
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
    yarn = model.get("yarn") or 1
    trained = "a length not said" if length is None else f"{length / yarn:,.0f} tokens"
    trained += f", made to read {yarn:g} times as many by YaRN" if yarn != 1 else ""
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
        if not entry["rows"]:
            continue
        lines += [f"### {name}: {task}\n", _TASKS[entry["task"]].format(**entry["settings"]) + "\n"]
        for variant in entry["settings"]["variants"]:
            if variant in settings["variants"]:
                of = settings["variants"][variant].items()
                options = ", ".join(f"`{option}={value}`" for option, value in of)
                lines.append(f"- {variant}: {options or 'the defaults'}")
        lines += ["", *_tables(entry["task"], entry), ""]
    return "\n".join(lines)


# --- the columns: a head, and a form that the rows fill ---

_BY = ("variant", "{variant}"), ("budget", "{budget}")
_DOCUMENTS = (
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
)
_NEEDLES = (
    *(("in", "{hidden}"), ("tokens", "{context:,}"), *_BY, ("right", "{right} of {tries}")),
    ("95 %", "{low:.0%} to {high:.0%}"),
)
_MASS = (
    *(("context", "{context:,}"), *_BY, ("documents", "{documents}"), ("mass", "{mass:.3f}")),
    ("least of a head", "{least_of_a_head:.3f}"),
    ("overlap of steps", "{by_step:.3f}"),
    ("of layers", "{neighbours:.3f}"),
)
_TIMES = (
    *(("cached", "{context:,}"), ("", "{name}"), ("ms a token", "{median:.1f}")),
    ("least to largest", "{least:.1f} to {largest:.1f}"),
)
_DRAFTS = (
    *(("cached", "{context:,}"), ("", "{name}"), ("ms a token", "{ms:.1f}")),
    *(("drafted a round", "{drafted:.1f}"), ("accepted", "{accepted:.1f}")),
    ("same tokens", "{same} of {texts} texts"),
)
_MEMORY = (
    *(("new", "{new:,}"), ("cached", "{cached:,}"), *_BY),
    *(("peak, MiB", "{peak_mib:.0f}"), ("cache, MiB", "{cache_mib:.0f}")),
)
_SAYS_OF_MEMORY = (
    "Memory that one prefill of *new* tokens on top of *cached* ones adds at most to a process of "
    "its own, in which the cache has its room already."
)
_BEYOND = (
    "Beyond the trained length, where dense attention is no measure: KL, agreement and the columns "
    "over dense say little there."
)


def _tables(kind: str, entry: dict[str, Any]) -> list[str]:
    """Return one task's tables."""
    rows: list[Row] = entry["summary"]
    if kind == "mass":
        return of_columns(rows, _MASS, unknown="not known")
    if kind == "needles":
        groups = grouped(rows, ("hidden", "context", "variant", "budget"))
        body = [
            {**every, **{f"at {r['depth']:.0%}": f"{r['right']}/{r['tries']}" for r in at}}
            for _, (every, *at) in groups
        ]
        depths = sorted({r["depth"] for r in rows if r["depth"] is not None})
        heads = [f"at {depth:.0%}" for depth in depths]
        return of_columns(body, (*_NEEDLES, *((head, f"{{{head}}}") for head in heads)))
    if kind == "speed":
        ms = ("median", "least", "largest")
        timed = [
            {**row, **c, **{name: 1e3 * c[name] for name in ms}}
            for row in rows
            for c in row.get("contenders", ())
        ]
        bases = [name for name in (timed or [{}])[0] if name.startswith("of ")]
        memory = of_columns([r for r in rows if "peak_mib" in r], _MEMORY)
        above = ["", _SAYS_OF_MEMORY, ""] if memory else []
        times = (*_TIMES, *((base, f"{{{base}:.3f}}") for base in bases))
        return of_columns(timed, times) + above + memory
    if kind == "lossless":
        bases = [name for name in (rows or [{}])[0] if name.startswith("of ")]
        return of_columns(rows, (*_DRAFTS, *((base, f"{{{base}:.3f}}") for base in bases)))
    rows = [
        {**r, **dict.fromkeys(("loss_95", "kl_95") if r["variant"] == "dense" else ())}
        for r in rows
    ]
    is_reuse = any(r["hit_rate"] is not None for r in rows)
    is_beside = kind == "sparse" and any(r["gains"] is not None for r in rows)
    is_beyond = any(r.get("within_trained") is False for r in entry["rows"])
    return [_BEYOND, ""] * is_beyond + of_columns(
        rows,
        (
            *(("context", "{context:,}"), *_BY),
            *(("theta", "{theta:g}"), ("hits", "{hit_rate:.1%}")) * is_reuse,
            *_DOCUMENTS,
            *(("beats", "{beats} of {gains}"),) * is_beside,
        ),
    )
