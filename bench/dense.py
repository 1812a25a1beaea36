"""Dense attention: the variants that a selection competes with, and the float64 truth for both.

All of it takes contiguous keys and values whatever the cache's layout: a paged cache is gathered
for dense attention beforehand, outside any timing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect import Problem


@dataclass(frozen=True, eq=False)
class Request:
    """Attention to all of k and v: q (Hq, Lq, D), k (Hkv, n, D), v (Hkv, n, Dv).

    Query i sits at position n - Lq + i and sees no later one. `bench.gpu` puts a batch in front of
    all three.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def G(self) -> int:
        return self.q.shape[-3] // self.k.shape[-3]

    @property
    def sizes(self) -> tuple[int, int]:
        """Lq, n."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def folded(self) -> Tensor:
        """Return the queries of each group as the rows of one: (Hkv, G * Lq, D)."""
        return self.q.reshape(*self.k.shape[:-2], -1, self.q.shape[-1])

    @cached_property
    def mask(self) -> Tensor | None:
        """Return what is added to the logits (Lq, n) of each head; one query sees everything."""
        Lq, n = self.sizes
        return None if Lq == 1 else F.pad(_future(Lq, self.q), (n - Lq, 0))

    @cached_property
    def folded_mask(self) -> Tensor | None:
        """Return the mask (G * Lq, n) of the folded queries."""
        return None if self.mask is None else self.mask.repeat(self.G, 1)

    def mask_(self, logits: Tensor) -> Tensor:
        """Hide the future in folded logits (Hkv, G * Lq, n), in place: it is in the last Lq."""
        Lq, _ = self.sizes
        if Lq > 1:
            logits[:, :, -Lq:].unflatten(1, (-1, Lq)).add_(_future(Lq, logits))
        return logits


def _future(Lq: int, like: Tensor) -> Tensor:
    return torch.full((Lq, Lq), -math.inf, dtype=like.dtype, device=like.device).triu_(1)


def requests(problem: Problem) -> list[Request]:
    """Return the problem's requests: views of a contiguous cache, copies of a paged one."""
    found = []
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if problem.block_table is None:
            k, v = problem.k_cache[b, :, :n], problem.v_cache[b, :, :n]
        else:
            pages = problem.block_table[b, : math.ceil(n / problem.page_size)].long()
            k, v = (
                cache[pages].permute(2, 0, 1, 3).flatten(1, 2)[:, :n].contiguous()
                for cache in (problem.k_cache, problem.v_cache)
            )
        found.append(Request(problem.q[b], k, v, problem.scale))
    return found


@dataclass(frozen=True)
class Dense:
    """A variant of dense attention: out (Hq, Lq, Dv) of one request.

    is_call  one attention call of torch's, rather than operators put together here
    """

    name: str
    run: Callable[[Request], Tensor]
    is_call: bool = False

    def __call__(self, several: list[Request]) -> Tensor:
        return torch.stack([self.run(r).reshape(*r.q.shape[:2], -1) for r in several])


def _sdpa_gqa(r: Request) -> Tensor:
    q, k, v = r.q[None], r.k[None], r.v[None]
    return F.scaled_dot_product_attention(q, k, v, r.mask, scale=r.scale, enable_gqa=True)


def _sdpa_folded(r: Request) -> Tensor:
    q, k, v = r.folded[None], r.k[None], r.v[None]
    return F.scaled_dot_product_attention(q, k, v, r.folded_mask, scale=r.scale)


def _logits(r: Request) -> Tensor:
    """Return logits in the cache's dtype, rounded once: the scale is within the product."""
    unused = torch.empty(1, dtype=r.q.dtype)
    keys = r.k.transpose(1, 2)
    return r.mask_(torch.baddbmm(unused, r.folded, keys, beta=0, alpha=r.scale))


def _matmul(r: Request) -> Tensor:
    return torch.softmax(_logits(r), -1) @ r.v


def _matmul_float32_softmax(r: Request) -> Tensor:
    return torch.softmax(_logits(r), -1, dtype=torch.float32).to(r.v.dtype) @ r.v


def _float32_logits(r: Request, chunk: int = 1024) -> Tensor:
    """Widen keys a chunk at a time, while the chunk is in cache, as the cpu backend does."""
    Hkv, n, D = r.k.shape
    q = r.folded.float() * r.scale
    logits = torch.empty(Hkv, q.shape[1], n)
    widened = torch.empty(Hkv, min(chunk, n), D)
    for start in range(0, n, chunk):
        keys = r.k[:, start : start + chunk]
        keys = widened[:, : keys.shape[1]].copy_(keys)
        torch.bmm(q, keys.transpose(1, 2), out=logits[:, :, start : start + chunk])
    return torch.softmax(r.mask_(logits), -1).to(r.v.dtype) @ r.v


DENSE = (
    Dense("sdpa, enable_gqa", _sdpa_gqa, is_call=True),
    Dense("sdpa, group folded", _sdpa_folded, is_call=True),
    Dense("matmul, logits in cache dtype", _matmul),
    Dense("matmul, float32 softmax", _matmul_float32_softmax),
    Dense("matmul, float32 logits", _float32_logits),
)


# --- the truth ---

_CHUNK = 16 * 1024
_EXP = 2**-20  # what torch's fused attention on the CPU grants its exponential
_ALLOWANCE = 2.0


class Truth(NamedTuple):
    """Dense attention in float64, for some rows (queries) of each head.

    rows     which queries of the call
    out      (B, Hq, rows, Dv) float64
    lse      (B, Hq, rows) float64
    tolerance (B, Hq, rows) float64: the root mean square over Dv of the error that an honest dense
              attention may have
    largest  (B, Hq, 1, 1): max |v| of the head
    """

    rows: list[int]
    out: Tensor
    lse: Tensor
    tolerance: Tensor
    largest: Tensor

    def share(self, out: Tensor) -> float:
        """Return the worst row's error as a share of its tolerance; infinite if not finite."""
        error = (out[:, :, self.rows].double() - self.out).square().mean(-1).sqrt()
        return float((error / self.tolerance).nan_to_num(nan=math.inf).max())


def truth(several: list[Request], max_rows: int = 8) -> Truth:
    """Return dense attention in float64, and how far float32 arithmetic inside may be from it.

    Allowed are: float32 logits, an exponential good to 2**-20, weights p rounded once to the
    cache's dtype (as fused kernels do before they meet the values), the result rounded once.
    Taken as independent, with u the unit roundoff of that dtype and u32 of float32, they give the
    row's mean square error

        e_j = u32 * sqrt(D) * scale * |q| * |k_j|
        tolerance**2 = 4 * mean over d of sum over j p_j**2 v_jd**2 (u**2 + e_j**2 + 2**-40)
                        + u**2 out_d**2

    where 4 is the margin. Unlike a worst-case bound it does not grow with n, so that it tells an
    honest call from one that rounds its logits at any length.
    """
    with several[0].q.device:
        per_request = [_truth(r, _rows(r.q.shape[1], max_rows)) for r in several]
    out, lse, tolerance, largest = (torch.stack(parts) for parts in zip(*per_request, strict=True))
    return Truth(_rows(several[0].q.shape[1], max_rows), out, lse, tolerance, largest)


def _rows(Lq: int, max_rows: int) -> list[int]:
    return torch.linspace(0, Lq - 1, min(Lq, max_rows)).round().int().tolist()


def _truth(r: Request, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Hkv, n, D = r.k.shape
    G, Lq, Dv = len(r.q) // Hkv, r.q.shape[1], r.v.shape[2]
    u = torch.finfo(r.q.dtype).eps / 2
    last_seen = torch.tensor([n - Lq + i for i in rows]).repeat(G)
    parts = []
    for g in range(Hkv):
        q = r.q[g * G : (g + 1) * G, rows].double().flatten(0, 1)
        logits = _exact_logits(q, r.k[g], r.scale)
        logits.masked_fill_(torch.arange(n) > last_seen[:, None], -math.inf)
        lse = logits.logsumexp(1)
        out = torch.zeros(len(q), Dv, dtype=torch.float64)
        variance, largest = torch.zeros_like(out), torch.zeros((), dtype=torch.float64)
        logit_error = 2**-24 * math.sqrt(D) * r.scale * q.norm(dim=1, keepdim=True)
        for chunk in _chunks(n):
            values, norms = r.v[g, chunk].double(), r.k[g, chunk].double().norm(dim=1)
            weights = torch.exp(logits[:, chunk] - lse[:, None])
            error = u**2 + (logit_error * norms).square() + _EXP**2
            out += weights @ values
            variance += (weights.square() * error) @ values.square()
            largest = torch.maximum(largest, values.abs().max())
        tolerance = _ALLOWANCE * (variance + (u * out).square()).mean(1).sqrt()
        found = (x.view(G, len(rows), *x.shape[1:]) for x in (out, lse, tolerance))
        parts.append((*found, largest.expand(G, 1, 1)))
    out, lse, tolerance, largest = (torch.cat(part) for part in zip(*parts, strict=True))
    return out, lse, tolerance, largest


def votes(r: Request) -> Tensor:
    """Return the softmax mass (Hkv, n) that a group's mean queries give each token in total."""
    q = r.q.double().mean(1).view(len(r.k), -1, r.q.shape[2])
    logits = [_exact_logits(of_group, keys, r.scale) for of_group, keys in zip(q, r.k, strict=True)]
    return torch.softmax(torch.stack(logits), -1).sum(1)


def _exact_logits(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return float64 logits (rows, n) of one KV head; keys are widened a chunk at a time."""
    logits = torch.empty(len(q), len(keys), dtype=torch.float64, device=q.device)
    for chunk in _chunks(len(keys)):
        logits[:, chunk] = q @ keys[chunk].double().T * scale
    return logits


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK))
