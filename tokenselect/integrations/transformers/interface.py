"""Refuse models that do not attend through transformers' AttentionInterface.

transformers takes any attn_implementation that is registered for a model whose code never looks it
up, and the model then attends as ever. So models are inspected here too.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from tokenselect.integrations.options import NAME
from tokenselect.integrations.transformers.cache import slides_everywhere
from tokenselect.integrations.transformers.causality import unwatch_logits, watch_logits
from tokenselect.integrations.transformers.refusals import Refusal, warn

# The attribute that marks stand-ins of functions of transformers.
_OURS = "_tokenselect"


def text_part(model: Any, config: Any) -> Any:
    """Return the part of a model that generates text: all, unless it also sees or hears.

    Raises UnsupportedProblem if it cannot attend with tokenselect.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise Refusal(
            f"a {type(model).__name__}",
            "it is an encoder and a decoder: the encoder attends in both directions, and the "
            "decoder to all that the encoder made; neither has a cache to select from",
            "run it densely: attn_implementation='sdpa' or 'eager'",
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            if not _uses_interface(part):
                break
            return part
    raise refuse_own_attention(model)


def refuse_own_attention(model: Any) -> Refusal:
    """Return the error for a model that attends in code of its own, or not at all."""
    fix = "use a model whose attention goes through transformers' AttentionInterface"
    if not model.can_generate():
        fix += (
            "; where this is a part that sees or hears, "
            "attn_implementation={'text_config': 'tokenselect'}"
        )
    return Refusal(
        f"a {type(model).__name__}",
        "none of its layers calls transformers' AttentionInterface: it has no attention, or "
        "attends in code of its own",
        fix,
    )


def watch() -> None:
    """Let models that attend in code of their own refuse attn_implementation="tokenselect"."""
    check = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(check, _OURS):
        PreTrainedModel.get_correct_attn_implementation = _refusing(check)


def _refusing(check: Callable[..., str]) -> Callable[..., str]:
    """Wrap the method that transformers calls for each new or changed attn_implementation.

    A new model is refused when it is called, since it may be a part that never is, or now if it
    would fail by itself. A model that is to attend with tokenselect will warn of its logits.
    """

    @functools.wraps(check)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        found, kind = check(self, requested_attention, is_init_check), type(self)
        if _may_bypass_interface(kind):
            fits = _can_be_made(kind) if is_init_check else _uses_interface(self)
            if found == NAME and not fits:
                raise refuse_own_attention(self)
            if not hasattr(kind.forward, _OURS):
                kind.forward = _guarded(kind.forward)
        if found == NAME:
            _warn_if_all_slides(self)
            watch_logits(self)
        else:
            unwatch_logits(self)
        return found

    setattr(get_correct_attn_implementation, _OURS, True)
    return get_correct_attn_implementation


def _warn_if_all_slides(model: Any) -> None:
    config = model.config
    is_text = config is config.get_text_config(decoder=True)
    if is_text and hasattr(config, "num_hidden_layers") and slides_everywhere(config):
        warn(
            f"all layers of a {config.model_type} model that attend slide: they stay dense "
            "within their window, so that nothing is selected and options change nothing"
        )


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a class of models that may attend in code of their own."""

    @functools.wraps(forward)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == NAME and not _uses_interface(self):
            raise refuse_own_attention(self)
        return forward(self, *args, **kwargs)

    setattr(guarded, _OURS, True)
    return guarded


def _uses_interface(model: Any) -> bool:
    """Return whether the code of a part of a model uses the interface."""
    return _looks_it_up({type(part).__module__ for part in model.modules()})


def _may_bypass_interface(kind: type) -> bool:
    """Return whether a class of models may attend, in code that does not use the interface.

    Its code is that of the modules that define it and its bases. In transformers, attention has
    that in its class name; a module without such a class, as of a state space model or a model made
    of others, has nothing to look up. Elsewhere attention may have any name.
    """
    modules = _modules_of(kind)
    has_attention = not all(module.startswith("transformers.") for module in modules) or any(
        isinstance(one, type)
        and issubclass(one, nn.Module)
        and "Attention" in one.__name__
        and one.__module__ in modules
        for one in _names_of(modules)
    )
    return has_attention and not _looks_it_up(modules)


def _can_be_made(kind: type) -> bool:
    """Return whether a model that attends by itself looks no name up in a table of its own."""
    tables = (one for one in _names_of(_modules_of(kind)) if isinstance(one, dict))
    return not any("eager" in table for table in tables)


def _modules_of(kind: type) -> set[str]:
    """Return the modules that define a class of models and its bases."""
    bases = [base for base in kind.__mro__ if issubclass(base, PreTrainedModel)]
    return {base.__module__ for base in bases if base is not PreTrainedModel}


def _looks_it_up(modules: set[str]) -> bool:
    """Return whether the code of one of these modules uses the interface."""
    return any(isinstance(one, AttentionInterface) for one in _names_of(modules))


def _names_of(modules: set[str]) -> Iterator[Any]:
    """Yield the values of all global names of these modules."""
    for module in modules & sys.modules.keys():
        yield from vars(sys.modules[module]).values()
