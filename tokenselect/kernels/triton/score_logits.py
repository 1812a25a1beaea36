"""Device code of `score`: keys times queries, stored in three bytes, and sums of weights.

Results are rows of (B, R, Hkv, n_voters), with tokens, runs or segments after them. Logits are
scaled by log2(e), so that weights are powers of two.
"""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import (
    COUNTS,
    LOG2E,
    apply_softcap,
    cos_sin,
    length,
    locate,
    regions,
    rotary_pairs,
    rotate,
    wait_for_previous,
)

# A logit is stored as its distance below its run's maximum, in steps: 0 to LAST, or NONE where its
# weight is 0 in float32 whatever the maximum: below 2**-FARTHEST. A run is RUN consecutive tokens:
# as many as one warp has of a matrix product, so that no warp waits for another.
RUN = tl.constexpr(16)
NONE = tl.constexpr(2**24 - 1)
_LAST = tl.constexpr(2**24 - 2)
_FARTHEST = tl.constexpr(150.0)
_LARGEST = tl.constexpr(3.4e38)


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def logits(
    q_ptr,
    factor_ptr,
    rotated_q_ptr,
    rotated_factor_ptr,
    k_ptr,
    table_ptr,
    seqlens_ptr,
    high_ptr,
    low_ptr,
    code_ptr,
    fine_ptr,
    top_ptr,
    step_ptr,
    max_ptr,
    sum_ptr,
    scale,
    softcap,
    B,
    Hkv,
    Lq,
    Lk,
    D,
    half,
    n_sink,
    n_local,
    n_voters,
    n_tiles,
    n_segments,
    n_programs,
    candidate_sums,
    page_size,
    n_pages,
    stride_qb,
    stride_qg,
    stride_qv,
    stride_qpart,
    stride_qd,
    stride_page,
    stride_row,
    stride_head,
    stride_d,
    stride_table_b,
    stride_table_page,
    PLAIN: tl.constexpr,
    ROTATED: tl.constexpr,
    R: tl.constexpr,
    SIGN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PAGED: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    VOTERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKED: tl.constexpr,
    HOISTED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    LOW_ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Store logits and sums of weights of one KV head's voters, over some of its segments.

    PLAIN is the ballot scored with keys as cached, ROTATED the one with keys rotated by SIGN times
    their position; -1 for none. Without ROTATED, keys are multiplied in the cache's dtype by PARTS
    of the queries; with it both ballots are scored in float32, from one read of the keys. HOISTED:
    all dims of all parts are loaded once for all tiles. CANDIDATES: sum over candidates too.
    """
    wait_for_previous(PDL)
    # KV heads vary fastest: where pages are token-major, neighbours read neighbouring rows.
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(n_voters, VOTERS)
    g, pid = pid % Hkv, pid // Hkv
    block, pid = pid % n_blocks, pid // n_blocks
    b, program = pid % B, pid // B
    n = length(seqlens_ptr, b, Lk)
    used_tiles = tl.cdiv(n, TILE)
    used_segments = tl.cdiv(used_tiles, SEGMENT)
    share = tl.cdiv(used_segments, n_programs)
    first_tile = program * share * SEGMENT
    last_tile = tl.minimum(first_tile + share * SEGMENT, used_tiles)
    if first_tile >= last_tile:
        return
    sink_end, local_start = regions(n, Lq, n_sink, n_local)

    voter = block * VOTERS + tl.arange(0, VOTERS)
    is_voter = voter < n_voters
    dims = tl.arange(0, BLOCK_D)
    if WIDE:
        dims = dims.to(tl.int64)
    plain_row = ((b * R + PLAIN) * Hkv + g).to(tl.int64) * n_voters + voter
    rotated_row = ((b * R + ROTATED) * Hkv + g).to(tl.int64) * n_voters + voter
    q_row = (
        q_ptr
        + b.to(tl.int64) * stride_qb
        + g.to(tl.int64) * stride_qg
        + voter.to(tl.int64) * stride_qv
    )
    query_row = (b * Hkv + g).to(tl.int64) * n_voters + voter
    rotated_q_row = rotated_q_ptr + query_row * D
    head_ptr = k_ptr + g.to(tl.int64) * stride_head
    plain_factor = tl.full([VOTERS], 1.0, tl.float32)
    if HAS_FACTOR:
        plain_factor = tl.load(factor_ptr + query_row, mask=is_voter, other=0.0)
    if ROTATED >= 0:
        rotated_factor = tl.load(rotated_factor_ptr + query_row, mask=is_voter, other=0.0)

    if HOISTED:
        queries = _load_queries(q_row, is_voter, dims, D, stride_qd, DOT)
        if PARTS == 3:
            second_part = _load_queries(q_row + stride_qpart, is_voter, dims, D, stride_qd, DOT)
            third_part = _load_queries(q_row + 2 * stride_qpart, is_voter, dims, D, stride_qd, DOT)
    RUNS: tl.constexpr = TILE // RUN
    plain_max = tl.full([RUNS, VOTERS], float("-inf"), tl.float32)
    plain_sum = tl.zeros([RUNS, VOTERS], tl.float32)
    plain_candidate_max = plain_max
    plain_candidate_sum = plain_sum
    rotated_max = plain_max
    rotated_sum = plain_sum
    rotated_candidate_max = plain_max
    rotated_candidate_sum = plain_sum
    for tile in tl.range(first_tile, last_tile):
        position = tile * TILE + tl.arange(0, TILE)
        page, row, is_token = locate(
            table_ptr, b, position, position < n,
            page_size, n_pages, stride_table_b, stride_table_page, PAGED,
        )  # fmt: skip
        offset = page * stride_page + row * stride_row
        is_candidate = (position >= sink_end) & (position < local_start)
        is_segment_end = ((tile + 1) % SEGMENT == 0) | (tile + 1 == last_tile)
        segment = tile // SEGMENT
        s = tl.zeros([TILE, VOTERS], tl.float32)
        if HOISTED:
            keys = _load_keys(head_ptr + offset, is_token, dims, D, stride_d, DOT)
            if PARTS == 3:  # the smallest first
                s = tl.dot(keys, third_part, s, input_precision=PRECISION)
                s = tl.dot(keys, second_part, s, input_precision=PRECISION)
            s = tl.dot(keys, queries, s, input_precision=PRECISION)
        elif ROTATED < 0 and not CHUNKED:
            s = _add_product(
                s, head_ptr + offset, is_token, q_row, is_voter, dims,
                D, stride_d, stride_qd, stride_qpart, PARTS, DOT, PRECISION,
            )  # fmt: skip
        elif ROTATED < 0:
            for first_d in range(0, D, BLOCK_D):
                d = first_d + dims
                s = _add_product(
                    s, head_ptr + offset, is_token, q_row, is_voter, d,
                    D, stride_d, stride_qd, stride_qpart, PARTS, DOT, PRECISION,
                )  # fmt: skip
        else:
            t = tl.zeros([TILE, VOTERS], tl.float32)
            key_row = (head_ptr + offset)[:, None]
            low = tile * TILE % LOW_ROWS + tl.arange(0, TILE)
            high = tl.full([1], tile * TILE // LOW_ROWS, tl.int32)
            for first_column in range(0, half, BLOCK_D):
                column = first_column + dims
                first_dim, second_dim = rotary_pairs(column, half, INTERLEAVED)
                is_key = is_token[:, None] & (column < half)[None, :]
                first = tl.load(key_row + first_dim[None, :] * stride_d, mask=is_key, other=0.0)
                second = tl.load(key_row + second_dim[None, :] * stride_d, mask=is_key, other=0.0)
                first, second = first.to(tl.float32), second.to(tl.float32)
                is_query = is_voter[None, :] & (column < half)[:, None]
                if PLAIN >= 0:
                    at = q_row[None, :]
                    x = tl.load(at + first_dim[:, None] * stride_qd, mask=is_query, other=0.0)
                    y = tl.load(at + second_dim[:, None] * stride_qd, mask=is_query, other=0.0)
                    x, y = x.to(tl.float32), y.to(tl.float32)
                    s = tl.dot(first, x, s, input_precision=PRECISION)
                    s = tl.dot(second, y, s, input_precision=PRECISION)
                cos, sin = cos_sin(high_ptr, low_ptr, high, low, column, half, SIGN)
                first, second = rotate(first, second, cos, sin)
                x = tl.load(rotated_q_row[None, :] + first_dim[:, None], mask=is_query, other=0.0)
                y = tl.load(rotated_q_row[None, :] + second_dim[:, None], mask=is_query, other=0.0)
                t = tl.dot(first, x, t, input_precision=PRECISION)
                t = tl.dot(second, y, t, input_precision=PRECISION)
            for first_d in range(2 * half, D, BLOCK_D):
                d = first_d + dims
                t = _add_product(
                    t, head_ptr + offset, is_token, rotated_q_row, is_voter, d,
                    D, stride_d, 1, 0, 1, tl.float32, PRECISION,
                )  # fmt: skip
                if PLAIN >= 0:
                    s = _add_product(
                        s, head_ptr + offset, is_token, q_row, is_voter, d,
                        D, stride_d, stride_qd, 0, 1, tl.float32, PRECISION,
                    )  # fmt: skip
            t = _log2_scaled(t * rotated_factor[None, :] * scale, is_token, softcap, SOFTCAP)
            at_tile = rotated_row * n_tiles + tile
            at_segment = rotated_row * n_segments + segment
            _store_logits(
                t, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE
            )
            rotated_max, rotated_sum = _add_to_sums(
                t,
                rotated_max,
                rotated_sum,
                is_segment_end,
                max_ptr + at_segment,
                sum_ptr + at_segment,
                is_voter,
                TILE,
            )
            if CANDIDATES:
                t = tl.where(is_candidate[:, None], t, float("-inf"))
                at_segment += candidate_sums
                rotated_candidate_max, rotated_candidate_sum = _add_to_sums(
                    t, rotated_candidate_max, rotated_candidate_sum, is_segment_end,
                    max_ptr + at_segment, sum_ptr + at_segment, is_voter, TILE,
                )  # fmt: skip
        if PLAIN >= 0:
            s = _log2_scaled(s * plain_factor[None, :] * scale, is_token, softcap, SOFTCAP)
            at_tile = plain_row * n_tiles + tile
            at_segment = plain_row * n_segments + segment
            _store_logits(
                s, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE
            )
            plain_max, plain_sum = _add_to_sums(
                s,
                plain_max,
                plain_sum,
                is_segment_end,
                max_ptr + at_segment,
                sum_ptr + at_segment,
                is_voter,
                TILE,
            )
            if CANDIDATES:
                s = tl.where(is_candidate[:, None], s, float("-inf"))
                at_segment += candidate_sums
                plain_candidate_max, plain_candidate_sum = _add_to_sums(
                    s, plain_candidate_max, plain_candidate_sum, is_segment_end,
                    max_ptr + at_segment, sum_ptr + at_segment, is_voter, TILE,
                )  # fmt: skip


@triton.jit
def _add_product(
    s,
    key_row,
    is_token,
    q_row,
    is_voter,
    d,
    D,
    stride_d,
    stride_qd,
    stride_qpart,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the products of dims d of keys and of each part of queries to s (TILE, VOTERS)."""
    keys = _load_keys(key_row, is_token, d, D, stride_d, DOT)
    for part in tl.static_range(PARTS):
        # The smallest part first.
        at = q_row + (PARTS - 1 - part) * stride_qpart
        queries = _load_queries(at, is_voter, d, D, stride_qd, DOT)
        s = tl.dot(keys, queries, s, input_precision=PRECISION)
    return s


@triton.jit
def _load_queries(q_row, is_voter, d, D, stride_qd, DOT: tl.constexpr):
    """Load dims d of the voters' queries (d, VOTERS)."""
    is_query = is_voter[None, :] & (d < D)[:, None]
    at = q_row[None, :] + d[:, None] * stride_qd
    return tl.load(at, mask=is_query, other=0.0).to(DOT)


@triton.jit
def _load_keys(key_row, is_token, d, D, stride_d, DOT: tl.constexpr):
    """Load dims d of a tile's keys (TILE, d), which are read only once."""
    return tl.load(
        key_row[:, None] + d[None, :] * stride_d,
        mask=is_token[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    ).to(DOT)


@triton.jit
def _log2_scaled(s, is_token, softcap, SOFTCAP: tl.constexpr):
    """Return logits times log2(e), -inf where they are not finite or there is no token."""
    is_finite = is_token[:, None] & (tl.abs(s) < float("inf"))
    if SOFTCAP:
        s = apply_softcap(s, softcap)
    s = tl.minimum(tl.maximum(s * LOG2E, -_LARGEST), _LARGEST)
    return tl.where(is_finite, s, float("-inf"))


@triton.jit
def _store_logits(
    s, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE: tl.constexpr
):
    """Store the candidates' logits (TILE, VOTERS) of a tile: runs' maxima, and steps below them.

    24 bits per logit: the upper 16 at code_ptr, the lower 8 at fine_ptr. The error is half a step,
    2**-25 of the run's range: that of rounding the largest distance to float32 once. (With 16 bits
    it would be 2**-17, beyond the tolerance of float32 arithmetic.)
    """
    s = _split_into_runs(tl.where(is_candidate[:, None], s, float("-inf")), TILE)
    top = tl.max(s, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    distance = top[:, None, :] - s
    is_near = distance <= _FARTHEST
    distance = tl.where(is_near, distance, 0.0)
    step = tl.max(distance, 1) * (1.0 / _LAST)
    per_step = tl.where(step > 1e-30, 1.0 / tl.where(step > 1e-30, step, 1.0), 0.0)
    code = (distance * per_step[:, None, :] + 0.5).to(tl.int32)
    code = tl.where(is_near, tl.minimum(code, _LAST), NONE)
    code = tl.reshape(code, s.shape[0] * s.shape[1], s.shape[2])
    run = at_tile[None, :] * (TILE // RUN) + tl.arange(0, TILE // RUN)[:, None]
    tl.store(top_ptr + run, top, mask=is_voter[None, :])
    tl.store(step_ptr + run, step, mask=is_voter[None, :])
    at = at_tile[None, :] * TILE + tl.arange(0, TILE)[:, None]
    tl.store(code_ptr + at, (code >> 8).to(tl.uint16), mask=is_voter[None, :])
    tl.store(fine_ptr + at, (code & 255).to(tl.uint8), mask=is_voter[None, :])


@triton.jit
def _split_into_runs(s, TILE: tl.constexpr):
    """Reshape (TILE, VOTERS) to (runs, RUN, VOTERS)."""
    return tl.reshape(s, TILE // RUN, RUN, s.shape[1])


@triton.jit
def _add_to_sums(s, largest, total, is_segment_end, max_at, sum_at, is_voter, TILE: tl.constexpr):
    """Add a tile's logits s (TILE, VOTERS) to running maxima and sums; return both.

    largest and total (runs, VOTERS): of each run of the segment's tiles, the maximum and the sum
    of 2**(s - maximum). At the end of a segment the runs are merged and stored, and start again.
    """
    s = _split_into_runs(s, TILE)
    new = tl.maximum(largest, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(largest - safe) + tl.sum(tl.exp2(s - safe[:, None, :]), 1)
    if is_segment_end:
        top = tl.max(new, 0)
        below = new - tl.where(top == float("-inf"), 0.0, top)[None, :]
        tl.store(max_at, top, mask=is_voter)
        tl.store(sum_at, tl.sum(total * tl.exp2(below), 0), mask=is_voter)
        new = tl.full(new.shape, float("-inf"), tl.float32)
        total = tl.zeros(total.shape, tl.float32)
    return new, total
