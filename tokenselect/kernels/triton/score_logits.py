"""Device code of `score`: keys times queries, kept in three bytes, and sums of weights."""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import (
    COUNTS,
    LOG2E,
    after_previous,
    angles,
    capped,
    length,
    regions,
    rotary_columns,
    rows,
    turned,
)

# A logit is kept as its distance from its run's maximum, in steps: 0 to LAST, or NONE for a
# weight that is 0 in float32 whatever the maximum (FARTHEST, in powers of two). A run is RUN tokens
# in a row: as many as one warp of a matrix unit has, so that no warp waits for another.
RUN = tl.constexpr(16)
NONE = tl.constexpr(2**24 - 1)
_LAST = tl.constexpr(2**24 - 2)
_FARTHEST = tl.constexpr(150.0)
_LARGEST = tl.constexpr(3.4e38)


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def logits(
    q_ptr,
    factor_ptr,
    moved_q_ptr,
    moved_factor_ptr,
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
    MOVED: tl.constexpr,
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
    """Logits of one KV head's voters over a share of the tiles; the keys are read once.

    PLAIN is the ballot scored with keys as they lie, MOVED the one with keys turned by SIGN times
    their position, -1 for none. If none are turned, they are multiplied in the cache's dtype by
    PARTS of the queries; else both ballots are scored in float32, from one read. HOISTED: all dims
    of the one part, or the three, are loaded once for all tiles.
    """
    after_previous(PDL)
    # KV heads fastest: of token-major pages, neighbours read neighbouring rows.
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
    # Rows of the results: (B, R, Hkv, n_voters), tiles or segments after them.
    plain_row = ((b * R + PLAIN) * Hkv + g).to(tl.int64) * n_voters + voter
    moved_row = ((b * R + MOVED) * Hkv + g).to(tl.int64) * n_voters + voter
    q_row = (
        q_ptr
        + b.to(tl.int64) * stride_qb
        + g.to(tl.int64) * stride_qg
        + voter.to(tl.int64) * stride_qv
    )
    query_row = (b * Hkv + g).to(tl.int64) * n_voters + voter
    moved_q_row = moved_q_ptr + query_row * D
    head_ptr = k_ptr + g.to(tl.int64) * stride_head
    plain_factor = tl.full([VOTERS], 1.0, tl.float32)
    if HAS_FACTOR:
        plain_factor = tl.load(factor_ptr + query_row, mask=is_voter, other=0.0)
    if MOVED >= 0:
        moved_factor = tl.load(moved_factor_ptr + query_row, mask=is_voter, other=0.0)

    if HOISTED:
        queries = _queries(q_row, is_voter, dims, D, stride_qd, DOT)
        if PARTS == 3:
            second_part = _queries(q_row + stride_qpart, is_voter, dims, D, stride_qd, DOT)
            third_part = _queries(q_row + 2 * stride_qpart, is_voter, dims, D, stride_qd, DOT)
    RUNS: tl.constexpr = TILE // RUN
    plain_max = tl.full([RUNS, VOTERS], float("-inf"), tl.float32)
    plain_sum = tl.zeros([RUNS, VOTERS], tl.float32)
    plain_cmax = plain_max
    plain_csum = plain_sum
    moved_max = plain_max
    moved_sum = plain_sum
    moved_cmax = plain_max
    moved_csum = plain_sum
    for tile in tl.range(first_tile, last_tile):
        position = tile * TILE + tl.arange(0, TILE)
        offset, is_token = rows(
            table_ptr,
            b,
            position,
            position < n,
            page_size,
            n_pages,
            stride_page,
            stride_row,
            stride_table_b,
            stride_table_page,
            PAGED,
        )
        is_candidate = (position >= sink_end) & (position < local_start)
        is_end = ((tile + 1) % SEGMENT == 0) | (tile + 1 == last_tile)
        segment = tile // SEGMENT
        s = tl.zeros([TILE, VOTERS], tl.float32)
        if HOISTED:
            keys = _keys(head_ptr + offset, is_token, dims, D, stride_d, DOT)
            if PARTS == 3:  # the smallest first
                s = tl.dot(keys, third_part, s, input_precision=PRECISION)
                s = tl.dot(keys, second_part, s, input_precision=PRECISION)
            s = tl.dot(keys, queries, s, input_precision=PRECISION)
        elif MOVED < 0 and not CHUNKED:
            s = _product(
                s, head_ptr + offset, is_token, q_row, is_voter, dims,
                D, stride_d, stride_qd, stride_qpart, PARTS, DOT, PRECISION,
            )  # fmt: skip
        elif MOVED < 0:
            for first_d in range(0, D, BLOCK_D):
                d = first_d + dims
                s = _product(
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
                first_dim, second_dim = rotary_columns(column, half, INTERLEAVED)
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
                cos, sin = angles(high_ptr, low_ptr, high, low, column, half, SIGN)
                first, second = turned(first, second, cos, sin)
                x = tl.load(moved_q_row[None, :] + first_dim[:, None], mask=is_query, other=0.0)
                y = tl.load(moved_q_row[None, :] + second_dim[:, None], mask=is_query, other=0.0)
                t = tl.dot(first, x, t, input_precision=PRECISION)
                t = tl.dot(second, y, t, input_precision=PRECISION)
            for first_d in range(2 * half, D, BLOCK_D):
                d = first_d + dims
                t = _product(
                    t, head_ptr + offset, is_token, moved_q_row, is_voter, d,
                    D, stride_d, 1, 0, 1, tl.float32, PRECISION,
                )  # fmt: skip
                if PLAIN >= 0:
                    s = _product(
                        s, head_ptr + offset, is_token, q_row, is_voter, d,
                        D, stride_d, stride_qd, 0, 1, tl.float32, PRECISION,
                    )  # fmt: skip
            t = _in_powers_of_two(t * moved_factor[None, :] * scale, is_token, softcap, SOFTCAP)
            at_tile = moved_row * n_tiles + tile
            at_segment = moved_row * n_segments + segment
            _keep(t, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE)
            moved_max, moved_sum = _add(
                t,
                moved_max,
                moved_sum,
                is_end,
                max_ptr + at_segment,
                sum_ptr + at_segment,
                is_voter,
                TILE,
            )
            if CANDIDATES:
                t = tl.where(is_candidate[:, None], t, float("-inf"))
                at_segment += candidate_sums
                moved_cmax, moved_csum = _add(
                    t, moved_cmax, moved_csum, is_end,
                    max_ptr + at_segment, sum_ptr + at_segment, is_voter, TILE,
                )  # fmt: skip
        if PLAIN >= 0:
            s = _in_powers_of_two(s * plain_factor[None, :] * scale, is_token, softcap, SOFTCAP)
            at_tile = plain_row * n_tiles + tile
            at_segment = plain_row * n_segments + segment
            _keep(s, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE)
            plain_max, plain_sum = _add(
                s,
                plain_max,
                plain_sum,
                is_end,
                max_ptr + at_segment,
                sum_ptr + at_segment,
                is_voter,
                TILE,
            )
            if CANDIDATES:
                s = tl.where(is_candidate[:, None], s, float("-inf"))
                at_segment += candidate_sums
                plain_cmax, plain_csum = _add(
                    s, plain_cmax, plain_csum, is_end,
                    max_ptr + at_segment, sum_ptr + at_segment, is_voter, TILE,
                )  # fmt: skip


@triton.jit
def _product(
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
    """s (TILE, VOTERS) and the products of dims d of the keys and of each part of the queries."""
    keys = _keys(key_row, is_token, d, D, stride_d, DOT)
    for part in tl.static_range(PARTS):
        # The smallest part first.
        at = q_row + (PARTS - 1 - part) * stride_qpart
        queries = _queries(at, is_voter, d, D, stride_qd, DOT)
        s = tl.dot(keys, queries, s, input_precision=PRECISION)
    return s


@triton.jit
def _queries(q_row, is_voter, d, D, stride_qd, DOT: tl.constexpr):
    """Dims d of the voters' queries (d, VOTERS)."""
    is_query = is_voter[None, :] & (d < D)[:, None]
    at = q_row[None, :] + d[:, None] * stride_qd
    return tl.load(at, mask=is_query, other=0.0).to(DOT)


@triton.jit
def _keys(key_row, is_token, d, D, stride_d, DOT: tl.constexpr):
    """Dims d of a tile's keys (TILE, d); they are read once."""
    return tl.load(
        key_row[:, None] + d[None, :] * stride_d,
        mask=is_token[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    ).to(DOT)


@triton.jit
def _in_powers_of_two(s, is_token, softcap, SOFTCAP: tl.constexpr):
    """Logits times log2(e), -inf where not finite and where there is no token."""
    is_finite = is_token[:, None] & (tl.abs(s) < float("inf"))
    if SOFTCAP:
        s = capped(s, softcap)
    s = tl.minimum(tl.maximum(s * LOG2E, -_LARGEST), _LARGEST)
    return tl.where(is_finite, s, float("-inf"))


@triton.jit
def _keep(
    s, is_candidate, at_tile, is_voter, code_ptr, fine_ptr, top_ptr, step_ptr, TILE: tl.constexpr
):
    """Store a tile of the candidates' logits (TILE, VOTERS): runs' maxima, and steps below them.

    24 bits a logit: 16 in one plane, 8 in another. The error is half a step, 2**-25 of the run's
    range: what one rounding of float32 makes of the farthest distance. (In 16 bits it would be
    2**-17, beyond what float32 arithmetic explains.)
    """
    s = _in_runs(tl.where(is_candidate[:, None], s, float("-inf")), TILE)
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
def _in_runs(s, TILE: tl.constexpr):
    """(TILE, VOTERS) as (runs, RUN, VOTERS)."""
    return tl.reshape(s, TILE // RUN, RUN, s.shape[1])


@triton.jit
def _add(s, largest, total, is_end, max_at, sum_at, is_voter, TILE: tl.constexpr):
    """Each run's running maximum and sum of 2**(s - maximum), with the logits of one more tile.

    At the end of a segment the runs are put together and stored, and start anew.
    """
    s = _in_runs(s, TILE)
    new = tl.maximum(largest, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(largest - safe) + tl.sum(tl.exp2(s - safe[:, None, :]), 1)
    if is_end:
        top = tl.max(new, 0)
        below = new - tl.where(top == float("-inf"), 0.0, top)[None, :]
        tl.store(max_at, top, mask=is_voter)
        tl.store(sum_at, tl.sum(total * tl.exp2(below), 0), mask=is_voter)
        new = tl.full(new.shape, float("-inf"), tl.float32)
        total = tl.zeros(total.shape, tl.float32)
    return new, total
