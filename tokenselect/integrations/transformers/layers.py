"""One layer's attention: selected over the whole cache, or dense within a sliding window."""

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import tokenselect
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers.cache import Selections, selections_of
from tokenselect.integrations.transformers.causality import in_progress
from tokenselect.integrations.transformers.masks import TokenMask, TokenSpan
from tokenselect.integrations.transformers.named_layers import layer_options
from tokenselect.integrations.transformers.options import Options, parse
from tokenselect.integrations.transformers.refusals import layer_name, refuse_layer, refuse_mla
from tokenselect.integrations.transformers.rotation import Probe, raw_layer_of
from tokenselect.rope import Rope

# Arguments of models that do not change what attention computes.
_HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


class _Recording(threading.local):
    """Where the selecting calls of one thread leave their `AttentionInfo`; None: nowhere."""

    infos: list[tokenselect.AttentionInfo] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[tokenselect.AttentionInfo]]:
    """Append the `AttentionInfo` of every selecting call on this thread, layer after layer.

    One layer makes one call per chunk of at most `chunk` queries and per `TokenSpan` of requests;
    sliding layers make none.
    """
    infos: list[tokenselect.AttentionInfo] = []
    outer, _recording.infos = _recording.infos, infos
    try:
        yield infos
    finally:
        _recording.infos = outer


@torch.compiler.disable
def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers asks a function in its AttentionInterface to.

    query (B, Hq, Lq, D); key and value (B, Hkv, slots, D and Dv); attention_mask a `TokenMask`;
    s_aux (Hq,), one more logit per head in the softmax. Returns (B, Lq, Hq, Dv), zeros where a
    query is padding. Within torch.autocast q, k and v are read in its dtype; the result has it.
    Raises UnsupportedProblem for all that cannot be computed rightly.
    """
    others |= {"is_causal=False": is_causal is False or not getattr(module, "is_causal", True)}
    _refuse(module, dropout, others)
    mask = _checked_mask(module, query, key, attention_mask, sliding_window)
    given = getattr(module.config, "tokenselect", None)
    if isinstance(given, Probe):
        return given.attend(module, query, key, value, mask)
    options = layer_options(module, mask, parse(given))
    rope = _rope(module, query, mask, options)
    selections = None if mask.window is not None else _selections(module, options, key)
    dtype, its_own_dtypes = _autocast(query.device)
    with its_own_dtypes:
        q, k, v = (x if dtype is None else _to_autocast(x, dtype) for x in (query, key, value))
        scale = q.shape[3] ** -0.5 if scaling is None else scaling
        if mask.window is not None:
            return sliding_window_attention(
                q, k, v, mask, scale, softcap, s_aux, options.chunk
            ), None
        more = {"scale": scale, "softcap": softcap, "sink_logits": s_aux, "rope": rope}
        layer = getattr(module, "layer_idx", 0)
        return _selected(q, k, v, mask, options, layer, selections, more), None


def _selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TokenMask,
    options: Options,
    layer: int,
    selections: Selections | None,
    more: dict[str, Any],
) -> Tensor:
    """Select and attend, span by span, chunk by chunk; shapes as in `attention_forward`."""
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for span in mask.spans:
        cache = None if selections is None else selections.of(layer, span, options, query.dtype)
        for queries, n in span.chunks(options.chunk):
            q = query[span.rows][:, :, queries]
            given = {**_tokens(key, value, span, n), **options.select, **more}
            given |= {"cache": cache, "backend": options.backend}
            if _recording.infos is None:
                attended = tokenselect.attention(q, **given)
            else:
                attended, info = tokenselect.attention(q, **given, return_info=True)
                _recording.infos.append(info)
            out[span.rows, queries] = attended.transpose(1, 2)
            select, Lq = options.select, q.shape[2]
            if n >= select.n_sink + select.budget(n) + select.n_local + Lq:  # else all was selected
                in_progress.together = max(in_progress.together, Lq)
    return out


def _autocast(device: torch.device) -> tuple[torch.dtype | None, AbstractContextManager[Any]]:
    """Return the dtype of torch.autocast on a device, None if it is off, and a block without it.

    Inside, it would round computations that are float32 on purpose.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None, nullcontext()
    return torch.get_autocast_dtype(kind), torch.autocast(kind, enabled=False)


def _to_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as torch.autocast casts arguments of torch's own attention: float64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _rope(module: Any, query: Tensor, mask: TokenMask, options: Options) -> Rope | None:
    """Return the rotation of keys and queries that came raw; None if they came rotated."""
    raw_layer = raw_layer_of(module)
    if raw_layer is not None:
        return raw_layer.rope_of_call(module, query, mask)
    if options.needs_raw_keys and mask.window is None:
        asked = f"positions={options.select.positions!r}, score_at={options.select.score_at!r}"
        raise refuse_layer(
            module,
            f"{asked}: to move keys, this layer would have to cache them before rotation",
            "use enable(model, **model.config.tokenselect), which sees to that, or leave both out",
        )
    return None


def _tokens(key: Tensor, value: Tensor, span: TokenSpan, n: int) -> dict[str, Any]:
    """Return a span's first n tokens as arguments of `tokenselect.attention`, without a copy.

    With holes, each slot is a page of one token, and the table names the tokens.
    """
    if isinstance(span.slots, slice):
        tokens = slice(span.first, span.first + n)
        return {"k_cache": key[span.rows, :, tokens], "v_cache": value[span.rows, :, tokens]}
    pages = {"k_cache": key, "v_cache": value}
    return {
        name: cache[span.rows.start].transpose(0, 1)[:, None] for name, cache in pages.items()
    } | {"block_table": span.slots[None, :n].int().to(key.device)}


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TokenMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    chunk: int,
) -> Tensor:
    """Attend densely within mask.window; shapes as in `attention_forward`.

    `chunk` queries at a time look at the keys that one of them sees, so that memory grows with
    chunk and window, not with the length.
    """
    B, Hq, Lq, _ = query.shape
    Hkv = key.shape[1]
    assert mask.window is not None
    valid = mask.as_subclass(Tensor)  # (B, 1, 1, slots)
    out = query.new_empty(B, Lq, Hq, value.shape[3])
    for start in range(0, Lq, chunk):
        stop = min(start + chunk, Lq)
        end = mask.at + stop
        begin = max(0, mask.at + start - mask.window + 1)
        i = torch.arange(mask.at + start, end, device=query.device)[:, None]
        j = torch.arange(begin, end, device=query.device)
        visible = valid[:, :, :, begin:end] & (j <= i) & (j > i - mask.window)
        weights = softmax_weights(
            query[:, :, start:stop].unflatten(1, (Hkv, -1)),
            key[:, :, None, begin:end],
            visible[:, None],
            scale,
            softcap,
            None if sinks is None else sinks.view(Hkv, -1, 1, 1),
        )
        values = value[:, :, None, begin:end].to(weights.dtype)
        out[:, start:stop] = (weights @ values).flatten(1, 2).transpose(1, 2).to(out.dtype)
    return out


def softmax_weights(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the softmax of visible logits, float32 or better; zeros if a query sees nothing.

    q (B, Hkv, G, Lq, D); k (B, Hkv, 1, L, D); visible (B, 1, 1, Lq, L); sinks (Hkv, G, 1, 1).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def _selections(module: Any, options: Options, key: Tensor) -> Selections | None:
    """Return the layer's selections in the cache; None unless they are to be reused."""
    if options.theta is None:
        return None
    found = selections_of(key)
    if found is None:
        raise InvalidProblem(
            f"theta={options.theta}, and keys that a TokenSelectCache did not hand out, in "
            f"{layer_name(module)}",
            "selections that are reused live with the KV cache, so that they are cropped, "
            "reordered and reset with it",
            "pass past_key_values=TokenSelectCache(model) (cache= from transformers 5.24 on); if "
            "you did, this layer changes its keys after they were cached, or caches them in a way "
            "of its own: leave theta out",
        )
    return found


def _checked_mask(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, sliding_window: int | None
) -> TokenMask:
    """Return the mask if `token_mask` made it, and for this layer; else raise."""
    if mask is None:
        raise refuse_layer(
            module,
            "no mask arrived: a model that makes none through transformers' masking_utils, or "
            "cross-attention",
            "use another attn_implementation for this part of the model",
        )
    if not isinstance(mask, TokenMask) or not hasattr(mask, "spans"):
        raise refuse_layer(
            module,
            f"a custom mask {tuple(mask.shape)}",
            "pass the tokenizer's attention_mask (batch, tokens), or none",
        )
    if mask.refusal is not None:
        raise mask.refusal
    fits = mask.shape[0] == query.shape[0] == key.shape[0] and mask.shape[3] == key.shape[2]
    if not fits or mask.Lq != query.shape[2]:
        raise refuse_layer(
            module,
            f"q {tuple(query.shape)} and k {tuple(key.shape)}, with a mask for {mask.shape[0]} "
            f"requests of {mask.shape[3]} keys, {mask.Lq} queries from {mask.at} on",
            "make the cache with the model's config, so that the layers' lengths fit the masks",
        )
    if mask.window is None and mask.begin != 0:
        raise refuse_layer(
            module,
            f"full attention over a cache that begins at token {mask.begin}: those before are gone",
            "make the cache with the model's config, so that only sliding layers drop tokens",
        )
    if sliding_window is not None and sliding_window != mask.window:
        raise refuse_layer(
            module,
            f"sliding_window={sliding_window}, with a mask whose window is {mask.window}",
            "use another attn_implementation: the layer's window is ambiguous",
        )
    return mask


def _refuse(module: Any, dropout: float, others: dict[str, Any]) -> None:
    """Raise UnsupportedProblem for arguments and settings that are not implemented."""
    config = module.config
    if getattr(config, "kv_lora_rank", None) is not None:
        raise refuse_mla(config)
    # A cache that the layer has read may be passed on under any name; that of continuous batching,
    # which attention would have to read, is of another class.
    asked = [
        name
        for name, v in others.items()
        if v is not None and v is not False and name not in _HARMLESS and not isinstance(v, Cache)
    ]
    if getattr(config, "output_attentions", False) and "output_attentions" not in asked:
        asked.append("output_attentions")
    known = [
        f"{name}: {_WHY.get(name, 'not known, and it may change the result')}" for name in asked
    ]
    dense = "eager" if "output_attentions" in asked else "sdpa"
    fix = f"do without it, or set_attn_implementation('{dense}')"
    if dropout:
        known.append(f"dropout={dropout}: the model is in training mode")
        fix = f"call model.eval(); {fix}" if asked else "call model.eval()"
    if known:
        raise refuse_layer(module, known, fix)


_WHY = {
    "output_attentions": "most weights are never computed",
    "cache": "continuous batching keeps keys in its own paged cache, which is not read",
    "is_causal=False": "bidirectional and cross-attention (encoder_hidden_states) have no cache to "
    "select from",
    "position_bias": "selected keys get no bias",
    "cu_seq_lens_q": "packed sequences are not told apart",
    "cu_seq_lens_k": "packed sequences are not told apart",
    "indices": "the model has an indexer of its own",
    "block_indices": "the model has an indexer of its own",
}
