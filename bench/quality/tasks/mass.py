"""Retained mass of each layer and head, and how much selections overlap; decoding as `decode`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.quality.figures import Row, grouped
from bench.quality.lab import Cell, Lab
from bench.quality.recorder import recorded
from bench.quality.tasks import decode
from bench.quality.ways import DENSE, Budget, resolve_all, selecting
from tokenselect import AttentionInfo
from tokenselect.contract import SelectConfig


@dataclass(frozen=True)
class Settings:
    """As those of `decode`; ways have to select."""

    ways: tuple[str, ...]
    contexts: tuple[int, ...] = field(metadata={"least": 1})
    documents: int = field(metadata={"least": 1})
    held: int = field(default=32, metadata={"least": 2})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    for context in settings.contexts:
        ways = selecting(resolve_all(settings.ways, plan.ways, settings.budgets, context))
        yield from decode.of_ways("mass", ways, context, settings, plan, lab)


@torch.inference_mode()
def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context, ids = cells[0].label["context"], cells[0].given.ids
    cache, moves = decode.prefilled(lab, ids[:context], DENSE, len(ids) - context), False
    for cell in decode.in_order(cells):
        if cell.way.moves != moves:
            moves, cache = cell.way.moves, None
            everything = cell.way.everything(len(ids))
            cache = decode.prefilled(lab, ids[:context], everything, len(ids) - context)
        with recorded() as infos:
            decode.decoded(lab, cache, ids[context:], cell.way)
        assert cell.way.options is not None
        steps = len(ids) - context - 1
        yield cell, of_infos(infos, steps, context, cell.way.options.select)


def of_infos(
    infos: list[AttentionInfo], steps: int, n: int, config: SelectConfig
) -> dict[str, Any]:
    """Means over steps; n tokens were cached before the first.

    mass      [layer][head], None where it is not known
    by_step   [layer]: overlap of what neighbouring steps voted for
    by_layer  [layer][layer]: overlap of what layers voted for at one step
    voted     tokens by vote, in the mean
    An overlap is that of Jaccard: tokens in both over tokens in either, 1 for nothing in both.
    """
    layers = len(infos) // steps
    assert layers * steps == len(infos)
    mass = torch.stack([info.retained_mass[0] for info in infos]).view(steps, layers, -1).mean(0)
    by_layer, by_step, counts = torch.zeros(layers, layers), [], []
    before = None
    for step in range(steps):
        voted = torch.stack(
            [votes(info, n + step + 1, config) for info in infos[step * layers :][:layers]]
        )  # (layers, S, tokens)
        by_layer += overlap(voted[:, None], voted[None]) / steps
        counts.append(float(voted.sum(-1).float().mean()))
        if before is not None:
            now = voted[..., : before.shape[-1]]
            by_step.append(overlap(now, before))
        before = voted
    return {
        "mass": rounded(mass),
        "by_step": rounded(torch.stack(by_step).mean(0)),
        "by_layer": rounded(by_layer),
        "voted": sum(counts) / steps,
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over documents; `layers` and `heads` in full, by layer."""
    found: list[Row] = []
    names = ("context", "way", "budget")
    for values, group in grouped(rows, names).items():
        mass = torch.stack([_tensor(r["mass"]) for r in group]).mean(0)
        by_step = torch.tensor([r["by_step"] for r in group]).mean(0)
        by_layer = torch.tensor([r["by_layer"] for r in group]).mean(0)
        neighbours = by_layer.diagonal(1)
        found.append(
            dict(zip(names, values, strict=True))
            | {"size": group[0]["size"], "documents": len(group)}
            | {"mass": _mean(mass), "mass_of_layers": rounded(mass.mean(1))}
            | {"least_of_a_head": rounded(mass.flatten()[mass.flatten().argmin()])}
            | {"by_step": _mean(by_step), "by_step_of_layers": rounded(by_step)}
            | {"neighbours": _mean(neighbours), "voted": mean(r["voted"] for r in group)}
        )
    return found


def _tensor(table: list[list[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in table])


def _mean(values: Tensor) -> float | None:
    return rounded(values.mean()) if values.numel() else None


def votes(info: AttentionInfo, n: int, config: SelectConfig) -> Tensor:
    """(S, n) bool: what was selected by vote, without sink and window."""
    selected = info.selection
    chosen = torch.zeros(selected.positions.shape[1], n + 1, dtype=torch.bool)
    chosen.scatter_(1, selected.positions[0].long() % (n + 1), True)  # padding, -1, goes to n
    sink_end, local_start = config.regions(n, 1)
    chosen[:, :sink_end] = chosen[:, local_start:] = False
    return chosen[:, :n]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard's, over the last dimension; the mean over selections, the one before."""
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).mean(-1)


def rounded(values: Tensor) -> Any:
    """Lists of numbers, or one, to 4 digits; None for what is not known."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(item) for item in value]
        return None if value != value else round(value, 4)

    return of(values.tolist())
