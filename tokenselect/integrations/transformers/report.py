"""What the attention calls of a model did, counted by layer."""

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from tokenselect.api import AttentionInfo
from tokenselect.contract import SelectConfig


@dataclass(frozen=True)
class LayerReport:
    """One layer's calls since `enable` or `reset`; a batch of B requests counts as B of them.

    layer       its number
    dense       calls that attended densely
    calls       calls that selected; all below is of these, and None where there were none
    reused      of them, those that took the selection of an earlier one
    cached      mean number of tokens cached
    attended    mean number of tokens attended to
    mass        mean retained mass, over heads too
    least_mass  the least of a call and head
    backend     that ran; without `record`, the first call

    Without `record`, mass and least_mass are None, and with theta reused and attended too. With
    it, mass leaves out the calls where it is not known: see `AttentionInfo`.
    """

    layer: int
    dense: int
    calls: int
    reused: int | None
    cached: float | None
    attended: float | None
    mass: float | None
    least_mass: float | None
    backend: str | None


@dataclass(frozen=True)
class Report:
    """What the attention calls of a model did, by layer; str() is a table.

    Layers that slide, and layers that were not called, are not in it.
    """

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        rows = [
            (
                str(one.layer),
                f"{one.dense:,}",
                f"{one.calls:,}",
                _text(one.reused, ","),
                _text(one.cached, ",.1f"),
                _text(one.attended, ",.1f"),
                _text(one.mass, ".1%"),
                _text(one.least_mass, ".1%"),
                one.backend or "-",
            )
            for one in self.layers
        ]
        table = [_TITLES, *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in table
        )


_TITLES = (
    *("layer", "dense", "calls", "reused", "cached", "attended"),
    *("mass kept", "least", "backend"),
)


def _text(value: float | None, kind: str) -> str:
    return "-" if value is None else format(value, kind)


class _Tally:
    """Sums of one layer's calls; those of values that a device computes stay there."""

    def __init__(self, keep: int) -> None:
        self.infos: deque[AttentionInfo] = deque(maxlen=keep)
        self.dense = self.calls = self.cached = 0
        self.reused: Any = 0
        self.attended: Any = 0.0
        self.mass: Any = 0.0
        self.known: Any = 0
        self.least: Any = math.inf
        self.backends: dict[str, None] = {}

    def add_info(self, info: AttentionInfo) -> None:
        mass, known = info.retained_mass, info.retained_mass.isfinite()
        self.reused += info.reused.sum()
        self.attended += info.selection.count.double().mean(1).sum()
        self.mass += torch.where(known, mass, 0.0).sum(dtype=torch.float64)
        self.known += known.sum()
        self.least = torch.where(known, mass, math.inf).min().clamp(max=self.least)
        self.infos.append(info)


# Of all models: one of its own would keep a model from being copied.
_lock = threading.Lock()


class Recorder:
    """Counts the calls of a model's layers, from any thread.

    keep  how many infos of each layer to keep, the newest; 0: none, nor what only they tell
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        with _lock:
            self._tallies: dict[int, _Tally] = {}

    def wants_info(self, layer: int) -> bool:
        """Return whether the next call of a layer should return its info."""
        tally = self._tallies.get(layer)
        return self._keep > 0 or tally is None or not tally.backends

    def add_dense(self, layer: int, requests: int) -> None:
        """Count a call that attends densely."""
        with _lock:
            self._of(layer).dense += requests

    def add(
        self,
        layer: int,
        lengths: Sequence[int],
        Lq: int,
        config: SelectConfig,
        reuses: bool,
        info: AttentionInfo | None,
    ) -> None:
        """Count a call that selects, for requests of these lengths, Lq queries included.

        reuses  whether it may have reused selections
        """
        with _lock:
            tally = self._of(layer)
            tally.calls += len(lengths)
            tally.cached += sum(lengths)
            if info is not None:
                tally.backends[info.backend] = None
            if self._keep and info is not None:
                tally.add_info(info)
            elif reuses:
                tally.reused = tally.attended = math.nan
            else:
                tally.attended += sum(_attended(config, n, Lq) for n in lengths)

    def infos(self) -> dict[int, list[AttentionInfo]]:
        """Return the infos that are kept, by layer, the newest last."""
        with _lock:
            return {layer: list(self._tallies[layer].infos) for layer in sorted(self._tallies)}

    def report(self) -> Report:
        """Return what was counted; on a GPU, this waits for it."""
        with _lock:
            return Report(tuple(self._layer(layer) for layer in sorted(self._tallies)))

    def _of(self, layer: int) -> _Tally:
        if layer not in self._tallies:
            self._tallies[layer] = _Tally(self._keep)
        return self._tallies[layer]

    def _layer(self, layer: int) -> LayerReport:
        tally = self._tallies[layer]
        calls, known = tally.calls, int(tally.known)
        reused = float(tally.reused)
        return LayerReport(
            layer=layer,
            dense=tally.dense,
            calls=calls,
            reused=int(reused) if calls and reused == reused else None,
            cached=_mean(tally.cached, calls),
            attended=_mean(tally.attended, calls),
            mass=_mean(tally.mass, known),
            least_mass=float(tally.least) if known else None,
            backend=", ".join(tally.backends) or None,
        )


# By the id of the config of the part of a model that generates text. What `enable` returned holds
# both, so that no other config gets an id that stands here.
_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()


def record_with(config: Any, recorder: Recorder | None) -> None:
    """Let a recorder count the calls of the layers that have this config, in place of any other."""
    if recorder is None:
        _recorders.pop(id(config), None)
    else:
        _recorders[id(config)] = recorder


def recorder_of(config: Any) -> Recorder | None:
    """Return what counts the calls of the layers that have this config."""
    return _recorders.get(id(config))


def _mean(total: Any, count: int) -> float | None:
    """Return a mean, None where it is not known."""
    mean = float(total) / count if count else math.nan
    return None if math.isnan(mean) else mean


def _attended(config: SelectConfig, n: int, Lq: int) -> int:
    """Return how many of n tokens a new selection for Lq queries has."""
    start, stop = config.regions(n, Lq)
    return start + min(config.budget(n), stop - start) + n - stop
