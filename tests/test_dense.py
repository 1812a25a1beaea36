"""What attends densely in models of transformers: prompts, short requests, windows; and what not.

The tolerance of logits is that of tests/models.py.
"""

import copy
import itertools
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenselect
from tests.models import (
    CACHE,
    MOVING,
    SMALL,
    THE_OLD_NAME,
    L,
    Recorder,
    assert_close,
    caches,
    generated,
    lacking,
    mask_of,
    model_of,
    read,
    tokens,
)
from tokenselect.integrations.transformers import (
    TokenSelectCache,
    dense,
    enable,
    layers,
    masks,
    recorded,
)
from tokenselect.integrations.transformers.dense import attend_densely
from tokenselect.integrations.transformers.layers import all_dense

pytestmark = [pytest.mark.filterwarnings(THE_OLD_NAME), pytest.mark.usefixtures("no_grad")]


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return what `attend_densely` does, in float64."""
    (B, Hq, m, _), n = q.shape, k.shape[2]
    k, v = (x.double().repeat_interleave(Hq // k.shape[1], 1) for x in (k, v))
    logits = q.double() @ k.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(n - m, n)[:, None], torch.arange(n)
    sees = (j <= i) & (j > i - (window or n))
    if valid is not None:
        sees = sees & valid[:, None, None]
    logits = logits.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(-1, 1, 1).expand(B, -1, m, 1)], -1)
    out = logits.softmax(-1)[..., :n].nan_to_num(0.0) @ v
    if valid is not None:
        out = out * valid[:, None, n - m :, None]
    return out.transpose(1, 2)


PADDED = torch.arange(11) >= torch.tensor([[0], [4], [9]])
HOLES = ~torch.isin(torch.arange(11), torch.tensor([0, 5, 9])).expand(3, -1)
WAYS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padded": {"valid": PADDED},
    "holes": {"valid": HOLES},
    "window": {"window": 4},
    "wide": {"window": 20},
    "padded window": {"valid": PADDED, "window": 4},
}
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
}


class TestAttendDensely:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("more", MORE)
    @pytest.mark.parametrize("m", [1, 2, 7, 11])
    @pytest.mark.parametrize("other", [None, "device", "width"])
    def test_it_is_attention(
        self, way: str, more: str, m: int, other: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On another device with that device's kernels; blocks are of 3 queries or 1."""
        monkeypatch.setattr(dense, "_QUERIES", 3)
        if other == "device":
            with_sdpa = more == "plain"
            kernel = dense._sdpa if with_sdpa else dense._product
            monkeypatch.setattr(dense, "_kernel", lambda *_: kernel)
            monkeypatch.setattr(dense, "_has_flash", lambda *_: True)
        torch.manual_seed(0)
        q, room = torch.randn(3, m, 4, 8).transpose(1, 2), torch.randn(2, 3, 2, 15, 8)
        k, v = room[:, :, :, :11]
        v = v[..., :6] if other == "width" else v
        given = {"scale": 0.6, **WAYS[way], **MORE[more]}
        for numbers in (2**22, 1):
            monkeypatch.setattr(dense, "_NUMBERS", numbers)
            out = attend_densely(q, k, v, **given)
            expected = by_hand(q, k, v, **given)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
            assert out.is_contiguous()  # as some models need it

    @pytest.mark.parametrize("more", MORE)
    @pytest.mark.parametrize("window", [None, 4])
    @pytest.mark.parametrize("m", [1, 11])
    def test_padding_may_be_nan(self, more: str, window: int | None, m: int) -> None:
        torch.manual_seed(0)
        q, k, v = torch.randn(3, m, 4, 8).transpose(1, 2), *torch.randn(2, 3, 2, 11, 8)
        given = {"scale": 0.6, "valid": HOLES & PADDED, "window": window, **MORE[more]}
        expected = attend_densely(q, k, v, **given)
        padding = ~given["valid"]
        for x in (k, v):
            x.masked_fill_(padding[:, None, :, None], torch.nan)
        q.masked_fill_(padding[:, None, 11 - m :, None], torch.nan)
        assert attend_densely(q, k, v, **given).equal(expected)

    def test_vectors_that_are_not_in_one_piece(self) -> None:
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 8, 11).mT
        for given in ({}, {"window": 4}):
            expected = by_hand(q, k, v, scale=1.0, **given)
            out = attend_densely(q, k, v, scale=1.0, **given)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


class TestPrompts:
    """A prompt is read densely, whatever k is; then each token selects."""

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
    @pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_then_tokens_select(
        self, family: str, kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, ids = model_of(family), tokens(2)
        mask = mask_of("20#", "5. 15#") if padded else None
        stock = read(model, ids, DynamicCache(), 0, 9, 18, mask=mask)
        recorder, cache = Recorder(monkeypatch), caches(model)[kind]()
        with enable(model, **SMALL), recorded() as infos:
            prompt = read(model, ids, cache, 0, 9, 18, mask=mask)
            assert infos == []
            assert_close(prompt, stock, None if mask is None else mask[:, :18])
            recorder.calls.clear()
            read(model, ids, cache, 18, 19, mask=mask)
        full = [call for call in recorder.calls if call[4].window is None]
        assert len(infos) == len(full)
        for (_, q, k, v, _, more, out), info in zip(full, infos, strict=True):
            assert info.selection.count.tolist() == [[sum(SMALL.values())]] * 2
            for b, first in enumerate((0, 5 if padded else 0)):
                expected = tokenselect.attention(
                    q[b : b + 1],
                    k[b : b + 1, :, first:19],
                    v[b : b + 1, :, first:19],
                    **SMALL,
                    scale=more["scaling"],
                    softcap=more.get("softcap"),
                    sink_logits=more.get("s_aux"),
                )
                torch.testing.assert_close(out[b : b + 1], expected.transpose(1, 2))

    @pytest.mark.parametrize(
        "mode",
        [
            {},
            pytest.param(
                {"prefill_chunk_size": 6}, marks=lacking("chunks of a prompt over a filled cache")
            ),
        ],
    )
    def test_two_turns(self, llama: Any, mode: dict[str, Any]) -> None:
        """The first new token of each is that of stock attention over the same cache."""
        llama.set_attn_implementation("sdpa")
        cache, written = TokenSelectCache(llama), tokens(1, 40)
        for turn in range(2):
            written = torch.cat([written, tokens(1)[:, :5]], dim=1)
            stock = generated(llama, written, past_key_values=copy.deepcopy(cache), **mode)
            n = written.shape[1]
            with enable(llama, **SMALL), recorded() as infos:
                written = generated(llama, written, past_key_values=cache, **mode)
            assert len(infos) == 2 * 7, turn  # layers, tokens after the first
            assert written[0, n] == stock[0, n]

    @lacking("assisted decoding over sliding layers, and without an end of the text")
    def test_drafts_are_verified_densely(self, llama: Any) -> None:
        ids = tokens(1).repeat(1, 2)
        with warnings.catch_warnings(), enable(llama, **SMALL, chunk=8):
            warnings.simplefilter("error")
            generated(llama, ids, prompt_lookup_num_tokens=3)

    def test_without_a_cache_all_calls_are_prompts(self, llama: Any) -> None:
        expected = generated(llama, tokens(2))
        with enable(llama, **SMALL):
            assert generated(llama, tokens(2), use_cache=False).equal(expected)

    @pytest.mark.parametrize("preset", [None, "faithful", "paper", "extrapolate"])
    def test_presets(self, llama: Any, preset: str | None) -> None:
        with enable(llama, preset, **SMALL), recorded() as infos:
            llama(tokens(1))
        assert (len(infos) == 0) == (preset in (None, "faithful"))
        with enable(llama, preset, **SMALL, prefill="dense"), recorded() as infos:
            llama(tokens(1))
        assert infos == []

    def test_a_selection_is_made_anew_after_it(self, llama: Any) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        with enable(llama, **SMALL, theta=-1.0, dense_below=14):
            read(llama, ids, cache, 0, 11, 12, 13)
            assert (cache.hits, cache.misses) == (0, 0)
            read(llama, ids, cache, 13, 14, 15, 16)
            assert (cache.hits, cache.misses) == (2 * 2 * 2, 2 * 2)
            llama(ids[:, 16:18], past_key_values=cache)
            read(llama, ids, cache, 18, 19)  # what was appended densely is attended to
            assert (cache.hits, cache.misses) == (3 * 2 * 2, 2 * 2)


class TestShortRequests:
    @pytest.mark.parametrize("mask", [None, mask_of("20#", "9. 11#"), mask_of("9. 11#", "20#")])
    @pytest.mark.parametrize("prefill", ["dense", "selected"])
    def test_each_request_by_its_own_length(
        self, llama: Any, mask: Tensor | None, prefill: str
    ) -> None:
        """One of fewer than 16 tokens gets what it gets alone, and others select."""
        ids = tokens(2)
        stock = read(llama, ids, DynamicCache(), 0, *range(11, L + 1), mask=mask)
        with enable(llama, **SMALL, prefill=prefill, dense_below=16):
            actual = read(llama, ids, DynamicCache(), 0, *range(11, L + 1), mask=mask)
            for b in range(2):
                first = 0 if mask is None else int(L - mask[b].sum())
                ends = (0, *range(11 - first, L - first + 1))
                alone = read(llama, ids[b : b + 1, first:], DynamicCache(), *ends)
                torch.testing.assert_close(actual[b, first:], alone[0], atol=1e-4, rtol=1e-4)
                short = slice(first, first + 15)
                assert_close(actual[b : b + 1, short], stock[b : b + 1, short])
                assert L - first < 16 or (actual - stock)[b, first + 15 :].abs().max() > 1e-2


class TestRawKeys:
    """They are turned to where they stand, within the trained length; beyond it they select."""

    @pytest.mark.parametrize("padded", [False, True])
    def test_up_to_the_trained_length(self, padded: bool) -> None:
        mask = mask_of("20#", "5. 15#") if padded else None
        ids, model = tokens(2), model_of("llama", max_position_embeddings=16)
        how = {**SMALL, **MOVING["split"]}
        stock = read(model, ids, DynamicCache(), 0, 9, 16, L, mask=mask)
        with enable(model, **how), recorded() as infos:
            actual = read(model, ids, DynamicCache(), 0, 9, 16, mask=mask)
            assert infos == []
            read(model, ids, DynamicCache(), 0, 9, 16, L, mask=mask)
        assert_close(actual, stock[:, :16], None if mask is None else mask[:, :16])
        # Of two layers; the shorter request has 15 tokens.
        assert [len(info.selection.count) for info in infos] == [1 if padded else 2] * 2

    def test_a_length_that_is_not_known(self, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "trained_length", lambda config: None)
        with enable(llama, **SMALL, **MOVING["split"]), recorded() as infos:
            llama(tokens(1))
        assert infos == []


class TestAllDense:
    """What is to be verified reads a cache densely that selection goes on with."""

    def test_one_model_on_one_thread(self, llama: Any) -> None:
        other, ids = model_of("llama"), tokens(2)
        stock = read(llama, ids, DynamicCache(), 0, 12, 13)
        with enable(llama, **SMALL), enable(other, **SMALL):
            selected = read(llama, ids, DynamicCache(), 0, 12, 13)
            found: list[Tensor] = []

            def call() -> None:
                with torch.no_grad():
                    found.append(read(llama, ids, DynamicCache(), 0, 12, 13))

            with all_dense(llama.config):
                assert_close(read(llama, ids, DynamicCache(), 0, 12, 13), stock)
                assert torch.equal(read(other, ids, DynamicCache(), 0, 12, 13), selected)
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()
            assert torch.equal(found[0], selected)
            assert torch.equal(read(llama, ids, DynamicCache(), 0, 12, 13), selected)

    @pytest.mark.parametrize("how", [{}, MOVING["split"]])
    def test_over_the_same_cache(self, how: dict[str, Any]) -> None:
        model, ids = model_of("llama", max_position_embeddings=16), tokens(1)
        cache = TokenSelectCache(model)
        stock = read(model, ids, DynamicCache(), 0, L)
        with enable(model, **SMALL, **how), all_dense(model.config):
            read(model, ids, cache, 0, 14, 15)
            cache.crop(-3)
            assert_close(read(model, ids, cache, 12, 13, L), stock[:, 12:])


class TestOneCall:
    """Requests that are padded differently decode in one call a layer, without a copy."""

    MASK = mask_of("20#", "5. 15#", "13. 7#", "2. 5# 3. 10#")

    @pytest.mark.parametrize("theta", [None, -1.0])
    def test_of_a_step(
        self, llama: Any, theta: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids, attend, calls = tokens(4), tokenselect.attention, []

        def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, **more: Any) -> Any:
            calls.append((q, k_cache, v_cache))
            return attend(q, k_cache, v_cache, **more)

        monkeypatch.setattr(tokenselect, "attention", attention)
        cache = TokenSelectCache(llama, max_length=L)
        with enable(llama, **SMALL, theta=theta):
            read(llama, ids, cache, 0, 16, 17, 18, 19, mask=self.MASK)
        assert [len(q) for q, _, _ in calls] == [4] * 2 * 3
        for (_, *pages), layer in zip(calls, itertools.cycle(cache.layers)):
            for seen, kept in zip(pages, (layer.keys, layer.values), strict=True):
                assert seen.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
        assert (cache.hits, cache.misses) == ((16, 8) if theta else (0, 0))

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_of_a_chunk_after_them(self, llama: Any, chunk: int) -> None:
        """A second turn, selected: as each request alone."""
        ids, options = tokens(4), {**SMALL, "prefill": "selected", "chunk": chunk}
        with enable(llama, **options), recorded() as infos:
            both = read(llama, ids, DynamicCache(), 0, 15, L, mask=self.MASK)
            of_turn = infos[-2 * -(-5 // chunk) :]  # of two layers
            assert {len(info.selection.count) for info in of_turn} == {4}
            for b, real in enumerate(self.MASK.bool()):
                alone, at = ids[b : b + 1, real], torch.arange(L)[real][None]
                ends = (0, int(real[:15].sum()), alone.shape[1])
                one = read(llama, alone, DynamicCache(), *ends, position_ids=at)
                torch.testing.assert_close(both[b, real], one[0], atol=1e-4, rtol=1e-4)

    def test_keys_and_values_that_lie_differently(self) -> None:
        """One table serves both: they are copied."""
        (span,) = masks.token_mask(4, 1, L, L - 1, attention_mask=self.MASK).spans
        torch.manual_seed(0)
        q, k = torch.randn(4, 4, 1, 8), torch.randn(4, 2, L, 8)
        v = torch.randn(4, L, 2, 8).transpose(1, 2)
        alike, unlike = (layers._tokens(k, x, span, 0) for x in (v.contiguous(), v))
        assert alike["v_cache"].shape == unlike["v_cache"].shape
        expected = tokenselect.attention(q, **SMALL, **alike)
        assert torch.equal(tokenselect.attention(q, **SMALL, **unlike), expected)


def test_gradients_are_refused(llama: Any) -> None:
    with (
        torch.enable_grad(),
        enable(llama, **SMALL),
        pytest.raises(tokenselect.InvalidProblem, match="q requires grad"),
    ):
        llama(tokens(1), **{CACHE: None})
