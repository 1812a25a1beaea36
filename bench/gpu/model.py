"""A whole model, dense and selected.

A Llama of 8 layers with random weights, in transformers, decodes one token that attends to 128K,
whose keys and values are random too: what is measured is time, and what is compared is arithmetic.
"""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokenselect
from bench.checks import NotEquivalent
from bench.gpu.device import Device, hold, nearness
from bench.gpu.timing import spread
from bench.workloads import PAPER_SIZES
from tokenselect import Problem, SelectConfig, SelectionCache

# A layer's number, q, and the keys and values of the whole cache, to the result of attention.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ROUNDS, THETA, MAX_REUSE = 15, 0.9, 64
STOCK = "stock sdpa, DynamicCache, called"
# As a user of transformers calls it, on a cache that is not copied for each token.
CALLED = {
    "sdpa": "sdpa, TokenSelectCache, called",
    "tokenselect": "selected, TokenSelectCache, called",
}
DENSE = {
    "sdpa flash, cache in place, captured": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn, cache in place, captured": SDPBackend.CUDNN_ATTENTION,
}
_NEAR = 0.02  # of the largest logit: what bfloat16 makes of another order of additions


@dataclass(frozen=True)
class Shape:
    """n: tokens attended to, the new one included."""

    n: int = 128 * 1024
    layers: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32_000
    config: SelectConfig = PAPER_SIZES

    @property
    def D(self) -> int:
        return self.hidden // self.heads


DRY = Shape(96, 2, 64, 96, 4, 2, 100, SelectConfig(k=16, n_sink=4, n_local=8))


class Decoder:
    """The model over one KV cache of n tokens; `attend` says how its layers attend."""

    def __init__(self, shape: Shape, at: torch.device, interface: Any) -> None:
        from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

        decoder = self

        class InPlace(DynamicCache):  # type: ignore[misc]  # transformers says nothing of types
            """The new token is written over the last of n."""

            def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> Any:
                keys, values = decoder.kv[layer]
                keys[:, :, -1:].copy_(k)
                values[:, :, -1:].copy_(v)
                return keys, values

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
            return decoder.attend(module.layer_idx, q, k, v).transpose(1, 2), None

        # No mask function is registered under this name, so no mask is made.
        AttentionInterface.register("bench_gpu_model", attend)
        self.shape, self.at, self._interface = shape, at, interface
        self._in_place, self._stock = InPlace, DynamicCache()
        self._called: list[Any] = []
        self.attend: Attend = _dense(SDPBackend.FLASH_ATTENTION)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=2 * shape.n,
        )
        torch.set_default_dtype(torch.bfloat16)
        try:
            with at:
                self.model = LlamaForCausalLM(config).eval()
                size = (1, shape.kv_heads, shape.n, shape.D)
                self.kv = [(torch.randn(size), torch.randn(size)) for _ in range(shape.layers)]
        finally:
            torch.set_default_dtype(torch.float32)
        self.token = torch.full((1, 1), 7, device=at)
        self.position = torch.full((1, 1), shape.n - 1, device=at)
        for layer, (k, v) in enumerate(self.kv):
            self._stock.update(k[:, :, : shape.n - 1], v[:, :, : shape.n - 1], layer)

    def _logits(self, attention: str, cache: Any, token: Tensor, position: Tensor) -> Tensor:
        self.model.set_attn_implementation(attention)
        # By place: the name of the cache is not the same in every transformers.
        logits: Tensor = self.model(token, None, position, cache, use_cache=True).logits
        return logits[:, -1]

    def step(self, attend: Attend) -> Tensor:
        """Return logits (1, vocabulary) of the token at the last position, the cache in place."""
        return self._step(attend, self.token, self.position)

    def _step(self, attend: Attend, token: Tensor, position: Tensor) -> Tensor:
        self.attend = attend
        return self._logits("bench_gpu_model", self._in_place(), token, position)

    def captured(self, attend: Attend) -> Callable[[], Tensor]:
        step = tokenselect.capture(partial(self._step, attend), interface=self._interface)
        step(self.token, self.position)
        return lambda: step(self.token, self.position)

    def stock(self) -> Tensor:
        """The same step as transformers makes it: sdpa over a DynamicCache, copied for a token."""
        return self._logits("sdpa", self._stock, self.token, self.position)

    def called(self, attention: str, backend: str) -> Callable[[], Tensor]:
        """Return the same step on the cache of the integration, by its attention or stock's."""
        from tokenselect.integrations.transformers import TokenSelectCache

        cache = TokenSelectCache(self.model)
        for layer, (k, v) in enumerate(self.kv):
            cache.update(k[:, :, : self.shape.n - 1], v[:, :, : self.shape.n - 1], layer)
        self._called.append(cache)
        self.model.config.tokenselect = {**self.shape.config, "backend": backend}
        return lambda: self._logits(attention, cache, self.token, self.position)

    def before_call(self) -> None:
        """Make ready for any: the n tokens of the step before are n - 1 again."""
        for cache in (self._stock, *self._called):
            if cache.get_seq_length() == self.shape.n:
                cache.crop(-1)


def _dense(kind: SDPBackend) -> Attend:
    """Attend to the whole cache by one kernel of torch's; on the CPU of a dry run by any."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind if q.is_cuda else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def contenders(decoder: Decoder, backend: str) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, each held to other arithmetic. Raises NotEquivalent."""
    right = decoder.stock()
    found: dict[str, Callable[[], Tensor]] = {STOCK: decoder.stock}
    for name, kind in DENSE.items():
        _check_layers(decoder, name, _dense(kind))
        found[name] = decoder.captured(_dense(kind))
        hold(f"{name}: a logit of {STOCK}", found[name](), right, _NEAR)
    for attention, name in CALLED.items():
        found[name] = decoder.called(attention, backend)
    hold(f"{CALLED['sdpa']}: a logit of {STOCK}", found[CALLED["sdpa"]](), right, _NEAR)
    for name, max_reuse in (("selected, captured", 0), ("reused, captured", MAX_REUSE)):
        try:
            found[name] = _selected(decoder, backend, max_reuse)
        except NotEquivalent as error:
            raise NotEquivalent(f"{name}: {error}") from None
    name, captured = CALLED["tokenselect"], found["selected, captured"]()
    hold(f"{name}: a logit of a captured step", found[name](), captured, _NEAR)
    return found


def _check_layers(decoder: Decoder, name: str, attend: Attend) -> None:
    """Hold each layer's attention to float32; in the logits, deep layers hardly show."""

    def checked(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(layer, q, k, v)
        keys, values = decoder.kv[layer]
        queries = q.float().view(*keys.shape[:2], -1, keys.shape[3])
        weights = torch.softmax(queries @ keys.float().mT * keys.shape[3] ** -0.5, -1)
        right = (weights @ values.float()).view(out.shape)
        hold(f"{name}: layer {layer}, in float32,", out.float(), right, _NEAR)
        return out

    decoder.step(checked)


def _selected(decoder: Decoder, backend: str, max_reuse: int) -> Callable[[], Tensor]:
    """A captured step whose layers are calls of one plan; with max_reuse every layer reuses."""
    shape, at = decoder.shape, decoder.at
    n = torch.full((1,), shape.n, dtype=torch.int32, device=at)
    q = torch.zeros(1, shape.heads, 1, shape.D, dtype=torch.bfloat16, device=at)
    like = Problem.build(q, *decoder.kv[0], shape.config, max_reuse=max_reuse)
    plan = tokenselect.plan(like, backend)
    mine, theirs = (
        [SelectionCache(THETA, max_reuse) if max_reuse else None for _ in decoder.kv]
        for _ in range(2)
    )

    def planned(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan(q, k, v, n, cache=mine[layer])

    def called(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given: dict[str, Any] = {"cache_seqlens": n, "backend": backend, "cache": theirs[layer]}
        out: Tensor = tokenselect.attention(q, k, v, **shape.config, **given)
        return out

    if max_reuse:  # the step before, whose selections are reused
        n -= 1
        decoder.step(planned)
        decoder.step(called)
        n += 1
    expected = decoder.step(called)
    captured = decoder.captured(planned)
    got = captured()
    hold("a logit of attention", got, expected, nearness(backend, at) and _NEAR)
    for layer, cache in enumerate(mine):
        if cache is not None and (int(cache.misses), int(cache.hits) > 0) != (1, True):
            raise NotEquivalent(f"layer {layer} did not reuse its selection")
    return captured


def measure(backend: str, device: Device, dry: bool = False) -> dict[str, Any]:
    """Return times of a token in milliseconds, all by turns, and ratios to two dense ones.

    Raises NotEquivalent. What cannot be measured here is "left_out".
    """
    if importlib.util.find_spec("transformers") is None:
        return {"left_out": "the package transformers is not installed"}
    shape, rounds, interface = Shape(), ROUNDS, None
    if dry:
        from properties.recorded import Recorded

        shape, rounds, interface = DRY, 2, Recorded()
    try:
        decoder = Decoder(shape, device.at, interface)
        found = contenders(decoder, backend)
        device.synchronize()
        times: dict[str, list[float]] = {name: [] for name in found}
        for i in range(rounds):
            for name in found if i % 2 == 0 else reversed(found):
                decoder.before_call()
                is_called = name in (STOCK, *CALLED.values())
                reading = (device.eager if is_called else device.queued)(found[name])
                device.synchronize()
                times[name].append(reading())
    except torch.cuda.OutOfMemoryError as error:
        return {"left_out": str(error).split("\n")[0]}
    fastest = min(DENSE, key=lambda name: statistics.median(times[name]))
    ratios = [
        {"of": name, "over": over,
         **spread([a / b for a, b in zip(times[over], times[name], strict=True)])}
        for over in (STOCK, CALLED["sdpa"], fastest) for name in found if name not in (STOCK, over)
    ]  # fmt: skip
    return {
        "n": shape.n,
        "layers": shape.layers,
        "rounds": rounds,
        "heads": f"{shape.heads}/{shape.kv_heads}/{shape.D}",
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "config": {name: shape.config[name] for name in ("k", "n_sink", "n_local")},
        "sides": [{"name": name, **spread(took, "_ms")} for name, took in times.items()],
        "ratios": ratios,
        "transformers": importlib.metadata.version("transformers"),
    }
