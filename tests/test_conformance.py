"""What a third party runs: the laws on a backend of theirs, without this checkout's properties."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fresh

THEIRS = """
from dataclasses import replace

from tokenselect import Backend, Capability, Selection
from tokenselect.dispatch.registry import load

cpu = load("cpu")


def one_too_few(votes, problem):
    right = cpu.select(votes, problem)
    return Selection(right.positions, (right.count - 1).clamp(min=0))


RIGHT = Backend("right", Capability(), "cpu", "cpu", "cpu")
WRONG = Backend("wrong", Capability(layouts=("contiguous",)), "cpu", one_too_few, "cpu")
IDLE = Backend("idle", Capability(dtypes=()), "cpu", "cpu", "cpu")
"""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


def conform(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return fresh.run(["tokenselect.conformance", *arguments], where)


def test_a_right_backend_passes(theirs: Path) -> None:
    laws = ["--law", "select_is_bit_exact", "--law", "paging_changes_nothing"]
    done = conform(theirs, "theirs:RIGHT", "--examples", "3", *laws)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [[name, "passed"] for name in laws[1::2]]
    assert lines[-1].startswith("all right: right keeps 2 laws")


def test_a_mistake_is_told_with_the_problem_and_the_place(theirs: Path) -> None:
    laws = ["--law", "select_is_bit_exact", "--law", "paging_changes_nothing"]
    done = conform(theirs, "theirs:WRONG", "--examples", "3", *laws)
    assert done.returncode == 1, done.stdout + done.stderr
    first, case, finding, second, *_, last = done.stdout.splitlines()
    assert first.endswith("FAILED")
    assert "count[" in finding
    assert second.endswith("beyond what it declares")
    assert last == "WRONG: wrong breaks 1 of 2 laws"
    again = "import torch\nfrom tokenselect import SelectConfig\n"
    again += "from tokenselect.conformance.problems import Ballots, Case\n"
    again += f"votes, problem = {case.strip()}.make()\n"
    again += "import theirs\nfrom tokenselect import select\n"
    again += "from tokenselect.dispatch.registry import load\n"
    again += "wrong, right = theirs.one_too_few(votes, problem), load('reference').select(votes, "
    again += "problem)\nassert not torch.equal(wrong.count, right.count)\n"
    assert fresh.output(again, theirs) == ""


@pytest.mark.parametrize("laws", [[], ["--law", "select_is_bit_exact"]])
def test_a_backend_that_takes_nearly_nothing_does_not_pass(theirs: Path, laws: list[str]) -> None:
    done = conform(theirs, "theirs:IDLE", "--examples", "1", *laws)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("WRONG: idle proves nothing: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_module:BACKEND"], "No module named 'no_such_module'"),
        (["cpu", "--law", "nothing"], "there is no law 'nothing'"),
        (["cpu", "--examples", "0"], "--examples is at least 1"),
    ],
)
def test_what_is_not_there_is_an_error(theirs: Path, arguments: list[str], said: str) -> None:
    done = conform(theirs, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_without_hypothesis_it_says_what_to_install(theirs: Path) -> None:
    done = fresh.run(
        "import sys\n"
        "sys.modules['hypothesis'] = None\n"
        "import tokenselect.conformance.tolerances, tokenselect.conformance.check.report\n"
        "from tokenselect.conformance.__main__ import main\n"
        "main(['cpu'])\n",
    )
    assert done.returncode == 2, done.stderr
    assert "pip install tokenselect[conformance]" in done.stderr


@pytest.mark.parametrize(
    ("backend", "code", "said"),
    [("RIGHT", 0, "2 passed"), ("WRONG", 1, "1 failed, 1 skipped"), ("IDLE", 1, "1 failed")],
)
def test_the_laws_are_tests_of_ones_own(theirs: Path, backend: str, code: int, said: str) -> None:
    (theirs / "test_theirs.py").write_text(
        "from tokenselect.conformance.pytest import Laws\n\n\n"
        f"class TestTheirs(Laws):\n    backend = 'theirs:{backend}'\n"
    )
    (theirs / "conftest.py").write_text(
        "from hypothesis import settings\n"
        "settings.register_profile('few', max_examples=2, database=None)\n"
        "settings.load_profile('few')\n"
    )
    named = "really_tried" if backend == "IDLE" else "select_is or paging_changes"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", named, str(theirs)],
        cwd=theirs,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (theirs, fresh.ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout.splitlines()[-1], done.stdout
