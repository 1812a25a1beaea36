"""What a rank holds, and the rank of a cache that is not sharded."""

from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """This rank's tokens of one request: their positions (m,), ascending, and their slots (m,)."""

    at: Tensor
    slots: Tensor


class Alone:
    """The one rank of a cache that is not sharded: what `Ranks` is for several."""

    def gather(self, x: Tensor) -> Tensor:
        """Return x, in a row of its own."""
        return x[None]

    def check(self, *given: object, **more: object) -> None:
        """Agree."""
