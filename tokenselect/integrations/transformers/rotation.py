"""Cache keys before their rotation, so that selected ones can be placed anywhere.

A rotated key holds the angle that the model computed for it in float32: at a position of a million
that is off by more than 1e-2, wherever the key is moved to. So while options that move keys are in
force, the full-attention layers of that one model get cos = 1 and sin = 0, and
`tokenselect.attention` rotates. Sliding layers, and all other models, stay as they are.

How a layer rotates is observed, not guessed by its name: the model is run twice over a few tokens,
with its own cos and sin and without, and the `Rope` made of its frequencies has to map the second
onto the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenselect.errors import TokenSelectError
from tokenselect.integrations.options import NAME
from tokenselect.integrations.transformers.cache import RawKeys, expect_raw_keys
from tokenselect.integrations.transformers.masks import TokenMask
from tokenselect.integrations.transformers.refusals import Refusal, refuse_layer
from tokenselect.rope import Rope

# The attribute of an attention module that holds its `RawLayer`.
_LAYER = "_tokenselect_raw_layer"
# The attribute of a model's cos that holds its `_Made`.
_MADE = "_tokenselect_made"

_FIX = "leave positions and score_at out: original positions, scored at their true distance"


@dataclass(eq=False)
class _Made:
    """The origin of a call's cos and sin: the module, and positions (B or 1, Lq)."""

    rotary: nn.Module
    position_ids: Tensor
    is_checked: bool = False


class _Call(NamedTuple):
    """The arguments of one call of an attention module that its attention needs to know."""

    made: _Made | None
    on_cpu: bool
    cache: Cache | None


class RawLayer:
    """A forward pre-hook of one attention module that gives it cos = 1 and sin = 0.

    rope  the module's own rotation; None until `RawLayers` has found it

    The call's arguments are noted in its mask, since other threads may be calling too.
    """

    def __init__(self) -> None:
        self.rope: Rope | None = None

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Another attention_implementation, set while this is on, rotates as ever.
        if module.config._attn_implementation != NAME:
            return None
        match kwargs.get("position_embeddings"):
            case (Tensor() as cos, Tensor() as sin):
                pass
            case _:
                why = "it is not handed position_embeddings=(cos, sin) to rotate by"
                raise refuse_layer(module, why, _FIX)
        given = (*args, *kwargs.values())
        cache = next((x for x in given if isinstance(x, Cache)), None)
        mask = next((x for x in given if isinstance(x, TokenMask)), None)
        if cache is not None:
            expect_raw_keys(cache, module.layer_idx)
        if mask is not None:  # else its attention refuses
            mask.calls[module] = _Call(getattr(cos, _MADE, None), cos.device.type == "cpu", cache)
        return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    def rope_of_call(self, module: Any, query: Tensor, mask: TokenMask) -> Rope:
        """Return the rotation of this call's keys and queries, which came raw."""
        call: _Call | None = mask.calls.get(module)
        if call is None:
            raise refuse_layer(
                module,
                "its keys came rotated: the hook of this layer did not run, as in code that was "
                "compiled before enable()",
                "compile it after enable(), or torch.compiler.reset() in between",
            )
        if mask.window is not None:
            raise refuse_layer(
                module,
                f"a window of {mask.window}, where it saw everything when enable() looked",
                "change a model first, then enable()",
            )
        _check_positions(module, call, mask)
        assert self.rope is not None
        if self.rope.inv_freq.device != query.device:
            self.rope = replace(self.rope, inv_freq=self.rope.inv_freq.to(query.device))
        return self.rope


def raw_layer_of(module: Any) -> RawLayer | None:
    """Return the `RawLayer` of an attention module whose keys stay raw, else None."""
    return getattr(module, _LAYER, None)


class Observed(NamedTuple):
    """The arguments of one attention call in a run of `Probe`."""

    module: Any
    window: int | None
    q: Tensor
    k: Tensor
    call: _Call | None


class Probe:
    """A stand-in for a model's options while it is run over a few tokens to observe its rotation.

    Every layer returns zeros, so that the next one's input does not depend on how others rotate.
    """

    def __init__(self, config: Any) -> None:
        self.observed: list[Observed] = []
        furthest = getattr(config, "max_position_embeddings", None) or 1024
        self.position = torch.arange(16, device="cpu") * max(1, min(64, furthest // 16))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: TokenMask
    ) -> tuple[Tensor, None]:
        """Note the arguments; return zeros."""
        self.observed.append(Observed(module, mask.window, query, key, mask.calls.get(module)))
        B, Hq, Lq, _ = query.shape
        return query.new_zeros(B, Lq, Hq, value.shape[3]), None

    def run(self, part: Any) -> list[Observed]:
        """Return the calls of the layers of a model, for the same tokens each time."""
        config, self.observed = part.config, []
        given, config.tokenselect = config.tokenselect, self
        # Offloaded weights are on "meta": what loads them takes tokens from anywhere.
        device = part.device if part.device.type != "meta" else torch.device("cpu")
        position = self.position.to(device)
        ids = torch.arange(len(position), device=device) % config.vocab_size
        try:
            with torch.no_grad():
                # With a mask, since positions with gaps alone would mean packed sequences.
                part(
                    input_ids=ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    position_ids=position[None],
                    use_cache=True,
                )
        except TokenSelectError:
            raise
        except Exception as error:
            raise _refuse_model(
                config,
                f"to see how it rotates, it is run over tokens at positions 0 to {position[-1]}, "
                f"which raised {type(error).__name__}: {error}",
            ) from error
        finally:
            config.tokenselect = given
        return self.observed


class RawLayers:
    """The hooks that keep the keys of a model's full-attention layers raw, until `remove()`.

    Raises UnsupportedProblem for a model whose rotation is not understood, and leaves it as it was.
    """

    def __init__(self, part: Any) -> None:
        _refuse_by_name(part.config)
        self._handles: list[Any] = []
        self._layers: dict[Any, RawLayer] = {}
        try:
            self._install(part)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Let the model rotate again."""
        for handle in self._handles:
            handle.remove()
        for module, layer in self._layers.items():
            if raw_layer_of(module) is layer:
                delattr(module, _LAYER)
        self._handles, self._layers = [], {}

    def _install(self, part: Any) -> None:
        for rotary in part.modules():
            if any(_frequencies(rotary)):
                hook = rotary.register_forward_hook(_remember_positions, with_kwargs=True)
                self._handles.append(hook)
        probe = Probe(part.config)
        rotated = probe.run(part)
        if not rotated:
            raise _refuse_model(part.config, "its layers do not attend through its own config")
        self._layers = {one.module: RawLayer() for one in rotated if one.window is None}
        for module, layer in self._layers.items():
            setattr(module, _LAYER, layer)
            self._handles.append(module.register_forward_pre_hook(layer, with_kwargs=True))
        raw = probe.run(part)
        pairs = list(zip(rotated, raw, strict=True))
        for module, layer in self._layers.items():
            its_pairs = [pair for pair in pairs if pair[0].module is module]
            call = its_pairs[0][1].call
            if call is None or call.made is None:
                raise refuse_layer(
                    module,
                    "its cos and sin are not those that a module with a buffer inv_freq returned",
                    _FIX,
                )
            _check_cache(module, call.cache, rotated)
            layer.rope = _rope(module, call.made, its_pairs)


def is_raw(part: Any) -> bool:
    """Return whether a layer of this model keeps its keys raw."""
    return any(raw_layer_of(module) is not None for module in part.modules())


@torch.compiler.disable
def _remember_positions(
    rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Mark cos with its origin; a forward hook of the module that makes cos and sin."""
    position_ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if isinstance(out, tuple) and isinstance(position_ids, Tensor):
        setattr(out[0], _MADE, _Made(rotary, position_ids))


def _frequencies(rotary: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Yield inv_freq and scaling for each kind of layer that a module makes cos and sin for."""
    for name, buffer in rotary.named_buffers(recurse=False):
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            kind = name.removesuffix("inv_freq")
            yield buffer, getattr(rotary, f"{kind}attention_scaling", 1.0)


def _rope(module: Any, made: _Made, pairs: list[tuple[Observed, Observed]]) -> Rope:
    """Return the one rope that maps raw onto rotated queries and keys, in all calls of a module."""
    if made.position_ids.dim() != 2:
        raise refuse_layer(
            module,
            f"position_ids of {made.position_ids.dim()} dimensions (M-RoPE): a key has one "
            "position here",
            _FIX,
        )
    device = pairs[0][0].q.device  # not that of the rotary module, where a model is spread
    ropes = [Rope(torch.zeros(1, device=device), cached="raw")]  # rotates nothing
    for inv_freq, scaling in _frequencies(made.rotary):
        for interleaved in (False, True)[: len(inv_freq)]:  # of one pair, there is one layout
            ropes.append(Rope(inv_freq.to(device, copy=True), interleaved, "raw", scaling))
    fitting: list[Rope] = []
    for rope in ropes:
        fits = all(_rotates(rope, raw, rotated, made.position_ids) for rotated, raw in pairs)
        if fits and not any(_are_equal(rope, other) for other in fitting):
            fitting.append(rope)
    if len(fitting) != 1:
        found = "more than one rotation" if fitting else "no rotation"
        raise refuse_layer(
            module,
            f"{found} by its inv_freq, of halves or of neighbours, gives the queries and keys that "
            "it makes",
            _FIX,
        )
    return fitting[0]


def _rotates(rope: Rope, raw: Observed, rotated: Observed, position_ids: Tensor) -> bool:
    """Return whether this rope rotates the raw queries and keys onto the rotated ones.

    Within roundings: a float32 angle below 1,024 is off by less than 1e-4, all else by a few
    roundings to dtype.
    """
    for before, after in ((raw.q, rotated.q), (raw.k, rotated.k)):
        if rope.rotary_dim > before.shape[3]:
            return False
        dtype = torch.promote_types(before.dtype, torch.float32)
        position = position_ids[0].to(before.device)
        off = rope.reposition(before.to(dtype), position, position) - after.to(dtype)
        bound = max(2e-4, 4 * torch.finfo(before.dtype).eps) * after.abs().max()
        if not bool(off.abs().max() <= bound):
            return False
    return True


def _are_equal(a: Rope, b: Rope) -> bool:
    same = (a.interleaved, a.scaling) == (b.interleaved, b.scaling)
    return same and torch.equal(a.inv_freq, b.inv_freq)


def _check_cache(module: Any, cache: Cache | None, observed: list[Observed]) -> None:
    """Refuse a layer whose raw keys do not arrive in a cache, which guards against rotated ones."""
    if cache is None:
        raise refuse_layer(
            module,
            "it is called without a cache of transformers, as where gradients are checkpointed: "
            "how it hands its keys to a cache cannot be seen",
            "enable() after model.eval()",
        )
    known = {one.module.layer_idx for one in observed if one.window is not None}
    if isinstance(cache, RawKeys):
        known |= cache.raw_layers
        layers = enumerate(cache.layers)
        kept = {
            i for i, one in layers if isinstance(one, CacheLayerMixin) and one.get_seq_length() > 0
        }
        if kept <= known:
            return
    raise refuse_layer(module, "how it hands its keys to a cache is not understood", _FIX)


def _check_positions(module: Any, call: _Call, mask: TokenMask) -> None:
    """Raise UnsupportedProblem unless each request's tokens are at consecutive positions.

    The first one is free, since only distances count. Checked once for all layers, and only on the
    CPU: reading positions off a device means waiting for it.
    """
    made, cache = call.made, call.cache
    if not call.on_cpu or (made is not None and made.is_checked):
        return
    if made is None:
        raise refuse_layer(
            module,
            "called with cos and sin of unknown positions",
            "call the model, not a layer of it",
        )
    B = mask.shape[0]
    known = cache.starts if isinstance(cache, RawKeys) else None
    are_known = known is not None and len(known) == B
    starts = (
        known.clone() if known is not None and are_known else torch.full((B,), -1, device="cpu")
    )
    for span in mask.spans:
        ids = made.position_ids.long().expand(B, -1)[span.rows][:, span.queries]
        first = torch.tensor(span.n, device="cpu") - span.m
        start = ids[:, 0] - first
        if are_known:
            start = torch.where(first == 0, start, starts[span.rows])
        starts[span.rows] = start
        wrong = ids != (start + first)[:, None] + torch.arange(span.m, device="cpu")
        for b in wrong.any(-1).nonzero()[:1, 0].tolist():
            raise refuse_layer(
                module,
                f"position_ids that are not consecutive: tokens {first[b]} to {span.n[b] - 1} of "
                f"request {span.rows.start + b}, counted from 0, at {ids[b, 0]} to {ids[b, -1]}, "
                f"with token 0 at {start[b]}",
                "leave position_ids out, or for a padded batch pass "
                "(attention_mask.cumsum(1) - 1)[:, -new:]",
            )
    if isinstance(cache, RawKeys):
        cache.starts = starts
    made.is_checked = True


def trained_length(config: Any) -> int | None:
    """Return how many tokens a model was made for, as scaled by its rope; None if unknown."""
    trained = getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if "original_max_position_embeddings" in rope:
        scaled = rope["original_max_position_embeddings"] * rope.get("factor", 1)
        trained = max(trained, int(scaled))
    return trained


def _refuse_by_name(config: Any) -> None:
    """Raise UnsupportedProblem for ropes whose angles are no fixed multiples of a position."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in (parameters, *parameters.values()):
        if not isinstance(one, dict):
            continue
        kind = str(one.get("rope_type", "default"))
        if "mrope_section" in one or "mrope" in kind:
            raise _refuse_model(config, "M-RoPE: a key has three positions, of time and place")
        if "dynamic" in kind or kind == "longrope":
            raise _refuse_model(
                config, f"rope_type={kind!r}: its frequencies change with the length"
            )


def _refuse_model(config: Any, why: str) -> Refusal:
    """Return an error that names the model."""
    asked = f"a {config.model_type} model with keys that move"
    return Refusal(asked, why, _FIX)
