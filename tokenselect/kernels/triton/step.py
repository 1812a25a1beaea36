"""A whole step, on the host: the launches of all stages as one recording.

`normalize` clears what `select` counts in, so a step has a launch less than its stages.
"""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from tokenselect.contract import AttentionOutput, CacheState, Problem, Selection
from tokenselect.kernels.triton import attend, recording, reuse, score, select
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source


class Fresh(NamedTuple):
    """What a step fills: see `tokenselect.dispatch.step.Step`."""

    out: Tensor
    lse: Tensor
    positions: Tensor
    counts: Tensor
    dense_lse: Tensor


class Cached(NamedTuple):
    """What a step with a Selection Cache fills."""

    out: Tensor
    lse: Tensor
    positions: Tensor
    counts: Tensor
    dense_lse: Tensor
    reused: Tensor


def attend_fresh(
    problem: Problem, out: Tensor | None = None
) -> tuple[AttentionOutput, Selection, Tensor]:
    """Score, select and attend; into `out` if given. See `Backend.attend_fresh`."""
    done: Fresh = recording.run(fresh_launches, problem, out=out)
    return AttentionOutput(*done[:2]), Selection(*done[2:4]), done.dense_lse


def attend_cached(
    problem: Problem, state: CacheState, theta: float | None, out: Tensor | None = None
) -> tuple[AttentionOutput, Selection, Tensor, Tensor]:
    """Do the same with a Selection Cache. See `Backend.attend_cached`."""
    done: Cached = recording.run(cached_launches, problem, state, theta, out=out)
    return AttentionOutput(*done[:2]), Selection(*done[2:4]), done.dense_lse, done.reused


def fresh_launches(
    problem: Problem, arch: str, out: Tensor | None = None, source: Source = SOURCE
) -> tuple[Fresh, list[Launch]]:
    """Return what the step fills, and the kernels that fill it."""
    selection, dense_lse, selecting = _selection(problem, arch, source)
    attended, attending = attend.launches(problem, selection, arch, out, source)
    return Fresh(*attended, *selection, dense_lse), [*selecting, *attending]


def cached_launches(
    problem: Problem,
    state: CacheState,
    theta: float | None,
    arch: str,
    out: Tensor | None = None,
    source: Source = SOURCE,
) -> tuple[Cached, list[Launch]]:
    """Return what the step fills, and the kernels that fill it and update `state`."""
    decision, deciding = reuse.decide_launches(problem, state, theta, arch, source)
    recomputed = replace(problem, cache_seqlens=decision.cache_seqlens)
    selection, dense_lse, selecting = _selection(recomputed, arch, source)
    _, updating = reuse.update_launches(problem, state, decision, selection, arch, source)
    attended, attending = attend.launches(problem, selection, arch, out, source)
    done = Cached(*attended, *selection, dense_lse, decision.reused)
    return done, [*deciding, *selecting, *updating, *attending]


def _selection(
    problem: Problem, arch: str, source: Source
) -> tuple[Selection, Tensor, list[Launch]]:
    """Return a selection, the lse of `Scores`, and the kernels that fill both."""
    histograms = select.histograms_of(problem, source)
    scores, scoring = score.launches(problem, arch, False, source, histograms)
    selection, selecting = select.launches(scores.votes, problem, arch, source, histograms)
    return selection, scores.lse, [*scoring, *selecting]


def bytes_moved(problem: Problem, arch: str = "sm_90") -> dict[str, int]:
    """Return the bytes that each kernel of a step without a Selection Cache reads and writes."""
    moved = score.bytes_moved(problem, arch) | select.bytes_moved(problem)
    moved["normalize"] += moved.pop("clear")
    return moved | attend.bytes_moved(problem, arch)
