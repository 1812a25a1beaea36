"""What surrounds a call changes nothing in it: autocast, defaults, modes, threads."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import SMALL, lengths, rope, tensors
from tokenselect import SelectionCache, attention

ROPE = rope()


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


def call(backend: str, inputs: tuple[Tensor, ...], n: Tensor) -> tuple[Any, ...]:
    out, info = attention(
        *inputs,
        **SMALL,
        cache_seqlens=n,
        rope=ROPE,
        positions="contiguous",
        score_at="split",
        softcap=5.0,
        cache=SelectionCache(),
        backend=backend,
        return_info=True,
    )
    return out, info.lse, *info.selection, info.reused


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_call_is_the_same_bit_for_bit(surroundings: str, backend: str) -> None:
    inputs, n = tensors(Lq=3), lengths(40, 33)
    expected = call(backend, inputs, n)
    with SURROUNDINGS[surroundings]():
        got = call(backend, inputs, n)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("first", [True, False])
def test_a_cache_crosses_the_border_of_inference_mode(first: bool) -> None:
    q, k_cache, v_cache = tensors()
    cache = SelectionCache()
    for i, inside in enumerate([first, not first, first]):
        n = lengths(30 + i, 30 + i)
        with torch.inference_mode(inside):
            attention(q, k_cache, v_cache, **SMALL, cache_seqlens=n, cache=cache)
    cache.reset(0)
    assert cache.hits.tolist() == [0, 2]
