"""The explorer: its page selects in a browser as the library does, at settings never recorded."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenselect
from tests import fresh
from tests.models import SIZES, THE_OLD_NAME, model_of, put, tokens
from tokenselect import InvalidProblem, SelectConfig, SelectionCache
from tokenselect.explore.__main__ import main
from tokenselect.explore.page import draw, quantised, read_back
from tokenselect.explore.record import Trace, record

pytestmark = [pytest.mark.filterwarnings(THE_OLD_NAME), pytest.mark.usefixtures("no_grad")]

STEPS, MAX_REUSE = 6, 2
CONFIG = SelectConfig(k=8, n_sink=2, n_local=4)
# What is moved from the recorded settings, in the order in which the page gets it.
MOVES: list[dict[str, Any]] = [
    {},
    {"step": 0, "layer": 0},
    {"k": 3},
    {"k": 0, "step": 4},
    {"n_sink": 0, "n_local": 1, "k": 20},
    {"n_sink": 30, "n_local": 40},  # they meet
    {"k": 5, "n_sink": 1, "n_local": 2, "reuse": True, "theta": 0.4},
    *({"step": 3, "theta": theta / 20} for theta in range(20)),
    {"step": 5, "layer": 1, "theta": 0.0},
]
SCRIPT = """
const found = [];
for (const move of MOVES) {
  for (const [id, to] of Object.entries(move))
    if (id === "reuse") element(id).checked = to; else set(id, to);
  element("k").dispatchEvent(new Event("input", { bubbles: true }));
  const rows = [...element("ways").tBodies[0].rows];
  const [, mass, bound, measured] = rows.map((row) => row.cells[2].innerText);
  const read = [...document.querySelectorAll("#text-selected .read:not([hidden])")];
  found.push({ read: read.map((span) => Number(span.dataset.position)), mass, bound, measured });
}
const said = element("exact").textContent.slice(0, 19);
document.body.innerHTML = "<pre>" + JSON.stringify({ said, found }) + "</pre>";
"""


def make_trace(theta: float | None = None, family: str = "llama") -> Trace:
    ids = tokens(1, 60)[0].tolist()
    return record(model_of(family), ids, STEPS, CONFIG, theta=theta, max_reuse=MAX_REUSE)


def make_votes_equal(trace: Trace, layer: int, t: int) -> None:
    """Let a step ask for nothing, as if it had been recorded so."""
    one, n = trace.layers[layer], trace.context + t + 1
    one.queries[t] = torch.zeros_like(one.queries[t])
    cached = one.keys[:, :, :n], one.values[:, :, :n]
    config = {"config": CONFIG, "backend": "reference", "return_info": True}
    out, one.infos[t] = tokenselect.attention(one.queries[t], *cached, **config, **one.options)
    one.outputs[t] = out[0, :, 0]


def drawn(trace: Trace) -> str:
    return draw(trace, lambda token: f" </w{token}>", model="a & b", title="a <text>")


def in_browser(page: str, tmp_path: Path) -> dict[str, Any]:
    """What the page says of itself, and what it shows after each of MOVES."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("NOT TESTED: the explorer in a browser; there is no chromium here")
    path = tmp_path / "page.html"
    script = SCRIPT.replace("MOVES", json.dumps(MOVES))
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=fresh.HANG,
        check=True,
    )
    shown = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert shown is not None, "the page's script failed: " + done.stdout[-2000:]
    return json.loads(shown[1])


def expected(trace: Trace, s: dict[str, Any]) -> tuple[list[int], torch.Tensor, float]:
    """What the library selects at these settings, the mass, and the largest error."""
    layer = list(trace.layers.values())[s["layer"]]
    cache = SelectionCache(s["theta"], max_reuse=MAX_REUSE) if s["reuse"] else None
    for t in range(s["step"] + 1):
        n, query = trace.context + t + 1, layer.queries[t]
        keys, values = layer.keys[:, :, :n], layer.values[:, :, :n]
        chosen = {name: s[name] for name in ("k", "n_sink", "n_local")}
        more = {"backend": "reference", **layer.options}
        out, info = tokenselect.attention(
            query, keys, values, **chosen, **more, cache=cache, return_info=True
        )
    dense, all_info = tokenselect.attention(query, keys, values, n, **more, return_info=True)
    positions = info.selection.positions[0, 0, : int(info.selection.count)]
    mass = (info.lse - all_info.lse)[0, :, 0].exp()
    return positions.tolist(), mass, float((out - dense).abs().max())


@pytest.mark.parametrize(("family", "theta"), [("llama", None), ("gemma2", 0.5)])
def test_the_page_selects_as_the_library_does(
    tmp_path: Path, family: str, theta: float | None
) -> None:
    trace = make_trace(theta, family)
    if theta is None:
        make_votes_equal(trace, 0, 4)
    shown = in_browser(drawn(trace), tmp_path)
    n_selections = len(trace.layers) * STEPS
    assert shown["said"].startswith(f"{n_selections} of {n_selections} ")
    s: dict[str, Any] = {"step": STEPS - 1, "reuse": theta is not None, "theta": theta}
    s |= {name: CONFIG[name] for name in ("k", "n_sink", "n_local")}
    # The page begins with the layer in which a window keeps least: either will do.
    first = shown["found"][0]["read"]
    s["layer"] = next(
        i for i in range(len(trace.layers)) if expected(trace, s | {"layer": i})[0] == first
    )
    for move, one in zip(MOVES, shown["found"], strict=True):
        s |= move
        s["layer"] = min(s["layer"], len(trace.layers) - 1)  # as far as the slider goes
        positions, mass, error = expected(trace, s)
        assert one["read"] == positions, s
        assert abs(float(one["mass"].rstrip("%")) - 100 * float(mass.mean())) < 0.051
        assert error <= 1.05 * float(one["bound"]) + 1e-6, s  # two digits are shown
        if not move:
            assert float(one["measured"]) == pytest.approx(error, rel=0.05)


def test_the_page_says_so_where_it_selects_otherwise(tmp_path: Path) -> None:
    trace = make_trace()
    info = trace.layers[1].infos[2]
    moved = info.selection.positions.clone()
    moved[0, 0, 5] += 1
    selection = info.selection._replace(positions=moved)
    trace.layers[1].infos[2] = info._replace(selection=selection)
    assert in_browser(drawn(trace), tmp_path)["said"].startswith("11 of 12 ")


def test_a_page_needs_nothing_else() -> None:
    page = drawn(make_trace())
    assert not re.search(r"https?:|<link|\b(src|@import)\b|url\(", page)
    assert "a &lt;text&gt;" in page
    assert "</w" not in page  # no text can end the script that it stands in
    assert page.count("</script>") == 2


def test_weights_survive_eight_bits() -> None:
    logits = 4 * torch.randn(5, 400)
    logits[0, 3], logits[1, :] = -torch.inf, 2.0
    ranges, codes = quantised(logits)
    off = (read_back(ranges, codes) - logits.softmax(1)).abs()
    assert off.max() < 0.01
    assert read_back(ranges, codes)[0, 3] < 1e-8


def test_a_command_makes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model_of("llama").config
    config.update({**SIZES, "vocab_size": 256})
    model = put(tmp_path / "model", config)
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("In the beginning was the word. " * 20)
    arguments = ["--model", str(model), "--text", str(text), "--out", str(page), "--steps", "4"]
    sized = ["--context", "96", "--k", "9"]
    assert main([*arguments, *sized, "--layers", "1"]) == 0
    assert "MB; open it in a browser" in capsys.readouterr().out
    facts = re.search(r'<script type="application/json" id="trace">(.*)</script>', page.read_text())
    assert facts is not None
    trace = json.loads(facts[1])
    assert (trace["title"], trace["model"], trace["layers"]) == ("text.txt", "model", [1])
    assert "".join(trace["pieces"]) == text.read_text()[:100]

    for asked, said in (
        ({}, "620 tokens\n  rule: context and steps take 640 + 4 tokens of the text"),
        ({"--context": "200000"}, "a page takes up to 8 MB"),
        ({"--model": str(tmp_path / "none")}, "a model is a folder"),
        ({"--model": str(tmp_path)}, "no config.json and 0 GGUF files"),
        ({"--text": str(tmp_path / "none")}, "No such file"),
    ):
        if said.startswith("a page"):
            text.write_text(text.read_text() * 400)
        given = [x for pair in asked.items() for x in pair]
        assert main([*arguments, *given]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--k -5", "k=-5\n  rule: k is an integer"),
        ("--n-local 0", "n_local=0\n  rule: n_local is an integer"),
        ("--theta 2", "theta=2.0\n  rule: theta is"),
        ("--max-reuse -1", "max_reuse=-1\n  rule: max_reuse is"),
        ("--steps 0", "steps=0\n  rule: at least one token"),
        ("--context 0", "0 tokens before the first step, n_sink + k + n_local = 100"),
        ("--out .", "--out .\n  rule: the page is a file"),
        ("--out none/page.html", "--out none/page.html\n  rule: the page is a file"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_read(
    asked: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "none", "--text", "none", *asked.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_text_that_is_not_utf8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("café".encode("latin-1"))
    assert main(["--model", "none", "--text", str(text)]) == 2
    assert "rule: a text is UTF-8" in capsys.readouterr().err


def test_a_folder_that_transformers_does_not_load_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["--model", str(tmp_path), "--text", str(tmp_path / "config.json")]) == 2
    assert "Should have a `model_type` key" in capsys.readouterr().err


def test_layers_are_numbered_from_either_end_and_looked_at_before_the_text_is_read() -> None:
    model, ids, read = model_of("gemma2"), tokens(1, 60)[0].tolist(), []  # its first layer slides
    assert list(record(model, ids, STEPS, CONFIG, layers=[-1]).layers) == [1]
    for layer, said in ((0, "which slides"), (2, "has 2 layers")):
        with pytest.raises(InvalidProblem, match=said):
            record(model, ids, STEPS, CONFIG, layers=[layer], tick=read.append)
    assert not read
