"""Stage 2: radix select over as many blocks as there are; exact for any mass of ties.

clear      histograms that start at zero
count      histogram of the first digit of every candidate's key; nothing is taken yet
shortlist  in each block, the candidates that reach the first digit's threshold, in order; and the
           histogram of the second digit
narrow     histogram of the third digit
tally      how many of each block are above the threshold, and how many on it
collect    positions in ascending order, after the winners of all blocks before

A key is a vote's bits, so turned that keys order as votes do; its digits have 10, 11 and 11 bits.
A block's shortlist has room for the whole block: votes may tie in any number. The second ballot of
a split ranks what the first one chose above everything.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.contract import Problem, Selection
from tokenselect.kernels.triton import recording
from tokenselect.kernels.triton.configs import TABLE
from tokenselect.kernels.triton.device import COUNTS, after_previous, length, regions
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source

# Bins of a row's three histograms, one after the other.
_FIRST_BINS = tl.constexpr(1024)
_BINS = tl.constexpr(2048)
_ALL_BINS = tl.constexpr(1024 + 2048 + 2048)
# What a kernel tells the next one of a row: twice digits and a number, and once the last key.
_FOUND = tl.constexpr(6)


def select(votes: Tensor, problem: Problem) -> Selection:
    """See `tokenselect.reference.select`: bit-exact."""
    selection: Selection = recording.run(launches, votes, problem)
    return selection


@triton.jit
def _clear(ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    after_previous(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptr + at, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _keys(votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN: tl.constexpr):
    """Unsigned keys that order as the votes: -0.0 as 0.0, NaN as -inf, what is taken on top."""
    # More is loaded than the candidates, so that loads are wide.
    vote = tl.load(votes_ptr + position.to(tl.int64) * stride_j, mask=position < Lk, other=0.0)
    vote = tl.where(vote != vote, float("-inf"), vote)
    bits = tl.where(vote == 0.0, 0.0, vote).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    if TAKEN:
        at = row.to(tl.int64) * Lk + position
        taken = tl.load(taken_ptr + at, mask=is_candidate, other=0) != 0
        bits = tl.where(taken, -1, bits)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def _add_counts(histogram_ptr, digit, is_counted, BINS: tl.constexpr):
    """Add a block's digits to a row's histogram; whole numbers add up in any order."""
    counts = tl.histogram(digit.to(tl.int32), BINS, mask=is_counted)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _add_few(histogram_ptr, digit, is_counted, BLOCK: tl.constexpr):
    """The same of digits that few of a block have: one by one, but for blocks of ties."""
    if tl.sum(is_counted.to(tl.int32), 0) > BLOCK // 8:
        _add_counts(histogram_ptr, digit, is_counted, _BINS)
    else:
        one = tl.full(digit.shape, 1, tl.int32)
        tl.atomic_add(histogram_ptr + digit.to(tl.int32), one, mask=is_counted, sem="relaxed")


@triton.jit
def _threshold(histogram_ptr, need, BINS: tl.constexpr):
    """The digit of the need-th largest, and how many of that digit are still needed."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    reaching = tl.cumsum(counts, 0, reverse=True)
    digit = tl.max(tl.where(reaching >= need, bins, 0), 0)
    above = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return digit.to(tl.uint32), need - above


@triton.jit
def _hand_on(found_ptr, block, digits, need):
    """Tell the next kernel what each block has found: leading digits of the last winner's key,
    and how many of those that begin with them win.
    """
    tl.store(found_ptr, digits.to(tl.int32, bitcast=True), mask=block == 0)
    tl.store(found_ptr + 1, need, mask=block == 0)


@triton.jit
def _handed(found_ptr):
    return tl.load(found_ptr).to(tl.uint32, bitcast=True), tl.load(found_ptr + 1)


@triton.jit
def _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share):
    """The candidates' bounds and how many of them are needed, of one row of (B, S)."""
    sink_end, local_start = regions(length(seqlens_ptr, row // S, Lk), Lq, n_sink, n_local)
    return sink_end, local_start, tl.minimum(share, local_start - sink_end)


@triton.jit(do_not_specialize=[*COUNTS, "S"])
def _count(
    votes_ptr,
    taken_ptr,
    histogram_ptr,
    seqlens_ptr,
    S,
    Lq,
    Lk,
    n_sink,
    n_local,
    share,
    n_blocks,
    first_row,
    first_vote,
    stride_b,
    stride_s,
    stride_j,
    TAKEN: tl.constexpr,
    UNTAKES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """UNTAKES: before the first of several ballots, no candidate is taken."""
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, _ = _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share)
    if block * BLOCK >= local_start:
        return
    position = block * BLOCK + tl.arange(0, BLOCK)
    is_candidate = (position >= sink_end) & (position < local_start)
    votes_ptr += first_vote
    votes_ptr += (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    key = _keys(votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN)
    _add_counts(
        histogram_ptr + (first_row + row).to(tl.int64) * _ALL_BINS,
        key >> 22,
        is_candidate,
        _FIRST_BINS,
    )
    if UNTAKES:
        at = taken_ptr + row.to(tl.int64) * Lk + position
        tl.store(at, tl.zeros([BLOCK], tl.int8), mask=is_candidate)


@triton.jit(do_not_specialize=[*COUNTS, "S"])
def _shortlist(
    votes_ptr,
    taken_ptr,
    histogram_ptr,
    found_ptr,
    keys_ptr,
    positions_ptr,
    sizes_ptr,
    seqlens_ptr,
    S,
    Lq,
    Lk,
    n_sink,
    n_local,
    share,
    n_blocks,
    first_row,
    first_vote,
    stride_b,
    stride_s,
    stride_j,
    TAKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, need = _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share)
    if block * BLOCK >= local_start:
        return
    histogram_ptr += (first_row + row).to(tl.int64) * _ALL_BINS
    first, need = _threshold(histogram_ptr, need, _FIRST_BINS)
    _hand_on(found_ptr + row * _FOUND, block, first, need)
    position = block * BLOCK + tl.arange(0, BLOCK)
    is_candidate = (position >= sink_end) & (position < local_start)
    votes_ptr += first_vote
    votes_ptr += (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    key = _keys(votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN)
    is_listed = is_candidate & (key >> 22 >= first)
    place = tl.cumsum(is_listed.to(tl.int32), 0) - 1
    at = (row.to(tl.int64) * n_blocks + block) * BLOCK + place
    tl.store(keys_ptr + at, key.to(tl.int32, bitcast=True), mask=is_listed)
    tl.store(positions_ptr + at, position, mask=is_listed)
    tl.store(sizes_ptr + row * n_blocks + block, tl.sum(is_listed.to(tl.int32), 0))
    is_second = is_listed & (key >> 22 == first)
    _add_few(histogram_ptr + _FIRST_BINS, key >> 11 & 2047, is_second, BLOCK)


@triton.jit
def _listed(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK: tl.constexpr):
    """A block's shortlist: keys, and which of the BLOCK places hold one."""
    place = tl.arange(0, BLOCK)
    is_listed = place < tl.load(sizes_ptr + row * n_blocks + block)
    at = (row.to(tl.int64) * n_blocks + block) * BLOCK + place
    key = tl.load(keys_ptr + at, mask=is_listed, other=0)
    return key.to(tl.uint32, bitcast=True), is_listed


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk"])
def _narrow(
    histogram_ptr,
    found_ptr,
    keys_ptr,
    sizes_ptr,
    seqlens_ptr,
    S,
    Lq,
    Lk,
    n_sink,
    n_local,
    share,
    n_blocks,
    first_row,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    _, local_start, _ = _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share)
    if block * BLOCK >= local_start:
        return
    histogram_ptr += (first_row + row).to(tl.int64) * _ALL_BINS
    found_ptr += row * _FOUND
    first, need = _handed(found_ptr)
    second, need = _threshold(histogram_ptr + _FIRST_BINS, need, _BINS)
    digits = first << 11 | second
    _hand_on(found_ptr + 2, block, digits, need)
    key, is_listed = _listed(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
    is_third = is_listed & (key >> 11 == digits)
    _add_few(histogram_ptr + _FIRST_BINS + _BINS, key & 2047, is_third, BLOCK)


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk"])
def _tally(
    histogram_ptr,
    found_ptr,
    keys_ptr,
    sizes_ptr,
    above_ptr,
    tied_ptr,
    seqlens_ptr,
    S,
    Lq,
    Lk,
    n_sink,
    n_local,
    share,
    n_blocks,
    first_row,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    _, local_start, _ = _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share)
    if block * BLOCK >= local_start:
        return
    found_ptr += row * _FOUND
    digits, need = _handed(found_ptr + 2)
    histogram_ptr += (first_row + row).to(tl.int64) * _ALL_BINS
    third, need = _threshold(histogram_ptr + _FIRST_BINS + _BINS, need, _BINS)
    last = digits << 11 | third
    _hand_on(found_ptr + 4, block, last, need)
    key, is_listed = _listed(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
    at = row * n_blocks + block
    tl.store(above_ptr + at, tl.sum((is_listed & (key > last)).to(tl.int32), 0))
    tl.store(tied_ptr + at, tl.sum((is_listed & (key == last)).to(tl.int32), 0))


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk", "K"])
def _collect(
    found_ptr,
    keys_ptr,
    positions_ptr,
    sizes_ptr,
    above_ptr,
    tied_ptr,
    taken_ptr,
    out_ptr,
    count_ptr,
    seqlens_ptr,
    S,
    K,
    Lq,
    Lk,
    n_sink,
    n_local,
    share,
    n_blocks,
    MARK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Write the winners of one block, and a share of the sink, the local window and the padding.

    Or, before a further ballot, MARK the winners as taken.
    """
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, need = _row(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, share)
    won = need
    if block * BLOCK < local_start:
        last, need = _handed(found_ptr + row * _FOUND + 4)
        above = tl.zeros([BLOCK], tl.int32)
        tied = tl.zeros([BLOCK], tl.int32)
        for start in range(0, block, BLOCK):
            other = start + tl.arange(0, BLOCK)
            is_before = other < block
            above += tl.load(above_ptr + row * n_blocks + other, mask=is_before, other=0)
            tied += tl.load(tied_ptr + row * n_blocks + other, mask=is_before, other=0)
        tied_before = tl.sum(tied, 0)
        won_before = tl.sum(above, 0) + tl.minimum(tied_before, need)
        key, is_listed = _listed(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
        at = (row.to(tl.int64) * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        position = tl.load(positions_ptr + at, mask=is_listed, other=0)
        is_tied = is_listed & (key == last)
        rank = tied_before + tl.cumsum(is_tied.to(tl.int32), 0) - 1
        is_winner = (is_listed & (key > last)) | (is_tied & (rank < need))
        if MARK:
            tl.store(taken_ptr + row.to(tl.int64) * Lk + position, 1, mask=is_winner)
        else:
            place = sink_end + won_before + tl.cumsum(is_winner.to(tl.int32), 0) - 1
            tl.store(out_ptr + row.to(tl.int64) * K + place, position, mask=is_winner)
    if not MARK:
        n = length(seqlens_ptr, row // S, Lk)
        count = sink_end + won + n - local_start
        for start in range(block * BLOCK, K, n_blocks * BLOCK):
            place = start + tl.arange(0, BLOCK)
            position = tl.where(place < sink_end, place, local_start + place - sink_end - won)
            position = tl.where(place < count, position, -1)
            is_framed = (place < K) & ((place < sink_end) | (place >= sink_end + won))
            tl.store(out_ptr + row.to(tl.int64) * K + place, position, mask=is_framed)
        if block == 0:
            tl.store(count_ptr + row, count)


# --- the host's side ----------------------------------------------------------------------


def launches(
    votes: Tensor, problem: Problem, arch: str, source: Source = SOURCE
) -> tuple[Selection, list[Launch]]:
    """The selection to be, and the kernels that fill it."""
    p, block = problem, TABLE[arch].select_block
    n_rows, n_blocks = p.B * p.S, math.ceil(p.Lk / block)

    def empty(*shape: int) -> Tensor:
        return source.empty(shape, torch.int32, votes.device)

    positions, count = empty(p.B, p.S, p.K), empty(p.B, p.S)
    keys, places = empty(n_rows, n_blocks, block), empty(n_rows, n_blocks, block)
    sizes, above, tied = (empty(n_rows, n_blocks) for _ in range(3))
    histograms = empty(p.R, n_rows, _ALL_BINS.value)
    found = empty(n_rows, _FOUND.value)
    taken = histograms
    todo = [_cleared(histograms)]
    if p.R > 1:
        taken = source.empty((n_rows, p.Lk), torch.int8, votes.device)
    grid = (n_blocks * n_rows,)
    share = 0
    for ballot, (_, more) in enumerate(p.config.ballots):
        share = min(share + more, p.Lk)
        is_last = ballot == p.R - 1
        where: dict[str, Any] = {
            "seqlens_ptr": p.cache_seqlens,
            "S": p.S,
            "Lq": p.Lq,
            "Lk": p.Lk,
            "n_sink": min(p.config.n_sink, p.Lk),
            "n_local": min(p.config.n_local, p.Lk),
            "share": share,
            "n_blocks": n_blocks,
        }
        voted: dict[str, Any] = {
            "votes_ptr": votes,
            "taken_ptr": taken,
            "first_vote": ballot * votes.stride(1),
            "stride_b": votes.stride(0),
            "stride_s": votes.stride(2),
            "stride_j": votes.stride(3),
        }
        counted: dict[str, Any] = {"histogram_ptr": histograms, "first_row": ballot * n_rows}
        listed: dict[str, Any] = {"found_ptr": found, "keys_ptr": keys, "sizes_ptr": sizes}
        tallied: dict[str, Any] = {"above_ptr": above, "tied_ptr": tied}
        results: dict[str, Any] = {
            "positions_ptr": places,
            "taken_ptr": taken,
            "out_ptr": positions,
        }
        results |= {"count_ptr": count, "K": p.K}
        sized = {"BLOCK": block}
        ranked = sized | {"TAKEN": ballot > 0}
        todo += [
            Launch(
                _count,
                grid,
                where | voted | counted,
                ranked | {"UNTAKES": ballot == 0 and not is_last},
                8,
                1,
            ),
            Launch(
                _shortlist,
                grid,
                where | voted | counted | listed | {"positions_ptr": places},
                ranked,
                8,
                1,
            ),
            Launch(_narrow, grid, where | counted | listed, sized, 8, 1),
            Launch(_tally, grid, where | counted | listed | tallied, sized, 4, 1),
            Launch(
                _collect,
                grid,
                where | listed | tallied | results,
                sized | {"MARK": not is_last},
                4,
                1,
            ),
        ]
    return Selection(positions, count), todo


def _cleared(tensor: Tensor) -> Launch:
    size, block = tensor.numel(), 4096
    return Launch(
        _clear, (math.ceil(size / block),), {"ptr": tensor, "size": size}, {"BLOCK": block}, 4, 1
    )


def bytes_moved(problem: Problem) -> dict[str, int]:
    """Bytes that each kernel reads and writes, for requests as long as the cache.

    If a candidate in 30 reaches the first digit's threshold, or all winners and as many again,
    whichever is more. Votes that tie in masses take up to 8 times `shortlist` more.
    """
    p = problem
    n_rows = p.B * p.S
    votes = 4 * n_rows * p.Lk
    listed = n_rows * min(p.Lk, max(2 * p.config.k, p.Lk // 30))
    first_bins, bins, all_bins = (
        4 * n_rows * size.value for size in (_FIRST_BINS, _BINS, _ALL_BINS)
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
