"""Device code of `reuse`: the mean query, the decision, and the update of what is stored.

A query is the concatenation of its Hq heads: N = Hq * D columns.
"""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import COUNTS, length, wait_for_previous

# Queries, and products of a cosine, that are added up side by side: as `torch_reuse` does it.
_RUN = tl.constexpr(16)
_COLUMNS = tl.constexpr(512)


@triton.jit(do_not_specialize=COUNTS)
def mean(
    q_ptr,
    query_ptr,
    reciprocal_bits,
    Lq,
    D,
    N,
    n_blocks,
    stride_qb,
    stride_qh,
    stride_qi,
    stride_qd,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Store one block of columns of the mean (B, N) of each request's queries."""
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, b = pid % n_blocks, pid // n_blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    at = q_ptr + b.to(tl.int64) * stride_qb
    at = at + (column // D).to(tl.int64) * stride_qh + (column % D).to(tl.int64) * stride_qd
    sums = tl.zeros([_RUN, BLOCK], tl.float64)
    for start in range(0, Lq, _RUN):
        i = start + tl.arange(0, _RUN)
        is_query = (i < Lq)[:, None] & (column < N)[None, :]
        x = tl.load(at[None, :] + (i.to(tl.int64) * stride_qi)[:, None], mask=is_query, other=0.0)
        sums += x.to(tl.float32).to(tl.float64)
    mean = _halved(sums, 4) * _float64(reciprocal_bits)
    tl.store(query_ptr + b.to(tl.int64) * N + column, mean.to(tl.float32), mask=column < N)


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk", "K"])
def decide(
    q_ptr,
    seqlens_ptr,
    stored_query_ptr,
    stored_count_ptr,
    seqlen_at_selection_ptr,
    reused_ptr,
    lengths_ptr,
    query_ptr,
    theta_bits,
    S,
    K,
    Lq,
    Lk,
    N,
    max_reuse,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_stored_query_b,
    stride_stored_query_column,
    stride_stored_count_b,
    stride_stored_count_s,
    stride_seqlen_at_selection,
    D: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_THETA: tl.constexpr,
    CHUNKS: tl.constexpr,
    SELECTIONS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Decide whether one request reuses its selection; store that and its length for scoring.

    The length is 0 where the selection is reused. COPIES: store the one query of a decode too.
    theta_bits are those of theta * |theta|: cos >= theta is compared without root or division.
    """
    wait_for_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    row_ptr = q_ptr + b * stride_qb
    given = tl.load(seqlens_ptr + b)
    if HAS_THETA:
        # The conditions besides the cosine, loaded before it is computed.
        seqlen_at_selection = tl.load(seqlen_at_selection_ptr + b * stride_seqlen_at_selection)
        appended = length(seqlens_ptr, b, Lk) - seqlen_at_selection
        s = tl.arange(0, SELECTIONS)
        at = stored_count_ptr + b * stride_stored_count_b + s.to(tl.int64) * stride_stored_count_s
        count = tl.max(tl.load(at, mask=s < S, other=-2147483648), 0)
        is_recent = (seqlen_at_selection > 0) & (appended >= Lq) & (appended <= max_reuse)
        is_reusable = is_recent & (count + appended <= K)
    product = tl.zeros([_COLUMNS], tl.float64)
    power = tl.zeros([_COLUMNS], tl.float64)
    stored = tl.zeros([_COLUMNS], tl.float64)
    for start in range(0, N if HAS_THETA else 0, CHUNKS * _COLUMNS):
        # Loads of several chunks are in flight at once: nothing is stored between them. Chunks
        # past N add nothing.
        for chunk in tl.static_range(CHUNKS):
            column = start + chunk * _COLUMNS + tl.arange(0, _COLUMNS)
            x = _columns(row_ptr, column, D, N, stride_qh, stride_qd).to(tl.float64)
            y_at = stored_query_ptr + b * stride_stored_query_b
            y_at = y_at + column.to(tl.int64) * stride_stored_query_column
            y = tl.load(y_at, mask=column < N, other=0.0).to(tl.float64)
            product += x * y
            power += x * x
            stored += y * y
    if COPIES:
        for start in range(0, N, _COLUMNS):
            column = start + tl.arange(0, _COLUMNS)
            x = _columns(row_ptr, column, D, N, stride_qh, stride_qd)
            tl.store(query_ptr + b * N + column, x, mask=column < N)
    reused = tl.zeros([], tl.int1)
    if HAS_THETA:
        # Add up all three side by side.
        sums = tl.join(tl.join(product, power), tl.join(stored, stored))
        sums = _halved(tl.reshape(sums, [_COLUMNS, 4]), 9)
        side = tl.arange(0, 4)
        product = tl.sum(tl.where(side == 0, sums, 0.0), 0)
        stored = tl.sum(tl.where(side == 1, sums, 0.0), 0)
        power = tl.sum(tl.where(side == 2, sums, 0.0), 0)
        both = power * stored
        is_alike = (both > 0) & (both < float("inf"))
        is_alike = is_alike & (product * tl.abs(product) >= both * _float64(theta_bits))
        reused = is_alike & is_reusable
    tl.store(reused_ptr + b, reused)
    tl.store(lengths_ptr + b, tl.where(reused, 0, given))


@triton.jit(do_not_specialize=[*COUNTS, "S", "Lk"])
def update(
    seqlens_ptr,
    reused_ptr,
    query_ptr,
    positions_ptr,
    count_ptr,
    stored_query_ptr,
    stored_positions_ptr,
    stored_count_ptr,
    seqlen_at_selection_ptr,
    hits_ptr,
    misses_ptr,
    S,
    K,
    Lk,
    N,
    n_blocks,
    stride_positions_b,
    stride_positions_s,
    stride_positions_place,
    stride_count_b,
    stride_count_s,
    stride_stored_query_b,
    stride_stored_query_column,
    stride_stored_positions_b,
    stride_stored_positions_s,
    stride_stored_positions_place,
    stride_stored_count_b,
    stride_stored_count_s,
    stride_seqlen_at_selection,
    stride_hits,
    stride_misses,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Update one block of places of one selection, and a part of its request's query.

    A request that reuses its selection completes it: it reads the stored one and writes the call's.
    Any other stores its recomputed selection: it reads the call's and writes the stored one. So no
    program reads what another writes.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    s, b = (row % S).to(tl.int64), (row // S).to(tl.int64)
    n = length(seqlens_ptr, b, Lk)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_place = place < K
    at = positions_ptr + b * stride_positions_b + s * stride_positions_s
    at = at + place * stride_positions_place
    stored_at = stored_positions_ptr + b * stride_stored_positions_b + s * stride_stored_positions_s
    stored_at = stored_at + place * stride_stored_positions_place
    count_at = count_ptr + b * stride_count_b + s * stride_count_s
    stored_count_at = stored_count_ptr + b * stride_stored_count_b + s * stride_stored_count_s
    stored_seqlen_at = seqlen_at_selection_ptr + b * stride_seqlen_at_selection
    is_first = block + s == 0
    parts = tl.full([], n_blocks, tl.int64) * S
    if tl.load(reused_ptr + b):
        # Place r holds the stored position r; from count on, the positions appended since:
        # seqlen_at_selection, ..., n - 1.
        count = tl.load(stored_count_at)
        ahead = tl.load(stored_seqlen_at) - count
        total = n - ahead
        position = tl.load(stored_at, mask=is_place & (place < count), other=0)
        position = tl.where(place < count, position, (place + ahead).to(tl.int32))
        tl.store(at, tl.where(place < total, position, -1), mask=is_place)
        tl.store(count_at, total, mask=block == 0)
        hits_at = hits_ptr + b * stride_hits
        tl.store(hits_at, tl.load(hits_at) + 1, mask=is_first & (n > 0))
    else:
        tl.store(stored_at, tl.load(at, mask=is_place, other=0), mask=is_place)
        tl.store(stored_count_at, tl.load(count_at), mask=block == 0)
        for start in range((s * n_blocks + block) * BLOCK, N, parts * BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(query_ptr + b * N + column, mask=column < N, other=0.0)
            to = stored_query_ptr + b * stride_stored_query_b
            tl.store(to + column.to(tl.int64) * stride_stored_query_column, x, mask=column < N)
        tl.store(stored_seqlen_at, n, mask=is_first)
        misses_at = misses_ptr + b * stride_misses
        tl.store(misses_at, tl.load(misses_at) + 1, mask=is_first & (n > 0))


@triton.jit
def _columns(row_ptr, column, D, N, stride_h, stride_d):
    """Load columns of a query as float32, which is exact; 0 beyond N."""
    at = (column // D).to(tl.int64) * stride_h + (column % D).to(tl.int64) * stride_d
    return tl.load(row_ptr + at, mask=column < N, other=0.0).to(tl.float32)


@triton.jit
def _halved(x, LEVELS: tl.constexpr):
    """Return the sum (W,) of x (2**LEVELS, W), adding half onto half: every sum has two terms."""
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 0)
    return tl.sum(x, 0)


@triton.jit
def _float64(bits):
    """Return the float64 with these bits: a Python float would be passed as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
