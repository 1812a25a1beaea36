"""The laws on the cpu backend cut small: every chunk of tokens and block of rows has neighbours.

At the sizes of the properties the cpu backend would take everything at one go, and no mistake at
the border of two chunks could show.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from properties.laws import LAWS
from tokenselect import Problem, SelectConfig
from tokenselect.conformance.laws.law import Law
from tokenselect.kernels.cpu import BACKEND, eager


@pytest.fixture(params=["blocks of one row", "two passes"])
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(eager, "_LEAST_CHUNK", 7)
    monkeypatch.setattr(eager, "_PART", 5)
    monkeypatch.setattr(eager, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(eager, "_SMALL", 0)
    monkeypatch.setattr(eager, "_SHARE", 0.0)
    if request.param == "two passes":  # even of one row; hard votes are never read twice
        monkeypatch.setattr(eager, "_fitting_rows", lambda p, n: int(p.config.vote == "hard"))


@pytest.mark.slow
@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law_in_small_blocks(monkeypatch: pytest.MonkeyPatch, law: Law) -> None:
    if law.name == "keys_far_out_are_moved_exactly":
        monkeypatch.setattr(eager, "_LEAST_CHUNK", 1000)
    law.check(BACKEND)


def test_the_blocks_are_really_small(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LAWS[0].examples[1].case.problem()
    monkeypatch.setattr(eager, "_SMALL", 0)
    monkeypatch.setattr(eager, "_SHARE", 0.0)
    assert eager._fitting_rows(problem, 40) == 1


def test_pages_of_one_token_in_a_row_are_scored_where_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of requests that are padded differently; of others rows are gathered."""
    monkeypatch.setattr(eager, "_CHUNK_BYTES", 0)  # chunks of 16
    torch.manual_seed(0)
    q, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 50, 8)
    config = SelectConfig(k=5, n_sink=1, n_local=4)
    expected = eager.score(Problem.build(q, keys, keys, config)).votes
    gathered = []

    def gather(*given: Any) -> Tensor:
        gathered.append(given)
        return rows(*given)

    rows = eager._gather
    monkeypatch.setattr(eager, "_gather", gather)
    pool, room = keys[0].transpose(0, 1)[:, None], torch.randn(60, 1, 2, 8)
    for order, count in ((torch.arange(50) + 7, 0), ((torch.arange(50) * 7) % 60, 4)):
        pages = room.clone()
        pages[order] = pool
        problem = Problem.build(q, pages, pages, config, block_table=order[None].int())
        torch.testing.assert_close(eager.score(problem).votes, expected)
        assert len(gathered) == count
