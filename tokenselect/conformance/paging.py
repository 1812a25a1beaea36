"""The one place where tokens are put into pages, and found again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import Problem, Selection


def scatter(
    caches: Sequence[Tensor],
    page_size: int,
    generator: torch.Generator,
    filler: float = torch.nan,
    n_spare: int = 2,
) -> tuple[list[Tensor], Tensor]:
    """Return contiguous caches (B, Hkv, n, width) in pages of one pool each, and the block table.

    The pages are in random order, the same in every pool. `n_spare` of them are nobody's, page 0
    first, so that a stray index shows. `filler` lies wherever no token does.
    """
    B, Hkv, n, _ = caches[0].shape
    per_request = -(-n // page_size)
    n_pages = B * per_request + n_spare
    order = torch.randperm(n_pages - 1, generator=generator, device="cpu")[: B * per_request] + 1
    pools = []
    for cache in caches:
        whole = cache.new_full((B, Hkv, per_request * page_size, cache.shape[-1]), filler)
        whole[:, :, :n] = cache
        pages = whole.unflatten(2, (per_request, page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        pool = cache.new_full((n_pages, *pages.shape[1:]), filler)
        pool[order] = pages
        pools.append(pool)
    return pools, order.view(B, per_request).int()


def by_token(problem: Problem, cache: Tensor) -> Tensor:
    """View a cache with the heads of a token side by side; `at` indexes it."""
    return cache if problem.is_paged else cache.transpose(1, 2)


def at(problem: Problem, b: int, positions: Tensor) -> tuple[Any, Tensor]:
    """Return where `by_token` has request b's positions, as (len(positions), Hkv, width)."""
    positions = positions.long()
    if problem.block_table is None:
        return b, positions
    pages = problem.block_table[b][positions // problem.page_size].long()
    return pages, positions % problem.page_size


def overwrite_unselected(
    problem: Problem, cache: Tensor, selection: Selection, value: float
) -> None:
    """Overwrite every row of `cache` that no request selects, for whichever head."""
    spared = torch.zeros_like(cache, dtype=torch.bool)
    for b in range(problem.B):
        for row, count in zip(selection.positions[b], selection.count[b], strict=True):
            by_token(problem, spared)[at(problem, b, row[: int(count)])] = True
    cache[~spared] = value
