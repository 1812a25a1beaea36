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
from torch import Tensor

from tokenselect.contract import Problem, Scores
from tokenselect.kernels.triton import launch, recording, score_logits, score_voters, score_votes
from tokenselect.kernels.triton.configs import TABLE, Config
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, padded
from tokenselect.kernels.triton.tables import LOW, Tables


def score(problem: Problem) -> Scores:
    """See `tokenselect.reference.score`: soft votes within the error budget of float32."""
    scores: Scores = recording.run(launches, problem, fills=True)
    return scores


def score_candidates(problem: Problem) -> Scores:
    """`score` for a plan: no work past a request's end. Votes off the candidates are anything."""
    scores: Scores = recording.run(launches, problem, fills=False)
    return scores


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
    n_runs = n_tiles * (tile // score_logits.RUN.value)
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
                score_voters.voters,
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
                    n_query_means=means,
                    n_voters=n_voters,
                    **_strides("q", p.q, "bhid"),
                ),
                dict(
                    SCORE_AT=score_at if turns else "none",
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
    plain_q = plain_factor = rotated_q = rotated_factor = p.q
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
        rotated_q, rotated_factor = queries(moved, torch.float32, 1)

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
            score_logits.logits,
            (n_programs * shared,),
            dict(
                q_ptr=plain_q,
                factor_ptr=plain_factor,
                rotated_q_ptr=rotated_q,
                rotated_factor_ptr=rotated_factor,
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
                ROTATED=moved,
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
            score_votes.normalize,
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
                n_rows=voter_rows,
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
            score_votes.vote,
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
                score_votes.pool,
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

    Rotated keys are rotate back to the start to be scored at a fixed distance, raw ones out to
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
    """Voters that one read of the keys serves: fewer where keys are rotate."""
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
    n_runs = n_tiles * (tile // score_logits.RUN.value)
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
