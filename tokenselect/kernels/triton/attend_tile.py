"""Device code of `attend`: one tile of places: logits, mask, weights, weighted values."""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import (
    LOG2E,
    apply_softcap,
    cos_sin,
    locate,
    rotary_pairs,
    rotate,
)

# A position that no query sees.
BEYOND = tl.constexpr(2**31 - 1)


@triton.jit
def add_tile(
    acc,
    largest,
    total,
    lowest_position,
    start,
    end_place,
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
    MASK: tl.constexpr,
    ROTATES: tl.constexpr,
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
    """Add TILE places to the sums of rows; return acc, largest, total, lowest_position.

    acc (ROWS, Dv), largest and total (ROWS,): weighted values, maximal logit, sum of weights, all
    relative to the maximum. lowest_position: the first token's; rows before it see nothing.
    MASK: "none" where every row sees all places, "end" those before end_place only, "causal" for
    tokens no later than the row.
    """
    place = start + tl.arange(0, TILE)
    is_token = (position >= 0) & (position < n)
    page, row, is_token = locate(
        table_ptr, b, position, is_token,
        page_size, n_pages, stride_table_b, stride_table_page, PAGED,
    )  # fmt: skip
    offset = page * stride_page + row * stride_row
    v_offset = page * v_stride_page + row * v_stride_row
    value_row = v_head_ptr + v_offset[:, None]
    is_value = is_token[:, None] & (dv < Dv)[None, :]
    values = tl.load(value_row + dv[None, :] * v_stride_d, mask=is_value, other=0.0).to(DOT)
    key_row = head_ptr + offset[:, None]
    logits = tl.zeros([ROWS, TILE], tl.float32)
    if ROTATES:
        # Rotate raw keys to their positions; rotated ones back, by how far they move.
        outward = place if CONTIGUOUS else position
        steps = outward if RAW else position - place
        steps = tl.minimum(tl.maximum(tl.where(is_token, steps, 0), 0), Lk)
        for first_column in range(0, half, BLOCK_D):
            column = first_column + d
            q_first, q_second = _rotated_pairs(
                q_row, is_row, column, q_steps, high_ptr, low_ptr, half, stride_qd,
                INTERLEAVED, RAW, LOW_ROWS,
            )  # fmt: skip
            first, second = _rotated_pairs(
                key_row, is_token, column, steps, high_ptr, low_ptr, half, stride_d,
                INTERLEAVED, RAW, LOW_ROWS,
            )  # fmt: skip
            q_first, q_second = q_first * RAW_FACTOR, q_second * RAW_FACTOR
            logits = tl.dot(q_first, tl.trans(first), logits, input_precision=PRECISION)
            logits = tl.dot(q_second, tl.trans(second), logits, input_precision=PRECISION)
        for first_d in range(2 * half, D, BLOCK_D):
            logits = _add_product(
                logits, q_row, key_row, is_row, is_token, first_d + d, D, stride_qd, stride_d,
                tl.float32, PRECISION,
            )  # fmt: skip
    elif CHUNKED:
        for first_d in range(0, D, BLOCK_D):
            logits = _add_product(
                logits, q_row, key_row, is_row, is_token, first_d + d, D, stride_qd, stride_d,
                DOT, PRECISION,
            )  # fmt: skip
    else:
        is_key = is_token[:, None] & (d < D)[None, :]
        keys = tl.load(key_row + d[None, :] * stride_d, mask=is_key, other=0.0).to(DOT)
        logits = tl.dot(queries, tl.trans(keys), logits, input_precision=PRECISION)
    if SOFTCAP:
        logits = apply_softcap(logits * scale, softcap) * LOG2E
    elif HUGE_SCALE:
        logits = logits * scale * LOG2E
    else:
        logits *= scale * LOG2E
    if MASK == "end":
        logits = tl.where((place < end_place)[None, :], logits, float("-inf"))
    elif MASK == "causal":
        # The first query position that sees each place; none sees a place without a token.
        visible_from = tl.where(is_token, position, BEYOND)
        logits = tl.where(visible_from[None, :] <= query_position[:, None], logits, float("-inf"))
        lowest_position = tl.minimum(lowest_position, tl.min(visible_from, 0))
    new = tl.maximum(largest, tl.max(logits, 1))
    safe = tl.where(tl.abs(new) == float("inf"), 0.0, new)
    weights = tl.exp2(logits - safe[:, None])
    old = tl.exp2(largest - safe)
    total = total * old + tl.sum(weights, 1)
    acc *= old[:, None]
    largest = new

    if MASK == "causal":
        # A value must not reach a row that does not see it as 0 * NaN, nor an infinite one a row
        # whose weight is 0 in float16 only: tokens with such values are left out of the product,
        # and added one by one to the rows that see them.
        is_nonfinite = tl.max(_is_finite(values, DOT).to(tl.int32) ^ 1, 1)
        values = tl.where(is_nonfinite[:, None] > 0, 0.0, values)
        n_nonfinite = tl.sum(is_nonfinite, 0)
        order = tl.cumsum(is_nonfinite, 0) * is_nonfinite
        for nonfinite in range(1, n_nonfinite + 1):
            is_this = order == nonfinite
            value = tl.sum(tl.where(is_this, v_offset, 0), 0) + dv * v_stride_d
            value = tl.load(v_head_ptr + value, mask=dv < Dv, other=0.0).to(tl.float32)
            weight = tl.sum(tl.where(is_this[None, :], weights, 0.0), 1)
            is_visible = tl.sum(tl.where(is_this, position, 0), 0) <= query_position
            term = weight[:, None] * value[None, :]
            acc += tl.where(is_visible[:, None], term, 0.0)
    acc = tl.dot(weights.to(DOT), values, acc, input_precision=PRECISION)
    return acc, largest, total, lowest_position


@triton.jit
def _rotated_pairs(
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
    """Load pairs of dims of rows as float32, rotated forward by `steps` if RAW, else back.

    row (N, 1) pointers, column (H,), steps (N,), which may be negative -> (N, H) twice.
    """
    first_dim, second_dim = rotary_pairs(column, half, INTERLEAVED)
    mask = is_row[:, None] & (column < half)[None, :]
    first = tl.load(row + first_dim[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + second_dim[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    high, low = tl.abs(steps) // LOW_ROWS, tl.abs(steps) % LOW_ROWS
    cos, sin = cos_sin(high_ptr, low_ptr, high, low, column, half, 1 if RAW else -1)
    sin = tl.where((steps < 0)[:, None], -sin, sin)
    return rotate(first, second, cos, sin)


@triton.jit
def _add_product(
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
    """Add the products of dims d to logits (ROWS, TILE)."""
    is_query = is_row[:, None] & (d < D)[None, :]
    is_key = is_token[:, None] & (d < D)[None, :]
    queries = tl.load(q_row + d[None, :] * stride_qd, mask=is_query, other=0.0).to(DOT)
    keys = tl.load(key_row + d[None, :] * stride_d, mask=is_key, other=0.0).to(DOT)
    return tl.dot(queries, tl.trans(keys), logits, input_precision=PRECISION)


@triton.jit
def _is_finite(x, DTYPE: tl.constexpr):
    """Return which elements of x are neither infinite nor NaN, by their bits."""
    if tl.bfloat16 == DTYPE:
        is_finite = (x.to(tl.int16, bitcast=True) & 0x7FFF) < 0x7F80
    elif tl.float16 == DTYPE:
        is_finite = (x.to(tl.int16, bitcast=True) & 0x7FFF) < 0x7C00
    else:
        is_finite = tl.abs(x) < float("inf")
    return is_finite
