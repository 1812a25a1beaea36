"""Device code of `attend`: attend to a split of a selection, and merge the splits.

Rows are the queries of one KV head: query i of its head h is row i * G + h. A place is a column of
a selection's positions. Logits are scaled by log2(e), so that weights are powers of two.
"""

import triton
import triton.language as tl

from tokenselect.kernels.triton.attend_tile import BEYOND, add_tile
from tokenselect.kernels.triton.device import (
    COUNTS,
    LN2,
    LOG2E,
    length,
    wait_for_previous,
)


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
    ROTATES: tl.constexpr,
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
    """Attend from ROWS rows to SPLIT places of a selection, or to the WHOLE of it.

    Of the WHOLE: store out (B, Hq, Lq, Dv) and lse (B, Hq, Lq). Of a split: store its sums of
    weighted values (B, Hkv, n_splits, Lq * G, Dv), maxima and sums of weights
    (B, Hkv, n_splits, Lq * G); a sum of weights below 0 says that a row sees nothing of it.
    """
    wait_for_previous(PDL)
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
    end_place = count
    if not WHOLE:
        first_place = split * SPLIT
        end_place = tl.minimum(first_place + SPLIT, count)
        if first_place >= count:
            return
    unmasked_end = end_place
    selected_ptr = positions_ptr + b.to(tl.int64) * stride_positions_b + s * stride_positions_s
    first_query = n - Lq + block * ROWS // G
    if not ONE_QUERY:
        # Positions ascend: no query of the block sees what comes after its last query.
        last_query = n - Lq + tl.minimum((block * ROWS + ROWS - 1) // G, Lq - 1)
        visible_places = tl.zeros([128], tl.int32)
        unmasked_places = tl.zeros([128], tl.int32)
        for start in range(first_place, end_place, 128):
            place = start + tl.arange(0, 128)
            is_place = place < end_place
            at = selected_ptr + (place.to(tl.int64) if WIDE else place) * stride_positions_place
            position = tl.load(at, mask=is_place, other=0)
            visible_places += (is_place & (position <= last_query)).to(tl.int32)
            unmasked_places += (is_place & (position <= first_query)).to(tl.int32)
        end_place = first_place + tl.sum(visible_places, 0)
        unmasked_end = first_place + tl.sum(unmasked_places, 0) // TILE * TILE
    if tl.float16 == DOT:
        # Mask every tile: an infinite value must not reach a row whose weight is 0 in float16 only.
        unmasked_end = first_place

    q_row = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_row = (q_row + query.to(tl.int64) * stride_qi)[:, None]
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    if WIDE:
        d, dv = d.to(tl.int64), dv.to(tl.int64)
    queries = 0
    q_steps = 0
    if ROTATES:
        # Rotate raw queries to the position they attend from; rotated ones back, by as much as the
        # newest token moves.
        if RAW:
            q_steps = count - Lq + query if CONTIGUOUS else query_position
        else:
            q_steps = n - count + tl.zeros([ROWS], tl.int32)
        # Negative where fewer tokens are selected than there are queries.
        q_steps = tl.minimum(tl.maximum(q_steps, -Lk), Lk)
    elif not CHUNKED:
        is_query = is_row[:, None] & (d < D)[None, :]
        queries = tl.load(q_row + d[None, :] * stride_qd, mask=is_query, other=0.0).to(DOT)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    lowest_position = BEYOND
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    head_ptr = k_ptr + g.to(tl.int64) * stride_head
    v_head_ptr = v_ptr + g.to(tl.int64) * v_stride_head
    # First the tiles that every row sees whole, then those that need the CAUSAL mask. Positions of
    # the former are loaded one tile ahead, or the rows of each tile would wait for them.
    UNMASKED_ONLY: tl.constexpr = ONE_QUERY and tl.float16 != DOT
    for CAUSAL in tl.static_range(1 if tl.float16 == DOT else 0, 1 if UNMASKED_ONLY else 2):
        if not CAUSAL:
            if unmasked_end > first_place:
                lowest_position = -1
            position = _load_positions(
                selected_ptr, first_place, end_place, stride_positions_place, TILE, WIDE
            )
        for start in tl.range(
            unmasked_end if CAUSAL else first_place,
            end_place if CAUSAL else unmasked_end,
            TILE,
            num_stages=1 if CAUSAL else STAGES,
        ):
            if CAUSAL:
                position = _load_positions(
                    selected_ptr, start, end_place, stride_positions_place, TILE, WIDE
                )
            else:
                following = _load_positions(
                    selected_ptr, start + TILE, end_place, stride_positions_place, TILE, WIDE
                )
            acc, largest, total, lowest_position = add_tile(
                acc, largest, total, lowest_position, start, end_place, position, n, b,
                query_position, queries, q_row, is_row, q_steps, head_ptr, v_head_ptr, table_ptr,
                high_ptr, low_ptr, scale, softcap, Lk, page_size, n_pages, stride_qd, stride_page,
                stride_row, stride_d, v_stride_page, v_stride_row, v_stride_d, stride_table_b,
                stride_table_page, d, dv, D, Dv, half,
                "causal" if CAUSAL else "end" if ONE_QUERY else "none",
                ROTATES, CONTIGUOUS, RAW, RAW_FACTOR, INTERLEAVED, SOFTCAP, HUGE_SCALE, PAGED,
                TILE, ROWS, BLOCK_D, CHUNKED, DOT, PRECISION, LOW_ROWS,
            )  # fmt: skip
            if not CAUSAL:
                position = following

    sees_any = lowest_position <= query_position
    if WHOLE:
        if SINKS:
            sink_at = sinks_ptr + head.to(tl.int64) * stride_sinks
            sink = _scaled_sink(tl.load(sink_at, mask=is_row, other=0.0))
        else:
            sink = tl.full([ROWS], float("-inf"), tl.float32)
        out, lse = _finish(acc, largest, total, sees_any, sink, SINKS)
        at = (b * Hkv * G + head).to(tl.int64) * Lq + query
        is_out = is_row[:, None] & (dv < Dv)[None, :]
        tl.store(out_ptr + at[:, None] * Dv + dv[None, :], _round(out, out_ptr), mask=is_out)
        tl.store(lse_ptr + at, lse, mask=is_row)
    else:
        at = ((b * Hkv + g).to(tl.int64) * n_splits + split) * (Lq * G) + row
        is_out = is_row[:, None] & (dv < Dv)[None, :]
        tl.store(acc_ptr + at[:, None] * Dv + dv[None, :], acc, mask=is_out)
        tl.store(max_ptr + at, largest, mask=is_row)
        tl.store(sum_ptr + at, tl.where(sees_any, total, -1.0), mask=is_row)


@triton.jit
def _load_positions(
    selected_ptr, start, end_place, stride_place, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """Load the positions at TILE places of a selection, -1 from end_place on."""
    place = start + tl.arange(0, TILE)
    at = selected_ptr + (place.to(tl.int64) if WIDE else place) * stride_place
    return tl.load(at, mask=place < end_place, other=-1)


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
    """Merge the splits of one row, SPLITS at a time in order, and store its out and lse."""
    wait_for_previous(PDL)
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
    sees_any = tl.zeros([1], tl.int32)
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
        sees_any = tl.maximum(sees_any, tl.max((sums < 0).to(tl.int32) ^ 1, 0))
        new = tl.maximum(largest, tl.max(tops, 0))
        safe = tl.where(tl.abs(new) == float("inf"), 0.0, new)
        old, weights = tl.exp2(largest - safe), tl.exp2(tops - safe)
        total = total * old + tl.sum(tl.where(sums < 0, 0.0, sums) * weights, 0)
        acc = acc * old[:, None] + tl.sum(parts * weights[:, None], 0)[None, :]
        largest = new
    if SINKS:
        sink_at = sinks_ptr + head.to(tl.int64) * stride_sinks + tl.zeros([1], tl.int32)
        sink = _scaled_sink(tl.load(sink_at))
    else:
        sink = tl.full([1], float("-inf"), tl.float32)
    out, lse = _finish(acc, largest, total, sees_any > 0, sink, SINKS)
    at = (b * Hkv * G + head).to(tl.int64) * Lq + row // G + tl.zeros([1], tl.int32)
    tl.store(
        out_ptr + at[:, None] * Dv + dv[None, :], _round(out, out_ptr), mask=(dv < Dv)[None, :]
    )
    tl.store(lse_ptr + at, lse)


@triton.jit
def _finish(acc, largest, total, sees_any, sink, SINKS: tl.constexpr):
    """Return out (N, Dv) and natural lse (N,) of rows from their sums, with the sink's weight."""
    safe = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    lse = tl.where(sees_any, (safe + tl.log2(total)) * LN2, float("-inf"))
    denominator = total
    if SINKS:
        stood = tl.where(largest == float("-inf"), largest, safe)
        top = tl.maximum(stood, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        shrunk = tl.exp2(stood - top)
        acc *= shrunk[:, None]
        denominator = total * shrunk + tl.exp2(sink - top)
    out = tl.where(sees_any[:, None], acc / denominator[:, None], 0.0)
    return out, lse


@triton.jit
def _scaled_sink(sink):
    """Return sink logits times log2(e), keeping finite ones finite."""
    sink = sink.to(tl.float32)
    times = tl.minimum(tl.maximum(sink * LOG2E, -3.4e38), 3.4e38)
    return tl.where(tl.abs(sink) < float("inf"), times, sink)


@triton.jit
def _round(x, ptr):
    """Round x to the dtype of ptr, to nearest even: the interpreter would truncate bfloat16."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 32767 + (bits >> 16 & 1) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(ptr.dtype.element_ty)
