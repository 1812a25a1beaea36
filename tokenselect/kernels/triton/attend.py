"""Stage 3: attention over the selected rows, read where they lie in the cache.

attend  a share of one selection, for a block of the queries of one KV head
merge   the shares of a selection put together, in order

Few query rows are a matter of latency: the selection is cut into shares of `split` tokens, one a
program. A chunk has rows enough to fill a GPU, and each program walks the whole selection. How a
selection is cut depends on the shape of one request only, so no result depends on the batch.
"""

import math

import torch
import triton
from torch import Tensor

from tokenselect.contract import AttentionOutput, Problem, Selection
from tokenselect.kernels.triton import attend_kernels, launch, recording
from tokenselect.kernels.triton.configs import TABLE, Config
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, padded
from tokenselect.kernels.triton.tables import LOW, Tables


def attend(problem: Problem, selection: Selection, out: Tensor | None = None) -> AttentionOutput:
    """See `tokenselect.reference.attend`: out (`out` itself, if given) and lse, within budget."""
    attended: AttentionOutput = recording.run(launches, problem, selection, out=out)
    return attended


def launches(
    problem: Problem,
    selection: Selection,
    arch: str,
    out: Tensor | None = None,
    source: Source = SOURCE,
) -> tuple[AttentionOutput, list[Launch]]:
    """What attending will return, and the kernels that fill it."""
    p, config = problem, TABLE[arch]
    B, Hq, Hkv, G, Lq, D, Dv = p.B, p.Hq, p.Hkv, p.G, p.Lq, p.D, p.Dv
    K = selection.positions.shape[2]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.empty(shape, dtype, p.q.device)

    out = empty(B, Hq, Lq, Dv, dtype=p.q.dtype) if out is None else out
    lse = empty(B, Hq, Lq)
    n_rows = Lq * G
    moves = p.rope is not None and p.needs_rotation(p.config.positions)
    in_float32 = moves or p.q.dtype == torch.float32
    split = _split(config, n_rows, K)
    rows_, tile, warps = _tile(config, p, moves)
    n_splits = max(1, math.ceil(K / split))
    is_whole = n_splits == 1
    partial = (B, Hkv, 1 if is_whole else n_splits, 1 if is_whole else n_rows)
    largest, sums = empty(*partial), empty(*partial)
    acc = empty(*partial, 1 if is_whole else Dv)
    is_raw = p.rope is not None and p.rope.cached == "raw"
    half = p.rope.rotary_dim // 2 if moves and p.rope is not None else 0
    turn = Tables(p.q, p.q, p.q)
    if moves and p.rope is not None:
        turn = source.tables(p.rope.inv_freq, p.Lk, 0)
    n_blocks = math.ceil(n_rows / rows_)
    values = launch.cache_arguments(p, p.v_cache)
    sinks = p.q if p.sink_logits is None else p.sink_logits
    sunk = {"sinks_ptr": sinks, "stride_sinks": sinks.stride(0)}
    selected = {
        "count_ptr": selection.count,
        "stride_count_b": selection.count.stride(0),
        "stride_count_s": selection.count.stride(1),
    }
    todo = [
        Launch(
            attend_kernels.attend,
            (B * n_splits * n_blocks * Hkv,),
            dict(
                q_ptr=p.q,
                k_ptr=p.k_cache,
                v_ptr=p.v_cache,
                seqlens_ptr=p.cache_seqlens,
                positions_ptr=selection.positions,
                high_ptr=turn.high,
                low_ptr=turn.low,
                out_ptr=out,
                lse_ptr=lse,
                acc_ptr=acc,
                max_ptr=largest,
                sum_ptr=sums,
                scale=p.scale,
                softcap=launch.softcap(p),
                Hkv=Hkv,
                G=G,
                Lq=Lq,
                Lk=p.Lk,
                K=K,
                n_splits=n_splits,
                n_blocks=n_blocks,
                **{f"stride_q{dim}": p.q.stride(i) for i, dim in enumerate("bhid")},
                **launch.cache_arguments(p, p.k_cache),
                **sunk,
                **{f"v_{name}": values[name] for name in _V_STRIDES},
                **{
                    f"stride_positions_{dim}": selection.positions.stride(i)
                    for i, dim in enumerate(("b", "s", "place"))
                },
                **selected,
            ),
            dict(
                D=D,
                Dv=Dv,
                half=half,
                S=p.S,
                ONE_QUERY=Lq == 1,
                ROTATES=moves,
                CONTIGUOUS=p.config.positions == "contiguous",
                RAW=is_raw,
                # Raw keys lack the factor on cos and sin too: it is theirs and the query's.
                RAW_FACTOR=p.rope.scaling**2 if is_raw and p.rope is not None else 1.0,
                INTERLEAVED=p.rope is not None and p.rope.interleaved,
                SOFTCAP=p.softcap is not None,
                # Times log2(e) it would be beyond float32.
                HUGE_SCALE=abs(p.scale) > 2e38,
                SINKS=p.sink_logits is not None,
                PAGED=p.is_paged,
                WHOLE=is_whole,
                # Not read of a whole selection, whose K differs with a chunk's length.
                SPLIT=0 if is_whole else split,
                TILE=tile,
                ROWS=rows_,
                BLOCK_D=config.gather_pairs if moves else 32 if in_float32 else padded(D),
                CHUNKED=in_float32,
                BLOCK_DV=padded(Dv),
                DOT=launch.dot_dtype(p.q.dtype),
                PRECISION=config.float32,
                WIDE=launch.is_wide(p.q, p.k_cache, p.v_cache, selection.positions),
                LOW_ROWS=LOW,
                STAGES=config.chunk_stages if n_rows > config.query_rows and not in_float32 else 1,
            ),
            warps,
            1,
        )
    ]
    if not is_whole:
        todo.append(
            Launch(
                attend_kernels.merge,
                (B * Hkv * n_rows,),
                dict(
                    acc_ptr=acc,
                    max_ptr=largest,
                    sum_ptr=sums,
                    seqlens_ptr=p.cache_seqlens,
                    out_ptr=out,
                    lse_ptr=lse,
                    Hkv=Hkv,
                    G=G,
                    Lq=Lq,
                    Lk=p.Lk,
                    K=K,
                    Dv=Dv,
                    n_splits=n_splits,
                    **sunk,
                    **selected,
                ),
                dict(
                    S=p.S,
                    SINKS=p.sink_logits is not None,
                    SPLIT=split,
                    SPLITS=min(32, triton.next_power_of_2(n_splits)),
                    BLOCK_DV=padded(Dv),
                ),
                4,
                1,
            )
        )
    return AttentionOutput(out, lse), todo


_V_STRIDES = ("stride_page", "stride_row", "stride_head", "stride_d")


def _split(config: Config, n_rows: int, K: int) -> int:
    """How many places of a selection one program walks: by the shape of a request alone."""
    if n_rows <= config.query_rows:
        return config.split
    return config.long_split if n_rows <= 16 * config.query_rows else max(K, 1)


def _tile(config: Config, problem: Problem, moves: bool) -> tuple[int, int, int]:
    """Query rows of a program, places that it takes at once, and its warps."""
    p, places = problem, config.gather // 2
    rows_ = config.chunk_rows if p.Lq * p.G > config.query_rows else padded(p.Lq * p.G)
    in_float32 = moves or p.q.dtype == torch.float32
    is_wide = max(p.D, p.Dv) > 128
    if p.Lq == 1 and rows_ == 16 and not in_float32 and not is_wide:
        return rows_, config.gather, 4
    if is_wide or in_float32 or rows_ == 16:
        rows_, places = min(rows_, config.query_rows // 2), places // 2
    if (is_wide and in_float32) or moves:
        rows_ = 16
    places = places // 2 if is_wide and in_float32 else places
    return max(16, rows_), max(16, places), 8


def bytes_moved(problem: Problem, arch: str = "sm_90") -> dict[str, int]:
    """Bytes that each kernel reads and writes, if K tokens are selected, each row read once."""
    p = problem
    item, config = p.q.dtype.itemsize, TABLE[arch]
    n_splits = math.ceil(p.K / _split(config, p.Lq * p.G, p.K))
    out = p.B * p.Hq * p.Lq * (p.Dv * item + 4)
    partial = 0 if n_splits == 1 else p.B * p.Hq * p.Lq * n_splits * (4 * p.Dv + 8)
    gathered = p.B * p.Hkv * p.K * (p.D + p.Dv) * item
    queries = p.B * p.Hq * p.Lq * p.D * item
    moved = {"attend": gathered + queries + (partial or out)}
    if partial:
        moved["merge"] = partial + out
    return moved
