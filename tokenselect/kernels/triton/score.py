"""Stage 1, on the host: what `score` launches.

voters     mean queries, rotated to where they score; not launched where those are q itself
logits     keys times queries: logits as steps below their run's maximum, and sums of weights
normalize  those sums to the logsumexp of each voter
vote       softmax weights, summed over the voters
pool       the maximum over neighbours

The kernels are in `score_voters`, `score_logits` and `score_votes`. A voter is a mean query of one
query head. A tile is `tile` consecutive tokens, in runs of 16; weights are summed per segment of
`segment` tiles, and segments are added in order, so that no result depends on how many programs
share the work, or on what else is in the batch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenselect.contract import Problem, Scores
from tokenselect.kernels.triton import launch, recording, score_logits, score_voters, score_votes
from tokenselect.kernels.triton.configs import TABLE, Config
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, padded, strides
from tokenselect.kernels.triton.tables import LOW, Tables


def score(problem: Problem) -> Scores:
    """Return soft votes (B, R, S, Lk) and lse (B, Hq), within the tolerance of float32."""
    scores: Scores = recording.run(launches, problem, fills=True)
    return scores


def score_candidates(problem: Problem) -> Scores:
    """Score for a plan: do no work beyond a request's end, and leave votes there undefined."""
    scores: Scores = recording.run(launches, problem, fills=False)
    return scores


class _Sizes(NamedTuple):
    """How one call is divided, on one architecture.

    plain          the ballot scored with keys as cached, -1 for none
    rotated, sign  the ballot scored with rotated keys, -1 for none, and which way they rotate
    n_voters       voters per KV head: n_voting that vote and, if those are of several blocks of
                   queries, G means of all queries, for lse
    voters         voters that one read of the keys serves
    tile           tokens that are multiplied at once
    n_rows         rows of stored logits: one per request, ballot, KV head and voter
    """

    plain: int
    rotated: int
    sign: int
    in_float32: bool
    n_query_means: int
    n_voting: int
    n_voters: int
    voters: int
    tile: int
    n_tiles: int
    n_runs: int
    n_segments: int
    n_rows: int


def _sizes(problem: Problem, config: Config) -> _Sizes:
    p = problem
    plain, rotated, sign = _ballots(p)
    in_float32 = rotated >= 0 or p.q.dtype == torch.float32
    n_query_means = min(p.config.n_query_means, p.Lq)
    n_voting = n_query_means * p.G
    n_voters = n_voting + (p.G if n_query_means > 1 else 0)
    # Fewer voters where keys are rotated; fewer tokens of wide keys, for many voters, in float32.
    voters = min(16 if rotated >= 0 else config.voters, padded(n_voters))
    tile = config.tile if p.D <= 128 and voters <= 32 else config.tile // 2
    tile = max(16, tile // 2) if in_float32 else tile
    n_tiles = math.ceil(p.Lk / tile)
    return _Sizes(
        plain=plain,
        rotated=rotated,
        sign=sign,
        in_float32=in_float32,
        n_query_means=n_query_means,
        n_voting=n_voting,
        n_voters=n_voters,
        voters=voters,
        tile=tile,
        n_tiles=n_tiles,
        n_runs=n_tiles * (tile // score_logits.RUN.value),
        n_segments=math.ceil(n_tiles / config.segment),
        n_rows=p.B * p.R * p.Hkv * n_voters,
    )


def _ballots(problem: Problem) -> tuple[int, int, int]:
    """Return the ballot that takes keys as cached, the one that rotates them, and which way.

    -1 for none. Rotated keys are rotated back to position 0 to be scored at a fixed distance, raw
    ones to their position to be scored at the true one. No problem does both.
    """
    plain = rotated = -1
    sign = 1
    for ballot, score_at in enumerate(problem.config.ballots):
        is_raw = problem.rope is not None and problem.rope.cached == "raw"
        if problem.needs_rotation(score_at) and is_raw == (score_at == "true"):
            rotated, sign = ballot, 1 if is_raw else -1
        else:
            plain = ballot
    return plain, rotated, sign


def launches(
    problem: Problem,
    arch: str,
    fills: bool = True,
    source: Source = SOURCE,
    cleared: Tensor | None = None,
) -> tuple[Scores, list[Launch]]:
    """Return the scores, yet to be filled, and the kernels that fill them.

    fills    fill blocks without candidates too
    cleared  int32 that `normalize` sets to zero, for kernels after it
    """
    p, config = problem, TABLE[arch]
    sizes = _sizes(p, config)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.empty(shape, dtype, p.q.device)

    votes, lse = empty(p.B, p.R, p.S, p.Lk), empty(p.B, p.Hq)
    per_logit, per_run = (sizes.n_rows, sizes.n_tiles * sizes.tile), (sizes.n_rows, sizes.n_runs)
    stored = {
        "code_ptr": empty(*per_logit, dtype=torch.uint16),
        "fine_ptr": empty(*per_logit, dtype=torch.uint8),
        "top_ptr": empty(*per_run),
        "step_ptr": empty(*per_run),
    }
    # Over all tokens and, behind those, over the candidates.
    kinds = 2 if p.config.normalize == "candidates" else 1
    sums = {name: empty(kinds, sizes.n_rows, sizes.n_segments) for name in ("max_ptr", "sum_ptr")}
    norm = empty(sizes.n_rows)
    tables = _tables(p, source)
    todo: list[Launch] = []

    def voters(ballot: int, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor]:
        """Launch the kernel for one ballot; return what it fills."""
        out = empty(p.B, p.Hkv, sizes.n_voters, parts, p.D, dtype=dtype)
        factor = empty(p.B, p.Hkv, sizes.n_voters)
        todo.append(_voters_launch(p, config, sizes, tables, ballot, out, factor))
        return out, factor

    parts = 1
    q = factor = rotated_q = rotated_factor = p.q
    q_strides = {"qb": q.stride(0), "qg": p.G * q.stride(1), "qv": q.stride(1)}
    q_strides |= {"qpart": 0, "qd": q.stride(3)}
    needs_voters = sizes.plain >= 0 and (
        p.Lq > 1 or p.needs_rotation(p.config.ballots[sizes.plain])
    )
    if needs_voters:
        dtype = torch.float32 if sizes.rotated >= 0 else p.q.dtype
        parts = 1 if dtype == torch.float32 else 3
        q, factor = voters(sizes.plain, dtype, parts)
        q_strides = {"qb": q.stride(0), "qg": q.stride(1), "qv": q.stride(2)}
        q_strides |= {"qpart": p.D, "qd": 1}
    if sizes.rotated >= 0:
        rotated_q, rotated_factor = voters(sizes.rotated, torch.float32, 1)
    queries: dict[str, Any] = {"q_ptr": q, "factor_ptr": factor}
    queries |= {"rotated_q_ptr": rotated_q, "rotated_factor_ptr": rotated_factor}
    queries |= {f"stride_{name}": stride for name, stride in q_strides.items()}

    todo.append(
        _logits_launch(p, config, sizes, tables, queries, parts, needs_voters, stored | sums)
    )
    normalized = sums | {"norm_ptr": norm, "lse_ptr": lse}
    todo.append(_normalize_launch(p, config, sizes, normalized, cleared))
    pool = min(p.config.pool, 2 * p.Lk - 1)
    unpooled = votes if pool == 1 else empty(p.B, p.R, p.S, p.Lk)
    tensors = stored | {"norm_ptr": norm, "votes_ptr": unpooled}
    todo.append(_vote_launch(p, config, sizes, tensors, fills))
    if pool > 1:
        todo.append(_pool_launch(p, config, pool, unpooled, votes, fills))
    return Scores(votes, lse), todo


def _tables(problem: Problem, source: Source) -> Tables:
    rope = problem.rope
    if rope is None or not any(
        problem.needs_rotation(score_at) for score_at in problem.config.ballots
    ):
        stand_in = problem.q
        return Tables(stand_in, stand_in, stand_in)
    return source.tables(rope.inv_freq, problem.Lk, problem.config.n_local)


def _voters_launch(
    problem: Problem,
    config: Config,
    sizes: _Sizes,
    tables: Tables,
    ballot: int,
    out: Tensor,
    factor: Tensor,
) -> Launch:
    p = problem
    score_at = p.config.ballots[ballot]
    rotates = p.needs_rotation(score_at)
    half = p.rope.rotary_dim // 2 if rotates and p.rope is not None else 0
    is_raw = p.rope is not None and p.rope.cached == "raw"
    # Raw keys lack the scaling of cos and sin too: the query gets the key's as well.
    raw_factor = p.rope.scaling**2 if rotates and p.rope is not None and is_raw else 1.0
    return Launch(
        score_voters.voters,
        (p.B * p.Hkv * sizes.n_voters,),
        dict(
            q_ptr=p.q,
            seqlens_ptr=p.cache_seqlens,
            shift_ptr=tables.shift,
            high_ptr=tables.high,
            low_ptr=tables.low,
            out_ptr=out,
            factor_ptr=factor,
            Hkv=p.Hkv,
            G=p.G,
            Lq=p.Lq,
            Lk=p.Lk,
            D=p.D,
            half=half,
            n_query_means=sizes.n_query_means,
            n_voters=sizes.n_voters,
            **strides("q", p.q, "bhid"),
        ),
        dict(
            SCORE_AT=score_at if rotates else "none",
            INTERLEAVED=p.rope is not None and p.rope.interleaved,
            RAW=is_raw,
            RAW_FACTOR=raw_factor,
            PARTS=out.shape[3],
            HALF=padded(half),
            REST=padded(p.D - 2 * half),
            QUERIES=min(config.queries, triton.next_power_of_2(p.Lq)),
            LOW_ROWS=LOW,
        ),
        8,
        1,
    )


def _logits_launch(
    problem: Problem,
    config: Config,
    sizes: _Sizes,
    tables: Tables,
    queries: dict[str, Any],
    parts: int,
    has_factor: bool,
    results: dict[str, Tensor],
) -> Launch:
    p, block, rotates = problem, sizes.voters, sizes.rotated >= 0
    shared = p.B * p.Hkv * math.ceil(sizes.n_voters / block)
    n_programs = max(1, config.multiprocessors * config.programs // shared)
    n_programs = min(n_programs, sizes.n_segments)
    block_d = config.pairs if rotates else 32 if sizes.in_float32 else padded(p.D)
    is_hoisted = (
        not rotates
        and p.D <= block_d <= 128
        and (parts == 1 or (config.hoisted_parts and block <= 16))
    )
    warps = config.float32_warps if sizes.in_float32 else config.warps
    if is_hoisted and block <= 32 and block_d == p.D and not sizes.in_float32:
        warps = config.few_warps
    stages = config.stages if parts == 1 else config.mean_stages
    stages = stages if block <= 16 else 1
    if sizes.in_float32:
        stages = 1 if rotates else min(stages, 2)
    return Launch(
        score_logits.logits,
        (n_programs * shared,),
        dict(
            k_ptr=p.k_cache,
            seqlens_ptr=p.cache_seqlens,
            high_ptr=tables.high,
            low_ptr=tables.low,
            scale=p.select_scale,
            softcap=launch.softcap(p),
            B=p.B,
            Hkv=p.Hkv,
            D=p.D,
            half=p.rope.rotary_dim // 2 if p.rope is not None and rotates else 0,
            n_voters=sizes.n_voters,
            n_tiles=sizes.n_tiles,
            n_segments=sizes.n_segments,
            n_programs=n_programs,
            candidate_sums=sizes.n_rows * sizes.n_segments,
            **_region_arguments(p),
            **queries,
            **results,
            **launch.cache_arguments(p, p.k_cache),
        ),
        dict(
            PLAIN=sizes.plain,
            ROTATED=sizes.rotated,
            R=p.R,
            SIGN=sizes.sign,
            INTERLEAVED=p.rope is not None and p.rope.interleaved,
            PARTS=parts,
            HAS_FACTOR=has_factor,
            SOFTCAP=p.softcap is not None,
            CANDIDATES=p.config.normalize == "candidates",
            PAGED=p.is_paged,
            TILE=sizes.tile,
            SEGMENT=config.segment,
            VOTERS=block,
            BLOCK_D=block_d,
            CHUNKED=block_d < p.D,
            HOISTED=is_hoisted,
            DOT=launch.dot_dtype(p.q.dtype),
            PRECISION=config.float32,
            WIDE=launch.is_wide(p.q, p.k_cache),
            LOW_ROWS=LOW,
        ),
        warps,
        stages,
    )


def _normalize_launch(
    problem: Problem,
    config: Config,
    sizes: _Sizes,
    tensors: dict[str, Tensor],
    cleared: Tensor | None,
) -> Launch:
    p = problem
    return Launch(
        score_votes.normalize,
        (sizes.n_rows,),
        dict(
            seqlens_ptr=p.cache_seqlens,
            Hkv=p.Hkv,
            G=p.G,
            Lk=p.Lk,
            n_voters=sizes.n_voters,
            n_segments=sizes.n_segments,
            n_rows=sizes.n_rows,
            first_lse_voter=sizes.n_voters - p.G,
            cleared_ptr=p.cache_seqlens if cleared is None else cleared,
            n_cleared=0 if cleared is None else cleared.numel(),
            **tensors,
        ),
        dict(
            R=p.R,
            CANDIDATES=p.config.normalize == "candidates",
            SEGMENT_TOKENS=sizes.tile * config.segment,
            BLOCK=config.normalize_block,
            CLEARS=cleared is not None,
        ),
        max(1, config.normalize_block // 256),
        1,
    )


def _vote_launch(
    problem: Problem,
    config: Config,
    sizes: _Sizes,
    tensors: dict[str, Tensor],
    fills: bool,
) -> Launch:
    p, rows = problem, problem.B * problem.R * problem.S
    n_programs = math.ceil(config.multiprocessors * config.vote_programs / rows)
    n_programs = min(n_programs, sizes.n_tiles)
    voters = p.Hkv // p.S * sizes.n_voting
    return Launch(
        score_votes.vote,
        (n_programs * rows,),
        dict(
            seqlens_ptr=p.cache_seqlens,
            Hkv=p.Hkv,
            n_voters=sizes.n_voters,
            n_voting=sizes.n_voting,
            n_tiles=sizes.n_tiles,
            n_programs=n_programs,
            **_region_arguments(p),
            **tensors,
        ),
        dict(
            R=p.R,
            S=p.S,
            TILE=sizes.tile,
            VOTERS=min(config.vote_voters, triton.next_power_of_2(voters)),
            FILLS=fills,
        ),
        4,
        1,
    )


def _pool_launch(
    problem: Problem, config: Config, pool: int, unpooled: Tensor, votes: Tensor, fills: bool
) -> Launch:
    p, n_blocks = problem, math.ceil(problem.Lk / config.pool_block)
    return Launch(
        score_votes.pool,
        (n_blocks * p.B * p.R * p.S,),
        dict(
            votes_ptr=unpooled,
            out_ptr=votes,
            seqlens_ptr=p.cache_seqlens,
            reach=pool // 2,
            rows_per_request=p.R * p.S,
            n_blocks=n_blocks,
            **_region_arguments(p),
        ),
        dict(BLOCK=config.pool_block, FILLS=fills),
        4,
        1,
    )


def _region_arguments(problem: Problem) -> dict[str, int]:
    """Return what `device.regions` takes."""
    p = problem
    n_sink, n_local = min(p.config.n_sink, p.Lk), min(p.config.n_local, p.Lk)
    return {"Lq": p.Lq, "Lk": p.Lk, "n_sink": n_sink, "n_local": n_local}


def bytes_moved(problem: Problem, arch: str = "sm_90") -> dict[str, int]:
    """Return the bytes that each kernel reads and writes, for requests as long as the cache."""
    p, sizes = problem, _sizes(problem, TABLE[arch])
    voting = p.B * p.R * p.Hkv * sizes.n_voting
    reads = math.ceil(sizes.n_voters / sizes.voters)
    keys = p.B * p.Hkv * p.Lk * p.D * p.q.dtype.itemsize * reads
    votes = 4 * p.B * p.R * p.S * p.Lk
    moved = {
        "logits": keys + sizes.n_rows * (3 * p.Lk + 8 * sizes.n_runs + 8 * sizes.n_segments),
        "normalize": sizes.n_rows * (8 * sizes.n_segments + 4),
        "vote": voting * (3 * p.Lk + 8 * sizes.n_runs) + votes,
    }
    return moved | ({"pool": 2 * votes} if p.config.pool > 1 else {})
