"""Figures of time in README.md and docs/ are those of bench/results, rounded once.

What a model's answers change by is looked at in tests/test_quality.py.
"""

import json
import re
from typing import Any

import pytest

from tests import fresh

RESULTS = fresh.ROOT / "bench" / "results"
# What the second did not measure is of the first.
H100 = "2026-11-27-0751-nvidia-h100-80gb-hbm3-gpu", "2026-11-28-0302-nvidia-h100-80gb-hbm3-gpu"
CPUS = {
    "Intel Xeon": "2026-11-28-native-xeon-amx-1-thread",
    "AMD Zen 3": "2026-11-27-native-epyc-zen3-1-thread",
    "AMD Zen 5": "2026-11-21-cpu-epyc-zen5",
}
TWO_THREADS = ("2026-11-28-native-xeon-amx-2-threads", "2026-11-27-native-epyc-zen3-2-threads")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return result


def page(name: str) -> str:
    return " ".join((fresh.ROOT / name).read_text("utf-8").split())


def row(machine: str) -> list[str]:
    """The cells of the table of speed: from where it pays, selected, reused, chunk."""
    (line,) = (x for x in (fresh.ROOT / "README.md").read_text("utf-8").splitlines()
               if x.startswith(f"| {machine}"))  # fmt: skip
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def times(ratio: float) -> str:
    """A ratio as the table has it: two digits, or whole from ten on."""
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def ratio(result: dict[str, Any], workload: str, of: str) -> float | None:
    """The time over the best dense attention's; None: not measured."""
    for one in result["workloads"]:
        if one["name"] == workload:
            (found,) = (r for r in one["ratios"] if (r["of"], r["role"]) == (of, "best dense"))
            return float(found["median"])
    return None


def shortest(result: dict[str, Any], of: str) -> str:
    """The fewest tokens measured at which a decode step is faster than dense attention."""
    lengths = {"decode-32k": 32_768, "decode-128k": 131_072, "decode-1m": 1_048_576}
    found = {n: ratio(result, name, of) for name, n in lengths.items()}
    return f"{min(n for n, over in found.items() if over is not None and over < 1):,}"


@pytest.mark.parametrize("machine", CPUS)
def test_the_readme_says_what_was_measured_on_a_cpu(machine: str) -> None:
    result = load(CPUS[machine])
    first, last = {"AMD Zen 5": ("decode-128k", "decode-1m")}.get(
        machine, ("decode-32k", "decode-128k")
    )
    pays, selected, reused, chunk = row(machine)
    assert pays.startswith(f"{shortest(result, 'fresh')} tokens")
    if machine == "AMD Zen 5":
        assert pays.endswith(f"; reused, {shortest(result, 'reused')}")
    else:
        small = ratio(result, "smollm2-8k-tenth", "fresh")
        assert small is not None
        assert small < 1
        assert pays.endswith("; 8,192 with 9/3/64, float32, a tenth selected")
    for cell, of in ((selected, "fresh"), (reused, "reused")):
        for workload, said in zip((first, last), cell.split("; "), strict=True):
            found = ratio(result, workload, of)
            assert found is not None
            if said.startswith("over "):
                assert 1 / found > float(said.removeprefix("over ").rstrip("x"))
            else:
                assert said.split(" ")[0] == times(1 / found), (machine, workload, of)
    of_chunk = ratio(result, "prefill-128k", "fresh")
    assert bool(chunk) == (of_chunk is not None)
    assert of_chunk is None or chunk.split(",")[0] == times(1 / of_chunk)


def test_the_readme_says_what_was_measured_on_a_gpu() -> None:
    older, result = map(load, H100)
    text = page("README.md")
    found = {
        (t["cell"], t["of"]): t["graph"]
        for t in (*older["targets"], *result["targets"])
        if t["what"] == "speed-up" and t["graph"] is not None
    }
    pays, selected, reused, chunk = row("H100")
    short, long = "decode 32/8/128 n 128K B 1", "decode 32/8/128 n 1M B 1"
    said = f"{found[short, 'fresh']:.2f}x; {found[long, 'fresh']:.2f}x at 1,048,576"
    assert selected == said
    graph, before = (
        {
            cell["name"]: one["median"]
            for cell in run["cells"]
            for one in cell["ratios"]
            if (one["of"], one["mode"], one["role"]) == ("fresh", "graph", "dense")
        }
        for run in (result, older)
    )
    lengths = {"32K": 32_768, "128K": 131_072, "512K": 524_288}

    def from_where(heads: str) -> str:
        gains = (n for k, n in lengths.items() if graph[f"decode {heads} n {k} B 1"] > 1)
        return f"{min(gains):,}"

    assert pays == f"{from_where('32/8/128')} tokens"
    assert long not in graph
    (was_hit,) = (
        t["graph"]
        for t in older["targets"]
        if (t["cell"], t["of"], t["what"]) == (short, "hit", "speed-up")
    )
    was = before[short], was_hit, before["prefill 32/8/128 n 128K B 1 Lq 512"]
    assert "at 131,072 tokens the older run had {:.2f}x, {:.1f}x and {:.1f}x.".format(*was) in text
    of_28 = [graph[f"decode 28/4/128 n {n} B 1"] for n in ("128K", "512K")]
    assert "28/4/128 is at {:.2f}x at 131,072 tokens and {:.2f}x at 524,288;".format(*of_28) in text
    assert f"28/4/128 heads before {from_where('28/4/128')} tokens" in page("docs/speed.md")
    of_9 = {name: over for name, over in graph.items() if " 9/3/64 " in name}
    best = max(of_9, key=lambda name: of_9[name])
    assert best.endswith(" B 8")
    said = (
        f"at {of_9['decode 9/3/64 n 1M B 1']:.2f}x at 1,048,576, and at {of_9[best]:.2f}x at best"
    )
    assert said in text
    assert reused == f"{times(found[short, 'hit'])}; {times(found[long, 'hit'])}"
    chunks = [found[f"prefill 32/8/128 n {n} B 1 Lq 512", "fresh"] for n in ("128K", "1M")]
    assert chunk == f"{chunks[0]:.1f}x; {times(chunks[1])}"
    ms = {side["name"]: side["median_ms"] for side in result["model"]["sides"]}
    called, uncopied, stock = (
        ms[name]
        for name in (
            "selected, TokenSelectCache, called",
            "sdpa, TokenSelectCache, called",
            "stock sdpa, DynamicCache, called",
        )
    )
    assert f"takes {called:.1f} ms per token with selection and {uncopied:.1f} without" in text
    assert f"{stock:.1f} with stock's" in text
    taken = [ms[name] for name in ("selected, captured", "reused, captured")]
    dense = ms["sdpa cudnn, cache in place, captured"]
    assert f"{taken[0]:.2f} ms, {taken[1]:.2f} with reused selections, {dense:.2f} dense" in text
    (cell,) = (one for one in result["cells"] if one["name"] == short)
    eager = {
        side["name"]: side["eager"]["median_us"] / 1e3 for side in cell["sides"] if "eager" in side
    }
    (over,) = {r["to"] for r in cell["ratios"] if (r["of"], r["mode"], r["role"])
               == ("fresh", "eager", "dense")}  # fmt: skip
    assert f"({eager['fresh']:.2f} ms against {eager[over]:.2f} dense at 131,072 tokens)" in text


def test_the_page_of_native_says_what_was_measured() -> None:
    page = (fresh.ROOT / "docs" / "native.md").read_text("utf-8")
    xeon, zen3 = (load(CPUS[machine]) for machine in ("Intel Xeon", "AMD Zen 3"))
    columns = (xeon, load(TWO_THREADS[0]), zen3, load(TWO_THREADS[1]))
    seen = 0
    for line in page.splitlines():
        workload, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) != 4 or ratio(xeon, workload, "fresh") is None:
            continue
        for result, cell in zip(columns, cells, strict=True):
            fresh_one, reused = (ratio(result, workload, of) for of in ("fresh", "reused"))
            if fresh_one is not None and reused is not None:
                assert cell == f"{fresh_one:.2f}, {reused:.3f}", (workload, cell)
                seen += 1
            else:
                assert not cell
    assert seen > 20


def test_what_is_said_of_loops_of_our_own() -> None:
    (cell,) = (w for w in load(CPUS["Intel Xeon"])["workloads"] if w["name"] == "decode-128k")
    ms = {one["name"]: one["median_ms"] for one in cell["contenders"]}
    (dense,) = {r["to"] for r in cell["ratios"] if r["role"] == "best dense"}
    ours = ms["everything"]
    said = f"take {ours / ms[dense]:.1f} of its time on the Xeon, and selecting takes"
    assert f"{said} {ms['fresh'] / ours:.2f} of theirs at 131,072 tokens" in page("README.md")


def test_the_readme_says_how_often_selections_are_reused() -> None:
    reuse = load("quality-report")["entries"]["reuse"]["summary"]
    (hits,) = (row["hit_rate"] for row in reuse if row["theta"] == 0.9)
    assert round(1 / hits) == 8
    assert "SmolLM2 reuses one selection in eight" in page("README.md")


def test_the_page_of_transformers_has_the_times_of_lossless_decoding() -> None:
    said, same = page("docs/tutorials/transformers.md"), {"time": 0, "prompts": 0}
    for name in ("lossless", "lossless-yarn"):
        for task, entry in load(f"quality-report-{name}")["entries"].items():
            for stock, uncopied, ours in zip(*[iter(entry["summary"])] * 3, strict=True):
                assert ours["same"] == ours["texts"]
                same[task] += ours["texts"]
                ms = " | ".join(f"{one['ms']:.0f}" for one in (stock, uncopied, ours))
                line = (
                    f"| {ours['context']:,} | {ms} | {ours['of sdpa, DynamicCache']:.2f} | "
                    f"{ours['drafted']:.1f}, {ours['accepted']:.1f} |"
                )
                assert task == "prompts" or line in said
    assert f"All {same['time']} texts of 48 tokens and all {same['prompts']} of 24" in said


def test_the_readme_has_the_figures_of_peers_that_the_page_of_native_has() -> None:
    text = (fresh.ROOT / "docs" / "native.md").read_text("utf-8")
    ms = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \(", text, re.MULTILINE))
    names = "a tenth selected", "sdpa, `DynamicCache`", "sdpa, `TokenSelectCache`"
    tenth, stock, uncopied = (round(float(ms[f"transformers, {name}"])) for name in names)
    assert (
        f"{tenth} ms with a tenth of them selected, {stock} with stock `sdpa`, {uncopied} with"
        in page("README.md")
    )
    assert f"takes {round(float(ms['llama.cpp']))}." in page("README.md")
    command = "`make bench-peers ARGS='--contexts 8192 --rounds 9'`"
    assert command in page("README.md")
    assert command in text


def test_the_page_of_serving_says_what_a_call_takes() -> None:
    (cell,) = (w for w in load(CPUS["Intel Xeon"])["workloads"] if w["name"] == "decode-32k")
    ms = {one["name"]: one["median_ms"] for one in cell["contenders"]}
    (dense,) = {r["to"] for r in cell["ratios"] if r["role"] == "best dense"}
    said = f"the call itself takes {ms['fresh']:.1f} ms on one thread, and the fastest of torch's"
    assert f"{said} dense attention {ms[dense]:.1f}" in page("docs/serving.md")
