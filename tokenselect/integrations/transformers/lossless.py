"""Generate what the dense model would, from drafts that selection makes.

Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) in which a
model drafts for itself: with the same weights, over the same cache. A round drafts m tokens one by
one, takes them out of the cache, and reads them again in one dense call. The logits of that call
judge the drafts and give one token more; its keys and values are those that stay.
"""

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    GenerationMode,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import NAME, Options, parse
from tokenselect.integrations.transformers.cache import GrowableLayer
from tokenselect.integrations.transformers.layers import all_dense
from tokenselect.scalars import is_integer, is_number, plain

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Processors that keep what they were called with: drafts, here.
_COUNTING = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__annotations__ else "past_key_values"


class LosslessStats(NamedTuple):
    """What one `generate` did, counted for each request of the batch.

    rounds    dense calls after the prompt's
    drafted   tokens that were drafted
    accepted  those of them that are in the answer
    tokens    new tokens in the answer
    """

    rounds: int
    drafted: int
    accepted: int
    tokens: int


class Lossless:
    """A decoding method of `generate`: dense attention's tokens, drafted with selection.

        model.generate(..., custom_generate=Lossless())

    draft  a round drafts at most that many tokens, >= 1
    cost   the time that drafting a token takes, over that of a dense call, > 0: with the rate at
           which drafts are accepted, it decides how many a round drafts
    stats  `LosslessStats` of the last `generate`, or None

    Greedy decoding gives the tokens of dense greedy decoding, but for near-ties of its logits;
    sampling gives tokens of the same distribution, not the same draws. Prompts are read densely,
    whatever `prefill` says. The rows of a batch keep what all of them accept.
    """

    def __init__(self, draft: int = 16, cost: float = 0.5) -> None:
        draft, cost = plain(draft), plain(cost)
        if not is_integer(draft) or draft < 1:
            raise InvalidProblem(
                f"draft={draft!r}",
                "draft is an integer >= 1: how many tokens a round drafts at most",
                "pass an int of 1 or more, or leave it out for 16",
            )
        if not is_number(cost) or not 0 < cost < math.inf:
            raise InvalidProblem(
                f"cost={cost!r}",
                "cost is a number > 0: the time of drafting a token, over that of a dense call",
                "pass what was measured, or leave it out for 0.5",
            )
        self.draft, self.cost = draft, cost
        self.stats: LosslessStats | None = None

    def __repr__(self) -> str:
        return f"Lossless(draft={self.draft}, cost={self.cost})"

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode, as `generate` asks its decoding methods to.

        Raises InvalidProblem for a model that does not attend with tokenselect, for a cache that
        cannot be cropped, for beams, and for other settings that are not met here.
        """
        self.stats = None
        given = _arguments_of_generate()
        _refuse(model, generation_config, logits_processor, model_kwargs, given)
        config = model.config.get_text_config(decoder=True)
        reader = _Reader(model, logits_processor, generation_config.do_sample)
        answer = _Answer(input_ids, stopping_criteria, generation_config, given.get("streamer"))
        longest = stopping_criteria.max_length or sys.maxsize
        depth, options = _Depth(self.draft, self.cost), parse(getattr(config, NAME, None))
        rounds = drafted = accepted = m = 0

        with all_dense(config):
            outputs = model._prefill(input_ids, generation_config, model_kwargs)
        cache = outputs.get(_CACHE)
        _refuse_uncroppable(cache)
        text, q = input_ids, None  # the answer and m drafts, and what these were drawn from
        with _recording_past(cache):
            while True:
                logits, scores = reader.scores(outputs, text, m + 1)
                tokens, agreed = reader.judge(text[:, text.shape[1] - m :], scores, q)
                n_agreed = int(agreed[answer.writes].min())
                before = answer.ids.shape[1]
                try:
                    answer.add(tokens[:, : n_agreed + 1], scores, logits)
                finally:
                    kept = answer.ids.shape[1] - before
                    _crop(cache, m + 1 - kept)
                accepted += min(kept, n_agreed)
                if not answer.goes_on.any():
                    break
                depth.saw(n_agreed, m)
                model_kwargs = model._update_model_kwargs_for_generation(
                    outputs, model_kwargs, num_new_tokens=kept
                )
                m = min(depth.best(), longest - answer.ids.shape[1] - 1)
                if _selects_all(options, int(cache.get_seq_length()) + 1):
                    m = 0
                text, q, its_kwargs = reader.draft(answer, m, model_kwargs)
                _rewind(cache, m)
                with all_dense(config):
                    outputs = reader.read(text, m + 1, its_kwargs)
                rounds, drafted = rounds + 1, drafted + m
        tokens_added = answer.ids.shape[1] - input_ids.shape[1]
        self.stats = LosslessStats(rounds, drafted, accepted, tokens_added)
        return answer.end(cache)


class _Reader:
    """A model and what is made of its logits."""

    def __init__(self, model: Any, logits_processor: Any, is_sampled: bool) -> None:
        self._model, self._processor, self._is_sampled = model, logits_processor, is_sampled

    def read(self, text: Tensor, new: int, kwargs: dict[str, Any]) -> Any:
        """Call the model for the last `new` tokens of text (B, n); return its outputs."""
        inputs = self._model.prepare_inputs_for_generation(text, next_sequence_length=new, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = new
        return self._model(**inputs, return_dict=True)

    def scores(self, outputs: Any, text: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Return logits, raw and processed, of the tokens after the last `new`: (B, new, V)."""
        logits = outputs.logits[:, -new:].to(text.device, torch.float32, copy=True)
        ends = range(text.shape[1] - new + 1, text.shape[1] + 1)
        scores = [self._processor(text[:, :end], logits[:, i]) for i, end in enumerate(ends)]
        return logits, torch.stack(scores, 1)

    def draft(
        self, answer: "_Answer", m: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Return the text with m more tokens, their scores (B, m, V), and kwargs to read them."""
        text, kwargs, rows = answer.ids, dict(kwargs), []
        for _ in range(m):
            outputs = self.read(text, 1, kwargs)
            kwargs = self._model._update_model_kwargs_for_generation(outputs, kwargs)
            _, row = self.scores(outputs, text, 1)
            rows.append(row)
            token = _drawn(row[:, 0].softmax(-1)) if self._is_sampled else row.argmax(-1)
            text = torch.cat((text, answer.padded(token)), 1)
        return text, torch.cat(rows, 1) if rows else None, kwargs

    def judge(self, drafts: Tensor, scores: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
        """Judge drafts by the scores (B, m + 1, V) of dense attention, and those (B, m, V) of q."""
        if self._is_sampled:
            q = scores[:, :0] if q is None else q
            return judge_sampled(drafts, scores.softmax(-1), q.softmax(-1))
        return judge_best(drafts, scores)


def judge_best(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B, m + 1), and how many of each row's m drafts are accepted, (B,).

    The tokens are those of greatest score (B, m + 1, V): up to and with the first that is another
    than the draft, they are what follows.
    """
    tokens = scores.argmax(-1)
    return tokens, (tokens[:, :-1] == drafts).cumprod(1).sum(1)


def judge_sampled(drafts: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B, m + 1), and how many of each row's m drafts are accepted, (B,).

    p (B, m + 1, V) and q (B, m, V) are the chances of tokens by dense attention, and those that the
    drafts (B, m) were drawn with. The token after the accepted ones is drawn here.
    """
    chance, rest = speculative_rule(drafts, p, q)
    agreed = _accepted(chance).cumprod(1).sum(1)
    token = _drawn(rest[torch.arange(len(rest), device=rest.device), agreed])
    return torch.cat((drafts, token), 1).scatter(1, agreed[:, None], token), agreed


def speculative_rule(drafts: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chance to accept each draft, and weights (B, m + 1, V) of the token in its place.

    A chance may exceed 1. Accepted or replaced, a token has the chances p: Leviathan et al., 2022,
    appendix A.1; Chen et al., 2023, theorem 1. The token after all m is drawn from p itself.
    """
    at, m = drafts[..., None], drafts.shape[1]
    chance = (p[:, :m].gather(-1, at) / q.gather(-1, at))[..., 0]
    excess = (p[:, :m] - q).clamp(min=0)
    # No excess: p and q are the same, and only a rounding can reject.
    excess = excess.where(excess.sum(-1, keepdim=True) > 0, p[:, :m])
    return chance, torch.cat((excess, p[:, m:]), 1)


def _drawn(weights: Tensor) -> Tensor:
    """Draw a token of each row (B, V): (B, 1)."""
    return weights.multinomial(1)


def _accepted(chance: Tensor) -> Tensor:
    """Draw what happens with these chances: bool, of the same shape."""
    return torch.rand_like(chance) < chance


class _Depth:
    """How many tokens to draft, 1 to `most`: those that make the expected answer grow fastest.

    With the rate r at which drafts have been accepted so far, at first 9 of 10, a round of m drafts
    gives (1 - r ** (m + 1)) / (1 - r) tokens on average, in the time of 1 + m * cost dense calls.
    """

    def __init__(self, most: int, cost: float) -> None:
        self._most, self._cost, self._accepted, self._judged = most, cost, 9, 10

    def best(self) -> int:
        rate = self._accepted / self._judged

        def speed(m: int) -> float:
            return (1 - rate ** (m + 1)) / (1 + m * self._cost)

        return max(range(1, self._most + 1), key=speed)

    def saw(self, accepted: int, drafted: int) -> None:
        """Count a round; what was drafted after the first rejected token was never judged."""
        self._accepted += accepted
        self._judged += min(accepted + 1, drafted)


class _Answer:
    """The text so far, (B, n), and what is told of each token.

    goes_on  (B,) bool, which requests are not finished
    """

    def __init__(
        self, ids: Tensor, stopping_criteria: Any, generation_config: Any, streamer: Any
    ) -> None:
        self.ids = ids
        self.goes_on = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._stopping_criteria, self._streamer = stopping_criteria, streamer
        self._is_dict = is_dict = generation_config.return_dict_in_generate
        self._scores: Any = () if is_dict and generation_config.output_scores else None
        self._logits: Any = () if is_dict and generation_config.output_logits else None
        has_end = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        self._pad = generation_config._pad_token_tensor.to(ids.device) if has_end else None

    @property
    def writes(self) -> Tensor:
        """(B,) bool, of which requests tokens still count: finished ones write padding."""
        return self.goes_on if self._pad is not None else torch.ones_like(self.goes_on)

    def padded(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, 1), padding in place of those of finished requests."""
        return tokens if self._pad is None else tokens.where(self.goes_on[:, None], self._pad)

    def add(self, tokens: Tensor, scores: Tensor, logits: Tensor) -> None:
        """Append tokens (B, new), with scores and logits (B, new or more, V), one after another.

        No more once a request is finished: after its end padding is read, and no draft.
        """
        for i in range(tokens.shape[1]):
            token = self.padded(tokens[:, i : i + 1])
            self.ids = torch.cat((self.ids, token), 1)
            if self._scores is not None:
                self._scores += (scores[:, i],)
            if self._logits is not None:
                self._logits += (logits[:, i],)
            if self._streamer is not None:
                self._streamer.put(token[:, 0].cpu())
            ends = self.goes_on & self._stopping_criteria(self.ids, self._scores)
            self.goes_on = self.goes_on & ~ends
            if ends.any():
                break

    def end(self, cache: Any) -> Any:
        """Return what `generate` returns."""
        if self._streamer is not None:
            self._streamer.end()
        if not self._is_dict:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids, scores=self._scores, logits=self._logits, **{_CACHE: cache}
        )


def _selects_all(options: Options, n: int) -> bool:
    """Say whether a token attends to all n tokens of its request, itself included."""
    select = options.select
    return n < options.dense_below or n <= select.n_sink + select.budget(n) + select.n_local


@contextmanager
def _recording_past(cache: Any) -> Iterator[None]:
    """Let layers that drop old tokens keep them until the next crop."""
    layers = [layer for layer in cache.layers if hasattr(layer, "record_past")]
    before = [layer.record_past for layer in layers]
    for layer in layers:
        layer.record_past = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.record_past = was


def _crop(cache: Any, tokens: int) -> None:
    """Forget the newest tokens, and what layers that slide recorded."""
    # In transformers 5.4, where none can record, 0 would be the length to keep.
    if tokens > 0 or hasattr(cache, "activate_past_recording"):
        cache.crop(-tokens)


def _rewind(cache: Any, tokens: int) -> None:
    """Take the newest tokens out, to be read again: selections that saw them stay."""
    if tokens > 0:
        for layer in cache.layers:
            getattr(layer, "rewind", layer.crop)(-tokens)


def _arguments_of_generate() -> dict[str, Any]:
    """Return the arguments of the `generate` that calls: it hands a callable only some of them."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    return frame.f_locals if frame.f_code is _GENERATE else {}


def _refuse(
    model: Any,
    generation_config: Any,
    logits_processor: Any,
    model_kwargs: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Raise InvalidProblem for what is not done here."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        raise InvalidProblem(
            f"Lossless for a {type(model).__name__} that attends with "
            f"{config._attn_implementation!r}",
            "drafts are made with selection",
            "call generate() within `with enable(model, ...)`, or leave custom_generate out",
        )
    mode = generation_config.get_generation_mode(given.get("assistant_model"))
    asked = {
        f"the generation mode {mode.value!r}": mode not in _MODES,
        "use_cache=False": not model_kwargs.get("use_cache", True),
        "guidance_scale": generation_config.guidance_scale not in (None, 1),
        "output_attentions": generation_config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states,
        "synced_gpus": given.get("synced_gpus"),
    } | {type(one).__name__: isinstance(one, _COUNTING) for one in logits_processor}
    for name, is_asked in asked.items():
        if is_asked:
            raise InvalidProblem(
                f"Lossless with {name}",
                "it decodes greedily or samples, with a cache and with processors that depend on "
                "the text alone, and returns scores and logits only",
                "leave that out, or custom_generate",
            )


def _refuse_uncroppable(cache: Any) -> None:
    """Raise InvalidProblem for a cache that drafts cannot be taken out of, or for none."""
    if cache is None:
        raise InvalidProblem(
            "Lossless with a model that returns no cache",
            "drafts are taken out of the cache again",
            "leave custom_generate out",
        )
    if hasattr(cache, "is_croppable"):
        layers = [layer for layer in cache.layers if not layer.is_croppable]
    else:  # as in transformers 5.4
        layers = [
            layer for layer in cache.layers if type(layer) not in (DynamicLayer, GrowableLayer)
        ]
    if layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise InvalidProblem(
            f"Lossless with layers of a cache that cannot be cropped: {kinds}",
            "drafts are taken out of the cache again",
            "pass TokenSelectCache(model) in place of a StaticCache; else leave custom_generate "
            "out: recurrent states, and in transformers 5.4 layers that slide, cannot be put back",
        )
