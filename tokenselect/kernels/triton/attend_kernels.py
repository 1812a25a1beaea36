"""Device code of `attend`: a part of a selection for a block of queries, and their merge."""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import (
    COUNTS,
    LN2,
    LOG2E,
    after_previous,
    angles,
    capped,
    length,
    rotary_columns,
    rows,
    turned,
)

_BEYOND = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=[*COUNTS, "Lk", "K", "stride_positions_b", "stride_positions_s"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seqlens_ptr,
    positions_ptr,
    count_ptr,
    sinks_ptr,
    high_ptr,
    low_ptr,
    out_ptr,
    lse_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    scale,
    softcap,
    Hkv,
    G,
    Lq,
    Lk,
    K,
    n_splits,
    n_blocks,
    page_size,
    n_pages,
    stride_qb,
    stride_qh,
    stride_qi,
    stride_qd,
    stride_sinks,
    stride_page,
    stride_row,
    stride_head,
    stride_d,
    v_stride_page,
    v_stride_row,
    v_stride_head,
    v_stride_d,
    stride_table_b,
    stride_table_page,
    stride_positions_b,
    stride_positions_s,
    stride_positions_place,
    stride_count_b,
    stride_count_s,
    D: tl.constexpr,
    Dv: tl.constexpr,
    half: tl.constexpr,
    S: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    MOVES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    RAW: tl.constexpr,
    RAW_FACTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HUGE_SCALE: tl.constexpr,
    SINKS: tl.constexpr,
    PAGED: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LOW_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Attend to SPLIT places of a selection, or to the WHOLE and finish.

    Rows are the queries of one KV head: query i of its head h is row i * G + h.
    """
    after_previous(PDL)
    pid = tl.program_id(0)
    g, pid = pid % Hkv, pid // Hkv
    block, pid = pid % n_blocks, pid // n_blocks
    split, b = pid % n_splits, pid // n_splits
    s = g.to(tl.int64) if S > 1 else 0
    n = length(seqlens_ptr, b, Lk)
    count = tl.load(count_ptr + b.to(tl.int64) * stride_count_b + s * stride_count_s)
    count = tl.where(n > 0, tl.minimum(tl.maximum(count, 0), K), 0)
    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < Lq * G
    query, head = row // G, g * G + row % G
    query_position = n - Lq + query

    first_place = 0
    last_place = count
    if not WHOLE:
        first_place = split * SPLIT
        last_place = tl.minimum(first_place + SPLIT, count)
        if first_place >= count:
            return
    clean_place = last_place
    picked_ptr = positions_ptr + b.to(tl.int64) * stride_positions_b + s * stride_positions_s
    first_query = n - Lq + block * ROWS // G
    if not ONE_QUERY:
        # Positions ascend: what the block's last query does not see ends the walk.
        last_query = n - Lq + tl.minimum((block * ROWS + ROWS - 1) // G, Lq - 1)
        seen_places = tl.zeros([128], tl.int32)
        clean_places = tl.zeros([128], tl.int32)
        for start in range(first_place, last_place, 128):
            place = start + tl.arange(0, 128)
            is_place = place < last_place
            at = picked_ptr + (place.to(tl.int64) if WIDE else place) * stride_positions_place
            position = tl.load(at, mask=is_place, other=0)
            seen_places += (is_place & (position <= last_query)).to(tl.int32)
            clean_places += (is_place & (position <= first_query)).to(tl.int32)
        last_place = first_place + tl.sum(seen_places, 0)
        clean_place = first_place + tl.sum(clean_places, 0) // TILE * TILE
    if tl.float16 == DOT:
        # An infinite value must not reach a row whose weight only float16 takes for 0.
        clean_place = first_place

    q_row = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_row = (q_row + query.to(tl.int64) * stride_qi)[:, None]
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    if WIDE:
        d, dv = d.to(tl.int64), dv.to(tl.int64)
    if MOVES:
        # Raw queries go to where they are attended; rotated ones go back with the newest token.
        if RAW:
            q_steps = count - Lq + query if CONTIGUOUS else query_position
        else:
            q_steps = n - count + tl.zeros([ROWS], tl.int32)
        # Below 0 where fewer are selected than there are queries.
        q_steps = tl.minimum(tl.maximum(q_steps, -Lk), Lk)
    elif not CHUNKED:
        is_query = is_row[:, None] & (d < D)[None, :]
        queries = tl.load(q_row + d[None, :] * stride_qd, mask=is_query, other=0.0).to(DOT)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first_seen = _BEYOND
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    head_ptr = k_ptr + g.to(tl.int64) * stride_head
    v_head_ptr = v_ptr + g.to(tl.int64) * v_stride_head
    if MOVES or CHUNKED:
        queries = 0
    if not MOVES:
        q_steps = 0
    # Tiles that every row sees whole, then those that some row does not. Positions are loaded a
    # tile ahead: else the rows of a tile would wait for them, and be on the way alone.
    if tl.float16 != DOT:
        if clean_place > first_place:
            first_seen = -1
        position = _positions(
            picked_ptr, first_place, last_place, stride_positions_place, TILE, WIDE
        )
        SEEN: tl.constexpr = "tokens" if ONE_QUERY else "whole"
        for start in tl.range(first_place, clean_place, TILE, num_stages=STAGES):
            ahead = start + TILE
            following = _positions(
                picked_ptr, ahead, last_place, stride_positions_place, TILE, WIDE
            )
            acc, largest, total, first_seen = _add_tile(
                acc, largest, total, first_seen, start, last_place, position, n, b,
                query_position, queries, q_row, is_row, q_steps, head_ptr, v_head_ptr, table_ptr,
                high_ptr, low_ptr, scale, softcap, Lk, page_size, n_pages, stride_qd, stride_page,
                stride_row, stride_d, v_stride_page, v_stride_row, v_stride_d, stride_table_b,
                stride_table_page, d, dv, D, Dv, half, SEEN, MOVES, CONTIGUOUS, RAW, RAW_FACTOR,
                INTERLEAVED, SOFTCAP, HUGE_SCALE, PAGED, TILE, ROWS, BLOCK_D, CHUNKED, DOT,
                PRECISION, LOW_ROWS,
            )  # fmt: skip
            position = following
    if not ONE_QUERY or tl.float16 == DOT:
        for start in tl.range(clean_place, last_place, TILE, num_stages=1):
            position = _positions(picked_ptr, start, last_place, stride_positions_place, TILE, WIDE)
            acc, largest, total, first_seen = _add_tile(
                acc, largest, total, first_seen, start, last_place, position, n, b,
                query_position, queries, q_row, is_row, q_steps, head_ptr, v_head_ptr, table_ptr,
                high_ptr, low_ptr, scale, softcap, Lk, page_size, n_pages, stride_qd, stride_page,
                stride_row, stride_d, v_stride_page, v_stride_row, v_stride_d, stride_table_b,
                stride_table_page, d, dv, D, Dv, half, "causal", MOVES, CONTIGUOUS, RAW, RAW_FACTOR,
                INTERLEAVED, SOFTCAP, HUGE_SCALE, PAGED, TILE, ROWS, BLOCK_D, CHUNKED, DOT,
                PRECISION, LOW_ROWS,
            )  # fmt: skip

    sees = first_seen <= query_position
    if WHOLE:
        if SINKS:
            sink_at = sinks_ptr + head.to(tl.int64) * stride_sinks
            sink = _sink(tl.load(sink_at, mask=is_row, other=0.0))
        else:
            sink = tl.full([ROWS], float("-inf"), tl.float32)
        out, lse = _finished(acc, largest, total, sees, sink, SINKS)
        at = (b * Hkv * G + head).to(tl.int64) * Lq + query
        is_out = is_row[:, None] & (dv < Dv)[None, :]
        tl.store(out_ptr + at[:, None] * Dv + dv[None, :], _rounded(out, out_ptr), mask=is_out)
        tl.store(lse_ptr + at, lse, mask=is_row)
    else:
        # A sum below zero says that the row sees nothing of this share.
        at = ((b * Hkv + g).to(tl.int64) * n_splits + split) * (Lq * G) + row
        is_out = is_row[:, None] & (dv < Dv)[None, :]
        tl.store(acc_ptr + at[:, None] * Dv + dv[None, :], acc, mask=is_out)
        tl.store(max_ptr + at, largest, mask=is_row)
        tl.store(sum_ptr + at, tl.where(sees, total, -1.0), mask=is_row)


@triton.jit
def _positions(picked_ptr, start, last_place, stride_place, TILE: tl.constexpr, WIDE: tl.constexpr):
    """The positions at TILE places of a selection, -1 from last_place on."""
    place = start + tl.arange(0, TILE)
    at = picked_ptr + (place.to(tl.int64) if WIDE else place) * stride_place
    return tl.load(at, mask=place < last_place, other=-1)


@triton.jit
def _add_tile(
    acc,
    largest,
    total,
    first_seen,
    start,
    last_place,
    position,
    n,
    b,
    query_position,
    queries,
    q_row,
    is_row,
    q_steps,
    head_ptr,
    v_head_ptr,
    table_ptr,
    high_ptr,
    low_ptr,
    scale,
    softcap,
    Lk,
    page_size,
    n_pages,
    stride_qd,
    stride_page,
    stride_row,
    stride_d,
    v_stride_page,
    v_stride_row,
    v_stride_d,
    stride_table_b,
    stride_table_page,
    d,
    dv,
    D: tl.constexpr,
    Dv: tl.constexpr,
    half: tl.constexpr,
    SEEN: tl.constexpr,
    MOVES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    RAW: tl.constexpr,
    RAW_FACTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HUGE_SCALE: tl.constexpr,
    PAGED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_ROWS: tl.constexpr,
):
    """The sums of rows after one more TILE of places.

    SEEN: "whole" if every row sees all of it, "tokens" what lies before last_place, "causal" what
    is not after it.
    """
    place = start + tl.arange(0, TILE)
    is_token = (position >= 0) & (position < n)
    offset, is_token = rows(
        table_ptr,
        b,
        position,
        is_token,
        page_size,
        n_pages,
        stride_page,
        stride_row,
        stride_table_b,
        stride_table_page,
        PAGED,
    )
    v_offset, is_token = rows(
        table_ptr,
        b,
        position,
        is_token,
        page_size,
        n_pages,
        v_stride_page,
        v_stride_row,
        stride_table_b,
        stride_table_page,
        PAGED,
    )
    value_row = v_head_ptr + v_offset[:, None]
    is_value = is_token[:, None] & (dv < Dv)[None, :]
    values = tl.load(value_row + dv[None, :] * v_stride_d, mask=is_value, other=0.0).to(DOT)
    key_row = head_ptr + offset[:, None]
    logits = tl.zeros([ROWS, TILE], tl.float32)
    if MOVES:
        # Out to where they are attended; or, rotated, back by how far they stand beyond it.
        outward = place if CONTIGUOUS else position
        steps = outward if RAW else position - place
        steps = tl.minimum(tl.maximum(tl.where(is_token, steps, 0), 0), Lk)
        for first_column in range(0, half, BLOCK_D):
            column = first_column + d
            q_first, q_second = _pairs(
                q_row, is_row, column, q_steps, high_ptr, low_ptr, half, stride_qd,
                INTERLEAVED, RAW, LOW_ROWS,
            )  # fmt: skip
            first, second = _pairs(
                key_row, is_token, column, steps, high_ptr, low_ptr, half, stride_d,
                INTERLEAVED, RAW, LOW_ROWS,
            )  # fmt: skip
            q_first, q_second = q_first * RAW_FACTOR, q_second * RAW_FACTOR
            logits = tl.dot(q_first, tl.trans(first), logits, input_precision=PRECISION)
            logits = tl.dot(q_second, tl.trans(second), logits, input_precision=PRECISION)
        for first_d in range(2 * half, D, BLOCK_D):
            logits = _product(
                logits, q_row, key_row, is_row, is_token, first_d + d, D, stride_qd, stride_d,
                tl.float32, PRECISION,
            )  # fmt: skip
    elif CHUNKED:
        for first_d in range(0, D, BLOCK_D):
            logits = _product(
                logits, q_row, key_row, is_row, is_token, first_d + d, D, stride_qd, stride_d,
                DOT, PRECISION,
            )  # fmt: skip
    else:
        is_key = is_token[:, None] & (d < D)[None, :]
        keys = tl.load(key_row + d[None, :] * stride_d, mask=is_key, other=0.0).to(DOT)
        logits = tl.dot(queries, tl.trans(keys), logits, input_precision=PRECISION)
    if SOFTCAP:
        logits = capped(logits * scale, softcap) * LOG2E
    elif HUGE_SCALE:
        logits = logits * scale * LOG2E
    else:
        logits *= scale * LOG2E
    if SEEN == "tokens":
        logits = tl.where((place < last_place)[None, :], logits, float("-inf"))
    elif SEEN == "causal":
        # Where a token stands, for the causal rule; what is no token stands beyond all queries.
        stands = tl.where(is_token, position, _BEYOND)
        logits = tl.where(stands[None, :] <= query_position[:, None], logits, float("-inf"))
        first_seen = tl.minimum(first_seen, tl.min(stands, 0))
    new = tl.maximum(largest, tl.max(logits, 1))
    safe = tl.where(tl.abs(new) == float("inf"), 0.0, new)
    weights = tl.exp2(logits - safe[:, None])
    old = tl.exp2(largest - safe)
    total = total * old + tl.sum(weights, 1)
    acc *= old[:, None]
    largest = new

    if SEEN == "causal":
        # A value that some row does not see must not reach that row as 0 * NaN, nor an infinite
        # one a row whose weight only float16 takes for 0: tokens with such values are taken out,
        # and added to the rows that see them one by one.
        is_odd = tl.max(_is_finite(values, DOT).to(tl.int32) ^ 1, 1)
        values = tl.where(is_odd[:, None] > 0, 0.0, values)
        n_odd = tl.sum(is_odd, 0)
        order = tl.cumsum(is_odd, 0) * is_odd
        for odd in range(1, n_odd + 1):
            is_this = order == odd
            value = tl.sum(tl.where(is_this, v_offset, 0), 0) + dv * v_stride_d
            value = tl.load(v_head_ptr + value, mask=dv < Dv, other=0.0).to(tl.float32)
            weight = tl.sum(tl.where(is_this[None, :], weights, 0.0), 1)
            is_met = tl.sum(tl.where(is_this, position, 0), 0) <= query_position
            met = weight[:, None] * value[None, :]
            acc += tl.where(is_met[:, None], met, 0.0)
    acc = tl.dot(weights.to(DOT), values, acc, input_precision=PRECISION)
    return acc, largest, total, first_seen


@triton.jit
def _pairs(
    row,
    is_row,
    column,
    steps,
    high_ptr,
    low_ptr,
    half,
    stride_d,
    INTERLEAVED: tl.constexpr,
    RAW: tl.constexpr,
    LOW_ROWS: tl.constexpr,
):
    """Pairs of dims of rows in float32, turned out by `steps` positions; or back, if rotated.

    Steps may be negative.
    """
    first_dim, second_dim = rotary_columns(column, half, INTERLEAVED)
    mask = is_row[:, None] & (column < half)[None, :]
    first = tl.load(row + first_dim[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + second_dim[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    high, low = tl.abs(steps) // LOW_ROWS, tl.abs(steps) % LOW_ROWS
    cos, sin = angles(high_ptr, low_ptr, high, low, column, half, 1 if RAW else -1)
    sin = tl.where((steps < 0)[:, None], -sin, sin)
    return turned(first, second, cos, sin)


@triton.jit
def _product(
    logits,
    q_row,
    key_row,
    is_row,
    is_token,
    d,
    D,
    stride_qd,
    stride_d,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """logits (ROWS, TILE) and the products of dims d."""
    is_query = is_row[:, None] & (d < D)[None, :]
    is_key = is_token[:, None] & (d < D)[None, :]
    queries = tl.load(q_row + d[None, :] * stride_qd, mask=is_query, other=0.0).to(DOT)
    keys = tl.load(key_row + d[None, :] * stride_d, mask=is_key, other=0.0).to(DOT)
    return tl.dot(queries, tl.trans(keys), logits, input_precision=PRECISION)


@triton.jit
def _is_finite(x, DTYPE: tl.constexpr):
    """Which elements are neither infinite nor NaN, by their bits."""
    if tl.bfloat16 == DTYPE:
        is_finite = (x.to(tl.int16, bitcast=True) & 0x7FFF) < 0x7F80
    elif tl.float16 == DTYPE:
        is_finite = (x.to(tl.int16, bitcast=True) & 0x7FFF) < 0x7C00
    else:
        is_finite = tl.abs(x) < float("inf")
    return is_finite


@triton.jit(do_not_specialize=[*COUNTS, "Lk", "K"])
def merge(
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    count_ptr,
    seqlens_ptr,
    out_ptr,
    lse_ptr,
    Hkv,
    G,
    Lq,
    Lk,
    K,
    Dv,
    n_splits,
    stride_sinks,
    stride_count_b,
    stride_count_s,
    S: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One query row: its shares' sums, scaled to their common maximum, SPLITS of them at a time."""
    after_previous(PDL)
    pid = tl.program_id(0)
    row, pid = pid % (Lq * G), pid // (Lq * G)
    g, b = pid % Hkv, pid // Hkv
    s = g.to(tl.int64) if S > 1 else 0
    head = g * G + row % G
    n = length(seqlens_ptr, b, Lk)
    count = tl.load(count_ptr + b.to(tl.int64) * stride_count_b + s * stride_count_s)
    count = tl.where(n > 0, tl.minimum(tl.maximum(count, 0), K), 0)
    used = tl.cdiv(count, SPLIT)
    start_at = (b * Hkv + g).to(tl.int64) * n_splits
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sees = tl.zeros([1], tl.int32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    for start in range(0, used, SPLITS):
        split = start + tl.arange(0, SPLITS)
        is_used = split < used
        at = (start_at + split) * (Lq * G) + row
        tops = tl.load(max_ptr + at, mask=is_used, other=float("-inf"))
        sums = tl.load(sum_ptr + at, mask=is_used, other=-1.0)
        is_part = is_used[:, None] & (dv < Dv)[None, :]
        parts = tl.load(acc_ptr + at[:, None] * Dv + dv[None, :], mask=is_part, other=0.0)
        sees = tl.maximum(sees, tl.max((sums < 0).to(tl.int32) ^ 1, 0))
        new = tl.maximum(largest, tl.max(tops, 0))
        safe = tl.where(tl.abs(new) == float("inf"), 0.0, new)
        old, weights = tl.exp2(largest - safe), tl.exp2(tops - safe)
        total = total * old + tl.sum(tl.where(sums < 0, 0.0, sums) * weights, 0)
        acc = acc * old[:, None] + tl.sum(parts * weights[:, None], 0)[None, :]
        largest = new
    if SINKS:
        sink_at = sinks_ptr + head.to(tl.int64) * stride_sinks + tl.zeros([1], tl.int32)
        sink = _sink(tl.load(sink_at))
    else:
        sink = tl.full([1], float("-inf"), tl.float32)
    out, lse = _finished(acc, largest, total, sees > 0, sink, SINKS)
    at = (b * Hkv * G + head).to(tl.int64) * Lq + row // G + tl.zeros([1], tl.int32)
    tl.store(
        out_ptr + at[:, None] * Dv + dv[None, :], _rounded(out, out_ptr), mask=(dv < Dv)[None, :]
    )
    tl.store(lse_ptr + at, lse)


@triton.jit
def _finished(acc, largest, total, sees, sink, SINKS: tl.constexpr):
    """out and lse of rows, from their sums of weights and of weighted values."""
    safe = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    lse = tl.where(sees, (safe + tl.log2(total)) * LN2, float("-inf"))
    denominator = total
    if SINKS:
        stood = tl.where(largest == float("-inf"), largest, safe)
        top = tl.maximum(stood, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        shrunk = tl.exp2(stood - top)
        acc *= shrunk[:, None]
        denominator = total * shrunk + tl.exp2(sink - top)
    out = tl.where(sees[:, None], acc / denominator[:, None], 0.0)
    return out, lse


@triton.jit
def _sink(sink):
    """Sink logits times log2(e); finite ones stay so."""
    sink = sink.to(tl.float32)
    times = tl.minimum(tl.maximum(sink * LOG2E, -3.4e38), 3.4e38)
    return tl.where(tl.abs(sink) < float("inf"), times, sink)


@triton.jit
def _rounded(x, ptr):
    """x in the dtype behind ptr, to nearest even (the interpreter would cut bfloat16 off)."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 32767 + (bits >> 16 & 1) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(ptr.dtype.element_ty)
