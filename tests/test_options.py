"""Options of models of transformers: k as a fraction."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import mask_of, model_of, tokens
from tokenselect.integrations.transformers import enable, recorded

TENTHS: dict[str, Any] = {"k": 0.3, "n_sink": 1, "n_local": 2}


@pytest.fixture
def llama() -> Any:
    return model_of("llama")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_fraction_is_of_the_tokens_of_each_request(llama: Any) -> None:
    mask = mask_of("20#", "5. 15#")
    with enable(llama, **TENTHS, chunk=1), recorded() as infos:
        llama(tokens(2), attention_mask=mask)
    counts = [info.selection.count.tolist() for info in infos]
    assert (
        counts[:20] == counts[35:55] == [[[min(n, 1 + -(-3 * n // 10) + 2)]] for n in range(1, 21)]
    )
    assert counts[20:35] == counts[:15]


def test_logits_warn_where_a_fraction_leaves_tokens_out(llama: Any) -> None:
    with enable(llama, **TENTHS, chunk=8), pytest.warns(UserWarning, match="chose together"):
        llama(tokens(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with enable(llama, **TENTHS | {"k": 0.9}, chunk=8):  # of 20 tokens, 18 between 1 and 2
            llama(tokens(1))


def test_a_fraction_is_saved_with_the_config(llama: Any, tmp_path: Any) -> None:
    llama.config.tokenselect = TENTHS | {"k_min": 2, "k_max": 4, "chunk": 1}
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
