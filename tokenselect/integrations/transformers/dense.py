"""Dense attention of the newest queries to all cached tokens, or to those within a window.

torch's own kernels wherever they can express it, with no mask where they can do without:

- on the CPU its flash kernel, which also returns the logsumexp. So a chunk of a prompt takes the
  tokens before it and those of its own in two calls, and attention sinks are one more logit;
- elsewhere `scaled_dot_product_attention`, causal from the lower right where its flash kernel runs;
- padding and windows as masks, for a block of queries at a time;
- a product in float32, a block of queries at a time, for the rest: softcaps, values of another
  width than keys on the CPU, sinks elsewhere.

Keys are never repeated for the heads that share them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# A block has no more queries than this, and its mask or its logits no more numbers.
_QUERIES = 256
_NUMBERS = 2**22


class _Settings(NamedTuple):
    """What one softmax is made with."""

    scale: float
    softcap: float | None
    sinks: Tensor | None


# q (B, Hkv, G, m, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv), visible (B or 1, m, n) bool or None.
# Returns (B, Hkv, G, m, Dv).
_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, _Settings], Tensor]


def attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Let the last m of n tokens attend to all up to their own; return (B, m, Hq, Dv) in q's dtype.

    q (B, Hq, m, D); k (B, Hkv, n, D) and v (B, Hkv, n, Dv), of any strides
    valid   (B, n) bool, which of the n are tokens and not padding; None: all. A query of padding
            gets zeros, and keys and values of padding have no influence, NaN or not
    window  how many of the n a query sees at most, its own included; None: all
    sinks   (Hq,), one more logit per head in the softmax
    """
    m, Hkv, n = q.shape[2], k.shape[1], k.shape[2]
    q = q.unflatten(1, (Hkv, -1))
    settings = _Settings(scale, softcap, sinks)
    if valid is not None:  # a weight of zero does not take NaN away
        k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))
    kernel = _kernel(q, v, settings)
    if window is not None and window >= n:
        window = None
    if valid is None and window is None and m > 1 and kernel is _flash:
        out = _causal_flash(q, k, v, settings)
    elif valid is None and window is None and m > 1 and kernel is _sdpa and _has_flash(q, k, v):
        mask = causal_lower_right(m, n)
        out = F.scaled_dot_product_attention(
            q.flatten(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=True
        ).unflatten(1, (Hkv, -1))
    else:
        out = _in_blocks(kernel, q, k, v, valid, window, settings)
    out = out.flatten(1, 2).transpose(1, 2).contiguous()
    return out if valid is None else out.masked_fill_(~valid[:, n - m :, None, None], 0.0)


def _kernel(q: Tensor, v: Tensor, settings: _Settings) -> _Kernel:
    """Return the fastest kernel that computes this."""
    if settings.softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return _flash
    if settings.softcap is None and settings.sinks is None and q.device.type != "cpu":
        return _sdpa
    return _product


def _in_blocks(
    kernel: _Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    window: int | None,
    settings: _Settings,
) -> Tensor:
    """Attend, some queries at a time, each block to the tokens that one of it sees."""
    (B, Hkv, G, m, _), n = q.shape, k.shape[2]
    span = n if window is None else min(n, window + _QUERIES)
    numbers = span * G * (B * Hkv if kernel is _product else 1 if valid is None else B)
    step = max(1, min(_QUERIES, _NUMBERS // numbers))
    out = q.new_empty(B, Hkv, G, m, v.shape[3])
    for start in range(0, m, step):
        end = min(start + step, m)
        first, last = n - m + start, n - m + end
        begin = 0 if window is None else max(0, first - window + 1)
        visible = None if valid is None else valid[:, None, begin:last]
        if end - start > 1:
            i = torch.arange(first, last, device=q.device)[:, None]
            j = torch.arange(begin, last, device=q.device)
            sees = j <= i if window is None else (j <= i) & (j > i - window)
            visible = sees[None] if visible is None else visible & sees
        keys, values = k[:, :, begin:last], v[:, :, begin:last]
        out[:, :, :, start:end] = kernel(q[:, :, :, start:end], keys, values, visible, settings)
    return out


def _causal_flash(q: Tensor, k: Tensor, v: Tensor, settings: _Settings) -> Tensor:
    """Attend to the tokens before the queries and to those of the queries; merge by lse."""
    (B, Hkv, G, m, _), n = q.shape, k.shape[2]
    q, k, v = map(_readable, (q, k, v))
    # A batch for each KV head, so that its keys stand for the heads that share them uncopied.
    own = (x[:, :, n - m :].flatten(0, 1)[:, None].expand(-1, G, -1, -1) for x in (k, v))
    out, lse = _FLASH(q.flatten(0, 1), *own, 0.0, True, scale=settings.scale)
    out, lse = out.unflatten(0, (B, Hkv)), lse.unflatten(0, (B, Hkv))
    if n > m:
        before, before_lse = _folded_flash(q, k[:, :, : n - m], v[:, :, : n - m], None, settings)
        share = torch.sigmoid(before_lse - lse)[..., None]
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = torch.lerp(out.to(dtype), before.to(dtype), share).to(q.dtype)
        lse = torch.logaddexp(before_lse, lse)
    return _with_sinks(out, lse, settings)


def _flash(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, settings: _Settings) -> Tensor:
    """Attend with torch's flash kernel for the CPU."""
    return _with_sinks(*_folded_flash(q, k, v, visible, settings), settings)


def _folded_flash(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Return out and lse (B, Hkv, G, m); the queries of a group are those of one head."""
    bias = None
    if visible is not None:
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill_(~visible, -math.inf).repeat(1, q.shape[2], 1)[:, None]
    given = map(_readable, (q.flatten(2, 3), k, v))
    out, lse = _FLASH(*given, attn_mask=bias, scale=settings.scale)
    return _unfolded(out, q), _unfolded(lse, q)


def _unfolded(x: Tensor, q: Tensor) -> Tensor:
    """Return x (B, Hkv, G * m, ...) as (B, Hkv, G, m, ...), like q."""
    unfolded: Tensor = x.unflatten(2, q.shape[2:4])
    return unfolded


def _readable(x: Tensor) -> Tensor:
    """Return x with the numbers of a vector side by side: the flash kernel reads them so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_sinks(out: Tensor, lse: Tensor, settings: _Settings) -> Tensor:
    if settings.sinks is None:
        return out
    sinks = settings.sinks.to(lse.dtype).view(*out.shape[1:3], 1)
    weighed: Tensor = out * torch.sigmoid(lse - sinks)[..., None]
    return weighed.to(out.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, settings: _Settings) -> Tensor:
    """Attend with torch's choice of kernel; the queries of a group are those of one head."""
    mask = None if visible is None else visible.repeat(1, q.shape[2], 1)[:, None]
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, mask, scale=settings.scale)
    return _unfolded(out, q)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether torch's flash kernel runs, which alone takes shared heads and no mask."""
    if q.device.type != "cuda":
        return False
    parameters = torch.backends.cuda.SDPAParams(q.flatten(1, 2), k, v, None, 0.0, True, True)
    return bool(torch.backends.cuda.can_use_flash_attention(parameters))


def _product(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, settings: _Settings
) -> Tensor:
    """Attend by two products, in float32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = _unfolded(q.flatten(2, 3).to(dtype) @ k.to(dtype).mT, q).mul_(settings.scale)
    if settings.softcap is not None:
        logits = logits.div_(settings.softcap).tanh_().mul_(settings.softcap)
    if visible is not None:
        logits = logits.masked_fill_(~visible[:, None, None], -math.inf)
    if settings.sinks is not None:
        column = settings.sinks.to(dtype).view(*q.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return _unfolded(weights.flatten(2, 3) @ v.to(dtype), q).to(q.dtype)
