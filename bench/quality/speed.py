"""Decode time per token beside stock attention, and the memory that a prefill takes; on the CPU."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

import tokenselect
from bench.machine import cpu, forget_peak, resident
from bench.quality import texts
from bench.quality.figures import Row
from bench.quality.session import Session, feed, rewound
from bench.quality.tasks import Case, Settings, Task, Values
from bench.quality.variants import DENSE, Variant, resolve_all
from tokenselect.integrations.transformers import TokenSelectCache


class Contender(NamedTuple):
    """A variant over a kind of cache."""

    name: str
    variant: Variant
    stock_cache: bool = False


@dataclass(frozen=True, kw_only=True)
class Speed(Task):
    """Time `rounds` tokens of each contender over caches of `contexts` tokens.

    prefills  [new, cached] tokens, of which dense attention's and each variant's peak memory is
              measured, at the first budget
    """

    kind = "speed"
    contexts: tuple[int, ...]
    rounds: int = 20
    prefills: tuple[tuple[int, int], ...] = ()

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        here = {"threads": torch.get_num_threads(), "cpu": cpu()}
        files = sorted(Path(tokenselect.__file__).parent.rglob("*.py"))
        # Faster code is another case.
        source = texts.sha("".join(path.read_text(encoding="utf-8") for path in files))
        stock = Contender("sdpa, DynamicCache", DENSE, True)
        for context in self.contexts:
            several = [stock, Contender("sdpa, TokenSelectCache", DENSE)]
            for variant in self.selecting(settings, context):
                several.append(Contender(f"{variant.name} {variant.budget}".strip(), variant))
            keys = [[c.name, c.stock_cache, c.variant.key] for c in several]
            label = {"context": context, "rounds": self.rounds, **here}
            yield self.case(session, DENSE, several, label, source=source, contenders=keys)
        names, budgets = dict.fromkeys(("dense", *self.variants)), self.budgets[:1]
        for new, cached in self.prefills:
            for variant in resolve_all(names, settings.variants, budgets, new + cached):
                label = {"new": new, "cached": cached, **here}
                yield self.case(session, variant, None, label, source=source)

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            label = case.label
            if case.given is not None:
                yield case, times(case.given, label["context"], label["rounds"], session)
                continue
            # In a process of its own.
            given = session.path, session.gguf_file, session.dtype, case.variant
            size = label["threads"], label["new"], label["cached"]
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                yield case, pool.submit(peak, *given, *size).result()

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        return list(rows)


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
    bases = {f"of {c.name}": seconds[c.name] for c in contenders if c.variant.kind == "dense"}
    return {
        "contenders": [
            {"name": name, "median": median(s), "least": min(s), "largest": max(s)}
            | {
                of: median(a / b for a, b in zip(s, base, strict=True))
                for of, base in bases.items()
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


@torch.inference_mode()
def peak(
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
    forget_peak()
    # Of the peak itself: what is resident may shrink at any time, as the system takes back pages.
    before, start = resident("VmHWM"), time.perf_counter()
    with variant.applied(model):
        feed(model, cache, ids)
    added, took = resident("VmHWM") - before, time.perf_counter() - start
    several = [getattr(i, "_buffers", None) or (i.keys, i.values) for i in cache.layers]
    size = sum(tensor.nbytes for tensors in several for tensor in tensors)
    return {"peak_mib": added / 2**20, "cache_mib": size / 2**20, "seconds": took}
