"""Small seeded inputs for the example tests."""

from typing import Any

import torch
from torch import Tensor

from tokenselect import Problem, Rope, SelectConfig

SMALL = {"k": 4, "n_sink": 2, "n_local": 4}


def tensors(
    *,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    Lq: int = 1,
    Lk: int = 40,
    D: int = 8,
    Dv: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Hq, Lq, D), k_cache (B, Hkv, Lk, D), v_cache (B, Hkv, Lk, Dv)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return normal(B, Hq, Lq, D), normal(B, Hkv, Lk, D), normal(B, Hkv, Lk, Dv)


def paged(
    k_cache: Tensor, v_cache: Tensor, page_size: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens in shuffled pages, three spare pages of NaN among them; and block_table."""
    B, Hkv, Lk, _ = k_cache.shape
    max_pages = -(-Lk // page_size)
    n_pages = B * max_pages + 3
    order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(seed))
    block_table = order[: B * max_pages].view(B, max_pages)

    def pool(cache: Tensor) -> Tensor:
        pages = torch.full((n_pages, page_size, Hkv, cache.shape[3]), torch.nan, dtype=cache.dtype)
        for b in range(B):
            for j in range(Lk):
                pages[block_table[b, j // page_size], j % page_size] = cache[b, :, j]
        return pages

    return pool(k_cache), pool(v_cache), block_table.int()


def lengths(*n: int) -> Tensor:
    return torch.tensor(n, dtype=torch.int32)


def rope(D: int = 8, **settings: Any) -> Rope:
    return Rope(10000.0 ** (-torch.arange(0, D, 2).double() / D), **settings)


def problem(
    q: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *,
    shape: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **arguments: Any,
) -> Problem:
    """A built Problem; what is not given is `tensors(**shape)` and SMALL | config."""
    defaults = tensors(**(shape or {}))
    q, k_cache, v_cache = (
        mine if given is None else given
        for given, mine in zip((q, k_cache, v_cache), defaults, strict=True)
    )
    return Problem.build(q, k_cache, v_cache, SelectConfig(**(SMALL | (config or {}))), **arguments)
