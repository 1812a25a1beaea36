"""Masks of transformers, as the tokens that each request has and where.

A *slot* is the index of a key in the keys that a layer is handed. With left padding a request's
tokens begin at a later slot, with right padding they end at an earlier one; where a batch was
padded on the right and then grew, there are holes.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from tokenselect.integrations.transformers.causality import in_progress
from tokenselect.integrations.transformers.refusals import Refusal, outside_of_graphs

MaskFunction = Callable[..., Any]


class TokenSpan(NamedTuple):
    """Neighbouring requests of a batch that have the same queries in a call.

    rows     which requests
    n        how many tokens each has, this call's included
    first    the slot of each one's first token; -1 if there are holes among its tokens
    slots    their slots: a slice if these are the same for all, else (rows, largest n) int64 on the
             mask's device, with anything behind a request's n
    queries  the queries of the call that are tokens, the last of the n: a slice, or (m,) int64 on
             the CPU if there are holes
    m        how many queries those are
    """

    rows: slice
    n: tuple[int, ...]
    first: tuple[int, ...]
    slots: slice | Tensor
    queries: slice | Tensor
    m: int

    def chunks(self, size: int) -> Iterator[tuple[slice | Tensor, int]]:
        """Yield the queries to take together, at most `size`, and how many come after them."""
        for start in range(0, self.m, size):
            stop = min(start + size, self.m)
            if isinstance(self.queries, slice):
                part: slice | Tensor = slice(self.queries.start + start, self.queries.start + stop)
            else:
                part = self.queries[start:stop]
            yield part, self.m - stop

    def split(self, by: Callable[[int], bool]) -> Iterator[tuple["TokenSpan", bool]]:
        """Yield the parts whose requests are alike by their n, and what `by` said of them."""
        start = 0
        for said, of in groupby(map(by, self.n)):
            part = slice(start, start + len(list(of)))
            slots = self.slots if isinstance(self.slots, slice) else self.slots[part]
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            n, first = self.n[part], self.first[part]
            yield self._replace(rows=rows, n=n, first=first, slots=slots), said
            start = part.stop


# Functions that may make a tensor of a TokenMask; torch.compile reads attributes by __get__.
# Besides these, a slice may take the newest queries.
_HANDS_ON = frozenset({"__get__", "as_subclass", "contiguous", "detach", "to"})


class TokenMask(Tensor):
    """The mask of one kind of layer: (B, 1, 1, slots) bool, False where a request has padding.

    It has four dimensions because transformers hands such masks on as they are.

    at      the slot of the call's first query
    Lq      how many queries the call has
    window  how many tokens a query sees, itself included; None: all before it
    begin   the token in slot 0: above 0 where a cache that slides has dropped those before
    spans   the requests, grouped; for windows none
    valid   the mask (B, slots up to the last query) on the CPU, of which spans are made; None if
            all are tokens
    has_padding  whether a slot up to the last query may be no token
    is_step whether the model was called for one query per request
    calls   by module, its arguments in this call, noted by `rotation.RawLayer`
    checked the options of which a layer has checked the values
    refusal the error for a layer that attends with it, as it is not causal, say; or None
    """

    at: int
    Lq: int
    window: int | None
    begin: int
    spans: list[TokenSpan]
    valid: Tensor | None
    has_padding: bool
    is_step: bool
    calls: dict[Any, Any]
    checked: Any
    refusal: Refusal | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the mask on, copy it to another device, take its newest queries; refuse all else.

        It is no mask to add to logits, as a model that attends by itself would do.
        """
        name, mask = getattr(func, "__name__", str(func)), args[0]
        is_mask, cause = isinstance(mask, cls), None
        made: Any = None
        with torch._C.DisableTorchFunctionSubclass():
            skip = _skipped(mask, args[1]) if is_mask and func is Tensor.__getitem__ else None
            if skip is not None:
                return mask._without(skip)
            try:
                made = func(*args, **(kwargs or {}))
            except Exception as error:
                cause = error
        if cause or (isinstance(made, Tensor) and not (is_mask and name in _HANDS_ON)):
            raise Refusal(
                f"a model that reads its masks itself (it calls {name})",
                "its masks only tell which tokens there are, to tokenselect's function in "
                "transformers' AttentionInterface",
                "use another attn_implementation for it",
            ) from cause
        if func in (Tensor.to, Tensor.contiguous) and made is not mask:
            made = made.as_subclass(cls)
            vars(made).update(vars(mask))
        return made

    def _without(self, skip: int) -> "TokenMask":
        """Return the mask of the same keys for the queries after the first `skip`."""
        made = self.as_subclass(Tensor).detach().as_subclass(TokenMask)
        vars(made).update(vars(self))
        made.at, made.Lq = self.at + skip, self.Lq - skip
        if self.window is None and self.refusal is None:
            made._group()
        return made

    def _group(self) -> None:
        """Make the spans."""
        if self.valid is not None:
            self.spans = list(_spans(self.valid, self.at, self.device))
            return
        B, n, Lq = self.shape[0], self.at + self.Lq, self.Lq
        rows, slots, queries = slice(0, B), slice(0, n), slice(0, Lq)
        self.spans = [TokenSpan(rows, (n,) * B, (0,) * B, slots, queries, Lq)]


@outside_of_graphs
def token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> TokenMask:
    """Make the mask, as transformers asks a function in its AttentionMaskInterface to.

    attention_mask is None or (B, tokens so far) bool. Reads it, and offsets that are tensors, on
    the host. Raises UnsupportedProblem for one that does not fit. A mask that is not causal, within
    a window or not, is refused only by a layer that attends with it: a decoder without its encoder
    makes one for cross-attention that no layer reads.
    """
    in_progress.together = 0
    valid = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    mask = valid[:, None, None].as_subclass(TokenMask)
    mask.at, mask.Lq, mask.window, mask.begin = 0, q_length, None, 0
    mask.spans, mask.calls, mask.checked, mask.refusal = [], {}, None, None
    mask.valid, mask.has_padding, mask.is_step = None, attention_mask is not None, q_length == 1
    try:
        mask.window = window_of(mask_function)
    except Refusal as refusal:
        mask.refusal = refusal
        return mask
    begin = int(kv_offset)
    at = int(q_offset) - begin
    if not 0 <= at <= kv_length - q_length:
        raise Refusal(
            f"{q_length} queries from key {at} on, among {kv_length} keys",
            "the new tokens are not in the cache",
            "use a larger cache, or a stock one",
        )
    mask.at, mask.begin = at, begin
    if attention_mask is not None:
        valid &= _padding(attention_mask, begin, at + q_length, kv_length)
    # Of a window that is all there is to know: on a GPU, it is not worth waiting for.
    if mask.has_padding and (mask.window is None or valid.is_cpu):
        known = valid[:, : at + q_length].cpu()
        mask.has_padding = not bool(known.all())
        mask.valid = known if mask.has_padding else None
    if mask.window is None:
        mask._group()
    return mask


def _padding(attention_mask: Tensor, kv_offset: int, end: int, kv_length: int) -> Tensor:
    """Return the 2D mask of the slots, (B, kv_length) bool; False beyond the given one."""
    if attention_mask.dim() != 2:
        raise Refusal(
            f"an attention_mask {tuple(attention_mask.shape)}",
            "only a mask (batch, tokens) says where each request's tokens are",
            "pass the tokenizer's attention_mask",
        )
    if attention_mask.shape[1] < kv_offset + end:
        raise Refusal(
            f"an attention_mask of {attention_mask.shape[1]} tokens, for {kv_offset + end}",
            "the mask leaves out the newest tokens",
            "let it cover the tokens in the cache and the new ones: (batch, cached + new)",
        )
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(seen, (0, kv_length - seen.shape[1]))


def _skipped(mask: TokenMask, index: Any) -> int | None:
    """Return `skip` for an index [:, :, skip:, :], else None."""
    if not (isinstance(index, tuple) and len(index) == 4):
        return None
    if not all(isinstance(part, slice) for part in index):
        return None
    rows, heads, queries, slots = index
    start, stop, step = queries.indices(mask.Lq)
    is_all = rows == heads == slots == slice(None)
    return start if is_all and (stop, step) == (mask.Lq, 1) else None


def _spans(valid: Tensor, at: int, device: torch.device) -> Iterator[TokenSpan]:
    """Group the requests of valid (B, slots up to the last query) bool, on the CPU."""
    slots = [row.nonzero()[:, 0] for row in valid]
    queries = [own[own >= at] - at for own in slots]
    # Queries with holes among them stay alone.
    alike = groupby(range(len(slots)), lambda b: _range(queries[b]) or (b, -1))
    for _, group in alike:
        rows = list(group)
        new = queries[rows[0]]
        if len(new) == 0:
            continue
        own = [slots[b] for b in rows]
        ranges = [_range(each) for each in own]
        table: slice | Tensor
        if ranges[0] is not None and len(set(ranges)) == 1:
            table = slice(*ranges[0])
        else:
            table = torch.nn.utils.rnn.pad_sequence(own, batch_first=True).to(device)
        yield TokenSpan(
            slice(rows[0], rows[-1] + 1),
            tuple(map(len, own)),
            tuple(-1 if each is None else each[0] for each in ranges),
            table,
            new if (of_all := _range(new)) is None else slice(*of_all),
            len(new),
        )


def _range(numbers: Tensor) -> tuple[int, int] | None:
    """Return the range that ascending numbers make up, (0, 0) for none; None with holes."""
    if len(numbers) == 0:
        return 0, 0
    start, stop = int(numbers[0]), int(numbers[-1]) + 1
    return (start, stop) if stop - start == len(numbers) else None


def window_of(function: MaskFunction) -> int | None:
    """Return how many tokens a causal mask lets a query see; None for all before it.

    Raises UnsupportedProblem for a mask that is not causal, or more than that and a window.
    """
    if function is masking_utils.causal_mask_function:
        return None
    parts = _closure_of(function, masking_utils.and_masks)
    if parts is not None:
        masks = parts["mask_functions"]
        if len(masks) == 2 and masks[1] is masking_utils.causal_mask_function:
            window = _closure_of(masks[0], masking_utils.sliding_window_overlay)
            if window is not None:
                return int(window["sliding_window"])
    raise Refusal(
        f"the mask {_describe(function)}",
        "only causal attention, within a sliding window or not, and padding are understood",
        "pass inputs without it, or model.set_attn_implementation('sdpa') or 'eager'",
    )


def _closure_of(function: MaskFunction, maker: MaskFunction) -> dict[str, Any] | None:
    """Return the closure of a function that `maker` returned, by name; None for other functions."""
    code = getattr(function, "__code__", None)
    if code is None or code not in maker.__code__.co_consts:
        return None
    cells = function.__closure__ or ()
    return {name: c.cell_contents for name, c in zip(code.co_freevars, cells, strict=True)}


_KINDS = {
    "chunked_overlay": "chunked attention",
    "packed_sequence_mask_function": "packed sequences",
    "blockwise_overlay": "blocks that see each other, as of images",
    "bidirectional_mask_function": "bidirectional attention",
    "sliding_window_bidirectional_overlay": "a bidirectional window",
}


def _describe(function: MaskFunction) -> str:
    """Name the makers of a mask function and of its parts."""
    for maker in (masking_utils.and_masks, masking_utils.or_masks):
        parts = _closure_of(function, maker)
        if parts is not None:
            return f"{maker.__name__}({', '.join(map(_describe, parts['mask_functions']))})"
    name = str(getattr(function, "__qualname__", repr(function)))
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return name
    maker_name = name.partition(".<locals>")[0]
    return f"{maker_name} ({_KINDS[maker_name]})" if maker_name in _KINDS else maker_name
