"""Stage 3, on the host: what `attend` launches.

attend  one split of a selection, for a block of the queries of one KV head
merge   the splits of a selection, in order

The kernels are in `attend_kernels` and `attend_tile`; they read selected rows where they lie in the
cache. With few query rows latency counts: a selection is divided into splits of `split` tokens, one
per program. A chunk has rows enough to fill a GPU: each program walks the whole selection. How a
selection is split depends on the shape of one request only, so no result depends on the batch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenselect.contract import AttentionOutput, Problem, Selection
from tokenselect.kernels.triton import attend_kernels, launch, recording
from tokenselect.kernels.triton.configs import TABLE, Config
from tokenselect.kernels.triton.launch import SOURCE, Launch, Source, padded, strides
from tokenselect.kernels.triton.tables import LOW, Tables


def attend(problem: Problem, selection: Selection, out: Tensor | None = None) -> AttentionOutput:
    """Return out (B, Hq, Lq, Dv), `out` itself if given, and lse (B, Hq, Lq), within tolerance."""
    attended: AttentionOutput = recording.run(launches, problem, selection, out=out)
    return attended


class _Sizes(NamedTuple):
    """How one call is divided, on one architecture.

    n_rows    query rows per KV head: Lq * G
    block     query rows per program
    tile      places of a selection that are multiplied at once
    split     places per program; is_whole: all of them are, and nothing is merged
    """

    rotates: bool
    in_float32: bool
    n_rows: int
    block: int
    tile: int
    warps: int
    split: int
    n_splits: int

    @property
    def is_whole(self) -> bool:
        return self.n_splits == 1


def _sizes(problem: Problem, config: Config, K: int) -> _Sizes:
    p, n_rows = problem, problem.Lq * problem.G
    rotates = p.rope is not None and p.needs_rotation(p.config.positions)
    block, tile, warps = _tile(config, p, rotates)
    split = _split(config, n_rows, K)
    return _Sizes(
        rotates=rotates,
        in_float32=rotates or p.q.dtype == torch.float32,
        n_rows=n_rows,
        block=block,
        tile=tile,
        warps=warps,
        split=split,
        n_splits=max(1, math.ceil(K / split)),
    )


def _split(config: Config, n_rows: int, K: int) -> int:
    """Return how many places of a selection one program walks, by the shape of a request alone."""
    if n_rows <= config.query_rows:
        return config.split
    return config.long_split if n_rows <= 16 * config.query_rows else max(K, 1)


def _tile(config: Config, problem: Problem, rotates: bool) -> tuple[int, int, int]:
    """Return a program's query rows, the places that it multiplies at once, and its warps."""
    p, places = problem, config.gather // 2
    block = config.chunk_rows if p.Lq * p.G > config.query_rows else padded(p.Lq * p.G)
    in_float32 = rotates or p.q.dtype == torch.float32
    is_wide = max(p.D, p.Dv) > 128
    if p.Lq == 1 and block == 16 and not in_float32 and not is_wide:
        return block, config.gather, 4
    if is_wide or in_float32 or block == 16:
        block, places = min(block, config.query_rows // 2), places // 2
    if (is_wide and in_float32) or rotates:
        block = 16
    places = places // 2 if is_wide and in_float32 else places
    return max(16, block), max(16, places), 8


def launches(
    problem: Problem,
    selection: Selection,
    arch: str,
    out: Tensor | None = None,
    source: Source = SOURCE,
) -> tuple[AttentionOutput, list[Launch]]:
    """Return the output, yet to be filled, and the kernels that fill it."""
    p, config = problem, TABLE[arch]
    K = selection.positions.shape[2]
    sizes = _sizes(p, config, K)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return source.empty(shape, dtype, p.q.device)

    out = empty(p.B, p.Hq, p.Lq, p.Dv, dtype=p.q.dtype) if out is None else out
    lse = empty(p.B, p.Hq, p.Lq)
    partial = (1, 1) if sizes.is_whole else (sizes.n_splits, sizes.n_rows)
    largest, sums = empty(p.B, p.Hkv, *partial), empty(p.B, p.Hkv, *partial)
    acc = empty(p.B, p.Hkv, *partial, 1 if sizes.is_whole else p.Dv)
    tables = Tables(p.q, p.q, p.q)
    if sizes.rotates and p.rope is not None:
        tables = source.tables(p.rope.inv_freq, p.Lk, 0)
    sinks = p.q if p.sink_logits is None else p.sink_logits
    shared: dict[str, Any] = dict(
        seqlens_ptr=p.cache_seqlens,
        count_ptr=selection.count,
        sinks_ptr=sinks,
        out_ptr=out,
        lse_ptr=lse,
        acc_ptr=acc,
        max_ptr=largest,
        sum_ptr=sums,
        Hkv=p.Hkv,
        G=p.G,
        Lq=p.Lq,
        Lk=p.Lk,
        K=K,
        n_splits=sizes.n_splits,
        stride_sinks=sinks.stride(0),
        **strides("count_", selection.count, "bs"),
    )
    todo = [_attend_launch(p, config, sizes, tables, selection.positions, shared)]
    if not sizes.is_whole:
        todo.append(_merge_launch(p, sizes, shared))
    return AttentionOutput(out, lse), todo


def _attend_launch(
    problem: Problem,
    config: Config,
    sizes: _Sizes,
    tables: Tables,
    positions: Tensor,
    shared: dict[str, Any],
) -> Launch:
    p = problem
    n_blocks = math.ceil(sizes.n_rows / sizes.block)
    values = launch.cache_arguments(p, p.v_cache)
    is_raw = p.rope is not None and p.rope.cached == "raw"
    is_pipelined = sizes.n_rows > config.query_rows and not sizes.in_float32
    return Launch(
        attend_kernels.attend,
        (p.B * sizes.n_splits * n_blocks * p.Hkv,),
        dict(
            q_ptr=p.q,
            k_ptr=p.k_cache,
            v_ptr=p.v_cache,
            positions_ptr=positions,
            high_ptr=tables.high,
            low_ptr=tables.low,
            scale=p.scale,
            softcap=launch.softcap(p),
            n_blocks=n_blocks,
            **shared,
            **strides("q", p.q, "bhid"),
            **strides("positions_", positions, ("b", "s", "place")),
            **launch.cache_arguments(p, p.k_cache),
            **{f"v_{name}": values[name] for name in _V_STRIDES},
        ),
        dict(
            D=p.D,
            Dv=p.Dv,
            half=p.rope.rotary_dim // 2 if sizes.rotates and p.rope is not None else 0,
            S=p.S,
            ONE_QUERY=p.Lq == 1,
            ROTATES=sizes.rotates,
            CONTIGUOUS=p.config.positions == "contiguous",
            RAW=is_raw,
            # Raw keys lack the scaling of cos and sin too: the query gets the key's as well.
            RAW_FACTOR=p.rope.scaling**2 if is_raw and p.rope is not None else 1.0,
            INTERLEAVED=p.rope is not None and p.rope.interleaved,
            SOFTCAP=p.softcap is not None,
            # Beyond float32 when multiplied by log2(e).
            HUGE_SCALE=abs(p.scale) > 2e38,
            SINKS=p.sink_logits is not None,
            PAGED=p.is_paged,
            WHOLE=sizes.is_whole,
            # Not read of a whole selection, whose K differs with a chunk's length.
            SPLIT=0 if sizes.is_whole else sizes.split,
            TILE=sizes.tile,
            ROWS=sizes.block,
            BLOCK_D=(
                config.gather_pairs if sizes.rotates else 32 if sizes.in_float32 else padded(p.D)
            ),
            CHUNKED=sizes.in_float32,
            BLOCK_DV=padded(p.Dv),
            DOT=launch.dot_dtype(p.q.dtype),
            PRECISION=config.float32,
            WIDE=launch.is_wide(p.q, p.k_cache, p.v_cache, positions),
            LOW_ROWS=LOW,
            STAGES=config.chunk_stages if is_pipelined else 1,
        ),
        sizes.warps,
        1,
    )


_V_STRIDES = ("stride_page", "stride_row", "stride_head", "stride_d")


def _merge_launch(problem: Problem, sizes: _Sizes, shared: dict[str, Any]) -> Launch:
    p = problem
    return Launch(
        attend_kernels.merge,
        (p.B * p.Hkv * sizes.n_rows,),
        dict(Dv=p.Dv, **shared),
        dict(
            S=p.S,
            SINKS=p.sink_logits is not None,
            SPLIT=sizes.split,
            SPLITS=min(32, triton.next_power_of_2(sizes.n_splits)),
            BLOCK_DV=padded(p.Dv),
        ),
        2 if p.Dv <= 128 else 4,
        1,
    )


def bytes_moved(problem: Problem, arch: str = "sm_90") -> dict[str, int]:
    """Return the bytes that each kernel moves, if K tokens are selected and read once."""
    p, item = problem, problem.q.dtype.itemsize
    sizes = _sizes(p, TABLE[arch], p.K)
    out = p.B * p.Hq * p.Lq * (p.Dv * item + 4)
    partial = p.B * p.Hq * p.Lq * sizes.n_splits * (4 * p.Dv + 8)
    gathered = p.B * p.Hkv * p.K * (p.D + p.Dv) * item
    queries = p.B * p.Hq * p.Lq * p.D * item
    if sizes.is_whole:
        return {"attend": gathered + queries + out}
    return {"attend": gathered + queries + partial, "merge": partial + out}
