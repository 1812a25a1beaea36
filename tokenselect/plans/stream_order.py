"""Steps that share memory run one at a time, on whatever threads and streams."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_current = threading.local()


@contextmanager
def recording_serializers() -> Iterator[list["StreamSerializer"]]:
    """Collect the serializers entered inside: a graph captured there enters them at each replay."""
    before: object = getattr(_current, "turns", None)
    taken: list[StreamSerializer] = []
    _current.turns = taken
    try:
        yield taken
    finally:
        _current.turns = before
        taken.sort(key=id)  # everybody takes several in the same order


class StreamSerializer:
    """Steps that share memory take turns: one at a time, on whatever threads and streams.

    A step on another stream than the last one waits for it on the device; the host never waits.
    Inside a capture the graph's own order holds.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.RLock()
        self._device = device
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the turn inside; wait on the device for the stream that had it before."""
        turns = getattr(_current, "turns", None)
        if turns is not None and self not in turns:
            turns.append(self)
        with self._lock:
            if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                yield
                return
            stream = torch.cuda.current_stream(self._device)
            if self._last is None:
                self._last = stream, torch.cuda.Event()
            elif self._last[0] != stream:
                stream.wait_event(self._last[1])
            try:
                yield
            finally:
                self._last = stream, self._last[1]
                self._last[1].record(stream)
