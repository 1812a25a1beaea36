"""Stage 1: one read of the keys, logits kept in three bytes, votes summed in a fixed order.

voters     mean queries, placed where they score: only where they are not q itself
logits     keys times queries; each run's logits as steps below its maximum; sums of weights
normalize  those sums to the logsumexp of each voter
vote       softmax weights summed over the voters
pool       the maximum over neighbours

Weights and sums are powers of two: logits are scaled by log2(e) once. A tile is `tile` consecutive
tokens, of runs of 16; sums are kept for `segment` tiles and added in order, so that no result
depends on how many programs share the work, or on what else is in the batch.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect.contract import Problem, Scores
from tokenselect.kernels.triton import launch, recording
from tokenselect.kernels.triton.configs import TABLE, Config
from tokenselect.kernels.triton.device import (
    COUNTS,
    LN2,
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
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, padded
from tokenselect.kernels.triton.tables import LOW, Tables

# A logit is kept as its distance from its run's maximum, in steps: 0 to LAST, or NONE for a
# weight that is 0 in float32 whatever the maximum (FARTHEST, in powers of two). A run is RUN tokens
# in a row: as many as one warp of a matrix unit has, so that no warp waits for another.
_RUN = tl.constexpr(16)
_LAST = tl.constexpr(2**24 - 2)
_NONE = tl.constexpr(2**24 - 1)
_FARTHEST = tl.constexpr(150.0)
_LARGEST = tl.constexpr(3.4e38)


def score(problem: Problem) -> Scores:
    """See `tokenselect.reference.score`: soft votes within the error budget of float32."""
    scores: Scores = recording.run(launches, problem, fills=True)
    return scores


def score_candidates(problem: Problem) -> Scores:
    """`score` for a plan: no work past a request's end. Votes off the candidates are anything."""
    scores: Scores = recording.run(launches, problem, fills=False)
    return scores


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def _voters(
    q_ptr,
    seqlens_ptr,
    shift_ptr,
    high_ptr,
    low_ptr,
    out_ptr,
    factor_ptr,
    Hkv,
    G,
    Lq,
    Lk,
    D,
    half,
    means,
    n_voters,
    stride_qb,
    stride_qh,
    stride_qi,
    stride_qd,
    AT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RAW: tl.constexpr,
    RAW_FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    QUERIES: tl.constexpr,
    LOW_ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One mean query, as given or turned to AT ("true" or "fixed"), in PARTS that add up to it.

    The first `means` of a head are those of its runs of queries; one more is that of all.
    """
    after_previous(PDL)
    pid = tl.program_id(0)
    v = pid % n_voters
    b = pid // n_voters // Hkv
    run, head = v // G, pid // n_voters % Hkv * G + v % G
    n = length(seqlens_ptr, b, Lk)
    if n == 0:
        return
    size, larger = Lq // means, Lq % means
    start = run * size + tl.minimum(run, larger)
    stop = start + size + (run < larger).to(tl.int32)
    is_whole = run == means
    start, stop = tl.where(is_whole, 0, start), tl.where(is_whole, Lq, stop)

    column = tl.arange(0, HALF).to(tl.int64)
    first_dim, second_dim = rotary_columns(column, half, INTERLEAVED)
    rest_dim = 2 * half + tl.arange(0, REST).to(tl.int64)
    row_ptr = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    first = tl.zeros([HALF], tl.float32)
    second = tl.zeros([HALF], tl.float32)
    rest = tl.zeros([REST], tl.float32)
    for block in range(start, stop, QUERIES):
        i = block + tl.arange(0, QUERIES)
        q_row = (row_ptr + i.to(tl.int64) * stride_qi)[:, None]
        is_rotated = (i < stop)[:, None] & (column < half)[None, :]
        is_rest = (i < stop)[:, None] & (rest_dim < D)[None, :]
        x = tl.load(q_row + first_dim[None, :] * stride_qd, mask=is_rotated, other=0.0)
        y = tl.load(q_row + second_dim[None, :] * stride_qd, mask=is_rotated, other=0.0)
        z = tl.load(q_row + rest_dim[None, :] * stride_qd, mask=is_rest, other=0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        if AT == "true" or (AT == "fixed" and not RAW):
            # Out to its own position; or, standing there, back to the start.
            position = tl.minimum(tl.maximum(n - Lq + i, 0), Lk)
            high, low = position // LOW_ROWS, position % LOW_ROWS
            cos, sin = angles(high_ptr, low_ptr, high, low, column, half, 1 if RAW else -1)
            x, y = turned(x, y, cos, sin)
        if AT == "fixed":
            is_pair = (column < half)[None, :]
            cos = tl.load(shift_ptr + column[None, :], mask=is_pair, other=0.0)
            sin = tl.load(shift_ptr + half + column[None, :], mask=is_pair, other=0.0)
            x, y = turned(x, y, cos, sin)
        first += tl.sum(x, 0)
        second += tl.sum(y, 0)
        rest += tl.sum(z.to(tl.float32), 0)
    many = tl.maximum(stop - start, 1).to(tl.float32)
    first, second, rest = first / many, second / many, rest / many
    first, second = first * RAW_FACTOR, second * RAW_FACTOR

    # Between 1 and 2 at the largest, so that a float16's small parts are not lost. Other dtypes
    # have the range to keep them.
    largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
    is_usual = (largest > 1e-30) & (largest < 1e30) & (out_ptr.dtype.element_ty == tl.float16)
    factor = tl.where(is_usual, tl.exp2(tl.floor(tl.log2(tl.where(is_usual, largest, 1.0)))), 1.0)
    tl.store(factor_ptr + pid, factor)
    first, second, rest = first / factor, second / factor, rest / factor
    out_row = out_ptr + pid.to(tl.int64) * (PARTS * D)
    for part in tl.static_range(PARTS):
        at = out_row + part * D
        kept = _part(first, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + first_dim, kept.to(out_ptr.dtype.element_ty), mask=column < half)
        first -= kept
        kept = _part(second, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + second_dim, kept.to(out_ptr.dtype.element_ty), mask=column < half)
        second -= kept
        kept = _part(rest, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + rest_dim, kept.to(out_ptr.dtype.element_ty), mask=rest_dim < D)
        rest -= kept


@triton.jit
def _part(x, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """The leading bits of x, as many as DTYPE holds: three bfloat16 make up a float32 exactly."""
    if PARTS == 1:
        kept = x
    elif tl.bfloat16 == DTYPE:
        kept = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        kept = x.to(DTYPE).to(tl.float32)
    return kept


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def _logits(
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
    RUNS: tl.constexpr = TILE // _RUN
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
    code = tl.where(is_near, tl.minimum(code, _LAST), _NONE)
    code = tl.reshape(code, s.shape[0] * s.shape[1], s.shape[2])
    run = at_tile[None, :] * (TILE // _RUN) + tl.arange(0, TILE // _RUN)[:, None]
    tl.store(top_ptr + run, top, mask=is_voter[None, :])
    tl.store(step_ptr + run, step, mask=is_voter[None, :])
    at = at_tile[None, :] * TILE + tl.arange(0, TILE)[:, None]
    tl.store(code_ptr + at, (code >> 8).to(tl.uint16), mask=is_voter[None, :])
    tl.store(fine_ptr + at, (code & 255).to(tl.uint8), mask=is_voter[None, :])


@triton.jit
def _in_runs(s, TILE: tl.constexpr):
    """(TILE, VOTERS) as (runs, RUN, VOTERS)."""
    return tl.reshape(s, TILE // _RUN, _RUN, s.shape[1])


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


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def _normalize(
    max_ptr,
    sum_ptr,
    norm_ptr,
    lse_ptr,
    seqlens_ptr,
    Hkv,
    G,
    Lk,
    n_voters,
    n_segments,
    many_rows,
    first_lse_voter,
    R: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Add up one voter's segments, in order. norm, in powers of two, is what its softmax takes.

    lse (B, Hq), natural, is that of the mean of all queries on the last ballot.
    """
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    v, group = row % n_voters, row // n_voters
    g, r, b = group % Hkv, group // Hkv % R, group // Hkv // R
    n = length(seqlens_ptr, b, Lk)
    used = tl.cdiv(n, SEGMENT_TOKENS)
    all_tokens = _logsumexp(max_ptr, sum_ptr, row * n_segments, used, BLOCK)
    norm = all_tokens
    if CANDIDATES:
        norm = _logsumexp(max_ptr, sum_ptr, (many_rows + row) * n_segments, used, BLOCK)
    tl.store(norm_ptr + row, norm)
    h = v - first_lse_voter
    is_lse = (h >= 0) & (h < G) & (r == R - 1)
    tl.store(lse_ptr + (b * Hkv + g) * G + h, all_tokens * LN2, mask=is_lse)


@triton.jit
def _logsumexp(max_ptr, sum_ptr, at, used, BLOCK: tl.constexpr):
    """log2 of the sum of `used` segments' sums."""
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, used, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        is_used = segment < used
        top = tl.load(max_ptr + at + segment, mask=is_used, other=float("-inf"))
        sums = tl.load(sum_ptr + at + segment, mask=is_used, other=0.0)
        new = tl.maximum(largest, tl.max(top, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - safe) + tl.sum(sums * tl.exp2(top - safe), 0)
        largest = new
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.sum(safe + tl.log2(total), 0)


@triton.jit
def _has_candidates(block, sink_end, local_start, BLOCK: tl.constexpr):
    first = block * BLOCK
    return (first < local_start) & (first + (BLOCK - 1) >= sink_end)


@triton.jit(do_not_specialize=COUNTS)
def _vote(
    code_ptr,
    fine_ptr,
    top_ptr,
    step_ptr,
    norm_ptr,
    votes_ptr,
    seqlens_ptr,
    Hkv,
    Lq,
    Lk,
    n_sink,
    n_local,
    n_voters,
    n_voting,
    n_tiles,
    n_programs,
    R: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    VOTERS: tl.constexpr,
    FILLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Votes of every n_programs-th tile: the softmax weights of all voters, KV head by KV head.

    FILLS: tiles without candidates are filled too.
    """
    after_previous(PDL)
    pid = tl.program_id(0)
    program, row = pid % n_programs, pid // n_programs
    s, r, b = row % S, row // S % R, row // S // R
    n = length(seqlens_ptr, b, Lk)
    sink_end, local_start = regions(n, Lq, n_sink, n_local)
    many = Hkv // S * n_voting
    first_tile, last_tile = sink_end // TILE, tl.cdiv(local_start, TILE)
    if FILLS:
        first_tile, last_tile = 0, n_tiles
    for tile in range(first_tile + program, last_tile, n_programs):
        place = tl.arange(0, TILE)
        position = tile * TILE + place
        is_candidate = (position >= sink_end) & (position < local_start)
        votes = tl.zeros([TILE], tl.float32)
        # No voter has kept anything of a tile without candidates.
        has_candidates = _has_candidates(tile, sink_end, local_start, TILE)
        for start in range(0, tl.where(has_candidates, many, 0), VOTERS):
            u = start + tl.arange(0, VOTERS)
            is_voter = u < many
            head = (b * R + r) * Hkv + s * (Hkv // S) + u // n_voting
            voter = head.to(tl.int64) * n_voters + u % n_voting
            at_tile = voter * n_tiles + tile
            at = at_tile[:, None] * TILE + place[None, :]
            code = tl.load(code_ptr + at, mask=is_voter[:, None], other=0).to(tl.int32) << 8
            code += tl.load(fine_ptr + at, mask=is_voter[:, None], other=0).to(tl.int32)
            code = tl.reshape(code, VOTERS, TILE // _RUN, _RUN)
            at = at_tile[:, None] * (TILE // _RUN) + tl.arange(0, TILE // _RUN)[None, :]
            top = tl.load(top_ptr + at, mask=is_voter[:, None], other=0.0)
            step = tl.load(step_ptr + at, mask=is_voter[:, None], other=0.0)
            norm = tl.load(norm_ptr + voter, mask=is_voter, other=float("inf"))
            weight = (top - norm[:, None])[:, :, None] - code.to(tl.float32) * step[:, :, None]
            weight = tl.where(code != _NONE, tl.exp2(weight), 0.0)
            votes += tl.sum(tl.reshape(weight, VOTERS, TILE), 0)
        votes = tl.where(is_candidate, votes, float("-inf"))
        tl.store(votes_ptr + row.to(tl.int64) * Lk + position, votes, mask=position < Lk)


@triton.jit(do_not_specialize=COUNTS)
def _pool(
    votes_ptr,
    out_ptr,
    seqlens_ptr,
    Lq,
    Lk,
    n_sink,
    n_local,
    reach,
    rows_per_request,
    n_blocks,
    BLOCK: tl.constexpr,
    FILLS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The maximum over the candidates at most `reach` away; FILLS as in `_vote`."""
    after_previous(PDL)
    pid = tl.program_id(0)
    block, row = pid % n_blocks, pid // n_blocks
    n = length(seqlens_ptr, row // rows_per_request, Lk)
    sink_end, local_start = regions(n, Lq, n_sink, n_local)
    if not FILLS:  # noqa: SIM102  # decided when compiling
        if not _has_candidates(block, sink_end, local_start, BLOCK):
            return
    position = block * BLOCK + tl.arange(0, BLOCK)
    is_candidate = (position >= sink_end) & (position < local_start)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for away in range(-reach, reach + 1):
        other = position + away
        is_there = is_candidate & (other >= sink_end) & (other < local_start)
        at = votes_ptr + row.to(tl.int64) * Lk + other
        best = tl.maximum(best, tl.load(at, mask=is_there, other=float("-inf")))
    tl.store(out_ptr + row.to(tl.int64) * Lk + position, best, mask=position < Lk)


# --- the host's side ----------------------------------------------------------------------


def launches(
    problem: Problem, arch: str, fills: bool = True, source: Source = SOURCE
) -> tuple[Scores, list[Launch]]:
    """The scores to be, and the kernels that fill them: blocks without candidates if `fills`."""
    p, config = problem, TABLE[arch]
    B, R, S, Hkv, G, Lk, D = p.B, p.R, p.S, p.Hkv, p.G, p.Lk, p.D
    device = p.q.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.empty(shape, dtype, device)

    votes, lse = empty(B, R, S, Lk), empty(B, p.Hq)
    means = min(p.config.n_query_means, p.Lq)
    n_voting = means * G
    n_voters = n_voting + (G if means > 1 else 0)
    plain, moved, sign = _ballots(p)
    half = p.rope.rotary_dim // 2 if p.rope is not None and moved >= 0 else 0
    turn = _tables(p, source)
    block = _voters_at_once(config, moved, n_voters)
    tile = _tile(config, p, moved, block)
    n_tiles = math.ceil(Lk / tile)
    n_segments = math.ceil(n_tiles / config.segment)
    voter_rows = B * R * Hkv * n_voters
    codes = empty(voter_rows, n_tiles * tile, dtype=torch.uint16)
    fine = empty(voter_rows, n_tiles * tile, dtype=torch.uint8)
    n_runs = n_tiles * (tile // _RUN.value)
    top, step = empty(voter_rows, n_runs), empty(voter_rows, n_runs)
    kinds = 2 if p.config.normalize == "candidates" else 1
    largest, sums = (empty(kinds, voter_rows, n_segments) for _ in range(2))
    norm = empty(voter_rows)
    n_sink, n_local = min(p.config.n_sink, Lk), min(p.config.n_local, Lk)
    todo: list[Launch] = []

    def queries(ballot: int, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor]:
        """Launch `voters` for one ballot: (B, Hkv, voters, parts, D), and their factors."""
        out, factor = empty(B, Hkv, n_voters, parts, D, dtype=dtype), empty(B, Hkv, n_voters)
        score_at = p.config.ballots[ballot][0]
        turns = p.needs_rotation(score_at)
        pairs = p.rope.rotary_dim // 2 if turns and p.rope is not None else 0
        is_raw = p.rope is not None and p.rope.cached == "raw"
        # Raw keys lack the factor on cos and sin too: it is theirs and the query's.
        raw_factor = p.rope.scaling**2 if turns and p.rope is not None and is_raw else 1.0
        todo.append(
            Launch(
                _voters,
                (B * Hkv * n_voters,),
                dict(
                    q_ptr=p.q,
                    seqlens_ptr=p.cache_seqlens,
                    shift_ptr=turn.shift,
                    high_ptr=turn.high,
                    low_ptr=turn.low,
                    out_ptr=out,
                    factor_ptr=factor,
                    Hkv=Hkv,
                    G=G,
                    Lq=p.Lq,
                    Lk=Lk,
                    D=D,
                    half=pairs,
                    means=means,
                    n_voters=n_voters,
                    **_strides("q", p.q, "bhid"),
                ),
                dict(
                    AT=score_at if turns else "none",
                    INTERLEAVED=p.rope is not None and p.rope.interleaved,
                    RAW=is_raw,
                    RAW_FACTOR=raw_factor,
                    PARTS=parts,
                    HALF=padded(pairs),
                    REST=padded(D - 2 * pairs),
                    QUERIES=min(config.queries, triton.next_power_of_2(p.Lq)),
                    LOW_ROWS=LOW,
                ),
                8,
                1,
            )
        )
        return out, factor

    parts = 1
    plain_q = plain_factor = moved_q = moved_factor = p.q
    strides = {"qb": p.q.stride(0), "qg": G * p.q.stride(1), "qv": p.q.stride(1)}
    strides |= {"qpart": 0, "qd": p.q.stride(3)}
    needs_voters = plain >= 0 and (p.Lq > 1 or p.needs_rotation(p.config.ballots[plain][0]))
    if needs_voters:
        dtype = torch.float32 if moved >= 0 else p.q.dtype
        parts = 1 if dtype == torch.float32 else 3
        plain_q, plain_factor = queries(plain, dtype, parts)
        strides = {"qb": plain_q.stride(0), "qg": plain_q.stride(1), "qv": plain_q.stride(2)}
        strides |= {"qpart": D, "qd": 1}
    if moved >= 0:
        moved_q, moved_factor = queries(moved, torch.float32, 1)

    shared = B * Hkv * math.ceil(n_voters / block)
    n_programs = max(1, config.multiprocessors * config.programs // shared)
    n_programs = min(n_programs, n_segments)
    candidates = p.config.normalize == "candidates"
    in_float32 = _in_float32(p, moved)
    block_d = config.pairs if moved >= 0 else 32 if in_float32 else padded(D)
    warps = config.float32_warps if in_float32 else config.warps
    is_hoisted = (
        moved < 0 and D <= block_d <= 128 and (parts == 1 or (config.hoisted_parts and block <= 16))
    )
    if is_hoisted and block <= 32 and block_d == D and not in_float32:
        warps = config.few_warps
    stages = config.stages if parts == 1 else config.mean_stages
    stages = stages if block <= 16 else 1
    if in_float32:
        stages = 1 if moved >= 0 else min(stages, 2)
    todo.append(
        Launch(
            _logits,
            (n_programs * shared,),
            dict(
                q_ptr=plain_q,
                factor_ptr=plain_factor,
                moved_q_ptr=moved_q,
                moved_factor_ptr=moved_factor,
                k_ptr=p.k_cache,
                seqlens_ptr=p.cache_seqlens,
                high_ptr=turn.high,
                low_ptr=turn.low,
                code_ptr=codes,
                fine_ptr=fine,
                top_ptr=top,
                step_ptr=step,
                max_ptr=largest,
                sum_ptr=sums,
                scale=p.select_scale,
                softcap=launch.softcap(p),
                B=B,
                Hkv=Hkv,
                Lq=p.Lq,
                Lk=Lk,
                D=D,
                half=half,
                n_sink=n_sink,
                n_local=n_local,
                n_voters=n_voters,
                n_tiles=n_tiles,
                n_segments=n_segments,
                n_programs=n_programs,
                # A second set of sums, over the candidates, lies behind the first.
                candidate_sums=voter_rows * n_segments,
                **{f"stride_{name}": stride for name, stride in strides.items()},
                **launch.cache_arguments(p, p.k_cache),
            ),
            dict(
                PLAIN=plain,
                MOVED=moved,
                R=R,
                SIGN=sign,
                INTERLEAVED=p.rope is not None and p.rope.interleaved,
                PARTS=parts,
                HAS_FACTOR=needs_voters,
                SOFTCAP=p.softcap is not None,
                CANDIDATES=candidates,
                PAGED=p.is_paged,
                TILE=tile,
                SEGMENT=config.segment,
                VOTERS=block,
                BLOCK_D=block_d,
                CHUNKED=block_d < D,
                HOISTED=is_hoisted,
                DOT=launch.dot_dtype(p.q.dtype),
                PRECISION=config.float32,
                WIDE=launch.is_wide(p.q, p.k_cache),
                LOW_ROWS=LOW,
            ),
            warps,
            stages,
        )
    )
    todo.append(
        Launch(
            _normalize,
            (voter_rows,),
            dict(
                max_ptr=largest,
                sum_ptr=sums,
                norm_ptr=norm,
                lse_ptr=lse,
                seqlens_ptr=p.cache_seqlens,
                Hkv=Hkv,
                G=G,
                Lk=Lk,
                n_voters=n_voters,
                n_segments=n_segments,
                many_rows=voter_rows,
                first_lse_voter=n_voters - G,
            ),
            dict(
                R=R,
                CANDIDATES=candidates,
                SEGMENT_TOKENS=tile * config.segment,
                BLOCK=config.normalize_block,
            ),
            max(1, config.normalize_block // 256),
            1,
        )
    )
    vote_programs = math.ceil(config.multiprocessors * config.vote_programs / (B * R * S))
    vote_programs = min(vote_programs, n_tiles)
    pool = min(p.config.pool, 2 * Lk - 1)
    unpooled = votes if pool == 1 else empty(B, R, S, Lk)
    lengths: dict[str, Any] = dict(seqlens_ptr=p.cache_seqlens, Lq=p.Lq, Lk=Lk)
    lengths |= dict(n_sink=n_sink, n_local=n_local)
    todo.append(
        Launch(
            _vote,
            (vote_programs * B * R * S,),
            dict(
                code_ptr=codes,
                fine_ptr=fine,
                top_ptr=top,
                step_ptr=step,
                norm_ptr=norm,
                votes_ptr=unpooled,
                Hkv=Hkv,
                n_voters=n_voters,
                n_voting=n_voting,
                n_tiles=n_tiles,
                n_programs=vote_programs,
                **lengths,
            ),
            dict(
                R=R,
                S=S,
                TILE=tile,
                VOTERS=min(config.vote_voters, triton.next_power_of_2(Hkv // S * n_voting)),
                FILLS=fills,
            ),
            4,
            1,
        )
    )
    if pool > 1:
        n_blocks = math.ceil(Lk / config.pool_block)
        todo.append(
            Launch(
                _pool,
                (n_blocks * B * R * S,),
                dict(
                    votes_ptr=unpooled,
                    out_ptr=votes,
                    reach=pool // 2,
                    rows_per_request=R * S,
                    n_blocks=n_blocks,
                    **lengths,
                ),
                dict(BLOCK=config.pool_block, FILLS=fills),
                4,
                1,
            )
        )
    return Scores(votes, lse), todo


def _ballots(problem: Problem) -> tuple[int, int, int]:
    """Which ballot takes the keys as they lie, which turns them, and which way; -1 for none.

    Rotated keys are turned back to the start to be scored at a fixed distance, raw ones out to
    their position to be scored at the true one. No problem turns both ways.
    """
    plain = moved = -1
    sign = 1
    for ballot, (score_at, _) in enumerate(problem.config.ballots):
        is_raw = problem.rope is not None and problem.rope.cached == "raw"
        if problem.needs_rotation(score_at) and is_raw == (score_at == "true"):
            moved, sign = ballot, 1 if is_raw else -1
        else:
            plain = ballot
    return plain, moved, sign


def _tables(problem: Problem, source: Source) -> Tables:
    rope = problem.rope
    if rope is None or not any(
        problem.needs_rotation(score_at) for score_at, _ in problem.config.ballots
    ):
        stand_in = problem.q
        return Tables(stand_in, stand_in, stand_in)
    return source.tables(rope.inv_freq, problem.Lk, problem.config.n_local)


def _tile(config: Config, problem: Problem, moved: int, voters: int) -> int:
    """Tokens a tile: fewer of wide keys, of many voters, and where float32 is multiplied."""
    tile = config.tile if problem.D <= 128 and voters <= 32 else config.tile // 2
    return max(16, tile // 2) if _in_float32(problem, moved) else tile


def _voters_at_once(config: Config, moved: int, n_voters: int) -> int:
    """Voters that one read of the keys serves: fewer where keys are turned."""
    return min(16 if moved >= 0 else config.voters, padded(n_voters))


def _in_float32(problem: Problem, moved: int) -> bool:
    return moved >= 0 or problem.q.dtype == torch.float32


def _strides(name: str, tensor: Tensor, dims: str) -> dict[str, int]:
    return {f"stride_{name}{dim}": tensor.stride(i) for i, dim in enumerate(dims)}


def bytes_moved(problem: Problem, arch: str = "sm_90") -> dict[str, int]:
    """Bytes that each kernel reads and writes, for requests as long as the cache."""
    p, item = problem, problem.q.dtype.itemsize
    means = min(p.config.n_query_means, p.Lq)
    voters = p.B * p.R * p.Hkv * (means * p.G + (p.G if means > 1 else 0))
    voting = p.B * p.R * p.Hkv * means * p.G
    config = TABLE[arch]
    _, moved, _ = _ballots(p)
    n_voters = voters // (p.B * p.R * p.Hkv)
    block = _voters_at_once(config, moved, n_voters)
    tile = _tile(config, p, moved, block)
    n_tiles = math.ceil(p.Lk / tile)
    n_runs = n_tiles * (tile // _RUN.value)
    n_segments = math.ceil(n_tiles / config.segment)
    reads = math.ceil(n_voters / block)
    keys = p.B * p.Hkv * p.Lk * p.D * item * reads
    votes = 4 * p.B * p.R * p.S * p.Lk
    moved_bytes = {
        "logits": keys + voters * (3 * p.Lk + 8 * n_runs + 8 * n_segments),
        "normalize": voters * (8 * n_segments + 4),
        "vote": voting * (3 * p.Lk + 8 * n_runs) + votes,
    }
    if p.config.pool > 1:
        moved_bytes["pool"] = 2 * votes
    return moved_bytes
