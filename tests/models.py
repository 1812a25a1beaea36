"""Small random models of the families that the integration is tested with, and what to ask of them.

Tolerance: with k >= the length both sides are the same sums of the same float32 numbers in another
order. Two layers of width 32 take a few hundred additions from a key to a logit, each good to 6e-8
of what is added: 2e-5 of the largest logit is ten times what that comes to, and a mistake in a
mask, an offset or a head is a thousand times more.
"""

import functools
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    if os.environ.get("CI"):
        pytest.fail("NOT TESTED: the integration; transformers is not installed", pytrace=False)
    pytest.skip("NOT TESTED: transformers is not installed", allow_module_level=True)

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    modeling_utils,
)

from tokenselect.integrations.transformers import TokenSelectCache
from tokenselect.integrations.transformers.cache import GrowableLayer

VOCABULARY = 61
WINDOW = 6
EVERYTHING: dict[str, Any] = {"k": 64, "n_sink": 2, "n_local": 3, "prefill": "selected"}
SMALL: dict[str, Any] = {"k": 3, "n_sink": 1, "n_local": 2}
# Every token of a prompt selects.
STEPWISE: dict[str, Any] = {"prefill": "selected", "chunk": 1}
# What `enable` takes, so that prompts are read with it too.
SPARSE: dict[str, Any] = {**SMALL, "prefill": "selected"}
OTHERWISE: dict[str, Any] = {**SMALL, "vote": "logit", "scope": "group", "pool": 3}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Large enough for attention to be far from uniform: logits of a few units.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NO_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# The name by which models take a cache: another one from 5.24 on. They go on taking the old one,
# which tests mostly use, but warn of it.
IS_RENAMED = "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if IS_RENAMED else "past_key_values"
THE_OLD_NAME = "ignore:`past_key_values` is deprecated:FutureWarning"

MOVING: dict[str, dict[str, Any]] = {
    "fixed": {"positions": "contiguous", "score_at": "fixed"},
    "split": {"positions": "contiguous", "score_at": "split"},
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_yarn": lambda: LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama_llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2_sliding": lambda: Qwen2Config(**SIZES, use_sliding_window=True, **BOTH_KINDS),
    "qwen3": lambda: Qwen3Config(**SIZES),
    # The caps are far below the usual 50 and 30, so that they bite.
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        **BOTH_KINDS,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=5,
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **BOTH_KINDS, query_pre_attn_scalar=5),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, **BOTH_KINDS, num_local_experts=3, num_experts_per_tok=2, rope_parameters=YARN
    ),
}


def made(config: Any, attention: str = "eager") -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def model_of(family: str, **changes: Any) -> Any:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return made(config)


def put(target: Path, config: Any, has_tokenizer: bool = True) -> Path:
    """Put a random model of a config, with a tokenizer of bytes, into a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if has_tokenizer:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


L = 20


@functools.cache
def shared(family: str) -> Any:
    """A model that tests leave as it was."""
    return model_of(family)


def tokens(batch: int, length: int = L) -> Tensor:
    """(batch, length) token ids, none of them the padding token."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def mask_of(*rows: str) -> Tensor:
    """(batch, L) from, for each request, its runs of padding and tokens: "5. 15#"."""
    bits = [[part[-1] == "#"] * int(part[:-1]) for row in rows for part in [*row.split()]]
    flat = torch.tensor([bit for part in bits for bit in part])
    return flat.view(len(rows), L).long()


PADDINGS: dict[str, Tensor | None] = {
    "none": None,
    "left": mask_of("20#", "5. 15#", "5. 15#", "13. 7#"),
    "right": mask_of("16# 4.", "16# 4.", "20#"),
    "mixed": mask_of("3. 17#", "12# 8.", "4. 9# 7.", "20#", "20."),
    "holes": mask_of("20#", "8# 4. 8#", "2. 5# 3. 6# 4."),
}


def counted(mask: Tensor) -> Tensor:
    """Each token's number in its request, as generate counts positions."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def read(
    model: Any, ids: Tensor, cache: Any, *ends: int, mask: Tensor | None = None, **given: Tensor
) -> Tensor:
    """Logits of ids[:, ends[0] : ends[-1]], read up to each end in turn; `given` goes along."""
    parts = []
    for start, end in itertools.pairwise(ends):
        more = {name: value[:, start:end] for name, value in given.items()}
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, **more)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def assert_close(actual: Tensor, expected: Tensor, real: Tensor | None = None) -> None:
    """Logits (B, L, V) agree at real tokens (B, L), within 2e-5 of the largest."""
    assert expected.abs().max() > 0.1
    atol = 2e-5 * float(expected.abs().max())
    if real is not None:
        actual, expected = actual[real.bool()], expected[real.bool()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def caches(model: Any) -> dict[str, Callable[[], Any]]:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic_without_config": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=L + 3),
        "ours": lambda: TokenSelectCache(model),
        "ours_with_room": lambda: TokenSelectCache(model.config, max_length=L),
    }


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "prefill_in_chunks": {"prefill_chunk_size": 6},
}


def lacking(what: str) -> Any:
    """A mark for tests of what transformers 5.4 lacks, and every newer version is tested with."""
    is_old = transformers.__version__.startswith("5.4.")
    return pytest.mark.skipif(is_old, reason=f"transformers 5.4 lacks {what}")


def has_full_attention(model: Any) -> bool:
    return any(isinstance(layer, GrowableLayer) for layer in TokenSelectCache(model).layers)


def generated(model: Any, ids: Tensor, **how: Any) -> Tensor:
    torch.manual_seed(3)
    how = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0} | how
    return model.generate(ids, **how)


def state(model: Any) -> Any:
    """All that `enable` may change of a model."""
    return model.config.to_dict(), [
        (name, set(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    ]


class Recorder:
    """Stands in for the registered attention function, and keeps what each layer got and gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor, Tensor, Any, dict[str, Any], Tensor]] = []
        # Not by a name of this module, whose `Alone` does not know the interface.
        interface = modeling_utils.ALL_ATTENTION_FUNCTIONS
        self.attend = interface["tokenselect"]
        monkeypatch.setitem(interface._global_mapping, "tokenselect", self)

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        out, weights = self.attend(module, q, k, v, mask, **more)
        self.calls.append((module, q, k, v, mask, more, out))
        return out, weights


class Alone(PreTrainedModel):
    """A model of the kind that a repository brings along: it attends in code of its own."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Around(PreTrainedModel):
    """Another one, made of a model of transformers."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state
