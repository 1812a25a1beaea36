"""Stage 2, on the host: what `select` launches, a radix select that is exact for any ties.

clear      sets the histograms to zero
count      histogram of the first digit of every candidate's key
shortlist  in each block, the candidates that reach the first digit's threshold, in order; and the
           histogram of the second digit
narrow     histogram of the third digit
tally      how many of each block are above the threshold, and how many on it
collect    positions in ascending order, after the winners of all previous blocks

The kernels are in `select_kernels`. A key is a vote's bits, changed so that keys order as votes do;
its digits have 10, 11 and 11 bits. A block's shortlist has room for the whole block: any number of
votes may tie. The second ballot of a split ranks what the first one chose above everything else.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import Problem, Selection
from tokenselect.contract.config import MILLION
from tokenselect.kernels.triton import recording, select_kernels
from tokenselect.kernels.triton.configs import TABLE
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source


def select(votes: Tensor, problem: Problem) -> Selection:
    """Return positions (B, S, K), ascending, and count (B, S); bit-identical to the reference."""
    selection: Selection = recording.run(launches, votes, problem)
    return selection


def launches(
    votes: Tensor,
    problem: Problem,
    arch: str,
    source: Source = SOURCE,
    histograms: Tensor | None = None,
) -> tuple[Selection, list[Launch]]:
    """Return the selection, yet to be filled, and the kernels that fill it.

    histograms  `histograms_of` the problem that are cleared already
    """
    p, block = problem, TABLE[arch].select_block
    n_rows, n_blocks = p.B * p.S, math.ceil(p.Lk / block)

    def empty(*shape: int) -> Tensor:
        return source.empty(shape, torch.int32, votes.device)

    positions, count = empty(p.B, p.S, p.K), empty(p.B, p.S)
    keys, places = empty(n_rows, n_blocks, block), empty(n_rows, n_blocks, block)
    sizes, above, tied = (empty(n_rows, n_blocks) for _ in range(3))
    is_cleared = histograms is not None
    histograms = histograms_of(p, source) if histograms is None else histograms
    found = empty(n_rows, select_kernels.FOUND.value)
    taken = histograms
    if p.R > 1:
        taken = source.empty((n_rows, p.Lk), torch.int8, votes.device)

    shortlists: dict[str, Any] = {"found_ptr": found, "keys_ptr": keys, "sizes_ptr": sizes}
    tallies: dict[str, Any] = {"above_ptr": above, "tied_ptr": tied}
    results: dict[str, Any] = {"positions_ptr": places, "taken_ptr": taken, "out_ptr": positions}
    results |= {"count_ptr": count, "K": p.K}
    todo = [] if is_cleared else [_clear_launch(histograms)]
    rule = p.config.budget_rule
    for ballot in range(p.R):
        is_last = ballot == p.R - 1
        bounds: dict[str, Any] = {
            "seqlens_ptr": p.cache_seqlens,
            "S": p.S,
            "Lq": p.Lq,
            "Lk": p.Lk,
            "n_sink": min(p.config.n_sink, p.Lk),
            "n_local": min(p.config.n_local, p.Lk),
            "millionths": rule.millionths,
            "least": rule.least,
            "most": rule.most,
            "share": MILLION if is_last else rule.fixed_millionths,
            "n_blocks": n_blocks,
        }
        ballots: dict[str, Any] = {
            "votes_ptr": votes,
            "taken_ptr": taken,
            "first_vote": ballot * votes.stride(1),
            "stride_b": votes.stride(0),
            "stride_s": votes.stride(2),
            "stride_j": votes.stride(3),
        }
        histogram = {"histogram_ptr": histograms, "first_row": ballot * n_rows}
        counted = bounds | ballots | histogram
        listed = bounds | shortlists
        size = {"BLOCK": block}
        ranks = size | {"TAKEN": ballot > 0}
        untakes = {"UNTAKES": ballot == 0 and not is_last}
        shortlisted = counted | shortlists | {"positions_ptr": places}
        collected = listed | tallies | results
        for kernel, args, constants, warps in (
            (select_kernels.count, counted, ranks | untakes, 8),
            (select_kernels.shortlist, shortlisted, ranks, 8),
            (select_kernels.narrow, listed | histogram, size, 8),
            (select_kernels.tally, listed | histogram | tallies, size, 4),
            (select_kernels.collect, collected, size | {"MARK": not is_last}, 4),
        ):
            todo.append(Launch(kernel, (n_blocks * n_rows,), args, constants, warps, 1))
    return Selection(positions, count), todo


def histograms_of(problem: Problem, source: Source = SOURCE) -> Tensor:
    """Return memory for all histograms of a call: (R, B * S, ALL_BINS) int32."""
    shape = (problem.R, problem.B * problem.S, select_kernels.ALL_BINS.value)
    return source.empty(shape, torch.int32, problem.q.device)


def _clear_launch(tensor: Tensor) -> Launch:
    size, block = tensor.numel(), 4096
    grid = (math.ceil(size / block),)
    return Launch(select_kernels.clear, grid, {"ptr": tensor, "size": size}, {"BLOCK": block}, 4, 1)


def bytes_moved(problem: Problem) -> dict[str, int]:
    """Return the bytes that each kernel reads and writes, for requests as long as the cache.

    Assumes that one candidate in 30 reaches the first digit's threshold, or twice the winners if
    those are more. If most votes tie, `shortlist` takes up to 8 times more.
    """
    p = problem
    n_rows = p.B * p.S
    votes = 4 * n_rows * p.Lk
    listed = n_rows * min(p.Lk, max(2 * p.config.budget(p.Lk), p.Lk // 30))
    first_bins, bins, all_bins = (
        4 * n_rows * size.value
        for size in (select_kernels.FIRST_BINS, select_kernels.BINS, select_kernels.ALL_BINS)
    )
    per_ballot = {
        "count": votes + first_bins,
        "shortlist": votes + 8 * listed + first_bins,
        "narrow": 4 * listed + bins,
        "tally": 4 * listed + bins,
        "collect": 8 * listed + 4 * n_rows * p.K,
    }
    moved = {name: size * p.R for name, size in per_ballot.items()}
    return {"clear": p.R * all_bins} | moved
