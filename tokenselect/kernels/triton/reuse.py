"""The Selection Cache's two steps, bit-identical to `tokenselect.kernels.torch_reuse`.

mean    the mean query of a chunk; a decode needs none
decide  the cosine with the stored query, and which requests reuse their selection
update  stores recomputed selections, completes reused ones

The kernels are in `reuse_kernels`. Sums are float64, each of two numbers that `torch_reuse` adds
too: down a column, then half onto half. Products of two float32 numbers are exact in float64, so
fusing a multiplication with an addition changes no result.
"""

import math
import struct

import torch
import triton

from tokenselect.contract import CacheState, Problem, ReuseDecision, Selection
from tokenselect.kernels.triton import recording, reuse_kernels
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, strides

# Columns of the mean query, and places of a selection, per program.
_MEAN_BLOCK = 64
_PLACES = 1024


def decide_reuse(problem: Problem, memory: CacheState, theta: float | None) -> ReuseDecision:
    """Decide which requests reuse their selection; bit-identical to `torch_reuse.decide_reuse`."""
    decision: ReuseDecision = recording.run(decide_launches, problem, memory, theta)
    return decision


def update(problem: Problem, memory: CacheState, decision: ReuseDecision, fresh: Selection) -> None:
    """Store recomputed selections, complete reused ones; bit-identical to `torch_reuse.update`."""
    recording.run(update_launches, problem, memory, decision, fresh)


def decide_launches(
    problem: Problem,
    memory: CacheState,
    theta: float | None,
    arch: str = "",
    source: Source = SOURCE,
) -> tuple[ReuseDecision, list[Launch]]:
    """Return the decision, yet to be filled, and the kernels that fill it."""
    p, N, device = problem, problem.Hq * problem.D, problem.q.device
    reused = source.empty((p.B,), torch.bool, device)
    lengths = source.empty((p.B,), torch.int32, device)
    query = source.empty((p.B, N), torch.float32, device)
    todo = []
    q, q_strides = query, {"stride_qb": N, "stride_qh": p.D, "stride_qd": 1}
    if p.Lq == 1:
        q = p.q
        q_strides = {"stride_qb": q.stride(0), "stride_qh": q.stride(1), "stride_qd": q.stride(3)}
    else:
        n_blocks = math.ceil(N / _MEAN_BLOCK)
        todo.append(
            Launch(
                reuse_kernels.mean,
                (p.B * n_blocks,),
                dict(
                    q_ptr=p.q,
                    query_ptr=query,
                    reciprocal_bits=_bits(1 / p.Lq),
                    Lq=p.Lq,
                    D=p.D,
                    N=N,
                    n_blocks=n_blocks,
                    **strides("q", p.q, "bhid"),
                ),
                dict(BLOCK=_MEAN_BLOCK),
                4,
                1,
            )
        )
    todo.append(
        Launch(
            reuse_kernels.decide,
            (p.B,),
            dict(
                q_ptr=q,
                seqlens_ptr=p.cache_seqlens,
                stored_query_ptr=memory.query,
                stored_count_ptr=memory.count,
                seqlen_at_selection_ptr=memory.seqlen_at_selection,
                reused_ptr=reused,
                lengths_ptr=lengths,
                query_ptr=query,
                theta_bits=0 if theta is None else _bits(theta * abs(theta)),
                S=p.S,
                K=p.K,
                Lq=p.Lq,
                Lk=p.Lk,
                N=N,
                max_reuse=p.max_reuse,
                stride_seqlen_at_selection=memory.seqlen_at_selection.stride(0),
                **q_strides,
                **strides("stored_query_", memory.query, ("b", "column")),
                **strides("stored_count_", memory.count, "bs"),
            ),
            dict(
                D=p.D,
                COPIES=p.Lq == 1,
                HAS_THETA=theta is not None,
                CHUNKS=8,
                SELECTIONS=triton.next_power_of_2(p.S),
            ),
            16,
            1,
        )
    )
    return ReuseDecision(reused, lengths, query), todo


def update_launches(
    problem: Problem,
    memory: CacheState,
    decision: ReuseDecision,
    fresh: Selection,
    arch: str = "",
    source: Source = SOURCE,
) -> tuple[None, list[Launch]]:
    """Return no result, and the kernel that writes to `memory`, or to `fresh`."""
    p, K = problem, fresh.positions.shape[2]
    n_blocks = math.ceil(K / _PLACES)
    return None, [
        Launch(
            reuse_kernels.update,
            (p.B * p.S * n_blocks,),
            dict(
                seqlens_ptr=p.cache_seqlens,
                reused_ptr=decision.reused,
                query_ptr=decision.query,
                positions_ptr=fresh.positions,
                count_ptr=fresh.count,
                stored_query_ptr=memory.query,
                stored_positions_ptr=memory.positions,
                stored_count_ptr=memory.count,
                seqlen_at_selection_ptr=memory.seqlen_at_selection,
                hits_ptr=memory.hits,
                misses_ptr=memory.misses,
                S=p.S,
                K=K,
                Lk=p.Lk,
                N=p.Hq * p.D,
                n_blocks=n_blocks,
                stride_seqlen_at_selection=memory.seqlen_at_selection.stride(0),
                stride_hits=memory.hits.stride(0),
                stride_misses=memory.misses.stride(0),
                **strides("positions_", fresh.positions, ("b", "s", "place")),
                **strides("count_", fresh.count, "bs"),
                **strides("stored_query_", memory.query, ("b", "column")),
                **strides("stored_positions_", memory.positions, ("b", "s", "place")),
                **strides("stored_count_", memory.count, "bs"),
            ),
            dict(BLOCK=_PLACES),
            4,
            1,
        )
    ]


def _bits(x: float) -> int:
    """Return the 64 bits of x as an integer, for `reuse_kernels` to read as a float64."""
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits


def bytes_moved(problem: Problem) -> dict[str, int]:
    """Return the bytes that each kernel reads and writes; of `update`, if all are recomputed."""
    p, item = problem, problem.q.dtype.itemsize
    columns = p.B * p.Hq * p.D
    given = columns * p.Lq * item
    one = p.Lq == 1
    moved = {} if one else {"mean": given + 4 * columns}
    return moved | {
        # A decode's query is copied too; both queries are multiplied.
        "decide": (given if one else 0) + 8 * columns,
        "update": 8 * (p.B * p.S * p.K + columns),
    }
