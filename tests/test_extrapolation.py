"""Options that move keys, in models of transformers: raw caches, and how a model is seen to rotate.

While keys stay raw, all of a model's rotation is tokenselect's: a wrong frequency, layout, scaling
or position shows where everything is selected, against stock eager attention. The tolerance is that
of tests/models.py.
"""

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import tokenselect
from tests.models import (
    CACHE,
    EVERYTHING,
    FAMILIES,
    IS_RENAMED,
    MOVING,
    NO_HEAD_DIM,
    PADDINGS,
    SIZES,
    SMALL,
    SPARSE,
    THE_OLD_NAME,
    VOCABULARY,
    WINDOW,
    L,
    Recorder,
    assert_close,
    caches,
    counted,
    generated,
    lacking,
    made,
    mask_of,
    model_of,
    read,
    shared,
    tokens,
)
from tokenselect.errors import InvalidProblem, UnsupportedProblem
from tokenselect.integrations.transformers import TokenSelectCache, enable, rotation

pytestmark = [
    pytest.mark.filterwarnings(THE_OLD_NAME),
    pytest.mark.usefixtures("no_grad"),
    # What others of the families show too.
    pytest.mark.slow("llama_yarn", "llama_llama3", "qwen2", "qwen3", "mistral"),
]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A model of each family; tests leave it as it was."""
    return shared(request.param)


@pytest.fixture(params=MOVING)
def moving(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MOVING[request.param]


# Further ways to rotate; each has to be recognised for what it is.
ROTATIONS: dict[str, tuple[Any, set[tuple[int, bool]]]] = {
    "linear": (
        lambda: transformers.LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        ),
        {(8, False)},
    ),
    "neighbours": (lambda: transformers.CohereConfig(**NO_HEAD_DIM), {(8, True)}),
    "half_of_a_head": (
        lambda: transformers.StableLmConfig(**NO_HEAD_DIM, partial_rotary_factor=0.5),
        {(4, False)},
    ),
    "neighbours_in_half_of_a_head": (lambda: transformers.GlmConfig(**SIZES), {(4, True)}),
    "not_in_every_layer": (
        lambda: transformers.SmolLM3Config(**NO_HEAD_DIM, no_rope_layers=[1, 0]),
        {(8, False), (2, False)},
    ),
    "queries_scaled_by_position": (lambda: transformers.Ministral3Config(**SIZES), {(8, False)}),
    "shared_keys": (
        lambda: transformers.Gemma3nTextConfig(
            **SIZES | {"num_hidden_layers": 4, "intermediate_size": [48] * 4},
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        {(8, False)},
    ),
}


def ropes(model: Any) -> list[tokenselect.Rope]:
    """Of the layers whose keys are raw, in order."""
    layers = [rotation.raw_layer_of(module) for module in model.modules()]
    return [layer.rope for layer in layers if layer is not None and layer.rope is not None]


class TestRotation:
    """How a layer rotates is seen, not guessed."""

    @pytest.mark.parametrize("how", ROTATIONS)
    def test_it_is_recognised(self, how: str) -> None:
        make, expected = ROTATIONS[how]
        model = made(make())
        ids, cache = tokens(2), TokenSelectCache(model)
        dense = model(ids).logits
        with enable(model, "extrapolate", **EVERYTHING):
            assert {(rope.rotary_dim, rope.interleaved) for rope in ropes(model)} == expected
            assert_close(read(model, ids, cache, 0, 12, L), dense)

    def test_yarn_has_its_factor(self) -> None:
        model = model_of("llama_yarn")
        with enable(model, "extrapolate", k=100):
            factors = [rope.scaling for rope in ropes(model)]
        assert factors == [model.model.rotary_emb.attention_scaling] * 2
        assert factors[0] > 1.1

    def test_a_global_layer_has_the_global_rope(self) -> None:
        model = model_of("gemma3")
        with enable(model, "extrapolate", k=100):
            (rope,) = ropes(model)
        rotary = model.model.rotary_emb
        assert torch.equal(rope.inv_freq, rotary.full_attention_inv_freq)
        assert not torch.equal(rope.inv_freq, rotary.sliding_attention_inv_freq)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["llama_yarn", "gemma3", "gpt_oss"])
    def test_in_any_dtype(self, family: str, dtype: torch.dtype) -> None:
        model = model_of(family)
        with enable(model, "extrapolate", k=100):
            expected = ropes(model)
        with enable(model.to(dtype), "extrapolate", k=100):
            for rope, other in zip(ropes(model), expected, strict=True):
                assert (rope.interleaved, rope.scaling) == (other.interleaved, other.scaling)

    @pytest.mark.parametrize(
        ("planted", "told"),
        [
            ("frequencies", "no rotation"),
            ("almost", "no rotation"),
            ("scaling", "no rotation"),
            ("layout", "no rotation"),
            ("doubt", "more than one rotation"),
        ],
    )
    def test_what_is_not_what_it_seems_is_refused(
        self, llama: Any, planted: str, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A rotary module that computes otherwise than its attributes say, or a layer that does."""
        rotary = llama.model.rotary_emb
        if planted in ("frequencies", "almost"):
            # The smaller error is 2e-3 of an angle at position 240, and 1e-4, a rounding, at 15.
            changed = rotary.inv_freq * (1.001 if planted == "frequencies" else 1 + 8e-6)
            monkeypatch.setattr(
                rotary, "forward", lambda x, position_ids: turn(position_ids, changed)
            )
        elif planted == "scaling":
            rotary.attention_scaling, same = 1.2, rotary.inv_freq
            monkeypatch.setattr(rotary, "forward", lambda x, position_ids: turn(position_ids, same))
        elif planted == "layout":
            monkeypatch.setattr(
                transformers.models.llama.modeling_llama,
                "apply_rotary_pos_emb",
                lambda q, k, cos, sin: (q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin),
            )
        else:
            rotary.register_buffer("other_inv_freq", rotary.inv_freq * (1 + 1e-7))
        with pytest.raises(UnsupportedProblem, match=f"LlamaAttention, layer 0\\n.*{told}"):
            enable(llama, "extrapolate", k=100)
        assert llama.config.tokenselect is None
        assert llama.config._attn_implementation == "eager"
        assert ropes(llama) == []
        assert not any(module._forward_pre_hooks for module in llama.modules())
        assert not any(module._forward_hooks for module in llama.modules())


def turn(position: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    angle = (position[..., None].float() * inv_freq).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


class TestSelection:
    """With a small k the first full layer gives what its rotated keys, moved, give by hand."""

    @pytest.mark.parametrize(
        ("family", "kind"),
        [("llama_yarn", ""), ("llama_llama3", ""), ("gemma3", "full_attention_"), ("gpt_oss", "")],
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_by_hand(
        self,
        family: str,
        kind: str,
        padded: bool,
        moving: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model, ids = model_of(family), tokens(2)
        mask = mask_of("20#", "5. 15#") if padded else None
        rotary = model.model.rotary_emb
        rope = tokenselect.Rope(
            getattr(rotary, f"{kind}inv_freq"),
            scaling=getattr(rotary, f"{kind}attention_scaling"),
        )
        results = []
        for how in ({}, moving):
            with enable(model, **SPARSE, **how, chunk=5), monkeypatch.context() as patch:
                recorder = Recorder(patch)
                model(ids, attention_mask=mask)
            full = [call for call in recorder.calls if call[4].window is None]
            results.append(full[0])
        (_, q, k, v, _, more, stayed), (_, raw_q, _, _, _, _, moved) = results
        assert not torch.equal(q, raw_q)
        assert (moved - stayed).abs().max() > 0.01 * stayed.abs().max()
        for b in range(2):
            first = 5 if padded and b == 1 else 0
            for start in range(first, L, 5):
                row = slice(b, b + 1)
                expected = tokenselect.attention(
                    q[row, :, start : start + 5],
                    k[row, :, first : start + 5],
                    v[row, :, first : start + 5],
                    **SMALL,
                    **moving,
                    n_query_means=5,
                    rope=rope,
                    scale=more["scaling"],
                    softcap=more.get("softcap"),
                    sink_logits=more.get("s_aux"),
                    backend="reference",
                )
                torch.testing.assert_close(
                    moved[row, start : start + 5], expected.transpose(1, 2), atol=2e-5, rtol=2e-5
                )

    @pytest.mark.parametrize("theta", [None, -1.0])
    def test_reading_on_is_as_a_selection_cache_has_it(
        self, llama: Any, theta: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids, cache = tokens(2), TokenSelectCache(llama)
        with enable(llama, "extrapolate", **SMALL, theta=theta, max_reuse=2):
            (rope, _), recorder = ropes(llama), Recorder(monkeypatch)
            read(llama, ids, cache, 0, *range(14, L + 1))
        twin = None if theta is None else tokenselect.SelectionCache(theta, 2)
        for module, q, k, v, _, more, out in recorder.calls:
            if module.layer_idx == 0:
                config = tokenselect.SelectConfig.extrapolate(**SMALL)
                expected = tokenselect.attention(
                    q, k, v, **config, rope=rope, scale=more["scaling"], cache=twin
                )
                torch.testing.assert_close(out, expected.transpose(1, 2))
        assert twin is None or bool((twin.hits > 0).all())
        assert (cache.hits > 0) == (theta is not None)


class TestCalls:
    """What belongs to one call of a layer stays with that call."""

    def test_threads_share_a_model(self, llama: Any) -> None:
        """Each layer waits for the other thread between its hook and its attention."""
        ids = [tokens(1), tokens(2)[1:, :13]]
        dense = [llama(each).logits for each in ids]
        barrier, results = threading.Barrier(2, timeout=1200), [Tensor(), Tensor()]

        def call(i: int) -> None:
            with torch.no_grad():
                results[i] = llama(ids[i]).logits

        def meet(module: Any, args: Any, out: Tensor) -> None:
            barrier.wait()

        with enable(llama, "extrapolate", **EVERYTHING):
            handles = [
                layer.self_attn.k_proj.register_forward_hook(meet) for layer in llama.model.layers
            ]
            threads = [threading.Thread(target=call, args=[i]) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for handle in handles:
                handle.remove()
        for actual, expected in zip(results, dense, strict=True):
            assert_close(actual, expected)

    def test_weights_that_are_offloaded(self, llama: Any, moving: dict[str, Any]) -> None:
        """They are on the device "meta", but for those of the module that runs."""
        from accelerate import cpu_offload

        expected = llama(tokens(2)).logits
        cpu_offload(llama, torch.device("cpu"), offload_buffers=True)
        assert llama.device.type == "meta"
        with enable(llama, **EVERYTHING, **moving):
            assert_close(llama(tokens(2)).logits, expected)

    @lacking("a DiffLlama that attends through the interface")
    def test_a_layer_that_attends_twice(self, moving: dict[str, Any]) -> None:
        config = transformers.DiffLlamaConfig(**SIZES)
        model = made(config)
        ids, cache = tokens(2), DynamicCache()
        dense = model(ids).logits
        with enable(model, **EVERYTHING, **moving):
            assert_close(read(model, ids, cache, 0, 12, L), dense)


class TestFarOut:
    def test_logits_do_not_depend_on_how_far_out_the_tokens_are(self, llama: Any) -> None:
        """A million tokens on, eager's float32 angles are off by more than 1e-3."""
        ids, far = tokens(2), torch.arange(L)[None] + 2**20
        true = copy.deepcopy(llama).double()(ids).logits
        dense = llama(ids, position_ids=far).logits
        with enable(llama, "extrapolate", **EVERYTHING):
            near = llama(ids).logits
            assert torch.equal(llama(ids, position_ids=far).logits, near)
        assert_close(near.double(), true)
        assert (dense - true).abs().max() > 1e-3 * true.abs().max()

    def test_raw_keys_at_a_million_are_exact(self) -> None:
        """As the tokens of such a length stand: the angles of slots up to 2**20."""
        model = model_of("llama_yarn", head_dim=32)
        with enable(model, "extrapolate", k=100):
            rope = ropes(model)[0]
        at = 2**20 - torch.arange(1000)
        x = torch.randn(1000, rope.rotary_dim)
        true = rope.reposition(x.double(), at, at)
        error = (rope.reposition(x, at, at).double() - true).norm(dim=-1) / true.norm(dim=-1)
        assert error.max() < 1e-6
        cos, sin = model.model.rotary_emb(x[None], at[None])
        halves = torch.cat([-x[:, 16:], x[:, :16]], dim=-1)
        eager = (x * cos[0] + halves * sin[0]).double()
        assert ((eager - true).norm(dim=-1) / true.norm(dim=-1)).max() > 1e-3


class TestNothingElseChanges:
    def test_a_second_model(self, model: Any) -> None:
        """Of the same class, bit for bit: before, during and after."""
        ids, other = tokens(2), copy.deepcopy(model)
        before = other(ids).logits
        with enable(model, "extrapolate", **SMALL):
            model(ids)
            assert torch.equal(other(ids).logits, before)
        assert torch.equal(other(ids).logits, before)

    def test_options_that_move_nothing_hook_nothing(self, llama: Any) -> None:
        for preset in ("faithful", "paper"):
            with enable(llama, preset, **SMALL):
                assert ropes(llama) == []
                assert not any(module._forward_pre_hooks for module in llama.modules())

    def test_a_copy_of_a_model_takes_it_along(self, llama: Any) -> None:
        ids = tokens(1)
        with enable(llama, "extrapolate", **SMALL):
            expected = llama(ids).logits
            twin = copy.deepcopy(llama)
        assert torch.equal(twin(ids).logits, expected)

    def test_enable_within_enable(self, llama: Any) -> None:
        ids, dense = tokens(1), llama(tokens(1)).logits
        with enable(llama, "extrapolate", **SMALL):
            moved = llama(ids).logits
            cache = DynamicCache()
            with enable(llama, "extrapolate", **EVERYTHING):
                assert_close(llama(ids[:, :9], past_key_values=cache).logits, dense[:, :9])
            with enable(llama, "faithful", **EVERYTHING):  # goes on with keys that are raw
                assert_close(llama(ids[:, 9:], past_key_values=cache).logits, dense[:, 9:])
            assert torch.equal(llama(ids).logits, moved)
        with enable(llama, **EVERYTHING):
            with enable(llama, "extrapolate", **SMALL):
                assert torch.equal(llama(ids).logits, moved)
            assert ropes(llama) == []
            assert_close(llama(ids).logits, dense)
        assert torch.equal(llama(ids).logits, dense)

    def test_another_attention_set_meanwhile_rotates(self, llama: Any) -> None:
        ids, cache, dense = tokens(1), DynamicCache(), llama(tokens(1)).logits
        handle = enable(llama, "extrapolate", **SMALL)
        llama(ids, past_key_values=cache)
        llama.set_attn_implementation("sdpa")
        assert_close(llama(ids).logits, dense)
        with pytest.raises(InvalidProblem, match="rotated keys, for layer 0"):
            llama(ids[:, :1], past_key_values=cache)
        llama.set_attn_implementation("tokenselect")
        llama(ids[:, :1], past_key_values=cache)
        handle.disable()
        assert torch.equal(llama(ids).logits, dense)


class TestCaches:
    """A cache holds raw keys or rotated ones, and knows it."""

    @pytest.mark.parametrize("kind", caches(None))
    @pytest.mark.parametrize("attention", ["eager", "sdpa", "tokenselect"])
    @pytest.mark.parametrize(
        "family", ["llama", pytest.param("gemma3", marks=lacking("a length of each layer"))]
    )
    def test_mixed_keys_are_refused(self, family: str, kind: str, attention: str) -> None:
        model, ids = model_of(family), tokens(1)
        model.set_attn_implementation(attention)
        layer = 0 if family == "llama" else 1
        raw, rotated = caches(model)[kind](), caches(model)[kind]()
        model(ids[:, :9], past_key_values=rotated)
        with enable(model, "extrapolate", **SMALL):
            model(ids[:, :9], past_key_values=raw)
            told = f"raw keys, for layer {layer} of a cache that holds rotated"
            with pytest.raises(InvalidProblem, match=told):
                model(ids[:, 9:10], past_key_values=rotated)
            model(ids[:, 9:10], past_key_values=raw)
        told = f"rotated keys, for layer {layer} of a cache that holds raw"
        with pytest.raises(InvalidProblem, match=told):
            model(ids[:, 10:11], past_key_values=raw)
        with pytest.raises(InvalidProblem, match=told):  # not only once
            model(ids[:, 10:11], past_key_values=copy.deepcopy(raw))

    @lacking("a reset() that empties stock caches")
    @pytest.mark.parametrize("kind", caches(None))
    def test_an_emptied_cache_takes_either(self, kind: str) -> None:
        model, ids = model_of("gemma2"), tokens(1)
        cache, dense = caches(model)[kind](), model(tokens(1)).logits
        for _ in range(2):
            with enable(model, "extrapolate", **EVERYTHING):
                assert_close(model(ids, past_key_values=cache).logits, dense)
            cache.reset()
            assert_close(model(ids, past_key_values=cache).logits, dense)
            cache.reset()

    def test_a_cache_of_another_model_is_refused_too(self, llama: Any) -> None:
        other, ids, cache = model_of("llama"), tokens(1), DynamicCache()
        with enable(llama, "extrapolate", **SMALL):
            llama(ids, past_key_values=cache)
            with pytest.raises(InvalidProblem, match="rotated keys"):
                other(ids[:, :1], past_key_values=cache)

    def test_a_cache_that_the_model_made_itself(self, llama: Any) -> None:
        ids = tokens(1)
        with enable(llama, "extrapolate", **SMALL):
            cache = llama(ids, use_cache=True).past_key_values
            returned = generated(llama, ids, return_dict_in_generate=True).past_key_values
        for filled in (cache, returned):
            assert isinstance(filled, DynamicCache)
            with pytest.raises(InvalidProblem, match="rotated keys"):
                llama(ids[:, :1], past_key_values=filled)

    def test_after_an_error_on_the_way(self, llama: Any) -> None:
        """One that stops a layer between its hook and its cache lets no rotated keys in."""
        ids, cache = tokens(1), DynamicCache()
        with enable(llama, "extrapolate", **SMALL):
            llama(ids, past_key_values=cache)
            handle = llama.model.layers[1].self_attn.q_proj.register_forward_pre_hook(stop)
            with pytest.raises(RuntimeError):
                llama(ids[:, :1], past_key_values=cache)
            handle.remove()
        cache.crop(-1)
        with pytest.raises(InvalidProblem, match="rotated keys"):
            llama(ids[:, :1], past_key_values=cache)

    def test_rows_that_move_take_their_positions_along(self, llama: Any) -> None:
        ids, mask = tokens(2), mask_of("20#", "5. 15#")
        dense = llama(ids, attention_mask=mask).logits
        cache = DynamicCache()
        with enable(llama, "extrapolate", **EVERYTHING):
            llama(ids[:, :18], attention_mask=mask[:, :18], past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([0, 2, 2, 1]))
            cache.batch_select_indices(torch.tensor([1, 3]))
            swapped = llama(
                ids.flip(0)[:, 18:], attention_mask=mask.flip(0), past_key_values=cache
            ).logits
        assert_close(swapped.flip(0), dense[:, 18:])


def stop(*_: Any) -> Any:
    raise RuntimeError


class TestPositions:
    def test_an_offset_changes_nothing(self, llama: Any) -> None:
        ids, cache = tokens(2), DynamicCache()
        with enable(llama, "extrapolate", **SMALL):
            expected = llama(ids).logits
            at = torch.tensor([[1000], [7]]) + torch.arange(L)
            first = read(llama, ids, cache, 0, 12, position_ids=at)
            with pytest.raises(UnsupportedProblem, match="not consecutive: tokens 12 to 19 "):
                llama(ids[:, 12:], past_key_values=copy.deepcopy(cache))
            llama(ids[:, 12:], position_ids=at[:, 12:], past_key_values=cache)
        with enable(llama, "extrapolate", **SMALL):
            assert torch.equal(llama(ids[:, :12]).logits, first)
            assert torch.equal(llama(ids, position_ids=at).logits, expected)

    @lacking("a reset() that empties stock caches")
    def test_an_emptied_cache_is_filled_from_another_position_on(self, llama: Any) -> None:
        ids, cache = tokens(2), DynamicCache()
        with enable(llama, "extrapolate", **EVERYTHING):
            expected = llama(ids).logits
            for start in (1000, 0, 7):
                at = start + torch.arange(L)[None]
                assert_close(read(llama, ids, cache, 0, 12, L, position_ids=at), expected)
                cache.reset()

    @pytest.mark.parametrize(
        ("skip", "told"),
        [
            (slice(10, None), r"tokens 0 to 19 of request 0, .* at 0 to 20, with token 0 at 0"),
            (slice(19, None), r"tokens 0 to 19 .* at 0 to 20, "),
        ],
    )
    def test_a_gap_is_refused(self, llama: Any, skip: slice, told: str) -> None:
        ids, at = tokens(2), torch.arange(L).repeat(2, 1)
        at[:, skip] += 1
        with enable(llama, "extrapolate", **SMALL):
            with pytest.raises(UnsupportedProblem, match=f"not consecutive: {told}"):
                llama(ids, position_ids=at, attention_mask=torch.ones_like(ids))
            assert llama(ids).logits.isfinite().all()

    def test_holes_are_gaps_unless_each_request_is_counted(self, llama: Any) -> None:
        mask = PADDINGS["holes"]
        assert mask is not None
        ids = tokens(len(mask))
        with enable(llama, "extrapolate", **SMALL):
            with pytest.raises(UnsupportedProblem, match=r"not consecutive.*\n.*cumsum\(1\)"):
                llama(ids, attention_mask=mask)
            llama(ids, attention_mask=mask, position_ids=counted(mask))

    def test_counted_in_another_way_half_way(self, llama: Any) -> None:
        """Left padding, first by slots, as without position_ids, then by tokens: a jump back."""
        ids, mask, cache = tokens(1), mask_of("5. 15#"), DynamicCache()
        with enable(llama, "extrapolate", **SMALL):
            llama(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
            with pytest.raises(UnsupportedProblem, match="tokens 7 to 14 "):
                llama(
                    ids[:, 12:],
                    attention_mask=mask,
                    position_ids=counted(mask)[:, 12:],
                    past_key_values=cache,
                )

    def test_a_request_that_pauses(self, llama: Any) -> None:
        """Padding at the end of one chunk, tokens in the next: its count goes on."""
        ids, mask, cache = tokens(2), mask_of("20#", "9# 4. 7#"), DynamicCache()
        at = counted(mask)
        with enable(llama, "extrapolate", **EVERYTHING):
            actual = read(llama, ids, cache, 0, 9, 13, 20, mask=mask, position_ids=at)
        expected = llama(ids, attention_mask=mask, position_ids=at).logits
        assert_close(actual, expected, mask)


def scaled(kind: str, **more: Any) -> Any:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
    return transformers.LlamaConfig(**SIZES, rope_parameters=rope)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
REFUSED: dict[str, tuple[Any, str]] = {
    # Their frequencies change with the length.
    "dynamic": (lambda: scaled("dynamic"), r"llama.*\n.*rope_type='dynamic'"),
    "longrope": (lambda: scaled("longrope", **LONG), r"llama.*\n.*rope_type='longrope'"),
    # Its rotation is complex, too; its chunks are met first.
    "llama_4": (
        lambda: transformers.Llama4TextConfig(
            **SIZES, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48
        ),
        "chunked attention",
    ),
    "no_rotary": (
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1
        ),
        r"GPT2Attention.*\n.*\(cos, sin\)",
    ),
    # It cannot be run to observe it: it has learned positions, 448 of them.
    "whisper": (
        lambda: transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=32,
            pad_token_id=0,
        ),
        r"whisper.*\n.*0 to 960.*IndexError",
    ),
    # Keys arrive elsewhere: it shares a layer among places, so the layer does not know its own.
    "zamba2": (
        lambda: transformers.Zamba2Config(
            **NO_HEAD_DIM | {"num_hidden_layers": 3, "num_key_value_heads": 4},
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=8,
            mamba_headdim=16,
            mamba_ngroups=1,
            n_mamba_heads=4,
            chunk_size=8,
            num_mem_blocks=1,
            adapter_rank=4,
            use_mem_rope=True,
        ),
        r"Zamba2Attention, layer -1\n.*hands its keys to a cache",
    ),
}


class TestRefusals:
    def test_config_alone(self, llama: Any) -> None:
        llama.set_attn_implementation("tokenselect")
        llama.config.tokenselect = {"score_at": "fixed"}
        told = r"LlamaAttention, layer 0\n.*score_at='fixed'.*\n.*enable\(model"
        with pytest.raises(UnsupportedProblem, match=told):
            llama(tokens(1))

    def test_two_models_with_one_config(self, llama: Any) -> None:
        """The other one rotates: it is told, where it would not know."""
        other = transformers.LlamaForCausalLM(llama.config).eval()
        with (
            enable(llama, "extrapolate", **SMALL),
            pytest.raises(UnsupportedProblem, match="cache them before rotation"),
        ):
            other(tokens(1))

    @pytest.mark.parametrize("name", REFUSED)
    def test_models(self, name: str) -> None:
        make, told = REFUSED[name]
        model = made(make())
        with pytest.raises(UnsupportedProblem, match=told):
            enable(model, "extrapolate", k=100)
        assert model.config._attn_implementation == "eager"
        if name in ("dynamic", "longrope"):
            with enable(model, **SPARSE):
                model(tokens(1))

    def test_m_rope(self) -> None:
        config = transformers.Qwen2VLConfig(
            text_config=SIZES
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            | {"bos_token_id": 1},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
            vision_start_token_id=2,
            vision_end_token_id=3,
            vision_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )
        config.text_config.rope_parameters["mrope_section"] = [1, 1, 2]
        model = transformers.Qwen2VLForConditionalGeneration._from_config(
            config, attn_implementation="eager"
        ).eval()
        with pytest.raises(UnsupportedProblem, match=r"qwen2_vl.*\n.*M-RoPE"):
            enable(model, "extrapolate", k=100)
        del config.text_config.rope_parameters["mrope_section"]
        with pytest.raises(UnsupportedProblem, match=r"3 dimensions \(M-RoPE\)|KeyError: 'mrope_"):
            enable(model, "extrapolate", k=100)

    def test_checkpointed_gradients(self, llama: Any) -> None:
        """They switch the cache off; in transformers 5.24 only where gradients are on."""
        old = llama.gradient_checkpointing_enable  # in transformers 5.4
        getattr(llama, "activation_checkpointing_enable", old)()
        llama.train()
        told = pytest.raises(UnsupportedProblem, match=r"layer 0\n.*gradients are checkpointed")
        with nullcontext() if IS_RENAMED else told:
            enable(llama, "extrapolate", k=100).disable()
        ids, dense = tokens(1), llama(tokens(1)).logits
        with enable(llama.eval(), "extrapolate", **EVERYTHING):
            assert_close(llama.train()(ids).logits, dense)

    def test_a_cache_that_cannot_be_watched(self, llama: Any) -> None:
        for module in (layer.self_attn for layer in llama.model.layers):
            module.register_forward_pre_hook(hide, with_kwargs=True)
        with pytest.raises(UnsupportedProblem, match="hands its keys to a cache"):
            enable(llama, "extrapolate", k=100)

    def test_a_layer_that_is_called_by_itself(self, llama: Any) -> None:
        from tokenselect.integrations.transformers.masks import token_mask

        hidden = torch.zeros(1, 4, 32)
        cos, sin = llama.model.rotary_emb(hidden, torch.arange(4)[None])
        layer = llama.model.layers[0].self_attn
        with enable(llama, "extrapolate", k=100):
            for given, told in (
                ({"position_embeddings": (cos, sin)}, "unknown positions"),
                ({"position_embeddings": None}, r"\(cos, sin\)"),
            ):
                with pytest.raises(UnsupportedProblem, match=told):
                    layer(hidden, **given, attention_mask=token_mask(1, 4, 4))

    def test_a_window_that_came_later(self, llama: Any) -> None:
        mistral = model_of("mistral", sliding_window=None)
        with enable(mistral, "extrapolate", **SMALL):
            mistral.config.sliding_window = WINDOW
            for layer in mistral.model.layers:
                layer.self_attn.sliding_window = WINDOW
            with pytest.raises(UnsupportedProblem, match="a window of 6, where it saw everything"):
                mistral(tokens(1))

    def test_keys_that_came_past_the_hook(self, llama: Any) -> None:
        """As from code that was compiled without it."""
        with enable(llama, "extrapolate", k=100):
            llama.model.layers[1].self_attn._forward_pre_hooks.clear()
            with pytest.raises(UnsupportedProblem, match=r"layer 1\n.*rotated.*before enable\(\)"):
                llama(tokens(1))

    @pytest.mark.slow
    def test_compiled_before_or_after(self) -> None:
        """What was compiled without hooks gets them, and what was compiled with them is let go."""
        model, ids = model_of("gemma2"), tokens(1)
        dense = model(ids).logits
        torch._dynamo.reset()
        model.compile(backend="eager")
        model.set_attn_implementation("tokenselect")
        model.config.tokenselect = dict(EVERYTHING)
        assert_close(model(ids).logits, dense)
        with enable(model, "extrapolate", **EVERYTHING):
            assert_close(model(ids).logits, dense)
            torch._dynamo.reset()
            assert_close(model(ids).logits, dense)
        assert_close(model(ids).logits, dense)
        torch._dynamo.reset()


def hide(module: Any, args: Any, given: Any) -> Any:
    return args, given | {CACHE: Hidden(DynamicCache())}


class Hidden:
    """A cache that is no `Cache`."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
