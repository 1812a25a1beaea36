"""What the Triton kernels take when they are compiled: the kernels, the tool, and its page."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from bench import resources  # noqa: E402  # it needs triton
from bench.resources import PROBLEMS, QUICK, TARGETS, Resources, Row  # noqa: E402
from tests import fresh  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "resources.md"


def compiled(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run python where kernels are compiled, whatever this process does with them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more,
        capture_output=True,
        text=True,
        timeout=fresh.HANG,
        check=False,
    )


def rows(path: Path) -> list[Row]:
    found = []
    for row in json.loads(path.read_text("utf-8")):
        launches = tuple(Resources(**launch) for launch in row.pop("launches"))
        found.append(Row(**row, launches=launches))
    return found


# --- the kernels --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every kernel, compiled for every target, for a few problems."""
    path = tmp_path_factory.mktemp("resources") / "quick.json"
    done = compiled(["-m", "bench.resources", "--quick", "--check", "--json", str(path)])
    assert path.exists(), done.stdout + done.stderr[-2000:]
    return rows(path)


@pytest.fixture(scope="module")
def planned() -> set[tuple[str, str, str]]:
    """The kernels of every problem on every target, as (kernel, problem, target)."""
    found = set()
    for name, case in PROBLEMS.items():
        problem = case.build()
        for target in TARGETS:
            launches = resources.shipped(problem, target)
            found |= {(resources.name_of(one.kernel), name, target) for one in launches}
    return found


def test_kernels_compile_without_a_spill_and_fit(
    quick: list[Row], planned: set[tuple[str, str, str]]
) -> None:
    assert not resources.complaints(quick)
    wanted = {(kernel, target) for kernel, _, target in planned}
    assert {(row.kernel, row.target) for row in quick} == wanted, "QUICK leaves a kernel out"


def test_problems_cover_what_the_backend_says_that_it_takes() -> None:
    problems = [case.build() for case in PROBLEMS.values()]

    def covered(value: Any) -> set[Any]:
        return {value(p) for p in problems}

    assert {str(p.q.dtype) for p in problems} == {
        "torch.bfloat16",
        "torch.float16",
        "torch.float32",
    }
    assert {64, 80, 96, 128, 256} <= covered(lambda p: p.D)
    assert {1, 4, 7, 32} <= covered(lambda p: p.G)
    assert {1, 4, 512} <= covered(lambda p: p.Lq)
    assert {1, 16, 64} <= covered(lambda p: p.page_size)
    assert {None, "rotated", "raw"} <= covered(lambda p: p.rope and p.rope.cached)
    assert {True, False} == covered(lambda p: p.rope is not None and p.rope.interleaved)
    assert {True, False} == covered(lambda p: p.softcap is None)
    assert {True, False} == covered(lambda p: p.sink_logits is None)
    for name in ("scope", "normalize", "positions", "n_query_means", "pool"):
        assert len(covered(lambda p, name=name: p.config[name])) > 1
    assert set(QUICK) <= set(PROBLEMS)


# --- the page -----------------------------------------------------------------------------


def cells(page: str) -> dict[tuple[str, str, str], str]:
    """The page's cells by kernel, problem and target."""
    found, kernel, targets = {}, "", []
    for line in page.partition("## Every kernel, every problem")[2].splitlines():
        if line.startswith("### "):
            kernel = line.removeprefix("### ")
        elif line.startswith("| problem "):
            targets = [text.strip() for text in line.strip("|").split("|")][1:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            problem, *texts = (text.strip() for text in line.strip("|").split("|"))
            found |= {(kernel, problem, t): text for t, text in zip(targets, texts, strict=True)}
    return found


def test_the_page_is_of_the_kernels_and_problems_there_are(
    planned: set[tuple[str, str, str]],
) -> None:
    page = PAGE.read_text("utf-8")
    found = {key: text for key, text in cells(page).items() if text}
    assert found.keys() == planned, "run: make resources ARGS=--docs"
    wrong = re.compile(r"\d B spilled|not compile")
    assert not [key for key, text in found.items() if wrong.search(text)]
    for name, case in PROBLEMS.items():
        assert f"| {name} | {case.describe()} |" in page


def test_the_page_has_the_figures_of_its_version_of_triton(quick: list[Row]) -> None:
    page = PAGE.read_text("utf-8")
    version = re.search(r"with Triton (\d+(?:\.\d+)+)", page)
    assert version
    if version[1] != triton.__version__:
        pytest.skip(f"the page is of Triton {version[1]}, here is {triton.__version__}")
    found = cells(page)
    stale = {
        key: (text, found.get(key))
        for row in quick
        for key, text in [((row.kernel, row.problem, row.target), resources.cell(row))]
        if found.get(key) != text
    }
    assert not stale, "run: make resources ARGS=--docs"


# --- the tool -----------------------------------------------------------------------------

PLANTED = """
import json
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bench import resources


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1


@triton.jit
def _well(x, odd, n, one, many, scale, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    i = tl.arange(0, BLOCK)
    tl.store(odd + i, tl.load(x + i, mask=i < n) * scale + one + many)


@triton.jit
def _spills(x, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + i)
    tl.store(x + i, row - tl.sum(row, 0))


@triton.jit
def _large(x, n, SIDE: tl.constexpr, PDL: tl.constexpr = False):
    i = tl.arange(0, SIDE)
    at = x + i[:, None] * SIDE + i[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for step in range(n):
        total = tl.dot(tl.load(at + step * SIDE), tl.load(at + (n + step) * SIDE), total)
    tl.store(at, total.to(tl.bfloat16))


@triton.jit
def _broken(x, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    tl.store(x + tl.arange(0, BLOCK), not_a_name)


def plan(problem, arch):
    if problem.is_paged:
        raise ValueError("no plan for pages")
    x = torch.empty(64, dtype=torch.bfloat16)
    numbers = {"n": 32, "one": 1, "many": 2**31, "scale": 0.5}
    well = Launch(_well, (1,), {"x": x, "odd": x[1:], **numbers}, {"BLOCK": 512})
    launches = [well, well._replace(grid=(2,))]
    if arch == "sm_90":
        launches.append(Launch(_spills, (1,), {"x": x}, {"BLOCK": 2**14}, num_warps=1))
    # Many stages compile for minutes on gfx942, and few are enough there.
    large = {"num_warps": 8, "num_stages": 10 if arch == "sm_90" else 3}
    launches.append(Launch(_large, (1,), {"x": x, "n": 32}, {"SIDE": 128}, **large))
    return [*launches, Launch(_broken, (1,), {"x": x}, {"BLOCK": 512})]


def signature():
    well = plan(resources.PROBLEMS["decode-128k"].build(), "gfx942")[0]
    for target in ("sm_90", "gfx942"):
        source, _ = resources.specialised(well, target)
        arguments = list(source.signature)
        overlaps = target == "sm_90"
        assert source.constants == {(3,): 1, (6,): 512, (7,): overlaps}, source.constants
        attributes = {arguments[i]: [a for a, _ in of] for (i,), of in source.attrs.items() if of}
        print(json.dumps([source.signature, attributes]))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    (path / "planted.py").write_text(PLANTED)
    return path


def with_planted(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with the planted kernels in place of those that are shipped."""
    return _planted(folder, f"sys.exit(resources.main({list(arguments)}, plan=planted.plan))")


def _planted(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; import planted; from bench import resources; {code}"
    return compiled(["-c", code], PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


_ON_TWO = ["--target", "sm_90", "--target", "gfx942", "--problem", "decode-128k"]


@pytest.fixture(scope="module")
def found_planted(planted: Path) -> tuple[subprocess.CompletedProcess[str], dict[Any, Row]]:
    path = planted / "found.json"
    more = ["--problem", "decode-1m", "--problem", "paged-16", "--json", str(path)]
    done = with_planted(planted, "--check", *_ON_TWO, *more)
    assert path.exists(), done.stderr
    return done, {(row.kernel, row.problem, row.target): row for row in rows(path)}


def test_planted_mistakes_are_found(
    found_planted: tuple[subprocess.CompletedProcess[str], dict[Any, Row]],
) -> None:
    done, found = found_planted
    assert done.returncode == 1, done.stdout + done.stderr
    kernels = ("planted.well", "planted.large", "planted.broken")
    assert found.keys() == {
        *((k, p, t) for k in kernels for p in ("decode-128k", "decode-1m") for t in _ON_TWO[1:4:2]),
        *(("planted.spills", problem, "sm_90") for problem in ("decode-128k", "decode-1m")),
        *(("(planning)", "paged-16", target) for target in _ON_TWO[1:4:2]),
    }
    for (kernel, _, target), row in found.items():
        wrong = "\n".join(row.wrong())
        if kernel == "planted.well":
            assert not wrong
        if kernel == "planted.spills":
            assert re.fullmatch(r"spills [1-9]\d* bytes, with 255 registers", wrong)
        if kernel == "planted.large":
            limit = TARGETS[target].shared
            assert re.search(rf"takes \d{{6}} bytes of shared memory of {limit}$", wrong)
        if kernel == "planted.broken":
            assert "NameError('not_a_name is not defined')" in wrong
        if kernel == "(planning)":
            assert wrong == "ValueError: no plan for pages"


def test_complaints_name_kernel_problems_targets_and_numbers(
    found_planted: tuple[subprocess.CompletedProcess[str], dict[Any, Row]],
) -> None:
    text = found_planted[0].stdout
    both = "decode-128k, decode-1m on sm_90"
    assert re.search(rf"^✗ planted\.spills, {both}: spills \d+ bytes", text, re.MULTILINE)
    assert re.search(rf"^✗ planted\.large, {both}: takes \d+ bytes", text, re.MULTILINE)
    assert f"✗ planted.broken, {both}, gfx942: CompilationError: at " in text
    assert "✗ (planning), paged-16 on sm_90, gfx942: ValueError: no plan for pages" in text
    assert "planted.well," not in text


def test_matrix_instructions_and_loads_are_found(
    found_planted: tuple[subprocess.CompletedProcess[str], dict[Any, Row]],
) -> None:
    found = found_planted[1]
    matrix = {"sm_90": "wgmma bf16", "gfx942": "mfma bf16"}
    for target, name in matrix.items():
        (large,) = found["planted.large", "decode-128k", target].launches
        assert (large.matrix, large.load, large.num_warps) == (name, 128, 8)
        (well,) = found["planted.well", "decode-128k", target].launches
        assert (well.matrix, well.spilled, well.scalars) == ("", 0, 0)
        assert well.registers > 0


def test_each_distinct_kernel_is_compiled_once(
    found_planted: tuple[subprocess.CompletedProcess[str], dict[Any, Row]],
) -> None:
    lines = [line for line in found_planted[0].stderr.splitlines() if line.startswith("→")]
    assert lines == [
        f"→ planted.{kernel}, decode-128k, {target}"
        for target, kernels in [
            ("sm_90", ("well", "spills", "large", "broken")),
            ("gfx942", ("well", "large", "broken")),
        ]
        for kernel in kernels
    ]


def test_without_check_what_is_wrong_is_shown_only(planted: Path) -> None:
    done = with_planted(planted, *_ON_TWO[:2], *_ON_TWO[4:])
    assert done.returncode == 0, done.stderr
    assert "✗ planted.large, decode-128k on sm_90: takes" in done.stdout


def test_arguments_are_specialised_as_a_launch_would(planted: Path) -> None:
    done = _planted(planted, "planted.signature()")
    assert done.returncode == 0, done.stderr
    for target, line in zip(("sm_90", "gfx942"), done.stdout.splitlines(), strict=True):
        signature, attributes = json.loads(line)
        types = ["*bf16", "*bf16", "i32", "constexpr", "i64", "fp32", "constexpr", "constexpr"]
        assert signature == dict(zip(signature, types, strict=True))
        assert list(signature) == ["x", "odd", "n", "one", "many", "scale", "BLOCK", "PDL"]
        near = ["tt.pointer_range"] if target == "gfx942" else []
        wanted = {"x": ["tt.divisibility", *near], "n": ["tt.divisibility"]}
        wanted |= {"odd": near} if near else {}
        assert attributes == wanted | {"many": ["tt.divisibility"]}


def test_interpreted_kernels_are_refused() -> None:
    done = compiled(["-m", "bench.resources", "--quick"], TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_a_page_of_some_problems_is_refused() -> None:
    done = compiled(["-m", "bench.resources", "--quick", "--docs"])
    assert done.returncode == 2
    assert "--docs takes every problem and every target" in done.stderr


# What the compilers write, and the widest load and the matrix instructions in it.
PTX = [
    ("ld.param.b64 %rd1, [k_param_0];", 0, ""),
    ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [ %r5 + 0 ];", 0, ""),
    ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 16, ""),
    ("ld.global.nc.L1::evict_last.v2.b32 {%r1, %r2}, [ %rd1 ];", 64, ""),
    ("ld.relaxed.gpu.global.b32 %r1, [%rd1];", 32, ""),
    ("ld.global.v8.b32 {%r1}, [ %rd1 + 0 ];", 256, ""),
    ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128, ""),
    ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;", 32, ""),
    ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1];", 128, ""),
    ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1};", 0, "mma tf32"),
    ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1};", 0, "wgmma bf16"),
    ("tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1;", 0, "tcgen05 f16"),
]
GCN = [
    ("s_load_dwordx16 s[0:15], s[0:1], 0x0", 0, ""),
    ("scratch_load_dwordx4 v[0:3], off, off", 0, ""),
    ("global_load_ushort v1, v[2:3], off", 16, ""),
    ("global_load_short_d16_hi v1, v[2:3], off", 16, ""),
    ("buffer_load_ubyte_d16 v1, v2, s[0:3], 0 offen", 8, ""),
    ("buffer_load_dword v1, s[0:3], 0 offen lds", 32, ""),
    ("global_load_lds_dwordx4 v[0:1], off", 128, ""),
    ("flat_load_dwordx2 v[0:1], v[2:3]", 64, ""),
    ("v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], 0", 0, "mfma f16"),
    ("v_mfma_f32_16x16x16bf16_1k a[0:3], v[0:1], v[2:3], 0", 0, "mfma bf16"),
    ("v_mfma_f32_16x16x4_f32 a[0:3], v0, v1, 0", 0, "mfma f32"),
]
GCN_USAGE = """
    .private_segment_fixed_size: {stack}
    .sgpr_spill_count: {scalars}
    .vgpr_count:     96
    .vgpr_spill_count: {vectors}
"""


def kernel(**code: Any) -> Any:
    metadata = SimpleNamespace(shared=2048, num_warps=4, num_stages=3)
    return SimpleNamespace(metadata=metadata, asm=code)


@pytest.mark.parametrize(("line", "load", "matrix"), PTX)
def test_reading_ptx(line: str, load: int, matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Function k:\n  REG:40 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:408 TEXTURE:0\n"
    done = SimpleNamespace(stdout=usage)
    monkeypatch.setattr(resources, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    got = resources.resources(kernel(ptx=f"\t{line}\n", cubin=b""))
    assert got == Resources(40, 12, 0, 2048, 0, load, matrix, 4, 3)


@pytest.mark.parametrize(("line", "load", "matrix"), GCN)
def test_reading_amdgcn(line: str, load: int, matrix: str) -> None:
    usage = GCN_USAGE.format(stack=0, scalars=0, vectors=0)
    got = resources.resources(kernel(amdgcn=f"\t{line}\n{usage}"))
    assert got == Resources(96, 0, 0, 2048, 0, load, matrix, 4, 3)


@pytest.mark.parametrize(
    ("stack", "scalars", "vectors", "spilled"),
    [(24, 0, 6, 24), (0, 0, 3, 12), (0, 5, 0, 0), (64, 0, 0, 64)],
)
def test_spills_on_gfx942(stack: int, scalars: int, vectors: int, spilled: int) -> None:
    usage = GCN_USAGE.format(stack=stack, scalars=scalars, vectors=vectors)
    got = resources.resources(kernel(amdgcn=usage))
    assert (got.spilled, got.scalars) == (spilled, scalars)
    # Scalars kept in lanes of vector registers never go to memory: told, not wrong.
    assert bool(Row("k", "decode-128k", "gfx942", (got,)).wrong()) == (spilled > 0)


FITS = Resources(40, 0, 0, 163 * 1024, 512, 128, "mma bf16", 4, 3)


def test_what_counts_as_wrong() -> None:
    row = Row("a.kernel", "decode-128k", "sm_80", (FITS,))
    assert row.wrong() == []
    for change, complaint in [
        ({"spilled": 4}, "spills 4 bytes, with 40 registers"),
        ({"shared": 166913}, "takes 166913 bytes of shared memory of 166912"),
        ({"tensor_memory": 544}, "takes 544 columns of tensor memory of 512"),
    ]:
        assert replace(row, launches=(FITS, replace(FITS, **change))).wrong() == [complaint]
    assert replace(row, launches=(), error="why").wrong() == ["why"]
    # Kept in lanes of vector registers, they never go to memory: told, not wrong.
    assert replace(row, launches=(replace(FITS, scalars=4),)).wrong() == []


def test_the_page_has_the_worst_and_every_row() -> None:
    of = [
        Row("a.kernel", "decode-128k", "sm_80", (FITS, replace(FITS, load=16, matrix=""))),
        Row("a.kernel", "paged-16", "sm_80", (replace(FITS, registers=255, spilled=8),)),
        Row("a.kernel", "paged-16", "gfx942", error="why"),
    ]
    text = resources.page(of)
    assert "| a.kernel | sm_80 | 255 | 8 B | 163.0 of 163 KiB | 16–128 | mma bf16 |" in text
    assert "| a.kernel | gfx942 | not compiled |" in text
    assert "40 reg · 163.0 KiB · 16–128 bit · mma bf16 · 4 × 3" in text
    assert cells(text) == {
        ("a.kernel", "decode-128k", "sm_80"): resources.cell(of[0]),
        ("a.kernel", "decode-128k", "gfx942"): "",
        ("a.kernel", "paged-16", "sm_80"): resources.cell(of[1]),
        ("a.kernel", "paged-16", "gfx942"): "does not compile",
    }
    assert "**8 B spilled**" in resources.cell(of[1])
