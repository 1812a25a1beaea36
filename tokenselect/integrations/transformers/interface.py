"""Which models attend through transformers' AttentionInterface; the others cannot be changed by it.

transformers takes any attn_implementation that is registered for a model whose code never looks it
up, and the model then attends as ever. So what it takes is looked at here too.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from tokenselect.integrations.transformers.causality import unwatch_logits, watch_logits
from tokenselect.integrations.transformers.options import NAME
from tokenselect.integrations.transformers.refusals import Refusal

# The attribute of what stands in for a function of transformers.
_OURS = "_tokenselect"


def text_part(model: Any, config: Any) -> Any:
    """The part of a model that generates text: all of it, but for models that also see or hear.

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
            if not _goes_through_it(part):
                break
            return part
    raise not_through_it(model)


def not_through_it(model: Any) -> Refusal:
    """The error for a model that attends in code of its own, or not at all."""
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
    """What transformers calls for a new model, and for a model that is to attend otherwise.

    A new one is refused when it is called, since it may be a part that never is; or now, if it
    would fail on its own. One that is to attend with tokenselect will warn of its logits.
    """

    @functools.wraps(check)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        found, kind = check(self, requested_attention, is_init_check), type(self)
        if _may_attend_by_itself(kind):
            fits = _can_be_made(kind) if is_init_check else _goes_through_it(self)
            if found == NAME and not fits:
                raise not_through_it(self)
            if not hasattr(kind.forward, _OURS):
                kind.forward = _guarded(kind.forward)
        if found == NAME:
            watch_logits(self)
        else:
            unwatch_logits(self)
        return found

    setattr(get_correct_attn_implementation, _OURS, True)
    return get_correct_attn_implementation


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class of models that may attend in code of their own."""

    @functools.wraps(forward)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == NAME and not _goes_through_it(self):
            raise not_through_it(self)
        return forward(self, *args, **kwargs)

    setattr(guarded, _OURS, True)
    return guarded


def _goes_through_it(model: Any) -> bool:
    """Whether the code of a part of a model knows the interface."""
    return _looks_it_up({type(part).__module__ for part in model.modules()})


def _may_attend_by_itself(kind: type) -> bool:
    """Whether the code of a class of models may have attention, and has not the interface to it.

    The code is that of the modules that it and its bases stand in. In transformers, attention has
    that in its name, and one without it, such as that of a state space model, or of a model made of
    others, has nothing to look up. Elsewhere it may have any name.
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
    """Whether a model that attends by itself looks no name up in a table of its own."""
    tables = (one for one in _names_of(_modules_of(kind)) if isinstance(one, dict))
    return not any("eager" in table for table in tables)


def _modules_of(kind: type) -> set[str]:
    """Those that a class of models and its bases stand in."""
    bases = [base for base in kind.__mro__ if issubclass(base, PreTrainedModel)]
    return {base.__module__ for base in bases if base is not PreTrainedModel}


def _looks_it_up(modules: set[str]) -> bool:
    """Whether the code of one of these modules knows the interface."""
    return any(isinstance(one, AttentionInterface) for one in _names_of(modules))


def _names_of(modules: set[str]) -> Iterator[Any]:
    for module in modules & sys.modules.keys():
        yield from vars(sys.modules[module]).values()
