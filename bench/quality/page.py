"""The page docs/quality.md, made from bench/results/quality-*.json: no figure is typed by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"

_HEAD = """\
# Quality

How much a model's answers change with selection, and what its options are worth. Made by
`python -m bench.quality page > docs/quality.md` from `bench/results/quality-*.json`, which hold the
figures of every document too. Measure your own model and texts with `make quality`; CONTRIBUTING.md
has the commands.

**Texts.** The King James Bible (`kjv`), Python's documentation by topic without what it says twice
(`pydoc`) and source code of its standard library (`source`), each cut into stretches of 80,000
characters. A document is the first tokens of a stretch. Settings are chosen on the even stretches
and seeds, and reported from the odd ones: *choose* and *report* below share no document and no
number to be found. (*choose-long* was measured before repetitions were left out of `pydoc`, and its
needles all hide one number.)

**Ways.** *dense* is transformers' `sdpa`. A *window* is the first and the newest tokens alone, as
many together as the others of its budget; *window-contiguous* closes the gap between them, so that
no distance is beyond the trained length. Every other way selects, with the options in its table.
A budget of 10 % is that share of the context: sink, votes and window together.

**Figures.** *Perplexity* is over the tokens that are counted, of all documents. *Over dense* is its
ratio to dense attention's, less 1, which a few hundred tokens may well leave below 0; *worst* that
of the worst document. *KL* is that of the next token's distribution from dense attention's, in
nats: its mean, and the largest of a token. *Closer* counts the documents on which that mean is
lower than the first way's of the table. *Agreement* is the share of tokens with the same likeliest
next one. Intervals are of 95 %: Wilson's for shares, and for means those of samples drawn from the
documents themselves, which come out too narrow where documents are few.

**What is causal.** Queries of a chunk choose together what all of them attend to, so in a prompt
that is read sparsely the logits of a token depend on later tokens of its chunk. *Sparse* figures
count such tokens: they are not those of a causal model, and neither is a log-likelihood taken from
such a prompt. Tokens that are fed one by one are causal: *decode*, *reuse* and *mass*, after a
dense prefill, and the answers of *needles* once the prompt has been read.

**Choices.** What the *choose* tables below say, judged by KL, and what came of it.

- The soft vote is closer to dense attention than the hard vote and summed logits: it is the
  default, as in the paper.
- `normalize="candidates"` and a sharper `select_scale` are a little farther on every document. A
  duller one, `scope="group"` and pooling cannot be told from the defaults by these few: the
  defaults stay visible normalisation, the attention's own scale (for which retained mass is
  known), one selection a layer, no pooling.
- At one budget 128 first tokens are a little worse than 16 on every document, and 4 as good; a
  window of 64 to 512 tokens makes no difference, since what matters of it gets votes anyway. So the
  defaults are 16 and 128, not the paper's 128 and 512: of one budget, more is left to votes.
- A `theta` of 0.9 costs little and reuses little; 0.85 and 0.8 cost much more for two and four
  times as much. There is no reuse unless it is asked for.
- A prompt that is read sparsely is much farther from dense attention than one whose decoding is
  sparse, and nearer to a window. The queries of a chunk share one selection there, but smaller
  chunks came no closer in these trials. More means of the queries (`n_query_means`) came a little
  closer on each of three documents, and cost time; the default stays one. Where the first answer
  has to be right, read the prompt densely.
- Past the trained length only *split* scoring found every number in filler; the few needles tried
  do not tell its shares apart, and a quarter of the votes stays. What it is good for is what stands
  far back: going on with a text, *window-contiguous* was better (*sparse-beyond*, one document).
  Fixed scoring alone with the votes of the released code (*released*) found one number of two, and
  none with those of the defaults.

`k=2048` and chunks of 512 are the paper's. On a model of yours, begin with `k` at a tenth of the
context and the other defaults, and look at KL with `make quality`.
"""

_ONLY_CHOSEN = """\
Nothing is reported yet: the tables below are what settings were chosen on, and so flatter them.
"""

_TASKS = {
    "decode": "After a dense prefill of the context, {held} tokens of the text are fed one by one, "
    "from the same cache each way.",
    "reuse": "As decoding, with a Selection Cache in each layer. *Hits* is the share of steps and "
    "layers that reuse a selection.",
    "sparse": "Everything is read by the way itself from the first token on, {chunk} tokens at a "
    "time; tokens from {counted_from:.0%} of the length on are counted. *Beats* is the number of "
    "documents where the way is better than the best window of its size, of those where dense "
    "attention is better than that (beyond the trained length: of all).",
    "needles": "A number is hidden in a text, and asked for at its end; the way reads all of it "
    "and writes the answer, greedily. *Filler* is a few sentences over and over, *natural* one of "
    "the texts, *multikey* filler with {keys} numbers under names, of which one is asked for.",
    "mass": "As decoding, {held} tokens. *Mass* is the share of a head's dense softmax that falls "
    "on its selection. *Overlap* is Jaccard's, of the tokens chosen by vote: between neighbouring "
    "steps, and between neighbouring layers.",
    "speed": "Both sides alternate token by token in one process, over caches of noise.",
    "ruler": "{samples} samples of each task.",
}


def page(results: Path = RESULTS) -> str:
    """The whole page as Markdown; reports first, and by name."""
    reports = [json.loads(p.read_text("utf-8")) for p in sorted(results.glob("quality-*.json"))]
    reports.sort(key=lambda report: (report["settings"]["split"] != "report", report["name"]))
    if not reports:
        return _HEAD + "\nNothing has been measured yet.\n"
    head = [_HEAD]
    if reports[0]["settings"]["split"] != "report":
        head.append(_ONLY_CHOSEN)
    return "\n".join([*head, *map(section, reports)])


def section(report: dict[str, Any]) -> str:
    """One result's part of the page."""
    model, settings = report["model"], report["settings"]
    texts = ", ".join(f"{name} {text['sha']}" for name, text in report["texts"].items())
    trained = "a length not said"
    if model["trained_length"] is not None:
        trained = f"{model['trained_length']:,} tokens"
    lines = [
        f"## {report['name']}: {model['file'] or model['name']}\n",
        f"The split *{settings['split']}*; {report['seconds'] / 3600:.1f} hours in all. "
        f"{'; '.join(map(_ran, report['ran']))}. The model: {model['architecture']}, "
        f"{model['layers']} layers, {model['heads']} heads on {model['kv_heads']}, "
        f"trained for {trained}, {model['dtype']}, sha256 {model['sha256'][:16]}. "
        f"Texts: {texts}. `{report['command']}`\n",
    ]
    if report["missing"]:
        lines.append(f"{report['missing']} cells of these settings have not been run.\n")
    for name, entry in report["entries"].items():
        if not entry["rows"]:
            continue
        said = _TASKS[entry["task"]].format(**entry["settings"])
        lines += [f"### {report['name']}: {name}\n", said + "\n"]
        used = [w for w in entry["settings"]["ways"] if w in settings["ways"]]
        lines += [f"- {way}: {_options(settings['ways'][way])}" for way in used]
        lines += ["", *_SECTIONS[entry["task"]](entry), ""]
    return "\n".join(lines)


def _ran(ran: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
    return (
        f"{ran['cells']} cells on {ran['date']}, on {ran['cpu']}, {ran['threads']} thread(s), "
        f"with {versions} and tokenselect at {ran['commit']}"
    )


def _options(way: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in way.items()) or "the defaults"


# --- one task's tables ---


def _documents(entry: dict[str, Any]) -> list[str]:
    rows = entry["summary"]
    has_reuse = any(row["hit_rate"] is not None for row in rows)
    has_window = entry["task"] == "sparse" and any(row["gains"] is not None for row in rows)
    head = ["context", "way", "budget", "documents", "perplexity", "over dense", "95 %", "worst"]
    head += ["KL", "95 %", "KL, largest", "closer", "agreement"]
    head[3:3] = ["theta", "hits"] * has_reuse
    head += ["beats"] * has_window
    body = []
    for row in rows:
        cells = [f"{row['context']:,}", row["way"], row["budget"], f"{row['documents']}"]
        is_dense = row["way"] == "dense"
        loss, kl = ["" if is_dense else _interval(row[n], f) for n, f in _INTERVALS]
        cells += [f"{row['perplexity']:.3f}", f"{row['loss']:+.2%}", loss, f"{row['worst']:+.2%}"]
        cells += [f"{row['kl']:.4f}", kl, f"{row['kl_max']:.2f}"]
        cells += ["" if row["closer"] is None else f"{row['closer']} of {row['documents']}"]
        cells += [f"{row['agreement']:.1%}"]
        if has_reuse:
            theta, hits = row["theta"], row["hit_rate"]
            cells[3:3] = [
                "" if theta is None else f"{theta:g}",
                "" if hits is None else f"{hits:.1%}",
            ]
        if has_window:
            cells.append("" if row["gains"] is None else f"{row['beats']} of {row['gains']}")
        body.append(cells)
    beyond = any(row.get("within_trained") is False for row in entry["rows"])
    note = "Beyond the trained length, where dense attention is no measure: KL, agreement and the "
    note += "columns over dense say little there."
    return [*([note, ""] if beyond else []), *_table(head, body)]


def _needles(entry: dict[str, Any]) -> list[str]:
    depths = sorted({row["depth"] for row in entry["summary"] if row["depth"] is not None})
    head = ["in", "tokens", "way", "budget", "right", "95 %", *(f"at {d:.0%}" for d in depths)]
    body = []
    at = {
        (r["hidden"], r["context"], r["way"], r["budget"], r["depth"]): f"{r['right']}/{r['tries']}"
        for r in entry["summary"]
    }
    for row in entry["summary"]:
        if row["depth"] is None:
            key = (row["hidden"], row["context"], row["way"], row["budget"])
            cells = [key[0], f"{key[1]:,}", *key[2:], f"{row['right']} of {row['tries']}"]
            cells.append(f"{row['low']:.0%} to {row['high']:.0%}")
            body.append(cells + [at.get((*key, depth), "") for depth in depths])
    return _table(head, body)


def _mass(entry: dict[str, Any]) -> list[str]:
    head = ["context", "way", "budget", "documents", "mass", "least of a head"]
    head += ["overlap of steps", "of layers"]
    body = [
        [f"{r['context']:,}", r["way"], r["budget"], f"{r['documents']}"]
        + [_number(r[name]) for name in ("mass", "least_of_a_head", "by_step", "neighbours")]
        for r in entry["summary"]
    ]
    return _table(head, body)


def _speed(entry: dict[str, Any]) -> list[str]:
    times = [row for row in entry["summary"] if "sides" in row]
    memory = [row for row in entry["summary"] if "peak_mib" in row]
    lines: list[str] = []
    if times:
        bases = [name for name in times[0]["sides"][0] if name.startswith("of ")]
        body = [
            [f"{row['context']:,}", side["name"], f"{1e3 * side['median']:.1f}"]
            + [f"{1e3 * side['least']:.1f} to {1e3 * side['largest']:.1f}"]
            + [f"{side[base]:.3f}" for base in bases]
            for row in times
            for side in row["sides"]
        ]
        lines += _table(["cached", "", "ms a token", "least to largest", *bases], body)
    if memory:
        lines += [
            "",
            "Memory that one prefill of *new* tokens on top of *cached* ones adds at most to a "
            "process of its own, in which the cache has its room already.",
            "",
        ]
        body = [
            [f"{r['new']:,}", f"{r['cached']:,}", r["way"], r["budget"]]
            + [f"{r[name]:.0f}" for name in ("peak_mib", "cache_mib")]
            for r in memory
        ]
        lines += _table(["new", "cached", "way", "budget", "peak, MiB", "cache, MiB"], body)
    return lines


def _ruler(entry: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(row["ruler"] for row in entry["summary"]))
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in entry["summary"]:
        key = (row["context"], row["way"], row["budget"])
        found.setdefault(key, {})[row["ruler"]] = _number(row.get("score"))
    body = [
        [f"{key[0]:,}", *key[1:], *(scores.get(name, "") for name in names)]
        for key, scores in found.items()
    ]
    return _table(["tokens", "way", "budget", *names], body)


_SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "decode": _documents,
    "reuse": _documents,
    "sparse": _documents,
    "needles": _needles,
    "mass": _mass,
    "speed": _speed,
    "ruler": _ruler,
}


_INTERVALS = (("loss_95", "+.1%"), ("kl_95", ".4f"))


def _interval(ends: Sequence[float], form: str) -> str:
    return " to ".join(format(end, form) for end in ends)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
