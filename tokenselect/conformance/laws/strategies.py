"""What Hypothesis draws and shrinks: shapes, settings and the kind of content of a problem."""

from typing import Any

from hypothesis import strategies as st

from tokenselect.conformance.problems import (
    CONTENTS,
    DTYPES,
    FILLERS,
    STRIDES,
    VOTES,
    Ballots,
    Case,
    Chosen,
)
from tokenselect.contract import SelectConfig


def lengths(Lq: int, config: SelectConfig) -> st.SearchStrategy[int]:
    """n of a request: nothing, the new tokens alone, around each boundary, or plenty."""
    edges = [0, Lq, 63, 64, 65, 127, 128, 129]  # the last of a tile, and the first of the next
    for edge in (config.n_sink, config.n_sink + config.n_local + Lq - 1):
        # The first length with more candidates than the budget, and the one before it.
        left_out = next((n for n in range(edge, 152) if n - edge > config.budget(n)), 152)
        edges += [edge - 1, edge, edge + 1, left_out - 1, left_out]
    allowed = sorted({n for n in edges if n == 0 or Lq <= n <= 150})
    return st.one_of(st.integers(Lq, 90), st.sampled_from(allowed))


@st.composite
def configs(draw: st.DrawFn, /, *, moved: bool, **fixed: Any) -> SelectConfig:
    """Draw settings; with `moved`, those that move keys too. `fixed` pins some."""
    chosen: dict[str, Any] = {
        "k": draw(st.sampled_from([0, 1, 2, 5, 8, 17, 200, 0.1, 0.3, 0.9])),
        "n_sink": draw(st.sampled_from([0, 1, 3, 8])),
        "n_local": draw(st.sampled_from([1, 2, 5, 16])),
        "vote": draw(st.sampled_from(["soft", "soft", "logit", "hard"])),
        "normalize": draw(st.sampled_from(["visible", "candidates"])),
        "scope": draw(st.sampled_from(["layer", "group"])),
        "select_scale": draw(st.sampled_from([None, None, 1.0, 0.3])),
        "pool": draw(st.sampled_from([1, 1, 3, 7])),
        "n_query_means": draw(st.sampled_from([1, 1, 2, 3])),
    }
    if moved:
        chosen["positions"] = draw(st.sampled_from(["original", "contiguous"]))
        chosen["score_at"] = draw(st.sampled_from(["true", "fixed", "split"]))
        chosen["fixed_share"] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    chosen |= fixed
    if isinstance(chosen["k"], float):
        chosen["k_min"] = draw(st.sampled_from([0, 0, 7]))
        chosen["k_max"] = draw(st.sampled_from([None, None, 10]))
    return SelectConfig(**chosen)


@st.composite
def cases(draw: st.DrawFn, /, *, config: dict[str, Any] | None = None, **fixed: Any) -> Case:
    """Any problem that the contract allows, small. `config` and `fixed` pin settings."""
    rope = draw(st.sampled_from([None, None, "rotated", "raw"]))
    rope = fixed.pop("rope", rope)
    selection = draw(configs(moved=rope is not None, **config or {}))
    Lq = fixed.pop("Lq", None) or draw(st.sampled_from([1, 1, 1, 2, 5]))
    D = draw(st.sampled_from([2, 5, 8, 16]))
    G = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 7, 7, 12, 32]))
    drawn: dict[str, Any] = {
        "lengths": tuple(draw(st.lists(lengths(Lq, selection), min_size=1, max_size=3))),
        "Hkv": draw(st.sampled_from([1, 2, 3] if G < 12 else [1, 2])),
        "G": G,
        "Lq": Lq,
        "D": D,
        "Dv": draw(st.sampled_from([D, 1, 6])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "page_size": draw(st.sampled_from([None, None, None, 1, 2, 16, 53, 64, 256])),
        "spare": draw(st.sampled_from([0, 3])),
        "content": draw(st.sampled_from(CONTENTS)),
        "strides": draw(st.sampled_from(STRIDES)),
        "filler": draw(st.sampled_from(FILLERS)),
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.5])),
        "has_sink_logits": draw(st.booleans()),
        "rope": rope,
        "rotary_dim": draw(st.sampled_from([2, 8, 16])),
        "interleaved": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([1.0, 1.3])),
        "config": selection,
        "max_reuse": draw(st.sampled_from([0, 4])),
        "seed": draw(st.integers(0, 2**16)),
    }
    return Case(**drawn | fixed)


def ballots() -> st.SearchStrategy[Ballots]:
    """Draw a problem, and votes of any kind for it."""
    return st.builds(Ballots, cases(), st.sampled_from(VOTES), st.integers(0, 2**16))


def chosen(**fixed: Any) -> st.SearchStrategy[Chosen]:
    """Any problem and any selection; `fixed` pins settings of the problem."""
    return st.builds(
        Chosen, cases(**fixed), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 2**16)
    )
