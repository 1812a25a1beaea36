"""Decode time per token beside stock attention, and the memory that a prefill takes; on the CPU."""

import multiprocessing
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from bench.machine import cpu
from bench.quality.figures import Row
from bench.quality.results import source_tree
from bench.quality.session import Case, Session, feed, rewound
from bench.quality.tasks import Settings, Task, Values
from bench.quality.variants import DENSE, Variant, resolve
from tokenselect.integrations.transformers import TokenSelectCache


@dataclass(frozen=True, kw_only=True)
class Speed(Task):
    """Time `rounds` tokens of each contender over caches of `contexts` tokens.

    prefills  [new, cached] tokens, of which dense attention's and each variant's peak memory is
              measured
    """

    kind = "speed"
    contexts: tuple[int, ...]
    rounds: int = 20
    prefills: tuple[tuple[int, int], ...] = ()

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        here = {"threads": torch.get_num_threads(), "cpu": cpu()}
        base = session.key | here | {"source": source_tree()}  # faster code is another case
        for context in self.contexts:
            several = [
                Contender("sdpa, DynamicCache", DENSE, True),
                Contender("sdpa, TokenSelectCache", DENSE),
                *(
                    Contender(f"{variant.name} {variant.budget}".strip(), variant)
                    for variant in self.selecting(settings, context)
                ),
            ]
            keys = [[c.name, c.stock_cache, c.variant.key] for c in several]
            what = {"context": context, "rounds": self.rounds}
            yield Case(
                task="speed",
                key=base | what | {"contenders": keys},
                label=what | here,
                work=f"speed {what}",
                seconds=self.rounds * len(several) * (0.1 + context * 1e-5),
                variant=DENSE,
                given=several,
            )
        for new, cached in self.prefills:
            for name in dict.fromkeys(("dense", *self.variants)):
                budget = self.budgets[0] if self.budgets else None
                variant = resolve(name, settings.variants, budget, new + cached)
                what = {"new": new, "cached": cached}
                label = {"variant": variant.name, "budget": variant.budget}
                yield Case(
                    task="speed",
                    key=base | what,
                    label=what | label | here,
                    work=f"memory {what} {variant.key}",
                    seconds=0.01 * new + 10,
                    variant=variant,
                )

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            if case.given is None:
                yield case, peak(case, session)
            else:
                yield case, times(case.given, case.label["context"], case.label["rounds"], session)

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        return list(rows)


class Contender(NamedTuple):
    """A variant over a kind of cache."""

    name: str
    variant: Variant
    stock_cache: bool = False


@torch.inference_mode()
def times(
    contenders: Sequence[Contender], context: int, rounds: int, session: Session
) -> dict[str, Any]:
    """Return seconds per token of each: median, least, largest; and medians of paired ratios.

    The caches hold noise: what attention takes does not depend on it. Contenders alternate token by
    token, every other round in reverse, after one round of warm-up.
    """
    model = session.model
    caches: dict[tuple[bool, bool], Any] = {}
    for _, variant, stock_cache in contenders:
        if (stock_cache, variant.moves) not in caches:
            cache: Any = DynamicCache(config=model.config)
            if not stock_cache:
                cache = TokenSelectCache(model, max_length=context + 1)
            caches[stock_cache, variant.moves] = filled(cache, session, variant, context)
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(rounds + 1):
        for name, variant, stock_cache in contenders if turn % 2 == 0 else reversed(contenders):
            cache = caches[stock_cache, variant.moves]
            with rewound(cache), variant.applied(model):
                start = time.perf_counter()
                feed(model, cache, (100 + turn,))
                took = time.perf_counter() - start
            if turn > 0:
                seconds[name].append(took)
    baselines = [c.name for c in contenders if c.variant.kind == "dense"]
    return {
        "contenders": [
            {"name": name, "median": median(s), "least": min(s), "largest": max(s)}
            | {
                f"of {base}": median(a / b for a, b in zip(s, seconds[base], strict=True))
                for base in baselines
            }
            for name, s in seconds.items()
        ]
    }


def filled(cache: Any, session: Session, variant: Variant, n: int) -> Any:
    """Return the cache with n more tokens: one read by the variant, and noise after it."""
    draw = torch.Generator().manual_seed(0)
    with variant.applied(session.model):
        feed(session.model, cache, (0,))
    for layer in cache.layers:
        heads, width = layer.keys.shape[1], layer.keys.shape[3]
        noise = torch.randn(2, 1, heads, n - 1, width, generator=draw)
        layer.update(*noise.to(session.model.dtype))
    return cache


# --- memory, in a process of its own ---


def peak(case: Case, session: Session) -> dict[str, Any]:
    """Measure one prefill in a process of its own."""
    model = session.path, session.gguf_file, session.dtype
    size = torch.get_num_threads(), case.label["new"], case.label["cached"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *model, case.variant, *size).result()


@torch.inference_mode()
def measure(
    path: Path, gguf_file: str | None, dtype: str, variant: Variant, threads: int, new: int, n: int
) -> dict[str, Any]:
    """Return MiB that a prefill of `new` tokens on top of n adds to this process, at most.

    The cache, whose MiB come with it, has its room before: what is added is what reading takes.
    """
    torch.set_num_threads(threads)
    session = Session(path, gguf_file, dtype)
    model = session.model
    cache = TokenSelectCache(model, max_length=n + new)
    if n:
        filled(cache, session, variant, n)
    with rewound(cache):  # so the cache has its memory
        filled(cache, session, variant, new)
    ids = tuple(i % min(1000, model.config.vocab_size) for i in range(new))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    # Of the peak itself: what is resident may shrink at any time, as the system takes back pages.
    before, start = _peak_so_far(), time.perf_counter()
    with variant.applied(model):
        feed(model, cache, ids)
    added, took = _peak_so_far() - before, time.perf_counter() - start
    several = [getattr(i, "_buffers", None) or (i.keys, i.values) for i in cache.layers]
    size = sum(tensor.nbytes for tensors in several for tensor in tensors)
    return {"peak_mib": added, "cache_mib": size / 2**20, "seconds": took}


def _peak_so_far() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024
