"""What the tests and the properties share: Triton's interpreter, threads, profiles, slow tests."""

import os
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the triton backend runs in Triton's interpreter. Triton decides when it is imported,
# which nothing has done yet: nothing above does, and pytest reads this file before any test's
# module. Nothing else in a run of all tests minds: inductor compiles for the CPU in C++.
if not torch.cuda.is_available():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError(
            "triton was imported before conftest.py, and not for its interpreter: the triton "
            "backend cannot be tried. There is no GPU here; set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("full", max_examples=100, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("quick", settings.get_profile("full"), max_examples=15)
settings.register_profile("thorough", settings.get_profile("full"), max_examples=1000)
# In CI all tests, and the same problems every time; the random runs are everybody's own.
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, database=None)
# On a GPU every other combination of shapes and settings is a kernel to compile, a second or two:
# few examples, and of few shapes (see `fitted`).
settings.register_profile("device", settings.get_profile("ci"), max_examples=12)
settings.load_profile("ci" if os.environ.get("CI") else "quick")

# Problems are small, and other runs may share the cores: threads would only wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write tests/errors.txt and properties/witnesses.txt anew (one process: -n 0)",
    )


@pytest.fixture
def update_snapshots(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-snapshots"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "slow(*names): left out of a run with the Hypothesis profile `quick`, which is that of "
        "`make test`, unless -m says otherwise; with names, where one of them is in the brackets "
        "after the test's name",
    )


def is_slow(item: pytest.Item) -> bool:
    parameters = f"-{item.callspec.id}-" if hasattr(item, "callspec") else ""
    return any(
        not mark.args or any(f"-{name}-" in parameters for name in mark.args)
        for mark in item.iter_markers("slow")
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("::" in argument for argument in config.args)
    if settings.get_current_profile_name() == "quick" and not config.option.markexpr and not named:
        slow = [item for item in items if is_slow(item)]
        items[:] = [item for item in items if not is_slow(item)]
        config.hook.pytest_deselected(items=slow)


# Their tests share what takes long to make.
_ONE_FOR_ALL = (
    *("test_gpu_dry_run.py", "test_laziness.py", "test_real_model.py", "test_resources.py"),
    "test_triton_bytes.py",
)


def together(nodeid: str) -> str:
    """What the tests that one process has to run have in common."""
    path, _, test = nodeid.partition("::")
    if path.endswith(_ONE_FOR_ALL):
        return path
    if path.endswith("properties/test_laws.py") and "[" in test:  # it counts a backend's problems
        backend = re.split(r"[-\]]", test.partition("[")[2])[0]
        return f"{path}[{backend}]"
    return nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For --dist loadgroup. That of pytest-xdist 3.8 does not see its groups under pytest 9.2."""
    if config.option.dist != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    return Together(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    profile = settings.get_current_profile_name()
    left_out = ": few examples, and none of the slow tests (`make test-all` runs all)"
    return f"Hypothesis profile: {profile}{left_out if profile == 'quick' else ''}"
