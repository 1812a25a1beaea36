"""Cosines and sines of integer positions, exact to float32, for `device.cos_sin`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# A position p is LOW * high + low: two small tables reach any position.
LOW = 128


class Tables(NamedTuple):
    """(rows, 2 * half) float32: cosines, then sines, of position * inv_freq; one row per position.

    low has the positions 0 to LOW - 1, high the multiples of LOW, shift the one position `at`.
    """

    low: Tensor
    high: Tensor
    shift: Tensor


# For each inv_freq tensor alive: its version and, for each (limit, at), the tables.
_made = WeakTensorKeyDictionary()


def tables(inv_freq: Tensor, limit: int, at: int) -> Tables:
    """Return tables for positions up to `limit`, and for `at`; kept while inv_freq is unchanged."""
    # Limits are powers of two, so that a cache that grows token by token does not fill memory.
    limit = max(LOW, triton.next_power_of_2(limit + 1))
    version = None if inv_freq.is_inference() else inv_freq._version
    known = _made.get(inv_freq)
    # A tensor made in inference mode has no version to tell whether it was changed.
    if known is None or version is None or known[0] != version:
        known = _made[inv_freq] = (version, {})
    if (limit, at) not in known[1]:
        known[1][limit, at] = Tables(
            _rows(inv_freq, range(LOW)),
            _rows(inv_freq, range(0, limit, LOW)),
            _rows(inv_freq, range(at, at + 1)),
        )
    made: Tables = known[1][limit, at]
    return made


def _rows(inv_freq: Tensor, positions: range) -> Tensor:
    """Return cosines, then sines (len(positions), 2 * half), computed in float64."""
    first, stop, step = positions.start, positions.stop, positions.step
    position = torch.arange(first, stop, step, dtype=torch.float64, device=inv_freq.device)
    angle = position[:, None] * inv_freq.double()
    return torch.cat((angle.cos(), angle.sin()), dim=1).float().contiguous()
