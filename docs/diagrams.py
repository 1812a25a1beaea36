"""The diagrams of the pages, as SVG: `python -m docs.diagrams` writes docs/images/*.svg anew.

Regions and stages are drawn from what the library computes, layers from what pyproject.toml has.
"""

import tomllib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

import tokenselect
from tokenselect import Problem, SelectConfig, SelectionCache

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 540
STYLE = """
.ground{fill:#fff}.ink{fill:#1c1d21}.dim{fill:#5c6068}.line{stroke:#5c6068;fill:none;stroke-width:1.5}
.box{fill:#f2f4f8;stroke:#9aa1ad}.read{fill:#1f5fbf}.region{fill:#9fc0ee}.left{fill:#ccd0d8}
.mark{stroke:#b3261e;stroke-width:1.5;stroke-dasharray:5 3}.red{fill:#b3261e}
@media (prefers-color-scheme:dark){.ground{fill:#15171b}.ink{fill:#e9eaed}.dim{fill:#a5aab4}
.line{stroke:#a5aab4}.box{fill:#23272f;stroke:#666d79}.read{fill:#7fb0ff}.region{fill:#35557f}
.left{fill:#474c56}.mark{stroke:#ff8a80}.red{fill:#ff8a80}}
text{font:14px system-ui,sans-serif}.code{font:13px ui-monospace,monospace}.bold{font-weight:600}
"""


def text(x: float, y: float, said: str, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(said)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box", round: int = 6) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}" '
        f'class="{kind}"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" class="line" '
        'marker-end="url(#tip)"/>'
    )


def picture(title: str, height: float, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" class="dim"/></marker></defs>\n'
        f"{box(0, 0, WIDTH, height, 'ground', 0)}\n{body}\n</svg>\n"
    )


def regions() -> str:
    """One request: its regions, the votes, the threshold, and what is read."""
    n, config = 30, SelectConfig(k=6, n_sink=3, n_local=7)
    torch.manual_seed(11)
    q, keys = 2 * torch.randn(1, 4, 1, 8), torch.randn(1, 2, n, 8)
    problem = Problem.build(q, keys, keys, config)
    votes = tokenselect.score(problem, "reference").votes[0, 0, 0]
    selection = tokenselect.select(votes[None, None, None], problem, "reference")
    chosen = set(selection.positions[0, 0].tolist())
    start, stop = config.regions(n, 1)
    step, left, floor = 16.0, 30.0, 150.0
    top = float(votes[start:stop].max())
    threshold = min(float(votes[i]) for i in chosen if start <= i < stop)
    parts = []
    for i in range(n):
        x, always = left + step * i, not start <= i < stop
        if not always:
            height = max(2, round(100 * float(votes[i]) / top))
            kind = "read" if i in chosen else "left"
            parts.append(box(x + 2, floor - height, step - 4, height, kind, 0))
        kind = "region" if always else "read" if i in chosen else "left"
        parts.append(box(x + 1, floor + 10, step - 2, 22, kind, 3))
    y = floor - round(100 * threshold / top)
    x0, x1, end = left + step * start, left + step * stop, left + step * n
    parts.append(f'<line x1="{x0}" y1="{y:g}" x2="{x1}" y2="{y:g}" class="mark"/>')
    parts.append(text(x0, 22, "votes of the candidates", "dim"))
    parts.append(text(x1 + 4, y + 4, "threshold", "red"))
    for x, to, name, size in (
        (left, x0, "sink", f"n_sink = {config.n_sink}"),
        (x0, x1, "candidates", f"the k = {config.k} with most votes are read"),
        (x1, end, "local window", f"n_local = {config.n_local}"),
    ):
        parts.append(f'<path d="M{x + 2:g} 192v6H{to - 2:g}v-6" class="line"/>')
        anchor, at = ("start", x) if x == left else ("middle", (x + to) / 2)
        parts += [text(at, 216, name, "ink bold", anchor), text(at, 234, size, "dim", anchor)]
    parts.append(text(end, 22, "the query", "dim", "end"))
    parts.append(arrow(end - step / 2, 30, end - step / 2, floor + 6))
    title = "The regions of a request: sink, candidates with their votes and the threshold, window"
    return picture(title, 248, parts)


def stages() -> str:
    """The three stages, and the tensors between them."""
    rows: Sequence[tuple[str, str, str, str]] = (
        ("score", "every query head votes", "votes (B, R, S, Lk)", "lse (B, Hq)"),
        ("select", "sink, the k best, window", "positions (B, S, K)", "count (B, S)"),
        ("attend", "softmax over these alone", "out (B, Hq, Lq, Dv)", "lse (B, Hq, Lq)"),
    )
    parts = [
        text(20, 26, "q (B, Hq, Lq, D)", "code ink"),
        text(20, 46, "k_cache (B, Hkv, Lk, D)", "code ink"),
        text(330, 26, "v_cache (B, Hkv, Lk, Dv)", "code ink"),
    ]
    for i, (name, does, one, other) in enumerate(rows):
        y = 78 + 112 * i
        parts += [
            box(20, y, 210, 62),
            text(36, y + 25, name, "ink bold"),
            text(36, y + 46, does, "dim"),
            arrow(125, y - 26 if i == 0 else y - 38, 125, y - 3),
            text(330, y + 26, one, "code ink"),
            text(330, y + 46, other, "code ink"),
            arrow(234, y + 31, 322, y + 31),
        ]
        if i:
            parts.append(f'<path d="M440 {y - 54}V{y - 38}H125" class="line"/>')
    parts.append(f'<path d="M520 34V{78 + 224 + 80}H180V{78 + 224 + 66}" class="line" '
                 'marker-end="url(#tip)"/>')  # fmt: skip
    parts.append(text(350, 400, "the selected rows of v_cache", "dim", "middle"))
    title = "The stages and their tensors: score makes votes, select positions, attend the output"
    return picture(title, 414, parts)


def layers() -> str:
    """The layers of the package, as the import contracts of pyproject.toml have them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = (c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    said = {
        "check": "what you run", "conformance": "laws, and models",
        "plans": "fixed memory, graphs", "api": "the calls", "dispatch": "from call to backend",
        "reference": "what computes", "contract": "a backend's terms",
        "rope": "rotations", "errors": "what all use",
    }  # fmt: skip
    parts = []
    for i, line in enumerate(contract["layers"]):
        names = [name.strip(" ()") for name in line.split("|")]
        words = next((said[name] for name in names if name in said), "")
        y = 14 + 44 * i
        parts += [
            box(14, y, 330, 36),
            text(179, y + 23, " · ".join(names), "code ink", "middle"),
            text(358, y + 23, words, "dim"),
        ]
    height = 14 + 44 * len(contract["layers"])
    parts.append(text(14, height + 16, "A module imports only those below it.", "dim"))
    title = "The layers of the package: each imports only those below it"
    return picture(title, height + 32, parts)


def plan() -> str:
    """What a plan holds, and what each call brings."""
    held = (
        ("a backend's StaticStages", "chosen once, never another"),
        ("settings and a capacity", "B requests of Lk tokens"),
        ("Scratch", "all memory that the stages take"),
        ("StreamSerializer", "a call waits for the one before"),
        ("CUDA graphs", "with the backend cuda_graph"),
    )
    brought = ("q, k_cache, v_cache", "cache_seqlens", "block_table", "sink_logits", "out")
    parts = [box(14, 14, 270, 62 + 46 * len(held)), text(30, 42, "Plan", "ink bold")]
    for i, (name, what) in enumerate(held):
        y = 58 + 46 * i
        parts += [text(30, y + 12, name, "code ink"), text(30, y + 30, what, "dim")]
    parts += [box(356, 14, 170, 150), text(372, 42, "each call", "ink bold")]
    parts += [text(372, 66 + 21 * i, name, "code ink") for i, name in enumerate(brought)]
    parts += [arrow(352, 90, 290, 90), box(356, 190, 170, 116)]
    parts.append(text(372, 218, "each layer's", "ink bold"))
    parts.append(text(372, 242, SelectionCache.__name__, "code ink"))
    parts += [text(372, 263, "query, selection,", "dim"), text(372, 284, "hits and misses", "dim")]
    parts.append(arrow(352, 248, 290, 248))
    title = "A plan holds stages, settings, memory and order; calls bring the tensors"
    return picture(title, 324, parts)


DIAGRAMS = {"regions": regions, "stages": stages, "layers": layers, "plan": plan}


def main() -> None:
    for name, draw in DIAGRAMS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()
