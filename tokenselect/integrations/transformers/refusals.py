"""The errors that name a layer or a model."""

from typing import Any

from tokenselect.errors import UnsupportedProblem

INTEGRATION = "tokenselect.integrations.transformers"


def refusal(module: Any, why: str | list[str], fix: str) -> UnsupportedProblem:
    """The error that names the layer."""
    whys = [why] if isinstance(why, str) else why
    layer = getattr(module, "layer_idx", None)
    name = type(module).__name__ + ("" if layer is None else f", layer {layer}")
    return UnsupportedProblem(name, {INTEGRATION: whys}, fix)


def refuse_mla(config: Any) -> UnsupportedProblem:
    """The error for multi-head latent attention."""
    why = (
        f"multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): the cache holds "
        "latents, and making keys of all of them at each step is the cost selection is to save"
    )
    return UnsupportedProblem(
        f"a {config.model_type} model",
        {INTEGRATION: [why]},
        "run it densely: attn_implementation='sdpa' or 'eager'",
    )
