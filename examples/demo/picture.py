"""Draw what one query selected, layer by layer, as one HTML file that needs nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, WIDTH, GAP, RIGHT = 66.0, 1000.0, 16.0, 118.0
ROW, CROWN, BELOW = 13.0, 74.0, 44.0
N_BINS = 500
N_SHADES = 6


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
    def local_start(self) -> int:
        return max(0, self.n - self.n_local)

    @property
    def sink_end(self) -> int:
        return min(self.n_sink, self.local_start)

    def layers_reading(self) -> list[int]:
        """How many layers attended to each position."""
        counts = [0] * self.n
        for positions in self.selected:
            for position in positions:
                counts[position] += 1
        return counts


def draw(scene: Scene) -> str:
    """Return the whole HTML page."""
    return _PAGE.format(
        style=_STYLE,
        headline=escape(_headline(scene)),
        lead=_lead(scene),
        tiles=_tiles(scene),
        map=_map(scene),
        shades="".join(
            f'<i style="background:{_shade(step / (N_SHADES - 1))}"></i>'
            for step in range(N_SHADES)
        ),
        n_layers=len(scene.selected),
        excerpt=_excerpt(scene),
        needle_count=_needle_count(scene),
        sides="".join(_answer(side) for side in scene.sides),
        question=escape(scene.question),
    )


def _headline(scene: Scene) -> str:
    dense, chosen = scene.sides[:2]
    share = f"{chosen.attended_share:.0%} of the tokens"
    if chosen.answer == dense.answer:
        return f"The same answer from {share}"
    if chosen.is_right:
        return f"The needle, found with {share}"
    return f"Attending to {share}"


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
    n_attended = len(scene.selected[0])
    tiles = [
        (f"{n_attended:,}", f"of {scene.n:,} tokens attended to", _budget(scene)),
        (f"{chosen.agreement:.1%}", "same next token as dense", "on held-back text"),
        (
            f"{chosen.perplexity:.2f}",
            f"perplexity; dense {dense.perplexity:.2f}",
            "on held-back text",
        ),
        (f"{chosen.retained_mass:.1%}", "of the attention mass kept", "on held-back text"),
    ]
    return "".join(
        f"<div class=tile><strong>{value}</strong><span>{label}<small>{note}</small></span></div>"
        for value, label, note in tiles
    )


def _budget(scene: Scene) -> str:
    return f"{scene.n_sink} first + {scene.k} voted + {scene.n_local} newest"


def _map(scene: Scene) -> str:
    """Positions from left to right, layers from top to bottom; crown above, mass at the right."""
    height = ROW * len(scene.selected)
    bottom = CROWN + height
    total = bottom + BELOW
    first, last = (_x(scene, position) for position in scene.needle)
    centre = (first + last) / 2
    sink, local = _x(scene, scene.sink_end), _x(scene, scene.local_start)
    anchor = "start" if centre < LEFT + 130 else "end" if centre > LEFT + WIDTH - 130 else "middle"
    first_kept = f"first {scene.sink_end}, always kept" if scene.sink_end else ""
    wider = " (drawn wider)" if _needle_half(scene) > (last - first) / 2 else ""
    parts = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + GAP + RIGHT:.0f} {total:.0f}" role="img" '
        f'aria-label="Selected positions by layer">',
        _rect(LEFT, CROWN, WIDTH, height, "field"),
        _rect(LEFT, CROWN, sink - LEFT, height, "fixed"),
        _rect(local, CROWN, LEFT + WIDTH - local, height, "fixed"),
        _crown(scene),
        *(_marks(scene, layer) for layer in range(len(scene.selected))),
        _needle(scene),
        *(
            _text(LEFT - 8, _y(layer) + ROW * 0.74, str(layer), "tick", "end")
            for layer in range(0, len(scene.selected), 5)
        ),
        '<text class="axis" text-anchor="middle" '
        f'transform="translate(22 {CROWN + height / 2:.0f}) rotate(-90)">layer</text>',
        _text(centre, 17, f"the needle{wider}", "pin", anchor),
        _text(
            LEFT if centre > LEFT + WIDTH / 2 else LEFT + WIDTH,
            17,
            "how many layers read one token, at most",
            "axis",
            "start" if centre > LEFT + WIDTH / 2 else "end",
        ),
        *(
            _text(_x(scene, position), bottom + 17, f"{position:,}", "tick", "middle")
            for position in _ticks(scene.n)
        ),
        _text(LEFT, bottom + 36, first_kept, "axis", "start"),
        _text(LEFT + WIDTH / 2, bottom + 36, "position in the text", "axis", "middle"),
        _text(LEFT + WIDTH, bottom + 36, f"newest {scene.n_local}, always kept", "axis", "end"),
        _mass(scene),
        "</svg>",
    ]
    return "".join(parts)


def _crown(scene: Scene) -> str:
    """Above the map: the most layers that read any one candidate of a bin."""
    size = _bin_size(scene.n)
    counts = scene.layers_reading()
    full = CROWN - 34
    bars: dict[str, list[str]] = {"crown": [], "crown hot": []}
    for start in range(scene.sink_end, scene.local_start, size):
        stop = min(start + size, scene.local_start)
        top = full * max(counts[start:stop]) / len(scene.selected)
        x, width = _x(scene, start), _x(scene, stop) - _x(scene, start)
        is_hot = start < scene.needle[1] and stop > scene.needle[0]
        bars["crown hot" if is_hot else "crown"].append(
            f"M{x:.1f} {CROWN - 5:.0f}v{-top:.1f}h{width:.1f}v{top:.1f}z"
        )
    y = CROWN - 5 - full
    return (
        "".join(f'<path class="{name}" d="{"".join(paths)}"/>' for name, paths in bars.items())
        + f'<path class="rule" d="M{LEFT} {y:.1f}h{WIDTH}"/>'
        + _text(LEFT - 8, y + 4, f"all {len(scene.selected)}", "tick", "end")
        + _text(LEFT - 8, CROWN - 5, "none", "tick", "end")
    )


def _marks(scene: Scene, layer: int) -> str:
    """The voted tokens of one layer: bins shaded by how many of their tokens were chosen."""
    size = _bin_size(scene.n)
    counts: dict[int, int] = {}
    for position in scene.selected[layer]:
        if scene.sink_end <= position < scene.local_start:
            counts[position // size] = counts.get(position // size, 0) + 1
    paths: dict[int, list[str]] = {}
    for number, count in sorted(counts.items()):
        start, stop = number * size, min((number + 1) * size, scene.n)
        # Full from half a bin on: the eye should tell a few tokens from many, not 7 from 8.
        paths.setdefault(_step(2 * count / size), []).append(
            f"M{_x(scene, start):.1f} {_y(layer) + 1:.0f}h{_x(scene, stop) - _x(scene, start):.1f}"
            f"v{ROW - 2:.0f}H{_x(scene, start):.1f}z"
        )
    return "".join(
        f'<path class="mark s{step}" d="{"".join(path)}"/>' for step, path in sorted(paths.items())
    )


def _needle(scene: Scene) -> str:
    """The needle's column, wide enough to be seen, shaded by how much of it each layer chose."""
    first, last = scene.needle
    half = _needle_half(scene)
    x = (_x(scene, first) + _x(scene, last)) / 2 - half
    bottom = CROWN + ROW * len(scene.selected)
    parts = [
        _rect(x - 2, CROWN, 2 * half + 4, bottom - CROWN, "clear"),
        _rect(x, 24, 2 * half, bottom - 24, "band"),
    ]
    for layer, positions in enumerate(scene.selected):
        n_chosen = sum(first <= position < last for position in positions)
        if n_chosen:
            step = _step(n_chosen / (last - first))
            parts.append(_rect(x, _y(layer) + 1, 2 * half, ROW - 2, f"hot s{step}"))
    return "".join(parts)


def _mass(scene: Scene) -> str:
    """At the right of each layer's row: the share of its dense attention that it keeps."""
    x, width = LEFT + WIDTH + GAP, RIGHT - 42
    parts = [_text(x, CROWN - 20, "attention", "axis", "start")]
    parts.append(_text(x, CROWN - 6, "mass kept", "axis", "start"))
    for layer, mass in enumerate(scene.retained_mass):
        if math.isnan(mass):
            continue
        y = _y(layer)
        parts.append(_rect(x, y + 2, width, ROW - 4, "lost"))
        parts.append(_rect(x, y + 2, width * mass, ROW - 4, "kept"))
        parts.append(_text(x + width + 6, y + ROW * 0.76, f"{mass:.0%}", "tick", "start"))
    return "".join(parts)


def _excerpt(scene: Scene, around: int = 62) -> str:
    """The words around the needle, shaded by how many layers read any token of theirs."""
    counts = scene.layers_reading()
    words = _words(scene.pieces, scene.n_text)
    inside = [i for i, (start, stop) in enumerate(words) if _overlap(start, stop, scene.needle)]
    low, high = max(0, inside[0] - around), min(len(words), inside[-1] + 1 + around)
    parts = ["… " if low else ""]
    for i in range(low, high):
        start, stop = words[i]
        n_layers = max(counts[start:stop])
        text = escape("".join(scene.pieces[start:stop]).strip())
        share = n_layers / len(scene.selected)
        tone = " class=pale" if share > 0.6 else ""
        if i == inside[0]:
            parts.append("<mark>")
        parts.append(
            f'<span{tone} style="background:{_shade(share)}" '
            f'title="{n_layers} of {len(scene.selected)} layers">{text}</span>'
        )
        if i == inside[-1]:
            parts.append("</mark>")
        parts.append(" ")
    return "".join([*parts, "…" if high < len(words) else ""])


def _needle_count(scene: Scene) -> str:
    counts = scene.layers_reading()
    candidates = range(scene.sink_end, scene.local_start)
    if not candidates:
        return ""
    inside = [counts[position] for position in range(*scene.needle)]
    usual = sum(counts[position] for position in candidates) / len(candidates)
    return (
        f"A token of the needle is read by {sum(inside) / len(inside):.1f} of "
        f"{len(scene.selected)} layers, a token of the text by {usual:.1f}, on average."
    )


def _answer(side: Side) -> str:
    numbers = [f"{side.attended_share:.1%} of the tokens"]
    if not math.isnan(side.agreement):
        numbers.append(f"agreement {side.agreement:.1%}")
    numbers.append(f"perplexity {side.perplexity:.2f}")
    return (
        f'<div class="side{"" if side.is_right else " wrong"}"><h3>{escape(side.title)}</h3>'
        f"<p>{escape(side.answer) or '(nothing)'}</p><small>{' · '.join(numbers)}</small></div>"
    )


def _words(pieces: Sequence[str], n: int) -> list[tuple[int, int]]:
    """Runs of positions that make a word each: a run ends where white space begins or ended."""
    starts = [
        position
        for position in range(n)
        if position == 0
        or not pieces[position]
        or pieces[position][0].isspace()
        or pieces[position - 1][-1:].isspace()
    ]
    runs = zip(starts, [*starts[1:], n], strict=True)
    return [(start, stop) for start, stop in runs if "".join(pieces[start:stop]).strip()]


def _overlap(start: int, stop: int, span: tuple[int, int]) -> bool:
    return start < span[1] and stop > span[0]


def _needle_half(scene: Scene) -> float:
    return max(5.0, (_x(scene, scene.needle[1]) - _x(scene, scene.needle[0])) / 2)


def _step(share: float) -> int:
    return math.ceil((N_SHADES - 1) * min(1.0, share))


def _bin_size(n: int) -> int:
    return max(1, math.ceil(n / N_BINS))


def _ticks(n: int) -> list[int]:
    step = 10 ** math.floor(math.log10(max(n, 10)))
    step = step if n >= 4 * step else step // 2 if n >= 2 * step else step // 5
    return list(range(0, n, max(step, 1)))


def _x(scene: Scene, position: int) -> float:
    return LEFT + WIDTH * position / scene.n


def _y(layer: int) -> float:
    return CROWN + ROW * layer


def _rect(x: float, y: float, width: float, height: float, name: str) -> str:
    return (
        f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{max(width, 0):.1f}" height="{height:.1f}"/>'
    )


def _text(x: float, y: float, text: str, name: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _shade(share: float) -> str:
    """From paper to deep blue."""
    paper, deep = (251, 250, 246), (23, 63, 138)
    mix = [round(a + (b - a) * share) for a, b in zip(paper, deep, strict=True)]
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
