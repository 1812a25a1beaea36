"""The calls to compile for, and what the triton backend launches for them."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tokenselect import Problem, Rope, SelectConfig
from tokenselect.contract import CacheState, reasons
from tokenselect.kernels.triton import BACKEND
from tokenselect.kernels.triton.score import launches as score_launches
from tokenselect.kernels.triton.select import launches as select_launches
from tokenselect.kernels.triton.step import cached_launches

K = 1024


def problem(
    Hq: int = 32,
    Hkv: int = 8,
    D: int = 128,
    Dv: int | None = None,
    n: int = 128 * K,
    dtype: torch.dtype = torch.bfloat16,
    B: int = 1,
    Lq: int = 1,
    page_size: int | None = None,
    layout: str = "heads",
    offset: int = 0,
    softcap: float | None = None,
    has_sink_logits: bool = False,
    cached: str | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    **config: Any,
) -> Problem:
    """Return a call on the CPU, in memory that is never touched and so takes none.

    Letters as everywhere; n is the cache's capacity.

    rotary_dim  None: all of D is rotated, where there is a rope
    layout      "heads": (B, Hkv, n, D); "tokens": the same, transposed from (B, n, Hkv, D);
                "packed": rows of a key and its value
    offset      the element of their storage where the caches start
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)

    dims = (D, Dv or D)
    shape, block_table, rope = (B, Hkv, n), None, None
    if page_size is not None:
        pages = -(-n // page_size)
        shape = (B * pages, page_size, Hkv)
        block_table = torch.empty(B, pages, dtype=torch.int32)
    if layout == "packed":
        k_cache, v_cache = empty(*shape, sum(dims)).split(dims, dim=-1)
    elif layout == "tokens":
        k_cache, v_cache = (empty(B, n, Hkv, dim).transpose(1, 2) for dim in dims)
    else:
        k_cache, v_cache = (empty(*shape, dim) for dim in dims)
    if cached is not None:
        inv_freq = torch.ones((rotary_dim or D) // 2)
        rope = Rope(inv_freq, interleaved=interleaved, cached=cached)  # type: ignore[arg-type]
    return Problem.build(
        torch.empty(B, Hq, Lq, D, dtype=dtype),
        k_cache,
        v_cache,
        SelectConfig(**config),
        block_table=block_table,
        softcap=softcap,
        sink_logits=torch.empty(Hq) if has_sink_logits else None,
        rope=rope,
    )


F16, F32 = torch.float16, torch.float32
_SPLIT = {"positions": "contiguous", "score_at": "split"}

# What differs from the defaults of `problem`.
CASES: dict[str, dict[str, Any]] = {
    # Decoding, one head dim, group size, dtype and layout after the other.
    "decode-128k": {},
    "decode-1m": dict(n=1024 * K),
    "decode-batch": dict(B=8, n=32 * K, dtype=F16),
    "decode-1m-batch": dict(B=2, Hkv=16, n=1024 * K),
    "decode-fp32": dict(Hq=9, Hkv=3, D=64, n=8 * K, dtype=F32),
    "mha-80": dict(Hq=32, Hkv=32, D=80, n=32 * K, dtype=F16),
    "mqa-96": dict(Hq=32, Hkv=1, D=96, n=32 * K),
    "qwen-128k": dict(Hq=28, Hkv=4),
    "softcap-256": dict(Hq=16, Hkv=4, D=256, n=32 * K, softcap=50.0),
    "fp32-256": dict(Hq=16, Hkv=4, D=256, n=32 * K, dtype=F32),
    "sinks-64": dict(Hq=64, Hkv=8, D=64, has_sink_logits=True),
    "unequal-dims": dict(Hq=16, Hkv=16, D=192, Dv=128, n=32 * K),
    "tokens-first": dict(B=4, n=32 * K, layout="tokens"),
    "packed-unaligned": dict(B=2, n=32 * K, D=80, layout="packed", offset=1),
    "paged-1": dict(B=4, page_size=1),
    "paged-16": dict(B=4, page_size=16),
    "paged-64-fp16": dict(B=4, page_size=64, dtype=F16),
    "verify-4": dict(B=4, Lq=4, page_size=16),
    # Settings of the selection.
    "group": dict(scope="group"),
    "big-k": dict(k=64 * K),
    "own-votes": dict(normalize="candidates", pool=5),
    # Moved keys.
    "split-rotated": dict(cached="rotated", **_SPLIT),
    "split-raw": dict(cached="raw", **_SPLIT),
    "split-interleaved": dict(
        Hq=28, Hkv=4, page_size=16, cached="rotated", interleaved=True, rotary_dim=64,
        scope="group", **_SPLIT,
    ),
    "true-raw-fp32": dict(D=64, n=32 * K, cached="raw", dtype=F32),
    # Chunks of queries.
    "prefill-128k": dict(Lq=512),
    "prefill-fp32": dict(Lq=512, Hq=9, Hkv=3, D=64, n=32 * K, dtype=F32),
    "prefill-256": dict(Lq=512, Hq=16, Hkv=4, D=256, n=32 * K, softcap=50.0),
    "prefill-mqa-80": dict(Lq=512, Hkv=1, D=80, n=32 * K, dtype=F16),
    "prefill-paged-group": dict(Lq=512, B=2, page_size=16, scope="group", n_query_means=4, pool=5),
    "prefill-means": dict(Lq=512, n_query_means=8),
    "prefill-mqa-means": dict(Hkv=1, Lq=512, n_query_means=2),
    "prefill-split-raw": dict(Lq=512, cached="raw", **_SPLIT),
    "prefill-split-rotated": dict(Lq=512, cached="rotated", n_query_means=4, **_SPLIT),
}  # fmt: skip


def shipped(problem: Problem, arch: str) -> list[Any]:
    """Return all launches of a step, and of stages called alone, as the backend makes on `arch`."""
    anywhere = replace(BACKEND, capability=replace(BACKEND.capability, devices=None))
    if refused := reasons(anywhere, problem):
        raise ValueError("the backend takes no such problem: " + "; ".join(refused))
    p, whole = problem, partial(torch.empty, dtype=torch.int32)
    state = CacheState(
        query=torch.empty(p.B, p.Hq * p.D),
        positions=whole(p.B, p.S, p.K),
        count=whole(p.B, p.S),
        seqlen_at_selection=whole(p.B),
        hits=whole(p.B, dtype=torch.int64),
        misses=whole(p.B, dtype=torch.int64),
    )
    _, together = cached_launches(problem, state, 0.9, arch)
    scores, scoring = score_launches(problem, arch)
    _, selecting = select_launches(scores.votes, problem, arch)
    return [*together, *scoring, *selecting]
