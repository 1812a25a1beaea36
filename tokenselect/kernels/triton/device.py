"""What the kernels share: where a token's row lies, regions, rotation, softcap."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that a kernel is not compiled anew for. Triton would where one becomes 1, or divisible
# by 16 or no longer: seconds, in the middle of serving. None of these says how rows of values are
# aligned, which wide loads and stores depend on; S, Lk and K are added where they do not.
COUNTS = (
    *("B", "Hkv", "G", "Lq", "share", "max_reuse", "theta_bits", "reciprocal_bits"),
    *("n_sink", "n_local", "n_voters", "n_voting", "first_lse_voter", "means", "reach"),
    *("n_tiles", "n_segments", "n_splits", "n_blocks", "n_programs", "n_pages", "page_size"),
    *("many_rows", "first_row", "rows_per_request", "candidate_sums"),
    *("stride_sinks", "stride_table_b", "stride_count_b", "stride_count_s"),
    *("stride_stored_count_b", "stride_stored_count_s"),
    *("stride_seen", "stride_hits", "stride_misses"),
)


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until the previous kernel is complete: the first statement of every kernel.

    With programmatic dependent launch this kernel may have been launched while that one still ran.
    Nothing may be loaded or stored before; the next kernel may be launched from here on.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def length(seqlens_ptr, b, Lk):
    """n of request b, kept within the cache whatever is stored there."""
    return tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), Lk)


@triton.jit
def regions(n, Lq, n_sink, n_local):
    """End of the sink, start of the local window; the candidates lie between."""
    local_start = tl.maximum(0, n - Lq + 1 - n_local)
    return tl.minimum(n_sink, local_start), local_start


@triton.jit
def rows(
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
    PAGED: tl.constexpr,
):
    """Where the rows of request b at `position` start, in elements, and which of them exist.

    A contiguous cache is the paged case with one page a request.
    """
    if PAGED:
        entry = (position // page_size).to(tl.int64) * stride_table_page
        entry += b.to(tl.int64) * stride_table_b
        page = tl.load(table_ptr + entry, mask=is_token, other=-1)
        is_token = is_token & (page >= 0) & (page < n_pages)
        page = tl.where(is_token, page, 0).to(tl.int64)
        row = (position % page_size).to(tl.int64)
    else:
        page = b.to(tl.int64)
        row = position.to(tl.int64)
    return page * stride_page + row * stride_row, is_token


@triton.jit
def rotary_columns(column, half, INTERLEAVED: tl.constexpr):
    """The dims that rotate together: (first, second) of each pair."""
    if INTERLEAVED:
        first, second = 2 * column, 2 * column + 1
    else:
        first, second = column, column + half
    return first, second


@triton.jit
def angles(high_ptr, low_ptr, high, low, column, half, SIGN: tl.constexpr):
    """Cosines and sines of SIGN * (LOW * high + low) * inv_freq, by the sum of two angles.

    high (N,) or (1,), low (N,), column (H,): (N, H) each. 0 beyond the rotated dims.
    """
    is_rotated = (column < half)[None, :]
    at_high = high_ptr + high[:, None].to(tl.int64) * (2 * half) + column[None, :]
    at_low = low_ptr + low[:, None] * (2 * half) + column[None, :]
    cos_high = tl.load(at_high, mask=is_rotated, other=0.0)
    sin_high = tl.load(at_high + half, mask=is_rotated, other=0.0)
    cos_low = tl.load(at_low, mask=is_rotated, other=0.0)
    sin_low = tl.load(at_low + half, mask=is_rotated, other=0.0)
    cos = cos_high * cos_low - sin_high * sin_low
    sin = sin_high * cos_low + cos_high * sin_low
    if SIGN < 0:
        sin = -sin
    return cos, sin


@triton.jit
def turned(first, second, cos, sin):
    """Pairs, rotated."""
    return first * cos - second * sin, first * sin + second * cos


@triton.jit
def capped(s, softcap):
    """softcap * tanh(s / softcap), to a few roundings of the result, however small s / softcap."""
    x = s / softcap
    y = x * x
    near = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    size = tl.where(tl.abs(x) < 0.25, tl.abs(s) * near, softcap * far)
    return tl.where(s < 0, -size, size)
