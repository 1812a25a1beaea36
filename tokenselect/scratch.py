"""Memory that the steps of a plan use again and again, so that a step allocates nothing.

Stages ask `empty` for memory. Outside of a plan that is new memory; inside, it is what the same
section got at its n-th question the first time, or the front of it where less is asked for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_current = threading.local()
# Views of its blocks that a workspace keeps, so that asking again costs a look-up.
_VIEWS = 4096


class Scratch:
    """What the sections of a step (its stages) asked for, in order, each with room for capacity.

    >>> scratch = Scratch()
    >>> with scratch.section("score"):
    ...     first = empty((2, 3), torch.float32, torch.device("cpu"))
    >>> with scratch.section("score"):
    ...     again = empty((2, 2), torch.float32, torch.device("cpu"))
    >>> first.data_ptr() == again.data_ptr(), scratch.bytes
    (True, 24)
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], Tensor] = {}
        self._views: dict[tuple[object, ...], Tensor] = {}
        self._sealed = False

    @property
    def bytes(self) -> int:
        """Bytes of all of its blocks."""
        return sum(block.numel() for block in self._blocks.values())

    def blocks(self) -> list[Tensor]:
        """Return all of the memory, as uint8."""
        return list(self._blocks.values())

    def seal(self) -> None:
        """Refuse, from now on, to give out more than there is."""
        self._sealed = True

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Let `empty` inside give out this memory, from the section's first block on."""
        before = getattr(_current, "at", None)
        _current.at = [self, name, 0]
        try:
            yield
        finally:
            _current.at = before

    def take(
        self,
        section: str,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return a view of a section's block of that index, made if it is absent."""
        view = self._views.get((section, index, shape, dtype))
        if view is None:
            if len(self._views) >= _VIEWS:  # of a capacity that is asked for in many sizes
                self._views.clear()
            view = self._view(section, index, shape, dtype, device)
            self._views[section, index, shape, dtype] = view
        return view

    def _view(
        self,
        section: str,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        block = self._blocks.get((section, index))
        if block is None or block.numel() < size:
            if self._sealed:
                there = 0 if block is None else block.numel()
                raise RuntimeError(
                    f"{section} asks for {shape} {dtype}, {size} bytes, as its memory {index}, "
                    f"which has {there}: a stage has to ask for the same, or less, at each call"
                )
            # Memory made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                block = torch.empty(size, dtype=torch.uint8, device=device)
            self._blocks[section, index] = block
            self._views = {
                at: view for at, view in self._views.items() if at[:2] != (section, index)
            }
        with torch.inference_mode(False):
            return block[:size].view(dtype).view(shape)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised contiguous memory: of the plan whose step is running, else new."""
    at = getattr(_current, "at", None)
    if at is None:
        return torch.empty(shape, dtype=dtype, device=device)
    scratch, section, index = at
    at[2] += 1
    return scratch.take(section, index, tuple(shape), dtype, device)  # type: ignore[no-any-return]
