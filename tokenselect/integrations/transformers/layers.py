"""One layer's attention: selected over the whole cache, or dense."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import tokenselect
from tokenselect.contract.rules import refuse_grad_of
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import EVERYTHING, Options, parse
from tokenselect.integrations.transformers.cache import Selections, selections_of
from tokenselect.integrations.transformers.causality import in_progress
from tokenselect.integrations.transformers.dense import attend_densely
from tokenselect.integrations.transformers.masks import TokenMask, TokenSpan
from tokenselect.integrations.transformers.named_layers import layer_options
from tokenselect.integrations.transformers.refusals import (
    layer_name,
    outside_of_graphs,
    refuse_layer,
    refuse_mla,
)
from tokenselect.integrations.transformers.report import Recorder, recorder_of
from tokenselect.integrations.transformers.rotation import Probe, raw_layer_of, trained_length
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

    One layer makes one call per chunk of at most `chunk` queries and per `TokenSpan` of requests.
    What attends densely makes none: sliding layers, and with prefill="dense" prompts.
    """
    infos: list[tokenselect.AttentionInfo] = []
    outer, _recording.infos = _recording.infos, infos
    try:
        yield infos
    finally:
        _recording.infos = outer


class _AllDense(threading.local):
    """The configs of the models of which all calls on one thread attend densely, by id."""

    configs: frozenset[int] = frozenset()


_all_dense = _AllDense()


@contextmanager
def all_dense(config: Any) -> Iterator[None]:
    """Let every call on this thread attend densely, in the layers that have this config.

    config  of the part of a model that generates text: `model.config.get_text_config(decoder=True)`

    The cache fills as ever, so that selection goes on after the block.
    """
    outer, _all_dense.configs = _all_dense.configs, _all_dense.configs | {id(config)}
    try:
        yield
    finally:
        _all_dense.configs = outer


@outside_of_graphs
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
    refuse_grad_of({"q": query, "k_cache": key, "v_cache": value, "sink_logits": s_aux})
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
        settings: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if mask.window is not None:
            end = mask.at + mask.Lq
            return attend_densely(
                q,
                k[:, :, :end],
                v[:, :, :end],
                valid=_valid(mask)[:, :end] if mask.has_padding else None,
                window=mask.window,
                sinks=s_aux,
                **settings,
            ), None
        out = _Output(q, v)
        layer, is_dense = getattr(module, "layer_idx", 0), _is_dense(module, mask, options, rope)
        recorder = recorder_of(module.config)
        for span in mask.spans:
            for part, densely in span.split(is_dense):
                if densely:
                    _attend_densely(q, k, v, mask, part, rope, s_aux, settings, out)
                    if recorder is not None:
                        recorder.add_dense(layer, len(part.n))
                else:
                    more = {"sink_logits": s_aux, "rope": rope, **settings}
                    if selections is not None:
                        more["cache"] = selections.of(layer, part, options, q.dtype)
                    _select(q, k, v, part, options, more, out, layer, recorder)
        return out.whole(), None


class _Output:
    """What a call returns, (B, Lq, Hq, Dv): put together of parts, zeros where there is none.

    One part that is everything is returned as it is: a decode step takes no memory for it.
    """

    def __init__(self, query: Tensor, value: Tensor) -> None:
        self._query = query
        self._shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        self._out: Tensor | None = None

    def put(self, rows: slice, queries: slice | Tensor, part: Tensor) -> None:
        """Take (rows, queries, Hq, Dv). No part has rows and queries of another."""
        if part.shape[:2] == self._shape[:2]:
            self._out = part.contiguous()  # as it is for one query; models take views of it
            return
        if self._out is None:
            self._out = self._query.new_zeros(self._shape)
        self._out[rows, queries] = part

    def whole(self) -> Tensor:
        return self._query.new_zeros(self._shape) if self._out is None else self._out


def _cut(x: Tensor, rows: slice, of_dim_2: slice | Tensor) -> Tensor:
    """Return x[rows, :, of_dim_2], which is x itself where that is everything."""
    if rows != slice(0, x.shape[0]):
        x = x[rows]
    is_all = isinstance(of_dim_2, slice) and of_dim_2 == slice(0, x.shape[2])
    return x if is_all else x[:, :, of_dim_2]


def _is_dense(
    module: Any, mask: TokenMask, options: Options, rope: Rope | None
) -> Callable[[int], bool]:
    """Return whether a request of n tokens attends densely in this call, as a function of n.

    Raw keys do so within the trained length only, but for layers that are named as dense: beyond
    it, they are cached to be moved.
    """
    is_all = options.select == EVERYTHING or id(module.config) in _all_dense.configs
    is_prompt = options.prefill == "dense" and not mask.is_step
    trained = math.inf if rope is None else trained_length(module.config) or math.inf
    return lambda n: is_all or ((is_prompt or n < options.dense_below) and n <= trained)


def _attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TokenMask,
    span: TokenSpan,
    rope: Rope | None,
    sinks: Tensor | None,
    settings: dict[str, Any],
    out: _Output,
) -> None:
    """Fill the span's part of out, densely; shapes as in `attention_forward`."""
    q, valid = query[span.rows], None
    if isinstance(span.slots, slice):
        slots, queries = span.slots, span.queries
        q = q[:, :, queries]
    else:
        slots, queries = slice(max(0, min(span.first)), mask.at + mask.Lq), slice(None)
        valid = _valid(mask)[span.rows, slots]
    k, v = key[span.rows, :, slots], value[span.rows, :, slots]
    if rope is not None:
        q, k = _rotated(q, k, rope, valid)
    out.put(span.rows, queries, attend_densely(q, k, v, valid=valid, sinks=sinks, **settings))


def _rotated(q: Tensor, k: Tensor, rope: Rope, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate raw queries and keys to where they stand in their request."""
    at = torch.arange(k.shape[2], device=k.device)
    if valid is not None:
        at = (valid.cumsum(-1) - 1)[:, None]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_at = at[..., k.shape[2] - q.shape[2] :]
    turned_q, turned_k = (
        rope.reposition(x.to(dtype), to, to).to(x.dtype) for x, to in ((q, q_at), (k, at))
    )
    return turned_q, turned_k


def _select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: TokenSpan,
    options: Options,
    more: dict[str, Any],
    out: _Output,
    layer: int,
    recorder: Recorder | None,
) -> None:
    """Fill the span's part of out: select and attend, chunk by chunk."""
    select = options.select
    for queries, later in span.chunks(options.chunk):
        q = _cut(query, span.rows, queries)
        given = {**_tokens(key, value, span, later), **select, **more, "backend": options.backend}
        info, Lq, lengths = None, q.shape[2], [n - later for n in span.n]
        infos = _recording.infos
        if infos is None and (recorder is None or not recorder.wants_info(layer)):
            attended = tokenselect.attention(q, **given)
        else:
            attended, info = tokenselect.attention(q, **given, return_info=True)
        if infos is not None and info is not None:
            infos.append(info)
        if recorder is not None:
            recorder.add(layer, lengths, Lq, select, "cache" in more, info)
        out.put(span.rows, queries, attended.transpose(1, 2))
        n = max(lengths)
        if n >= select.n_sink + select.budget(n) + select.n_local + Lq:  # else all was selected
            in_progress.together = max(in_progress.together, Lq)


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


def _valid(mask: TokenMask) -> Tensor:
    """Return which slots hold tokens, (B, slots) bool."""
    return mask.as_subclass(Tensor)[:, 0, 0]


def _tokens(key: Tensor, value: Tensor, span: TokenSpan, later: int) -> dict[str, Any]:
    """Return a span's tokens, without the last `later`, as arguments of `tokenselect.attention`.

    Without a copy of keys or values: where requests are padded differently, or have holes, each
    slot is a page of one token, and the table names the tokens.
    """
    if isinstance(span.slots, slice):
        tokens = slice(span.slots.start, span.slots.stop - later)
        return {
            name: _cut(x, span.rows, tokens)
            for name, x in {"k_cache": key, "v_cache": value}.items()
        }
    keys, steps = _pages(key[span.rows])
    values, value_steps = _pages(value[span.rows])
    if steps != value_steps:  # as without a cache: one table serves both
        (keys, steps), (values, _) = (_pages(x[span.rows].contiguous()) for x in (key, value))
    rows = torch.arange(len(span.n), device=key.device)[:, None]
    table = rows * steps[0] + span.slots.to(key.device)[:, : max(span.n) - later] * steps[1]
    lengths = torch.tensor(span.n, dtype=torch.int32, device=key.device) - later
    return {
        "k_cache": keys,
        "v_cache": values,
        "block_table": table.int(),
        "cache_seqlens": lengths,
    }


def _pages(cache: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """View a cache (B, Hkv, slots, D) as pages of one token: (pages, 1, Hkv, D), some overlapping.

    Returns it and how many pages lie between a row and the next, and between slots.
    """
    row, head, slot, element = cache.stride()
    B, Hkv, slots, D = cache.shape
    row = row if B > 1 else 0  # else it may be anything
    pitch = math.gcd(row, slot)
    pages = 1 + ((B - 1) * row + (slots - 1) * slot) // pitch
    view = cache.as_strided((pages, 1, Hkv, D), (pitch, pitch, head, element))
    return view, (row // pitch, slot // pitch)


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
