"""What a selection competes with: every dense attention of torch, and FlashInfer if it is there.

A baseline is prepared once, outside any timing: masks, layouts and plans are made, code is
compiled. What it then runs returns (B, Hq, Lq, Dv). It may raise at any step: that is listed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.checks import Found
from bench.dense import Request, Truth
from bench.gpu.device import Ready
from bench.gpu.timing import Contender
from tokenselect import Problem

# --- scaled_dot_product_attention ---

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa(backend: str, a: Request, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Ready:
    """One backend of the call, and no other; its result in the shape of the queries."""

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=a.scale, **settings)
        return out.reshape(a.q.shape)

    return Ready(run, partial(sdpa_kernel, _BACKENDS[backend]))


def _gqa(backend: str, a: Request) -> Ready:
    return _sdpa(backend, a, a.q, a.k, a.v, enable_gqa=True)


def _folded(backend: str, a: Request) -> Ready:
    return _sdpa(backend, a, a.folded, a.k, a.v)


def _chunk_lower_right(a: Request) -> Ready:
    mask = causal_lower_right(*a.sizes)
    return _sdpa("flash", a, a.q, a.k, a.v, attn_mask=mask, enable_gqa=True)


def _chunk_lower_right_expanded(a: Request) -> Ready:
    """For a backend that knows no groups: each group a batch entry, its keys seen by G heads."""
    q = a.q.reshape(-1, a.G, *a.q.shape[2:])
    k, v = (x.flatten(0, 1)[:, None].expand(-1, a.G, -1, -1) for x in (a.k, a.v))
    return _sdpa("efficient", a, q, k, v, attn_mask=causal_lower_right(*a.sizes))


def _chunk_masked(backend: str, a: Request) -> Ready:
    return _sdpa(backend, a, a.q, a.k, a.v, attn_mask=a.mask[None, None], enable_gqa=True)


# --- others of torch's ---


def _matmul(a: Request) -> Ready:
    """Two matrix products with float32 logits between. They are a cache's keys times G rows."""
    q, k, v = a.folded.flatten(0, 1), a.k.flatten(0, 1), a.v.flatten(0, 1)

    def run() -> Tensor:
        logits = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).mul_(a.scale)
        return torch.bmm(torch.softmax(logits, -1).to(v.dtype), v).view(a.q.shape)

    return Ready(run)


def _flex(a: Request) -> Ready:
    """flex_attention, compiled for this shape; on the CPU of a dry run as it is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention: Any = flex_attention
    if a.q.is_cuda:
        torch._dynamo.reset()  # or the limit on recompilations makes it fall back, in time
        attention = torch.compile(flex_attention, dynamic=False)
    block_mask, (Lq, n) = None, a.sizes
    if Lq > 1:

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + n - Lq

        block_mask = create_block_mask(sees, None, None, Lq, n, device=a.q.device)
    settings = {"block_mask": block_mask, "scale": a.scale, "enable_gqa": True}
    return Ready(partial(attention, a.q, a.k, a.v, **settings))


# --- FlashInfer ---


def _flashinfer_single(a: Request) -> Ready:
    import flashinfer

    settings = {"kv_layout": "HND", "sm_scale": a.scale, "use_tensor_cores": a.G > 1}
    given = (a.q[0, :, 0], a.k[0], a.v[0])
    run = partial(flashinfer.single_decode_with_kv_cache, *given, **settings)
    return Ready(lambda: run().view(a.q.shape))


def _flashinfer_batch(a: Request, page_size: int = 16) -> Ready:
    """Over a paged copy of the cache, planned once."""
    import flashinfer

    B, Hkv, n, D = a.k.shape
    pages = tuple(
        x.unflatten(2, (-1, page_size)).transpose(1, 2).reshape(-1, Hkv, page_size, x.shape[3])
        for x in (a.k, a.v)
    )
    each, integers = n // page_size, {"dtype": torch.int32, "device": a.q.device}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device=a.q.device),
        "HND",
        use_tensor_cores=a.G > 1,
    )
    wrapper.plan(
        torch.arange(B + 1, **integers) * each,
        torch.arange(B * each, **integers),
        torch.full((B,), page_size, **integers),
        *(a.q.shape[1], Hkv, D, page_size),
        q_data_type=a.q.dtype,
        kv_data_type=a.k.dtype,
        sm_scale=a.scale,
    )
    q = a.q[:, :, 0].contiguous()
    return Ready(lambda: wrapper.run(q, pages).view(a.q.shape))


def _flashinfer_prefill(a: Request) -> Ready:
    import flashinfer

    q = a.q[0].transpose(0, 1).contiguous()
    settings = {"causal": True, "kv_layout": "HND", "sm_scale": a.scale}
    run = partial(flashinfer.single_prefill_with_kv_cache, q, a.k[0], a.v[0], **settings)
    return Ready(lambda: run().transpose(0, 1)[None])


# --- the lists: names, how they are prepared, and about how many seconds that takes ---

_Row = tuple[str, Callable[[Request], Ready], float]
_GQA: list[_Row] = [(f"sdpa {name}, enable_gqa", partial(_gqa, name), 0) for name in _BACKENDS]
_FOLDED: list[_Row] = [
    (f"sdpa {name}, group folded", partial(_folded, name), 0) for name in _BACKENDS
]
_FLEX: _Row = ("flex_attention, compiled", _flex, 12)
_DECODE: list[_Row] = [*_GQA, *_FOLDED, ("matmul, float32 logits", _matmul, 0), _FLEX]
_CHUNK: list[_Row] = [
    ("sdpa flash, causal_lower_right, enable_gqa", _chunk_lower_right, 0),
    ("sdpa efficient, causal_lower_right, heads expanded", _chunk_lower_right_expanded, 0),
    ("sdpa cudnn, mask, enable_gqa", partial(_chunk_masked, "cudnn"), 0),
    ("sdpa math, mask, enable_gqa", partial(_chunk_masked, "math"), 0),
    _FLEX,
]
# It may compile.
_FLASHINFER_ONE: _Row = ("flashinfer, single decode", _flashinfer_single, 30)
_FLASHINFER: _Row = ("flashinfer, batch decode, paged", _flashinfer_batch, 30)
_FLASHINFER_CHUNK: _Row = ("flashinfer, single prefill", _flashinfer_prefill, 30)


def dense(a: Request, exact: Truth, reads: int) -> Iterator[Contender]:
    """Yield the dense attentions to try on a case."""
    B, Lq = a.q.shape[0], a.q.shape[2]
    rows = list(_DECODE if Lq == 1 else _CHUNK)
    if importlib.util.find_spec("flashinfer") is not None:
        if B == 1:
            rows.append(_FLASHINFER_ONE if Lq == 1 else _FLASHINFER_CHUNK)
        if Lq == 1:
            rows.append(_FLASHINFER)
    for name, prepare, seconds in rows:
        made = {"make": partial(prepare, a), "seconds": seconds, "exact": exact}
        yield Contender(name, "dense", bytes=reads, **made)


def over_gathered(a: Request, exact: Truth) -> Iterator[Contender]:
    """Yield attention to as many tokens as are selected, copied next to each other beforehand."""
    for name, prepare, _ in (*_GQA[:3], *_FOLDED[:3]) if a.q.shape[2] == 1 else _CHUNK[:3]:
        made = partial(prepare, a)
        yield Contender(f"{name}, gathered", "gathered", make=made, exact=exact)


def top_k(problem: Problem, found: Found) -> Contender:
    """torch.topk of the candidates' votes, which finds as good ones, in no order."""
    sink_end, local_start = problem.config.regions(problem.Lk, problem.Lq)
    votes = found.scores.votes[:, 0, 0, sink_end:local_start]
    k = min(problem.config.budget(problem.Lk), votes.shape[1])
    run = partial(torch.topk, votes, k, dim=1, sorted=False)
    one = Contender("torch.topk", "topk", Ready(run))
    best = run().values.sort(dim=1).values
    mine = found.selection.positions[:, 0].long()
    chosen = (mine >= sink_end) & (mine < local_start)
    if not (chosen.sum(1) == best.shape[1]).all():
        one.notes["error"] = "another number of candidates than select has"
        return one
    places = mine[chosen].view(len(best), -1) - sink_end
    one.notes["is_baseline"] = torch.equal(votes.gather(1, places).sort(dim=1).values, best)
    return one


def copy(keys: Tensor) -> Contender:
    """A copy on the device that moves as many bytes as there are in the keys."""
    source = keys.flatten()[: keys.numel() // 2]
    moved = 2 * source.numel() * source.element_size()
    run = partial(torch.empty_like(source).copy_, source)
    return Contender("device copy", "copy", Ready(run), moved)
