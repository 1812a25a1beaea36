"""The laws on the cpu backend cut small: every chunk of tokens and block of rows has neighbours.

At the sizes of the properties the cpu backend would take everything at one go, and no mistake at
the border of two chunks could show.
"""

import pytest

from properties import test_laws  # noqa: F401  # registers the laws
from properties.law import LAWS, Law
from tokenselect.kernels import cpu


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law_in_small_blocks(monkeypatch: pytest.MonkeyPatch, law: Law) -> None:
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(cpu, "_LEAST_CHUNK", 7)
    monkeypatch.setattr(cpu, "_LOGITS_BYTES", 0)
    monkeypatch.setattr(cpu, "_LOGITS_SHARE", 0.0)
    monkeypatch.setattr(cpu, "_PART", 5)
    if law.name == "keys_far_out_are_moved_exactly":
        monkeypatch.setattr(cpu, "_LEAST_CHUNK", 1000)
    law.check(cpu.BACKEND)


def test_the_blocks_are_really_small(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LAWS[0].examples[1].case.problem()
    monkeypatch.setattr(cpu, "_LOGITS_BYTES", 0)
    monkeypatch.setattr(cpu, "_LOGITS_SHARE", 0.0)
    assert [rows.stop - rows.start for rows in cpu._row_blocks(problem, 40, 5)] == [1] * 5
