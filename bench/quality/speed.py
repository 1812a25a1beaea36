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
from bench.quality.session import Session, feed
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

    kind = computes = "speed"
    rounds: int = 20
    prefills: tuple[tuple[int, int], ...] = ()

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        more = session.key | {"source": source()}  # faster code is another case
        for n in self.contexts:
            several = [Contender("sdpa, DynamicCache", DENSE, True)]
            several.append(Contender("sdpa, TokenSelectCache", DENSE))
            for variant in self.selecting(settings, n):
                several.append(Contender(f"{variant.name} {variant.budget}".strip(), variant))
            label = {"context": n, "rounds": self.rounds, **here()}
            keys = [[c.name, c.stock_cache, c.variant.key] for c in several]
            yield Case(self.computes, self.run, DENSE, label, more | {"contenders": keys}, several)
        names, budgets = ("dense", *self.variants), self.budgets[:1]
        for new, cached in self.prefills:
            label = {"new": new, "cached": cached, **here()}
            for variant in resolve_all(names, settings.variants, budgets, new + cached):
                yield Case(self.computes, self.run, variant, label, more)

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            of, given = case.label, (session.path, session.gguf_file, session.dtype, case.variant)
            if case.given is not None:
                yield case, times(case.given, of["context"], of["rounds"], session)
                continue
            # In a process of its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                size = of["threads"], of["new"], of["cached"]
                yield case, pool.submit(peak, *given, *size).result()

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        return list(rows)


def source() -> str:
    """Return a sha of the package's source."""
    files = sorted(Path(tokenselect.__file__).parent.rglob("*.py"))
    return texts.sha("".join(path.read_text(encoding="utf-8") for path in files))


def here() -> dict[str, Any]:
    """Return what times depend on besides."""
    return {"threads": torch.get_num_threads(), "cpu": cpu()}


@torch.inference_mode()
def times(
    contenders: Sequence[Contender], context: int, rounds: int, session: Session
) -> dict[str, Any]:
    """Return seconds per token of each: median, least, largest; and medians of paired ratios.

    The caches hold noise: what attention takes does not depend on it. Contenders alternate token by
    token, every other round in reverse, after one round of warm-up.
    """
    model, room, caches = session.model, context + rounds + 1, []
    for _, variant, is_stock in contenders:
        empty = DynamicCache(config=model.config) if is_stock else TokenSelectCache(model, room)
        caches.append(filled(empty, session, variant, context))
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(rounds + 1):
        of_round = list(zip(contenders, caches, strict=True))[:: 1 if turn % 2 == 0 else -1]
        for (name, variant, _), cache in of_round:
            with variant.applied(model):
                start = time.perf_counter()
                feed(model, cache, (100 + turn,))
                took = time.perf_counter() - start
            seconds[name] += [took] * (turn > 0)
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

    Without those of the cache, which come with it.
    """
    torch.set_num_threads(threads)
    session = Session(path, gguf_file, dtype)
    model = session.model
    cache = TokenSelectCache(model, max_length=n + new)
    if n:
        filled(cache, session, variant, n)
    ids = tuple(i % min(1000, model.config.vocab_size) for i in range(new))
    forget_peak()
    # Of the peak itself: what is resident may shrink at any time, as the system takes back pages.
    before, held, start = resident("VmHWM"), size(cache), time.perf_counter()
    with variant.applied(model):
        feed(model, cache, ids)
    added, took = resident("VmHWM") - before - (size(cache) - held), time.perf_counter() - start
    return {"peak_mib": added / 2**20, "cache_mib": size(cache) / 2**20, "seconds": took}


def size(cache: Any) -> int:
    """Return the bytes of a cache's keys and values."""
    return sum(x.nbytes for i in cache.layers if i.is_initialized for x in (i.keys, i.values))
