"""Run code in a process of its own, where nothing has been imported or registered yet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenselect.dispatch.registry import load

ROOT = Path(__file__).parent.parent
# What "auto" takes for a problem that native takes: it may have no compiler here.
AUTO = "cpu" if load("native").unavailable else "native"
# Seconds, after which it hangs: on a quiet core nothing here takes a twentieth of them.
HANG = 1800


# What numpy says of loops in the interpreter of triton 3.6.
OF_TRITON = "ignore:Conversion of an array with ndim:DeprecationWarning"


def run(
    code: str | list[str], *paths: Path, timeout: float = HANG, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code, or `python -m ...` for a list, with `paths` importable. Warnings are errors."""
    arguments = ["-c", code] if isinstance(code, str) else ["-m", *code]
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", OF_TRITON, *arguments],
        cwd=ROOT,
        # Several test runs may share the cores: threads would wait for one another.
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def output(code: str, *paths: Path, timeout: float = HANG, **environment: str) -> str:
    """What code prints; its traceback is the failure if it fails."""
    done = run(code, *paths, timeout=timeout, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def need_a_cpp_compiler() -> None:
    """Skip a test of inductor where there is none; in CI, fail."""
    if shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"):
        return
    missing = "NOT TESTED: inductor, the default of torch.compile; it needs g++ or clang++ here"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
