"""A KV cache that grows without copying all of itself at each step, and remembers selections."""

import functools
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import Options
from tokenselect.integrations.transformers.masks import TokenSpan
from tokenselect.scalars import is_integer, plain
from tokenselect.selection_cache import SelectionCache

# Layer, first row, one past the last row, first slot of each row, dtype of the queries.
_Key = tuple[int, int, int, tuple[int, ...], torch.dtype]

# The attribute of a layer's keys that leads from them to the layer's `Selections`.
_ATTRIBUTE = "_tokenselect_selections"


class Selections:
    """The selections of one layer of a cache: a SelectionCache per `TokenSpan` of requests.

    Its key is the layer that asks, the span's rows and their first slots, and the dtype of the
    queries, which torch.autocast changes.
    """

    def __init__(self) -> None:
        # By layer: one that shares the keys of another may have options of its own.
        self._options: dict[int, Options] = {}
        self._caches: dict[_Key, SelectionCache] = {}
        # Hits and misses of rows that were reordered away, less those that their successors count
        # twice.
        self._moved: tuple[Any, Any] = (0, 0)

    def of(
        self, layer: int, span: TokenSpan, options: Options, dtype: torch.dtype
    ) -> SelectionCache:
        """Return the span's SelectionCache; drop all selections if the layer's options changed."""
        if self._options.get(layer, options) != options:
            self.clear()
        self._options[layer] = options
        key = (layer, span.rows.start, span.rows.stop, span.first, dtype)
        if key not in self._caches:
            self._caches[key] = options.selection_cache()
        return self._caches[key]

    def clear(self) -> None:
        """Forget all selections and counts."""
        self._caches, self._options, self._moved = {}, {}, (0, 0)

    def crop(self, slots: int, device: Any) -> None:
        """Drop the selections that saw more than `slots` slots, the new length of the layer.

        At once, since the next tokens may be read densely. That of a request with holes is dropped:
        how many of its tokens are left is unknown here.
        """
        for (_, _, _, firsts, _), cache in self._caches.items():
            left = [max(0, slots - first) if first >= 0 else 0 for first in firsts]
            cache.crop(torch.tensor(left, device=device))

    def reorder(self, order: Tensor) -> None:
        """Let row b go on as row order[b]; drop the selections of spans that mix with others.

        Rows take their counts along, so a row that goes on as two would count double.
        """
        before, caches = self._counted(), {}
        for (layer, start, stop, firsts, dtype), cache in self._caches.items():
            inside = order[start:stop] - start
            if stop - start == len(order) or bool(((inside >= 0) & (inside < stop - start)).all()):
                cache.reorder(inside)
                if len(set(firsts)) > 1:  # else nothing to read
                    firsts = tuple(firsts[row] for row in inside.tolist())
                caches[layer, start, stop, firsts, dtype] = cache
        self._caches = caches
        hits, misses = (was - now for was, now in zip(before, self._counted(), strict=True))
        self._moved = (self._moved[0] + hits, self._moved[1] + misses)

    def counts(self) -> tuple[int, int]:
        """Return how often a selection was reused and how often made, summed over requests."""
        hits, misses = self._counted()
        return int(hits + self._moved[0]), int(misses + self._moved[1])

    def _counted(self) -> tuple[Any, Any]:
        """Sum hits and misses of the present rows, without waiting for the device."""
        hits: Any = 0
        misses: Any = 0
        for cache in self._caches.values():
            with suppress(InvalidProblem):  # its first call failed
                hits, misses = hits + cache.hits.sum(), misses + cache.misses.sum()
        return hits, misses


def selections_of(keys: Tensor) -> Selections | None:
    """Return the `Selections` of the `GrowableLayer` that handed out `keys`, else None."""
    return getattr(keys, _ATTRIBUTE, None)


class GrowableLayer(DynamicLayer):
    """Keys and values of one full-attention layer, in buffers with room, shown as views.

    max_length  room for that many tokens is taken at once, and more are refused; None: the
                buffers double when they are full
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.selections = Selections()
        self._buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers for keys and values like these (B, Hkv, new, D)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._buffers = [
                torch.empty(
                    *states.shape[:2],
                    self.max_length or 0,
                    states.shape[3],
                    dtype=states.dtype,
                    device=states.device,
                )
                for states in (key_states, value_states)
            ]
        self.is_initialized = True
        self._show(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, new, D); return views of all (B, Hkv, n, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise InvalidProblem(
                "keys or values that require grad, for a TokenSelectCache",
                "it is written in place, and has no backward pass",
                "call the model under torch.inference_mode() or torch.no_grad()",
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            if (*states.shape[:2], states.shape[3]) != (*buffer.shape[:2], buffer.shape[3]):
                raise InvalidProblem(
                    f"keys or values {tuple(states.shape)}, for a cache of {tuple(buffer.shape)}",
                    "a cache belongs to one batch and one model until reset()",
                    "make another TokenSelectCache, or batch_select_indices() the rows to keep",
                )
        n = self.get_seq_length()
        end = n + key_states.shape[2]
        self._make_room(n, end, (key_states.dtype, value_states.dtype))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, n:end] = states
        self._show(end)
        return self.keys, self.values

    def get_max_length(self) -> int:
        """Return max_length; -1 if there is none."""
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length  # its name in transformers 5.4

    def reset(self) -> None:
        """Forget everything, the size of the batch included."""
        self._buffers = []
        self.selections.clear()
        self.is_initialized = False  # transformers 5.4 would keep it so, and the length
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens."""
        self.rewind(tokens_to_remove)
        if tokens_to_remove != 0 and self.is_initialized:
            self.selections.crop(self.get_seq_length(), self.device)

    def rewind(self, tokens_to_remove: int) -> None:
        """Crop for tokens that will be read again: the selections that saw them stay."""
        super().crop(tokens_to_remove)  # refuses a positive number
        if tokens_to_remove != 0 and self.is_initialized:
            self._show(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row beam_idx[b]."""
        n = self.get_seq_length()
        if n == 0:
            return
        order = beam_idx.to(self.device)
        for buffer in self._buffers:
            buffer[:, :, :n] = buffer[:, :, :n].index_select(0, order)
        self._show(n)
        self.selections.reorder(order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; drop the selections."""
        if self.is_initialized:
            rows = torch.arange(len(self.keys), device=self.device)
            self._take(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows, any index of a dimension; drops the selections."""
        if self.is_initialized:
            rows = torch.arange(len(self.keys), device=self.device)
            self._take(_picked_rows(rows, indices))

    def _take(self, rows: Tensor) -> None:
        n = self.get_seq_length()
        with torch.inference_mode(False):
            order = rows.to(self.device)
            self._buffers = [buffer.index_select(0, order) for buffer in self._buffers]
        self._show(n)
        self.selections.clear()

    def _make_room(self, n: int, end: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        """Let the buffers hold `end` tokens of these dtypes, promoting their own dtype if needed.

        Within torch.autocast values, and unrotated keys, come in another dtype than outside.
        """
        room = capacity = self._buffers[0].shape[2]
        if end > capacity:
            if self.max_length is not None:
                raise InvalidProblem(
                    f"{end} tokens in a TokenSelectCache of max_length={self.max_length}",
                    "max_length counts the prompt and all new tokens",
                    "make it larger, or leave it out: the cache then grows",
                )
            room = max(end, 2 * capacity)
        with torch.inference_mode(False):
            for i, (old, new) in enumerate(zip(self._buffers, dtypes, strict=True)):
                dtype = torch.promote_types(old.dtype, new)
                if (room, dtype) != (capacity, old.dtype):
                    shape = (*old.shape[:2], room, old.shape[3])
                    self._buffers[i] = old.new_empty(shape, dtype=dtype)
                    self._buffers[i][:, :, :n] = old[:, :, :n]
        self.dtype = self._buffers[0].dtype

    def _show(self, n: int) -> None:
        self.keys, self.values = (buffer[:, :, :n] for buffer in self._buffers)
        setattr(self.keys, _ATTRIBUTE, self.selections)


# From a class of layers of transformers to its stand-in; other layers stay.
_GROWABLE: dict[Any, type[GrowableLayer]] = {DynamicLayer: GrowableLayer}

if hasattr(cache_utils, "LinearAttentionAndFullAttentionLayer"):  # not in transformers 5.4
    _Linear: Any = cache_utils.LinearAttentionLayer
    _Hybrid: Any = cache_utils.LinearAttentionAndFullAttentionLayer

    class GrowableHybridLayer(GrowableLayer, _Hybrid):
        """A `GrowableLayer` with the state of a state space model beside it, as in Falcon-H1."""

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Make the buffers of keys and values, or those of the state."""
            # transformers hands keys and values by place, the state by name.
            kind = GrowableLayer if args else _Linear
            kind.lazy_initialization(self, *args, **kwargs)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Let row b go on as row beam_idx[b]."""
            _Linear.reorder_cache(self, beam_idx)
            GrowableLayer.reorder_cache(self, beam_idx)

    _GROWABLE[_Hybrid] = GrowableHybridLayer


def _growable(stock: Any, max_length: int | None) -> Any:
    """Return the stand-in of an unused layer of transformers, or the layer itself."""
    if type(stock) not in _GROWABLE:
        return stock
    made = _GROWABLE[type(stock)](max_length)
    made.__dict__.update(vars(stock))
    return made


class RawKeys(Cache):
    """A cache that knows which of its layers hold raw keys: any cache, after `expect_raw_keys`.

    A layer that holds raw keys takes no rotated ones, nor the reverse; an emptied one takes either.

    raw_layers  the layers that were last filled with raw keys
    starts      (B,) int64 on the CPU, the position of each request's first token, if known
    """

    raw_layers: frozenset[int] = frozenset()
    starts: Tensor | None = None
    _expected: int | None = None

    def __reduce__(self) -> Any:
        # Its class is made here and found nowhere else.
        return _empty_with_raw_keys, (type(self).__bases__[1],), vars(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys: raw ones, if `expect_raw_keys` was called for this layer just before."""
        self._check_kind(layer_idx)
        shown: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return shown

    @torch.compiler.disable
    def _check_kind(self, layer_idx: int) -> None:
        """Raise InvalidProblem if a layer would hold both raw and rotated keys."""
        are_raw = self._expected == layer_idx
        self._expected = None
        if are_raw != (layer_idx in self.raw_layers):
            if self.get_seq_length(layer_idx) > 0:
                new, old = ("raw", "rotated") if are_raw else ("rotated", "raw")
                raise InvalidProblem(
                    f"{new} keys, for layer {layer_idx} of a cache that holds {old} ones",
                    "a cache is filled while options that move keys are in force, or while they "
                    "are not; a mixture would be attended to at wrong positions",
                    "go on with a new cache, or with this one after reset()",
                )
            self.raw_layers ^= {layer_idx}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row beam_idx[b]."""
        super().reorder_cache(beam_idx)
        self._take_starts(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._take_starts(indices)

    def _take_starts(self, rows: Any) -> None:
        if self.starts is not None:
            self.starts = _picked_rows(self.starts, rows)


def _picked_rows(x: Tensor, rows: Any) -> Tensor:
    """Return rows of x, on the CPU; they are a tensor anywhere, a sequence, an array or a slice."""
    return x[(rows.cpu() if isinstance(rows, Tensor) else rows,)]


@functools.cache
def _with_raw_keys(kind: type) -> type:
    return type(kind.__name__, (RawKeys, kind), {})


def _empty_with_raw_keys(kind: type) -> Any:
    made: Any = _with_raw_keys(kind)
    return made.__new__(made)


def expect_raw_keys(cache: Any, layer_idx: int) -> None:
    """Announce raw keys in the next update of this layer; from now on, check every update."""
    if not isinstance(cache, RawKeys):
        kind: Any = type(cache)
        cache.__class__ = _with_raw_keys(kind)
    cache._expected = layer_idx


def slides_everywhere(config: Any) -> bool:
    """Return whether a model has layers that attend, and all of them within a window."""
    attending = [one for one in DynamicCache(config=config).layers if isinstance(one, DynamicLayer)]
    return len(attending) > 0 and all(one.is_sliding for one in attending)


class TokenSelectCache(Cache):
    """A KV cache for a model that attends with tokenselect.

    Pass it as `past_key_values`, or, from transformers 5.24 on, as `cache`.

    config      the model, or its config
    max_length  room for that many tokens is taken at once; None: buffers double when full

    Full-attention layers append in place, and with the option `theta` reuse selections, which
    this cache keeps. Every other layer is that of transformers' DynamicCache. A cache belongs to
    one batch until `reset()`.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        config = getattr(config, "config", config)
        if not hasattr(config, "get_text_config"):
            raise InvalidProblem(
                f"TokenSelectCache of a {type(config).__name__}",
                "a cache is made for a model: its layers tell which of them slide",
                "pass the model, or model.config",
            )
        max_length = plain(max_length)
        if max_length is not None and not (is_integer(max_length) and max_length >= 1):
            raise InvalidProblem(
                f"max_length={max_length!r}",
                "max_length is an integer >= 1, the tokens of the prompt and all new ones; or None",
                "pass an int, or leave it out: the cache then grows",
            )
        stock = DynamicCache(config=config).layers
        super().__init__(layers=[_growable(layer, max_length) for layer in stock])

    @property
    def hits(self) -> int:
        """How often a layer reused a request's selection; waits for the device.

        A beam is a request. `reset()`, other options and a change of the batch set it to 0.
        """
        return self._counts()[0]

    @property
    def misses(self) -> int:
        """How often a layer made a selection for a request; counted and read like `hits`."""
        return self._counts()[1]

    def _counts(self) -> tuple[int, int]:
        counts = [
            layer.selections.counts() for layer in self.layers if isinstance(layer, GrowableLayer)
        ]
        return sum(hits for hits, _ in counts), sum(misses for _, misses in counts)
