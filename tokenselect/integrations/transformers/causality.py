"""Warn of logits that depend on later tokens.

Queries that select together influence each other's results. A call that returns the logits of
several is warned, once per model and `enable`; plain `generate` asks for those of the last one.
"""

import inspect
import threading
from typing import Any

import torch

from tokenselect.integrations.transformers.refusals import warn

# The attribute of a model that holds its `_LogitsWatch`.
_ATTRIBUTE = "_tokenselect_logits"


class _InProgress(threading.local):
    """The forward pass of a model on this thread, since it made its masks.

    together  the most queries of one call that selected together, and not everything
    """

    together = 0


in_progress = _InProgress()


class _LogitsWatch:
    """A forward hook that warns of one model's logits, until `remove()`."""

    def __init__(self, model: Any) -> None:
        self._told = False
        self._handle = model.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    @torch.compiler.disable
    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        logits = getattr(out, "logits", None)
        # (B, positions, classes); those of a whole text have two dims.
        several = isinstance(logits, torch.Tensor) and logits.ndim == 3 and logits.shape[1] > 1
        if in_progress.together < 2 or self._told or not several:
            return
        self._told = True
        warn(
            f"logits of several positions of a {type(model).__name__}, in which up to "
            f"{in_progress.together} queries chose together what they attend to: those of a token "
            "depend on later tokens of its chunk, and so do log-likelihoods. With prefill='dense' "
            "or chunk=1 they are causal; logits_to_keep=1 asks for those of the last position"
        )


def watch_logits(model: Any) -> bool:
    """Let a model warn; return whether it did not do so before.

    Not one that generates and returns all logits whatever it is asked for.
    """
    can_be_told = "logits_to_keep" in inspect.signature(model.forward).parameters
    if hasattr(model, _ATTRIBUTE) or (model.can_generate() and not can_be_told):
        return False
    setattr(model, _ATTRIBUTE, _LogitsWatch(model))
    return True


def unwatch_logits(model: Any) -> None:
    """Stop a model's warnings."""
    if hasattr(model, _ATTRIBUTE):
        getattr(model, _ATTRIBUTE).remove()
        delattr(model, _ATTRIBUTE)
