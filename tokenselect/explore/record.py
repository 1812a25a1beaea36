"""Record what every layer of a model did in each of some decode steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenselect.api import AttentionInfo
from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import Options
from tokenselect.integrations.transformers import NAME, TokenSelectCache, enable, recorded
from tokenselect.integrations.transformers.named_layers import check_layers

BACKEND = "reference"
CHUNK = 512
N_GUESSES = 3


@dataclass
class Layer:
    """The calls of one layer, one per step, and what was cached after the last.

    queries (1, Hq, 1, D) and outputs (Hq, Dv) per step; keys and values (1, Hkv, N, D and Dv);
    options: scale and softcap of its attention, and its sink_logits
    """

    queries: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    infos: list[AttentionInfo] = field(default_factory=list)
    keys: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    values: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trace:
    """A text that a model read, and what it did in the last `steps` tokens of it.

    ids      the tokens, N = context + steps of them; step t feeds ids[context + t]
    layers   by number; those that select
    guesses  per way of attention and step, the likeliest next tokens: (token, probability)
    """

    ids: list[int]
    context: int
    config: SelectConfig
    theta: float | None
    max_reuse: int
    layers: dict[int, Layer]
    guesses: dict[str, list[list[tuple[int, float]]]]

    @property
    def steps(self) -> int:
        """Return how many steps were recorded."""
        return len(self.ids) - self.context


@torch.inference_mode()
def record(
    model: Any,
    ids: Sequence[int],
    steps: int,
    config: SelectConfig,
    *,
    theta: float | None = None,
    max_reuse: int = 64,
    layers: Sequence[int] | None = None,
    tick: Callable[[int], object] = lambda n: None,
) -> Trace:
    """Let a model read a text, its last `steps` tokens one by one with selection.

    ids     the text; all but its last `steps` tokens are read densely
    config  a number k of tokens, n_sink and n_local; the rest as by default
    layers  those to keep, from 0 on or from -1 back; None: all that select
    tick    called with a number of tokens whenever so many were read; 3 * len(ids) in all

    The text is read three times: densely, through the first and newest tokens alone, and selecting.
    """
    context = len(ids) - steps
    check_lengths(context, steps, config)
    if layers is not None:
        shape = model.config.get_text_config(decoder=True)
        check_layers(Options(layers={number: {} for number in layers}), shape)
        layers = [number % shape.num_hidden_layers for number in layers]
    window = {"k": 0, "n_sink": config.n_sink, "n_local": int(config.k) + config.n_local}
    chosen = {"k": config.k, "n_sink": config.n_sink, "n_local": config.n_local}
    chosen |= {"theta": theta, "max_reuse": max_reuse} if theta is not None else {}
    guesses: dict[str, list[list[tuple[int, float]]]] = {}
    kept: dict[int, Layer] = {}
    for way, options in (("dense", None), ("window", window), ("selected", chosen)):
        cache = TokenSelectCache(model, max_length=len(ids))
        for start in range(0, context, CHUNK):
            end = min(start + CHUNK, context)
            _read(model, cache, ids[start:end])
            tick(end - start)
        on = nullcontext() if options is None else enable(model, **options, backend=BACKEND)
        guesses[way] = []
        with on, _watched() as seen:
            for token in ids[context:]:
                guesses[way].append(_likeliest(_read(model, cache, [token])))
                tick(1)
        kept = seen
    kept = {number: kept[number] for number in (sorted(kept) if layers is None else layers)}
    return Trace(list(ids), context, config, theta, max_reuse, kept, guesses)


def check_lengths(context: int, steps: int, config: SelectConfig) -> None:
    """Raise InvalidProblem if there is no step, or nothing to leave out before the first."""
    if steps < 1:
        raise InvalidProblem(
            f"steps={steps}", "at least one token is decoded with selection", "give 1 or more steps"
        )
    size = config.n_sink + config.k + config.n_local
    if context < size:
        raise InvalidProblem(
            f"{context} tokens before the first step, n_sink + k + n_local = {size}",
            "at least as many tokens are read before the first step as a selection holds, so that "
            "there is something to leave out",
            "read more tokens before it, or give a smaller k",
        )


def _read(model: Any, cache: TokenSelectCache, ids: Sequence[int]) -> Tensor:
    """Feed tokens, and return the logits (vocabulary,) after the last."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    tokens = torch.tensor([list(ids)], device=model.device)
    logits: Tensor = model(tokens, use_cache=True, logits_to_keep=1, **{name: cache}).logits
    return logits[0, -1]


def _likeliest(logits: Tensor) -> list[tuple[int, float]]:
    best = logits.float().softmax(-1).topk(min(N_GUESSES, len(logits)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@contextmanager
def _watched() -> Iterator[dict[int, Layer]]:
    """Keep, by layer, what goes in and out of every call that selects."""
    attend = ALL_ATTENTION_FUNCTIONS[NAME]
    layers: dict[int, Layer] = {}

    def watched(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        with recorded() as infos:
            out, _ = attend(module, query, key, value, mask, **more)
        if infos:
            layer = layers.setdefault(module.layer_idx, Layer())
            layer.queries.append(query.clone())
            layer.outputs.append(out[0, 0].clone())
            layer.infos += infos
            layer.keys, layer.values = key, value
            scale = more.get("scaling")
            layer.options = {
                "scale": query.shape[3] ** -0.5 if scale is None else scale,
                "softcap": more.get("softcap"),
                "sink_logits": more.get("s_aux"),
            }
        return out, None

    AttentionInterface.register(NAME, watched)
    try:
        yield layers
    finally:
        AttentionInterface.register(NAME, attend)
