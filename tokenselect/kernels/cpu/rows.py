"""Rows of a cache, read and turned a chunk at a time, in memory that is taken once.

That memory is from `scratch.empty`, and how much of it depends on shapes and settings alone.
"""

import math

import torch
from torch import Tensor

from tokenselect.contract import Problem
from tokenselect.rope import Rope
from tokenselect.scratch import empty

# A chunk of converted keys should stay in the processor's cache while it is multiplied; but it has
# no fewer tokens of a request than this.
_CHUNK_BYTES = 2 * 2**20
_LEAST_CHUNK = 64


def as_rows(cache: Tensor) -> tuple[Tensor, list[int]]:
    """View a cache of any strides as a tall matrix; return it and the rows per step along each dim.

    Some of the rows may overlap, and some lie between those of the cache.
    """
    *strides, element = cache.stride()
    pitch = max(1, math.gcd(*strides))
    n_rows = (
        1
        + sum((size - 1) * stride for size, stride in zip(cache.shape[:-1], strides, strict=True))
        // pitch
    )
    matrix = cache.as_strided((n_rows, cache.shape[-1]), (pitch, element))
    return matrix, [stride // pitch for stride in strides]


class Reader:
    """Rows of a cache in the precision inside, in memory for so many tokens of requests."""

    def __init__(self, problem: Problem, cache: Tensor, tokens: int, lists: int) -> None:
        """Take memory for `tokens` per request; lists: of positions per request, 1 or S."""
        p, device, width = problem, cache.device, cache.shape[3]
        self.problem, self.cache = problem, cache
        self.matrix, (outer, middle, inner) = as_rows(cache)
        self.converted = empty((tokens * p.Hkv * width,), p.compute_dtype, device)
        self.as_cached = self.converted
        if cache.dtype != self.converted.dtype:
            self.as_cached = empty((tokens * p.Hkv * width,), cache.dtype, device)
        self.row = empty((tokens * p.Hkv,), torch.int64, device)
        self.start, self.slot = (empty((tokens * lists,), torch.int64, device) for _ in range(2))
        self.head = torch.arange(p.Hkv, out=empty((p.Hkv,), torch.int64, device), device=device)
        if p.is_paged:
            self.page = empty((tokens * lists,), torch.int32, device)
            self.size, self.outer = scalar_like(p.page_size, self.row), scalar_like(outer, self.row)
            self.head.mul_(scalar_like(inner, self.row))
            self.middle = middle
        else:
            request = torch.arange(p.B, out=empty((p.B,), torch.int64, device), device=device)
            self.request = request.mul_(scalar_like(outer, self.row))[:, None, None]
            self.head.mul_(scalar_like(middle, self.row))
            self.inner = scalar_like(inner, self.row)

    def run(self, position: Tensor, chunk: slice) -> Tensor:
        """Return the rows at a chunk of positions of every request: (B * Hkv, chunk, width)."""
        position = position[chunk]
        if self.problem.is_paged:
            return self.read(position.expand(self.problem.B, 1, -1))
        rows = self.cache[:, :, chunk]
        return prefix_view(self.converted, *rows.shape).copy_(rows).view(-1, *rows.shape[2:])

    def read(self, position: Tensor) -> Tensor:
        """Return the rows at position (B, lists, m), from 0 to Lk - 1: (B * Hkv, m, width)."""
        B, lists, m = position.shape
        row = prefix_view(self.row, B, lists, self.problem.Hkv // lists, m)
        torch.add(self.starts(position)[:, :, None], self.head.view(lists, -1, 1), out=row)
        found = prefix_view(self.as_cached, row.numel(), self.cache.shape[3])
        torch.index_select(self.matrix, 0, row.view(-1), out=found)
        if self.as_cached is not self.converted:
            found = prefix_view(self.converted, *found.shape).copy_(found)
        return found.view(-1, m, found.shape[1])

    def starts(self, position: Tensor) -> Tensor:
        """Return the rows of the matrix that hold head 0, of positions (B, lists, m)."""
        start = prefix_view(self.start, *position.shape)
        table = self.problem.block_table
        if table is None:
            return torch.mul(position, self.inner, out=start).add_(self.request)
        page, slot = (
            prefix_view(self.page, *position.shape),
            prefix_view(self.slot, *position.shape),
        )
        torch.div(position, self.size, rounding_mode="floor", out=start)
        torch.gather(table, 1, start.view(len(table), -1), out=page.view(len(table), -1))
        start.copy_(page.clamp_(0, self.cache.shape[0] - 1)).mul_(self.outer)
        torch.remainder(position, self.size, out=slot)
        return start.add_(slot, alpha=self.middle)


def rotator(problem: Problem, where: str, n_angles: int, n_vectors: int) -> "Rotator | None":
    """Return what rotates vectors to score at, or attend at, `where`; None if nothing has to."""
    if problem.rope is None or not problem.needs_rotation(where):
        return None
    return Rotator(problem.rope, n_angles, n_vectors, problem.compute_dtype)


class Rotator:
    """`Rope.reposition` in place, in memory for so many angles, of so many vectors."""

    def __init__(self, rope: Rope, n_angles: int, n_vectors: int, dtype: torch.dtype) -> None:
        device, self.half = rope.inv_freq.device, rope.inv_freq.shape[0]
        self.rope = rope
        self.rate = empty((self.half,), torch.float64, device).copy_(rope.inv_freq)
        self.factor = scalar_like(rope.scaling if rope.cached == "raw" else 1.0, self.rate)
        self.by, self.position = (empty((n_angles,), torch.float64, device) for _ in range(2))
        size = n_angles * self.half
        self.angle, self.wave = (empty((size,), torch.float64, device) for _ in range(2))
        self.cos, self.sin = (empty((size,), dtype, device) for _ in range(2))
        self.spare = empty((n_vectors * self.half,), dtype, device)

    def rotate_(self, x: Tensor, position: Tensor, at: Tensor) -> None:
        """Move x (B, lists, heads, L, G, D) from position to at, each (B or 1, lists or 1, L)."""
        shape = torch.broadcast_shapes(position.shape, at.shape)
        by = prefix_view(self.by, *shape).copy_(at)
        if self.rope.cached == "rotated":
            by.sub_(prefix_view(self.position, *shape).copy_(position))
        angle = prefix_view(self.angle, *shape, self.half)
        torch.mul(by[..., None], self.rate, out=angle)
        wave = prefix_view(self.wave, *shape, self.half)
        cos, sin = (prefix_view(memory, *angle.shape) for memory in (self.cos, self.sin))
        cos.copy_(torch.cos(angle, out=wave).mul_(self.factor))
        sin.copy_(torch.sin(angle, out=wave).mul_(self.factor))
        cos, sin = cos[:, :, None, :, None], sin[:, :, None, :, None]
        if self.rope.interleaved:
            first, second = x[..., 0 : 2 * self.half : 2], x[..., 1 : 2 * self.half : 2]
        else:
            first, second = x[..., : self.half], x[..., self.half : 2 * self.half]
        part = torch.mul(first, sin, out=prefix_view(self.spare, *first.shape))
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(part)


def chunks(problem: Problem, total: int) -> tuple[int, int]:
    """Return how many of `total` tokens per request are read at once; an upper bound times B.

    The bound does not grow when B or total shrink, unlike the width.
    """
    p = problem
    fitting = _CHUNK_BYTES // (p.Hkv * max(p.D, p.Dv) * p.compute_dtype.itemsize)
    width = min(max(_LEAST_CHUNK, fitting // p.B), total)
    return width, min(max(_LEAST_CHUNK * p.B, fitting), p.B * total)


def slices(total: int, width: int) -> list[slice]:
    """Return the slices from 0 to total, `width` at a time."""
    return [slice(start, min(start + width, total)) for start in range(0, total, width)]


def scalar_like(value: float, like: Tensor) -> Tensor:
    """Return a tensor of one number, of the dtype and device of `like`."""
    return empty((), like.dtype, like.device).fill_(value)


def prefix_view(memory: Tensor, *shape: int) -> Tensor:
    """Return the first part of flat memory, in that shape."""
    return memory[: math.prod(shape)].view(shape)
