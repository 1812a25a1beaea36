"""Draw what one query selected, layer by layer, as one HTML file that needs nothing else."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape

LEFT, WIDTH, GAP, RIGHT = 66.0, 1000.0, 16.0, 118.0
ROW, CROWN, BELOW = 13.0, 74.0, 44.0
N_BINS, N_SHADES = 500, 6
AROUND = 62  # words of text on each side of the needle


@dataclass(frozen=True)
class Side:
    """One way of attention in numbers; what does not apply is NaN."""

    title: str
    answer: str
    is_right: bool
    attended_share: float
    agreement: float
    perplexity: float
    retained_mass: float


@dataclass(frozen=True)
class Scene:
    """All that is drawn.

    sides    dense first, then tokenselect, then others
    pieces   the text of each position up to the query, the query's own token last
    needle   first and one-past-last position of the needle
    n_text   where the text ends and the question begins
    selected the positions that each layer attended to, ascending
    n_sink, n_local, k  the budget
    retained_mass       of the query, by layer
    wrote    the token that the query wrote
    """

    model: str
    title: str
    question: str
    sides: list[Side]
    pieces: list[str]
    needle: tuple[int, int]
    n_text: int
    selected: list[list[int]]
    n_sink: int
    n_local: int
    k: int
    retained_mass: list[float]
    wrote: str

    @property
    def n(self) -> int:
        return len(self.pieces)

    @property
    def candidates(self) -> range:
        """The positions that were voted on."""
        local_start = max(0, self.n - self.n_local)
        return range(min(self.n_sink, local_start), local_start)

    @property
    def bin_size(self) -> int:
        return max(1, math.ceil(self.n / N_BINS))

    @cached_property
    def readers(self) -> list[int]:
        """How many layers attended to each position."""
        counts = [0] * self.n
        for position in (position for positions in self.selected for position in positions):
            counts[position] += 1
        return counts

    def x(self, position: int) -> float:
        return LEFT + WIDTH * position / self.n

    def needle_span(self) -> tuple[float, float]:
        """Middle and half the width of the needle's column, wide enough to be seen."""
        first, last = map(self.x, self.needle)
        return (first + last) / 2, max(5.0, (last - first) / 2)


def draw(scene: Scene) -> str:
    """Return the whole HTML page."""
    shades = (_shade(step / (N_SHADES - 1)) for step in range(N_SHADES))
    return _PAGE.format(
        style=_STYLE,
        headline=escape(_headline(scene)),
        lead=_lead(scene),
        tiles=_tiles(scene),
        map=_map(scene),
        shades="".join(f'<i style="background:{shade}"></i>' for shade in shades),
        n_layers=len(scene.selected),
        excerpt=_excerpt(scene),
        needle_count=_needle_count(scene),
        sides="".join(map(_answer, scene.sides)),
        question=escape(scene.question),
    )


def _headline(scene: Scene) -> str:
    dense, chosen = scene.sides[:2]
    share = f"{chosen.attended_share:.0%} of the tokens"
    if chosen.answer == dense.answer:
        return f"The same answer from {share}"
    return f"The needle, found with {share}" if chosen.is_right else f"Attending to {share}"


def _lead(scene: Scene) -> str:
    said = "".join(scene.pieces[-12:])
    said = said[said.rfind("\n") + 1 :].strip()
    before = f" after “{escape(said)}”" if said else " first of all"
    wrote = escape(scene.wrote.strip() or scene.wrote)
    return (
        f"{escape(scene.model)} has read {scene.n_text:,} tokens of {escape(scene.title)}, with "
        f"one sentence added. This is what its {len(scene.selected)} layers look at to "
        + (f"write <b>“{wrote}”</b>{before}." if wrote else "end the answer at once.")
    )


def _tiles(scene: Scene) -> str:
    dense, chosen = scene.sides[:2]
    budget = f"{scene.n_sink} first + {scene.k} voted + {scene.n_local} newest"
    n_attended, text = len(scene.selected[0]), "on held-back text"
    dense_perplexity = f"perplexity; dense {dense.perplexity:.2f}"
    tiles = [
        (f"{n_attended:,}", f"of {scene.n:,} tokens attended to", budget),
        (f"{chosen.agreement:.1%}", "same next token as dense", text),
        (f"{chosen.perplexity:.2f}", dense_perplexity, text),
        (f"{chosen.retained_mass:.1%}", "of the attention mass kept", text),
    ]
    return "".join(
        f"<div class=tile><strong>{value}</strong><span>{label}<small>{note}</small></span></div>"
        for value, label, note in tiles
    )


def _map(scene: Scene) -> str:
    """Draw positions from left to right, layers from top to bottom; crown above, mass at right."""
    layers = range(len(scene.selected))
    height, right = ROW * len(layers), LEFT + WIDTH
    bottom = CROWN + height
    centre, half = scene.needle_span()
    sink_end, sink, local = scene.candidates.start, *map(scene.x, _ends(scene.candidates))
    anchor = "start" if centre < LEFT + 130 else "end" if centre > right - 130 else "middle"
    first_kept = f"first {sink_end}, always kept" if sink_end else ""
    is_wider = half > (scene.x(scene.needle[1]) - scene.x(scene.needle[0])) / 2
    at, side = (LEFT, "start") if centre > LEFT + WIDTH / 2 else (right, "end")
    return "".join(
        [
            f'<svg viewBox="0 0 {right + GAP + RIGHT:.0f} {bottom + BELOW:.0f}" role="img" '
            f'aria-label="Selected positions by layer">',
            _rect(LEFT, CROWN, WIDTH, height, "field"),
            _rect(LEFT, CROWN, sink - LEFT, height, "fixed"),
            _rect(local, CROWN, right - local, height, "fixed"),
            _crown(scene),
            *(_marks(scene, layer) for layer in layers),
            _needle(scene, bottom),
            *(_text(LEFT - 8, _y(i) + ROW * 0.74, str(i), "tick", "end") for i in layers[::5]),
            '<text class="axis" text-anchor="middle" '
            f'transform="translate(22 {CROWN + height / 2:.0f}) rotate(-90)">layer</text>',
            _text(centre, 17, "the needle" + " (drawn wider)" * is_wider, "pin", anchor),
            _text(at, 17, "how many layers read one token, at most", "axis", side),
            *(_text(scene.x(i), bottom + 17, f"{i:,}", "tick", "middle") for i in _ticks(scene.n)),
            _text(LEFT, bottom + 36, first_kept, "axis", "start"),
            _text(LEFT + WIDTH / 2, bottom + 36, "position in the text", "axis", "middle"),
            _text(right, bottom + 36, f"newest {scene.n_local}, always kept", "axis", "end"),
            *_mass(scene),
            "</svg>",
        ]
    )


def _crown(scene: Scene) -> str:
    """Draw above the map the most layers that read any one candidate of a bin."""
    full, base, n_layers = CROWN - 34, CROWN - 5, len(scene.selected)
    bars: dict[str, str] = {"crown": "", "crown hot": ""}
    for start in scene.candidates[:: scene.bin_size]:
        stop = min(start + scene.bin_size, scene.candidates.stop)
        top = full * max(scene.readers[start:stop]) / n_layers
        x, width = scene.x(start), scene.x(stop) - scene.x(start)
        name = "crown hot" if _overlap(start, stop, scene.needle) else "crown"
        bars[name] += f"M{x:.1f} {base:.0f}v{-top:.1f}h{width:.1f}v{top:.1f}z"
    y = base - full
    return (
        "".join(f'<path class="{name}" d="{path}"/>' for name, path in bars.items())
        + f'<path class="rule" d="M{LEFT} {y:.1f}h{WIDTH}"/>'
        + _text(LEFT - 8, y + 4, f"all {n_layers}", "tick", "end")
        + _text(LEFT - 8, base, "none", "tick", "end")
    )


def _marks(scene: Scene, layer: int) -> str:
    """Draw a layer's voted tokens: bins shaded by how many of their tokens were chosen."""
    size, y = scene.bin_size, _y(layer) + 1
    voted = [position // size for position in scene.selected[layer] if position in scene.candidates]
    paths: dict[int, str] = {}
    for i in sorted(set(voted)):
        x, stop = scene.x(i * size), scene.x(min((i + 1) * size, scene.n))
        # Full from half a bin on: the eye should tell a few tokens from many, not 7 from 8.
        step = _step(2 * voted.count(i) / size)
        path = f"M{x:.1f} {y:.0f}h{stop - x:.1f}v{ROW - 2:.0f}H{x:.1f}z"
        paths[step] = paths.get(step, "") + path
    return "".join(f'<path class="mark s{step}" d="{d}"/>' for step, d in sorted(paths.items()))


def _needle(scene: Scene, bottom: float) -> str:
    """Draw the needle's column, shaded by how much of it each layer chose."""
    first, last = scene.needle
    centre, half = scene.needle_span()
    x = centre - half
    parts = [
        _rect(x - 2, CROWN, 2 * half + 4, bottom - CROWN, "clear"),
        _rect(x, 24, 2 * half, bottom - 24, "band"),
    ]
    for layer, positions in enumerate(scene.selected):
        n_chosen = sum(first <= position < last for position in positions)
        if n_chosen:
            shade = f"hot s{_step(n_chosen / (last - first))}"
            parts.append(_rect(x, _y(layer) + 1, 2 * half, ROW - 2, shade))
    return "".join(parts)


def _mass(scene: Scene) -> Iterator[str]:
    """Draw at the right of each layer's row the share of its dense attention that it keeps."""
    x, width = LEFT + WIDTH + GAP, RIGHT - 42
    yield _text(x, CROWN - 20, "attention", "axis", "start")
    yield _text(x, CROWN - 6, "mass kept", "axis", "start")
    for layer, mass in enumerate(scene.retained_mass):
        y = _y(layer)
        if not math.isnan(mass):
            yield _rect(x, y + 2, width, ROW - 4, "lost")
            yield _rect(x, y + 2, width * mass, ROW - 4, "kept")
            yield _text(x + width + 6, y + ROW * 0.76, f"{mass:.0%}", "tick", "start")


def _excerpt(scene: Scene) -> str:
    """Return the words around the needle, shaded by how many layers read any token of theirs."""
    words, n_layers = _words(scene), len(scene.selected)
    inside = [i for i, (start, stop) in enumerate(words) if _overlap(start, stop, scene.needle)]
    low, high = max(0, inside[0] - AROUND), min(len(words), inside[-1] + 1 + AROUND)
    parts = ["… " if low else ""]
    for i in range(low, high):
        start, stop = words[i]
        readers = max(scene.readers[start:stop])
        tone = " class=pale" if readers / n_layers > 0.6 else ""
        word = (
            f'<span{tone} style="background:{_shade(readers / n_layers)}" '
            f'title="{readers} of {n_layers} layers">'
            f"{escape(''.join(scene.pieces[start:stop]).strip())}</span>"
        )
        parts.append("<mark>" * (i == inside[0]) + word + "</mark>" * (i == inside[-1]) + " ")
    return "".join([*parts, "…" if high < len(words) else ""])


def _needle_count(scene: Scene) -> str:
    if not scene.candidates:
        return ""
    inside, usual = (
        sum(scene.readers[first:last]) / (last - first)
        for first, last in (scene.needle, _ends(scene.candidates))
    )
    return (
        f"A token of the needle is read by {inside:.1f} of {len(scene.selected)} layers, a token "
        f"of the text by {usual:.1f}, on average."
    )


def _answer(side: Side) -> str:
    agreement = "" if math.isnan(side.agreement) else f" · agreement {side.agreement:.1%}"
    return (
        f'<div class="side{"" if side.is_right else " wrong"}"><h3>{escape(side.title)}</h3>'
        f"<p>{escape(side.answer) or '(nothing)'}</p><small>{side.attended_share:.1%} of the "
        f"tokens{agreement} · perplexity {side.perplexity:.2f}</small></div>"
    )


def _words(scene: Scene) -> list[tuple[int, int]]:
    """Return runs of positions, one per word: each ends where white space begins or ended."""
    text = scene.pieces[: scene.n_text]
    starts = [
        i
        for i, piece in enumerate(text)
        if i == 0 or not piece or piece[0].isspace() or text[i - 1][-1:].isspace()
    ]
    runs = zip(starts, [*starts[1:], len(text)], strict=True)
    return [(start, stop) for start, stop in runs if "".join(text[start:stop]).strip()]


def _ends(positions: range) -> tuple[int, int]:
    return positions.start, positions.stop


def _overlap(start: int, stop: int, span: tuple[int, int]) -> bool:
    return start < span[1] and stop > span[0]


def _step(share: float) -> int:
    return math.ceil((N_SHADES - 1) * min(1.0, share))


def _ticks(n: int) -> range:
    step = 10 ** math.floor(math.log10(max(n, 10)))
    step = step if n >= 4 * step else step // 2 if n >= 2 * step else step // 5
    return range(0, n, max(step, 1))


def _y(layer: int) -> float:
    return CROWN + ROW * layer


def _rect(x: float, y: float, width: float, height: float, name: str) -> str:
    size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" {size}/>'


def _text(x: float, y: float, text: str, name: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _shade(share: float) -> str:
    """Mix paper and deep blue."""
    mix = [round(a + (b - a) * share) for a, b in ((251, 23), (250, 63), (246, 138))]
    return f"rgb({mix[0]},{mix[1]},{mix[2]})"


_STYLE = """
:root{--paper:#fbfaf6;--ink:#1b2330;--soft:#667085;--line:#e2ddd0;--blue:#173f8a;--hot:#d9480f}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.45 Inter,"Helvetica Neue",Helvetica,Arial,"DejaVu Sans",sans-serif}
main{width:1280px;margin:0 auto;padding:34px 40px 30px}
h1{font-size:40px;line-height:1.1;letter-spacing:-.02em;margin:0 0 10px}
.lead{font-size:17px;color:#3b4657;margin:0 0 20px;max-width:1120px}
.lead b{color:var(--hot)}
.tiles{display:grid;grid-template-columns:1.25fr 1fr 1fr 1fr;gap:14px;margin:0 0 16px}
.tile{display:flex;align-items:center;gap:13px;border-top:2px solid var(--ink);padding:10px 0}
.tile strong{font-size:31px;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{font-size:14px;line-height:1.25}.tile small{display:block;color:var(--soft)}
svg{display:block;width:100%;height:auto}
.field,.clear{fill:#f3f0e7}.fixed{fill:#dcd5c3}.band{fill:var(--hot);opacity:.13}
.crown{fill:#8aa0c8}.crown.hot{fill:var(--hot)}.rule{stroke:var(--line);fill:none}
.mark{fill:var(--blue)}.hot{fill:var(--hot)}
.s1{opacity:.16}.s2{opacity:.36}.s3{opacity:.56}.s4{opacity:.78}.s5{opacity:1}
.tick{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.axis{font-size:12.5px;fill:var(--soft)}.pin{font-size:15px;font-weight:700;fill:var(--hot)}
.lost{fill:#e9e4d7}.kept{fill:#5b79b4}
.below{display:grid;grid-template-columns:1.62fr 1fr;gap:34px;margin-top:14px}
h2{font-size:13px;text-transform:uppercase;letter-spacing:.07em;color:var(--soft);margin:0 0 8px}
.text{font:17.5px/1.62 Georgia,"Liberation Serif","DejaVu Serif",serif;margin:0}
.text span{border-radius:3px;padding:2px 2px}.text .pale{color:#fff}
.text mark{background:none;color:inherit;border-bottom:3px solid var(--hot);padding-bottom:3px}
.legend{display:flex;align-items:center;gap:7px;font-size:13px;color:var(--soft);margin:10px 0 6px}
.legend i{width:24px;height:12px;border:1px solid var(--line)}.note{font-size:14px;margin:0}
.side{border-left:4px solid #2f7d4f;padding:1px 0 1px 13px;margin:0 0 13px}
.side.wrong{border-color:var(--hot)}.side h3{font-size:14px;margin:0}
.side p{font:17px/1.35 Georgia,"Liberation Serif","DejaVu Serif",serif;margin:1px 0}
.side small,.ask{font-size:12.5px;color:var(--soft)}.ask{margin:0 0 11px}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=1280"><title>tokenselect: {headline}</title>
<style>{style}</style></head>
<body><main>
<h1>{headline}</h1><p class="lead">{lead}</p>
<section class="tiles">{tiles}</section>
{map}
<section class="below">
<div><h2>Around the needle</h2><p class="text">{excerpt}</p>
<div class="legend">read by no layer {shades} by all {n_layers} layers</div>
<p class="note">{needle_count}</p></div>
<div><h2>Answers</h2><p class="ask">{question}</p>{sides}</div>
</section>
</main></body></html>
"""
