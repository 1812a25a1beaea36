"""python -m bench.resources: check what the Triton kernels take on GPUs that are not here.

    python -m bench.resources [--target NAME ...] [--case NAME ...] [--quick] [--page PATH]

Every kernel that the planning functions of `tokenselect.kernels.triton` launch for the cases below
is compiled for each target, by Triton itself, with the arguments' types, alignments and values as
a launch would see them. Nothing is run, and no GPU is needed. Exit code 1 if a kernel does not
compile, spills, or takes more registers or memory than the target has. `--page` writes the figures
of every kernel. Compilations are kept in Triton's cache, so a second run takes seconds.
"""

import argparse
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.resources.cases import CASES, problem, shipped
from bench.resources.compiled import KIB, TARGETS, Resources, resources, specialised
from bench.tables import table
from tokenselect import Problem

# What --quick compiles: everything for one GPU of each maker, and for all what takes most.
ONE_OF_EACH = ("sm_90", "gfx942")
LARGEST = (
    *("decode-128k", "mha-80", "fp32-256", "verify-4", "own-votes"),
    *("prefill-128k", "prefill-256", "prefill-fp32", "prefill-split-rotated"),
)

# The launches of a problem on an architecture.
Launches = Callable[[Problem, str], list[Any]]


class Row(NamedTuple):
    """One kernel of one case on one target: the resources of a launch, or why there are none."""

    kernel: str
    case: str
    target: str
    outcome: Resources | str


def examine(cases: Iterable[str], target: str, launches_of: Launches) -> list[Row]:
    """Compile the launches of each case on a target, each distinct kernel once."""
    rows: dict[Row, None] = {}
    known: dict[tuple[str, ...], Resources] = {}
    for case in cases:
        try:
            launches = launches_of(problem(**CASES[case]), target)
        except Exception as error:
            rows[Row("(planning)", case, target, _told(error))] = None
            continue
        for launch in launches:
            stage = launch.kernel.fn.__module__.rpartition(".")[2].partition("_")[0]
            name = f"{stage}.{launch.kernel.fn.__name__.lstrip('_')}"
            outcome = _outcome(launch, target, known, f"{name}, {case}, {target}")
            rows[Row(name, case, target, outcome)] = None
    return list(rows)


def _outcome(
    launch: Any, target: str, known: dict[tuple[str, ...], Resources], label: str
) -> Resources | str:
    """Return the launch's resources, or why it does not compile. Looks in `known` first."""
    try:
        source, options = specialised(launch, target)
        key = (source.hash(), options.hash())
        if key not in known:
            # Before, not after: a compiler that crashes takes this process along.
            print(f"→ {label}", file=sys.stderr, flush=True)
            gpu = TARGETS[target].gpu
            known[key] = resources(triton.compile(source, target=gpu, options=options.__dict__))
    except Exception as error:
        return _told(error)
    return known[key]


def _told(error: BaseException | None) -> str:
    """Return an error as one text, causes included: Triton's outermost names only the line."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {str(error).strip()}")
        error = error.__cause__
    return "\n".join(texts)


def complaints(rows: Iterable[Row]) -> list[str]:
    """Return what is wrong: each thing once per kernel and target, with its cases."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for kernel, case, target, outcome in rows:
        wrong = [outcome] if isinstance(outcome, str) else outcome.excess(TARGETS[target])
        for text in wrong:
            found[kernel, target, text].append(case)
    return [
        f"{kernel} on {target}, {', '.join(cases)}: {textwrap.indent(text, '  ').strip()}"
        for (kernel, target, text), cases in found.items()
    ]


_PAGE = f"""\
# Resources of the Triton kernels

Made by `python -m bench.resources --page PATH` with Triton {triton.__version__}. Nothing here was
run on a GPU, and nothing is a speed. Several launches are shown as ranges. *Registers* are those of
a thread, on gfx942 vector and accumulation registers. *Spilled* are the bytes of a thread's stack,
for registers that did not fit or calls: any is wrong. Scalars that gfx942 keeps in lanes of vector
registers are shown too; they never go to memory. *Shared* memory is that of a block, *TMEM* the
columns of tensor memory. *Load* is the widest load from global memory in bits per thread, at most
128 before sm_100; kernels that read single numbers or unaligned rows have less. *Matrix* is the
matrix instruction and the type of its operands.
"""
_COLUMNS = ("registers", "spilled", "shared", "TMEM", "load", "matrix", "warps × stages")


def page(rows: Sequence[Row]) -> str:
    """Return the figures of every kernel as Markdown."""
    cases = [(name, str(CASES[name])) for name in dict.fromkeys(row.case for row in rows)]
    tables = [
        table(("case", "differs from the defaults in"), cases),
        figures(rows, "kernel", "target"),
        figures(rows, "kernel", "case", "target"),
    ]
    return "\n".join([_PAGE, *("\n".join(lines) + "\n" for lines in tables)])


def figures(rows: Iterable[Row], *by: str) -> list[str]:
    """Return a table of what the rows take, all that agree in `by` on one line."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, name) for name in by)].append(row)
    by_kernel = sorted(groups.items(), key=lambda group: group[0][0])
    return table((*by, *_COLUMNS), [(*key, *_cells(own)) for key, own in by_kernel], is_padded=True)


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return one line's figures, of rows on one target."""
    used = [row.outcome for row in rows if isinstance(row.outcome, Resources)]
    failed = f"{len(rows) - len(used)} not compiled" if len(used) < len(rows) else ""
    if not used:
        return (failed, *[""] * (len(_COLUMNS) - 1))
    limit, scalars = TARGETS[rows[0].target], max(u.scalars for u in used)
    tensor_memory = f"{_range(u.tensor_memory for u in used)} of {limit.tensor_memory}"
    return (
        f"{_range(u.registers for u in used)} {failed}".strip(),
        f"{_range(u.spilled for u in used)} B" + f", {scalars} scalars" * bool(scalars),
        f"{_range(u.shared / KIB for u in used)} of {limit.shared // KIB} KiB",
        tensor_memory if limit.tensor_memory else "",
        _range(u.load for u in used),
        ", ".join(dict.fromkeys(name for u in used for name in u.matrix)),
        ", ".join(dict.fromkeys(f"{u.num_warps} × {u.num_stages}" for u in used)),
    )


def _range(values: Iterable[float]) -> str:
    ends = min(values := list(values)), max(values)
    return "–".join(dict.fromkeys(f"{value:.1f}".removesuffix(".0") for value in ends))


def main(argv: Sequence[str] | None = None, launches_of: Launches = shipped) -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources", description=__doc__.split("\n")[0]
    )
    for name, choices in (("case", CASES), ("target", TARGETS)):
        own: dict[str, Any] = {"choices": choices, "default": list(choices), "metavar": "NAME"}
        parser.add_argument(f"--{name}", nargs="+", **own, help=f"of {', '.join(choices)}")
    quick = f"for others than {' and '.join(ONE_OF_EACH)}, only {', '.join(LARGEST)}"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--page", type=Path, metavar="PATH", help="write all figures there")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled")
    rows = []
    for target in arguments.target:
        is_few = arguments.quick and target not in ONE_OF_EACH
        cases = [case for case in arguments.case if case in LARGEST or not is_few]
        if not cases:
            parser.error(f"--quick leaves no case for {target}; it takes {', '.join(LARGEST)}")
        rows += examine(cases, target, launches_of)
    print("\n".join(figures(rows, "kernel", "target")))
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page(rows), encoding="utf-8")
    found = complaints(rows)
    print("\n".join(f"✗ {line}" for line in found) or "✓ all compile, none spills, all fit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
