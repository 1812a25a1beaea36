"""The native backend's build, in every way it can go wrong; its paths and its threads."""

import errno
import fcntl
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenselect
from tests.fresh import HANG
from tokenselect import Problem, SelectConfig
from tokenselect.conformance.problems import Case
from tokenselect.conformance.tolerances import attend_tolerance, score_tolerance
from tokenselect.dispatch.registry import load
from tokenselect.kernels.native import backend as native
from tokenselect.kernels.native import build, library, stages
from tokenselect.kernels.native.build import CannotBuild

here = pytest.mark.skipif(
    platform.machine() not in build.PATHS or "CXX" in os.environ or shutil.which("g++") is None,
    reason="no g++ here, another compiler named, or an architecture without kernels",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of compiled libraries of this test's own."""
    monkeypatch.setenv("TOKENSELECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Sources that compile at once."""
    sources = tmp_path / "cpp"
    sources.mkdir()
    for name in ("kernels", "entry", "threads"):
        (sources / f"{name}.cpp").write_text(f"int {name}() {{ return 0; }}\n")
    return sources


def compiler(where: Path, script: str) -> str:
    """A compiler of one's own: a shell script."""
    path = where / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


PROCESS = """
import logging, pathlib, sys
from tokenselect.kernels.native import build
logging.basicConfig()
print(build.library(pathlib.Path(sys.argv[1])))
"""


def process(sources: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(sources)],
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# --- the build -----------------------------------------------------------------------------------


@here
def test_a_library_is_made_once(cache: Path, small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tokenselect"):
        made = build.library(small)
        assert build.library(small) == made
    assert [record.message.split()[0] for record in caplog.records] == ["compiling", "compiled"]
    assert " s: " in caplog.records[1].message, "the seconds that it took"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert made.parent == cache
    assert made.stat().st_mode & 0o022 == 0


@here
def test_other_sources_or_flags_make_another_library(cache: Path, small: Path) -> None:
    made = {build.library(small), build.library(small, ("-g",))}
    (small / "entry.cpp").write_text("int entry() { return 1; }\n")
    made.add(build.library(small))
    assert len(made) == 3


@here
def test_two_processes_at_once_make_one_library(cache: Path, small: Path) -> None:
    both = [process(small) for _ in range(2)]
    said = [one.communicate(timeout=HANG) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(err.count("compiling") for _, err in said) == 1, said


@here
def test_a_build_that_is_killed_half_way_leaves_nothing_in_the_way(
    cache: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = compiler(tmp_path, 'case "$*" in *-dM*) exec g++ "$@";; *) sleep 300;; esac')
    monkeypatch.setenv("CXX", slow)
    one = process(small)
    try:
        until = time.monotonic() + HANG
        while not list(cache.glob("building-*")):
            assert time.monotonic() < until, "it never began to compile"
            assert one.poll() is None, "it ended before"
            time.sleep(0.02)
    finally:
        os.killpg(one.pid, signal.SIGKILL)
        one.communicate()
    assert list(cache.glob("building-*"))
    assert not list(cache.glob("*.so"))
    monkeypatch.delenv("CXX")
    assert build.library(small).exists()
    assert not list(cache.glob("building-*"))


@here
def test_without_locks_what_another_process_is_building_stays(
    cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", has_no_locks)
    others = build.cache_directory() / "building-other"
    others.mkdir()
    assert build.library(small).exists()
    assert others.exists()


@here
def test_what_was_made_is_taken_where_the_compiler_is_gone(
    cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.library(small)
    monkeypatch.setenv("PATH", "")
    assert build.library(small) == made


SCRIPTS = {
    "fails": (
        'case "$*" in *-dM*) exec g++ "$@";; esac; echo "x.cpp:1: error: boom" >&2; exit 3',
        "failed with exit code 3: x.cpp:1: error: boom",
    ),
    "is too old": ('echo "#define __GNUC__ 9"', "is g++ 9, older than 11"),
    "is for another architecture": (
        'echo "#define __GNUC__ 12"; echo "#define __riscv 1"',
        "compiles for another architecture",
    ),
    "dies at once": ("exit 1", "no C++ compiler"),
}  # fmt: skip


@here
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_compiler_that(
    kind: str, cache: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, why = SCRIPTS[kind]
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with pytest.raises(CannotBuild, match=re.escape(why)):
        build.library(small)
    assert isinstance(library.open_library(make=lambda: build.library(small)), str)
    assert not list(cache.glob("building-*"))
    assert not list(cache.glob("*.so"))


def test_no_compiler(cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotBuild, match=r"g\+\+ is not there; clang\+\+ is not there"):
        build.library(small)


@here
def test_a_directory_that_cannot_be_made(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSELECT_CACHE", "/dev/null/kernels")
    with pytest.raises(CannotBuild, match="TOKENSELECT_CACHE"):
        build.library(small)


@here
def test_a_directory_that_cannot_be_written(cache: Path, small: Path) -> None:
    (build.cache_directory() / "lock").mkdir()  # a mode would not keep root out
    with pytest.raises(CannotBuild, match=r"cannot write to .*; name another directory"):
        build.library(small)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(CannotBuild, match=f"mode {mode:o}.*chmod 700"):
        build.cache_directory()


def test_a_directory_of_another_user_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CannotBuild, match=f"has owner {os.getuid()} and mode 700"):
        build.cache_directory()


def test_a_library_that_others_can_write_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.write_bytes(b"")
    file.chmod(0o722)
    (tmp_path / "link.so").symlink_to(file)
    for path in (file, tmp_path / "link.so"):
        with pytest.raises(CannotBuild, match="remove it"):
            build.check_own(path)


@here
def test_what_is_no_library_is_a_reason(tmp_path: Path, cache: Path, small: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    broken.chmod(0o700)
    assert "cannot be loaded" in str(library.open_library(make=lambda: broken))
    # It loads, and has none of the functions.
    assert "cannot be loaded" in str(library.open_library(make=lambda: build.library(small)))


WITHOUT = """
import torch, tokenselect
q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 99, 16)
out, info = tokenselect.attention(q, k, k, k=9, return_info=True)
print(info.backend)
print(tokenselect.explain(q, k, k, k=9))
try:
    tokenselect.attention(q, k, k, k=9, backend="native")
except tokenselect.UnsupportedProblem as error:
    print(error)
"""


def test_without_a_compiler_auto_goes_on_to_cpu_and_says_why(tmp_path: Path) -> None:
    environment = os.environ | {"TOKENSELECT_CACHE": str(tmp_path / "cache"), "PATH": ""}
    environment.pop("CXX", None)
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("cpu\n")
    assert "passed over native: no C++ compiler" in said
    assert "native: no C++ compiler" in said.partition("no backend asked can run")[2]


# --- the call ------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(
    load("native").unavailable is not None, reason=str(load("native").unavailable)
)


@here
def test_where_there_is_a_compiler_it_is_available() -> None:
    """Else sources that do not compile would be what no test tries."""
    assert load("native").unavailable is None


@needs_native
@pytest.mark.parametrize("path", ["baseline", None])
def test_small_float16_numbers_are_read_where_floats_that_small_count_as_zero(
    path: str | None,
) -> None:
    paths = None if path is None else (path,)
    opened = library.open_library(path, lambda: build.library(paths=paths))
    own = native.backend(opened, "own")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 50, 24, generator=generator).unbind()
    problem = Problem.build((q[:, :, :1] * 2e-6).half(), (k * 2e4).half(), k.half(),
                            SelectConfig(k=9, n_sink=1, n_local=2), scale=1.0)  # fmt: skip
    expected = own.attend_fresh(problem)
    try:
        assert torch.set_flush_denormal(True)
        found = own.attend_fresh(problem)
    finally:
        torch.set_flush_denormal(False)
    assert expected[0].out.isfinite().all()
    assert torch.equal(found[0].out, expected[0].out)


@needs_native
def test_a_sink_logit_of_infinity_gives_what_softmax_gives() -> None:
    q, k = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 30, 4)
    for sink in (math.inf, math.nan):
        out = tokenselect.attention(
            q, k, k, k=5, sink_logits=torch.tensor([sink]), backend="native"
        )
        assert out.isnan().all()


@pytest.mark.parametrize("error", [ValueError("odd"), ModuleNotFoundError("no fcntl")])
def test_whatever_goes_wrong_is_a_reason(error: Exception) -> None:
    def fails() -> Path:
        raise error

    assert library.open_library(None, fails) == f"{type(error).__name__}: {error}"


def test_a_compiler_that_is_no_command_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(build.CannotBuild, match=r"CXX=.*: No closing quotation"):
        build.find_compiler()


TWO_POOLS = """
import ctypes, pathlib, shutil, sys, torch
from tokenselect.kernels.native import library

folder = pathlib.Path(torch.__file__).parent
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
files = {line.split(maxsplit=5)[-1] for line in maps if "omp" in line}
own = next(file for file in files if file.startswith(str(folder)))
ctypes.CDLL(shutil.copy(own, sys.argv[1]))
expected = ctypes.CDLL(own).GOMP_parallel
print(library._torch_region() == ctypes.cast(expected, ctypes.c_void_p).value)
"""


@needs_native
def test_of_two_pools_torchs_own_is_taken(tmp_path: Path) -> None:
    """Another package's lies in a folder whose name has torch in it, and comes first by name."""
    other = tmp_path / "0-pytorch" / "libgomp-1.so.1"
    other.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TWO_POOLS, str(other)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


@needs_native
def test_every_value_is_a_field_of_the_call_and_every_factor_is_a_double() -> None:
    problem = Case(
        rope="raw", page_size=2, has_sink_logits=True, config=SelectConfig.extrapolate(k=3)
    ).problem()
    lib = native.LIBRARY
    values = stages.Stages(lib)._values(problem, 0)
    assert {name for name in values if not name.startswith("kept")} == set(lib.fields)
    header = (build.SOURCES / "call.h").read_text()
    assert set(re.findall(r"X\(double, (\w+)\)", header)) == library.FACTORS


def results(problem: Problem, backend: tokenselect.Backend) -> list[Tensor]:
    attended, selection, lse = backend.attend_fresh(problem)
    votes, _ = backend.score(problem)
    return [*attended, *selection, lse, votes]


# Large enough that every stage wakes other threads.
LARGE: dict[str, Callable[[], Problem]] = {
    "float32": lambda: Case(
        lengths=(9000, 700), Hkv=3, G=3, D=64, Dv=64, config=SelectConfig(500, 16, 64)
    ).problem(),
    "bfloat16, paged": lambda: Case(
        lengths=(9000,), Hkv=2, G=4, D=128, Dv=128, dtype=torch.bfloat16, page_size=16,
        config=SelectConfig(300, 16, 64, scope="group", normalize="candidates"),
    ).problem(),
    "split": lambda: Case(
        lengths=(9000,), Hkv=2, G=4, D=64, Dv=64, rope="rotated", rotary_dim=64, Lq=3,
        config=SelectConfig.extrapolate(k=300, pool=3, n_query_means=2),
    ).problem(),
    "hard": lambda: Case(
        lengths=(9000,), Hkv=2, G=4, D=64, Dv=64, config=SelectConfig(300, 16, 64, vote="hard")
    ).problem(),
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("name", LARGE)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    problem, backend, before = LARGE[name](), load("native"), torch.get_num_threads()
    try:
        each = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            each.append(results(problem, backend))
    finally:
        torch.set_num_threads(before)
    for other in each[1:]:
        for one, two in zip(each[0], other, strict=True):
            assert torch.equal(one, two)


@needs_native
def test_problems_that_look_the_same_have_their_own_strides_and_tensors() -> None:
    q, k, v = (torch.randn(1, heads, 50, 16) for heads in (4, 2, 2))
    config, seen = SelectConfig(k=9, n_sink=2, n_local=5), []
    for keys in (k, k.flip(0), k.transpose(1, 2).contiguous().transpose(1, 2)):
        for query in (q[:, :, :1], q[:, :, 1:2].contiguous()):
            problem = Problem.build(query, keys, v, config)
            seen.append(problem.kind)
            attended, selection, _ = load("native").attend_fresh(problem)  # type: ignore[misc]
            finding = attend_tolerance(problem, selection).compare(attended)
            assert finding.holds, finding
    assert len(set(seen)) == 1


@pytest.mark.slow
@needs_native
def test_a_chunk_in_tiles_does_not_depend_on_threads_and_is_the_same_in_a_plan() -> None:
    """In loops, on any processor; a value that is not finite is hidden from most queries."""
    problem = Case(
        lengths=(2000, 0, 700), G=3, Lq=45, D=40, Dv=72, dtype=torch.bfloat16, filler="inf",
        config=SelectConfig(300, 16, 64),
    ).problem()  # fmt: skip
    problem.v_cache[0, 0, 1999, 3] = torch.nan
    lib = library.Library(build.library(flags=("-DTS_TILES_BY_LOOPS",)))
    call, planned = stages.Stages(lib), stages.Stages(lib, is_static=True)
    selection, before = call.select(call.score(problem).votes, problem), torch.get_num_threads()
    each = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            each += [call.attend(problem, selection), planned.attend(problem, selection)]
    finally:
        torch.set_num_threads(before)
    finding = attend_tolerance(problem, selection).compare(each[0])
    assert finding.holds, finding
    for other in each[1:]:
        assert torch.equal(other.out.nan_to_num(7), each[0].out.nan_to_num(7))
        assert torch.equal(other.lse, each[0].lse)


@needs_native
@pytest.mark.parametrize(
    ("of_queries", "of_keys", "scale"),
    [(2.0**60, 2.0**-128, 2.0**66), (2.0**-127, 2.0**125, 4.0), (2.0**-62, 2.0**-62, 2.0**122)],
)
def test_subnormal_numbers_count_in_a_chunk(
    of_queries: float, of_keys: float, scale: float
) -> None:
    """Tiles take them for zeros."""
    problem = Case(
        lengths=(300,), Lq=20, G=1, Hkv=1, D=32, dtype=torch.bfloat16, scale=scale,
        config=SelectConfig(100, 16, 64),
    ).problem()  # fmt: skip
    problem.k_cache.copy_(problem.k_cache.float() * of_keys)
    problem.q.copy_(problem.q.float() * of_queries)
    backend = load("native")
    attended, selection, _ = backend.attend_fresh(problem)
    finding = attend_tolerance(problem, selection).compare(attended)
    assert finding.holds, finding


THREADS = """
import os, torch
from tokenselect import attention
q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 20000, 64)
def running(): return len(os.listdir("/proc/self/task"))
counts = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    attention(q, k, k, k=100, backend="native")
    counts.append(running())
torch.rand(10**6).exp()
counts.append(running())
print(*counts)
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_the_threads_are_those_of_torch_and_as_many_as_it_says() -> None:
    one, three, with_torch = map(
        int, subprocess.check_output([sys.executable, "-c", THREADS], text=True).split()
    )
    assert three == one + 2, "torch.set_num_threads(3) did not give two threads more"
    assert with_torch == three, "torch has a pool of its own beside the kernels'"


# --- paths ---------------------------------------------------------------------------------------

FLAGS = (*build.FLAGS, "-O0")  # where only the compiler's word is asked for


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("path", build.paths_here(platform.machine()))
def test_every_path_is_within_the_tolerance(path: str) -> None:
    lib = library.Library(build.library(paths=(path,)), path)
    assert lib.path == path
    assert lib.has_tiles == (path == "amx")
    backend = native.backend(lib, f"native-{path}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for D, G in ((8, 1), (40, 3), (64, 4), (100, 7)):
            case = Case(lengths=(70, 1100), D=D, Dv=D + 8, G=G, dtype=dtype, softcap=30.0)
            problem = replace(case, config=SelectConfig(500, 3, 9)).problem()
            finding = score_tolerance(problem).compare(backend.score(problem))
            assert finding.holds, finding
            attended, selection, _ = backend.attend_fresh(problem)
            finding = attend_tolerance(problem, selection).compare(attended)
            assert finding.holds, finding


@needs_native
def test_a_path_that_does_not_run_here_is_a_reason() -> None:
    why = library.open_library("no such path")
    assert "kernels for" in str(why)


AMX = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq amx_tile amx_bf16"


@pytest.mark.parametrize(
    ("features", "paths"),
    [
        ("", ["baseline"]),
        ("avx2 fma f16c", ["baseline", "avx2"]),
        ("avx2 fma avx512f avx512bw avx512vl avx512dq", ["baseline"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ["baseline", "avx2", "avx512"]),
        (AMX, ["baseline", "avx2", "avx512", "amx"]),
        (AMX.replace("amx_bf16", ""), ["baseline", "avx2", "avx512"]),
    ],
)
def test_a_path_needs_each_of_its_features(
    features: str, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "features", lambda: f"flags : fpu {features}")
    monkeypatch.setattr(build, "_grants_tiles", lambda: True)
    assert build.paths_here("x86_64") == paths


def test_tiles_that_linux_refuses_are_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "features", lambda: f"flags : fpu {AMX}")
    monkeypatch.setattr(build, "_grants_tiles", lambda: False)
    assert build.paths_here("x86_64") == ["baseline", "avx2", "avx512"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's paths are compiled there")
@needs_native
def test_the_widest_path_compiles_everywhere(tmp_path: Path) -> None:
    build.compile_in(tmp_path, build.find_compiler(), build.SOURCES, FLAGS, ("amx",))


@pytest.mark.slow
def test_the_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    cross = shutil.which("aarch64-linux-gnu-g++")
    if cross is None:
        pytest.skip("NOT TRIED: no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    found = build._asked(cross, ())
    assert isinstance(found, build.Compiler), found
    assert found.machine == "aarch64"
    build.compile_in(tmp_path, found, build.SOURCES, FLAGS, ("baseline",))
