"""Lossless decoding: dense attention's tokens, whatever selection drafts."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    StaticCache,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from tests.models import (
    CACHE,
    IS_RENAMED,
    MOVING,
    SMALL,
    VOCABULARY,
    L,
    assert_close,
    generated,
    lacking,
    mask_of,
    model_of,
    shared,
    tokens,
)
from tests.sweep import build
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import Lossless, TokenSelectCache, enable, lossless
from tokenselect.integrations.transformers.lossless import speculative_rule

pytestmark = [pytest.mark.slow("qwen3", "gemma2"), pytest.mark.usefixtures("no_grad")]

# Drafts of which some are accepted and some are not.
DRAFTING: dict[str, Any] = {"k": 12, "n_sink": 1, "n_local": 2}
NEW = 24
SLIDING = lacking("caches that slide and can be cropped")


@pytest.fixture
def llama() -> Any:
    return shared("llama")


def losslessly(
    model: Any, ids: Tensor, options: dict[str, Any] = DRAFTING, draft: int = 4, **how: Any
) -> tuple[Any, Any]:
    """What is generated, and the stats."""
    decode = Lossless(draft)
    how = {CACHE: TokenSelectCache(model), "max_new_tokens": NEW} | how
    with enable(model, **options):
        return generated(model, ids, custom_generate=decode, **how), decode.stats


def densely(model: Any, ids: Tensor, **how: Any) -> Any:
    return generated(model, ids, **({"max_new_tokens": NEW} | how))


def assert_same_text(model: Any, actual: Tensor, expected: Tensor) -> None:
    """The same tokens (n,), but from a near-tie of dense logits on."""
    if actual.tolist() == expected.tolist():
        return
    at = int((actual != expected).nonzero()[0])
    logits = model(expected[None, :at]).logits[0, -1]
    apart = logits[expected[at]] - logits[actual[at]]
    assert apart < 2e-5 * logits.abs().max()


class TestGreedy:
    @pytest.mark.parametrize("theta", [None, 0.5])
    @pytest.mark.parametrize(
        "family",
        ["llama", "qwen3", *(pytest.param(f, marks=SLIDING) for f in ("gemma2", "gemma3"))],
    )
    def test_it_is_dense_attention(self, family: str, theta: float | None) -> None:
        model, ids = shared(family), torch.randint(1, VOCABULARY, (25, L))
        found = [losslessly(model, one[None], DRAFTING | {"theta": theta}) for one in ids]
        for (actual, stats), expected in zip(found, densely(model, ids), strict=True):
            assert_same_text(model, actual[0], expected)
            assert stats.tokens == NEW == 1 + stats.rounds + stats.accepted
        drafted, accepted = (sum(s[i] for _, s in found) for i in (1, 2))
        assert 0.2 * drafted < accepted
        assert accepted < drafted or family.startswith("gemma")  # where half of the layers slide

    @pytest.mark.parametrize(
        "options",
        [
            *MOVING.values(),
            {"positions": "contiguous", "score_at": "fixed", "theta": 0.5},
            {"prefill": "selected", "chunk": 4},
            {"theta": -1.0, "max_reuse": 3},
        ],
    )
    @pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=SLIDING)])
    def test_with_any_options(self, family: str, options: dict[str, Any]) -> None:
        model, ids = model_of(family), tokens(1)
        actual, stats = losslessly(model, ids, DRAFTING | options)
        assert_same_text(model, actual[0], densely(model, ids)[0])
        assert stats.drafted > 0

    @pytest.mark.parametrize(
        "how",
        [
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
            {"suppress_tokens": list(range(0, VOCABULARY, 2))},
            {"prefill_chunk_size": 6},
        ],
    )
    def test_with_what_generate_offers(self, llama: Any, how: dict[str, Any]) -> None:
        ids = tokens(1)
        expected = densely(llama, ids, **how)
        assert losslessly(llama, ids, **how)[0].equal(expected)
        if "prefill_chunk_size" not in how:
            assert not expected.equal(densely(llama, ids))

    @pytest.mark.parametrize("new", [1, 2, 3, 7])
    def test_so_many_tokens(self, llama: Any, new: int) -> None:
        cache = TokenSelectCache(llama, max_length=L + new)
        how = {"max_new_tokens": new, CACHE: cache}
        actual, stats = losslessly(llama, tokens(1), draft=16, **how)
        assert actual.equal(densely(llama, tokens(1), max_new_tokens=new))
        assert stats.tokens == new

    @pytest.mark.parametrize("padding", ["20#", "5. 15#"])
    def test_padding(self, llama: Any, padding: str) -> None:
        mask = mask_of(padding)
        ids = tokens(1).where(mask.bool(), 0)
        expected = densely(llama, ids, attention_mask=mask)
        options = {"k": 6, "n_sink": 1, "n_local": 2, "theta": 0.5}
        assert losslessly(llama, ids, options, attention_mask=mask)[0].equal(expected)

    @pytest.mark.parametrize("end", [None, 9, 17])
    def test_a_batch(self, llama: Any, end: int | None) -> None:
        """Rows go on together, and end where each does by itself."""
        mask = mask_of("20#", "5. 15#", "5. 15#", "13. 7#")
        ids = tokens(4).where(mask.bool(), 0)
        how: dict[str, Any] = {"attention_mask": mask}
        if end is not None:
            how["eos_token_id"] = densely(llama, ids, **how)[:2, L + end].tolist()
        expected = densely(llama, ids, **how)
        actual, stats = losslessly(llama, ids, **how)
        assert actual.equal(expected)
        assert 0 < stats.accepted < stats.drafted

    def test_a_batch_whose_requests_stop_without_an_end(self, llama: Any) -> None:
        """Those that a criterion finishes write on, until the last one does."""

        def stops(text: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([True, text.shape[1] > L + 9]) & (text.shape[1] > L + 2)

        ids, how = tokens(2), {"stopping_criteria": [stops]}
        expected = densely(llama, ids, **how)
        assert expected.shape[1] == L + 10
        assert losslessly(llama, ids, **how)[0].equal(expected)

    @pytest.mark.parametrize(
        "cache", [None, pytest.param("static", marks=lacking("static caches that can be cropped"))]
    )
    def test_caches_of_transformers(self, llama: Any, cache: str | None) -> None:
        ids = tokens(1)
        how = {CACHE: None} if cache is None else {CACHE: None, "cache_implementation": cache}
        assert losslessly(llama, ids, **how)[0].equal(densely(llama, ids))


class TestEnds:
    @pytest.fixture
    def answer(self, llama: Any) -> list[int]:
        return densely(llama, tokens(1))[0, L:].tolist()

    @pytest.mark.parametrize("at", range(3, 12))
    @pytest.mark.parametrize("how", ["eos", "criterion"])
    def test_within_a_draft(self, llama: Any, answer: list[int], at: int, how: str) -> None:
        """Tokens that were accepted after it are forgotten, in the cache too."""
        ids, pair = tokens(1), answer[at - 1 : at + 1]

        def stops(text: Tensor, scores: Any, **_: Any) -> Tensor:
            return (text[:, -2:] == torch.tensor(pair)).all(-1)

        given: dict[str, Any] = (
            {"eos_token_id": answer[at]} if how == "eos" else {"stopping_criteria": [stops]}
        )
        expected = densely(llama, ids, **given)
        cache = TokenSelectCache(llama)
        actual, stats = losslessly(llama, ids, **given, **{CACHE: cache})
        assert actual.equal(expected)
        assert stats.tokens == expected.shape[1] - L < NEW
        assert cache.get_seq_length() == expected.shape[1] - 1

    def test_the_streamer_gets_each_token(self, llama: Any) -> None:
        class Streamer:
            def __init__(self) -> None:
                self.told: list[Any] = []

            def put(self, value: Tensor) -> None:
                self.told.append(value.tolist())

            def end(self) -> None:
                self.told.append("end")

        stock, ours, wrapped = Streamer(), Streamer(), Streamer()
        densely(llama, tokens(1), streamer=stock)
        losslessly(llama, tokens(1), streamer=ours)
        assert ours.told == stock.told

        def decode(*given: Any, **more: Any) -> Any:
            return Lossless()(*given, **more)

        with enable(llama, **DRAFTING):
            densely(llama, tokens(1), streamer=wrapped, custom_generate=decode)
        assert wrapped.told == stock.told

    def test_what_is_returned(self, llama: Any) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        how["repetition_penalty"] = 1.5
        expected = densely(llama, ids, **how)
        actual, _ = losslessly(llama, ids, **how, **{CACHE: cache})
        assert type(actual) is type(expected)
        assert actual.sequences.equal(expected.sequences)
        assert actual[CACHE] is cache
        for name in ("scores", "logits"):
            assert len(actual[name]) == NEW
            assert_close(torch.stack(actual[name]), torch.stack(expected[name]))

    @pytest.mark.parametrize("at", range(2, 6))
    def test_a_streamer_that_raises(self, llama: Any, at: int) -> None:
        """What it was told is in the cache, but for the newest, and no draft is."""

        class Streamer:
            def __init__(self) -> None:
                self.told = 0

            def put(self, value: Tensor) -> None:
                self.told += 1
                if self.told > at:  # the prompt is told first
                    raise RuntimeError("enough")

        cache = TokenSelectCache(llama)
        with pytest.raises(RuntimeError, match="enough"):
            losslessly(llama, tokens(1), streamer=Streamer(), **{CACHE: cache})
        assert cache.get_seq_length() == L + at - 1


class TestCache:
    def test_it_holds_the_padding_of_finished_requests(self, llama: Any) -> None:
        ids, stock, ours = tokens(3), TokenSelectCache(llama), TokenSelectCache(llama)
        end = densely(llama, ids)[0, L + 9].item()  # within a draft
        answer = densely(llama, ids, eos_token_id=end, **{CACHE: stock})
        assert answer[0, -3:].tolist() == [0, 0, 0]
        actual, stats = losslessly(llama, ids, eos_token_id=end, **{CACHE: ours})
        assert actual.equal(answer)
        assert stats.accepted > 0
        for a, b in zip(ours.layers, stock.layers, strict=True):
            assert_close(a.keys, b.keys)

    @pytest.mark.parametrize("theta", [None, 0.5])
    @pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=SLIDING)])
    def test_it_holds_what_dense_attention_made(self, family: str, theta: float | None) -> None:
        model, ids = shared(family), tokens(1)
        stock, ours = TokenSelectCache(model), TokenSelectCache(model)
        answer = densely(model, ids, **{CACHE: stock})
        options = DRAFTING | {"theta": theta}
        assert losslessly(model, ids, options, **{CACHE: ours})[0].equal(answer)
        for a, b in zip(ours.layers, stock.layers, strict=True):
            assert a.get_seq_length() == L + NEW - 1
            assert_close(a.keys, b.keys)
            assert_close(a.values, b.values)
            assert not getattr(a, "record_past", False)
        # And can be gone on with, either way.
        more = densely(model, answer, **{CACHE: stock})
        assert losslessly(model, answer, options, **{CACHE: ours})[0].equal(more)

    @SLIDING
    def test_a_selection_is_reused_in_later_rounds(self) -> None:
        """It saw tokens that were drafted, and are the same after dense attention read them."""
        model = shared("gemma3")
        cache = TokenSelectCache(model)
        options = DRAFTING | {"theta": -1.0}
        _, stats = losslessly(model, tokens(1), options, **{CACHE: cache})
        assert stats.rounds > 3
        assert stats.accepted == stats.drafted == cache.hits + cache.misses
        assert cache.misses == 1  # one layer is full

    def test_no_selection_that_saw_a_forgotten_token_stays(self, llama: Any) -> None:
        """The first draft is in the answer, and those after it are not."""
        cache = TokenSelectCache(llama)

        def stops(text: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([text.shape[1] == L + 2])

        how = {"stopping_criteria": [stops], CACHE: cache}
        _, stats = losslessly(llama, tokens(1), DRAFTING | {"theta": 1.0}, **how)
        assert (stats.tokens, stats.drafted) == (2, 3)
        for layer in cache.layers:
            (selections,) = layer.selections._caches.values()
            assert selections._used().seqlen_at_selection.tolist() == [0]

    def test_nothing_is_drafted_where_everything_is_selected(self, llama: Any) -> None:
        options = {"k": 24, "n_sink": 1, "n_local": 2}
        _, stats = losslessly(llama, tokens(1), options, max_new_tokens=8)
        assert (stats.drafted, stats.rounds) == (0, 7)
        _, stats = losslessly(llama, tokens(1), options, max_new_tokens=12)
        assert stats.drafted > 0
        _, stats = losslessly(llama, tokens(1), DRAFTING | {"dense_below": 64})
        assert stats.drafted == 0


class Way:
    """One way that the draws of a run can go: the choices in `taken`, and then the first ones.

    chance  of this way
    others  what else could have been chosen
    """

    def __init__(self, taken: list[int]) -> None:
        self.taken, self.chance, self.others, self._at = taken, 1.0, list[list[int]](), 0

    def choose(self, weights: list[float]) -> int:
        if self._at == len(self.taken):
            first, *others = [i for i, weight in enumerate(weights) if weight > 0]
            self.others += [[*self.taken, other] for other in others]
            self.taken = [*self.taken, first]
        choice = self.taken[self._at]
        self._at += 1
        self.chance *= weights[choice] / sum(weights)
        return choice


def every_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Let the draws of a run go in every way that they can, one after another."""
    ways = [Way([])]
    while ways:
        way = ways.pop()

        def drawn(weights: Tensor, way: Way = way) -> Tensor:
            return torch.tensor([[way.choose(weights[0].tolist())]])

        def accepted(chances: Tensor, way: Way = way) -> Tensor:
            each = chances[0].clamp(max=1).tolist()
            return torch.tensor([[way.choose([1 - x, x]) for x in each]], dtype=torch.bool)

        monkeypatch.setattr(lossless, "_drawn", drawn)
        monkeypatch.setattr(lossless, "_accepted", accepted)
        yield way
        ways += map(Way, way.others)


class TestSampling:
    @pytest.mark.parametrize(
        ("p", "q"),
        [
            ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)),
            ((0.5, 0.5, 0.0), (0.0, 0.5, 0.5)),
            ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
            ((0.1, 0.2, 0.7), (0.1, 0.2, 0.7)),
        ],
    )
    def test_a_token_has_the_chances_of_dense_attention(
        self, p: tuple[float, ...], q: tuple[float, ...]
    ) -> None:
        P, Q = torch.tensor([p, p]).double(), torch.tensor([q]).double()
        total = torch.zeros(3).double()
        for draft in Q[0].nonzero()[:, 0]:
            chance, rest = speculative_rule(draft[None, None], P[None], Q[None])
            accepted = chance[0, 0].clamp(max=1)
            total += Q[0, draft] * (1 - accepted) * rest[0, 0] / rest[0, 0].sum()
            total[draft] += Q[0, draft] * accepted
            assert rest[0, 1].equal(P[1])
        torch.testing.assert_close(total, P[0])

    @pytest.mark.parametrize(
        ("vocabulary", "new", "how", "warpers"),
        [
            (3, 3, {}, []),
            (2, 4, {"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
            (3, 3, {"top_k": 2}, [TopKLogitsWarper(2)]),
        ],
    )
    def test_texts_have_the_chances_of_dense_attention(
        self,
        vocabulary: int,
        new: int,
        how: dict[str, Any],
        warpers: list[Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """By all ways that the draws can go, each with its chance."""
        model, ids = model_of("llama", vocab_size=vocabulary), tokens(1) % vocabulary
        how |= {"do_sample": True, "max_new_tokens": new, "attention_mask": torch.ones_like(ids)}
        chances: dict[tuple[int, ...], float] = {}
        n_accepted = set()
        for way in every_way(monkeypatch):
            answer, stats = losslessly(model, ids, SMALL, **({"top_k": 0} | how))
            text = tuple(answer[0, L:].tolist())
            chances[text] = chances.get(text, 0.0) + way.chance
            n_accepted.add(stats.accepted)
        assert n_accepted == set(range(new - 1))
        for text in itertools.product(range(vocabulary), repeat=new):
            whole = torch.cat((ids, torch.tensor([text])), 1)
            scores = model(whole).logits[0, L - 1 : -1]
            for warper in warpers:
                scores = warper(whole, scores)
            p = scores.softmax(-1).gather(-1, torch.tensor(text)[:, None]).prod()
            assert chances.get(text, 0.0) == pytest.approx(float(p), abs=1e-5)

    def test_draws(self) -> None:
        torch.manual_seed(0)
        chance = torch.tensor([0.0, 0.3, 1.0, 7.0]).repeat(20000, 1)
        found = lossless._accepted(chance).double().mean(0)
        torch.testing.assert_close(found, chance[0].clamp(max=1).double(), atol=0.02, rtol=0)
        drawn = lossless._drawn(torch.tensor([0.0, 1.0, 3.0]).repeat(20000, 1))
        counts = drawn[:, 0].bincount(minlength=3) / 20000
        torch.testing.assert_close(counts, torch.tensor([0.0, 0.25, 0.75]), atol=0.02, rtol=0)

    def test_a_seed_decides(self, llama: Any) -> None:
        how = {"do_sample": True, "num_return_sequences": 3}
        first, stats = losslessly(llama, tokens(1), **how)
        again, _ = losslessly(llama, tokens(1), **how)
        assert first.equal(again)
        assert len(first.unique(dim=0)) == 3
        assert stats.accepted > 0


class TestDepth:
    def test_it_follows_what_is_accepted(self) -> None:
        depth = lossless._Depth(16, 0.5)
        first = depth.best()
        for _ in range(20):
            depth.saw(first, first)
        assert first < depth.best() <= 16
        for _ in range(20):
            depth.saw(0, 4)
        assert depth.best() < first

    def test_what_comes_after_a_rejected_draft_is_not_judged(self) -> None:
        depth = lossless._Depth(16, 0.5)
        for _ in range(1000):
            depth.saw(3, 16)
        assert depth._accepted / depth._judged == pytest.approx(3 / 4, abs=1e-3)

    @pytest.mark.parametrize("rate", [0.3, 0.9, 0.97])
    @pytest.mark.parametrize("cost", [0.05, 0.5, 2.0])
    def test_it_is_the_fastest(self, rate: float, cost: float) -> None:
        """By what a round of each depth gives on average."""
        depth = lossless._Depth(40, cost)
        depth._accepted, depth._judged = rate * 1e6, 1e6

        def speed(m: int) -> float:
            tokens = sum(rate**i * (1 - rate) * (i + 1) for i in range(m)) + rate**m * (m + 1)
            return tokens / (1 + m * cost)

        assert speed(depth.best()) == pytest.approx(max(map(speed, range(1, 41))))


class TestRefused:
    @pytest.mark.parametrize("draft", [0, -1, 1.5, True, None])
    def test_draft(self, draft: Any) -> None:
        with pytest.raises(InvalidProblem, match=r"draft="):
            Lossless(draft)

    @pytest.mark.parametrize("cost", [0, -1.0, math.nan, math.inf, "1"])
    def test_cost(self, cost: Any) -> None:
        with pytest.raises(InvalidProblem, match=r"cost="):
            Lossless(cost=cost)

    def test_a_model_that_does_not_select(self, llama: Any) -> None:
        with pytest.raises(InvalidProblem, match="that attends with 'eager'"):
            densely(llama, tokens(1), custom_generate=Lossless())

    @pytest.mark.parametrize(
        ("how", "named"),
        [
            ({"num_beams": 2}, "beam_search"),
            ({"use_cache": False, CACHE: None}, "use_cache=False"),
            ({"guidance_scale": 1.5}, "guidance_scale"),
            ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
            ({"synced_gpus": True}, "synced_gpus"),
            ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ],
    )
    def test_what_generate_may_ask(self, llama: Any, how: dict[str, Any], named: str) -> None:
        with pytest.raises(InvalidProblem, match=named):
            losslessly(llama, tokens(1), **how)

    def test_a_processor_that_counts(self, llama: Any) -> None:
        how = {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])}
        with pytest.raises(InvalidProblem, match="SynthIDTextWatermarkLogitsProcessor"):
            losslessly(llama, tokens(1), do_sample=True, **how)

    @lacking("a RecurrentGemma that attends through the interface")
    def test_a_model_without_a_cache(self) -> None:
        model = build("recurrent_gemma")
        decode = Lossless()
        decode.stats = lossless.LosslessStats(1, 1, 1, 1)
        with (
            enable(model, **DRAFTING),
            pytest.raises(InvalidProblem, match="returns no cache"),
        ):
            generated(model, tokens(1), custom_generate=decode)
        assert decode.stats is None  # not that of another answer

    def test_a_draft_model(self, llama: Any) -> None:
        with pytest.raises(InvalidProblem, match="assisted_generation"):
            losslessly(llama, tokens(1), assistant_model=llama)

    def test_a_cache_that_cannot_be_cropped(self) -> None:
        model = shared("gemma3")
        cache: Any = TokenSelectCache(model)
        if IS_RENAMED:
            cache = StaticCache(config=model.config, max_cache_len=L + NEW)
        with pytest.raises(InvalidProblem, match=r"cannot be cropped: .*SlidingWindowLayer"):
            losslessly(model, tokens(1), **{CACHE: cache})
