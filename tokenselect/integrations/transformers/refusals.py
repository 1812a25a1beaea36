"""The errors that name a layer, a model, or its arguments; and warnings at the caller's line."""

import functools
import sys
import warnings
from typing import Any

import torch

from tokenselect.errors import UnsupportedProblem

# torch says the reason where it is asked for one graph of a whole model.
outside_of_graphs = functools.partial(
    torch.compiler.disable,
    reason="tokenselect reads masks and lengths on the host: leave fullgraph=True out",
)


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


def warn(message: str) -> None:
    """Warn at the line that called transformers, torch or this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_inside(names: dict[str, Any]) -> bool:
    package = names.get("__name__", "").partition(".")[0]
    return package in ("accelerate", "contextlib", "peft", "tokenselect", "torch", "transformers")
