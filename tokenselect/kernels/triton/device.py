"""Device code that the stages share: lengths, regions, rows of the cache, rotation, softcap."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments whose values no kernel is compiled for. By default Triton compiles a kernel again, for
# seconds in the middle of serving, when an argument becomes 1, or starts or stops being divisible
# by 16. None of these tells how rows of values are aligned, which wide loads and stores depend on.
# Kernels add S, Lk and K where those do not tell it either.
COUNTS = (
    *("B", "Hkv", "G", "Lq", "max_reuse", "theta_bits", "reciprocal_bits"),
    *("millionths", "least", "most", "share"),
    *("n_sink", "n_local", "n_voters", "n_voting", "first_lse_voter", "n_query_means", "reach"),
    *("n_tiles", "n_segments", "n_splits", "n_blocks", "n_programs", "n_pages", "page_size"),
    *("n_rows", "n_cleared", "first_row", "rows_per_request", "candidate_sums"),
    *("stride_sinks", "stride_table_b", "stride_count_b", "stride_count_s"),
    *("stride_stored_count_b", "stride_stored_count_s"),
    *("stride_seqlen_at_selection", "stride_hits", "stride_misses"),
)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel is complete; the first statement of every kernel.

    With programmatic dependent launch this kernel may start while the previous one still runs.
    Nothing may be loaded or stored before this; the next kernel may be launched after it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def length(seqlens_ptr, b, Lk):
    """Return the length n of request b, clamped to 0 ... Lk: a bad length stays in bounds."""
    return tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), Lk)


@triton.jit
def regions(n, Lq, n_sink, n_local):
    """Return the end of the sink and the start of the local window: candidates lie between."""
    local_start = tl.maximum(0, n - Lq + 1 - n_local)
    return tl.minimum(n_sink, local_start), local_start


@triton.jit
def locate(
    table_ptr,
    b,
    position,
    is_token,
    page_size,
    n_pages,
    stride_table_b,
    stride_table_page,
    PAGED: tl.constexpr,
):
    """Return the page and the row in it of request b's tokens at `position`, and which exist.

    position, is_token and the results are (TILE,), but for the page of a contiguous cache: that is
    request b's only one, a number.
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
    return page, row, is_token


@triton.jit
def rotary_pairs(column, half, INTERLEAVED: tl.constexpr):
    """Return the dims of each pair that rotates together: (first, second)."""
    if INTERLEAVED:
        first, second = 2 * column, 2 * column + 1
    else:
        first, second = column, column + half
    return first, second


@triton.jit
def cos_sin(high_ptr, low_ptr, high, low, column, half, SIGN: tl.constexpr):
    """Return cos and sin of SIGN * (LOW * high + low) * inv_freq, as the sum of two angles.

    high (N,) or (1,), low (N,), column (H,) -> (N, H) each; 0 beyond the rotated dims.
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
def rotate(first, second, cos, sin):
    """Rotate pairs of dims."""
    return first * cos - second * sin, first * sin + second * cos


@triton.jit
def apply_softcap(s, softcap):
    """Return softcap * tanh(s / softcap), within a few roundings however small s / softcap is."""
    x = s / softcap
    y = x * x
    near = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    size = tl.where(tl.abs(x) < 0.25, tl.abs(s) * near, softcap * far)
    return tl.where(s < 0, -size, size)
