"""pytest bench --benchmark-only: the same workloads under pytest-benchmark, to compare commits.

Reports and never fails on a time; `bench.run` is what checks equivalence first. Not collected by a
plain `pytest`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bench.checks import call, filled_cache
from bench.dense import DENSE, requests
from bench.run import bytes_read
from bench.workloads import WORKLOADS, Workload, make
from tokenselect import Problem, attend, score, select

NAMES = ("smollm2-8k", "decode-32k", "decode-128k")
BACKENDS = ("cpu",)
FOLDED = next(dense for dense in DENSE if dense.name == "sdpa, group folded")


@pytest.fixture(scope="module", params=NAMES)
def workload(request: pytest.FixtureRequest) -> Workload:
    return WORKLOADS[request.param]


@pytest.fixture(scope="module")
def problem(workload: Workload) -> Problem:
    return make(workload)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_group_a_workload(benchmark: Any, workload: Workload) -> None:
    benchmark.group = workload.name


def test_dense(benchmark: Any, problem: Problem) -> None:
    benchmark.extra_info["bytes"] = bytes_read(problem, "dense")
    benchmark(FOLDED, requests(problem))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh(benchmark: Any, problem: Problem, backend: str) -> None:
    _, info = call(problem, backend, return_info=True)
    benchmark.extra_info["bytes"] = bytes_read(problem, "fresh", info.selection)
    benchmark(call, problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reused(benchmark: Any, problem: Problem, backend: str) -> None:
    cache = filled_cache(problem, backend)
    _, info = call(problem, backend, cache, return_info=True)
    assert info.reused.all()
    benchmark.extra_info["bytes"] = bytes_read(problem, "reused", info.selection)
    benchmark(call, problem, backend, cache)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", ["score", "select", "attend"])
def test_stage(benchmark: Any, problem: Problem, stage: str, backend: str) -> None:
    votes = score(problem, backend).votes
    selection = select(votes, problem, backend)
    run = {
        "score": partial(score, problem, backend),
        "select": partial(select, votes, problem, backend),
        "attend": partial(attend, problem, selection, backend),
    }[stage]
    benchmark.extra_info["bytes"] = bytes_read(problem, stage, selection)
    benchmark(run)
