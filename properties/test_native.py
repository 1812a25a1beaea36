"""Laws on every path of the C++ kernels, and with sanitizers; mistakes planted in them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from properties import test_reuse, witnesses
from properties.guard import watched
from properties.native import MUTANTS, SANITIZED, Mutant, build_mutant, compiled
from properties.test_planted import catcher
from tests.fresh import HANG
from tokenselect import Backend, register
from tokenselect.conformance.laws.law import LAWS, SHARES
from tokenselect.conformance.laws.verdict import seeded, verdict
from tokenselect.dispatch.registry import load
from tokenselect.kernels.native import backend as native
from tokenselect.kernels.native import build, stages
from tokenselect.kernels.native.library import Library

pytestmark = pytest.mark.skipif(
    load("native").unavailable is not None, reason=str(load("native").unavailable)
)

# Those that can run here, but that of `native`, which is held to more; and the ways of a chunk of
# queries for every number of queries: that of the widest path, and that of tiles, in loops.
HERE = build.paths_here(platform.machine())
OTHERS: dict[str, tuple[str, tuple[str, ...], int]] = {
    f"native-{path}": (path, (), stages._FEW_QUERIES)
    for path in HERE
    if path != getattr(native.LIBRARY, "path", None)
}
OTHERS["native-chunk"] = HERE[-1], (), 0
OTHERS["native-loops"] = HERE[-1], ("-DTS_TILES_BY_LOOPS",), 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mistake_changes_is_there_once(mutant: Mutant) -> None:
    assert (build.SOURCES / mutant.file).read_text().count(mutant.old) == 1


def reuse_laws(backend: Backend) -> None:
    test_reuse.test_steps_leave_what_the_reference_leaves(backend, 1, -1.0)
    test_reuse.test_steps_leave_what_the_reference_leaves(backend, 3, 0.9)
    test_reuse.test_decisions_are_those_of_the_reference_and_of_each_request_alone(backend)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_in_the_source_is_caught(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update_snapshots: bool
) -> None:
    monkeypatch.setattr(stages, "_LEAST", 0)
    monkeypatch.setattr(stages, "_KEPT", -1)
    if mutant.file == "chunk.h":
        monkeypatch.setattr(stages, "_FEW_QUERIES", 0)
    backend = build_mutant(mutant, tmp_path)
    if mutant.stage == "reuse":
        SHARES[backend.name] = 0.5
        with pytest.raises(AssertionError):
            reuse_laws(backend)
        return
    found = catcher(backend, mutant.stage, update=update_snapshots)
    assert found, f"no law notices {mutant.name}"
    if update_snapshots:
        witnesses.keep(backend.name, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_laws_hold_on_other_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flags, few_queries = OTHERS[name]
    monkeypatch.setattr(stages, "_FEW_QUERIES", few_queries)
    monkeypatch.setattr(stages, "_LEAST", 0)
    monkeypatch.setattr(stages, "_KEPT", -1)
    made = Library(build.library(flags=flags, paths=(path,)), path)
    backend = watched(native.backend(made, name), stages)
    register(backend.name, backend)
    found = [verdict(law, backend, seeded(3)) for law in LAWS]
    assert {one.became for one in found} == {"passed"}, found


@pytest.mark.slow
def test_sanitizers_find_nothing_on_the_problems_of_the_laws(tmp_path: Path) -> None:
    """AddressSanitizer sees past the end of every tensor; UBSan, arithmetic that has no meaning."""
    compiler = build.find_compiler()
    runtime = subprocess.run(
        [*compiler.command, "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"NOT TRIED: {compiler.command[0]} has no libasan.so")
    library = compiled(tmp_path, build.SOURCES, SANITIZED)
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-m", "properties.sanitized", str(library)],
        env=environment, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "laws held" in done.stdout
