"""Measure the extra memory of the cpu backend in score, select and attend, in a new process.

python -m tests.measure_memory '{"Hq": 32, "Hkv": 1, "D": 64, "n": 1048576}'
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from bench.machine import forget_peak, resident
from tokenselect import Problem, Rope, SelectConfig, attend, score, select


def filled(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory that has been written to: 2**20 random numbers over and over, quickly."""
    x = torch.empty(shape, dtype=dtype)
    x.view(-1, 2**20).copy_(torch.randn(2**20))
    return x


def caches(layout: str, Hkv: int, n: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return k_cache, v_cache and what else the layout needs."""
    if layout == "contiguous":
        k_cache, v_cache = filled(2, 1, Hkv, n, D, dtype=dtype)
        return {"k_cache": k_cache, "v_cache": v_cache}
    if layout == "token-major":  # keys and values of a token side by side
        both = filled(1, n, 2, Hkv, D, dtype=dtype)
        k_cache, v_cache = (both[:, :, i].transpose(1, 2) for i in range(2))
        return {"k_cache": k_cache, "v_cache": v_cache}
    page_size = 16
    k_cache, v_cache = filled(2, n // page_size, page_size, Hkv, D, dtype=dtype)
    block_table = torch.randperm(n // page_size, dtype=torch.int32)[None]
    return {"k_cache": k_cache, "v_cache": v_cache, "block_table": block_table}


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the selected positions."""
    selection = select(score(problem).votes, problem)
    return attend(problem, selection).out, selection.positions


def measure(
    Hq: int,
    Hkv: int,
    D: int,
    n: int,
    Lq: int = 1,
    dtype: str = "bfloat16",
    layout: str = "contiguous",
    rope: str | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the bytes of the cache and those taken besides, and what shows that they count."""
    torch.manual_seed(0)
    turning = Rope(1e4 ** (-torch.arange(0, D, 2).double() / D), cached=rope) if rope else None

    def problem(n: int) -> Problem:
        given = caches(layout, Hkv, n, D, getattr(torch, dtype))
        q = torch.randn(1, Hq, Lq, D).to(given["k_cache"].dtype)
        settings = SelectConfig(**(config or {}))
        return Problem.build(q, config=settings, rope=turning, **given)

    run(problem(2**14))  # libraries are loaded, thread pools started
    large = problem(n)
    cache = large.k_cache.nbytes + large.v_cache.nbytes
    extra = 2 * cache
    for _ in range(3):  # what the system takes back and returns meanwhile only ever adds
        large.k_cache.amax(), large.v_cache.amax()  # all of the cache is in memory
        forget_peak()
        before = resident("VmRSS")
        out, positions = run(large)
        extra = min(extra, resident("VmHWM") - before)
        if extra < cache / 10:
            break
    equal = None
    if layout == "token-major":
        moved = large.k_cache.contiguous(), large.v_cache.contiguous()
        expected, expected_positions = run(Problem.build(large.q, *moved, large.config))
        equal = torch.equal(out, expected) and torch.equal(positions, expected_positions)
    return {
        "cache": cache,
        "extra": extra,
        "resident": before,
        "finite": bool(out.isfinite().all()),
        "equals_contiguous": equal,
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
