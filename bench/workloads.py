"""Named shapes, shared by the benchmark and the properties, and inputs that resemble attention."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenselect import Problem, SelectConfig
from tokenselect.conformance.paging import scatter

# The paper's sizes, with which it reports its speed: 2688 tokens attended to.
PAPER_SIZES = SelectConfig(k=2048, n_sink=128, n_local=512)


@dataclass(frozen=True)
class Workload:
    """One call's shape and settings. Letters as everywhere: see `tokenselect.contract`.

    n         tokens of request 0, and the cache's capacity
    shortest  those of the last one, of a batch whose lengths are evenly apart; without it request b
              holds n - b * n // (2 * B), so that a batch is ragged too
    """

    name: str
    Hq: int
    Hkv: int
    D: int
    n: int
    dtype: torch.dtype = torch.bfloat16
    B: int = 1
    Lq: int = 1
    page_size: int | None = None
    shortest: int | None = None
    config: SelectConfig = PAPER_SIZES
    seed: int = 0

    @property
    def Dv(self) -> int:
        return self.D

    def lengths(self) -> list[int]:
        """Return the tokens of each request."""
        if self.shortest is not None:
            return [self.n - b * (self.n - self.shortest) // (self.B - 1) for b in range(self.B)]
        return [self.n - b * self.n // (2 * self.B) for b in range(self.B)]

    def describe(self) -> str:
        """Return shapes and settings in one line."""
        layout = f", pages of {self.page_size}" if self.page_size else ""
        layout += f", the shortest of {self.shortest} tokens" if self.shortest else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.n} tokens, Hq {self.Hq}, Hkv {self.Hkv}, D {self.D}, {dtype}, "
            f"B {self.B}, Lq {self.Lq}, k {self.config.k}{layout}"
        )


_TINY = SelectConfig(k=64, n_sink=8, n_local=32)

# Timed by default, in this order: growing caches, so that memory peaks late.
TIMED = (
    Workload("short-600", 9, 3, 64, n=600, dtype=torch.float32, config=_TINY),
    # Everything is selected.
    Workload("all-2k", 9, 3, 64, n=2048, dtype=torch.float32, config=SelectConfig(2048)),
    Workload("all-8k", 9, 3, 64, n=8192, dtype=torch.float32, config=SelectConfig(8192)),
    # A tenth of the tokens.
    Workload(
        *("smollm2-8k-tenth", 9, 3, 64, 8192),
        dtype=torch.float32,
        config=SelectConfig(k=675, n_sink=16, n_local=128),
    ),
    Workload("smollm2-8k", Hq=9, Hkv=3, D=64, n=8 * 1024, dtype=torch.float32),
    Workload("decode-32k", Hq=32, Hkv=8, D=128, n=32 * 1024),
    Workload("decode-128k", Hq=32, Hkv=8, D=128, n=128 * 1024),
    Workload("ragged-64k", Hq=32, Hkv=8, D=128, n=64 * 1024, B=8, shortest=4 * 1024),
    Workload("qwen-128k", Hq=28, Hkv=4, D=128, n=128 * 1024),
    Workload("paged-128k", Hq=32, Hkv=8, D=128, n=128 * 1024, page_size=16),
    Workload("prefill-128k", Hq=4, Hkv=1, D=128, n=128 * 1024, Lq=512),
    Workload("decode-1m", Hq=32, Hkv=8, D=128, n=1024 * 1024),
)

# Small enough for the reference, same geometries.
TINY = (
    Workload("tiny-decode", Hq=32, Hkv=8, D=128, n=600, config=_TINY),
    Workload("tiny-smollm2", Hq=9, Hkv=3, D=64, n=500, dtype=torch.float32, B=2, config=_TINY),
    Workload("tiny-qwen", Hq=28, Hkv=4, D=128, n=400, config=_TINY),
    Workload("tiny-paged", Hq=8, Hkv=2, D=64, n=500, B=3, page_size=16, config=_TINY),
    Workload("tiny-prefill", Hq=8, Hkv=2, D=64, n=500, Lq=48, config=_TINY),
    Workload(
        "tiny-group",
        *(8, 2, 64, 2048),
        config=SelectConfig(k=64, n_sink=8, n_local=32, scope="group"),
    ),
)

WORKLOADS = {workload.name: workload for workload in (*TIMED, *TINY)}

# The recipe's constants; `make` says what they mean.
_N_TOPICS = 6
_SPAN = 16
_TILE = 16 * 1024
_QUERY = {"sink": 0.8, "recent": 0.4, "first topic": 0.8, "second topic": 0.4, "noise": 0.3}
_SINK_KEY, _RECENT_KEY, _TOPIC_KEY = 18.0, 20.0, 17.0


def make(
    workload: Workload,
    *,
    n: int | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    filler: float = 0.0,
) -> Problem:
    """Draw the workload's inputs, with n tokens in place of its own if given.

    `filler` lies in the pages of nobody.

    With keys drawn alike and independent, the softmax is nearly flat and there is nothing to
    select. Here, as in trained models, a query head looks for few things and a few tokens have
    them. A KV head g has orthonormal directions u: one for the sink, one for recent tokens, and
    six topics. With e standard normal noise:

    keys     e; the first 4 tokens + 18 u_sink; the newest 512 + 20 exp(-age / 128) u_recent; and
             spans of 16 tokens, one in 64, each + a u_topic, where a = 17 r^(-1/4) for the r-th
             strongest span of the KV head
    queries  sqrt(D) * (0.8 u_sink + 0.4 u_recent + 0.8 u_topic + 0.4 u_topic' + 0.3 e / sqrt(D)),
             two topics per head; the queries of one call share them and differ in e
    values   e, + 2 w_topic in a span of a topic (w another unit vector, times sqrt(D)), times 0.1
             in the first 4 tokens: a sink's value is small

    The scaled logits of the sink reach about 14, those of the strongest spans the same, over noise
    of standard deviation 1.3; `bench.run` prints the retained mass that comes of it. Deterministic
    in (workload, n, seed) on one device and torch version.

    e is a tile of 16K normal rows, repeated with other signs of its columns for every head and
    repetition: a million tokens take seconds, and no second copy of the cache.
    """
    n = workload.n if n is None else n
    w = workload
    seed = w.seed if seed is None else seed
    random = torch.Generator(device).manual_seed(seed)
    lengths = [n * length // w.n for length in w.lengths()]
    with torch.device(device):
        k_cache, v_cache = (_noise((w.B, w.Hkv, n, w.D), w.dtype, random) for _ in range(2))
        q = torch.randn(w.B, w.Hq, w.Lq, w.D, generator=random) * _QUERY["noise"]
        normal = torch.randn(w.B, w.Hkv, w.D, w.D, generator=random)
        directions = torch.linalg.qr(normal).Q
        for b, length in enumerate(lengths):
            for g, heads in enumerate(q[b].unflatten(0, (w.Hkv, -1))):
                k, v = k_cache[b, g, :length], v_cache[b, g, :length]
                _plant(heads, k, v, directions[b, g], random)
        tables: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if w.page_size is not None:
        (k_cache, v_cache), table = scatter(
            (k_cache, v_cache),
            w.page_size,
            torch.Generator().manual_seed(seed),
            filler,
            n_spare=w.B,
        )
        tables["block_table"] = table.to(device)
    return Problem.build(q.to(w.dtype), k_cache, v_cache, w.config, **tables)


def _noise(shape: tuple[int, int, int, int], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    B, H, n, D = shape
    out = torch.empty(shape, dtype=dtype)
    tile = torch.randn(min(n, _TILE), D, generator=random).to(dtype)
    for part in out.view(B * H, n, D):
        for start in range(0, n, _TILE):
            signs = torch.randint(2, (D,), generator=random).mul_(2).sub_(1).to(dtype)
            rows = part[start : start + _TILE]
            torch.mul(tile[: len(rows)], signs, out=rows)
    return out


def _plant(
    q: Tensor, keys: Tensor, values: Tensor, directions: Tensor, random: torch.Generator
) -> None:
    """Add one KV head's structure to q (G, Lq, D), keys and values (n, D), in place."""
    n, D = keys.shape
    sink, recent = directions[0], directions[1]
    topics, contents = directions[2:].split(_N_TOPICS)[:2]
    pairs = torch.rand(len(q), _N_TOPICS, generator=random).argsort(1)[:, :2]
    aims = _QUERY["sink"] * sink + _QUERY["recent"] * recent
    aims = aims + _QUERY["first topic"] * topics[pairs[:, 0]]
    aims = aims + _QUERY["second topic"] * topics[pairs[:, 1]]
    q += math.sqrt(D) * aims[:, None]

    n_spans = max(_N_TOPICS, n // (64 * _SPAN))
    starts = torch.randint(max(1, n - _SPAN), (n_spans,), generator=random)
    strength = _TOPIC_KEY * torch.arange(1, n_spans + 1) ** -0.25
    topic = torch.randint(_N_TOPICS, (n_spans,), generator=random)
    topic[:_N_TOPICS] = torch.arange(_N_TOPICS)
    rows = (starts[:, None] + torch.arange(_SPAN)).clamp(max=n - 1).flatten()
    add_rows(keys, rows, (strength[:, None] * topics[topic]).repeat_interleave(_SPAN, 0))
    add_rows(values, rows, 2 * math.sqrt(D) * contents[topic].repeat_interleave(_SPAN, 0))

    age = torch.arange(min(n, 512) - 1, -1, -1)
    add_rows(keys, n - 1 - age, _RECENT_KEY * torch.exp(-age / 128)[:, None] * recent)
    add_rows(keys, torch.arange(min(n, 4)), (_SINK_KEY * sink).expand(min(n, 4), D))
    values[:4] *= 0.1


def add_rows(x: Tensor, rows: Tensor, what: Tensor) -> None:
    """Add in float32, rounded once: x[rows] += what, also where a row comes twice."""
    where, which = rows.unique(return_inverse=True)
    sums = torch.zeros(len(where), x.shape[1]).index_add_(0, which, what)
    x[where] = (x[where].float() + sums).to(x.dtype)
