"""What only the triton backend promises, and mistakes planted in its very source.

On a GPU it runs there, else in Triton's interpreter (see conftest.py). The laws of every backend
hold for it in test_laws.py.
"""

import ast
import contextlib
import faulthandler
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from properties import (
    fenced,
    mutants,
    test_triton_reuse,
    witnesses,
)
from properties.backends import chosen
from properties.guard import run_twice
from properties.interpreter import overflow_checked
from properties.laws import LAWS
from properties.test_planted import SEARCH, catcher, laws_by_stage
from tokenselect import Backend, Problem, SelectConfig, Selection
from tokenselect.conformance.devices import device_of, for_the_cpu, on
from tokenselect.conformance.laws.law import SHARES, Law, able
from tokenselect.conformance.laws.metamorphic import same
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.problems import Case
from tokenselect.dispatch.registry import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _triton_is_chosen(pytestconfig: pytest.Config) -> None:
    if "triton" not in chosen(pytestconfig):
        everything = not pytestconfig.getoption("--backend")
        assert not (everything and sys.platform == "linux"), "triton has to be tried on Linux"
        pytest.skip("this run is not about triton")


@pytest.fixture
def triton() -> Backend:
    return for_the_cpu(load("triton"))


def stages(backend: Backend, problem: Problem) -> dict[str, Tensor]:
    """Every result of every stage, each on what the one before it gave."""
    votes, lse = backend.score(problem)
    selection = backend.select(votes, problem)
    attended = backend.attend(problem, selection)
    named = {"votes": votes, "lse of scores": lse, **selection._asdict()}
    return named | {"out": attended.out, "lse": attended.lse}


# --- the same bits, whoever shares the work -------------------------------------------------


def alone(problem: Problem, b: int) -> Problem:
    one = slice(b, b + 1)
    return replace(
        problem,
        q=problem.q[one],
        cache_seqlens=problem.cache_seqlens[one],
        k_cache=problem.k_cache if problem.is_paged else problem.k_cache[one],
        v_cache=problem.v_cache if problem.is_paged else problem.v_cache[one],
        block_table=problem.block_table[one] if problem.is_paged else None,
    )


def a_request_alone_gets_the_same_bits(backend: Backend, case: Case) -> None:
    problem = able(backend, case.problem())
    together = stages(backend, problem)
    for b in range(problem.B):
        for name, result in stages(backend, alone(problem, b)).items():
            same(backend, f"{name} of request {b}", together[name][b : b + 1], result)


def the_size_of_the_grid_changes_no_bit(backend: Backend, case: Case) -> None:
    """One program for all tiles of a request, or as many as there are segments."""
    from tokenselect.kernels.triton import configs

    problem = able(backend, case.problem())
    results = []
    for many in (1, 3, 1000):
        sizes = {name: c._replace(multiprocessors=many) for name, c in configs.TABLE.items()}
        with mock.patch.dict(configs.TABLE, sizes):
            results.append(stages(backend, problem))
    for others in results[1:]:
        for name, result in others.items():
            same(backend, name, results[0][name], result)


LONG = Case(lengths=(150, 0, 90), G=3, config=SelectConfig(k=40, n_sink=2, n_local=4))
MANY = (
    LONG,
    replace(LONG, Lq=5, page_size=16, dtype=torch.float16),
    replace(LONG, rope="rotated", config=SelectConfig.extrapolate(k=40, n_sink=2, n_local=4)),
)


def what_was_in_memory_changes_no_bit(backend: Backend, case: Case) -> None:
    from tokenselect.kernels.triton import BACKEND, launch

    problem = on(device_of(BACKEND), able(backend, case.problem()))
    votes, _ = run_twice(launch, BACKEND.score, problem)
    selection = run_twice(launch, BACKEND.select, votes, problem)
    run_twice(launch, BACKEND.attend, problem, selection)


@pytest.mark.slow
@pytest.mark.parametrize(
    "holds",
    [
        a_request_alone_gets_the_same_bits,
        the_size_of_the_grid_changes_no_bit,
        what_was_in_memory_changes_no_bit,
    ],
    ids=lambda holds: holds.__name__,
)
def test_same_bits(triton: Backend, holds: Callable[[Backend, Case], None]) -> None:
    Law(holds.__name__, holds, cases(), MANY).check(triton)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "select", "attend"])
def test_the_sizes_of_a_gpu_are_right_too(triton: Backend, stage: str) -> None:
    """Its tiles hold all of a small problem, and the interpreter's are small: both are tried."""
    from tokenselect.kernels.triton import configs, launch

    if not launch.INTERPRETED:
        pytest.skip("here all laws are tried at the sizes of a GPU")
    largest = configs.TABLE["sm_90"]._replace(float32="ieee", dependent_launch=False)
    search = settings(SEARCH, max_examples=200, phases=[Phase.generate])
    with mock.patch.dict(configs.TABLE, interpreter=largest):
        for law in laws_by_stage(stage)[:2]:
            law.check(triton, search)


def test_frequencies_changed_in_place_are_not_remembered(triton: Backend) -> None:
    """Tables of angles are kept with the tensor that they were made of."""
    from tokenselect.kernels.triton import BACKEND

    config = SelectConfig.extrapolate(k=4, n_sink=2, n_local=4)
    problem = on(device_of(BACKEND), Case((60,), D=32, Dv=32, rope="raw", config=config).problem())
    stages(BACKEND, problem)
    problem.rope.inv_freq.mul_(0.5)
    fresh = replace(problem, rope=replace(problem.rope, inv_freq=problem.rope.inv_freq.clone()))
    expected = stages(BACKEND, fresh)
    for name, result in stages(BACKEND, problem).items():
        same(BACKEND, name, expected[name], result)


def test_every_kernel_waits_for_the_one_before_it() -> None:
    """With programmatic dependent launch, nothing may be loaded or stored before; see `PDL`."""
    from tokenselect.kernels import triton as package

    waiting, too_late, called = set(), set(), set()
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Launch":
                called.add(ast.unparse(node.args[0]))
            if isinstance(node, ast.FunctionDef) and "PDL" in [arg.arg for arg in node.args.args]:
                first = node.body[bool(ast.get_docstring(node))]
                if ast.unparse(first) == "wait_for_previous(PDL)":
                    waiting.add(f"{path.stem}.{node.name}")
                else:
                    too_late.add(f"{path.stem}.{node.name}")
    assert too_late <= {"device.wait_for_previous"}
    named = {name for name in called if "." in name}
    assert len(named) > 10
    assert named <= waiting


def test_a_scale_may_be_as_large_as_a_float32() -> None:
    """Zeros times it are zeros; times log2(e) it is beyond float32."""
    from tokenselect.kernels.triton import BACKEND

    caches = torch.ones(2, 1, 1, 40, 32)
    problem = Problem.build(torch.zeros(1, 1, 1, 32), *caches, SelectConfig(k=4), scale=3e38)
    attended = stages(BACKEND, on(device_of(BACKEND), problem))
    assert (attended["out"] == 1).all()
    assert attended["lse"].isfinite().all()


def test_a_selection_may_have_no_places() -> None:
    from tokenselect.kernels.triton import BACKEND

    device = device_of(BACKEND)
    problem = on(device, replace(Case((60,), D=32, Dv=32)).problem())
    selection = Selection(
        torch.empty(problem.B, problem.S, 0, dtype=torch.int32, device=device),
        torch.zeros(problem.B, problem.S, dtype=torch.int32, device=device),
    )
    out, lse = load("triton").attend(problem, selection)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# --- addresses --------------------------------------------------------------------------------

FAR = 2**31  # elements

# name: the case, and the strides of both caches; in between lies memory that is never touched
SPREAD = {
    "heads": (Case((60,), D=32, Dv=32), lambda s: (s[0], FAR + 64, *s[2:])),
    "requests": (Case((60, 50), D=32, Dv=32), lambda s: (FAR + 64, *s[1:])),
    "tokens": (Case((60,), D=32, Dv=32, Hkv=1), lambda s: (s[0], s[1], FAR // 40, s[3])),
    "dims": (Case((30,), D=32, Dv=32, Hkv=1), lambda s: (*s[:3], FAR // 16)),
    "pages": (Case((60,), D=32, Dv=32, page_size=16), lambda s: (FAR // 2, *s[1:])),
    "rows of pages": (Case((30,), D=32, Dv=32, page_size=16), lambda s: (s[0], FAR // 8, *s[2:])),
    "moved": (
        Case((60,), D=32, Dv=32, rope="rotated", page_size=16, config=SelectConfig.extrapolate(
            k=8, n_sink=2, n_local=4)),
        lambda s: (FAR // 2, *s[1:]),
    ),
}  # fmt: skip


def spread(x: Tensor, strides: tuple[int, ...], device: str) -> Tensor:
    """x with so large strides that an offset does not fit 32 bits. Most of it is never touched."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    assert size > FAR
    there = torch.empty(size, dtype=x.dtype, device=device).as_strided(x.shape, strides)
    return there.copy_(x)


def test_offsets_beyond_31_bits(tmp_path: Path) -> None:
    """All in one test: on a GPU this memory is really taken, beside that of other processes."""
    from tokenselect.kernels.triton import BACKEND, launch

    device = device_of(BACKEND)

    def compare(case: Case, far: Callable[[Any], tuple[int, ...]]) -> str:
        problem = replace(case, dtype=torch.bfloat16, spare=0).problem()
        compact = on(device, problem)
        expected = stages(BACKEND, compact)
        for cache in ("k_cache", "v_cache"):
            x = getattr(problem, cache)
            wide = replace(compact, **{cache: spread(x, far(x.stride()), device)})
            with overflow_checked() if launch.INTERPRETED else contextlib.nullcontext():
                results = stages(BACKEND, wide)
            for name, result in results.items():
                same(BACKEND, f"{name}, {cache}", expected[name], result)
            del wide
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return "the same"

    found = {what: in_a_child(partial(compare, *SPREAD[what]), tmp_path) for what in SPREAD}
    assert found == dict.fromkeys(SPREAD, "the same")


def in_a_child(work: Callable[[], str], where: Path) -> str:
    """What `work` returns or raises. On the CPU in a process of its own: a kernel may crash it."""
    if torch.cuda.is_available():
        return work()
    answer = where / "answer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        faulthandler.disable()  # that a mistake crashes is no news
        try:
            answer.write_text(work())
        except BaseException as error:
            answer.write_text(f"raised {error!r}")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    said = answer.read_text() if answer.exists() else f"crashed with status {status}"
    answer.unlink(missing_ok=True)
    return said


@pytest.mark.slow
def test_bad_values_stay_within_bounds() -> None:
    """Lengths, pages, positions and counts that nobody checked: no read or write outside."""
    done = subprocess.run(
        [sys.executable, "-m", "properties.fenced"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1]
    assert done.returncode == 0, f"exit code {done.returncode} at: {last}\n{done.stderr[-4000:]}"
    assert last.startswith("all ")


def test_fences_end_a_process() -> None:
    """A single element before or after a tensor is out of reach."""
    code = (
        "from properties.fenced import Fences; import torch; "
        "x = Fences({at_end}).empty((5,), torch.float32, 'cpu'); "
        "x.fill_(1); import ctypes; "
        "print(ctypes.c_float.from_address(x.data_ptr() + {place}).value)"
    )
    for at_end, place, survives in (
        (True, 16, True), (True, 20, False), (False, 0, True), (False, -4, False),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code.format(at_end=at_end, place=place)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.stdout == "1.0\n" and done.returncode == 0) == survives, done.stderr


# --- mistakes in the source -------------------------------------------------------------------


THE_REFERENCE = "the reference's steps"


def caught_by(mutant: mutants.Mutant, where: Path, update: bool) -> str:
    """The law that a mutant breaks, by an assertion or an error; its own stage's come first."""
    backend, launch = mutants.build(mutant, where)
    assert launch.INTERPRETED, "a mutant that is not interpreted runs nothing here"
    if mutant.stage is None:
        fenced.check(backend, launch, lambda line: None)
        return "nobody"
    if mutant.stage == "reuse":
        try:
            test_triton_reuse.check(backend.reuse, device_of(backend))
        except AssertionError:
            return THE_REFERENCE
        return "nobody"
    SHARES[backend.name] = 0.2 if launch.INTERPRETED else 1
    found = catcher(backend, mutant.stage, Exception, update)
    if found and update:
        witnesses.keep(backend.name, found)
    return found.law if found else "nobody"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_in_the_source_is_caught(
    mutant: mutants.Mutant, tmp_path: Path, update_snapshots: bool
) -> None:
    """By a law; by the fences, which crash, if only bad values show it."""
    if torch.cuda.is_available():
        pytest.skip("planted where kernels are interpreted: each mutant would be compiled anew")
    answer = in_a_child(lambda: caught_by(mutant, tmp_path, update_snapshots), tmp_path)
    print(f"noticed by {answer}")
    by_fence = mutant.stage is None and answer.startswith(
        ("crashed", "raised AssertionError", "raised Touched")
    )
    known = {THE_REFERENCE, *(law.name for law in LAWS)}
    assert by_fence or answer in known, f"{answer} notices {mutant.name}"
