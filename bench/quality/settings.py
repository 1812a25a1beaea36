"""The named settings: what `python -m bench.quality run --settings NAME` measures.

Settings are chosen with `choose` and `choose-long`, and figures reported with `report` and
`report-long`, which read other texts and seeds. Those for long prompts read everything sparsely, in
bfloat16, which takes a third of the time. Your own are another entry of SETTINGS.
"""

from collections.abc import Iterator
from typing import Any

from bench.quality.lossless import Drafts
from bench.quality.needles import Needles
from bench.quality.speed import Speed
from bench.quality.tasks import Decode, Mass, Reuse, Settings, Sparse


def _with(n_local: int = 128, **options: Any) -> dict[str, Any]:
    """Return options of `enable`, with sink and window."""
    return {**options, "n_sink": options.get("n_sink", 16), "n_local": n_local}


VARIANTS: dict[str, dict[str, Any]] = {
    "window": _with(attend="window"),
    "window-64": _with(64, attend="window"),
    "window-contiguous": _with(attend="window", positions="contiguous"),
    "faithful": _with(preset="faithful"),
    "faithful-64": _with(64, preset="faithful"),
    "paper": _with(preset="paper"),
    # selects all tokens there are, and so shows what of KL and agreement is bfloat16's rounding
    "everything": _with(k=8192),
    # the vote
    "hard": _with(vote="hard"),
    "logit": _with(vote="logit"),
    "candidates": _with(normalize="candidates"),
    "unscaled": _with(select_scale=1.0),
    "sharper": _with(select_scale=0.25),
    "group": _with(scope="group"),
    "pool-3": _with(pool=3),
    # how a budget is divided
    "sink-4": _with(n_sink=4),
    "sink-128": _with(n_sink=128),
    "local-64": _with(64),
    "local-256": _with(256),
    "local-512": _with(512),
    "sink-128-local-512": _with(512, n_sink=128),
    # how a chunk is scored
    "means-1": _with(n_query_means=1),
    "means-16": _with(n_query_means=16),
    "means-64": _with(n_query_means=64),
    "every-query": _with(n_query_means=512),
    "local-384-means-16": _with(384, n_query_means=16),
    "candidates-means-16": _with(normalize="candidates", n_query_means=16),
    "group-means-16": _with(scope="group", n_query_means=16),
    "chunk-1": _with(chunk=1),
    "chunk-2-mean": _with(chunk=2, n_query_means=1),
    "chunk-4-mean": _with(chunk=4, n_query_means=1),
    "chunk-4-means-4": _with(chunk=4, n_query_means=4),
    "chunk-16-mean": _with(chunk=16, n_query_means=1),
    "chunk-16-means-16": _with(chunk=16, n_query_means=16),
    "chunk-64-mean": _with(chunk=64, n_query_means=1),
    "chunk-64-means-64": _with(chunk=64, n_query_means=64),
    "chunk-64-local-512": _with(512, chunk=64),
    "chunk-128-local-512": _with(512, chunk=128, n_query_means=4),
    # what drafts, where dense attention has the last word
    "drafting": _with(theta=0.5),
    # past the trained length
    "extrapolate": _with(preset="extrapolate"),
    "contiguous": _with(positions="contiguous"),
    "contiguous-means-16": _with(positions="contiguous", n_query_means=16),
    "fixed": _with(positions="contiguous", score_at="fixed"),
    "fixed-means-16": _with(positions="contiguous", score_at="fixed", n_query_means=16),
    "split-10": _with(preset="extrapolate", fixed_share=0.10, n_query_means=16),
    "split-25": _with(preset="extrapolate", fixed_share=0.25, n_query_means=16),
    "split-25-one": _with(preset="extrapolate", fixed_share=0.25),
    "split-50": _with(preset="extrapolate", fixed_share=0.50, n_query_means=16),
    # as the paper's authors released it: eq. 7 over the candidates
    "released": _with(
        positions="contiguous", score_at="fixed", normalize="candidates", select_scale=1.0
    ),
}

# Contexts of the 8192 tokens that SmolLM2 was trained for, of which decoding takes 128; and beyond.
_NEAR: Any = {"contexts": (8064,), "budgets": (0.1,)}
_FAR: Any = {"contexts": (16384,), "budgets": (656,)}
_QUICK: Any = {"contexts": (1536,), "budgets": (0.1,)}
_PREFILLS = ((512, 7680), (512, 15872), (512, 32256), (2048, 6144), (8192, 0), (4096, 0))


def _settings() -> Iterator[Settings]:
    both, one = ("faithful-64", "window-64"), ("faithful-64",)
    yield Settings(name="quick", split="choose", variants=VARIANTS, tasks={
        "decode": Decode(variants=both, documents=2, continuation=32, **_QUICK),
        "sparse": Sparse(variants=both, contexts=(1536,), documents=1,
                         budgets=(0.25,)),
        "needles": Needles(variants=("dense", *one), contexts=(1024,), depths=(0.5,), seeds=1,
                           budgets=(208,)),
        "reuse": Reuse(variants=one, documents=1, continuation=32, thetas=(0.7, 0.9), **_QUICK),
        "mass": Mass(variants=one, documents=1, continuation=8, **_QUICK),
        "speed": Speed(variants=one, contexts=(4096,), rounds=5, budgets=(480,)),
    })  # fmt: skip
    both, one = ("faithful", "window"), ("faithful",)
    several = ("hard", "logit", "candidates", "unscaled", "sharper", "group", "pool-3", "sink-4")
    several += ("sink-128", "local-64", "local-256", "local-512", "sink-128-local-512")
    yield Settings(name="choose", split="choose", variants=VARIANTS, tasks={
        "decode": Decode(variants=(*both, *several), documents=6, **_NEAR),
        "reuse": Reuse(variants=one, documents=6, thetas=(0.8, 0.85, 0.9, 0.95), **_NEAR),
    })  # fmt: skip
    several = ("means-1", "window", "means-16", "means-64", "local-384-means-16")
    several += ("candidates-means-16", "group-means-16", "chunk-64-local-512")
    splits = ("split-25", "split-25-one", "split-10", "split-50")
    yield Settings(name="choose-long", split="choose", variants=VARIANTS, dtype="bfloat16", tasks={
        "sparse": Sparse(variants=(*several, "chunk-128-local-512"), contexts=(8192,), documents=3,
                         budgets=(0.1,)),
        "needles": Needles(variants=(*splits, "contiguous-means-16", "fixed-means-16"),
                           depths=(0.1, 0.5, 0.9), seeds=1, kinds=("filler",), **_FAR),
        "needles-natural": Needles(variants=("split-25", "split-25-one", "split-50"),
                                   depths=(0.1, 0.5, 0.9), seeds=1, kinds=("natural",), **_FAR),
    })  # fmt: skip
    # how many queries share a selection, and whether their mean votes for it or each of them
    several = ("means-1", "window", "every-query", "chunk-64-means-64", "chunk-16-means-16")
    several += ("chunk-4-means-4", "chunk-1", "chunk-2-mean", "chunk-4-mean", "chunk-16-mean")
    several += ("chunk-64-mean",)
    yield Settings(name="choose-voters", split="choose", variants=VARIANTS, dtype="bfloat16",
        tasks={"sparse": Sparse(variants=several, contexts=(8192,), documents=3, budgets=(0.1,))},
    )  # fmt: skip
    three = {"budgets": (0.05, 0.1, 0.2)}
    yield Settings(name="report", split="report", variants=VARIANTS, tasks={
        "decode": Decode(variants=both, documents=8, **_NEAR | three),
        "decode-shorter": Decode(variants=both, contexts=(4096,), documents=3, **three),
        "votes": Decode(variants=("faithful", "hard", "logit", "paper"), documents=4, **_NEAR),
        "reuse": Reuse(variants=one, documents=4, thetas=(0.7, 0.8, 0.85, 0.9, 0.95), **_NEAR),
        "mass": Mass(variants=one, documents=2, **_NEAR),
        "speed": Speed(variants=one, contexts=(8192, 16384, 32768), rounds=15, prefills=_PREFILLS,
                       budgets=(0.1,)),
    })  # fmt: skip
    # No needle stands in the window, where every variant would find it.
    hidden: Any = {"depths": (0.0, 0.2, 0.4, 0.6, 0.8), "kinds": ("filler",)}
    beyond = ("window", "window-contiguous", "faithful", "contiguous", "fixed", "released")
    yield Settings(name="report-long", split="report", variants=VARIANTS, dtype="bfloat16", tasks={
        "sparse": Sparse(variants=both, contexts=(8192,), documents=8, budgets=(0.1,)),
        "sparse-rounding": Sparse(variants=("everything",), contexts=(8192,), documents=2),
        "needles-beyond": Needles(variants=("extrapolate",), seeds=4, **hidden, **_FAR),
        "needles-beyond-natural": Needles(variants=("extrapolate",), depths=(0.1, 0.5, 0.9),
                                          seeds=2, kinds=("natural",), **_FAR),
        "needles-beyond-others": Needles(variants=("dense", *beyond), depths=(0.2, 0.6), seeds=1,
                                         kinds=("filler",), **_FAR),
        "needles-32k": Needles(variants=("extrapolate",), seeds=2,
                               **hidden | _FAR | {"contexts": (32768,)}),
        "sparse-beyond": Sparse(
            variants=("faithful", "window", "window-contiguous", "contiguous", "extrapolate"),
            documents=1, **_FAR,
        ),
    })  # fmt: skip
    several = ("every-query", "window", "means-1")
    yield Settings(name="report-voters", split="report", variants=VARIANTS, dtype="bfloat16",
        tasks={"sparse": Sparse(variants=several, contexts=(8192,), documents=8, budgets=(0.1,))},
    )  # fmt: skip
    drafts: Any = {"variants": ("drafting",), "budgets": (0.1,)}
    yield Settings(name="report-lossless", split="report", variants=VARIANTS, tasks={
        "time": Drafts(contexts=(8000,), documents=2, turns=4, **drafts),
        "prompts": Drafts(contexts=(4096, 6144, 8000), documents=7, new_tokens=24, **drafts),
    })  # fmt: skip
    # Beyond the trained length dense attention writes noise, which no draft foresees.
    yield Settings(name="report-lossless-yarn", split="report", variants=VARIANTS, yarn=4.0, tasks={
        "time": Drafts(contexts=(16000, 32000), documents=1, turns=4, **drafts),
    })  # fmt: skip


SETTINGS = {settings.name: settings for settings in _settings()}
