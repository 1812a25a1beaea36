"""Decode time per token beside stock attention, and the memory that a prefill takes; on the CPU."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.quality.figures import Row
from bench.quality.lab import Cell, Lab, fed, rewound
from bench.quality.provenance import source_tree
from bench.quality.ways import DENSE, Budget, Way, resolve, resolve_all, selecting
from bench.run import _cpu as cpu
from tokenselect.integrations.transformers import TokenSelectCache

_CHUNK = 512


@dataclass(frozen=True)
class Settings:
    """contexts: cached tokens; rounds: tokens timed a side; prefills: [new, cached] tokens, the
    peak memory of which is measured for dense attention and each way."""

    ways: tuple[str, ...]
    contexts: tuple[int, ...] = field(metadata={"least": 1})
    rounds: int = field(default=20, metadata={"least": 3})
    prefills: tuple[tuple[int, ...], ...] = field(default=(), metadata={"may_be_empty": True})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


@dataclass(frozen=True)
class Side:
    """A way to attend over a kind of cache."""

    name: str
    way: Way
    stock_cache: bool = False

    @property
    def cache(self) -> tuple[bool, bool]:
        """Sides that say the same share a cache."""
        return self.stock_cache, self.way.moves


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    here = _here() | {"source": source_tree()}  # faster code is another cell
    for context in settings.contexts:
        ways = selecting(resolve_all(settings.ways, plan.ways, settings.budgets, context))
        stock = [Side("sdpa, DynamicCache", DENSE, True), Side("sdpa, TokenSelectCache", DENSE)]
        sides = stock + [Side(f"{way.name} {way.budget}".strip(), way) for way in ways]
        keys = [[side.name, side.stock_cache, side.way.key] for side in sides]
        what = {"context": context, "rounds": settings.rounds}
        yield Cell(
            task="speed",
            key=lab.key | {"sides": keys} | what | here,
            label=what | _here(),
            work=f"speed {what}",
            seconds=settings.rounds * len(sides) * (0.1 + context * 1e-5),
            way=DENSE,
            given=sides,
        )
    for new, cached in settings.prefills:
        for name in dict.fromkeys(("dense", *settings.ways)):
            way = resolve(name, plan.ways, (*settings.budgets, None)[0], new + cached)
            what = {"new": new, "cached": cached}
            yield Cell(
                task="speed",
                key=lab.key | {"memory": way.key} | what | here,
                label=what | way.label | _here(),
                work=f"memory {what} {way.key}",
                seconds=0.01 * new + 10,
                way=way,
                given="memory",
            )


def _here() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "cpu": cpu()}


def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        if cell.given == "memory":
            yield cell, peak(cell, lab)
        else:
            yield cell, times(cell.given, cell.label["context"], cell.label["rounds"], lab)


@torch.inference_mode()
def times(sides: Sequence[Side], context: int, rounds: int, lab: Lab) -> dict[str, Any]:
    """Seconds a token of each side: median, least, largest; and medians of paired ratios.

    The caches hold noise: what attention takes does not depend on it. Sides alternate token by
    token, every other round in reverse, after one round of warm-up.
    """
    from transformers.cache_utils import DynamicCache

    caches: dict[tuple[bool, bool], Any] = {}
    for side in sides:
        if side.cache not in caches:
            made = (
                DynamicCache(config=lab.model.config)
                if side.stock_cache
                else TokenSelectCache(lab.model, max_length=context + 1)
            )
            caches[side.cache] = filled(made, lab, side.way, context)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides if turn % 2 == 0 else reversed(sides):
            cache = caches[side.cache]
            with rewound(cache), side.way.attached(lab.model):
                start = time.perf_counter()
                fed(lab.model, cache, (100 + turn,))
                took = time.perf_counter() - start
            if turn > 0:
                seconds[side.name].append(took)
    baselines = [side.name for side in sides if side.way.kind == "dense"]
    return {
        "sides": [
            {"name": name, "median": median(s), "least": min(s), "largest": max(s)}
            | {
                f"of {base}": median(a / b for a, b in zip(s, seconds[base], strict=True))
                for base in baselines
            }
            for name, s in seconds.items()
        ]
    }


def filled(cache: Any, lab: Lab, way: Way, n: int) -> Any:
    """The cache with n more tokens: one read by the way, and noise for those after it."""
    draw = torch.Generator().manual_seed(0)
    with way.attached(lab.model):
        fed(lab.model, cache, (0,))
    for layer in cache.layers:
        heads, width = layer.keys.shape[1], layer.keys.shape[3]
        noise = torch.randn(2, 1, heads, n - 1, width, generator=draw)
        layer.update(*noise.to(lab.model.dtype))
    return cache


def summary(rows: Sequence[Row]) -> list[Row]:
    return list(rows)


# --- memory, in a process of its own ---


def peak(cell: Cell, lab: Lab) -> dict[str, Any]:
    """MiB that one prefill of `new` tokens on top of `cached` adds to a process, at most.

    The cache has its room before, so that what is added is what reading takes.
    """
    job = {
        "model": str(lab.path),
        "gguf_file": lab.gguf_file,
        "dtype": lab.dtype,
        "way": cell.way.key,
        "threads": torch.get_num_threads(),
        "new": cell.label["new"],
        "cached": cell.label["cached"],
    }
    command = [sys.executable, "-m", "bench.quality.tasks.speed"]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that was to measure memory failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job in this process."""
    torch.set_num_threads(job["threads"])
    options = dict(job["way"])
    kind = options.pop("attend")
    way = DENSE if kind == "dense" else resolve("it", {"it": options}, None, 0)
    lab = Lab(Path(job["model"]), job["gguf_file"], job["dtype"])
    n = job["cached"] + job["new"]
    cache = TokenSelectCache(lab.model, max_length=n)
    if job["cached"]:
        filled(cache, lab, way, job["cached"])
    with rewound(cache):  # so the cache has its memory
        filled(cache, lab, way, job["new"])
    ids = tuple(i % min(1000, lab.model.config.vocab_size) for i in range(job["new"]))
    _reset_peak()
    # Of the peak itself: what is resident may shrink at any time, as the system takes back pages.
    before, start = _resident("VmHWM"), time.perf_counter()
    with way.attached(lab.model):
        fed(lab.model, cache, ids)
    added = _resident("VmHWM") - before
    held = [
        getattr(layer, "_buffers", None) or (layer.keys, layer.values) for layer in cache.layers
    ]
    size = sum(tensor.nbytes for tensors in held for tensor in tensors)
    return {"peak_mib": added, "cache_mib": size / 2**20, "seconds": time.perf_counter() - start}


def _resident(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{name}:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(measure(json.load(sys.stdin))))
