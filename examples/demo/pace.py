"""How fast this machine reads and writes with a model, and how long a text it has time for."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from examples.demo.model import named
from tokenselect.integrations.transformers import TokenSelectCache, enable

CHUNK = 512
# Cached tokens at which times are taken, besides none.
_CACHED = 4096


@dataclass(frozen=True)
class Pace:
    """Seconds of dense attention after n cached tokens: at n = 0, and what each of them adds.

    chunk  of reading CHUNK tokens together
    token  of one token
    """

    chunk: tuple[float, float]
    token: tuple[float, float]

    def within(self, n: int, tokens: int) -> float:
        """Return the seconds of reading n tokens, and then many one by one."""
        chunks = n / CHUNK
        read = chunks * self.chunk[0] + CHUNK * chunks**2 / 2 * self.chunk[1]
        return read + tokens * (self.token[0] + n * self.token[1])

    def beyond(self, n: int, tokens: int) -> float:
        """Return those of reading n tokens twice, densely and with selection, and many tokens."""
        return self.within(n, tokens) + 1.3 * n / CHUNK * self.chunk[0]


@torch.inference_mode()
def measured(model: Any) -> Pace:
    """Measure a chunk and a token over an empty cache and over one of noise."""
    timed: dict[str, list[float]] = {"chunk": [], "token": []}
    for n in (0, 0, _CACHED):  # the first is a warm-up
        cache = TokenSelectCache(model, max_length=n + CHUNK + 4)
        if n:
            feed(model, cache, [0])
            for layer in cache.layers:
                heads, width = layer.keys.shape[1], layer.keys.shape[3]
                layer.update(*torch.randn(2, 1, heads, n - 1, width, dtype=model.dtype))
        timed["chunk"].append(feed(model, cache, range(CHUNK)))
        timed["token"].append(min(feed(model, cache, [1]) for _ in range(3)))
    chunk, token = ((at_0, max(0.0, at_n - at_0) / _CACHED) for _, at_0, at_n in timed.values())
    return Pace(chunk, token)


def feed(model: Any, cache: Any, tokens: Iterable[int]) -> float:
    """Read tokens densely, all together; return the seconds it took."""
    ids = torch.tensor([[i % model.config.vocab_size for i in tokens]], device=model.device)
    with enable(model) if ids.shape[1] > 1 else nullcontext():
        start = perf_counter()
        model(input_ids=ids, **named(model, cache), use_cache=True, logits_to_keep=1)
        return perf_counter() - start


def longest(seconds: Callable[[int], float], limit: float, lengths: Iterable[int]) -> int:
    """Return the first of some lengths that takes no longer than the limit; 0 if none does."""
    return next((n for n in lengths if seconds(n) <= limit), 0)
