"""Numbers as users have them: Python's own, numpy's, and tensors without a dimension."""

from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Return Python's number for one of numpy or a 0-d tensor; anything else as it is.

    A tensor is read only where that waits for nothing, on the CPU, and only if no gradient would
    be lost.

    >>> plain(torch.tensor(5)), plain(0.5), plain("5")
    (5, 0.5, '5')
    """
    # What torch.compile traces, a SymInt too, is one of these.
    if value is None or isinstance(value, (int, torch.SymInt)) or type(value) is float:
        return value
    if isinstance(value, Tensor):
        waits = value.device.type != "cpu"
        loses = value.requires_grad and torch.is_grad_enabled()
        return value if value.dim() > 0 or waits or loses else value.item()
    return value.item() if getattr(value, "shape", None) == () else value


def is_integer(value: object) -> bool:
    """Say whether `value`, made `plain`, is an integer; a bool is not."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Say whether `value`, made `plain`, is an integer or a float; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
