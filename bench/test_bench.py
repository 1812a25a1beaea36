"""pytest bench --benchmark-only: the same workloads under pytest-benchmark, to compare commits.

Reports and never fails on a time. Not collected by a plain `pytest`.
"""

from typing import Any

import pytest

from bench.run import Contender, checked
from bench.workloads import WORKLOADS, make


@pytest.fixture(scope="module", params=("smollm2-8k", "decode-32k", "decode-128k"))
def contenders(request: pytest.FixtureRequest) -> dict[str, Contender]:
    several, _, _ = checked(make(WORKLOADS[request.param]), "cpu")
    return {one.name: one for one in several}


@pytest.mark.parametrize(
    "name", ["sdpa, group folded", "fresh", "reused", "score", "select", "attend"]
)
def test_time(benchmark: Any, contenders: dict[str, Contender], name: str, request: Any) -> None:
    benchmark.group = request.node.callspec.params["contenders"]
    benchmark.extra_info["bytes"] = contenders[name].bytes
    benchmark(contenders[name].run)
