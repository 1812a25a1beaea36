"""Warns of logits that depend on later tokens.

Queries that choose together what all of them attend to have each a part in what the others get.
`generate` asks for the logits of the last one; whoever asks for all is told, once for a model.
"""

import inspect
import threading
import warnings
from typing import Any

import torch

# The attribute of a model that leads to its `_Logits`.
_ATTRIBUTE = "_tokenselect_logits"


class _InProgress(threading.local):
    """What the forward of a model that runs on this thread has come upon, since it made its masks.

    together  how many queries, at the most, chose together less than there was
    """

    together = 0


in_progress = _InProgress()


class _Logits:
    """A forward hook of one model that is asked for logits, until `remove()`."""

    def __init__(self, model: Any) -> None:
        self._told = False
        self._handle = model.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    @torch.compiler.disable
    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        keep = kwargs.get("logits_to_keep", 0)
        if in_progress.together < 2 or self._told or not (isinstance(keep, int) and keep == 0):
            return
        self._told = True
        warnings.warn(
            f"logits of all positions of a {type(model).__name__}, in which up to "
            f"{in_progress.together} queries chose together what they attend to: those of a token "
            "depend on later tokens of its chunk, and so do log-likelihoods. With chunk=1 they are "
            "causal; logits_to_keep=1 asks for those of the last position",
            stacklevel=6,
        )


def watch_logits(model: Any) -> bool:
    """Let a model warn, if it can be told which logits to make; return whether it did not yet."""
    can_be_told = "logits_to_keep" in inspect.signature(model.forward).parameters
    if not can_be_told or hasattr(model, _ATTRIBUTE):
        return False
    setattr(model, _ATTRIBUTE, _Logits(model))
    return True


def unwatch_logits(model: Any) -> None:
    """Let it warn no more."""
    if hasattr(model, _ATTRIBUTE):
        getattr(model, _ATTRIBUTE).remove()
        delattr(model, _ATTRIBUTE)
