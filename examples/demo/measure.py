"""Let the model read on and answer, with one way of attention after the other."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from examples.demo.model import named
from examples.demo.pace import CHUNK
from tokenselect import AttentionInfo
from tokenselect.integrations.transformers import Lossless, TokenSelectCache, enable, recorded

Tick = Callable[[int], None]


class Step(NamedTuple):
    """What came of one token: the next one's logits, and per layer what was selected.

    seconds  wall time of the forward pass
    """

    logits: Tensor  # (vocabulary,)
    infos: list[AttentionInfo]  # none for dense attention
    seconds: float


@dataclass
class Branch:
    """One way of attention, with a KV cache of its own and what came of it.

    options  those of `enable`; None for transformers' own sdpa
    steps    one per held-back token, and with each the likelihood of the following token:
    nll      its negative logarithm
    written  the tokens of the greedy answer
    queries  the infos of the query that wrote each of them; one more query, the last, wrote the
             end or was cut off
    """

    title: str
    cache: Cache
    options: dict[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    queries: list[list[AttentionInfo]] = field(default_factory=list)

    @property
    def infos(self) -> list[AttentionInfo]:
        """Those of all held-back tokens, token after token."""
        return [info for step in self.steps for info in step.infos]

    @property
    def attended(self) -> tuple[float, float]:
        """Mean number of tokens attended to, and of tokens cached, over held-back tokens."""
        n_cached = mean(self.cache.get_seq_length() + i + 1 for i in range(len(self.steps)))
        return mean([len(positions(info)) for info in self.infos] or [n_cached]), n_cached

    @property
    def perplexity(self) -> float:
        """That of the held-back tokens."""
        return math.exp(mean(self.nll))

    @property
    def retained_mass(self) -> float:
        """Mean over held-back tokens, layers and query heads; NaN for dense attention."""
        return mean([mass(info) for info in self.infos] or [math.nan])

    @property
    def median_ms(self) -> float:
        """Milliseconds per token."""
        return 1e3 * median(step.seconds for step in self.steps)

    def agreement(self, other: "Branch") -> float:
        """Return the share of the held-back tokens with the same likeliest next token."""
        pairs = zip(self.steps, other.steps, strict=True)
        return mean(int(a.logits.argmax()) == int(b.logits.argmax()) for a, b in pairs)

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Let the model attend like this inside the block."""
        return nullcontext() if self.options is None else enable(model, **self.options)

    def step(self, model: Any, token: int) -> Step:
        """Feed one token, within `applied`."""
        ids = torch.tensor([[token]], device=model.device)
        with recorded() as infos:
            start = perf_counter()
            out = model(input_ids=ids, **named(model, self.cache), use_cache=True)
            return Step(out.logits[0, -1], infos, perf_counter() - start)

    def rewind(self, n: int) -> None:
        """Forget every token but the first n."""
        self.cache.crop(n - self.cache.get_seq_length())


def positions(info: AttentionInfo) -> list[int]:
    """Return what the first request's first query attended to, ascending."""
    chosen: list[int] = info.selection.positions[0, 0, : int(info.selection.count[0, 0])].tolist()
    return chosen


def mass(info: AttentionInfo) -> float:
    """Return the retained mass, averaged over query heads."""
    return float(info.retained_mass.mean())


def mass_by_layer(infos: Sequence[AttentionInfo], n_layers: int) -> list[float]:
    """Return the mean retained mass of each layer over steps and query heads."""
    return [mean(map(mass, infos[layer::n_layers])) for layer in range(n_layers)]


@torch.inference_mode()
def prefill(
    model: Any,
    cache: TokenSelectCache,
    tokens: Sequence[int],
    tick: Tick,
    options: dict[str, Any] | None = None,
) -> None:
    """Fill the cache chunk by chunk, as `enable` with these options reads prompts: densely."""
    with enable(model, **options or {}):
        for start in range(0, len(tokens), CHUNK):
            chunk = torch.tensor([tokens[start : start + CHUNK]], device=model.device)
            model(input_ids=chunk, **named(model, cache), use_cache=True, logits_to_keep=1)
            tick(chunk.shape[1])


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
            with branch.applied(model):
                step = branch.step(model, token)
            branch.steps.append(step)
            branch.nll.append(-float(step.logits.log_softmax(-1)[following]))
        tick(1)
    for branch in branches:
        branch.rewind(n)


@torch.inference_mode()
def answer(
    model: Any, branch: Branch, question: Sequence[int], *, n_new: int, stop: set[int], tick: Tick
) -> None:
    """Feed the question token by token, then write up to `n_new` tokens greedily."""
    n = branch.cache.get_seq_length()
    with branch.applied(model):
        for token in question:
            step = branch.step(model, token)
            tick(1)
        while True:
            branch.queries.append(step.infos)
            token = int(step.logits.argmax())
            if len(branch.written) == n_new or token in stop:
                break
            branch.written.append(token)
            step = branch.step(model, token)
            tick(1)
    branch.rewind(n)


def ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}


class Written(NamedTuple):
    """What `generate` wrote, the seconds of a token, and what a `Lossless` says of its drafts."""

    tokens: list[int]
    seconds: float
    lossless: Lossless | None


@torch.inference_mode()
def write(
    model: Any, cache: Cache, ids: Sequence[int], n_new: int, least: int = 0, drafts: Any = None
) -> Written:
    """Let `generate` write at most n_new tokens after ids, greedily; the cache holds the first.

    least   write at least so many
    drafts  options of `enable` to draft with, for lossless decoding; None: stock decoding
    """
    n, prompt = cache.get_seq_length(), torch.tensor([ids], device=model.device)
    lossless = None if drafts is None else Lossless()
    with nullcontext() if drafts is None else enable(model, **drafts):
        start = perf_counter()
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **named(model, cache),
            max_new_tokens=n_new,
            min_new_tokens=least,
            do_sample=False,
            custom_generate=lossless,
        )
        seconds = perf_counter() - start
    cache.crop(n - cache.get_seq_length())
    tokens = text[0, len(ids) :].tolist()
    return Written(tokens, seconds / len(tokens), lossless)


@torch.inference_mode()
def by_length(
    model: Any, cache: TokenSelectCache, options: dict[str, Any], tick: Tick
) -> list[tuple[int, float]]:
    """Return, for an eighth, a quarter, half and all of the cached tokens: how many those are, and

    the time of a token that selects, over that of a dense one. Medians of a few, in turns. Leaves
    the cache shorter.
    """
    found = []
    n = cache.get_seq_length()
    for length in (n, n // 2, n // 4, n // 8):
        if length < n:  # in transformers 5.4 crop(0) leaves nothing
            cache.crop(length - cache.get_seq_length())
        ratios = []
        for token in range(7):
            seconds = []
            for way in (nullcontext, partial(enable, model, **options)):
                with way():
                    start = perf_counter()
                    ids = torch.tensor([[token]], device=model.device)
                    model(input_ids=ids, **named(model, cache), use_cache=True)
                    seconds.append(perf_counter() - start)
                cache.crop(-1)
            ratios.append(seconds[1] / seconds[0])
        found.append((length, median(ratios[1:])))
        tick(1)
    return found[::-1]
