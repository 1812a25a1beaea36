"""python -m bench.resources: what the Triton kernels take, compiled for GPUs that are not here.

    python -m bench.resources [--check] [--docs] [--quick] [--target NAME ...] [--problem NAME ...]

Every kernel that the planning functions of `tokenselect.kernels.triton` launch for the problems
below is compiled for each target, by Triton itself, with the arguments' types, alignments and
values as a launch would see them. Nothing is run, and no GPU is needed. `--check` fails if a kernel
does not compile, spills, or takes more memory than the target has; `--docs` writes
docs/resources.md. Compilations are kept in Triton's cache, so a second run takes seconds.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tokenselect import Problem, Rope, SelectConfig
from tokenselect.contract import CacheState, reasons

PAGE = Path(__file__).parent.parent / "docs" / "resources.md"
KIB = 1024
# Columns of tensor memory, on the targets that have it.
_TENSOR_MEMORY = 512


class Target(NamedTuple):
    """One GPU to compile for. shared: bytes of shared memory that one block may take."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


# --- the problems -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call to compile for; letters as everywhere, n is the cache's capacity.

    rotary   None: all of D is rotated, where there is a rope
    layout   "heads": (B, Hkv, n, D) as it is; "tokens": the same, transposed from (B, n, Hkv, D);
             "packed": rows of a key and its value
    offset   the element of their storage where the caches start
    """

    name: str
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    Dv: int | None = None
    n: int = 128 * KIB
    dtype: torch.dtype = torch.bfloat16
    B: int = 1
    Lq: int = 1
    page_size: int | None = None
    layout: str = "heads"
    offset: int = 0
    softcap: float | None = None
    has_sink_logits: bool = False
    cached: str | None = None
    interleaved: bool = False
    rotary: int | None = None
    config: SelectConfig = field(default_factory=SelectConfig)

    def build(self) -> Problem:
        """The problem on the CPU. Its tensors are as large as they say, and never touched."""
        Dv = self.D if self.Dv is None else self.Dv
        tables: dict[str, Any] = {}
        if self.page_size is None:
            shape: tuple[int, ...] = (self.B, self.Hkv, self.n)
        else:
            pages = -(-self.n // self.page_size)
            shape = (self.B * pages, self.page_size, self.Hkv)
            tables["block_table"] = torch.empty(self.B, pages, dtype=torch.int32)
        if self.layout == "packed":
            both = self._empty(*shape, self.D + Dv)
            k_cache, v_cache = both.split([self.D, Dv], dim=-1)
        elif self.layout == "tokens":
            k_cache, v_cache = (
                self._empty(self.B, self.n, self.Hkv, dim).transpose(1, 2) for dim in (self.D, Dv)
            )
        else:
            k_cache, v_cache = (self._empty(*shape, dim) for dim in (self.D, Dv))
        rope = None
        if self.cached is not None:
            inv_freq = torch.ones((self.rotary or self.D) // 2)
            rope = Rope(inv_freq, interleaved=self.interleaved, cached=self.cached)  # type: ignore[arg-type]
        return Problem.build(
            torch.empty(self.B, self.Hq, self.Lq, self.D, dtype=self.dtype),
            k_cache,
            v_cache,
            self.config,
            softcap=self.softcap,
            sink_logits=torch.empty(self.Hq) if self.has_sink_logits else None,
            rope=rope,
            **tables,
        )

    def _empty(self, *shape: int) -> Tensor:
        """Memory that is asked for and never touched takes none."""
        flat = torch.empty(torch.Size(shape).numel() + self.offset, dtype=self.dtype)
        return flat[self.offset :].view(shape)

    def describe(self) -> str:
        text = self.build().describe().replace(" on cpu", "").replace("torch.", "")
        for name in ("softcap", "cached"):
            if getattr(self, name) is not None:
                text += f" {name}={getattr(self, name)!r}"
        if self.has_sink_logits:
            text += " sink_logits"
        if self.interleaved:
            text += " interleaved"
        if self.rotary:
            text += f" rotary_dim={self.rotary}"
        text += {"heads": "", "tokens": " tokens first", "packed": " values beside keys"}[
            self.layout
        ]
        return text + (f" cache at element {self.offset}" if self.offset else "")


_EXTRAPOLATE = SelectConfig.extrapolate
_LONG = 1024 * KIB

CASES = (
    # Decoding, one head dim, group size, dtype and layout after the other.
    Case("decode-128k"),
    Case("decode-1m", n=_LONG),
    Case("decode-batch", B=8, n=32 * KIB, dtype=torch.float16),
    Case("decode-1m-batch", B=2, Hkv=16, n=_LONG),
    Case("decode-fp32", Hq=9, Hkv=3, D=64, n=8 * KIB, dtype=torch.float32),
    Case("mha-80", Hq=32, Hkv=32, D=80, n=32 * KIB, dtype=torch.float16),
    Case("mqa-96", Hq=32, Hkv=1, D=96, n=32 * KIB),
    Case("qwen-128k", Hq=28, Hkv=4),
    Case("softcap-256", Hq=16, Hkv=4, D=256, n=32 * KIB, softcap=50.0),
    Case("fp32-256", Hq=16, Hkv=4, D=256, n=32 * KIB, dtype=torch.float32),
    Case("sinks-64", Hq=64, Hkv=8, D=64, has_sink_logits=True),
    Case("unequal-dims", Hq=16, Hkv=16, D=192, Dv=128, n=32 * KIB),
    Case("tokens-first", B=4, n=32 * KIB, layout="tokens"),
    Case("packed-unaligned", B=2, n=32 * KIB, D=80, layout="packed", offset=1),
    Case("paged-1", B=4, page_size=1),
    Case("paged-16", B=4, page_size=16),
    Case("paged-64-fp16", B=4, page_size=64, dtype=torch.float16),
    Case("verify-4", B=4, Lq=4, page_size=16),
    # Settings of the selection.
    Case("group", config=SelectConfig(scope="group")),
    Case("big-k", config=SelectConfig(k=64 * KIB)),
    Case("own-votes", config=SelectConfig(normalize="candidates", pool=5)),
    # Moved keys.
    Case("split-rotated", cached="rotated", config=_EXTRAPOLATE()),
    Case("split-raw", cached="raw", config=_EXTRAPOLATE()),
    Case(
        *("split-interleaved", 28, 4),
        cached="rotated",
        interleaved=True,
        rotary=64,
        page_size=16,
        config=_EXTRAPOLATE(scope="group"),
    ),
    Case("true-raw-fp32", D=64, n=32 * KIB, cached="raw", dtype=torch.float32),
    # Chunks of queries.
    Case("prefill-128k", Lq=512),
    Case("prefill-fp32", Lq=512, Hq=9, Hkv=3, D=64, n=32 * KIB, dtype=torch.float32),
    Case("prefill-256", Lq=512, Hq=16, Hkv=4, D=256, n=32 * KIB, softcap=50.0),
    Case("prefill-mqa-80", Lq=512, Hkv=1, D=80, n=32 * KIB, dtype=torch.float16),
    Case(
        *("prefill-paged-group",),
        Lq=512,
        B=2,
        page_size=16,
        config=SelectConfig(scope="group", n_query_means=4, pool=5),
    ),
    Case("prefill-means", Lq=512, config=SelectConfig(n_query_means=8)),
    Case("prefill-mqa-means", Hkv=1, Lq=512, config=SelectConfig(n_query_means=2)),
    Case("prefill-split-raw", Lq=512, cached="raw", config=_EXTRAPOLATE()),
    Case("prefill-split-rotated", Lq=512, cached="rotated", config=_EXTRAPOLATE(n_query_means=4)),
)  # fmt: skip
PROBLEMS = {case.name: case for case in CASES}
QUICK = ("decode-128k", "paged-16", "own-votes", "split-raw", "prefill-128k", "prefill-fp32")


# --- from a launch to a compilation -------------------------------------------------------

# The launches of one call, as if on an architecture.
Plan = Callable[[Problem, str], list[Any]]


def shipped(problem: Problem, arch: str) -> list[Any]:
    """All launches of a fresh call and of a plan's step, as the backend would make on `arch`."""
    package = "tokenselect.kernels.triton"
    # The package's own names `score`, `select` and `attend` are the functions.
    reuse, score, select, attend = (
        import_module(f"{package}.{module}") for module in ("reuse", "score", "select", "attend")
    )
    backend = import_module(package).BACKEND
    anywhere = replace(backend, capability=replace(backend.capability, devices=None))
    if refused := reasons(anywhere, problem):
        raise ValueError("the backend takes no such problem: " + "; ".join(refused))
    memory = _memory(problem)
    decision, deciding = reuse.decide_launches(problem, memory, 0.9)
    scores, scoring = score.launches(problem, arch)
    _, planned = score.launches(problem, arch, fills=False)
    selection, selecting = select.launches(scores.votes, problem, arch)
    _, keeping = reuse.update_launches(problem, memory, decision, selection)
    _, attending = attend.launches(problem, selection, arch)
    return [*deciding, *scoring, *planned, *selecting, *keeping, *attending]


def _memory(problem: Problem) -> CacheState:
    """What a SelectionCache would hold of the problem."""
    p = problem
    rows = (p.B,)
    return CacheState(
        query=torch.empty(p.B, p.Hq * p.D),
        positions=torch.empty(p.B, p.S, p.K, dtype=torch.int32),
        count=torch.empty(p.B, p.S, dtype=torch.int32),
        seqlen_at_selection=torch.empty(rows, dtype=torch.int32),
        hits=torch.empty(rows, dtype=torch.int64),
        misses=torch.empty(rows, dtype=torch.int64),
    )


def name_of(kernel: Any) -> str:
    """A kernel's stage and name, whether it is compiled or interpreted."""
    stage = kernel.fn.__module__.rpartition(".")[2].partition("_")[0]
    return f"{stage}.{kernel.fn.__name__.lstrip('_')}"


def specialised(launch: Any, target: str) -> tuple[ASTSource, Any]:
    """What Triton would compile at this launch, and with which options.

    By Triton's own code, up to where it would ask for a device: which integers are 1, which
    arguments are divisible by 16 and which take 64 bits is decided there and differs by version.
    """
    backend = make_backend(TARGETS[target].gpu)
    of_backend = import_module("tokenselect.kernels.triton.launch")
    options = {"debug": False, **of_backend.options(launch, target)}
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.args, **launch.constants, **options)
    with warnings.catch_warnings():
        # Triton 3.9 says on first use that a default will change.
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset")
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, None
        )
    return ASTSource(kernel, signature, constants, attributes), parsed


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    registers      of a thread
    spilled        bytes of a thread's stack
    scalars        scalar registers that gfx942 keeps in lanes of vector registers
    shared         bytes of a block's shared memory
    tensor_memory  columns
    load           bits of the widest load from global memory, 0 without one
    matrix         the matrix instructions and their operand's type, "" without one
    """

    registers: int
    spilled: int
    scalars: int
    shared: int
    tensor_memory: int
    load: int
    matrix: str
    num_warps: int
    num_stages: int


_PTX_LOAD = re.compile(r"\bld(?:\.\w+)*\.global(?:(?:\.|::)\w+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(0x[\da-f]+|\d+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\b[^;]*\.global\b")
_PTX_MATRIX = (
    ("mma", re.compile(r"(?<![.\w])mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col\.\w+\.(\w+)\.")),
    ("wgmma", re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)\.")),
    ("tcgen05", re.compile(r"\btcgen05\.mma\.[\w.:]*?kind::(\w+)")),
)
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?([a-wyz]+)(?:x(\d))?")
_GCN_BITS = {"dword": 32, "short": 16, "ushort": 16, "sshort": 16, "ubyte": 8, "sbyte": 8}
_GCN_MATRIX = (("mfma", re.compile(r"\bv_mfma_\w*?x\d+x\d+_?([a-z]+\d+)")),)
# A bulk copy moves 16 bytes at a time at least.
_BULK_BITS = 128


def resources(compiled: Any) -> Resources:
    """Read what the compiled kernel takes out of its code."""
    metadata = compiled.metadata
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
        scalars = 0
        loads = [int(bits) * int(lanes or 1) for lanes, bits in _PTX_LOAD.findall(text)]
        loads += [8 * int(size, 0) for size in _PTX_COPY.findall(text)]
        loads += [_BULK_BITS] * bool(_PTX_BULK.search(text))
        found = _matrix(text, _PTX_MATRIX)
    else:
        text = compiled.asm["amdgcn"]
        registers, scalars = _gcn(text, "vgpr_count"), _gcn(text, "sgpr_spill_count")
        # Those spilled into accumulation registers take no stack; they count as 4 bytes all the
        # same.
        stack = _gcn(text, "private_segment_fixed_size")
        spilled = max(stack, 4 * _gcn(text, "vgpr_spill_count"))
        loads = [_GCN_BITS[kind] * int(n or 1) for kind, n in _GCN_LOAD.findall(text)]
        found = _matrix(text, _GCN_MATRIX)
    return Resources(
        registers=registers,
        spilled=spilled,
        scalars=scalars,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        load=max(loads, default=0),
        matrix=found,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
    )


def _matrix(text: str, kinds: Iterable[tuple[str, re.Pattern[str]]]) -> str:
    names = [f"{kind} {dtype}" for kind, use in kinds for dtype in use.findall(text)]
    return ", ".join(dict.fromkeys(names))


def _gcn(text: str, name: str) -> int:
    (value,) = re.findall(rf"^\s*\.{name}:\s*(\d+)$", text, re.MULTILINE)
    return int(value)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory: what does not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(tool, capture_output=True, text=True, check=True)
    ((registers, stack, local),) = re.findall(
        r"\bREG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout
    )
    return int(registers), int(stack) + int(local)


# --- all of them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel of one problem on one target: the resources of its launches, or why not."""

    kernel: str
    problem: str
    target: str
    launches: tuple[Resources, ...] = ()
    error: str = ""

    def wrong(self) -> list[str]:
        """What a launch of it would fail on, or be slow by."""
        if self.error:
            return [self.error]
        found, limit = [], TARGETS[self.target].shared
        for used in self.launches:
            if used.spilled:
                found.append(f"spills {used.spilled} bytes, with {used.registers} registers")
            if used.shared > limit:
                found.append(f"takes {used.shared} bytes of shared memory of {limit}")
            if used.tensor_memory > _TENSOR_MEMORY:
                found.append(
                    f"takes {used.tensor_memory} columns of tensor memory of {_TENSOR_MEMORY}"
                )
        return list(dict.fromkeys(found))


def examine(
    problems: Sequence[str] = tuple(PROBLEMS),
    targets: Sequence[str] = tuple(TARGETS),
    plan: Plan = shipped,
) -> list[Row]:
    """Compile what `plan` launches for each problem on each target, each distinct kernel once."""
    rows: list[Row] = []
    known: dict[tuple[str, ...], Resources | str] = {}
    for problem_name in problems:
        problem = PROBLEMS[problem_name].build()
        for target in targets:
            row = partial(Row, problem=problem_name, target=target)
            try:
                launches = plan(problem, target)
            except Exception as error:
                rows.append(row("(planning)", error=_told(error)))
                continue
            by_kernel: dict[str, list[Resources | str]] = {}
            for launch in launches:
                name = name_of(launch.kernel)
                by_kernel.setdefault(name, []).append(
                    _outcome(launch, target, known, f"{name}, {problem_name}, {target}")
                )
            for name, outcomes in by_kernel.items():
                errors = dict.fromkeys(o for o in outcomes if isinstance(o, str))
                used = dict.fromkeys(o for o in outcomes if isinstance(o, Resources))
                rows.append(row(name, launches=tuple(used), error="\n".join(errors)))
    return rows


def _outcome(
    launch: Any, target: str, known: dict[tuple[str, ...], Resources | str], label: str
) -> Resources | str:
    """The launch's resources, or why it does not compile. Looks in `known` first."""
    try:
        source, options = specialised(launch, target)
    except Exception as error:
        return _told(error)
    key = (target, source.hash(), options.hash())
    if key not in known:
        # Before, not after: a compiler that crashes takes this process along.
        _progress(label)
        try:
            gpu = TARGETS[target].gpu
            compiled = triton.compile(source, target=gpu, options=options.__dict__)
        except Exception as error:
            known[key] = _told(error)
        else:
            known[key] = resources(compiled)
    return known[key]


def _told(error: BaseException) -> str:
    """An error as one text; of a chain, the causes too: Triton's outermost names only the line."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {str(error).strip()}")
        error = error.__cause__  # type: ignore[assignment]
    return "\n".join(texts)


# --- the page -----------------------------------------------------------------------------

_HEAD = """\
# Resources of the Triton kernels

Made by `python -m bench.resources --docs`, with Triton {version}. The compilers in Triton's package
compiled every kernel for each target, with the arguments that a launch would pass. Nothing on this
page was run on a GPU, and nothing here is a speed.

- *Registers* are those of a thread (on gfx942 vector registers, accumulation registers included).
- *Spilled* are the bytes of a thread's stack: registers that did not fit, or calls. Any is wrong.
  Scalar registers that gfx942 keeps in lanes of vector ones are shown too; they never go to memory.
- *Shared* is the shared memory (LDS) of a block, against the most that one block may take.
- *Load* is the widest load from global memory, in bits a thread: of one launch, and from the least
  to the largest over the launches. 128 is the widest there is before sm_100; kernels that
  read single numbers or rows that are not aligned have less.
- *Matrix* is the matrix instruction and the type of its operands.

`python -m bench.resources --check` fails on any spill, on shared memory over the limit, and on
anything that does not compile.
"""
_SUMMARY = ("kernel", "target", "registers", "spilled", "shared", "load", "matrix")


def page(rows: Sequence[Row]) -> str:
    """The whole page as Markdown."""
    problems = dict.fromkeys(row.problem for row in rows)
    targets = list(dict.fromkeys(row.target for row in rows))
    lines = [_HEAD.format(version=triton.__version__), "## Worst cases\n", *_table(*summary(rows))]
    lines.append(
        "\n## Problems\n\nWhat is compiled for. "
        "Settings that are not named are those of `tokenselect.attention`.\n"
    )
    described = [(name, PROBLEMS[name].describe()) for name in problems]
    lines += _table(("problem", "is"), described)
    lines.append(
        "\n## Every kernel, every problem\n\nRegisters, shared memory, widest load, matrix "
        "instruction, warps × stages; several launches as ranges."
    )
    for kernel, own in _by_kernel(rows).items():
        lines.append(f"\n### {kernel}\n")
        cells = {(row.problem, row.target): cell(row) for row in own}
        lines += _table(
            ("problem", *targets),
            [
                (problem, *(cells.get((problem, target), "") for target in targets))
                for problem in dict.fromkeys(row.problem for row in own)
            ],
        )
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the lines of the first table: the worst of each kernel on each target."""
    lines = []
    for kernel, own in _by_kernel(rows).items():
        for target in dict.fromkeys(row.target for row in own):
            these = [row for row in own if row.target == target]
            used = [launch for row in these for launch in row.launches]
            limit = TARGETS[target].shared // KIB
            failed = sum(bool(row.error) for row in these)
            if not used:
                lines.append((kernel, target, *["not compiled"] * (len(_SUMMARY) - 2)))
                continue
            lines.append(
                (
                    kernel,
                    target,
                    str(max(u.registers for u in used)) + (f" ({failed} failed)" if failed else ""),
                    _spills(used),
                    f"{max(u.shared for u in used) / KIB:.1f} of {limit} KiB",
                    _range([u.load for u in used]),
                    _names(u.matrix for u in used),
                )
            )
    return _SUMMARY, lines


def cell(row: Row) -> str:
    """One row as a cell of the full tables."""
    if row.error:
        return "does not compile"
    used = row.launches
    parts = [
        f"{_range([u.registers for u in used])} reg",
        f"{_range([u.shared / KIB for u in used], '.1f')} KiB",
        f"{_range([u.load for u in used])} bit",
        _names(u.matrix for u in used),
        ", ".join(dict.fromkeys(f"{u.num_warps} × {u.num_stages}" for u in used)),
    ]
    if (spills := _spills(used)) != "0":
        parts.insert(1, f"**{spills} spilled**")
    return " · ".join(part for part in parts if part)


def _spills(used: Sequence[Resources]) -> str:
    """The most bytes, and the most scalar registers; "0" for none."""
    most, scalars = max(u.spilled for u in used), max(u.scalars for u in used)
    parts = [f"{most} B"] * bool(most) + [f"{scalars} scalars"] * bool(scalars)
    return ", ".join(parts) or "0"


def _by_kernel(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.kernel, []).append(row)
    return found


def _range(values: Sequence[float], form: str = "") -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _names(several: Iterable[str]) -> str:
    names = (name for text in several for name in text.split(", ") if name)
    return ", ".join(dict.fromkeys(names))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


# --- the command --------------------------------------------------------------------------


def _progress(text: str) -> None:
    print(f"→ {text}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel falls short")
    parser.add_argument("--docs", action="store_true", help="write docs/resources.md")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    for name, choices in (("problem", PROBLEMS), ("target", TARGETS)):
        parser.add_argument(
            f"--{name}",
            action="append",
            choices=choices,
            metavar="NAME",
            help=f"one of {', '.join(choices)}; may be given more than once",
        )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled")
    if arguments.docs and (arguments.quick or arguments.problem or arguments.target):
        parser.error("--docs takes every problem and every target")
    if arguments.quick:
        arguments.problem = arguments.problem or QUICK
    arguments.problem = arguments.problem or list(PROBLEMS)
    arguments.target = arguments.target or list(TARGETS)
    return arguments


def main(argv: Sequence[str] | None = None, plan: Plan = shipped) -> int:
    arguments = _arguments(argv)
    rows = examine(arguments.problem, arguments.target, plan)
    widths = [max(map(len, column)) for column in zip(*_printed(rows), strict=True)]
    for line in _printed(rows):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.docs:
        PAGE.write_text(page(rows), encoding="utf-8")
        _progress(f"wrote {PAGE}")
    for line in complaints(rows):
        print(f"✗ {line}")
    is_wrong = any(row.wrong() for row in rows)
    if not is_wrong:
        print("✓ all of them compile, none spills, all fit")
    return 1 if arguments.check and is_wrong else 0


def complaints(rows: Iterable[Row]) -> list[str]:
    """What is wrong, each thing once: the kernel, the problems and targets, and what it is."""
    where: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for text in row.wrong():
            of = where.setdefault((row.kernel, text), {})
            of.setdefault(row.problem, []).append(row.target)
    lines = []
    for (kernel, text), of in where.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for problem, targets in of.items():
            alike.setdefault(tuple(targets), []).append(problem)
        for targets_, problems in alike.items():
            place = f"{', '.join(problems)} on {', '.join(targets_)}"
            lines.append(f"{kernel}, {place}: {textwrap.indent(text, '  ').strip()}")
    return lines


def _printed(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    head, lines = summary(rows)
    return [head, *lines]


if __name__ == "__main__":
    sys.exit(main())
