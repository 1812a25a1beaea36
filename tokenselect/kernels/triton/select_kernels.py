"""Device code of `select`: a radix select whose keys order as votes do.

A row is one of (B, S). Each has n_blocks blocks of BLOCK positions, one per program. What a row has
found is in its FOUND numbers; histograms are (R, rows, ALL_BINS).
"""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import COUNTS, length, regions, wait_for_previous

# Bins of a row's three histograms, one after the other.
FIRST_BINS = tl.constexpr(1024)
BINS = tl.constexpr(2048)
ALL_BINS = tl.constexpr(1024 + 2048 + 2048)
# Numbers per row that kernels pass on: leading digits and how many are needed, three times.
FOUND = tl.constexpr(6)


@triton.jit
def clear(ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Store zeros."""
    wait_for_previous(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptr + at, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=[*COUNTS, "S"])
def count(
    votes_ptr,
    taken_ptr,
    histogram_ptr,
    seqlens_ptr,
    S,
    Lq,
    Lk,
    n_sink,
    n_local,
    millionths,
    least,
    most,
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
    """Add the first digits of one block's candidates to the histogram.

    UNTAKES: before the first of several ballots, mark no candidate as taken.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, _ = _bounds(
        row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share
    )
    if block * BLOCK >= local_start:
        return
    position = block * BLOCK + tl.arange(0, BLOCK)
    is_candidate = (position >= sink_end) & (position < local_start)
    votes_ptr += first_vote
    votes_ptr += (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    key = _load_keys(votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN)
    _add_counts(
        histogram_ptr + (first_row + row).to(tl.int64) * ALL_BINS,
        key >> 22,
        is_candidate,
        FIRST_BINS,
    )
    if UNTAKES:
        at = taken_ptr + row.to(tl.int64) * Lk + position
        tl.store(at, tl.zeros([BLOCK], tl.int8), mask=is_candidate)


@triton.jit(do_not_specialize=[*COUNTS, "S"])
def shortlist(
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
    millionths,
    least,
    most,
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
    """List the candidates of one block whose first digit reaches the threshold, in order.

    Add the second digits of those that are on it to the histogram.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, need = _bounds(
        row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share
    )
    if block * BLOCK >= local_start:
        return
    histogram_ptr += (first_row + row).to(tl.int64) * ALL_BINS
    first, need = _threshold(histogram_ptr, need, FIRST_BINS)
    _store_found(found_ptr + row * FOUND, block, first, need)
    position = block * BLOCK + tl.arange(0, BLOCK)
    is_candidate = (position >= sink_end) & (position < local_start)
    votes_ptr += first_vote
    votes_ptr += (row // S).to(tl.int64) * stride_b + (row % S).to(tl.int64) * stride_s
    key = _load_keys(votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN)
    is_listed = is_candidate & (key >> 22 >= first)
    place = tl.cumsum(is_listed.to(tl.int32), 0) - 1
    at = (row.to(tl.int64) * n_blocks + block) * BLOCK + place
    tl.store(keys_ptr + at, key.to(tl.int32, bitcast=True), mask=is_listed)
    tl.store(positions_ptr + at, position, mask=is_listed)
    tl.store(sizes_ptr + row * n_blocks + block, tl.sum(is_listed.to(tl.int32), 0))
    is_second = is_listed & (key >> 22 == first)
    _add_few_counts(histogram_ptr + FIRST_BINS, key >> 11 & 2047, is_second, BLOCK)


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk"])
def narrow(
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
    millionths,
    least,
    most,
    share,
    n_blocks,
    first_row,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Add the third digits of one block's listed candidates to the histogram."""
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    _, local_start, _ = _bounds(
        row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share
    )
    if block * BLOCK >= local_start:
        return
    histogram_ptr += (first_row + row).to(tl.int64) * ALL_BINS
    found_ptr += row * FOUND
    first, need = _load_found(found_ptr)
    second, need = _threshold(histogram_ptr + FIRST_BINS, need, BINS)
    digits = first << 11 | second
    _store_found(found_ptr + 2, block, digits, need)
    key, is_listed = _load_shortlist(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
    is_third = is_listed & (key >> 11 == digits)
    _add_few_counts(histogram_ptr + FIRST_BINS + BINS, key & 2047, is_third, BLOCK)


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk"])
def tally(
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
    millionths,
    least,
    most,
    share,
    n_blocks,
    first_row,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Count the listed candidates of one block above the threshold, and those on it."""
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    _, local_start, _ = _bounds(
        row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share
    )
    if block * BLOCK >= local_start:
        return
    found_ptr += row * FOUND
    digits, need = _load_found(found_ptr + 2)
    histogram_ptr += (first_row + row).to(tl.int64) * ALL_BINS
    third, need = _threshold(histogram_ptr + FIRST_BINS + BINS, need, BINS)
    last = digits << 11 | third
    _store_found(found_ptr + 4, block, last, need)
    key, is_listed = _load_shortlist(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
    at = row * n_blocks + block
    tl.store(above_ptr + at, tl.sum((is_listed & (key > last)).to(tl.int32), 0))
    tl.store(tied_ptr + at, tl.sum((is_listed & (key == last)).to(tl.int32), 0))


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk", "K"])
def collect(
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
    millionths,
    least,
    most,
    share,
    n_blocks,
    MARK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Store the winners of one block, and a part of the sink, the local window and the padding.

    positions (B, S, K): ascending, -1 from count (B, S) on. Or, before another ballot, MARK the
    winners as taken, and store nothing else.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    sink_end, local_start, need = _bounds(
        row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share
    )
    won = need
    if block * BLOCK < local_start:
        last, need = _load_found(found_ptr + row * FOUND + 4)
        above = tl.zeros([BLOCK], tl.int32)
        tied = tl.zeros([BLOCK], tl.int32)
        for start in range(0, block, BLOCK):
            other = start + tl.arange(0, BLOCK)
            is_before = other < block
            above += tl.load(above_ptr + row * n_blocks + other, mask=is_before, other=0)
            tied += tl.load(tied_ptr + row * n_blocks + other, mask=is_before, other=0)
        tied_before = tl.sum(tied, 0)
        won_before = tl.sum(above, 0) + tl.minimum(tied_before, need)
        key, is_listed = _load_shortlist(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK)
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


@triton.jit
def _bounds(row, seqlens_ptr, S, Lq, Lk, n_sink, n_local, millionths, least, most, share):
    """Return a row's first candidate, the end of its candidates, and how many have to win.

    share: the millionths of the row's budget that this ballot and those before it fill.
    """
    n = length(seqlens_ptr, row // S, Lk)
    sink_end, local_start = regions(n, Lq, n_sink, n_local)
    budget = tl.minimum(tl.maximum(_part(millionths, n), least), most)
    return sink_end, local_start, tl.minimum(_part(share, budget), local_start - sink_end)


@triton.jit
def _part(millionths, count):
    """Return so many millionths of a count, rounded up."""
    return ((count.to(tl.int64) * millionths + 999999) // 1000000).to(tl.int32)


@triton.jit
def _load_keys(
    votes_ptr, taken_ptr, row, position, is_candidate, Lk, stride_j, TAKEN: tl.constexpr
):
    """Return unsigned keys that order as votes do: -0.0 as 0.0, NaN as -inf, taken ones first."""
    # Load more than the candidates, so that loads are wide.
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
def _load_shortlist(keys_ptr, sizes_ptr, row, block, n_blocks, BLOCK: tl.constexpr):
    """Load a block's shortlist (BLOCK,): keys, and which places hold one."""
    place = tl.arange(0, BLOCK)
    is_listed = place < tl.load(sizes_ptr + row * n_blocks + block)
    at = (row.to(tl.int64) * n_blocks + block) * BLOCK + place
    key = tl.load(keys_ptr + at, mask=is_listed, other=0)
    return key.to(tl.uint32, bitcast=True), is_listed


@triton.jit
def _add_counts(histogram_ptr, digit, is_counted, BINS: tl.constexpr):
    """Add a block's digits to a row's histogram; the order of integer additions is free."""
    counts = tl.histogram(digit.to(tl.int32), BINS, mask=is_counted)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _add_few_counts(histogram_ptr, digit, is_counted, BLOCK: tl.constexpr):
    """Add digits that few of a block have to a histogram: one by one, unless many tie."""
    if tl.sum(is_counted.to(tl.int32), 0) > BLOCK // 8:
        _add_counts(histogram_ptr, digit, is_counted, BINS)
    else:
        one = tl.full(digit.shape, 1, tl.int32)
        tl.atomic_add(histogram_ptr + digit.to(tl.int32), one, mask=is_counted, sem="relaxed")


@triton.jit
def _threshold(histogram_ptr, need, BINS: tl.constexpr):
    """Return the digit of the need-th largest, and how many of that digit are still needed."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    reaching = tl.cumsum(counts, 0, reverse=True)
    digit = tl.max(tl.where(reaching >= need, bins, 0), 0)
    above = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return digit.to(tl.uint32), need - above


@triton.jit
def _store_found(found_ptr, block, digits, need):
    """Store, once per row, the leading digits of the last winner's key, and how many of the keys
    that begin with them win.
    """
    tl.store(found_ptr, digits.to(tl.int32, bitcast=True), mask=block == 0)
    tl.store(found_ptr + 1, need, mask=block == 0)


@triton.jit
def _load_found(found_ptr):
    """Load what `_store_found` stored: the digits and the number."""
    return tl.load(found_ptr).to(tl.uint32, bitcast=True), tl.load(found_ptr + 1)
