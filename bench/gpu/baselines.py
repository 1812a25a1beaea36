"""What a selection competes with: every dense attention of torch, and FlashInfer if it is there.

A baseline is prepared once, outside any timing: masks, layouts and plans are made, code is
compiled. What it then runs returns (B, Hq, Lq, Dv). It may raise at any step: that is listed.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.gpu.device import Run


@dataclass(frozen=True, eq=False)
class Inputs:
    """Attention to all of k and v: q (B, Hq, Lq, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv).

    Query i sits at position n - Lq + i and sees no later one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def G(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """Lq, n."""
        return self.q.shape[2], self.k.shape[2]

    @property
    def folded(self) -> Tensor:
        """A single query's heads of one group as the rows of one query: (B, Hkv, G, D)."""
        return self.q.view(*self.k.shape[:2], self.G, self.q.shape[3])

    @cached_property
    def mask(self) -> Tensor:
        """(Lq, n), added to the logits."""
        Lq, n = self.sizes
        future = torch.ones(Lq, n, dtype=torch.bool, device=self.q.device).triu_(n - Lq + 1)
        return torch.zeros_like(future, dtype=self.q.dtype).masked_fill_(future, -torch.inf)


class Ready(NamedTuple):
    """run gives (B, Hq, Lq, Dv); it is run and timed inside around(), whose cost is not timed."""

    run: Run
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


NOTHING = Ready(lambda: None)


@dataclass(frozen=True)
class Baseline:
    """seconds_to_prepare: about how long prepare and the first run take."""

    name: str
    prepare: Callable[[Inputs], Ready]
    seconds_to_prepare: float = 0.0


# --- scaled_dot_product_attention ---

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa(backend: str, a: Inputs, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Ready:
    """One backend of the call, and no other; its result in the shape of the queries."""

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=a.scale, **settings)
        return out.reshape(a.q.shape)

    return Ready(run, partial(sdpa_kernel, _BACKENDS[backend]))


def _gqa(backend: str, a: Inputs) -> Ready:
    return _sdpa(backend, a, a.q, a.k, a.v, enable_gqa=True)


def _folded(backend: str, a: Inputs) -> Ready:
    return _sdpa(backend, a, a.folded, a.k, a.v)


def _chunk_lower_right(a: Inputs) -> Ready:
    mask = causal_lower_right(*a.sizes)
    return _sdpa("flash", a, a.q, a.k, a.v, attn_mask=mask, enable_gqa=True)


def _chunk_lower_right_expanded(a: Inputs) -> Ready:
    """For a backend that knows no groups: each group a batch entry, its keys seen by G heads."""
    q = a.q.reshape(-1, a.G, *a.q.shape[2:])
    k, v = (x.flatten(0, 1)[:, None].expand(-1, a.G, -1, -1) for x in (a.k, a.v))
    return _sdpa("efficient", a, q, k, v, attn_mask=causal_lower_right(*a.sizes))


def _chunk_masked(backend: str, a: Inputs) -> Ready:
    return _sdpa(backend, a, a.q, a.k, a.v, attn_mask=a.mask[None, None], enable_gqa=True)


# --- others of torch's ---


def _matmul(a: Inputs) -> Ready:
    """Two matrix products with float32 logits between. They are a cache's keys times G rows."""
    q, k, v = a.folded.flatten(0, 1), a.k.flatten(0, 1), a.v.flatten(0, 1)

    def run() -> Tensor:
        logits = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).mul_(a.scale)
        return torch.bmm(torch.softmax(logits, -1).to(v.dtype), v).view(a.q.shape)

    return Ready(run)


def _flex(a: Inputs) -> Ready:
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


def _flashinfer_single(a: Inputs) -> Ready:
    import flashinfer

    settings = {"kv_layout": "HND", "sm_scale": a.scale, "use_tensor_cores": a.G > 1}
    given = (a.q[0, :, 0], a.k[0], a.v[0])
    run = partial(flashinfer.single_decode_with_kv_cache, *given, **settings)
    return Ready(lambda: run().view(a.q.shape))


def _flashinfer_batch(a: Inputs, page_size: int = 16) -> Ready:
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


def _flashinfer_prefill(a: Inputs) -> Ready:
    import flashinfer

    q = a.q[0].transpose(0, 1).contiguous()
    settings = {"causal": True, "kv_layout": "HND", "sm_scale": a.scale}
    run = partial(flashinfer.single_prefill_with_kv_cache, q, a.k[0], a.v[0], **settings)
    return Ready(lambda: run().transpose(0, 1)[None])


# --- the lists ---

_GQA = tuple(Baseline(f"sdpa {name}, enable_gqa", partial(_gqa, name)) for name in _BACKENDS)
_FOLDED = tuple(Baseline(f"sdpa {name}, group folded", partial(_folded, name))
                for name in _BACKENDS)  # fmt: skip
_FLEX = Baseline("flex_attention, compiled", _flex, seconds_to_prepare=12.0)
_DECODE = (*_GQA, *_FOLDED, Baseline("matmul, float32 logits", _matmul), _FLEX)
_CHUNK = (
    Baseline("sdpa flash, causal_lower_right, enable_gqa", _chunk_lower_right),
    Baseline("sdpa efficient, causal_lower_right, heads expanded", _chunk_lower_right_expanded),
    Baseline("sdpa cudnn, mask, enable_gqa", partial(_chunk_masked, "cudnn")),
    Baseline("sdpa math, mask, enable_gqa", partial(_chunk_masked, "math")),
    _FLEX,
)


def dense(Lq: int, B: int) -> list[Baseline]:
    """Return the dense attentions to try on a case."""
    found = list(_DECODE if Lq == 1 else _CHUNK)
    if importlib.util.find_spec("flashinfer") is not None:  # it may compile
        if B == 1 and Lq > 1:
            found.append(Baseline("flashinfer, single prefill", _flashinfer_prefill, 30.0))
        if B == 1 and Lq == 1:
            found.append(Baseline("flashinfer, single decode", _flashinfer_single, 30.0))
        if Lq == 1:
            found.append(Baseline("flashinfer, batch decode, paged", _flashinfer_batch, 30.0))
    return found


def over_gathered(Lq: int) -> list[Baseline]:
    """Return attention to as many tokens as are selected, copied next to each other beforehand."""
    fused = (*_GQA[:3], *_FOLDED[:3]) if Lq == 1 else _CHUNK[:3]
    return [Baseline(f"{baseline.name}, gathered", baseline.prepare) for baseline in fused]


def top_k(votes: Tensor, k: int) -> Ready:
    """The k largest of the candidates' votes (B, m), in no order and with ties anyhow."""
    return Ready(partial(torch.topk, votes, min(k, votes.shape[1]), dim=1, sorted=False))
