"""Check that each causal language model of transformers, small and random, is right or refused.

    python -m tests.sweep [TYPE ...]

The logits of a prompt, padded or not, and of tokens decoded after it with a TokenSelectCache are
compared with stock eager attention where everything is selected. Where little is selected they have
to differ, or the model would attend densely without a word. `Lossless` has to write the tokens of
dense attention, or to refuse the model's cache. Prints the types by what came of them.
Exit code 1 if a type is neither right nor refused with an error of ours, is refused without
standing in REFUSED for that reason and in the docs, or cannot be built and does not stand in
NOT_BUILT.
"""

import inspect
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import (
    CACHE,
    EVERYTHING,
    SIZES,
    SMALL,
    SPARSE,
    WINDOW,
    L,
    generated,
    mask_of,
    tokens,
)
from tokenselect.errors import InvalidProblem, TokenSelectError
from tokenselect.integrations.transformers import Lossless, TokenSelectCache, enable
from tokenselect.integrations.transformers.cache import slides_everywhere

# Why types are refused: what the error says, and which they are.
REFUSED: dict[str, tuple[str, str]] = {
    "no attention, or one in code of its own": (
        "none of its layers calls transformers' AttentionInterface",
        """big_bird bloom codegen cpmant falcon falcon_mamba gpt_neo gpt_neox_japanese gptj mamba
        mamba2 megatron-bert mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr xglm
        xlm xlnet""",
    ),
    "multi-head latent attention": (
        "multi-head latent attention",
        """axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite
        glm_moe_dsa hy_v4 kimi_linear minicpm3 sarvam_mla
        youtu""",
    ),
    "reads its masks itself": ("reads its masks itself", "deepseek_v4 doge"),
    "a bias of positions": (
        "position_bias: selected keys get no bias",
        "inkling2_loop_text inkling2_text inkling_text",
    ),
    "chunked attention": ("chunked attention", "llama4_text"),
    "a decoder that says it is not causal": ("is_causal=False", "bigbird_pegasus"),
    "takes no cache but its own": ("uses cache of its own", "minimax"),
}

# Types that have no small model here.
NOT_BUILT: dict[str, str] = {
    "made of parts, of which that for text is another type": """dots3_note emu3 fuyu gemma3 gemma3n
        gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant got_ocr2 llama4 mllama
        moss_transcribe_diarize qwen3_5 qwen3_5_moe qwen4_exp""",
    "parts of fixed sizes": "blt git musicgen musicgen_melody phi4_multimodal",
    "no small sizes that fit were found": """dbrx dory dots3_note_text longcat_flash
        qwen4_exp_text xlstm""",
}

# Other names of the sizes in tests.models.SIZES.
ALSO = {
    "hidden_size": "n_embd d_model emb_dim embedding_size dim model_dim",
    "intermediate_size": """n_inner d_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim
        moe_intermediate_size ffn_hidden_size intermediate_size_mlp shared_expert_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size""",
    "num_hidden_layers": "n_layer n_layers num_layers decoder_layers encoder_layers",
    "num_attention_heads": """n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads""",
    "vocab_size": "decoder_vocab_size",
    "max_position_embeddings": "n_positions",
    "initializer_range": "init_std",
}
# And sizes that only some have.
OTHERS: dict[str, Any] = {
    "is_decoder": True,
    "rotary_dim": 4,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "mamba_headdim", "state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
BOTH = ["sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention"]
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": BOTH,
        "sliding_window": WINDOW,
        "rope_parameters": {one: {"rope_type": "default", "rope_theta": 1e4} for one in BOTH},
    },
    "cpmant": {"prompt_length": 0},
    "deepseek_v4": {
        "sliding_window": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [48, 48],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"sliding_window": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {"sliding_window": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local"], "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "transformers.md"
LARGEST = 8_000_000  # parameters
MASK = mask_of("20#", "5. 15#")


def small(kind: str) -> Any:
    """Return a small config of a type, with layers of full attention."""
    made = CONFIG_MAPPING[kind]
    fields = {*inspect.signature(made).parameters, *getattr(made, "__dataclass_fields__", ())}
    sizes = {
        name: size for one, size in SIZES.items() for name in (one, *ALSO.get(one, "").split())
    } | OTHERS
    if "qk_rope_head_dim" in fields:
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(made(), "layer_types", None) or ()))
    sizes["sliding_window"] = WINDOW if "sliding_attention" in kinds else None
    if len(kinds) > 1:  # a layer of each
        depth = dict.fromkeys(("num_hidden_layers", *ALSO["num_hidden_layers"].split()), len(kinds))
        sizes |= {"layer_types": kinds, **depth}
    sizes = {name: size for name, size in sizes.items() if name in fields}
    return made(**sizes | MORE.get(kind, {}))


def build(kind: str) -> Any:
    """Return a small model of a type, its weights random."""
    config = small(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    size = sum(weight.numel() for weight in model.parameters())
    assert size <= LARGEST, f"{size} parameters"
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def decoded_logits(model: Any, cache: Any) -> Tensor:
    """Return logits of a prompt of 12 tokens and of those after it, one by one."""
    parts = tokens(2).split([12] + [1] * (L - 12), 1)
    return torch.cat([model(part, **{CACHE: cache}).logits for part in parts], 1)


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error as a share of the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


def prompt_logits(model: Any) -> list[Tensor]:
    """Return logits of a prompt, and of a padded one."""
    ids, padded = tokens(2), tokens(2).where(MASK.bool(), 0)
    return [model(ids).logits, model(padded, attention_mask=MASK).logits[MASK.bool()]]


def fault_of(model: Any) -> str:
    """Return what is wrong with a model, "" if nothing; raises what it is refused with.

    10 times the tolerance of tests.models: some of these are deeper, and run in loops.
    """
    actual = []
    for how in ({"prefill": "selected"}, {"prefill": "dense", "dense_below": 15}):
        with enable(model, **EVERYTHING | how):
            actual += [*prompt_logits(model), decoded_logits(model, TokenSelectCache(model))]
    expected = [*prompt_logits(model), decoded_logits(model, DynamicCache(config=model.config))]
    errors = [error_of(*pair) for pair in zip(actual, expected * 2, strict=True)]
    if not max(errors) < 2e-4:
        return (
            f"off by {errors} of the largest logit: prompt, padded prompt, decoded; "
            "first selected, then dense"
        )
    if slides_everywhere(model.config):
        return ""
    with enable(model, **SPARSE, chunk=1):
        if not error_of(model(tokens(2)).logits, expected[0]) > 1e-3:
            return "dense where little is to be selected"
    if not is_lossless(model):
        return "Lossless writes what dense attention would not"
    return ""


def is_lossless(model: Any) -> bool:
    """Return whether `Lossless` writes what dense attention does; True if it refuses the cache."""
    expected = generated(model, tokens(2))
    try:
        with enable(model, **SMALL):
            return generated(model, tokens(2), custom_generate=Lossless(4)).equal(expected)
    except InvalidProblem as error:
        if "Lossless with" not in str(error) or "cache" not in str(error):
            raise
        return True


def try_type(kind: str) -> tuple[str, str]:
    """Return what came of a type, and the fault if that is one."""
    listed = [why for why, kinds in NOT_BUILT.items() if kind in kinds.split()]
    if listed:
        return f"not built: {listed[0]}", ""
    try:
        model = build(kind)
        model(tokens(2))
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        wrong = fault_of(model)
        return ("wrong", wrong) if wrong else ("right", "")
    except Exception as error:
        why = [why for why, (told, _) in REFUSED.items() if re.search(told, str(error))]
        if not why and not isinstance(error, TokenSelectError):
            return "wrong", f"{type(error).__name__}: {error}"
        if not why or kind not in REFUSED[why[0]][1].split():
            return "refused for no listed reason", str(error)
        return f"refused: {why[0]}", ""


def main(kinds: Iterable[str]) -> int:
    """Try the types, all if none is named; return the exit code."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, faults = defaultdict(list), {}
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with torch.no_grad():
            what, fault = try_type(kind)
        found[what].append(kind)
        if fault:
            faults[kind] = fault
    for what, which in sorted(found.items()):
        print(f"\n{what} ({len(which)})\n  {' '.join(which)}")
    listed = {kind for _, kinds in REFUSED.values() for kind in kinds.split()}
    untold = sorted(kind for kind in listed if f"`{kind}`" not in PAGE.read_text("utf-8"))
    faults |= dict.fromkeys(untold, f"not in {PAGE.name}")
    for kind, fault in faults.items():
        print(f"\n✗ {kind}: {fault}")
    print("\nlisted as refused, but right:", *sorted(listed & set(found["right"])) or ["none"])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
