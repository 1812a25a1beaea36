"""Device code of `score`: the mean queries that vote, placed where they score."""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import (
    COUNTS,
    cos_sin,
    length,
    rotary_pairs,
    rotate,
    wait_for_previous,
)


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def voters(
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
    n_query_means,
    n_voters,
    stride_qb,
    stride_qh,
    stride_qi,
    stride_qd,
    SCORE_AT: tl.constexpr,
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
    """Store one mean query of one query head, rotated to where it scores, and its factor.

    SCORE_AT: "true" or "fixed", where queries have to be rotated for that; else "none".
    out (B, Hkv, n_voters, PARTS, D): parts that add up to the mean, divided by factor
    (B, Hkv, n_voters). Voter mean * G + h of a KV head is its query head h's mean of one of
    n_query_means consecutive blocks of queries; if those are several, a last mean is that of all.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    v = pid % n_voters
    b = pid // n_voters // Hkv
    mean, head = v // G, pid // n_voters % Hkv * G + v % G
    n = length(seqlens_ptr, b, Lk)
    if n == 0:
        return
    size, longer = Lq // n_query_means, Lq % n_query_means
    start = mean * size + tl.minimum(mean, longer)
    stop = start + size + (mean < longer).to(tl.int32)
    is_of_all = mean == n_query_means
    start, stop = tl.where(is_of_all, 0, start), tl.where(is_of_all, Lq, stop)

    column = tl.arange(0, HALF).to(tl.int64)
    first_dim, second_dim = rotary_pairs(column, half, INTERLEAVED)
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
        if SCORE_AT == "true" or (SCORE_AT == "fixed" and not RAW):
            # Rotate a raw query to its own position, or a rotated one back to position 0.
            position = tl.minimum(tl.maximum(n - Lq + i, 0), Lk)
            high, low = position // LOW_ROWS, position % LOW_ROWS
            cos, sin = cos_sin(high_ptr, low_ptr, high, low, column, half, 1 if RAW else -1)
            x, y = rotate(x, y, cos, sin)
        if SCORE_AT == "fixed":
            is_pair = (column < half)[None, :]
            cos = tl.load(shift_ptr + column[None, :], mask=is_pair, other=0.0)
            sin = tl.load(shift_ptr + half + column[None, :], mask=is_pair, other=0.0)
            x, y = rotate(x, y, cos, sin)
        first += tl.sum(x, 0)
        second += tl.sum(y, 0)
        rest += tl.sum(z.to(tl.float32), 0)
    n_queries = tl.maximum(stop - start, 1).to(tl.float32)
    first, second, rest = first / n_queries, second / n_queries, rest / n_queries
    first, second = first * RAW_FACTOR, second * RAW_FACTOR

    # Scale the largest to between 1 and 2, so that float16 does not lose the small parts. Other
    # dtypes have the range to keep them.
    largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
    largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
    is_usual = (largest > 1e-30) & (largest < 1e30) & (out_ptr.dtype.element_ty == tl.float16)
    factor = tl.where(is_usual, tl.exp2(tl.floor(tl.log2(tl.where(is_usual, largest, 1.0)))), 1.0)
    tl.store(factor_ptr + pid, factor)
    first, second, rest = first / factor, second / factor, rest / factor
    out_row = out_ptr + pid.to(tl.int64) * (PARTS * D)
    for part in tl.static_range(PARTS):
        at = out_row + part * D
        leading = _leading_part(first, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + first_dim, leading.to(out_ptr.dtype.element_ty), mask=column < half)
        first -= leading
        leading = _leading_part(second, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + second_dim, leading.to(out_ptr.dtype.element_ty), mask=column < half)
        second -= leading
        leading = _leading_part(rest, PARTS, out_ptr.dtype.element_ty)
        tl.store(at + rest_dim, leading.to(out_ptr.dtype.element_ty), mask=rest_dim < D)
        rest -= leading


@triton.jit
def _leading_part(x, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the leading bits of x that DTYPE holds; three bfloat16 hold a float32 exactly."""
    if PARTS == 1:
        leading = x
    elif tl.bfloat16 == DTYPE:
        leading = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        leading = x.to(DTYPE).to(tl.float32)
    return leading
