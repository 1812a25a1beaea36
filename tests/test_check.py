"""python -m tokenselect.check tells what runs here, and notices a backend that is wrong."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests import fresh
from tokenselect import Backend, Capability
from tokenselect.conformance.check import judge, kinds, report
from tokenselect.conformance.tolerances import Finding
from tokenselect.dispatch import registry

PLANTED = """
import dataclasses, sys
import torch
from tokenselect import Backend, Capability, Scores, Selection, AttentionOutput, check, register
from tokenselect.dispatch.registry import load

cpu = load("cpu")

def wrong_heads(p):
    order = torch.arange(p.Hq).view(p.Hkv, p.G).T.flatten()  # query head h reads KV head h % Hkv
    scores = cpu.score(dataclasses.replace(p, q=p.q[:, order]))
    return Scores(scores.votes, scores.lse[:, order.argsort()])

def last_of_equals(votes, p):
    flipped = votes + torch.arange(p.Lk) * 1e-7 * votes.abs().nan_to_num(posinf=0.0)
    return cpu.select(flipped, p)

def one_too_few(p, selection):
    count = (selection.count - 1).clamp(min=0)
    places = torch.arange(selection.positions.shape[2])
    positions = torch.where(places < count[..., None], selection.positions, -1)
    return cpu.attend(p, Selection(positions, count))

def reads_all(p, selection):
    out, lse = cpu.attend(p, selection)
    return AttentionOutput(out + 0 * p.v_cache.sum().to(out.dtype), lse)

def gives_up(p, selection):
    raise RuntimeError("out of something")

def stale(p):
    held.append(p) if p.max_reuse == 0 else None
    scores = cpu.score(p)
    return Scores(scores.votes, scores.lse + 1e-3)
held = []

def plant(name, score="cpu", select="cpu", attend="cpu", **limits):
    register(name, Backend(name, Capability(**limits), score, select, attend))

plant("right")
plant("float32_only", dtypes=(torch.float32,))
plant("wrong_heads", score=wrong_heads)
plant("last_of_equals", select=last_of_equals)
plant("one_too_few", attend=one_too_few)
plant("reads_all", attend=reads_all)
plant("gives_up", attend=gives_up)
plant("lse_off", score=stale)
"""
WRONG = ["wrong_heads", "last_of_equals", "one_too_few", "reads_all", "gives_up", "lse_off"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return fresh.run(["tokenselect.check", *arguments])


def section(output: str, backend: str) -> dict[str, str]:
    """What became of each kind of problem on one backend."""
    _, _, rest = output.partition(f"\n{backend} on ")
    lines = rest.partition("\n\n")[0].splitlines()[1:]
    return {line[2:30].rstrip(): line[30:].strip() for line in lines}


@pytest.fixture(scope="module")
def planted() -> subprocess.CompletedProcess[str]:
    named = [x for name in ("right", "float32_only", *WRONG) for x in ("--backend", name)]
    return fresh.run(PLANTED + f"sys.exit(check.main({named!r}))\n")


def test_all_is_right_here() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for name in ("tokenselect", "python", "torch", "triton", "platform", "cpu"):
        assert re.search(rf"^{name} +\S", done.stdout, re.MULTILINE), name
    assert torch.__version__ in done.stdout
    for backend in ("reference", "cpu", *({fresh.AUTO} - {"cpu"})):
        found = section(done.stdout, backend)
        assert list(found) == list(kinds.KINDS)
        if backend == "native":
            assert found.pop("float64").startswith("not supported: dtype")
        assert all(re.fullmatch(r"ok +0\.\d{3}( +\w+)?", what) for what in found.values()), found
    if not torch.cuda.is_available():
        *found, more = section(done.stdout, "triton")
        assert found == list(kinds.INTERPRETED)
        assert more == f"{len(kinds.KINDS) - len(found)} other kinds"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("all right: ")
    assert f"cpu {len(kinds.KINDS)} problems" in last


@pytest.mark.parametrize("thorough", [True, False])
def test_an_interpreter_gets_few_problems_or_all(
    thorough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(report, "is_interpreted", lambda _: True)
    monkeypatch.setattr(
        report,
        "judge",
        lambda name, kind, *_: ran.append(kind) or judge.Outcome("", Finding(0.0, "")),
    )
    assert report.main(["--backend", "cpu", *["--thorough"] * thorough]) == 0
    assert ran == list(kinds.KINDS if thorough else kinds.INTERPRETED)


def test_what_uses_triton_on_the_cpu_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stages = "triton", "triton", "triton"
    borrower = registry.resolved(Backend("borrower", Capability(), *stages))
    assert report.is_interpreted(borrower)
    assert report.where(borrower) == "cpu, interpreted"
    assert not report.is_interpreted(registry.load("cpu"))


def test_a_module_s_attribute(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from tokenselect import Backend, Capability\n"
        "MINE = Backend('mine', Capability(), 'cpu', 'cpu', 'cpu')\n"
        "CPU = Backend('cpu', Capability(), 'reference', 'reference', 'reference')\n"
        "NUMBER = 3\n"
    )
    targets = (
        "theirs:MINE",
        "tokenselect.kernels.cpu:BACKEND",
        "theirs:CPU",
        "theirs:NUMBER",
        "no:B",
    )
    named = [x for target in targets for x in ("--backend", target)]
    done = fresh.run(
        "import sys\n"
        "from tokenselect import check\n"
        "for kind in [*check.KINDS][1:]:\n"
        "    del check.KINDS[kind]\n"
        f"sys.exit(check.main({named!r}))\n",
        tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("mine", "cpu"):
        assert section(done.stdout, name)["decode"].startswith("ok")
    for why in (
        "theirs:CPU  not available: InvalidProblem: theirs:CPU has the name 'cpu'",
        "theirs:NUMBER not available: InvalidProblem: theirs:NUMBER is a int",
        "no:B        not available: ModuleNotFoundError: No module named 'no'",
    ):
        assert why in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        "WRONG: theirs:CPU is not available; theirs:NUMBER is not available; no:B is not available"
    )


def test_one_backend_other_seeds() -> None:
    done = run("--backend", "cpu", "--seed", "70", "--problems", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"all right: cpu {2 * len(kinds.KINDS)} problems"
    assert "reference on" not in done.stdout


def test_planted_mistakes_make_it_fail(planted: subprocess.CompletedProcess[str]) -> None:
    assert planted.returncode == 1, planted.stderr
    last = planted.stdout.splitlines()[-1]
    assert last.startswith("WRONG: ")
    for name in WRONG:
        assert re.search(rf"{name} fails \d+ of \d+", last), name
    assert "right fails" not in last
    assert "float32_only fails" not in last


@pytest.mark.parametrize(
    ("backend", "kind", "what"),
    [
        ("wrong_heads", "decode", r"FAILED .* score: votes\["),
        ("last_of_equals", "votes that tie", r"FAILED +inf +select: positions\["),
        ("one_too_few", "decode", r"FAILED .* attend: "),
        ("reads_all", "decode", r"FAILED +inf +attend: out\[.*\] = nan"),
        ("gives_up", "paged", r"FAILED +inf +running it: RuntimeError: out of something"),
        ("lse_off", "decode", r"FAILED .* score: lse\["),
    ],
)
def test_a_mistake_is_named_by_stage_and_place(
    backend: str, kind: str, what: str, planted: subprocess.CompletedProcess[str]
) -> None:
    assert re.match(what, section(planted.stdout, backend)[kind])


def test_a_head_map_that_is_right_by_chance_is_right(
    planted: subprocess.CompletedProcess[str],
) -> None:
    found = section(planted.stdout, "wrong_heads")
    assert found["multi-head"].startswith("ok")
    assert found["multi-query"].startswith("ok")


def test_what_a_backend_does_not_take_is_no_mistake(
    planted: subprocess.CompletedProcess[str],
) -> None:
    found = section(planted.stdout, "float32_only")
    assert found["bfloat16"] == (
        "not supported: dtype is torch.bfloat16; float32_only takes torch.float32"
    )
    assert found["decode"].startswith("ok")


def test_an_unknown_backend() -> None:
    done = run("--backend", "cpuu")
    assert done.returncode == 1
    assert (
        "cpuu        not available: UnknownBackend: backend='cpuu' is not registered" in done.stdout
    )
    assert "did you mean 'cpu'?" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("WRONG: cpuu is not available")


@pytest.mark.parametrize(("named", "code"), [([], 0), (["--backend", "broken"], 1)])
def test_an_unavailable_backend(named: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "broken_backend.py").write_text("raise ImportError('libfast.so is missing')")
    done = fresh.run(
        "import sys\n"
        "from tokenselect import check, register\n"
        "register('broken', 'broken_backend:BACKEND')\n"
        "for kind in [*check.KINDS][1:]:\n"
        "    del check.KINDS[kind]\n"
        f"sys.exit(check.main({named!r}))\n",
        tmp_path,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "broken      not available: ImportError: libfast.so is missing" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("WRONG: broken is not available" if named else "all right: ")


@pytest.mark.parametrize(("named", "code"), [([], 0), (["--backend", "far"], 1)])
def test_a_backend_for_another_device(named: list[str], code: int) -> None:
    done = fresh.run(
        "import sys\n"
        "from tokenselect import Backend, Capability, check, register\n"
        "register('far', Backend('far', Capability(devices=('xpu',)), 'cpu', 'cpu', 'cpu'))\n"
        "for kind in [*check.KINDS][1:]:\n"
        "    del check.KINDS[kind]\n"
        f"sys.exit(check.main({named!r}))\n"
    )
    assert done.returncode == code, done.stdout + done.stderr
    told = {"all 1 kinds": "not supported: device is cpu; far takes xpu"}
    assert section(done.stdout, "far") == told
    if named:
        assert "far can run none of the problems here" in done.stdout.splitlines()[-1]


def test_no_problems_is_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        report.main(["--problems", "0"])
    assert caught.value.code == 2
    assert "--problems is at least 1" in capsys.readouterr().err


def test_triton_is_asked_for_its_version_not_imported() -> None:
    printed = fresh.output(
        "import sys\n"
        "from tokenselect.conformance.check import report\n"
        "print(dict(report.versions())['triton'])\n"
        "print('triton' in sys.modules)\n"
    )
    assert printed.splitlines()[1] == "False"


# --- the problems -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_of_problem_is_what_it_says(kind: str) -> None:
    p, given = kinds.draw(kind, 0), kinds.KINDS[kind].case
    assert p is kinds.draw(kind, 0)
    assert p.is_paged == (given.page_size is not None)
    assert (p.softcap, p.Lq, p.config) == (given.softcap, given.Lq, given.config)
    assert (p.rope and p.rope.cached) == given.rope
    assert not torch.equal(p.q, kinds.draw(kind, 1).q)
    # Rows that hold no token are NaN, so that reading one shows.
    is_full = p.cache_seqlens.tolist() == [p.Lk] * p.B
    assert bool(p.k_cache.isnan().any()) == (p.is_paged or not is_full)


def test_votes_that_tie_do_tie() -> None:
    p = kinds.draw("votes that tie", 0)
    votes = registry.load("reference").score(p).votes[0, 0, 0]
    # 140 candidates, seven keys; a softmax may differ in its last bit from lane to lane.
    assert len(votes[votes.isfinite()].unique()) < 20


@pytest.mark.parametrize("kind", ["decode", "paged", "one selection a group", "ragged and paged"])
def test_poison_spares_what_is_selected_and_nothing_else(kind: str) -> None:
    p, selection = kinds.draw(kind, 0), judge.truth(kind, 0).selection
    poisoned = judge.poisoned(p, selection)
    kept = set()
    for b in range(p.B):
        for s in range(p.S):
            for j in selection.positions[b, s, : int(selection.count[b, s])].tolist():
                if p.block_table is None:
                    row, place = b, j
                else:
                    row, place = int(p.block_table[b, j // p.page_size]), j % p.page_size
                kept.add((row, place))
    for before, after in ((p.k_cache, poisoned.k_cache), (p.v_cache, poisoned.v_cache)):
        if not p.is_paged:
            before, after = before.transpose(1, 2), after.transpose(1, 2)
        for row in range(after.shape[0]):
            for place in range(after.shape[1]):
                if (row, place) in kept:
                    assert torch.equal(after[row, place], before[row, place])
                else:
                    assert after[row, place].isnan().all()
