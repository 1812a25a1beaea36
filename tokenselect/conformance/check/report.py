"""The command: versions, backends, and a line for each kind of problem."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from tokenselect.conformance.check.judge import judge
from tokenselect.conformance.check.kinds import INTERPRETED, KINDS, draw
from tokenselect.conformance.devices import device_of, on
from tokenselect.contract import Backend, Capability, listed, reasons
from tokenselect.dispatch import registry


def versions() -> Iterator[tuple[str, str]]:
    """Return the names and versions of what the results depend on."""
    yield "tokenselect", _version("tokenselect")
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", _version("triton")
    yield "platform", platform.platform()
    yield "cpu", f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", torch.cuda.get_device_name(i)
    if not torch.cuda.is_available():
        yield "cuda", "no device: triton is interpreted, on few problems; --thorough takes minutes"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def capability(backend: Backend) -> str:
    """Say what a backend takes, in one line."""
    limits = []
    for field in fields(Capability):
        value = getattr(backend.capability, field.name)
        if value is not None and not isinstance(value, bool):
            limits.append(f"{field.name} {listed(value)}".replace("torch.", ""))
    limits += [f"borrows from {lender.name}" for lender in backend.lenders]
    limits.append("can be planned" if backend.static else "cannot be planned")
    if not backend.capability.deterministic:
        limits.append("not deterministic")
    return "; ".join(limits)


def is_interpreted(backend: Backend) -> bool:
    """Say whether Triton's interpreter runs the backend's kernels, as it does without a GPU."""
    uses_triton = "triton" in (backend.name, *(lender.name for lender in backend.lenders))
    return uses_triton and device_of(backend) == "cpu"


def where(backend: Backend) -> str:
    """Name the device."""
    return device_of(backend) + (", interpreted" if is_interpreted(backend) else "")


def loaded(asked: str) -> Backend | str:
    """Return the backend of that name, or at package.module:ATTRIBUTE; or why it is absent."""
    try:
        backend = registry.load(registry.named(asked))
    except Exception as error:  # a backend's import may raise anything; the report says what
        return f"{type(error).__name__}: {error}"
    return backend.unavailable or backend


class Tally(NamedTuple):
    """How many problems a backend ran, and how many of them it got wrong."""

    ran: int
    failed: int


def check(
    backend: Backend, seeds: range, say: Callable[[str], None], *, thorough: bool = False
) -> Tally:
    """Hold one backend to the rules on every kind of problem that it gets; a line each."""
    device = device_of(backend)
    ran = failed = 0
    few = is_interpreted(backend) and not thorough
    kinds = [kind for kind in KINDS if kind in INTERPRETED or not few]
    refused = {kind: reasons(backend, on(device, draw(kind, seeds[0]))) for kind in kinds}
    shared = set.intersection(*(set(whys) for whys in refused.values())) if refused else ()
    if shared:
        say(f"  {f'all {len(kinds)} kinds':<28}not supported: {'; '.join(sorted(shared))}")
        return Tally(0, 0)
    for kind in kinds:
        if refused[kind]:
            say(f"  {kind:<28}not supported: {'; '.join(refused[kind])}")
            continue
        outcomes = [judge(backend.name, kind, seed, device) for seed in seeds]
        wrong = [outcome for outcome in outcomes if not outcome.finding.holds]
        ran += len(outcomes)
        failed += len(wrong)
        worst = max(outcomes, key=lambda outcome: outcome.finding.share)
        stage, finding = worst
        if wrong:
            say(f"  {kind:<28}FAILED  {finding.share:7.3g}  {stage}: {finding.where}")
        else:
            say(f"  {kind:<28}ok      {finding.share:7.3f}  {stage}")
    if few:
        say(f"  {f'{len(KINDS) - len(kinds)} other kinds':<28}not tried: pass --thorough")
    return Tally(ran, failed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread inside: the problems are small, threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenselect.check",
        description="What this machine can run, and whether it is right.",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="check this one only: a registered name, or package.module:ATTRIBUTE; may be repeated",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="all kinds of problem for an interpreted backend too; all threads",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (0)")
    parser.add_argument(
        "--problems", type=int, default=1, metavar="N", help="problems of each kind (1)"
    )
    options = parser.parse_args(arguments)
    if options.problems < 1:
        parser.error("--problems is at least 1")
    if not torch.cuda.is_available():
        # To be set before triton is imported; it then computes the same on the CPU, slowly.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for label, value in versions():
        print(f"{label:<12}{value}")

    print("\nbackends")
    available: list[Backend] = []
    missing: list[str] = []
    for name in registry.backends() if options.backend is None else dict.fromkeys(options.backend):
        backend = loaded(name)
        if isinstance(backend, str):
            missing.append(name)
            why = backend.replace("\n", "\n" + 14 * " ")
            print(f"  {name:<11} not available: {why}")
        else:
            available.append(backend)
            how = ", interpreted, for this check" if is_interpreted(backend) else ""
            print(f"  {name:<11} available{how}: {capability(backend)}")

    seeds = range(options.seed, options.seed + options.problems)
    tallies: dict[str, Tally] = {}
    for backend in available:
        print(f"\n{backend.name} on {where(backend)}: worst error as a share of its tolerance")
        with nullcontext() if options.thorough else _one_thread():
            tallies[backend.name] = check(
                backend,
                seeds,
                lambda line: print(line, flush=True),
                thorough=options.thorough,
            )

    print()
    wrong = [f"{name} fails {tally.failed} of {tally.ran}" for name, tally in tallies.items()
             if tally.failed]  # fmt: skip
    idle = [name for name, tally in tallies.items() if not tally.ran]
    if options.backend is not None:
        wrong += [f"{name} is not available" for name in missing]
        wrong += [f"{name} can run none of the problems here" for name in idle]
    elif len(idle) == len(tallies):
        wrong.append("no backend ran")
    if wrong:
        print(f"WRONG: {'; '.join(wrong)} (seeds {seeds[0]} to {seeds[-1]})")
        return 1
    right = [f"{name} {tally.ran} problems" for name, tally in tallies.items() if tally.ran]
    print(f"all right: {', '.join(right)}")
    return 0
