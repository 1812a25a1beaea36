"""The integration for transformers, held to stock eager attention on small random models."""

import copy
import io
import threading
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenselect
from tests import fresh
from tests.models import (
    CACHE,
    EVERYTHING,
    FAMILIES,
    MODES,
    MOVING,
    NO_HEAD_DIM,
    OTHERWISE,
    PADDINGS,
    SIZES,
    SMALL,
    SPARSE,
    THE_OLD_NAME,
    VOCABULARY,
    WINDOW,
    Alone,
    Around,
    L,
    Recorder,
    assert_close,
    caches,
    counted,
    generated,
    has_full_attention,
    lacking,
    made,
    mask_of,
    model_of,
    read,
    shared,
    state,
    tokens,
)
from tokenselect.errors import InvalidProblem, UnknownBackend, UnsupportedProblem
from tokenselect.integrations import options
from tokenselect.integrations.transformers import TokenSelectCache, enable, layers, recorded
from tokenselect.integrations.transformers.cache import RawKeys
from tokenselect.integrations.transformers.masks import TokenMask, token_mask

pytestmark = [
    pytest.mark.filterwarnings(THE_OLD_NAME),
    pytest.mark.usefixtures("no_grad"),
    # What others of the families show too.
    pytest.mark.slow("llama_yarn", "llama_llama3", "qwen2", "qwen3", "mistral"),
]

ASSISTED = lacking("assisted decoding over sliding layers, and without an end of the text")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A model of each family; tests leave it as it was."""
    return shared(request.param)


# All is selected, or all attends densely, whatever is to be selected.
DENSE: dict[str, Any] = {**SMALL, "prefill": "dense", "dense_below": 99}
HOWS: dict[str, dict[str, Any]] = {
    "still": EVERYTHING,
    **{name: EVERYTHING | how for name, how in MOVING.items()},
    "dense": DENSE,
    "dense_raw": DENSE | MOVING["split"],
}
RAW = {*MOVING, "dense_raw"}


class TestEverything:
    """Stock eager attention's logits and tokens again, whether keys move or not.

    Where they do, nothing moves in effect, but every rotation is tokenselect's own.
    """

    @pytest.mark.parametrize(("how", "chunk"), [("still", 512), *((how, 7) for how in HOWS)])
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_prompt(self, model: Any, padding: str, how: str, chunk: int) -> None:
        mask = PADDINGS[padding]
        ids = tokens(2 if mask is None else len(mask))
        at = {} if mask is None or padding != "holes" else {"position_ids": counted(mask)}
        expected = model(ids, attention_mask=mask, **at).logits
        with enable(model, **HOWS[how], chunk=chunk):
            actual = model(ids, attention_mask=mask, **at).logits
        assert actual.isfinite().all()
        assert_close(actual, expected, mask)
        assert torch.equal(model(ids, attention_mask=mask, **at).logits, expected)

    def test_prompt_without_a_cache(self, model: Any) -> None:
        mask = PADDINGS["mixed"]
        assert mask is not None
        given = {"input_ids": tokens(len(mask)), "attention_mask": mask, "use_cache": False}
        expected = model(**given).logits
        for how in ("still", "dense"):
            with enable(model, **HOWS[how]):
                assert_close(model(**given).logits, expected, mask)

    @pytest.mark.parametrize(
        ("dtype", "family", "padding", "bound", "how"),
        [
            # A few roundings to dtype a layer; eager rounds logits and weights too.
            (torch.bfloat16, "gpt_oss", "left", 0.1, "still"),
            (torch.bfloat16, "gpt_oss", "left", 0.1, "split"),
            (torch.bfloat16, "gpt_oss", "left", 0.1, "dense"),
            (torch.float16, "gemma2", "left", 0.02, "still"),
            (torch.float16, "gemma3", "left", 0.02, "split"),
            (torch.float16, "gemma3", "left", 0.02, "dense_raw"),
            # Eager's own left padding gives NaN in float64; its softmax is float32 throughout.
            (torch.float64, "gemma2", "right", 1e-6, "still"),
            (torch.float64, "qwen2_sliding", "right", 1e-6, "dense"),
        ],
    )
    def test_other_dtypes(
        self, dtype: torch.dtype, family: str, padding: str, bound: float, how: str
    ) -> None:
        model, mask = model_of(family).to(dtype), PADDINGS[padding]
        assert mask is not None
        ids = tokens(len(mask))
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        with enable(model, **HOWS[how]):
            actual = model(ids, attention_mask=mask).logits[mask.bool()]
        assert actual.dtype == dtype
        assert (actual - expected).abs().max() / expected.abs().max() < bound

    @pytest.mark.parametrize(
        ("how", "kind"),
        [
            *(("still", kind) for kind in caches(None)),
            *((how, kind) for how in MOVING for kind in ("dynamic", "static", "ours")),
            *(("dense", kind) for kind in caches(None)),
            *(("dense_raw", kind) for kind in ("static", "ours")),
        ],
    )
    @pytest.mark.parametrize("padding", ["none", "left", "holes"])
    def test_steps(self, model: Any, how: str, kind: str, padding: str) -> None:
        """Reading on, in steps of 1 and of more, is the same as reading all at once."""
        mask = PADDINGS[padding]
        ids = tokens(2 if mask is None else len(mask))
        at = {} if mask is None or how not in RAW else {"position_ids": counted(mask)}
        expected = model(ids, attention_mask=mask, use_cache=False, **at).logits
        cache = caches(model)[kind]()
        with enable(model, **HOWS[how], chunk=4):
            actual = read(model, ids, cache, 0, 9, 10, 11, 15, 16, 17, 20, mask=mask, **at)
        assert_close(actual, expected, mask)
        assert isinstance(cache, RawKeys) == (how in RAW and has_full_attention(model))

    @pytest.mark.parametrize("how", ["still", "dense"])
    def test_a_request_that_is_absent_at_first(self, llama: Any, how: str) -> None:
        """Its row is all padding; then it begins."""
        ids, mask = tokens(2), mask_of("20#", "14. 6#")
        expected = llama(ids, attention_mask=mask).logits
        with enable(llama, **HOWS[how]):
            actual = read(llama, ids, TokenSelectCache(llama), 0, 10, 20, mask=mask)
        assert_close(actual, expected, mask)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("how", ["still", "split", "dense", "dense_raw"])
    def test_generate(self, model: Any, mode: str, how: str) -> None:
        mask = mask_of("20#", "5. 15#", "5. 15#", "13. 7#")
        ids = tokens(4).where(mask.bool(), 0)
        expected = generated(model, ids, attention_mask=mask, **MODES[mode])
        with enable(model, **HOWS[how]):
            actual = generated(model, ids, attention_mask=mask, **MODES[mode])
        assert expected.shape[1] == L + 8
        assert actual.tolist() == expected.tolist()

    @pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
    @pytest.mark.parametrize("how", ["still", "split"])
    def test_generate_with_reuse(self, model: Any, mode: str, how: str) -> None:
        """What is reused is everything, and everything appended since: eager's tokens again."""
        mask = mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        given = {"attention_mask": mask, **MODES[mode]}
        expected = generated(model, ids, **given)
        cache = TokenSelectCache(model)
        with enable(model, **HOWS[how], theta=-1.0):
            assert generated(model, ids, past_key_values=cache, **given).equal(expected)
        assert (cache.hits > 0) == has_full_attention(model)

    @pytest.mark.parametrize("assistant", ["prompt_lookup", "draft", "other_draft"])
    @pytest.mark.parametrize("how", ["still", "split", "dense"])
    @ASSISTED
    def test_assisted(self, model: Any, assistant: str, how: str) -> None:
        """The draft is the model itself, or another one, which goes on rotating."""
        ids = tokens(1).repeat(1, 2)
        # A draft takes the padding token for padding also where it was generated: a hole.
        more: dict[str, Any] = {"suppress_tokens": [0]} if how in RAW else {}
        expected = generated(model, ids, **more)
        more |= {
            "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
            "draft": lambda: {"assistant_model": model},
            "other_draft": lambda: {"assistant_model": model_of("llama")},
        }[assistant]()
        theta = -1.0 if (assistant, how) == ("prompt_lookup", "still") else None
        with enable(model, **HOWS[how], theta=theta):
            cache = TokenSelectCache(model)
            assert generated(model, ids, past_key_values=cache, **more).equal(expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["still", "split"])
    def test_compiled_over_a_static_cache(self, how: str) -> None:
        """As generate does on a GPU by itself: selection stays outside of what is compiled."""
        from transformers import CompileConfig

        compiled = CompileConfig(backend="eager", mode=None)
        compiled._compile_all_devices = True
        model, mask = model_of("gemma2"), mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        static = {"cache_implementation": "static", "compile_config": compiled}
        torch._dynamo.reset()
        expected = generated(model, ids, attention_mask=mask)
        torch._dynamo.utils.counters.clear()
        with enable(model, **HOWS[how]):
            assert generated(model, ids, attention_mask=mask, **static).equal(expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert generated(model, ids, attention_mask=mask, **static).equal(expected)

    @pytest.mark.slow
    def test_compiled(self) -> None:
        """Attention and masks stay outside, so that one graph of it all is refused by torch."""
        model, ids = model_of("gemma2"), tokens(2)
        torch._dynamo.reset()
        with enable(model, **SMALL):
            expected = read(model, ids, TokenSelectCache(model), 0, 12, *range(13, L))
            model.compile(backend="eager")
            actual = read(model, ids, TokenSelectCache(model), 0, 12, *range(13, L))
            assert_close(actual, expected)
            model.compile(backend="eager", fullgraph=True)
            with pytest.raises(Exception, match="tokenselect reads masks and lengths on the host"):
                model(ids)
        torch._dynamo.reset()

    def test_going_on_with_a_cache(self, llama: Any) -> None:
        """A chat: a second turn on the cache of the first."""
        ids = tokens(1)
        first = generated(llama, ids)
        longer = torch.cat([first, tokens(1)[:, :5]], dim=1)
        expected = generated(llama, longer)
        cache = TokenSelectCache(llama)
        with enable(llama, **EVERYTHING, theta=0.5):
            generated(llama, ids, past_key_values=cache)
            assert generated(llama, longer, past_key_values=cache).equal(expected)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


class TestSelection:
    """With a small k each layer gives what tokenselect.attention gives for its q, k, v."""

    def test_a_small_budget_is_another_result(self, llama: Any) -> None:
        ids = tokens(2)
        dense = llama(ids).logits
        with enable(llama, **SPARSE, chunk=1):
            selected = llama(ids).logits
        assert (selected - dense).abs().max() > 0.01 * dense.abs().max()

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
    def test_prompt_and_decode(self, family: str, recorder: Recorder) -> None:
        model, ids, cache = model_of(family), tokens(2), DynamicCache()
        with enable(model, **OTHERWISE, chunk=6, prefill="selected"):
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        full = [call for call in recorder.calls if call[4].window is None]
        assert len(full) == (4 if family == "llama" else 2)
        for _, q, k, v, _, more, out in full:
            Lq, length = q.shape[2], k.shape[2]
            for start in range(0, Lq, 6):
                stop = min(start + 6, Lq)
                n = length - Lq + stop
                expected, info = tokenselect.attention(
                    q[:, :, start:stop],
                    k[:, :, :n],
                    v[:, :, :n],
                    **OTHERWISE,
                    n_query_means=6,
                    scale=more["scaling"],
                    softcap=more.get("softcap"),
                    sink_logits=more.get("s_aux"),
                    backend="reference",
                    return_info=True,
                )
                torch.testing.assert_close(out[:, start:stop], expected.transpose(1, 2))
                assert int(info.selection.count.max()) < n or n < 12

    @pytest.mark.parametrize(
        "mask", [mask_of("20#", "5. 15#", "3. 11# 6."), mask_of("2. 5# 3. 6# 4.")]
    )
    def test_a_padded_request_attends_as_it_does_alone(
        self, mask: Tensor, recorder: Recorder
    ) -> None:
        """Padding, holes too, is never selected and moves nothing."""
        model = model_of("llama")
        with enable(model, **SPARSE, chunk=4):
            model(tokens(len(mask)), attention_mask=mask)
        _, q, k, v, _, more, out = recorder.calls[0]
        for b, real in enumerate(mask.bool()):
            alone = [x[b : b + 1, :, real] for x in (q, k, v)]
            for start in range(0, int(real.sum()), 4):
                stop = min(start + 4, int(real.sum()))
                expected = tokenselect.attention(
                    alone[0][:, :, start:stop],
                    *(x[:, :, :stop] for x in alone[1:]),
                    **SMALL,
                    n_query_means=4,
                    scale=more["scaling"],
                )
                actual = out[b : b + 1, real][:, start:stop]
                torch.testing.assert_close(actual, expected.transpose(1, 2))
            assert (out[b, ~real] == 0).all()

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    @pytest.mark.parametrize("kind", ["static", "ours", "ours_with_room"])
    def test_the_cache_changes_nothing(self, family: str, kind: str) -> None:
        model = model_of(family)
        mask = mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        with enable(model, **SPARSE):
            both = [caches(model)[name]() for name in ("dynamic", kind)]
            stock, ours = (read(model, ids, each, 0, 14, 17, 18, 19, mask=mask) for each in both)
        torch.testing.assert_close(ours, stock)

    def test_what_was_selected_is_recorded(self, recorder: Recorder) -> None:
        """One info per call of `attention`, with everything that it tells; dense layers none."""
        model, ids, mask = model_of("gemma2"), tokens(2), mask_of("20#", "5. 15#")
        with enable(model, **SPARSE, chunk=8), recorded() as infos:
            with recorded() as inner:
                model(ids, attention_mask=mask)
            thread = threading.Thread(target=torch.no_grad()(model), args=[ids])
            thread.start()
            thread.join()
            assert infos == []
            model(ids[:, :9])
        model(ids)
        _, q, k, v, _, more, _ = next(call for call in recorder.calls if call[4].window is None)
        alike = {"scale": more["scaling"], "softcap": more["softcap"], "return_info": True}
        calls = [(0, 0, 0, 8), (0, 0, 8, 16), (0, 0, 16, 20), (1, 5, 5, 13), (1, 5, 13, 20)]
        for info, (b, first, start, stop) in zip(inner, calls, strict=True):
            row = (slice(b, b + 1), slice(None))
            tokens_of = (*row, slice(first, stop))
            _, expected = tokenselect.attention(
                q[*row, start:stop], k[tokens_of], v[tokens_of], **SMALL, n_query_means=8, **alike
            )
            assert torch.equal(info.selection.positions, expected.selection.positions)
            assert torch.equal(info.lse, expected.lse)
        assert [info.selection.positions.shape[0] for info in infos] == [2, 2]


# Selections of few tokens, made every few tokens and reused between.
REUSED: dict[str, Any] = {"theta": -1.0, "max_reuse": 3, "chunk": 4}


GEMMA_4 = lacking("Gemma 4")
HYBRID = lacking("caches of hybrid layers that are not the model's own")


def sharing_keys() -> Any:
    """A Gemma 4 whose layer 3 reads the keys of layer 1."""
    config = transformers.Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 4},
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        global_head_dim=8,
    )
    return made(config)


def hybrid(kind: str) -> Any:
    """A model with layers that attend and hold a state space model."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    more: dict[str, Any] = {
        "FalconH1": {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
        "Zamba2": {
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
    }
    sizes = NO_HEAD_DIM if kind == "Zamba2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes | heads | more[kind])
    return made(config)


class TestReuse:
    STEPS = (0, *range(L - 8, L + 1))  # a prompt, and single tokens after it

    @pytest.mark.parametrize("theta", [None, 1.0])
    def test_no_theta_and_one_that_nothing_reaches_change_nothing(
        self, llama: Any, theta: float | None
    ) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        with enable(llama, **SPARSE):
            stock = read(llama, ids, DynamicCache(), *self.STEPS)
        with enable(llama, **SPARSE, theta=theta):
            torch.testing.assert_close(read(llama, ids, cache, *self.STEPS), stock)
        # Layers, requests, calls.
        assert (cache.hits, cache.misses) == (0, 0 if theta is None else 2 * 2 * (1 + 8))

    @pytest.mark.parametrize(
        ("make", "layers"),
        [(lambda: model_of("llama"), (0, 1)), pytest.param(sharing_keys, (1, 3), marks=GEMMA_4)],
    )
    def test_reuse_is_that_of_a_selection_cache_a_layer(
        self, make: Any, layers: tuple[int, int], recorder: Recorder
    ) -> None:
        model, ids = make(), tokens(2)
        cache = TokenSelectCache(model)
        with enable(model, **SPARSE, theta=-1.0, max_reuse=2):
            read(model, ids, cache, *self.STEPS)
        for layer in layers:
            twin = tokenselect.SelectionCache(-1.0, 2)
            for module, q, k, v, _, more, out in recorder.calls:
                if module.layer_idx == layer:
                    expected = tokenselect.attention(
                        q, k, v, **SMALL, scale=more["scaling"], cache=twin
                    )
                    torch.testing.assert_close(out, expected.transpose(1, 2))
            assert (twin.hits > 0).all()
            assert (twin.misses > 1).all()  # max_reuse arrives
        hits, misses = int(twin.hits.sum()), int(twin.misses.sum())
        assert (cache.hits, cache.misses) == (2 * hits, 2 * misses)  # nothing depends on queries

    @pytest.mark.parametrize("mask", [None, mask_of("5. 15#", "20#")])
    def test_reordered_rows_take_their_selections_along(
        self, llama: Any, mask: Tensor | None
    ) -> None:
        """Swapping rows swaps the logits bit for bit, also of rows that are padded differently."""
        ids = tokens(2)

        def ends(swap: bool) -> tuple[Tensor, int, int]:
            cache = TokenSelectCache(llama)
            seen = mask
            with enable(llama, **SPARSE, **REUSED):
                read(llama, ids, cache, 0, 16, 17, 18, mask=mask)
                before = cache.hits
                if swap:
                    cache.reorder_cache(torch.tensor([1, 0]))
                    seen = None if mask is None else mask.flip(0)
                new = ids.flip(0) if swap else ids
                logits = read(llama, new, cache, 18, 19, mask=seen)
            return logits.flip(0) if swap else logits, before, cache.hits

        plain, swapped = ends(False), ends(True)
        assert torch.equal(swapped[0], plain[0])
        for _, before, after in (plain, swapped):
            assert after == before + 4

    def test_a_beam_that_wins_everywhere(self, llama: Any) -> None:
        """Both rows go on from row 1: they get what row 1 would have got."""
        ids, cache, twin = tokens(2), TokenSelectCache(llama), TokenSelectCache(llama)
        with enable(llama, **SPARSE, **REUSED):
            for each in (cache, twin):
                read(llama, ids, each, 0, 16, 17, 18)
            cache.reorder_cache(torch.tensor([1, 1]))
            both = llama(ids[1:, 18:19].repeat(2, 1), past_key_values=cache).logits
            one = llama(ids[:, 18:19], past_key_values=twin).logits[1]
        torch.testing.assert_close(both[0], one)
        torch.testing.assert_close(both[1], one)

    @pytest.mark.parametrize("order", [[0, 0], [1, 1], [1, 0]])
    @pytest.mark.parametrize("mask", [None, mask_of("5. 15#", "20#")])
    def test_counts_are_of_reuses_not_of_rows(
        self, llama: Any, order: list[int], mask: Tensor | None
    ) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        with enable(llama, **SPARSE, theta=0.0):
            read(llama, ids, cache, 0, *range(12, 18), mask=mask)
            layers = [layer.selections._caches.values() for layer in cache.layers]
            rows = [[*caches][-1].hits.tolist() for caches in layers]
            assert all(a != b for a, b in rows)  # a row that counts twice would show
            before = cache.hits, cache.misses
            assert sum(before) == 2 * 2 * 6  # layers, requests, calls
            cache.reorder_cache(torch.tensor(order))
            assert (cache.hits, cache.misses) == before
            read(llama, ids[order], cache, 17, 18, mask=None if mask is None else mask[order])
            assert cache.hits + cache.misses == sum(before) + 2 * 2

    def test_counts_after_a_call_that_failed(
        self, llama: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing was selected yet, so nothing is counted."""

        def fails(*given: Any, **more: Any) -> Any:
            raise MemoryError

        cache = TokenSelectCache(llama)
        with enable(llama, **SPARSE, theta=0.5):
            monkeypatch.setattr(tokenselect, "attention", fails)
            with pytest.raises(MemoryError):
                llama(tokens(2), past_key_values=cache)
            assert (cache.hits, cache.misses) == (0, 0)
            cache.reorder_cache(torch.tensor([1, 0]))
            assert (cache.hits, cache.misses) == (0, 0)

    def test_crop_drops_what_saw_cropped_tokens(self, llama: Any) -> None:
        ids, cache = tokens(1), TokenSelectCache(llama)
        with enable(llama, **SPARSE, theta=-1.0):
            read(llama, ids, cache, 0, 12, 13, 14)
            assert (cache.hits, cache.misses) == (4, 2)
            cache.crop(-1)  # the selections were made at 12: they stay
            read(llama, ids, cache, 13, 14)
            assert (cache.hits, cache.misses) == (6, 2)
            cache.crop(-3)
            assert cache.get_seq_length() == 11
            read(llama, ids, cache, 11, 13)
            assert (cache.hits, cache.misses) == (6, 4)

    @pytest.mark.parametrize("padding", ["none", "left", "right", "mixed", "holes"])
    @pytest.mark.parametrize("cropped", [1, 2, 5])
    @pytest.mark.parametrize("prefill", ["dense", "selected"])
    @pytest.mark.parametrize("densely", [False, True])
    def test_after_a_crop_all_is_as_if_nothing_was_remembered(
        self, llama: Any, padding: str, cropped: int, prefill: str, densely: bool
    ) -> None:
        """What comes first after it may be read densely, and tells the selections nothing."""
        mask = PADDINGS[padding]
        ids = tokens(2 if mask is None else len(mask))
        others, options = ids.flip(1), {**SMALL, "prefill": prefill, "theta": -1.0}
        with enable(llama, **options):
            cache = TokenSelectCache(llama)
            selected_last = (0, 13, 14) if prefill == "dense" else (0, 14)
            read(llama, ids, cache, *selected_last, mask=mask)
            cache.crop(-cropped)
            assert len(cache.layers[0].selections._caches) > 0
            forgetful = copy.deepcopy(cache)
            for layer in forgetful.layers:
                layer.selections.clear()
        for i, (start, end) in enumerate(((14 - cropped, 15), (15, 16), (16, 18))):
            with nullcontext() if densely and i == 0 else enable(llama, **options):
                a, b = (
                    read(llama, others, each, start, end, mask=mask) for each in (cache, forgetful)
                )
            assert torch.equal(a, b)

    @pytest.mark.parametrize("padding", ["left", "holes"])
    def test_a_crop_keeps_the_counts(self, llama: Any, padding: str) -> None:
        mask = PADDINGS[padding]
        assert mask is not None
        ids, cache = tokens(len(mask)), TokenSelectCache(llama)
        with enable(llama, **SPARSE, theta=-1.0):
            read(llama, ids, cache, 0, 18, 19, 20, mask=mask)
        before = cache.hits, cache.misses
        assert min(before) > 0
        cache.crop(-1)
        assert (cache.hits, cache.misses) == before

    def test_what_forgets(self, llama: Any) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        layer = cache.layers[0]
        with enable(llama, **SPARSE, theta=-1.0):
            read(llama, ids, cache, *self.STEPS)
            assert len(layer.selections._caches) == 1
            cache.batch_repeat_interleave(2)
            assert len(layer.selections._caches) == 0
            llama(ids[:, :1].repeat(2, 1), past_key_values=cache)
            assert len(layer.selections._caches) == 1
            cache.batch_select_indices(torch.tensor([0, 3]))
            assert len(layer.selections._caches) == 0
            llama(ids[:, :1], past_key_values=cache)
        with enable(llama, **(SPARSE | {"k": 4}), theta=-1.0):  # other options: other selections
            llama(ids[:, :1], past_key_values=cache)
            assert (cache.hits, cache.misses) == (0, 4)
            cache.reset()
            assert (cache.misses, cache.get_seq_length()) == (0, 0)
            llama(ids[:1], past_key_values=cache)  # another batch
            assert cache.misses == 2

    def test_layers_that_share_keys_share_no_selection(self) -> None:
        selections = TokenSelectCache(model_of("llama")).layers[0].selections
        run = token_mask(1, 4, 4).spans[0]
        settings = options.parse({"theta": 0.5})
        first = selections.of(0, run, settings, torch.float32)
        assert selections.of(0, run, settings, torch.float32) is first
        assert selections.of(1, run, settings, torch.float32) is not first

    @HYBRID
    @pytest.mark.parametrize("kind", ["FalconH1", "Zamba2"])
    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    @pytest.mark.parametrize("max_length", [None, L + 8])
    def test_layers_with_a_state_beside_their_keys(
        self, kind: str, mode: str, max_length: int | None
    ) -> None:
        model, mask = hybrid(kind), mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        expected = generated(model, ids, attention_mask=mask, **MODES[mode])
        cache = TokenSelectCache(model, max_length)
        assert cache.layers[-1].get_max_length() == (max_length or -1)
        for again in (False, True):
            if again:
                cache.reset()
            with enable(model, **EVERYTHING, theta=-1.0):
                actual = generated(
                    model, ids, attention_mask=mask, past_key_values=cache, **MODES[mode]
                )
            assert actual.tolist() == expected.tolist()
            assert cache.hits > 0

    @HYBRID
    def test_the_state_of_a_hybrid_layer_follows_its_rows(self) -> None:
        model, ids = hybrid("FalconH1"), tokens(2)
        ends = []
        for cache in (TokenSelectCache(model), DynamicCache(config=model.config)):
            model(ids[:, :12], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            ends.append(model(ids.flip(0)[:, 12:13], past_key_values=cache).logits)
        assert_close(*ends)

    def test_keys_changed_after_they_were_cached_are_told(self, llama: Any) -> None:
        """The advice to pass the cache that was passed would not help."""

        class Changing(TokenSelectCache):
            def update(self, *args: Any, **kwargs: Any) -> Any:
                keys, values = super().update(*args, **kwargs)
                return keys.clone(), values

        told = r"in LlamaAttention, layer 0\n(?s:.*)changes its keys.*leave theta out"
        with enable(llama, theta=0.9), pytest.raises(InvalidProblem, match=told):
            llama(tokens(1), past_key_values=Changing(llama))

    def test_theta_without_our_cache_is_an_error(self, llama: Any) -> None:
        with enable(llama, theta=0.9):
            for cache in (None, DynamicCache(), StaticCache(llama.config, 24)):
                with pytest.raises(InvalidProblem, match=r"TokenSelectCache\(model\)"):
                    llama(tokens(1), past_key_values=cache)
            with pytest.raises(InvalidProblem, match=r"theta=0\.9"):
                generated(llama, tokens(1))


class TestCausality:
    @pytest.fixture(autouse=True)
    def _warnings(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield

    @pytest.mark.parametrize("theta", [None, 0.5])
    def test_chunk_1_is_causal(self, llama: Any, theta: float | None) -> None:
        """The last token of a prompt moves no logit before it; that of a chunk does."""
        ids, other = tokens(2, 40), tokens(2, 40)
        other[:, -1] = ids[:, -1] % (VOCABULARY - 1) + 1
        for chunk in (1, 8):
            logits, caches = [], [TokenSelectCache(llama), TokenSelectCache(llama)]
            told = nullcontext() if chunk == 1 else pytest.warns(UserWarning, match="logits of sev")
            with enable(llama, **SPARSE, chunk=chunk, theta=theta), told:
                for x, cache in zip((ids, other), caches, strict=True):
                    out = llama(x, **{CACHE: cache}, logits_to_keep=40)
                    logits.append(out.logits[:, :-1])
            assert torch.equal(*logits) == (chunk == 1)
            assert theta is None or chunk > 1 or caches[0].hits > 0

    TOLD = "logits of several positions of a {}, in which up to 8 queries chose together"

    @pytest.mark.parametrize("by_config", [False, True])
    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"logits_to_keep": 0},
            {"logits_to_keep": 40},
            {"logits_to_keep": torch.arange(7)},
            {"labels": tokens(1, 40)},
        ],
        ids=["all", "0", "40", "of a tensor", "labels"],
    )
    def test_logits_of_several_positions_warn_once(
        self, llama: Any, by_config: bool, more: dict[str, Any]
    ) -> None:
        options = {**SPARSE, "chunk": 8}
        if by_config:
            llama.set_attn_implementation("tokenselect")
            llama.config.tokenselect = options
        with nullcontext() if by_config else enable(llama, **options):
            with pytest.warns(UserWarning, match=self.TOLD.format("LlamaForCausalLM")) as told:
                llama(tokens(1, 40), **more)
            assert [warning.filename for warning in told] == [__file__]
            llama(tokens(1, 40), **more)

    def test_of_a_classifier_of_tokens(self) -> None:
        config = model_of("llama").config
        config.num_labels = 3
        model = AutoModelForTokenClassification.from_config(config).eval()
        told = self.TOLD.format("LlamaForTokenClassification")
        with enable(model, **SPARSE, chunk=8), pytest.warns(UserWarning, match=told):
            model(tokens(1, 40))

    def test_of_a_model_of_parts(self) -> None:
        model = seeing("eager")
        before = state(model)
        told = self.TOLD.format("Gemma3ForConditionalGeneration")
        with enable(model, **SPARSE, chunk=8), enable(model, **SPARSE, chunk=8):
            with pytest.warns(UserWarning, match=told):
                model(tokens(1, 40))
            model(tokens(1, 40))
        assert state(model) == before

    def test_causal_ones_and_a_prompt_without_logits_do_not(self, llama: Any) -> None:
        for given in (
            {**SMALL, "chunk": 8},
            SPARSE,
            {**SPARSE, "chunk": 1},
            {**EVERYTHING, "chunk": 8},
        ):
            with enable(llama, **given):
                llama(tokens(1, 40))
        cache = DynamicCache()
        with enable(llama, **SPARSE, chunk=8):
            llama.model(tokens(1, 40), **{CACHE: cache})
            llama(tokens(1, 1), **{CACHE: cache})
            llama(tokens(1, 40), logits_to_keep=torch.tensor([39]))

    @pytest.mark.parametrize("mode", MODES)
    def test_generate_does_not(self, llama: Any, mode: str) -> None:
        with enable(llama, **SPARSE, chunk=8):
            generated(llama, tokens(1, 40), **MODES[mode])

    @ASSISTED
    def test_drafts_that_are_verified_together_do(self, llama: Any) -> None:
        told = "logits of several positions"
        with enable(llama, **SPARSE, chunk=8), pytest.warns(UserWarning, match=told):
            generated(llama, tokens(1, 40), prompt_lookup_num_tokens=3)

    def test_a_model_that_is_made_to_attend_otherwise_does_not(self, llama: Any) -> None:
        before = state(llama)
        llama.set_attn_implementation("tokenselect")
        llama.set_attn_implementation("eager")
        assert state(llama) == before


class TestAutocast:
    """Queries and rotated keys are float32 there, values bfloat16; sdpa reads all in bfloat16."""

    STEPS = ((0, 12), (12, 13), (13, 14), (14, 15), (15, 20))
    # Whether each of the steps is within torch.autocast.
    WITHIN = (True, True, True, True, True)
    THEN_OUTSIDE = (True, True, False, False, True)
    THEN_WITHIN = (False, False, True, True, False)

    def read(self, model: Any, cache: Any, within: tuple[bool, ...]) -> Tensor:
        parts = []
        for (start, end), on in zip(self.STEPS, within, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                part = model(tokens(2)[:, start:end], past_key_values=cache).logits
            parts.append(part.double())
        return torch.cat(parts, 1)

    def assert_as_close(self, actual: Tensor, stock: Tensor, truth: Tensor) -> None:
        assert actual.dtype == stock.dtype
        assert (stock - truth).abs().max() > 0
        assert (actual - truth).abs().max() <= 2 * (stock - truth).abs().max()

    @pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "qwen3"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("how", ["none", "dynamic", "ours", "ours_with_room"])
    def test_as_close_to_float32_as_sdpa(self, family: str, dtype: torch.dtype, how: str) -> None:
        model, ids = model_of(family), tokens(2)
        truth = model(ids).logits
        model.to(dtype).set_attn_implementation("sdpa")

        def read() -> Tensor:
            more = {"use_cache": False}
            if how != "none":
                more = {"past_key_values": caches(model)[how]()}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(ids, **more).logits

        stock = read()
        for given in ({**EVERYTHING, "chunk": 512}, {**EVERYTHING, "chunk": 4}, DENSE):
            with enable(model, **given):
                self.assert_as_close(read(), stock, truth)

    @pytest.mark.parametrize("within", [WITHIN, THEN_OUTSIDE, THEN_WITHIN])
    @pytest.mark.parametrize("theta", [None, -1.0])
    @pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
    def test_a_cache_goes_in_and_out_of_it(
        self, family: str, within: tuple[bool, ...], theta: float | None
    ) -> None:
        model = model_of(family)
        model.set_attn_implementation("sdpa")
        truth = model(tokens(2)).logits
        stock = self.read(model, DynamicCache(), within)
        for cache in (TokenSelectCache(model), TokenSelectCache(model, max_length=L)):
            with enable(model, **EVERYTHING, theta=theta):
                self.assert_as_close(self.read(model, cache, within), stock, truth)
            assert theta is None or cache.hits > 0

    @pytest.mark.parametrize("within", [WITHIN, THEN_OUTSIDE, THEN_WITHIN])
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_a_static_cache(self, family: str, within: tuple[bool, ...]) -> None:
        """transformers' own: of one dtype, so that only a model in that of autocast can fill it."""
        model = model_of(family)
        truth = model(tokens(2)).logits
        model.to(torch.bfloat16)
        stock = self.read(model, caches(model)["static"](), within)
        with enable(model, **EVERYTHING):
            actual = self.read(model, caches(model)["static"](), within)
        self.assert_as_close(actual, stock, truth)

    @pytest.mark.parametrize("within", [THEN_OUTSIDE, THEN_WITHIN])
    def test_nothing_is_rounded_in_the_cache(self, llama: Any, within: tuple[bool, ...]) -> None:
        cache, stock = TokenSelectCache(llama), DynamicCache()
        for each in (cache, stock):
            self.read(llama, each, within)
        for mine, theirs in zip(cache.layers, stock.layers, strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)

    def test_moved_keys(self, llama: Any) -> None:
        """Raw keys are looked at, cached and gone on with likewise, wherever enable() is called."""
        how = self.THEN_OUTSIDE
        llama.set_attn_implementation("sdpa")
        truth, stock = llama(tokens(2)).logits, self.read(llama, DynamicCache(), how)
        moving = {"positions": "contiguous", "score_at": "split"}
        for on in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                handle = enable(llama, **EVERYTHING, **moving)
            with handle:
                self.assert_as_close(self.read(llama, TokenSelectCache(llama), how), stock, truth)


class TestCache:
    def test_steps_write_in_place_and_room_doubles(self, llama: Any) -> None:
        cache, ids = TokenSelectCache(llama), tokens(1)
        layer = cache.layers[0]
        places = []
        for i in range(0, 20, 2):
            llama(ids[:, i : i + 2], past_key_values=cache)
            places.append(layer.keys.untyped_storage().data_ptr())
            room = layer.keys.untyped_storage().nbytes() // (4 * 2 * 8)
            assert room == next(r for r in (2, 4, 8, 16, 32) if r >= i + 2)
        assert len(set(places)) <= 5
        assert layer.keys.shape == (1, 2, 20, 8)

    def test_room_taken_at_once_is_never_moved_and_ends(self, llama: Any) -> None:
        cache, ids = TokenSelectCache(llama, max_length=12), tokens(1)
        for i in range(12):
            llama(ids[:, i : i + 1], past_key_values=cache)
            if i == 0:
                place = cache.layers[0].keys.data_ptr()
        assert cache.layers[0].keys.data_ptr() == place
        assert cache.layers[0].get_max_length() == 12
        with pytest.raises(InvalidProblem, match=r"13 tokens .* max_length=12"):
            llama(ids[:, :1], past_key_values=cache)

    @pytest.mark.parametrize("given", [0, -1, "5", 1.5, True])
    def test_room_is_a_number_of_tokens(self, llama: Any, given: Any) -> None:
        with pytest.raises(InvalidProblem, match=f"max_length={given!r}"):
            TokenSelectCache(llama, max_length=given)

    @pytest.mark.parametrize("room", [numpy.int64(12), torch.tensor(12)])
    def test_room_is_any_integer(self, llama: Any, room: Any) -> None:
        layer = TokenSelectCache(llama, max_length=room).layers[0]
        assert type(layer.get_max_length()) is int

    def test_made_in_inference_mode_and_used_outside(self, llama: Any) -> None:
        cache, ids = TokenSelectCache(llama), tokens(2)
        with enable(llama, **EVERYTHING, theta=-1.0):
            with torch.inference_mode():
                llama(ids[:, :10], past_key_values=cache)
                cache.batch_select_indices(torch.tensor([1, 0]))
            with torch.no_grad():
                llama(ids.flip(0)[:, 10:12], past_key_values=cache)
                cache.reorder_cache(torch.tensor([1, 0]))
                out = llama(ids[:, 12:], past_key_values=cache).logits
        assert_close(out, llama(ids).logits[:, 12:])

    @pytest.mark.parametrize(
        "rows",
        [
            torch.tensor([2, 0, 0]),
            torch.tensor([True, False, True]),
            [1],
            [-1, 0],
            [False, True, True],
            numpy.array([2, 1]),
            range(1, 3),
            (1,),
            slice(0, 2),
            slice(None, None, 2),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("preset", ["faithful", "extrapolate"])
    def test_rows_are_picked_as_from_a_stock_cache(
        self, llama: Any, rows: Any, preset: str
    ) -> None:
        ids = tokens(3)
        logits = []
        for cache in (TokenSelectCache(llama), DynamicCache(config=llama.config)):
            with enable(llama, preset, **EVERYTHING):
                llama(ids[:, :12], past_key_values=cache)
                cache.batch_select_indices(rows)
                logits.append(llama(ids[rows, 12:], past_key_values=cache).logits)
        assert torch.equal(*logits)

    def test_sliding_layers_stay_those_of_transformers(self) -> None:
        model = model_of("gemma2")
        cache = TokenSelectCache(model)
        assert cache.is_sliding == [True, False]
        model(tokens(1), past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == WINDOW - 1
        assert cache.layers[1].keys.shape[2] == L

    def test_works_with_every_attention(self, llama: Any) -> None:
        expected = generated(llama, tokens(2))
        assert torch.equal(
            generated(llama, tokens(2), past_key_values=TokenSelectCache(llama)), expected
        )

    def test_it_is_made_for_a_model(self) -> None:
        with pytest.raises(InvalidProblem, match=r"pass the model, or model\.config"):
            TokenSelectCache(3)


class TestOptions:
    def test_by_config(self, llama: Any) -> None:
        ids = tokens(1)
        dense = llama(ids).logits
        with enable(llama, **SPARSE):
            expected = llama(ids).logits
        llama.set_attn_implementation("tokenselect")
        llama.config.tokenselect = dict(SPARSE)
        assert torch.equal(llama(ids).logits, expected)
        llama.config.tokenselect = dict(tokenselect.SelectConfig(**SMALL)) | {"prefill": "selected"}
        assert torch.equal(llama(ids).logits, expected)
        del llama.config.tokenselect
        assert_close(llama(ids).logits, dense)  # the defaults' k is beyond the length

    @pytest.mark.parametrize("are_saved", [True, False])
    def test_from_pretrained(self, tmp_path: Any, llama: Any, are_saved: bool) -> None:
        if are_saved:
            llama.config.tokenselect = dict(SPARSE)
        llama.save_pretrained(tmp_path)
        how = {"attn_implementation": "tokenselect"} | (
            {} if are_saved else {"tokenselect": SPARSE}
        )
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
        assert loaded.config.tokenselect == SPARSE
        with enable(llama, **SPARSE):
            assert torch.equal(loaded(tokens(1)).logits, llama(tokens(1)).logits)

    @pytest.mark.parametrize(
        ("preset", "options"),
        [("paper", {"select_scale": 1.0}), ("extrapolate", {"positions": "contiguous"})],
    )
    def test_enable_is_reversible(self, model: Any, preset: str, options: dict[str, Any]) -> None:
        ids = tokens(2)
        before, was = model(ids).logits, state(model)
        handle = enable(model, preset, **SMALL, chunk=1)
        assert options.items() <= model.config.tokenselect.items() >= SMALL.items()
        selected = model(ids).logits
        if has_full_attention(model):
            assert not torch.allclose(selected, before, atol=1e-3)
        else:  # sliding layers stay dense
            assert_close(selected, before)
        handle.disable()
        handle.disable()
        assert torch.equal(model(ids).logits, before)
        assert model.config._attn_implementation == "eager"
        assert state(model) == was

    def test_enable_within_enable_and_after_an_error(self, llama: Any) -> None:
        with enable(llama, k=3):
            inner = enable(llama, k=4)
            assert llama.config.tokenselect == {"k": 4}
            with pytest.raises(RuntimeError), inner:
                raise RuntimeError
            assert llama.config.tokenselect == {"k": 3}
            assert llama.config._attn_implementation == "tokenselect"
        assert llama.config.tokenselect is None

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"kk": 3}, r"option 'kk'.*did you mean 'k'\?"),
            ({"temperature": 3}, r"option 'temperature'.*n_sink.*max_reuse"),
            ({"k": -1}, "k=-1"),
            ({"vote": "loud"}, "vote='loud'"),
            ({"theta": 2}, "theta=2"),
            ({"max_reuse": -1}, "max_reuse=-1"),
            ({"chunk": 0}, "chunk=0"),
            ({"chunk": True}, "chunk=True"),
            ({"chunk": numpy.float32(4)}, "chunk=4.0"),
            ({"prefill": "sparse"}, "prefill='sparse'.*'dense', 'selected'"),
            ({"dense_below": -1}, "dense_below=-1"),
            ({"dense_below": 0.5}, r"dense_below=0\.5"),
            ({"preset": "fast"}, "preset='fast'.*enable\\(model, k=1024\\)"),
            ({"preset": "extrapolat"}, "did you mean 'extrapolate'"),
            ({"preset": 64}, "preset=64.*options by name"),
            ({"backend": "cpuu"}, "did you mean 'cpu'"),
        ],
    )
    def test_a_bad_option_is_told_at_once(
        self, llama: Any, given: dict[str, Any], told: str
    ) -> None:
        with pytest.raises((InvalidProblem, UnknownBackend), match=f"(?s){told}") as error:
            enable(llama, **given)
        assert "rule:" in str(error.value)
        assert llama.config._attn_implementation == "eager"

    def test_a_bad_option_in_the_config_is_told_by_the_first_call(self, llama: Any) -> None:
        llama.set_attn_implementation("tokenselect")
        for given, told in (
            ({"kk": 3}, "option 'kk'"),
            ([], "is a list"),
            ({"k": "3"}, "k='3'"),
            (tokenselect.SelectConfig(), r"is a SelectConfig(?s:.*)dict\(SelectConfig\("),
            ({"preset": "faithful"}, r"(?s)option 'preset'.*enable\(model, preset\)"),
        ):
            llama.config.tokenselect = given
            with pytest.raises(InvalidProblem, match=told):
                llama(tokens(1))
        llama.config.tokenselect = {"backend": "cpuu"}
        with pytest.raises(UnknownBackend, match="did you mean 'cpu'"):
            llama(tokens(1))

    def test_numbers_of_numpy_and_torch_are_numbers(self, llama: Any) -> None:
        given = {"k": numpy.int64(3), "n_sink": torch.tensor(1), "n_local": 2}
        given |= {"chunk": numpy.int32(4), "dense_below": torch.tensor(9)}
        given |= {"theta": numpy.float32(0.5), "max_reuse": numpy.int8(9)}
        with enable(llama, **given):
            repr(llama.config)  # is JSON
            assert llama.config.tokenselect == given
            expected = llama(tokens(1), past_key_values=TokenSelectCache(llama)).logits
        llama.set_attn_implementation("tokenselect")
        llama.config.tokenselect = given
        repr(llama.config)
        actual = llama(tokens(1), past_key_values=TokenSelectCache(llama)).logits
        assert torch.equal(actual, expected)

    def test_what_was_disabled_is_not_entered(self, llama: Any) -> None:
        handle = enable(llama, k=3)
        assert repr(handle) == "<enable(LlamaForCausalLM, k=3)>"
        handle.disable()
        with pytest.raises(InvalidProblem, match=r"k=3\), disabled"), handle:
            pass

    def test_contiguous_positions_past_those_that_were_trained_warn(self, llama: Any) -> None:
        assert llama.config.max_position_embeddings == 256
        told = r"16 \+ 113 \+ 128 = 257 tokens, in a model for 256"
        with pytest.warns(UserWarning, match=told):
            enable(llama, "extrapolate", k=113).disable()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            enable(llama, "extrapolate", k=112).disable()
            enable(llama, k=1000).disable()
            scaled = model_of("llama_yarn", max_position_embeddings=16)
            enable(scaled, "extrapolate", k=40, n_sink=4, n_local=16).disable()

    def test_backend_arrives(self, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked, attend = [], tokenselect.attention

        def attention(*given: Any, backend: str, **more: Any) -> Any:
            asked.append(backend)
            return attend(*given, backend=backend, **more)

        monkeypatch.setattr(tokenselect, "attention", attention)
        with enable(llama, **SPARSE):
            expected = llama(tokens(1)).logits
        with enable(llama, **SPARSE, backend="reference"):
            assert_close(llama(tokens(1)).logits, expected)
        assert asked == ["auto", "auto", "reference", "reference"]


@pytest.mark.parametrize("how", [{}, {"positions": "contiguous", "score_at": "split"}])
@pytest.mark.parametrize("mode", ["greedy", "beams", "static"])
def test_a_model_whose_layers_all_slide(how: dict[str, Any], mode: str) -> None:
    """It has a mask made for full attention too, over a cache that has dropped tokens."""
    from transformers import MinistralConfig

    config = MinistralConfig(**SIZES, sliding_window=WINDOW)
    assert set(config.layer_types) == {"sliding_attention"}
    model = made(config)
    mask = mask_of("20#", "5. 15#")
    ids = tokens(2).where(mask.bool(), 0)
    expected = generated(model, ids, attention_mask=mask, **MODES[mode])
    slides = pytest.warns(UserWarning, match="a ministral model .* nothing is selected")
    with slides as told:
        handle = enable(model, **SPARSE, **how)
    assert {warning.filename for warning in told} == {__file__}
    with handle:
        assert generated(model, ids, attention_mask=mask, **MODES[mode]).equal(expected)
    with slides as told:
        model.set_attn_implementation("tokenselect")
    assert {warning.filename for warning in told} == {__file__}


def test_a_model_with_parts_that_have_no_layers_is_made() -> None:
    """The perceiver of Idefics2 has no number of layers in its config."""
    from transformers import AutoModelForImageTextToText, Idefics2Config

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4}  # fmt: skip
    config = Idefics2Config(
        vision_config=small | {"image_size": 32, "patch_size": 16},
        text_config=small | {"model_type": "mistral", "vocab_size": 61, "num_key_value_heads": 2,
                             "sliding_window": None, "pad_token_id": 0},
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1,
                          "resampler_n_heads": 4, "resampler_head_dim": 8,
                          "num_key_value_heads": 2},
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).set_attn_implementation("tokenselect")


@pytest.mark.parametrize("make", [lambda: hybrid("FalconH1"), lambda: model_of("gemma2")])
def test_a_model_with_a_layer_that_sees_everything_warns_of_nothing(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable(model, **SPARSE).disable()


@GEMMA_4
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_a_model_that_cuts_its_masks_to_the_newest_queries(padding: str) -> None:
    """Gemma 4 reads only these in the layers that share keys."""
    model, mask = sharing_keys(), PADDINGS[padding]
    ids = tokens(2 if mask is None else len(mask))
    for more in ({"logits_to_keep": 1}, {"logits_to_keep": 6}, {}):
        expected = model(ids, attention_mask=mask, **more).logits
        with enable(model, **EVERYTHING, theta=-1.0):
            cache = TokenSelectCache(model)
            actual = model(ids, attention_mask=mask, past_key_values=cache, **more).logits
        kept = None if mask is None else mask[:, -expected.shape[1] :]
        assert_close(actual, expected, kept)
        with enable(model, **SMALL):  # a prompt, if all of it but one token is cut
            assert_close(model(ids, attention_mask=mask, **more).logits, expected, kept)
    if padding in ("none", "left"):
        ids = ids if mask is None else ids.where(mask.bool(), 0)
        expected = generated(model, ids, attention_mask=mask)
        with enable(model, **EVERYTHING):
            assert generated(model, ids, attention_mask=mask).equal(expected)
    told = r"layer 3\n.*cos and sin are not those"  # it cuts those as well
    with pytest.raises(UnsupportedProblem, match=told):
        enable(model, "extrapolate", k=100)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["Bart", "Marian"])
def test_a_decoder_without_its_encoder(kind: str, padding: str) -> None:
    """It makes a mask for cross-attention, which no layer reads."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        init_std=0.3,
        pad_token_id=0,
        decoder_start_token_id=1,
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    model = made(config)
    mask = PADDINGS[padding]
    ids = tokens(2) if mask is None else tokens(len(mask)).where(mask.bool(), 0)
    dense, written = (
        model(ids, attention_mask=mask).logits,
        generated(model, ids, attention_mask=mask),
    )
    with enable(model, **EVERYTHING, theta=0.5):
        cache = TokenSelectCache(model)
        assert_close(model(ids, attention_mask=mask, past_key_values=cache).logits, dense, mask)
        cache = TokenSelectCache(model)
        assert generated(model, ids, attention_mask=mask, past_key_values=cache).equal(written)
    with enable(model, **SPARSE, chunk=1):
        selected = model(ids, attention_mask=mask).logits
        assert (selected - dense).abs().max() > 0.01 * dense.abs().max()
        with pytest.raises(UnsupportedProblem, match="bidirectional"):
            model(ids, attention_mask=mask, encoder_hidden_states=torch.zeros(len(ids), 4, 32))


def seeing(attention: str) -> Any:
    """A model of two parts, of which one sees."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(1)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=FAMILIES["gemma3"](), vision_config=vision, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("how", ["at_first", "later", "text_only"])
def test_the_config_of_a_whole_model_holds_the_options_of_its_text(tmp_path: Any, how: str) -> None:
    ids, model = tokens(2), seeing("tokenselect" if how == "at_first" else "eager")
    if how == "later":
        model.set_attn_implementation("tokenselect")
    elif how == "text_only":
        model.set_attn_implementation({"text_config": "tokenselect"})
    model.config.tokenselect = SPARSE | {"chunk": 1}
    other = seeing("eager")
    dense = other(ids).logits
    with enable(other, **SPARSE, chunk=1):
        assert other.config.tokenselect == SPARSE | {"chunk": 1}
        expected = other(ids).logits
    assert (expected - dense).abs().max() > 0.01 * dense.abs().max()
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="tokenselect").eval()
    assert torch.equal(again(ids).logits, expected)
    assert copy.deepcopy(model.config).tokenselect == again.config.tokenselect
    model.config.tokenselect = {"kk": 3}
    with pytest.raises(InvalidProblem, match="option 'kk'"):
        model(ids)
    del model.config.tokenselect
    for config in (model.config, model.config.text_config, other.config):
        assert config.tokenselect is None
    with pytest.raises(AttributeError):
        del model.config.tokenselect


def test_options_stand_in_any_config() -> None:
    """One of an encoder and a decoder without parts holds them itself."""
    from transformers import BartConfig

    config = BartConfig(tokenselect={"k": 3})
    assert BartConfig.from_dict(config.to_dict()).tokenselect == {"k": 3}
    assert BartConfig().tokenselect is None


def test_options_are_kept_where_no_part_generates_text() -> None:
    """get_text_config() returns a new copy at each call there."""
    config = transformers.DetrConfig()
    config.tokenselect = {"k": 3}
    assert config.tokenselect == config.to_dict()["tokenselect"] == {"k": 3}


def test_only_the_part_of_a_model_that_generates_text_changes() -> None:
    model = seeing("eager")
    expected = model(tokens(2)).logits
    with enable(model, **EVERYTHING):
        assert model.config.vision_config._attn_implementation == "eager"
        assert_close(model(tokens(2)).logits, expected)
        pictures = torch.zeros(2, L, dtype=torch.long)
        pictures[:, 3:6] = 1
        with pytest.raises(UnsupportedProblem, match=r"blocks that see each other|or_masks\("):
            model(tokens(2), token_type_ids=pictures)
    assert torch.equal(model(tokens(2)).logits, expected)


# Sizes of models that never look attn_implementation up, or in a table of their own.
BY_THEMSELVES: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "CpmAnt": {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "num_hidden_layers": 1},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "GPTNeo": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
    },
    "Mvp": {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "Reformer": {
        "hidden_size": 32,
        "is_decoder": True,
        "attn_layers": ["local"],
        "axial_pos_embds": False,
    },
    "TrOCR": {"d_model": 32, "decoder_layers": 1},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4},
    "XLM": {"emb_dim": 32, "n_layers": 1, "n_heads": 4},
    "XLNet": {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
}

TRIANGLE = torch.ones(L, L).tril().bool()[None, None]
PACKED = torch.cat([torch.arange(12), torch.arange(8)])[None]


def call_layer(model: Any, mask: Any) -> Any:
    """Call the first attention layer by itself, over 4 tokens."""
    hidden = torch.zeros(1, 4, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(4)[None])
    return model.model.layers[0].self_attn(hidden, angles, mask)


class TestRefusals:
    @pytest.fixture
    def on(self, llama: Any) -> Any:
        llama.set_attn_implementation("tokenselect")
        return llama

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"output_attentions": True}, r"layer 0\n.*output_attentions(?s:.*)'eager'"),
            ({"attention_mask": TRIANGLE}, r"custom mask \(1, 1, 20, 20\)"),
            ({"attention_mask": TRIANGLE[0]}, r"attention_mask \(1, 20, 20\)"),
            ({"is_causal": False}, "bidirectional"),
            ({"position_ids": PACKED, "use_cache": False}, "packed sequences"),
            ({"cu_seq_lens_q": torch.tensor([0, 12, 20])}, "cu_seq_lens_q: packed"),
            ({"position_bias": torch.zeros(1)}, "position_bias: selected keys get no bias"),
            ({"some_new_argument": torch.zeros(1)}, "some_new_argument: not known"),
        ],
    )
    def test_arguments(self, on: Any, given: dict[str, Any], told: str) -> None:
        with pytest.raises(UnsupportedProblem, match=told):
            on(tokens(1), **given)

    def test_weights_in_generate(self, on: Any) -> None:
        with pytest.raises(UnsupportedProblem, match="output_attentions"):
            generated(on, tokens(1), output_attentions=True, return_dict_in_generate=True)

    def test_what_the_config_or_a_layer_asks_for(self, on: Any) -> None:
        on.model.layers[1].self_attn.is_causal = False
        with pytest.raises(UnsupportedProblem, match=r"layer 1\n.*bidirectional"):
            on(tokens(1))
        on.config._output_attentions = True  # as was allowed with eager attention
        with pytest.raises(UnsupportedProblem, match=r"layer 0\n.*output_attentions"):
            call_layer(on, token_mask(1, 4, 4))
        on.config.is_causal = False
        with pytest.raises(UnsupportedProblem, match="bidirectional"):
            on(tokens(1))

    @pytest.mark.parametrize("which", ["or_mask_function", "and_mask_function"])
    @pytest.mark.parametrize("kind", ["causal", "sliding"])
    def test_custom_mask_functions(self, on: Any, which: str, kind: str) -> None:
        make = create_causal_mask if kind == "causal" else create_sliding_window_causal_mask
        on.config.sliding_window = WINDOW

        def everything(b: Any, h: Any, q: Any, k: Any) -> Any:
            return q >= 0

        mask = make(on.config, torch.zeros(1, 4, 32), None, **{CACHE: None, which: everything})
        with pytest.raises(UnsupportedProblem, match=r"_masks\(.*everything"):
            call_layer(on, mask)

    @pytest.mark.parametrize(
        ("kind", "more", "told"),
        [
            (
                "Llama4Text",
                {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
                "chunked attention",
            ),
            # It puts compressed keys behind the others, and as many columns to the mask.
            pytest.param(
                *("DeepseekV4", {"num_experts_per_tok": 1}),
                r"reads its masks itself \(it calls cat",
                marks=lacking("DeepSeek V4"),
            ),
        ],
    )
    def test_masks_of_other_kinds(self, kind: str, more: dict[str, Any], told: str) -> None:
        sizes = SIZES if kind == "Llama4Text" else NO_HEAD_DIM
        model = made(getattr(transformers, f"{kind}Config")(**sizes, **more), "tokenselect")
        with pytest.raises(UnsupportedProblem, match=told):
            model(tokens(1, 150))

    def test_mla(self) -> None:
        from transformers import DeepseekV3Config

        config = DeepseekV3Config(
            **NO_HEAD_DIM,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
        model = made(config)
        with pytest.raises(UnsupportedProblem, match=r"deepseek_v3.*\n.*latent.*\n.*densely"):
            enable(model)
        model.set_attn_implementation("tokenselect")
        with pytest.raises(UnsupportedProblem, match=r"deepseek_v3.*\n.*latent"):
            model(tokens(1))

    @pytest.mark.parametrize("kind", BY_THEMSELVES)
    def test_a_model_that_attends_by_itself(self, kind: str) -> None:
        """transformers takes any attn_implementation for it; most look none up, and run densely."""
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, **BY_THEMSELVES[kind]
        )
        told = rf"a {kind}\w+\n.*AttentionInterface.*of its own\n.*"
        if kind in ("Falcon", "GPTJ", "GPTNeo"):  # look it up when they are made
            with pytest.raises(UnsupportedProblem, match=told):
                AutoModelForCausalLM.from_config(config, attn_implementation="tokenselect")
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="tokenselect")
            for part in (model, model.base_model):
                for call in (part, part.forward):
                    with pytest.raises(UnsupportedProblem, match=told):
                        call(tokens(1))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with pytest.raises(UnsupportedProblem, match=told) as refused:
            enable(model)
        assert "text_config" not in str(refused.value)  # it has none, and transformers says nothing
        assert model.config.tokenselect is None
        model.config._attn_implementation = "tokenselect"  # past all checks
        with pytest.raises(UnsupportedProblem, match=told):
            model(tokens(1))

    def test_a_model_from_elsewhere(self) -> None:
        """What attends in it may have any name."""
        told = r"a Alone\n.*of its own"
        first = Alone._from_config(FAMILIES["llama"](), attn_implementation="tokenselect")
        later = Alone(FAMILIES["llama"]())
        calls = (
            lambda: first(tokens(1)),
            lambda: enable(later),
            lambda: later.set_attn_implementation("tokenselect"),
        )
        for call in calls:
            with pytest.raises(UnsupportedProblem, match=told):
                call()
        assert later(tokens(1)).isfinite().all()

    def test_a_model_from_elsewhere_made_of_one_of_transformers(self) -> None:
        model = Around._from_config(FAMILIES["llama"](), attn_implementation="tokenselect").eval()
        model.config.tokenselect = EVERYTHING
        actual = model(tokens(1))
        model.set_attn_implementation("eager")
        assert_close(actual, model(tokens(1)))
        model.set_attn_implementation("tokenselect")
        assert torch.equal(model(tokens(1)), actual)

    def test_a_part_that_attends_by_itself(self) -> None:
        """Only the part that generates text has to attend through the interface."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration, Swinv2Config

        vision = Swinv2Config(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2])
        config = LlavaConfig(
            text_config=FAMILIES["llama"](), vision_config=vision, vision_feature_layer=-1
        )
        make = LlavaForConditionalGeneration._from_config
        model = make(config, attn_implementation="tokenselect").eval()
        with pytest.raises(UnsupportedProblem, match=r"a Swinv2Model\n(?s:.*)'text_config'"):
            model.get_image_features(torch.zeros(1, 3, 16, 16))
        model.config.tokenselect = EVERYTHING
        actual = model(tokens(2)).logits
        model.set_attn_implementation({"text_config": "eager"})
        assert_close(actual, model(tokens(2)).logits)

    @pytest.mark.parametrize("kind", ["Bart", "T5"])
    def test_an_encoder_and_a_decoder(self, kind: str) -> None:
        sizes = {"d_model": 32, "decoder_start_token_id": 0, "num_layers": 1, "encoder_layers": 1}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, decoder_layers=1, **sizes
        )
        make = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config
        model = make(config, attn_implementation="eager")
        told = rf"a {kind}ForConditionalGeneration\n.*an encoder and a decoder.*both directions"
        with pytest.raises(UnsupportedProblem, match=told):
            enable(model)
        model = make(config, attn_implementation="tokenselect").eval()
        with pytest.raises(UnsupportedProblem, match=r"bidirectional|none of its layers calls"):
            model(tokens(1), decoder_input_ids=tokens(1))

    @pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
    def test_a_model_that_does_not_attend(self, kind: str) -> None:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1
        )
        model = AutoModelForCausalLM.from_config(config)
        before = model.config._attn_implementation
        with pytest.raises(UnsupportedProblem, match=f"{kind}ForCausalLM.*\n.*has no attention"):
            enable(model)
        assert model.config._attn_implementation == before
        assert model.config.tokenselect is None

    @pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None])
    def test_what_is_no_model_of_transformers(self, thing: Any) -> None:
        with pytest.raises(InvalidProblem, match=f"enable\\(\\) of a {type(thing).__name__}"):
            enable(thing)

    def test_training(self, on: Any) -> None:
        with torch.enable_grad(), pytest.raises(InvalidProblem, match="q requires grad"):
            on(tokens(1))
        on.set_attn_implementation("eager")
        with torch.enable_grad(), pytest.raises(InvalidProblem, match="written in place"):
            on(tokens(1), past_key_values=TokenSelectCache(on))
        on.config.attention_dropout = 0.1
        trained = AutoModelForCausalLM.from_config(on.config, attn_implementation="tokenselect")
        with pytest.raises(UnsupportedProblem, match=r"dropout=0\.1"):
            trained.train()(tokens(1))

    def test_continuous_batching(self, on: Any) -> None:
        with pytest.raises(ValueError, match=r"tokenselect.* is not supported"):
            on.generate_batch([[1, 2, 3]])
        layer, x = on.model.layers[0].self_attn, torch.zeros(1, 4, 4, 8)
        with pytest.raises(UnsupportedProblem, match="cache: continuous batching"):
            ALL_ATTENTION_FUNCTIONS["tokenselect"](
                layer, x, x, x, token_mask(1, 4, 4), cache=object()
            )

    def test_a_cache_by_the_name_that_5_24_gives_it(self, on: Any) -> None:
        """It was read before attention: handed on, it changes nothing."""
        ids = tokens(1)
        expected = on(ids).logits
        for cache in (DynamicCache(), TokenSelectCache(on), None):
            actual = on(ids, **{CACHE: cache, "cache": cache}).logits
            assert torch.equal(actual, expected)

    def test_a_mask_that_leaves_out_the_newest(self, on: Any) -> None:
        cache = DynamicCache()
        on(tokens(1), past_key_values=cache)
        with pytest.raises(UnsupportedProblem, match="attention_mask of 1 tokens, for 21"):
            on(tokens(1)[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)

    def test_an_attention_that_got_no_mask_or_that_of_another(self, on: Any) -> None:
        for mask, told in (
            (None, "no mask arrived"),
            (token_mask(2, 4, 4), "a mask for 2 requests of 4 keys"),
            (token_mask(1, 4, 5), "a mask for 1 requests of 5 keys"),
        ):
            with pytest.raises(UnsupportedProblem, match=told):
                call_layer(on, mask)

    def test_a_window_that_the_mask_does_not_have(self) -> None:
        model = model_of("mistral")
        model.set_attn_implementation("tokenselect")
        with pytest.raises(UnsupportedProblem, match="whose window is None"):
            call_layer(model, token_mask(1, 4, 4))

    def test_full_attention_over_a_cache_that_slides(self, on: Any) -> None:
        cache = DynamicCache(config=model_of("mistral").config)
        on(tokens(1), past_key_values=cache)
        with pytest.raises(UnsupportedProblem, match="begins at token 15"):
            on(tokens(1)[:, :1], past_key_values=cache)


@pytest.mark.parametrize("version", ["4.57.1", "5.3.0", "5.3.1.dev0"])
def test_an_older_transformers_is_told(tmp_path: Any, version: str) -> None:
    """By its version, before a name that it lacks is asked for."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}")
    done = fresh.run("import tokenselect.integrations.transformers", tmp_path)
    assert f"ImportError: transformers {version} is installed" in done.stderr
    assert "do:   pip install 'transformers>=5.4'" in done.stderr


def test_the_oldest_version_is_that_of_the_extra() -> None:
    project = tomllib.loads((fresh.ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, tokenselect.integrations.transformers._OLDEST))
    assert project["optional-dependencies"]["transformers"] == [f"transformers>={oldest}"]


class TestMask:
    def test_it_travels_and_nobody_computes_with_it(self) -> None:
        mask = token_mask(2, 3, 5, q_offset=torch.tensor(2))
        assert (mask.at, mask.window, mask.shape) == (2, None, (2, 1, 1, 5))
        for twin in (mask.to(torch.device("meta")), mask.contiguous(), mask.to("cpu")):
            assert isinstance(twin, TokenMask)
            assert (twin.at, twin.spans) == (2, mask.spans)
            assert twin.calls is mask.calls
        for use in (
            lambda: torch.zeros(2, 1, 3, 5) + mask,
            lambda: mask[..., :3],
            lambda: mask[:, :, :, :3],
            lambda: mask[:, :, :2, :],
            lambda: mask[:, :, 7],
            lambda: ~mask,
        ):
            with pytest.raises(UnsupportedProblem, match="reads its masks itself"):
                use()

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("kept", [1, 3, 9, L, L + 1])
    def test_the_newest_queries_of_a_mask_are_those_of_a_later_call(
        self, padding: str, kept: int
    ) -> None:
        mask = PADDINGS[padding]
        B = 2 if mask is None else len(mask)
        whole = token_mask(B, L, L, attention_mask=mask)
        newest, kept = whole[:, :, -kept:, :], min(kept, L)
        later = token_mask(B, kept, L, L - kept, attention_mask=mask)
        assert isinstance(newest, TokenMask)
        for name in ("at", "Lq", "window", "begin", "shape"):
            assert getattr(newest, name) == getattr(later, name)
        for mine, theirs in zip(newest.spans, later.spans, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert newest.calls is whole.calls
        assert (newest.is_step, later.is_step) == (False, kept == 1)

    def test_requests_with_the_same_queries_go_together(self) -> None:
        """Of a prompt those that begin at the same place; of a step all."""
        padding = PADDINGS["left"]
        mask = token_mask(4, L, L, attention_mask=padding)
        rows = [(span.rows, span.first, span.n, span.slots) for span in mask.spans]
        assert rows == [
            (slice(0, 1), (0,), (20,), slice(0, 20)),
            (slice(1, 3), (5, 5), (15, 15), slice(5, 20)),
            (slice(3, 4), (13,), (7,), slice(13, 20)),
        ]
        (span,) = token_mask(4, 1, L, L - 1, attention_mask=padding).spans
        assert (span.rows, span.first, span.n) == (slice(0, 4), (0, 5, 5, 13), (20, 15, 15, 7))
        assert isinstance(span.slots, Tensor)
        assert span.slots[3, :7].tolist() == [*range(13, 20)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "dense", "holes", "sliding", "raw"])
def test_memory_of_a_prompt_does_not_grow_with_its_square(kind: str) -> None:
    """Peaks beside the cache: a quarter of what one float32 head of Lq x Lk would take."""
    length = 4096
    script = MEMORY.format(root=str(fresh.ROOT), length=length, kind=kind)
    extra = int(fresh.output(script, OMP_NUM_THREADS="1"))
    assert 0 <= extra < length * length * 4 / 4


MEMORY = """
import torch
from tests.measure_memory import forget_peak, resident
from tokenselect.integrations.transformers import rotation
from tokenselect.integrations.transformers.layers import attention_forward
from tokenselect.integrations.transformers.cache import RawKeys
from tokenselect.integrations.transformers.masks import TokenMask, token_mask
from tokenselect.rope import Rope
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from types import SimpleNamespace

torch.set_num_threads(1)


class Layer(torch.nn.Module):
    is_causal, layer_idx = True, 0


layer, options = Layer(), {{"k": 64, "n_sink": 4, "n_local": 64, "chunk": 256}}
layer.config = SimpleNamespace(tokenselect=options)
if "{kind}" == "raw":
    options |= {{"positions": "contiguous", "score_at": "split"}}
    layer._tokenselect_raw_layer = rotation.RawLayer()
    layer._tokenselect_raw_layer.rope = Rope(torch.tensor([1.0, 0.1, 0.01, 0.001]), cached="raw")
function = sliding_window_causal_mask_function(64)
if "{kind}" != "sliding":
    function = causal_mask_function
if "{kind}" in ("full", "raw"):
    options["prefill"] = "selected"
q, k, v = torch.randn(3, 1, 2, {length}, 8).unbind()
for n in (256, {length}):
    tokens = torch.arange(n)[None] != 9 if "{kind}" == "holes" else None
    mask = token_mask(1, n, n, mask_function=function, attention_mask=tokens)
    mask.calls[layer] = rotation._Call(rotation._Made(None, torch.arange(n)[None]), True, None)
    forget_peak()
    before = resident("VmRSS")
    attention_forward(layer, q[:, :, :n], k[:, :, :n], v[:, :, :n], mask)
print(resident("VmHWM") - before)
"""


def test_a_cache_takes_one_batch() -> None:
    """The rows of another would be spread over it without a word."""
    model = model_of("llama")
    cache = TokenSelectCache(model)
    ids = torch.randint(1, 50, (2, 9))
    with enable(model, k=4, n_sink=1, n_local=4), torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(InvalidProblem, match="belongs to one batch"):
            model(ids[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("preset", ["faithful", "extrapolate"])
def test_a_later_one_that_nobody_holds_is_within_reach(preset: str) -> None:
    model = model_of("llama")
    before, first = state(model), enable(model, "extrapolate", k=1)
    enable(model, preset, k=2)
    with pytest.raises(InvalidProblem, match=r"\.inner\.disable\(\)"):
        first.disable()
    assert first.inner is not None
    first.inner.disable()
    assert model.config.tokenselect["k"] == 1
    first.disable()
    assert state(model) == before


def test_an_error_in_a_block_comes_out_as_it_is() -> None:
    """Also where something was enabled in the block, and the error kept it so."""
    model = model_of("llama")
    before, later = state(model), []

    def fails() -> None:
        with enable(model, "extrapolate", k=1):
            later.append(enable(model, k=2))
            model.config.tokenselect = {"k": 3}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.config.tokenselect == {"k": 3}
    del model.config.tokenselect
    later[0].disable()
    assert state(model) == before


@pytest.mark.parametrize("given", [{"k": 5}, None])
def test_options_that_were_set_meanwhile_stay(given: dict[str, int] | None) -> None:
    model = model_of("llama")
    before = state(model)
    handle = enable(model, "extrapolate", k=1)
    if given is None:
        del model.config.tokenselect
    else:
        model.config.tokenselect = given
    handle.disable()
    assert getattr(model.config, "tokenselect", None) == given
    vars(model.config).pop("tokenselect", None)
    assert state(model) == before


@pytest.mark.parametrize("preset", ["faithful", "extrapolate"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
def test_a_cache_can_be_saved(kind: str, preset: str) -> None:
    model, ids, file = model_of("gemma3"), tokens(2), io.BytesIO()
    cache = caches(model)[kind]()
    with enable(model, preset, **SMALL), torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        torch.save(cache, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert type(again) is type(cache)
        expected = model(ids[:, 12:], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 12:], past_key_values=again).logits, expected)
    if preset == "extrapolate":
        with pytest.raises(InvalidProblem, match="rotated keys"), torch.no_grad():
            model(ids[:, :1], past_key_values=again)


def test_what_a_layer_returns_is_contiguous() -> None:
    """Some models take views of it."""
    query, value = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 6)
    whole, part = (torch.randn(rows, 4, 3, 6).transpose(1, 2) for rows in (2, 1))
    for rows, given in ((slice(0, 2), whole), (slice(1, 2), part)):
        out = layers._Output(query, value)
        out.put(rows, slice(0, 3), given)
        assert out.whole().is_contiguous()
        assert torch.equal(out.whole()[rows], given)
        assert out.whole().shape == (2, 3, 4, 6)
    assert torch.equal(layers._Output(query, value).whole(), torch.zeros(2, 3, 4, 6))
