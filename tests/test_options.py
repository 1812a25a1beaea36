"""Options of models of transformers: k as a fraction, and layers with options of their own."""

import warnings
from typing import Any

import numpy
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.models import (
    EVERYTHING,
    MOVING,
    SIZES,
    SMALL,
    STEPWISE,
    THE_OLD_NAME,
    assert_close,
    generated,
    lacking,
    made,
    mask_of,
    model_of,
    tokens,
)
from tokenselect import InvalidProblem
from tokenselect.integrations.options import parse
from tokenselect.integrations.transformers import TokenSelectCache, enable, recorded

pytestmark = [pytest.mark.filterwarnings(THE_OLD_NAME), pytest.mark.usefixtures("no_grad")]

TENTHS: dict[str, Any] = {"k": 0.3, "n_sink": 1, "n_local": 2}


def test_a_fraction_is_of_the_tokens_of_each_request(llama: Any) -> None:
    mask = mask_of("20#", "5. 15#")
    with enable(llama, **TENTHS, **STEPWISE), recorded() as infos:
        llama(tokens(2), attention_mask=mask)
    counts = [info.selection.count.tolist() for info in infos]
    assert (
        counts[:20] == counts[35:55] == [[[min(n, 1 + -(-3 * n // 10) + 2)]] for n in range(1, 21)]
    )
    assert counts[20:35] == counts[:15]


def test_logits_warn_where_a_fraction_leaves_tokens_out(llama: Any) -> None:
    in_eights = {"prefill": "selected", "chunk": 8}
    with (
        enable(llama, **TENTHS, **in_eights),
        pytest.warns(UserWarning, match="chose together"),
    ):
        llama(tokens(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with enable(llama, **TENTHS | in_eights | {"k": 0.9}):  # of 20 tokens, 18 between 1 and 2
            llama(tokens(1))


def test_a_fraction_is_saved_with_the_config(llama: Any, tmp_path: Any) -> None:
    llama.config.tokenselect = TENTHS | {"k_min": 2, "k_max": 4} | STEPWISE
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tokenselect")
    assert loaded.config.tokenselect == llama.config.tokenselect
    with enable(llama, **llama.config.tokenselect):
        expected = llama(tokens(1)).logits
    with recorded() as infos:
        assert torch.equal(loaded.eval()(tokens(1)).logits, expected)
    assert infos[-1].selection.count.item() == 1 + 4 + 2


def test_the_size_of_a_selection_is_known_by_its_k_max(llama: Any) -> None:
    told = r"n_sink \+ k_max \+ n_local = 16 \+ 113 \+ 128 = 257 tokens, in a model for 256"
    with pytest.warns(UserWarning, match=told):
        enable(llama, "extrapolate", k=0.1, k_max=113).disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable(llama, "extrapolate", k=0.1, k_max=112).disable()
        enable(llama, "extrapolate", k=0.1).disable()
        enable(llama, "extrapolate", k=112, layers={0: "dense", 1: {"k": 0.1}}).disable()
    with pytest.warns(UserWarning, match=r"16 \+ 113 \+ 128") as told_once:
        enable(llama, "extrapolate", k=113, layers={0: {"n_sink": 16}, 1: "dense"}).disable()
    assert len(told_once) == 1
    with pytest.warns(UserWarning, match=r"16 \+ 113 \+ 128"):
        enable(llama, "extrapolate", k=1, layers={1: {"k": 113}}).disable()


# --- layers by number ---------------------------------------------------------------------

FOUR = {"num_hidden_layers": 4}


def counts_by_layer(infos: list[Any], layers: int = 3) -> list[list[int]]:
    """The sizes of the selections that each layer made that is not dense, token by token."""
    counts = torch.tensor([int(info.selection.count) for info in infos])
    return counts.view(layers, -1).tolist()


@pytest.mark.parametrize("last", [3, -1])
def test_layers_have_options_of_their_own(last: int) -> None:
    model = model_of("llama", **FOUR)
    layers = {0: "dense", 1: {"k": 5, "n_sink": 2}, last: {"k": 0.5}}
    with enable(model, **SMALL, **STEPWISE, layers=layers), recorded() as infos:
        model(tokens(1))
    n = range(1, 21)
    assert counts_by_layer(infos) == [
        [min(i, 2 + 5 + 2) for i in n],
        [min(i, 1 + 3 + 2) for i in n],
        [min(i, 1 + -(-i // 2) + 2) for i in n],
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("how", ["at_true_positions", *MOVING])
def test_a_dense_layer_is_that_of_the_model(family: str, how: str) -> None:
    """Whatever the others do: here they are the only one, or slide."""
    model = model_of(family, **{"num_hidden_layers": 1} if family == "llama" else {})
    ids, mask = tokens(2), mask_of("20#", "5. 15#")
    expected = model(ids, attention_mask=mask).logits
    options = SMALL | MOVING.get(how, {}) | {"prefill": "selected", "chunk": 7}
    options |= {"layers": {-1: "dense"}}
    with enable(model, **options):
        assert_close(model(ids, attention_mask=mask).logits, expected, mask)


def test_one_layer_alone_may_move_keys() -> None:
    model = model_of("llama")
    layers = {1: {"positions": "contiguous", "score_at": "split"}}
    with enable(model, **EVERYTHING, layers=layers):
        moved = model(tokens(1)).logits
    assert_close(moved, model(tokens(1)).logits)
    with enable(model, **SMALL, **STEPWISE, layers={0: "dense"} | layers):
        one = model(tokens(1)).logits
    with enable(model, **SMALL, **STEPWISE, **layers[1], layers={0: "dense"}):
        assert torch.equal(model(tokens(1)).logits, one)
    with enable(model, **SMALL, **STEPWISE, layers={0: "dense"}):
        assert not torch.equal(model(tokens(1)).logits, one)


def test_one_layer_alone_may_reuse_selections() -> None:
    model = model_of("llama")
    cache = TokenSelectCache(model)
    with enable(model, **SMALL, layers={1: {"theta": -1.0}}), recorded() as infos:
        generated(model, tokens(1), past_key_values=cache)
    reused = [bool(info.reused) for info in infos]
    assert cache.hits > 0
    assert not any(reused[0::2])
    assert all(reused[3::2])


def test_layers_are_saved_with_the_config(tmp_path: Any) -> None:
    model = model_of("llama", **FOUR)
    layers = {0: "dense", -1: {"k": numpy.int64(5), "theta": None}}
    model.config.tokenselect = SMALL | STEPWISE | {"layers": layers}
    as_json = {"0": "dense", "-1": {"k": 5, "theta": None}}
    assert model.config.tokenselect["layers"] == as_json
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tokenselect")
    assert loaded.config.tokenselect == model.config.tokenselect
    with enable(model, **SMALL, **STEPWISE, layers=layers) as handle:
        assert model.config.tokenselect["layers"] == as_json
        expected = model(tokens(1)).logits
        handle.disable()
    assert model.config.tokenselect == loaded.config.tokenselect
    with recorded() as infos:
        assert torch.equal(loaded.eval()(tokens(1)).logits, expected)
    assert [counts[-1] for counts in counts_by_layer(infos)] == [6, 6, 8]


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("llama", {2: "dense"}, "layers names layer 2.*2 layers, 0 to 1; -1 is the last"),
        ("llama", {-3: {"k": 5}}, "layers names layer -3.*2 layers"),
        ("llama", {1: "dense", -1: {}}, "layers names layer 1 twice, as 1 and as -1"),
        ("llama", {1: "dense", "1": {}}, "layers names '1' again"),
        ("llama", {"first": "dense"}, "layers names 'first'"),
        ("llama", {True: "dense"}, "layers names True"),
        ("llama", {0.0: "dense"}, "layers names 0.0"),
        ("llama", ["dense"], "layers is a list"),
        ("llama", None, "layers is a NoneType"),
        ("llama", {0: "dens"}, "layer 0 is 'dens'"),
        ("llama", {0: 5}, "layer 0 is 5"),
        ("llama", {0: {"kk": 5}}, r"option 'kk' of layer 0\n.*options of layer 0 are k, .*, theta"),
        ("llama", {0: {"chunk": 5}}, "option 'chunk' of layer 0"),
        ("llama", {0: {"k": -1}}, "layer 0: k=-1"),
        ("llama", {-1: {"theta": 2}}, "layer -1: theta=2"),
        ("gemma2", {0: "dense"}, "layer 0, which slides\n.*\n.*such layers are 1"),
        ("gemma2", {-2: {}}, "layer -2, which slides"),
        ("mistral", {0: "dense"}, "layer 0, which slides\n.*\n.*such layers are none here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["enabled", "configured"])
def test_layers_that_cannot_be(family: str, layers: Any, message: str, how: str) -> None:
    model = model_of(family)
    before = model(tokens(1)).logits
    if how == "enabled":
        with pytest.raises(InvalidProblem, match=f"(?s){message}"):
            enable(model, **SMALL, layers=layers)
        assert torch.equal(model(tokens(1)).logits, before)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all layers of a mistral")
        model.set_attn_implementation("tokenselect")
    model.config.tokenselect = SMALL | {"layers": layers}
    with pytest.raises(InvalidProblem, match=f"(?s){message}"):
        model(tokens(1))


@lacking("layers of caches that do not attend")
def test_a_layer_that_does_not_attend_cannot_be_named() -> None:
    config = transformers.Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 2},
        layer_types=["linear_attention", "full_attention"],
        num_experts=2, num_experts_per_tok=1, decoder_sparse_step=5,
    )  # fmt: skip
    model = made(config)
    with pytest.raises(InvalidProblem, match="layer 0, which does not attend"):
        enable(model, **SMALL, layers={0: "dense"})
    with enable(model, **SMALL, layers={1: "dense"}):
        pass


def test_layers_that_share_keys() -> None:
    """They can be named, and reuse their own selections."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4},
        layer_types=kinds, sliding_window=6, num_kv_shared_layers=2, altup_num_inputs=2,
        vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = made(config)
    with enable(model, **SMALL, **STEPWISE, layers={3: {"k": 5}}), recorded() as infos:
        model(tokens(1))
    assert [counts[-1] for counts in counts_by_layer(infos, 2)] == [6, 8]
    with pytest.raises(InvalidProblem, match=r"layer -2, which slides\n.*\n.*such layers are 1, 3"):
        enable(model, **SMALL, layers={-2: "dense"})
    with enable(model, **SMALL, theta=-1.0, layers={3: {"k": 5}}):
        cache = TokenSelectCache(model)
        generated(model, tokens(1), past_key_values=cache)
    assert (cache.hits, cache.misses) == (2 * 6, 2)


def test_each_query_of_a_chunk_votes_unless_told_otherwise(llama: Any) -> None:
    """Where prompts are read selecting; the paper's mean is the preset's own."""

    def voters(*preset: str, **options: Any) -> int:
        with enable(llama, *preset, **options):
            return parse(llama.config.tokenselect).select.n_query_means

    assert voters() == voters(chunk=7) == 1
    assert voters(prefill="selected") == 512
    assert voters("faithful", prefill="selected", chunk=7) == 7
    assert voters(prefill="selected", n_query_means=2) == 2
    assert voters("paper") == voters("extrapolate", k=16, chunk=7) == 1
    assert voters("extrapolate", k=16, n_query_means=3) == 3
    ids = tokens(1)
    with enable(llama, **SMALL, prefill="selected", chunk=5):
        each = llama(ids).logits
    with enable(llama, **SMALL, prefill="selected", chunk=5, n_query_means=1):
        mean = llama(ids).logits
    assert (each - mean).abs().max() > 1e-3
