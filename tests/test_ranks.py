"""Calls that several processes share: heads on ranks (`process_group=`), tokens on ranks."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench import parallel
from tests.problems import lengths, paged, problem, rope, tensors
from tests.ranks import run_ranks
from tokenselect import (
    InvalidProblem,
    Problem,
    SelectConfig,
    SelectionCache,
    attention,
    plan,
    run,
)
from tokenselect.context_parallel import context_parallel_attention
from tokenselect.dispatch.ranks import Ranks

SHAPE = {"Hq": 8, "Hkv": 4, "Lk": 200, "D": 16}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"pool": 5},
    {"vote": "hard"},
    {"vote": "logit", "n_query_means": 2},
    {"k": 0.1, "normalize": "candidates"},
    {"score_at": "split", "positions": "contiguous"},
)
BACKENDS = ("reference", "cpu", "native")


def of_rank(x: Tensor, rank: int, size: int, heads: int = 1) -> Tensor:
    """A rank's share of the heads (dim 1)."""
    return x.chunk(size, heads)[rank]


def own(p: Problem, rank: int, size: int) -> Problem:
    """A rank's heads of a problem; a KV head goes to several ranks where there are more of them."""
    at = rank * p.Hkv // size
    kept = slice(at, at + max(1, p.Hkv // size))
    heads = (slice(None), slice(None), kept) if p.is_paged else (slice(None), kept)
    sinks = None if p.sink_logits is None else of_rank(p.sink_logits, rank, size, 0)
    q = of_rank(p.q, rank, size)
    return replace(p, q=q, k_cache=p.k_cache[heads], v_cache=p.v_cache[heads], sink_logits=sinks)


def problems(shape: dict[str, Any]) -> list[Problem]:
    found = []
    for Lq in (1, 3):
        for settings in SETTINGS:
            moved = "score_at" in settings
            found.append(
                problem(
                    shape=SHAPE | shape | {"Lq": Lq, "seed": len(found)},
                    config={"k": 20} | settings,
                    cache_seqlens=lengths(180, 0 if Lq == 1 else 90),
                    rope=rope(16) if moved else None,
                    sink_logits=torch.arange(8.0) if Lq == 3 else None,
                )
            )
    q, k, v = tensors(**(SHAPE | shape))
    k, v, table = paged(k, v)
    found.append(problem(q, k, v, cache_seqlens=lengths(180, 90), block_table=table))
    return found


def heads_on_ranks(rank: int, shape: dict[str, Any]) -> int:
    """Every rank selects what one process selects, bit for bit what the others do."""
    group, size = dist.group.WORLD, dist.get_world_size()
    ranks = Ranks(group.group_name)
    tried = 0
    for p in problems(shape):
        for backend in BACKENDS:
            expected, of_one = run(p, backend, return_info=True)
            out, info = run(own(p, rank, size), backend, process_group=group, return_info=True)
            chosen = ranks.gather(info.selection.positions)
            assert torch.equal(chosen, info.selection.positions.expand_as(chosen))
            assert torch.equal(info.selection.positions, of_one.selection.positions), p.describe()
            assert torch.equal(info.selection.count, of_one.selection.count)
            torch.testing.assert_close(out, of_rank(expected, rank, size))
            mass = of_rank(of_one.retained_mass, rank, size)
            torch.testing.assert_close(info.retained_mass, mass, equal_nan=True)
            tried += 1
    return tried


def reuse_and_plans(rank: int) -> list[int]:
    """Ranks decide together, as one process would, in calls, in plans and in torch.compile."""
    group, size = dist.group.WORLD, dist.get_world_size()
    whole = problem(shape=SHAPE | {"B": 2}, config={"k": 20}, max_reuse=4)
    noise = torch.randn((8, *whole.q.shape), generator=torch.Generator().manual_seed(1))
    hits = []
    for backend in BACKENDS:
        one, many, planned = (SelectionCache(0.8, max_reuse=4) for _ in range(3))
        compiled_cache = SelectionCache(0.8, max_reuse=4)
        like = own(whole, rank, size)
        steps = plan(like, backend, process_group=group) if backend != "reference" else None
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for t, more in enumerate(noise):
            n = lengths(150 + t, 90 + t // 2)
            # One head alone turns at times: its rank alone would select again.
            q = whole.q + 0.2 * more
            q[:, 0] -= 6 * (t % 3 == 2) * whole.q[:, 0]
            p = replace(whole, q=q, cache_seqlens=n)
            mine = own(p, rank, size)
            _, due = run(p, backend, cache=one, return_info=True)
            out, info = run(mine, backend, cache=many, process_group=group, return_info=True)
            assert torch.equal(info.reused, due.reused)
            assert torch.equal(info.selection.positions, due.selection.positions)
            if steps is not None:
                again, told = steps(
                    mine.q, mine.k_cache, mine.v_cache, n, cache=planned, return_info=True
                )
                assert torch.equal(told.reused, due.reused)
                assert torch.equal(told.selection.positions, due.selection.positions)
                torch.testing.assert_close(again, out)
            traced = compiled(
                mine.q,
                mine.k_cache,
                mine.v_cache,
                config=mine.config,
                cache_seqlens=n,
                cache=compiled_cache,
                process_group=group,
                backend=backend,
            )
            assert torch.equal(traced, out)
        hits.append(int(one.hits.sum()))
        assert torch.equal(many.hits, one.hits)
    return hits


def wrong_calls(rank: int) -> list[str]:
    """What ranks are told that do not agree, and where a group is not what is needed."""
    group = dist.group.WORLD
    q, k, v = tensors(**SHAPE)
    reset = SelectionCache(0.8)
    for _ in range(2):
        attention(q, k, v, k=20, n_sink=2, n_local=4, cache=reset, process_group=group)
    if rank == 0:
        reset.reset(1)
    told = []
    for more in (
        {"cache_seqlens": lengths(180, 90 + rank)},
        {"k": 20 + rank},
        {"softcap": 30 + rank},
        {"rope": rope(16, scaling=1.0 + rank), "score_at": "fixed"},
        {"cache": SelectionCache(0.8 + 0.1 * rank)},
        {"cache": SelectionCache(None, max_reuse=0) if rank else None},
        {"cache": reset},
        {"scope": "group"},
        {"process_group": "WORLD"},
    ):
        arguments = {"k": 20, "n_sink": 2, "n_local": 4, "process_group": group} | more
        told.append(refused(attention, q, k, v, **arguments))
    attention(q, k, v, k=20, process_group=group, softcap=30.0 if rank else 30)
    every = torch.arange(200)
    mine = every.where(every % 2 == rank, -1)
    both = mine.clone()
    both[4] = 4
    for more in (
        {"token_positions": both},
        {"q": q + rank},
        {"sink_logits": torch.zeros(8) + rank},
        {"v_cache": v[..., : 7 + rank]},
    ):
        arguments = {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "token_positions": mine,
            "cache_seqlens": lengths(180, 90),
        } | more
        arguments |= {"k": 20, "process_group": group}
        told.append(refused(context_parallel_attention, **arguments))
    return told


def refused(call: Any, *args: Any, **more: Any) -> str:
    try:
        call(*args, **more)
    except InvalidProblem as error:
        return str(error)
    return "not refused"


def sums(rank: int) -> None:
    """Ranks add in their order: what is added in another has other bits."""
    group, size = dist.group.WORLD, dist.get_world_size()
    ranks = Ranks(group.group_name)
    for numel in (1, 2, 3, 1000):
        generator = torch.Generator().manual_seed(numel)
        of_all = [torch.randn(1, numel, generator=generator) for _ in range(size)]
        expected = of_all[0]
        for x in of_all[1:]:
            expected = expected + x
        assert torch.equal(ranks.sum(of_all[rank]), expected)


def killed(rank: int, of_tokens: bool) -> str:
    """The last rank goes away between two steps."""
    group = dist.group.WORLD
    q, k, v = tensors(**SHAPE)

    def step() -> None:
        if of_tokens:
            at = torch.arange(200).where(torch.arange(200) % 2 == rank, -1)
            context_parallel_attention(q, k, v, at, lengths(180, 90), k=20, process_group=group)
        else:
            attention(q, k, v, k=20, process_group=group)

    step()
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step()
    return "went on"


def tokens_on_ranks(rank: int) -> int:
    """A sharded cache, contiguous and paged, beside one process that holds all of it."""
    group, size = dist.group.WORLD, dist.get_world_size()
    q, k, v = tensors(Lk=200, Lq=2)
    n = lengths(180, 90)
    config = SelectConfig(k=20, n_sink=2, n_local=4)
    every = torch.arange(200)
    expected, of_one = context_parallel_attention(
        q, k, v, every, n, config=config, return_info=True
    )
    mine = every[every // 7 % size == rank]
    pages = paged(k, v)
    for keys, values, at, table in (
        (k[:, :, mine], v[:, :, mine], mine, None),
        (
            k[:, :, : 200 if rank == 0 else 0],
            v[:, :, : 200 if rank == 0 else 0],
            every[: 200 if rank == 0 else 0],
            None,
        ),
        (*pages[:2], every.where(every // 7 % size == rank, -1), pages[2]),
    ):
        out, info = context_parallel_attention(
            q,
            keys,
            values,
            at,
            n,
            config=config,
            block_table=table,
            process_group=group,
            return_info=True,
        )
        assert torch.equal(info.selection.positions, of_one.selection.positions)
        torch.testing.assert_close(out, expected)
    return 3


@pytest.mark.parametrize(
    ("size", "shape"),
    [(2, {}), pytest.param(4, {}, marks=pytest.mark.slow), (4, {"Hkv": 2})],
    ids=["2", "4", "4-with-replicated-KV-heads"],
)
def test_heads_on_ranks_select_what_one_process_selects(
    size: int, shape: dict[str, Any], tmp_path: Path
) -> None:
    tried = run_ranks(size, tmp_path, heads_on_ranks, shape)
    assert tried == [3 * (2 * len(SETTINGS) + 1)] * size


def test_ranks_decide_on_reuse_together(tmp_path: Path) -> None:
    hits = run_ranks(2, tmp_path, reuse_and_plans)
    assert hits[0] == hits[1]
    assert min(hits[0]) > 0


def test_ranks_that_were_told_different_things_all_say_so(tmp_path: Path) -> None:
    one, other = run_ranks(2, tmp_path, wrong_calls)
    assert one == other
    expected = (
        "cache_seqlens is [180, 90] on rank 0 and [180, 91] on rank 1",
        "k is 20 on rank 0 and 21 on rank 1",
        "softcap is 30.0 on rank 0 and 31.0 on rank 1",
        "rope is (False, 'rotated', 1.0) on rank 0 and (False, 'rotated', 2.0) on rank 1",
        "theta is 0.8 on rank 0 and 0.9 on rank 1",
        "a cache is False on rank 0 and True on rank 1",
        "cache.seqlen_at_selection is (2,) torch.int32 of SHA-256",
        "scope='group' with a process_group",
        "process_group is a str",
        "of request 0, with n=180, the ranks hold [90, 91] tokens",
        "q is (2, 8, 1, 16) torch.float32 of SHA-256",
        "sink_logits is (8,) torch.float32 of SHA-256",
        "Dv is 7 on rank 0 and 8 on rank 1",
    )
    for said, start in zip(one, expected, strict=True):
        assert said.startswith(start), said


def test_ranks_add_in_their_order(tmp_path: Path) -> None:
    assert run_ranks(3, tmp_path, sums) == [None] * 3


@pytest.mark.parametrize("of_tokens", [False, True], ids=["heads", "tokens"])
def test_where_a_rank_is_killed_the_others_say_so(of_tokens: bool, tmp_path: Path) -> None:
    told, killed_by = run_ranks(2, tmp_path, killed, of_tokens)
    assert killed_by == -signal.SIGKILL
    assert told.startswith("RankFailed: rank 0 of 2 got no answer from the others"), told


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tokens_on_ranks_are_attended_to_as_in_one_process(size: int, tmp_path: Path) -> None:
    assert run_ranks(size, tmp_path, tokens_on_ranks) == [3] * size


def test_the_costs_in_the_docs_are_those_computed() -> None:
    page = (Path(parallel.__file__).parents[1] / "docs" / "scale.md").read_text()
    assert all(line in page for line in parallel.tables().splitlines())


def test_what_is_sent_is_what_is_computed(capfd: pytest.CaptureFixture[str]) -> None:
    """The measurement itself compares each count."""
    parallel.main(["--measure", "2", "--tokens", "3000"])
    rows = [line.split("|") for line in capfd.readouterr().out.splitlines()]
    found = {row[1].strip(): row[3].strip() for row in rows if len(row) > 5 and "3,000" in row[2]}
    due = parallel.sent(2, 3000 + parallel.ROOM)
    assert found == {name.split(":")[0]: f"{size:,}" for name, size in due.items()}
