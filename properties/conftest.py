"""pytest properties [--backend=NAME]...: which backends, how many examples, and what was run."""

import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from properties import law
from tokenselect import Backend, UnknownBackend, backends, register
from tokenselect.registry import load, resolved

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=100, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)
# In CI the same problems every time; the random runs are `make props` and everybody's own.
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, database=None)
torch.set_num_threads(1)  # the problems are small: threads only wait for one another
settings.load_profile("ci" if os.environ.get("CI") else "quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="hold this backend to the properties: a registered name, or package.module:ATTRIBUTE; "
        "may be given more than once; without it, every registered backend",
    )


def chosen(config: pytest.Config) -> list[str]:
    """The backends to run. One that was named and cannot be loaded is an error, not a skip."""
    names = []
    for asked in config.getoption("--backend") or backends():
        name = asked
        if ":" in asked:
            module, _, attribute = asked.partition(":")
            backend: Backend = getattr(importlib.import_module(module), attribute)
            name = backend.name
            if name not in backends():
                register(name, backend)
            elif resolved(backend) != load(name):
                raise pytest.UsageError(f"--backend={asked}: another backend is named {name!r}")
        try:
            load(name)
        except UnknownBackend as error:
            raise pytest.UsageError(f"--backend={asked}: {error}") from None
        names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", chosen(metafunc.config))


@pytest.fixture
def backend(backend_name: str) -> Backend:
    return load(backend_name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = {name for name, _ in (*law.RAN, *law.UNABLE)}
    names = sorted(name for name in counted if not name.startswith("planted-"))
    if names:
        terminalreporter.section("problems run per backend")
    for name in names:
        ran = sum(count for (backend, _), count in law.RAN.items() if backend == name)
        unable = sum(count for (backend, _), count in law.UNABLE.items() if backend == name)
        terminalreporter.line(f"{name:12} {ran:6} run, {unable} beyond what it declares")
