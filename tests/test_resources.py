"""The check of what the Triton kernels take when they are compiled: its figures and its limits."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from bench.resources import compiled  # noqa: E402  # it needs triton
from bench.resources.__main__ import LARGEST, ONE_OF_EACH  # noqa: E402
from bench.resources.cases import CASES, problem, shipped  # noqa: E402
from bench.resources.compiled import TARGETS, Resources  # noqa: E402
from tests import fresh  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_cases_cover_what_the_backend_takes_and_can_be_planned() -> None:
    problems = [problem(**case) for case in CASES.values()]

    def covered(value: Any) -> set[Any]:
        return {value(p) for p in problems}

    assert covered(lambda p: str(p.q.dtype)[6:]) == {"bfloat16", "float16", "float32"}
    assert covered(lambda p: p.D) >= {64, 80, 96, 128, 256}
    assert covered(lambda p: p.G) >= {1, 4, 7, 32}
    assert covered(lambda p: p.Lq) >= {1, 4, 512}
    assert covered(lambda p: p.page_size) >= {1, 16, 64}
    assert covered(lambda p: p.rope and p.rope.cached) == {None, "rotated", "raw"}
    for has in ("softcap", "sink_logits", "rope"):
        assert len(covered(lambda p, has=has: getattr(p, has) is None)) == 2, has
    assert covered(lambda p: p.rope is not None and p.rope.interleaved) == {False, True}
    for name in ("scope", "normalize", "positions", "n_query_means", "pool"):
        assert len(covered(lambda p, name=name: p.config[name])) > 1, name
    for p in problems:
        assert all(shipped(p, target) for target in TARGETS)


PLANTED = """
import json, sys
import torch, triton
import triton.language as tl
from bench.resources.__main__ import main
from bench.resources.cases import problem
from bench.resources.compiled import specialised
from tokenselect.kernels.triton.launch import Launch

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

def launches_of(problem, arch):
    if problem.is_paged:
        raise ValueError("no plan for pages")
    x = torch.empty(64, dtype=torch.bfloat16)
    numbers = {"n": 32, "one": 1, "many": 2**31, "scale": 0.5}
    well = Launch(_well, (1,), {"x": x, "odd": x[1:], **numbers}, {"BLOCK": 512}, 4, 1)
    spills = Launch(_spills, (1,), {"x": x}, {"BLOCK": 2**14}, 1, 1)
    # Many stages compile for minutes on gfx942, and few are enough there.
    large = Launch(_large, (1,), {"x": x, "n": 32}, {"SIDE": 128}, 8, 10 if arch == "sm_90" else 3)
    broken = Launch(_broken, (1,), {"x": x}, {"BLOCK": 512}, 4, 1)
    return [well, well._replace(grid=(2,)), *[spills] * (arch == "sm_90"), large, broken]

for target in ("sm_90", "gfx942"):
    source, _ = specialised(launches_of(problem(), target)[0], target)
    names = list(source.signature)
    attributes = {names[i]: [name for name, _ in own] for (i,), own in source.attrs.items() if own}
    constants = {names[i]: value for (i,), value in source.constants.items()}
    print(json.dumps([source.signature, constants, attributes]))
sys.exit(main(sys.argv[1:], launches_of))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The check of planted kernels, in a process where kernels are compiled; and its page."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    asked = "--target sm_90 gfx942 --case decode-128k decode-1m paged-16 --page page.md"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import planted", *asked.split()],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(fresh.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=fresh.HANG,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done, (folder / "page.md").read_text()


def test_planted_mistakes_are_found_and_fail_the_check(planted: tuple[Any, str]) -> None:
    told, both = planted[0].stdout, "decode-128k, decode-1m"
    assert "NameError('not_a_name is not defined')" in told
    found = [line for line in told.splitlines() if line.startswith("✗")]
    wanted = [rf"planted.spills on sm_90, {both}: spills [1-9]\d* bytes, with 255 registers"]
    for target in ("sm_90", "gfx942"):
        shared = rf"takes \d{{6}} bytes of shared memory of {TARGETS[target].shared}"
        wanted += [
            rf"planted.large on {target}, {both}: {shared}",
            rf"planted.broken on {target}, {both}: CompilationError.*",
            rf"\(planning\) on {target}, paged-16: ValueError: no plan for pages",
        ]
    assert len(found) == len(wanted)
    for pattern in wanted:
        assert any(re.fullmatch(f"✗ {pattern}", line) for line in found), pattern


def test_the_page_has_the_figures_of_each_launch(planted: tuple[Any, str]) -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in planted[1].splitlines()]
    page = {tuple(line[:3]): line[3:] for line in lines if len(line) == 10}
    for target, matrix, limit, warps in (
        ("sm_90", "wgmma bf16", 227, "8 × 10"),
        ("gfx942", "mfma bf16", 64, "8 × 3"),
    ):
        large = page["planted.large", "decode-128k", target]
        assert re.fullmatch(rf"\d{{2,3}} of {limit} KiB", large[2])
        assert large[3:] == ["", "128", matrix, warps]
        well = page["planted.well", "decode-128k", target]
        assert int(well[0]) > 0
        assert well[1:] == ["0 B", f"1 of {limit} KiB", "", well[4], "", "4 × 1"]
        assert page["planted.broken", "decode-128k", target][0] == "1 not compiled"
    spills = page["planted.spills", "decode-128k", "sm_90"]
    assert re.fullmatch(r"[1-9]\d* B", spills[1])


def test_arguments_are_specialised_as_a_launch_would(planted: tuple[Any, str]) -> None:
    lines = planted[0].stdout.splitlines()
    for target, line in (("sm_90", lines[0]), ("gfx942", lines[1])):
        signature, constants, attributes = json.loads(line)
        types = "*bf16 *bf16 i32 constexpr i64 fp32 constexpr constexpr"
        assert list(signature.values()) == types.split()
        assert constants == {"one": 1, "BLOCK": 512, "PDL": target == "sm_90"}
        near = ["tt.pointer_range"] * (target == "gfx942")
        wanted = {"x": ["tt.divisibility", *near], "odd": near, "n": ["tt.divisibility"]}
        wanted |= {"many": ["tt.divisibility"]}
        assert attributes == {name: own for name, own in wanted.items() if own}


# What the compilers write, and the widest load and the matrix instructions in it.
PTX = [
    ("ld.param.b64 %rd1, [k_param_0];", 0),
    ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [ %r5 + 0 ];", 0),
    ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 16),
    ("ld.global.nc.L1::evict_last.v2.b32 {%r1, %r2}, [ %rd1 ];", 64),
    ("ld.relaxed.gpu.global.b32 %r1, [%rd1];", 32),
    ("ld.global.v8.b32 {%r1}, [ %rd1 + 0 ];", 256),
    ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128),
    ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;", 32),
    ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1];", 128),
    ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1};", 0, "mma tf32"),
    ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1};", 0, "wgmma bf16"),
    ("tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1;", 0, "tcgen05 f16"),
]
GCN = [
    ("s_load_dwordx16 s[0:15], s[0:1], 0x0", 0),
    ("scratch_load_dwordx4 v[0:3], off, off", 0),
    ("global_load_ushort v1, v[2:3], off", 16),
    ("global_load_short_d16_hi v1, v[2:3], off", 16),
    ("buffer_load_ubyte_d16 v1, v2, s[0:3], 0 offen", 8),
    ("buffer_load_dword v1, s[0:3], 0 offen lds", 32),
    ("global_load_lds_dwordx4 v[0:1], off", 128),
    ("flat_load_dwordx2 v[0:1], v[2:3]", 64),
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


def read(**code: Any) -> Resources:
    metadata = SimpleNamespace(shared=2048, num_warps=4, num_stages=3)
    return compiled.resources(SimpleNamespace(metadata=metadata, asm=code))


def test_reading_what_compilers_write(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Function k:\n  REG:40 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:408 TEXTURE:0\n"
    done = SimpleNamespace(stdout=usage)
    monkeypatch.setattr(compiled, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    for line, load, *matrix in PTX:
        got = read(ptx=f"\t{line}\n", cubin=b"")
        assert got == Resources(40, 12, 0, 2048, 0, load, tuple(matrix), 4, 3), line
    for line, load, *matrix in GCN:
        got = read(amdgcn=f"\t{line}\n{GCN_USAGE.format(stack=0, scalars=0, vectors=0)}")
        assert got == Resources(96, 0, 0, 2048, 0, load, tuple(matrix), 4, 3), line
    for stack, scalars, vectors, spilled in ((24, 0, 6, 24), (0, 0, 3, 12), (0, 5, 0, 0)):
        got = read(amdgcn=GCN_USAGE.format(stack=stack, scalars=scalars, vectors=vectors))
        assert (got.spilled, got.scalars) == (spilled, scalars)


def test_what_is_held_to_a_limit() -> None:
    fits = Resources(240, 0, 0, 163 * 1024, 0, 128, (), num_warps=8, num_stages=3)
    sm_80, sm_100 = TARGETS["sm_80"], TARGETS["sm_100"]
    # Scalars kept in lanes of vector registers never go to memory.
    for good, target in ((fits, sm_80), (replace(fits, scalars=4, tensor_memory=512), sm_100)):
        assert good.excess(target) == []
    for change, complaint in [
        ({"spilled": 4}, "spills 4 bytes, with 240 registers"),
        ({"num_warps": 16}, "takes 122880 registers of 65536"),
        ({"shared": 166913}, "takes 166913 bytes of shared memory of 166912"),
        ({"tensor_memory": 32}, "takes 32 columns of tensor memory of 0"),
    ]:
        assert replace(fits, **change).excess(sm_80) == [complaint]
    assert replace(fits, tensor_memory=544).excess(sm_100) == [
        "takes 544 columns of tensor memory of 512"
    ]


def test_a_quick_run_names_what_there_is() -> None:
    assert set(LARGEST) <= CASES.keys()
    assert set(ONE_OF_EACH) <= TARGETS.keys()
