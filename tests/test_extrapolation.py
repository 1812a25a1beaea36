"""Options that move keys, in models of transformers: raw caches, and how a model is seen to rotate.

While keys stay raw, all of a model's rotation is tokenselect's: a wrong frequency, layout, scaling
or position shows where everything is selected, against stock eager attention. The tolerance is that
of tests/models.py.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    if os.environ.get("CI"):
        pytest.fail("NOT TESTED: the integration; transformers is not installed", pytrace=False)
    pytest.skip("NOT TESTED: transformers is not installed", allow_module_level=True)


from tests.models import (
    EVERYTHING,
    FAMILIES,
    MODES,
    PADDINGS,
    assert_close,
    caches,
    generated,
    has_full_attention,
    mask_of,
    model_of,
    shared,
    tokens,
)
from tokenselect.integrations.transformers import TokenSelectCache, enable
from tokenselect.integrations.transformers.cache import RawKeys

MOVING: dict[str, dict[str, Any]] = {
    "fixed": {"positions": "contiguous", "score_at": "fixed"},
    "split": {"positions": "contiguous", "score_at": "split"},
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A model of each family; tests leave it as it was."""
    return shared(request.param)


@pytest.fixture
def llama() -> Any:
    return model_of("llama")


@pytest.fixture(params=MOVING)
def moving(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MOVING[request.param]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def counted(mask: Tensor) -> Tensor:
    """Each token's number in its request, as generate counts positions."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class TestEverythingSelected:
    """Nothing moves, but every rotation is tokenselect's own: stock eager's logits again."""

    @pytest.mark.parametrize("chunk", [512, 7])
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_prompt(self, model: Any, moving: dict[str, Any], padding: str, chunk: int) -> None:
        mask = PADDINGS[padding]
        ids = tokens(2 if mask is None else len(mask))
        at = {} if mask is None or padding != "holes" else {"position_ids": counted(mask)}
        expected = model(ids, attention_mask=mask, **at).logits
        with enable(model, **EVERYTHING, **moving, chunk=chunk):
            actual = model(ids, attention_mask=mask, **at).logits
        assert actual.isfinite().all()
        assert_close(actual, expected, mask)
        again = model(ids, attention_mask=mask, **at).logits
        assert torch.equal(again, expected)

    @pytest.mark.parametrize("kind", caches(None))
    @pytest.mark.parametrize("padding", ["none", "left", "holes"])
    def test_steps(self, model: Any, moving: dict[str, Any], kind: str, padding: str) -> None:
        mask = PADDINGS[padding]
        ids = tokens(2 if mask is None else len(mask))
        position = None if mask is None else counted(mask)
        expected = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        cache, logits = caches(model)[kind](), []
        with enable(model, **EVERYTHING, **moving, chunk=4):
            for start, end in ((0, 9), (9, 10), (10, 11), (11, 15), (15, 16), (16, 17), (17, 20)):
                out = model(
                    ids[:, start:end],
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=None if position is None else position[:, start:end],
                    past_key_values=cache,
                )
                logits.append(out.logits)
        assert_close(torch.cat(logits, 1), expected, mask)
        assert isinstance(cache, RawKeys) == has_full_attention(model)

    @pytest.mark.parametrize("mode", MODES)
    def test_generate(self, model: Any, mode: str) -> None:
        mask = mask_of("20#", "5. 15#", "5. 15#", "13. 7#")
        ids = tokens(4).where(mask.bool(), 0)
        expected = generated(model, ids, attention_mask=mask, **MODES[mode])
        with enable(model, "extrapolate", **EVERYTHING):
            actual = generated(model, ids, attention_mask=mask, **MODES[mode])
        assert actual.tolist() == expected.tolist()

    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    def test_generate_with_reuse(self, model: Any, mode: str) -> None:
        mask = mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        expected = generated(model, ids, attention_mask=mask, **MODES[mode])
        cache = TokenSelectCache(model)
        with enable(model, "extrapolate", **EVERYTHING, theta=-1.0):
            actual = generated(
                model, ids, attention_mask=mask, past_key_values=cache, **MODES[mode]
            )
        assert actual.tolist() == expected.tolist()
        assert (cache.hits > 0) == has_full_attention(model)

    @pytest.mark.parametrize("assistant", ["prompt_lookup", "draft"])
    def test_assisted(self, model: Any, assistant: str) -> None:
        """The draft is the model itself, or another one, which goes on rotating."""
        ids = tokens(1).repeat(1, 2)
        # A draft takes the padding token for padding also where it was generated: a hole.
        plain: dict[str, Any] = {"suppress_tokens": [0]}
        how: dict[str, Any] = {"prompt_lookup_num_tokens": 3} | plain
        if assistant == "draft":
            how = {"assistant_model": model} | plain
        expected = generated(model, ids, **plain)
        with enable(model, "extrapolate", **EVERYTHING):
            cache = TokenSelectCache(model)
            assert generated(model, ids, past_key_values=cache, **how).tolist() == expected.tolist()
            if assistant == "draft":
                how = {"assistant_model": model_of("llama")} | plain
            assert generated(model, ids, **how).tolist() == expected.tolist()

    def test_compiled_over_a_static_cache(self) -> None:
        from transformers import CompileConfig

        how = CompileConfig(backend="eager", mode=None)
        how._compile_all_devices = True
        model, mask = model_of("gemma2"), mask_of("20#", "5. 15#")
        ids = tokens(2).where(mask.bool(), 0)
        options = {"cache_implementation": "static", "compile_config": how, "attention_mask": mask}
        torch._dynamo.reset()
        expected = generated(model, ids, attention_mask=mask)
        torch._dynamo.utils.counters.clear()
        with enable(model, "extrapolate", **EVERYTHING):
            actual = generated(model, ids, **options)
        assert actual.tolist() == expected.tolist()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert generated(model, ids, **options).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("dtype", "family", "bound"),
        [(torch.bfloat16, "gpt_oss", 0.1), (torch.float16, "gemma3", 0.02)],
    )
    def test_other_dtypes(self, dtype: torch.dtype, family: str, bound: float) -> None:
        model, mask = model_of(family).to(dtype), PADDINGS["left"]
        assert mask is not None
        ids = tokens(len(mask))
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        with enable(model, "extrapolate", **EVERYTHING):
            actual = model(ids, attention_mask=mask).logits[mask.bool()]
        assert (actual - expected).abs().max() / expected.abs().max() < bound
