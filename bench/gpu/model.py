"""A whole model, dense and selected: python -m bench.gpu.model [--dry-run] [--backend NAME]

A Llama of 8 layers with random weights, in transformers, decodes one token that attends to 128K,
whose keys and values are random too: what is measured is time, and what is compared is arithmetic.
Prints a report as JSON on its last line.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokenselect
from bench.gpu import reuse, truth
from bench.gpu.device import Device
from bench.gpu.measure import spread
from bench.gpu.worker import device_for, named
from bench.run import NotEquivalent
from bench.workloads import PAPER_SIZES
from tokenselect import Problem, SelectConfig, SelectionCache

# A layer's number, q, and the keys and values of the whole cache, to the result of attention.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ROUNDS, THETA, MAX_REUSE = 15, 0.9, 64
STOCK = "stock sdpa, DynamicCache, called"
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

    def __init__(self, shape: Shape, at: torch.device) -> None:
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
        self.shape, self.at, self._cache = shape, at, InPlace
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

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits (1, vocabulary) of the token at the last position, over the cache in place."""
        self.model.set_attn_implementation("bench_gpu_model")
        given = {"position_ids": position, "past_key_values": self._cache()}
        logits: Tensor = self.model(token, use_cache=True, **given).logits
        return logits[:, -1]


class Stock:
    """The same step as transformers makes it: sdpa over a DynamicCache, copied for every token."""

    def __init__(self, decoder: Decoder) -> None:
        from transformers import DynamicCache

        self._decoder, self._cache = decoder, DynamicCache()
        n = decoder.shape.n
        for layer, (k, v) in enumerate(decoder.kv):
            self._cache.update(k[:, :, : n - 1], v[:, :, : n - 1], layer)

    def begin(self) -> None:
        """Make ready for a step: the n tokens of the step before are n - 1 again."""
        if self._cache.get_seq_length() == self._decoder.shape.n:
            self._cache.crop(-1)
        self._decoder.model.set_attn_implementation("sdpa")

    def __call__(self) -> Tensor:
        one = self._decoder
        given = {"position_ids": one.position, "past_key_values": self._cache}
        logits: Tensor = one.model(one.token, use_cache=True, **given).logits
        return logits[:, -1]


def _dense(kind: SDPBackend) -> Attend:
    """Attend to the whole cache by one kernel of torch's; on the CPU of a dry run by any."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind if q.is_cuda else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def sides(
    decoder: Decoder, backend: str, device: Device, interface: Any
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, each held to another way to the same logits. Raises NotEquivalent."""
    stock = Stock(decoder)
    found: dict[str, Callable[[], Tensor]] = {STOCK: stock}
    stock.begin()
    right = stock()
    for name, kind in DENSE.items():
        _hold_layers(decoder, name, _dense(kind))
        found[name] = _captured(decoder, _dense(kind), interface)
        error = float((found[name]() - right).abs().max() / right.abs().max())
        if not error <= _NEAR:
            raise NotEquivalent(f"{name}: logits are {error:.3g} of the largest away from {STOCK}")
    for name, max_reuse in (("selected afresh, captured", 0), ("reused, captured", MAX_REUSE)):
        try:
            found[name] = _selected(decoder, backend, max_reuse, interface)
        except NotEquivalent as error:
            raise NotEquivalent(f"{name}: {error}") from None
    device.synchronize()
    return found


def _hold_layers(decoder: Decoder, name: str, attend: Attend) -> None:
    """Hold each layer's attention to float32; in the logits, deep layers hardly show."""

    def held(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(layer, q, k, v)
        keys, values = decoder.kv[layer]
        queries = q.float().view(*keys.shape[:2], -1, keys.shape[3])
        weights = torch.softmax(queries @ keys.float().mT * keys.shape[3] ** -0.5, -1)
        right = (weights @ values.float()).view(out.shape)
        error = float((out - right).abs().max() / right.abs().max())
        if not error <= _NEAR:
            raise NotEquivalent(f"{name}: layer {layer} is {error:.3g} away from float32")
        return out

    decoder.attend = held
    decoder.step(decoder.token, decoder.position)


def _selected(
    decoder: Decoder, backend: str, max_reuse: int, interface: Any
) -> Callable[[], Tensor]:
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
        out: Tensor = plan(q, k, v, n, cache=mine[layer])
        return out

    def called(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given: dict[str, Any] = {"cache_seqlens": n, "backend": backend, "cache": theirs[layer]}
        out: Tensor = tokenselect.attention(q, k, v, **shape.config, **given)
        return out

    if max_reuse:  # the step before, whose selections are reused
        n -= 1
        for way in (planned, called):
            decoder.attend = way
            decoder.step(decoder.token, decoder.position)
        n += 1
    decoder.attend = called
    expected = decoder.step(decoder.token, decoder.position)
    captured = _captured(decoder, planned, interface)
    got = captured()
    if reuse.is_exact(backend, at) and not truth.same(got, expected):
        raise NotEquivalent("the logits are not those of attention, bit for bit")
    if not (got - expected).abs().max() <= _NEAR * expected.abs().max():
        raise NotEquivalent("the logits are far from those of attention")
    for layer, cache in enumerate(mine):
        if cache is not None and (int(cache.misses), int(cache.hits) > 0) != (1, True):
            raise NotEquivalent(f"layer {layer} did not reuse its selection")
    return captured


def _captured(decoder: Decoder, attend: Any, interface: Any) -> Callable[[], Tensor]:
    def step(token: Tensor, position: Tensor) -> Tensor:
        decoder.attend = attend
        return decoder.step(token, position)

    captured = tokenselect.capture(step, interface=interface)
    captured(decoder.token, decoder.position)
    return lambda: captured(decoder.token, decoder.position)


def measure(backend: str, device: Device, shape: Shape, rounds: int, interface: Any = None) -> Any:
    """Times of a token in milliseconds, all sides in turns, and ratios to both dense ones."""
    decoder = Decoder(shape, device.at)
    found = sides(decoder, backend, device, interface)
    times: dict[str, list[float]] = {name: [] for name in found}
    for i in range(rounds):
        order = list(found) if i % 2 == 0 else list(reversed(found))
        for name in order:
            run = found[name]
            if isinstance(run, Stock):
                run.begin()
            reading = (device.eager if name == STOCK else device.queued)(run)
            device.synchronize()
            times[name].append(reading())
    ratios = []
    fastest = min(DENSE, key=lambda name: statistics.median(times[name]))
    for over in (STOCK, fastest):
        for name in list(found)[1:]:
            pairs = zip(times[over], times[name], strict=True)
            if name != over:
                ratios.append({"of": name, "over": over, **spread([a / b for a, b in pairs])})
    facts = {
        "n": shape.n,
        "layers": shape.layers,
        "heads": f"{shape.heads}/{shape.kv_heads}/{shape.D}",
    }
    facts |= {"hidden": shape.hidden, "intermediate": shape.intermediate, "rounds": rounds}
    facts["config"] = {name: shape.config[name] for name in ("k", "n_sink", "n_local")}
    told = [{"name": name, **spread(took, "_ms")} for name, took in times.items()]
    return facts | {"sides": told, "ratios": ratios}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.model")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args(argv)
    interface, shape, rounds = None, Shape(), ROUNDS
    if asked.dry_run:
        from properties.recorded import Recorded

        interface, shape, rounds = Recorded(), DRY, 2
    if importlib.util.find_spec("transformers") is None:
        print(json.dumps({"left_out": "the package transformers is not installed"}))
        return 0
    try:
        device = device_for(asked.dry_run)
        report = measure(named(asked.backend), device, shape, rounds, interface)
        report["transformers"] = importlib.metadata.version("transformers")
    except torch.cuda.OutOfMemoryError as error:
        report = {"left_out": str(error).split("\n")[0]}
    except NotEquivalent as error:
        report = {"wrong": str(error)}
    print(json.dumps(report))
    return 1 if "wrong" in report else 0


if __name__ == "__main__":
    sys.exit(main())
