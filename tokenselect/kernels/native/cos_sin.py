"""Tables of cos and sin in float64, from which the kernels make any angle, as exactly."""

import ctypes
import threading
from typing import NamedTuple

import torch
from torch import Tensor

LOW = 512  # as in cpp/call.h
_KEPT = 8
_tables: dict[tuple[bytes, torch.dtype, int], "CosSin"] = {}
_lock = threading.Lock()


class CosSin(NamedTuple):
    """Of angles position * inv_freq.

    table     (LOW + n_high, 2, half) float64: cos and sin of positions 0 to LOW - 1, then of
              0, LOW, 2 LOW, ...
    n_high    how many of the latter
    inv_freq  (half,) float64, the frequencies
    """

    table: Tensor
    n_high: int
    inv_freq: Tensor


def cos_sin(inv_freq: Tensor, reach: int) -> CosSin:
    """Return the tables for positions up to `reach`, kept for the next call.

    What is kept depends on the frequencies' values alone, so that it cannot show in a result.
    """
    n_high = 1 << (-(-(reach + 1) // LOW) - 1).bit_length()
    rates = inv_freq.contiguous()  # itself, as a rule
    values = ctypes.string_at(rates.data_ptr(), rates.numel() * rates.itemsize)
    key = values, rates.dtype, n_high
    found = _tables.get(key)
    if found is None:
        rates = rates.detach().to(torch.float64, copy=True)
        low, high = (torch.arange(m, device=rates.device) for m in (LOW, n_high))
        angle = torch.cat((low, high * LOW)).double()[:, None] * rates
        table = torch.stack((angle.cos(), angle.sin()), dim=1).contiguous()
        found = CosSin(table, n_high, rates)
        with _lock:
            while len(_tables) >= _KEPT:
                _tables.pop(next(iter(_tables)))
            _tables[key] = found
    return found
