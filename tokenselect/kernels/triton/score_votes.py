"""Device code of `score`: from sums to logsumexp, from stored logits to votes, and pooling."""

import triton
import triton.language as tl

from tokenselect.kernels.triton.device import COUNTS, LN2, length, regions, wait_for_previous
from tokenselect.kernels.triton.score_logits import NONE, RUN


@triton.jit(do_not_specialize=[*COUNTS, "Lk"])
def normalize(
    max_ptr,
    sum_ptr,
    norm_ptr,
    lse_ptr,
    cleared_ptr,
    seqlens_ptr,
    Hkv,
    G,
    Lk,
    n_voters,
    n_segments,
    n_rows,
    n_cleared,
    first_lse_voter,
    R: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLEARS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Add up one voter's segments in order; store norm, and lse if the voter is a mean of all.

    norm (B, R, Hkv, n_voters): log2 of the sum that the voter's softmax divides by.
    lse (B, Hq): natural, of the mean of all queries on the last ballot.
    CLEARS: set n_cleared numbers to zero too, which kernels after this one count in.
    """
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if CLEARS:
        for start in range(tl.program_id(0) * 1024, n_cleared, tl.num_programs(0) * 1024):
            at = start + tl.arange(0, 1024)
            tl.store(cleared_ptr + at, tl.zeros([1024], tl.int32), mask=at < n_cleared)
    v, group = row % n_voters, row // n_voters
    g, r, b = group % Hkv, group // Hkv % R, group // Hkv // R
    n = length(seqlens_ptr, b, Lk)
    used = tl.cdiv(n, SEGMENT_TOKENS)
    all_tokens = _logsumexp(max_ptr, sum_ptr, row * n_segments, used, BLOCK)
    norm = all_tokens
    if CANDIDATES:
        norm = _logsumexp(max_ptr, sum_ptr, (n_rows + row) * n_segments, used, BLOCK)
    tl.store(norm_ptr + row, norm)
    h = v - first_lse_voter
    is_lse = (h >= 0) & (h < G) & (r == R - 1)
    tl.store(lse_ptr + (b * Hkv + g) * G + h, all_tokens * LN2, mask=is_lse)


@triton.jit
def _logsumexp(max_ptr, sum_ptr, at, used, BLOCK: tl.constexpr):
    """Return log2 of the sum of the first `used` segments' sums."""
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


@triton.jit(do_not_specialize=COUNTS)
def vote(
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
    """Store the votes (B, R, S, Lk) of every n_programs-th tile of one row of (B, R, S).

    Votes are the softmax weights of all voters, added KV head by KV head; -inf off the candidates.
    FILLS: fill tiles without candidates too.
    """
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    program, row = pid % n_programs, pid // n_programs
    s, r, b = row % S, row // S % R, row // S // R
    n = length(seqlens_ptr, b, Lk)
    sink_end, local_start = regions(n, Lq, n_sink, n_local)
    n_row_voters = Hkv // S * n_voting
    first_tile, last_tile = sink_end // TILE, tl.cdiv(local_start, TILE)
    if FILLS:
        first_tile, last_tile = 0, n_tiles
    for tile in range(first_tile + program, last_tile, n_programs):
        place = tl.arange(0, TILE)
        position = tile * TILE + place
        is_candidate = (position >= sink_end) & (position < local_start)
        votes = tl.zeros([TILE], tl.float32)
        # Nothing was stored of a tile without candidates.
        has_candidates = _has_candidates(tile, sink_end, local_start, TILE)
        for start in range(0, tl.where(has_candidates, n_row_voters, 0), VOTERS):
            u = start + tl.arange(0, VOTERS)
            is_voter = u < n_row_voters
            head = (b * R + r) * Hkv + s * (Hkv // S) + u // n_voting
            voter = head.to(tl.int64) * n_voters + u % n_voting
            at_tile = voter * n_tiles + tile
            at = at_tile[:, None] * TILE + place[None, :]
            code = tl.load(code_ptr + at, mask=is_voter[:, None], other=0).to(tl.int32) << 8
            code += tl.load(fine_ptr + at, mask=is_voter[:, None], other=0).to(tl.int32)
            code = tl.reshape(code, VOTERS, TILE // RUN, RUN)
            at = at_tile[:, None] * (TILE // RUN) + tl.arange(0, TILE // RUN)[None, :]
            top = tl.load(top_ptr + at, mask=is_voter[:, None], other=0.0)
            step = tl.load(step_ptr + at, mask=is_voter[:, None], other=0.0)
            norm = tl.load(norm_ptr + voter, mask=is_voter, other=float("inf"))
            weight = (top - norm[:, None])[:, :, None] - code.to(tl.float32) * step[:, :, None]
            weight = tl.where(code != NONE, tl.exp2(weight), 0.0)
            votes += tl.sum(tl.reshape(weight, VOTERS, TILE), 0)
        votes = tl.where(is_candidate, votes, float("-inf"))
        tl.store(votes_ptr + row.to(tl.int64) * Lk + position, votes, mask=position < Lk)


@triton.jit(do_not_specialize=COUNTS)
def pool(
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
    """Store the maximum vote of the candidates at most `reach` away; FILLS as in `vote`."""
    wait_for_previous(PDL)
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


@triton.jit
def _has_candidates(block, sink_end, local_start, BLOCK: tl.constexpr):
    """Return whether a block of BLOCK positions has candidates."""
    first = block * BLOCK
    return (first < local_start) & (first + (BLOCK - 1) >= sink_end)
