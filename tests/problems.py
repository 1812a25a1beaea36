"""Small seeded inputs for the example tests."""

from typing import Any

import torch
from torch import Tensor

from tokenselect import Problem, Rope, SelectConfig
from tokenselect.conformance.paging import scatter
from tokenselect.conformance.problems import content

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

    shapes = (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)
    q, k_cache, v_cache = (content("normal", shape, generator).to(dtype) for shape in shapes)
    return q, k_cache, v_cache


def paged(
    k_cache: Tensor, v_cache: Tensor, page_size: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens in shuffled pages, three spare pages of NaN among them; and block_table."""
    generator = torch.Generator().manual_seed(seed)
    (k_pages, v_pages), block_table = scatter((k_cache, v_cache), page_size, generator, n_spare=3)
    return k_pages, v_pages, block_table


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
