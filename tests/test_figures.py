"""Figures of time in README.md and docs/native.md are those of bench/results, rounded once.

What a model's answers change by is looked at in tests/test_quality.py.
"""

import json
from typing import Any

import pytest

from tests import fresh

RESULTS = fresh.ROOT / "bench" / "results"
# What the second did not measure is of the first.
H100 = "2026-11-27-0751-nvidia-h100-80gb-hbm3-gpu", "2026-11-28-0302-nvidia-h100-80gb-hbm3-gpu"
CPUS = {
    "Intel Xeon": "2026-11-27-native-xeon-amx-1-thread",
    "AMD Zen 3": "2026-11-27-native-epyc-zen3-1-thread",
    "AMD Zen 5": "2026-11-21-cpu-epyc-zen5",
}
TWO_THREADS = ("2026-11-27-native-xeon-amx-2-threads", "2026-11-27-native-epyc-zen3-2-threads")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return result


def readme() -> str:
    return " ".join((fresh.ROOT / "README.md").read_text("utf-8").split())


def row(machine: str) -> list[str]:
    """The cells of the table of speed: selected, reused, chunk."""
    (line,) = (x for x in (fresh.ROOT / "README.md").read_text("utf-8").splitlines()
               if x.startswith(f"| {machine}"))  # fmt: skip
    return [cell.strip() for cell in line.strip("|").split("|")[2:]]


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


@pytest.mark.parametrize("machine", CPUS)
def test_the_readme_says_what_was_measured_on_a_cpu(machine: str) -> None:
    result = load(CPUS[machine])
    first, last = {"AMD Zen 5": ("decode-128k", "decode-1m")}.get(
        machine, ("decode-32k", "decode-128k")
    )
    selected, reused, chunk = row(machine)
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
    text = readme()
    found = {
        (t["cell"], t["of"]): t["graph"]
        for t in (*older["targets"], *result["targets"])
        if t["what"] == "speed-up" and t["graph"] is not None
    }
    selected, reused, chunk = row("H100")
    short, long = "decode 32/8/128 n 128K B 1", "decode 32/8/128 n 1M B 1"
    said = f"{found[short, 'fresh']:.2f}x; {found[long, 'fresh']:.2f}x at 1,048,576"
    assert selected == said
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
