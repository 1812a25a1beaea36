"""What a layer's ranks send each other per token, and from what length on selection pays then.

    python -m bench.parallel                 the tables of docs/scale.md: computed
    python -m bench.parallel --measure 2     beside that, bytes counted and times on this machine

A byte is counted once per receiver. The times of the tables are computed from rates, which are
arguments: bytes read from memory and sent, and a latency per exchange. Nothing else takes time in
them, so that they say where selection cannot pay, and not that it does.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.dense import DENSE, Request
from bench.machine import describe
from tokenselect import SelectConfig, attention
from tokenselect.context_parallel import context_parallel_attention
from tokenselect.dispatch import ranks

SHAPE = {"Hq": 64, "Hkv": 8, "D": 128}
CONFIG = SelectConfig()
BYTES = 2  # of a number in the cache
# Measured with fewer query heads; and with room in the cache for more tokens, as while it grows.
HQ_MEASURED, ROOM = 32, 64


@dataclass(frozen=True)
class Rates:
    """memory and link in bytes per second and direction, latency in seconds per exchange."""

    memory: float
    link: float
    latency: float


# An H100's memory; NVLink within eight GPUs, a network of 400 Gb/s per GPU among more.
RATES = {8: Rates(3.35e12, 450e9, 10e-6), 64: Rates(3.35e12, 50e9, 30e-6)}


def sent_by_heads(n: int, size: int) -> int:
    """Bytes that a rank sends per token where the heads are on ranks: the votes, two ways."""
    return 2 * (size - 1) * 4 * -(-n // size)


def sent_by_tokens(size: int, Hq: int, D: int) -> dict[str, int]:
    """Bytes that a rank sends per token where the tokens are, by what they are."""
    others = size - 1
    return {
        "maximum": others * Hq * 4,
        "sum": others * Hq * 8,
        "best": others * CONFIG.budget(0) * 8,
        "out, lse": others * Hq * (D + 1) * 4,
    }


def kv_heads(size: int) -> int:
    """KV heads of a rank where the heads are on ranks: replicated where there are more ranks."""
    return max(1, SHAPE["Hkv"] // size)


def seconds(n: int, size: int, rates: Rates, over: str) -> tuple[float, float]:
    """Return the least time per token and layer: dense, and with selection."""
    heads, tokens = (kv_heads(size), n) if over == "heads" else (SHAPE["Hkv"], -(-n // size))
    row = heads * SHAPE["D"] * BYTES
    attended = min(n, CONFIG.n_sink + CONFIG.budget(n) + CONFIG.n_local) * tokens / n
    reads = tokens * row + 2 * attended * row
    if over == "heads":
        dense_sent, dense_turns = 0, 0
        sent, turns = sent_by_heads(n, size), 2
    else:
        parts = sent_by_tokens(size, SHAPE["Hq"], SHAPE["D"])
        dense_sent, dense_turns = parts["out, lse"], 1
        sent, turns = sum(parts.values()), 4
    return (
        2 * tokens * row / rates.memory + dense_sent / rates.link + dense_turns * rates.latency,
        reads / rates.memory + sent / rates.link + turns * rates.latency,
    )


def pays_from(size: int, rates: Rates, over: str) -> int | None:
    """Return the least power of two from which on selection can be faster than dense attention."""
    for n in (2**i for i in range(10, 28)):
        dense, selected = seconds(n, size, rates, over)
        if selected < dense:
            return n
    return None


def tables() -> str:
    """Return the tables of docs/scale.md, in markdown."""
    of_tokens = {size: sent_by_tokens(size, SHAPE["Hq"], SHAPE["D"]) for size in (8, 64)}
    lines = ["| sent by a rank, per token and layer | 8 ranks | 64 ranks |", "|---|---|---|"]
    for n in (2**20, 4 * 2**20, 10 * 2**20):
        cells = [f"{sent_by_heads(n, size):,}" for size in (8, 64)]
        lines.append(f"| heads on ranks: votes, {n:,} tokens | {' | '.join(cells)} |")
    for name in of_tokens[8]:
        cells = [f"{of_tokens[size][name]:,}" for size in (8, 64)]
        lines.append(f"| tokens on ranks: {name} | {' | '.join(cells)} |")
    cells = [f"{sum(of_tokens[size].values()):,}" for size in (8, 64)]
    lines += [f"| tokens on ranks, together, at any length | {' | '.join(cells)} |", ""]
    lines += [
        "| on ranks | ranks | dense, selected at 1M tokens, µs | 4M | 10M | can pay from |",
        "|---|---|---|---|---|---|",
    ]
    for over in ("heads", "tokens"):
        for size, rates in RATES.items():
            cells = []
            for n in (2**20, 4 * 2**20, 10 * 2**20):
                dense, selected = (1e6 * s for s in seconds(n, size, rates, over))
                cells.append(f"{dense:,.0f}, {selected:,.0f}: {dense / selected:.2f}x")
            least = pays_from(size, rates, over)
            cells.append("never" if least is None else f"{least:,} tokens")
            lines.append(f"| {over} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Counted:
    """Counts what the ranks send, each byte once per receiver, while they send it."""

    def __init__(self, size: int) -> None:
        self.bytes = 0
        exchange, gather = dist.all_to_all_single, ranks._all_gather

        def counted_exchange(out: Tensor, given: Tensor, **more: Any) -> None:
            self.bytes += given.nbytes * (size - 1) // size
            exchange(out, given, **more)

        def counted_gather(out: Tensor, given: Tensor, **more: Any) -> None:
            self.bytes += given.nbytes * (size - 1)
            gather(out, given, **more)

        dist.all_to_all_single, ranks._all_gather = counted_exchange, counted_gather


def measured(rank: int, size: int, store: str, lengths: list[int]) -> None:
    """Take times of a token's attention on every rank, in turns; hold the bytes to the formulas."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    counted = Counted(size)
    for n in lengths:
        ways, due = ways_of(rank, size, n), sent(size, n + ROOM)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(8):
            for name, way in ways.items():
                dist.barrier()
                counted.bytes = 0
                start = time.perf_counter()
                way()
                if turn > 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
                if counted.bytes != due.get(name, counted.bytes):
                    raise SystemExit(f"{name}: {counted.bytes} bytes sent, {due[name]} computed")
        for over in ("heads", "tokens"):
            dense = min(median(x) for name, x in times.items() if name.startswith(f"{over}: d"))
            name = f"{over}: selected"
            row = f"| {over} | {n:,} | {due[name]:,} | {dense:.1f} | {median(times[name]):.1f} "
            if rank == 0:
                print(f"{row}| {median(times[name]) / dense:.2f} |", flush=True)
    dist.destroy_process_group()


def sent(size: int, capacity: int) -> dict[str, int]:
    """Return the bytes that a rank sends in each way that selects."""
    return {
        "heads: selected": sent_by_heads(capacity, size),
        "tokens: selected": sum(sent_by_tokens(size, HQ_MEASURED, SHAPE["D"]).values()),
    }


def ways_of(rank: int, size: int, n: int) -> dict[str, Callable[[], Any]]:
    """Return a token's attention in every way: selected, and dense, the fastest of which counts.

    Dense attention to some tokens sends its result and lse; merging is left out.
    """
    group, Hq, Hkv, D = dist.group.WORLD, HQ_MEASURED, SHAPE["Hkv"], SHAPE["D"]
    assert group is not None
    of_all = ranks.Ranks(group.group_name)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, Hq, 1, D), generator=generator).bfloat16()
    k, v = (torch.randn((1, Hkv, n + ROOM, D), generator=generator).bfloat16() for _ in range(2))
    mine = slice(rank * Hkv // size, (rank + 1) * Hkv // size)
    own_q, *own = q.chunk(size, 1)[rank], k[:, mine].contiguous(), v[:, mine].contiguous()
    at = torch.arange(n + ROOM)[rank::size]
    part = k[:, :, rank::size].contiguous(), v[:, :, rank::size].contiguous()
    length = torch.tensor([n], dtype=torch.int32)
    settings: Any = {"config": CONFIG, "process_group": group, "validate": False}
    of_heads = Request(own_q[0], own[0][0, :, :n], own[1][0, :, :n], D**-0.5)
    held = int((at < n).sum())
    of_tokens = Request(q[0], part[0][0, :, :held], part[1][0, :, :held], D**-0.5)
    out = torch.zeros(1, Hq, 1, D + 1)

    def dense_tokens(dense: Any) -> None:
        dense([of_tokens])
        of_all.gather(out)

    ways: dict[str, Callable[[], Any]] = {}
    for dense in DENSE:
        ways[f"heads: dense, {dense.name}"] = partial(dense, [of_heads])
        ways[f"tokens: dense, {dense.name}"] = partial(dense_tokens, dense)
    ways["heads: selected"] = partial(attention, own_q, *own, cache_seqlens=length, **settings)
    ways["tokens: selected"] = partial(context_parallel_attention, q, *part, at, length, **settings)
    return ways


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; with --measure, what so many processes here send, and how long it takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", type=int, metavar="RANKS", help="processes, over loopback")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths to measure")
    asked = parser.parse_args(arguments)
    if asked.measure is None:
        if asked.tokens is not None:
            parser.error("--tokens goes with --measure; the tables have lengths of their own")
        print(tables())
        return
    lengths = asked.tokens or [8192, 32_768, 131_072]
    if min(lengths) < CONFIG.budget(0):
        parser.error(f"--tokens: at least {CONFIG.budget(0)}, as many as are selected")
    if asked.measure < 2 or SHAPE["Hkv"] % asked.measure:
        parser.error(f"--measure {asked.measure}: 2, 4 or 8 ranks share the 8 KV heads")
    print(describe(1))
    print("| on ranks | tokens | bytes sent by a rank | dense, ms | selected, ms | ratio |")
    print("|---|---|---|---|---|---|")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(measured, (asked.measure, store, lengths), nprocs=asked.measure)


if __name__ == "__main__":
    main()
