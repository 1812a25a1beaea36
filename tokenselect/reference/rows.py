"""Reading rows of one request from a cache, contiguous or paged."""

from torch import Tensor

from tokenselect.contract import Problem


def read(problem: Problem, cache: Tensor, b: int, positions: Tensor) -> Tensor:
    """Return the rows of request b at `positions` (L,), as (Hkv, L, D), in float32 or better.

    `cache` is problem.k_cache or problem.v_cache. Rows not named are never touched.
    """
    if problem.block_table is None:
        rows = cache[b][:, positions]
    else:
        page = problem.block_table[b][positions // problem.page_size].long()
        rows = cache[page, positions % problem.page_size].transpose(0, 1)
    return rows.to(problem.compute_dtype)
