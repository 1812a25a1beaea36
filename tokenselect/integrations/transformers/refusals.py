"""The errors that name a layer, a model, or its arguments."""

from typing import Any

from tokenselect.errors import UnsupportedProblem


class Refusal(UnsupportedProblem):
    """A model, or a call of it, that is beyond this integration; nothing was computed."""

    def __init__(self, what: str, why: str | list[str], fix: str) -> None:
        whys = [why] if isinstance(why, str) else why
        super().__init__(what, {"tokenselect.integrations.transformers": whys}, fix)

    def __reduce__(self) -> Any:
        what, reasons, fix = self.args
        return type(self), (what, *reasons.values(), fix)

    def __str__(self) -> str:
        what, reasons, fix = self.args
        lines = [f"  why: {why}" for whys in reasons.values() for why in whys]
        return "\n".join([f"tokenselect cannot attend: {what}", *lines, f"  do:  {fix}"])


def refuse_layer(module: Any, why: str | list[str], fix: str) -> Refusal:
    """Return an error that names the layer."""
    return Refusal(layer_name(module), why, fix)


def layer_name(module: Any) -> str:
    """Return the class of an attention module, and the number of its layer if it has one."""
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f", layer {layer}")


def refuse_mla(config: Any) -> Refusal:
    """Return the error for multi-head latent attention."""
    return Refusal(
        f"a {config.model_type} model",
        f"multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): the cache holds "
        "latents, and making keys of all of them at each step is the cost selection is to save",
        "run it densely: attn_implementation='sdpa' or 'eager'",
    )
