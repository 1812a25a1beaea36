"""Rotary position embedding: a token's vector, as if the token stood somewhere else."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenselect.errors import InvalidProblem
from tokenselect.scalars import is_number, plain


@dataclass(frozen=True, eq=False)
class Rope:
    """How the model's queries and keys are rotated, so that they can be moved (RoFormer, eq. 34).

    inv_freq     (rotary_dim / 2,) float, radians per position. Take it from the model: scaled
                 ropes (linear, NTK, llama3, YaRN) are other values of it.
    interleaved  pairs are (0, 1), (2, 3), ...; else (i, i + rotary_dim / 2), as in Llama.
    cached       "rotated": q and k_cache arrive rotated at their true positions, as engines keep
                 them; "raw": both arrive unrotated. Which of the two never changes a result.
    scaling      factor on cos and sin (YaRN's attention factor); rotated vectors contain it.

    Dims beyond rotary_dim are left as they are. Angles are float64, whatever the vectors are.

    >>> rope = Rope(10000.0 ** (-torch.arange(0, 8, 2) / 8))
    >>> rope.rotary_dim
    8
    """

    inv_freq: Tensor
    interleaved: bool = False
    cached: Literal["rotated", "raw"] = "rotated"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        is_tensor = isinstance(self.inv_freq, Tensor)
        if not is_tensor or self.inv_freq.dim() != 1 or not self.inv_freq.is_floating_point():
            came = type(self.inv_freq).__name__
            if is_tensor:
                came = f"{tuple(self.inv_freq.shape)} {self.inv_freq.dtype}"
            raise InvalidProblem(
                f"Rope: inv_freq is {came}",
                "inv_freq is (rotary_dim / 2,) and floating point",
                "pass the model's inv_freq, one frequency per pair of dims",
            )
        if self.cached not in ("rotated", "raw"):
            raise InvalidProblem(
                f"Rope: cached={self.cached!r}",
                "cached is 'rotated' or 'raw'",
                "say how q and k_cache arrive",
            )
        scaling = plain(self.scaling)
        object.__setattr__(self, "scaling", scaling)
        if not is_number(scaling) or not 0 < scaling < math.inf:
            raise InvalidProblem(
                f"Rope: scaling={scaling!r}",
                "scaling is a finite number > 0",
                "pass the model's attention factor, or leave scaling out for 1.0",
            )

    @property
    def rotary_dim(self) -> int:
        """How many of the dims are rotated."""
        return 2 * self.inv_freq.shape[0]

    def reposition(self, x: Tensor, position: Tensor, at: Tensor) -> Tensor:
        """Rotate each vector from its token's `position` to another one, `at`.

        x (..., L, D) float32 or float64, as given (see `cached`); position and at (L,) or
        broadcastable to (..., L), integers. Returns x's shape and dtype.
        """
        is_raw = self.cached == "raw"
        factor = self.scaling if is_raw else 1.0
        return self.rotate(x, *self.cos_sin(at if is_raw else at - position, x.dtype, factor))

    def cos_sin(self, by: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return factor times cos and sin of rotations `by` positions: (..., rotary_dim / 2)."""
        angle = by.double()[..., None] * self.inv_freq.double()
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)

    def rotary_pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the first and the second of each pair of dims: (..., rotary_dim / 2)."""
        turned = x[..., : self.rotary_dim]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2]
        first, second = turned.chunk(2, dim=-1)
        return first, second

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x (..., D) by what `cos_sin` returned."""
        first, second = self.rotary_pairs(x)
        first, second = first * cos - second * sin, first * sin + second * cos
        if self.interleaved:
            turned = torch.stack((first, second), dim=-1).flatten(-2)
        else:
            turned = torch.cat((first, second), dim=-1)
        return torch.cat((turned, x[..., self.rotary_dim :]), dim=-1)
