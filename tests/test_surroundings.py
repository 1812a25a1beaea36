"""What surrounds a call changes nothing in it: autocast, defaults, modes, threads."""

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tests import fresh
from tests.problems import SMALL, lengths, paged, problem, rope, tensors
from tokenselect import SelectionCache, attention, plan
from tokenselect.conformance.check import judge, kinds
from tokenselect.dispatch import registry

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


def call_plan(inputs: tuple[Tensor, ...], n: Tensor, table: Tensor | None) -> tuple[Any, ...]:
    config = {"positions": "contiguous", "score_at": "split"}
    settings = {"config": config, "rope": ROPE, "softcap": 5.0, "max_reuse": 3}
    planned = plan(problem(*inputs, block_table=table, **settings), "cpu")
    cache = SelectionCache(max_reuse=3)
    planned.prepare(cache)
    given = {"block_table": table, "cache": cache, "return_info": True}
    out, info = planned(*inputs, n, **given)
    planned(*inputs, n, **given)
    return out, info.lse, *info.selection, info.reused, cache.hits, cache.misses


@pytest.mark.parametrize("is_paged", [True, False])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_plan_is_the_same_bit_for_bit(surroundings: str, is_paged: bool) -> None:
    (q, *caches), n, table = tensors(Lq=3), lengths(40, 33), None
    if is_paged:
        *caches, table = paged(*caches)
    expected = call_plan((q, *caches), n, table)
    with SURROUNDINGS[surroundings]():
        got = call_plan((q, *caches), n, table)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("is_paged", [True, False])
def test_no_stage_makes_tensors_on_the_default_device(backend: str, is_paged: bool) -> None:
    """Stages called by hand: what an operator of torch runs does not see the default device."""
    (q, *caches), table = tensors(Lq=3), None
    if is_paged:
        *caches, table = paged(*caches)
    p = problem(
        *(q, *caches),
        config={"positions": "contiguous", "score_at": "split", "n_query_means": 2},
        rope=ROPE,
        block_table=table,
    )
    stages = registry.load(backend)

    def run() -> tuple[Tensor, ...]:
        scores = stages.score(p)
        selection = stages.select(scores.votes, p)
        return *scores, *selection, *stages.attend(p, selection)

    expected = run()
    with torch.device("meta"):
        got = run()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.device == theirs.device
        assert torch.equal(mine, theirs)


def on_the_default_device(source: str) -> list[str]:
    """The calls in it to which a default device would be given: `line: call`."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and getattr(torch, node.func.attr) in _device_constructors()
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]


PACKAGE = fresh.ROOT / "tokenselect"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_tensor_is_made_on_a_device_that_is_named(path: Path) -> None:
    assert not on_the_default_device(path.read_text(encoding="utf-8"))


def test_a_tensor_made_without_a_device_is_found() -> None:
    source = "x = torch.ones(3, device='cpu')\ny = torch.ones_like(x) + torch.arange(\n3)"
    assert on_the_default_device(source) == ["2: torch.arange(3)"]


@pytest.mark.parametrize("kind", ["votes that tie", "extrapolate, paged chunk", "reuse, paged"])
def test_a_check_is_the_same_under_another_default_device(kind: str) -> None:
    kinds.draw.cache_clear()
    judge.truth.cache_clear()
    with torch.device("meta"):
        got = judge.judge("cpu", kind, 0, "cpu")
    kinds.draw.cache_clear()
    judge.truth.cache_clear()
    assert got == judge.judge("cpu", kind, 0, "cpu")


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
