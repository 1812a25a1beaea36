"""Run the model over one passage with several ways of attention, from the same prefilled cache."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from examples.demo.model import DecodeAttention, LayerRecord, PreallocatedCache, named

Tick = Callable[[int], None]


@dataclass
class Reading:
    """What one way of attention made of the held-back tokens, a value per token.

    nll       negative log likelihood of the next token, natural log
    guesses   the likeliest next token
    seconds   wall time of the forward pass; attention_seconds: of its attention calls alone
    """

    nll: list[float] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(mean(self.nll))

    @property
    def median_ms(self) -> float:
        return 1e3 * median(self.seconds)

    @property
    def median_attention_ms(self) -> float:
        return 1e3 * median(self.attention_seconds)

    def agreement(self, other: "Reading") -> float:
        """Share of the tokens with the same likeliest next token."""
        return mean(a == b for a, b in zip(self.guesses, other.guesses, strict=True))


@dataclass(frozen=True)
class Answer:
    """The greedy answer: its tokens, and the records of each query, by layer.

    One query wrote each token; one more, the last, wrote the end or was cut off.
    """

    tokens: list[int]
    records: list[list[LayerRecord]]


@dataclass
class Branch:
    """One way of attention, with a cache of its own and what came of it.

    records  what the hook recorded over the held-back tokens; none for dense attention
    """

    title: str
    attention: DecodeAttention
    cache: PreallocatedCache
    reading: Reading = field(default_factory=Reading)
    records: list[LayerRecord] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def attended(self) -> tuple[float, float]:
        """Mean number of tokens attended to, and of tokens cached, over held-back tokens."""
        n = self.cache.get_seq_length()
        n_cached = mean(n + i + 1 for i in range(len(self.reading.seconds)))
        if not self.records:
            return n_cached, n_cached
        return mean(len(record.positions) for record in self.records), n_cached

    def step(self, model: Any, token: int) -> tuple[Tensor, float]:
        """Feed one token; return the next token's logits and the wall time of the forward pass."""
        with self.attention.attached(model):
            self.attention.seconds = 0.0
            start = perf_counter()
            logits = model(
                input_ids=torch.tensor([[token]], device=model.device),
                **named(model, self.cache),
                use_cache=True,
            ).logits[0, -1]
            return logits, perf_counter() - start


@torch.inference_mode()
def prefill(model: Any, cache: PreallocatedCache, tokens: Sequence[int], tick: Tick) -> None:
    """Fill the cache densely, chunk by chunk."""
    n_chunk = 512
    for start in range(0, len(tokens), n_chunk):
        chunk = tokens[start : start + n_chunk]
        model(
            input_ids=torch.tensor([chunk], device=model.device),
            **named(model, cache),
            use_cache=True,
            logits_to_keep=1,
        )
        tick(len(chunk))


@torch.inference_mode()
def read_on(model: Any, branches: Sequence[Branch], tokens: Sequence[int], tick: Tick) -> None:
    """Feed the held-back tokens to each branch and keep how well it foresees the next.

    The branches take turns token by token, and another one goes first at each token, so that a
    machine that slows down slows down all of them.
    """
    n = branches[0].cache.get_seq_length()
    for i, (token, following) in enumerate(itertools.pairwise(tokens)):
        first = i % len(branches)
        for branch in (*branches[first:], *branches[:first]):
            logits, seconds = branch.step(model, token)
            branch.reading.nll.append(-float(logits.log_softmax(-1)[following]))
            branch.reading.guesses.append(int(logits.argmax()))
            branch.reading.seconds.append(seconds)
            branch.reading.attention_seconds.append(branch.attention.seconds)
        tick(1)
    for branch in branches:
        branch.records = list(branch.attention.records)
        branch.cache.rewind(n)


@torch.inference_mode()
def answer(
    model: Any, branch: Branch, question: Sequence[int], *, n_new: int, stop: set[int], tick: Tick
) -> Answer:
    """Feed the question token by token, then write up to `n_new` tokens greedily."""
    n = branch.cache.get_seq_length()
    branch.attention.records.clear()
    for token in question:
        logits, _ = branch.step(model, token)
        tick(1)
    written: list[int] = []
    records: list[list[LayerRecord]] = []
    n_layers = model.config.num_hidden_layers
    while True:
        records.append(branch.attention.records[-n_layers:])
        token = int(logits.argmax())
        if len(written) == n_new or token in stop:
            break
        written.append(token)
        logits, _ = branch.step(model, token)
        tick(1)
    branch.cache.rewind(n)
    return Answer(written, records)


def mass_by_layer(records: Sequence[LayerRecord], n_layers: int) -> list[float]:
    """Mean retained mass of each layer over steps and query heads; NaN where it is not known."""
    return [
        mean([record.retained_mass for record in records if record.layer == layer] or [math.nan])
        for layer in range(n_layers)
    ]
