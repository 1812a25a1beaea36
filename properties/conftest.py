"""pytest properties [--backend=NAME]...: which backends, how many examples, and what was run."""

import importlib
import os
from typing import Any

import pytest

from properties import guard, interpreter
from properties.backends import chosen
from tokenselect import Backend
from tokenselect.conformance.devices import for_the_cpu
from tokenselect.conformance.laws import law
from tokenselect.dispatch import registry
from tokenselect.dispatch.registry import load

if os.environ.get("TRITON_INTERPRET") == "1":
    law.SHARES["triton"] = 0.1


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
        names = [name for name in chosen(metafunc.config) if load(name).static is not None]
        metafunc.parametrize("plannable", names)


@pytest.fixture
def backend(backend_name: str) -> Backend:
    return for_the_cpu(load(backend_name))


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Whoever asks for the triton backend here, or native, gets it in guarded memory."""
    if "triton" in chosen(pytestconfig):
        launch = importlib.import_module("tokenselect.kernels.triton.launch")
        if launch.INTERPRETED:
            interpreter.hasten()
        monkeypatch.setitem(registry._loaded, "triton", guard.watched(load("triton"), launch))
    if "native" in chosen(pytestconfig) and load("native").unavailable is None:
        stages = importlib.import_module("tokenselect.kernels.native.stages")
        monkeypatch.setattr(stages, "_LEAST", 0)  # scratch of the very size, new at each call
        monkeypatch.setattr(stages, "_KEPT", -1)
        monkeypatch.setitem(registry._loaded, "native", guard.watched(load("native"), stages))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["problems"] = [
            [(*key, count) for key, count in counter.items()] for counter in (law.RAN, law.UNABLE)
        ]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a worker of pytest-xdist counted."""
    of_worker = getattr(node, "workeroutput", {}).get("problems", ((), ()))
    for counter, counted in zip((law.RAN, law.UNABLE), of_worker, strict=True):
        for backend, name, count in counted:
            counter[backend, name] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = {name for name, _ in (*law.RAN, *law.UNABLE)}
    names = sorted(name for name in counted if not name.startswith(("planted-", "narrow-")))
    if names:
        terminalreporter.section("problems run per backend")
    for name in names:
        ran = sum(count for (backend, _), count in law.RAN.items() if backend == name)
        unable = sum(count for (backend, _), count in law.UNABLE.items() if backend == name)
        terminalreporter.line(f"{name:12} {ran:6} run, {unable} beyond what it declares")
