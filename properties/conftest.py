"""pytest properties [--backend=NAME]...: which backends, how many examples, and what was run."""

import importlib
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from properties import guard, interpreter, law
from properties.backends import chosen
from properties.devices import for_the_cpu
from tokenselect import Backend, registry
from tokenselect.registry import load

# Without a GPU the triton backend runs in Triton's interpreter. Triton decides when it is imported,
# which nothing has done yet: nothing above does, and pytest reads this file before any test's
# module. Nothing else in a run of all tests minds: inductor compiles for the CPU in C++.
if not torch.cuda.is_available():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError(
            "triton was imported before properties/conftest.py, and not for its interpreter: the "
            "triton backend cannot be tried. There is no GPU here; set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1":
    law.SHARES["triton"] = 0.1

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=100, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)
# In CI the same problems every time; the random runs are `make props` and everybody's own.
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, database=None)
# On a GPU every other combination of shapes and settings is a kernel to compile, a second or two:
# few examples, and of few shapes (see `fitted`).
settings.register_profile("device", settings.get_profile("ci"), max_examples=12)
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


def pytest_configure(config: pytest.Config) -> None:
    # numpy's, from Triton's interpreter: a maximum over NaN alone is NaN, as it should be.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", chosen(metafunc.config))
    if "plannable" in metafunc.fixturenames:  # the names of those whose stages a plan can run
        names = [name for name in chosen(metafunc.config) if load(name).planned is not None]
        metafunc.parametrize("plannable", names)


@pytest.fixture
def backend(backend_name: str) -> Backend:
    return for_the_cpu(load(backend_name))


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Whoever asks for the triton backend here gets it in guarded memory."""
    if "triton" in chosen(pytestconfig):
        launch = importlib.import_module("tokenselect.kernels.triton.launch")
        if launch.INTERPRETED:
            interpreter.hasten()
        monkeypatch.setitem(registry._loaded, "triton", guard.watched(load("triton"), launch))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = {name for name, _ in (*law.RAN, *law.UNABLE)}
    names = sorted(name for name in counted if not name.startswith(("planted-", "narrow-")))
    if names:
        terminalreporter.section("problems run per backend")
    for name in names:
        ran = sum(count for (backend, _), count in law.RAN.items() if backend == name)
        unable = sum(count for (backend, _), count in law.UNABLE.items() if backend == name)
        terminalreporter.line(f"{name:12} {ran:6} run, {unable} beyond what it declares")
