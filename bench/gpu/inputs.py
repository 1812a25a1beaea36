"""The recipe of `bench.workloads.make`, on the device and a head at a time: seconds, not minutes.

The numbers differ from `make`'s, which are drawn on the CPU; what they are drawn from does not.
"""

import math

import torch
from torch import Tensor

from bench.gpu.plan import Cell
from bench.workloads import (
    _N_TOPICS,
    _QUERY,
    _RECENT_KEY,
    _SINK_KEY,
    _SPAN,
    _TOPIC_KEY,
    _noise,
)
from tokenselect import Problem


def draw(cell: Cell, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """The cell's problem, on the device."""
    random = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        shape = (cell.B, cell.Hkv, cell.n, cell.D)
        k_cache, v_cache = (_noise(shape, dtype, random) for _ in range(2))
        q = torch.randn(cell.B, cell.Hq, cell.Lq, cell.D, generator=random) * _QUERY["noise"]
        normal = torch.randn(cell.B, cell.Hkv, cell.D, cell.D, generator=random)
        directions = torch.linalg.qr(normal).Q
        for b in range(cell.B):
            for g, heads in enumerate(q[b].unflatten(0, (cell.Hkv, -1))):
                _plant(heads, k_cache[b, g], v_cache[b, g], directions[b, g], random)
    return Problem.build(q.to(dtype), k_cache, v_cache, cell.config)


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
    content = 2 * math.sqrt(D) * contents[topic]
    add_rows(values, rows, content.repeat_interleave(_SPAN, 0))

    age = torch.arange(min(n, 512) - 1, -1, -1)
    newest = torch.arange(n - len(age), n)
    add_rows(keys, newest, _RECENT_KEY * torch.exp(-age / 128)[:, None] * recent)
    first = torch.arange(min(n, 4))
    add_rows(keys, first, (_SINK_KEY * sink).expand(len(first), D))
    values[:4] *= 0.1


def add_rows(x: Tensor, rows: Tensor, what: Tensor) -> None:
    """x[rows] += what in float32, also where a row comes twice, and rounded once."""
    where, which = rows.unique(return_inverse=True)
    sums = torch.zeros(len(where), x.shape[1]).index_add_(0, which, what)
    x[where] = (x[where].float() + sums).to(x.dtype)
