"""What the reference alone promises: equal keys get equal votes, wherever they stand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import paged, problem, rope, tensors
from tokenselect.reference import BACKEND

N_KEYS = 5

SETTINGS: dict[str, dict[str, Any]] = {
    "soft": {},
    "over the candidates": {"config": {"normalize": "candidates"}},
    "capped": {"softcap": 2.0},
    "logit, of three means": {"config": {"vote": "logit", "n_query_means": 3}},
    "group": {"config": {"scope": "group"}},
    "turned by content": {"config": {"score_at": "fixed"}, "rope": rope(cached="raw")},
}


def laid(layout: str, k_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """The keys, dims not the innermost ("strided") or in pages of 4; and the block table."""
    if layout == "paged":
        pages, _, table = paged(k_cache, k_cache)
        return pages, table
    strided = k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    return (strided if layout == "strided" else k_cache), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "paged"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_keys_get_equal_votes(setting: str, layout: str, dtype: torch.dtype) -> None:
    q, keys, _ = tensors(B=1, Hq=14, Lq=5, Lk=N_KEYS, D=19, dtype=dtype)
    which = torch.randint(N_KEYS, (203,), generator=torch.Generator().manual_seed(0))
    k_cache, table = laid(layout, keys[:, :, which])
    p = problem(q, k_cache, k_cache, block_table=table, **SETTINGS[setting])

    scores = BACKEND.score(p)

    ends = p.config.regions(len(which), p.Lq)
    for key in range(N_KEYS):
        same = torch.nonzero(which[slice(*ends)] == key)[:, 0] + ends[0]
        votes = scores.votes[0, 0, :, same]
        assert torch.equal(votes, votes[:, :1].expand_as(votes)), f"votes for key {key} differ"


def test_of_equal_keys_the_lower_positions_are_chosen() -> None:
    q, keys, _ = tensors(B=1, Hq=12, Hkv=3, Lk=1, D=16)
    k_cache = keys.expand(-1, -1, 100, -1)
    p = problem(q, k_cache, k_cache)
    chosen = BACKEND.select(BACKEND.score(p).votes, p)
    assert chosen.positions[0, 0].tolist() == [0, 1, *range(2, 6), *range(96, 100)]
