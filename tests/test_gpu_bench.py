"""The GPU benchmark without a GPU: everything but CUDA, by small cases and planted mistakes."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import Tensor

from bench import page as whole_page
from bench.checks import NotEquivalent
from bench.dense import Request, requests, truth
from bench.gpu import __main__ as command
from bench.gpu import baselines, cases, checks, measure, model, page, steps, timing
from bench.gpu.cases import Case, PlannedSteps
from bench.gpu.checks import Done
from bench.gpu.device import Captured, Cpu, Cuda, Ready
from bench.gpu.measure import Session, Task
from bench.gpu.timing import Contender
from bench.workloads import make
from properties.test_graphs import NEVER, planned_by
from tests import fresh
from tests.test_bench import coarse, otherwise_each_time, stage
from tokenselect import Problem, SelectConfig, Selection, SelectionCache, register, run
from tokenselect import check as whole_check
from tokenselect.dispatch import registry
from tokenselect.kernels.cpu import BACKEND as CPU

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
_CONFIG = SelectConfig(k=64, n_sink=8, n_local=32)
DECODE = cases.case((8, 2, 32), 600, 2, config=_CONFIG)
CHUNK = cases.case((8, 2, 32), 600, Lq=16, config=_CONFIG)
MODULO = stage("attend-reads-kv-head-modulo")
REUSED = replace(DECODE, n=160, planned=PlannedSteps(layers=2, max_reuse=10, short=120))


@pytest.fixture(autouse=True)
def _leave_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A real run asks for no interpreter; the tests after this one do.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with torch.no_grad():
        yield


def quiet(*_: Any, **__: Any) -> None:
    pass


def session(backend: str = "cpu", device: Cpu | None = None, seconds: float = 60.0) -> Session:
    return Session(Task(backend, time.time() + seconds, [], dry=True), device or Cpu())


def timed(case: Case, backend: str = "cpu", device: Cpu | None = None) -> dict[str, Any]:
    return session(backend, device).measure(case, 0.05)


def wrong_backend(**bent: Any) -> str:
    registry._loaded.pop("wrong", None)
    registry._targets.pop("wrong", None)
    register("wrong", replace(CPU, name="wrong", **bent))
    return "wrong"


def rounds(*given: Any) -> Any:
    attended = CPU.static.attend(*given)  # type: ignore[union-attr]
    return attended._replace(out=attended.out.copy_(coarse(attended.out)))


class Stale(Cpu):
    def capture(self, run: Callable[[], Any]) -> Captured:
        return Captured(quiet, run())


@pytest.mark.parametrize(
    ("bent", "case", "device", "complaint"),
    [
        (MODULO, DECODE, Cpu, "k for everything"),
        ({}, DECODE, Stale, "a replayed graph"),
        (planned_by(rounds), REUSED, Cpu, "a plan is .* tolerance away"),
        # It computes what it should, all over again.
        (NEVER, REUSED, Cpu, "hit, graph: layer 0, request 0: 0 hits"),
    ],
)
def test_what_is_wrong_is_not_timed(
    bent: dict[str, Any], case: Case, device: Any, complaint: str
) -> None:
    with pytest.raises(NotEquivalent, match=complaint):
        timed(case, wrong_backend(**bent), device())


# --- a whole run, in this process ---------------------------------------------------------

GREEN = [{"name": "all", "status": "passed", "detail": "", "seconds": 1.0, "command": ""}]
RED = [GREEN[0] | {"name": "properties", "status": "failed", "detail": "3 failed", "tail": ["E"]}]


def whole(folder: Path, *more: str, found: Any = GREEN, a_model: Any = dict) -> dict[str, Any]:
    """The JSON of a dry run of two cases. found: by the checks."""
    arguments = ["--dry-run", "--seconds", str(fresh.HANG), "--out", str(folder), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "facts", lambda _: {"device": "dry run"})
        patch.setattr(checks, "run", lambda *_: found)
        patch.setattr(command, "supervise", measure.run)
        patch.setattr(model, "measure", lambda *_: a_model())
        for module in (command, measure):
            patch.setattr(module, "cases", lambda **_: [DECODE, CHUNK])
        code = command.main(arguments)
    (path,) = folder.glob("*-gpu*.json")
    assert path.name.endswith("-red.json") is (code != 0)
    return dict(json.loads(path.read_text("utf-8")))


def test_once_wrong_the_rest_is_checked_and_no_speed_up_is_reported(tmp_path: Path) -> None:
    def wrong_when_decoding(p: Problem, selection: Selection) -> Any:
        return (MODULO["attend"] if p.Lq == 1 else CPU.attend)(p, selection)

    found = whole(tmp_path, "--backend", wrong_backend(attend=wrong_when_decoding))
    assert [case["cell"] for case in found["wrong"]] == [DECODE.name]
    (chunk,) = found["cells"]
    assert chunk["name"] == CHUNK.name
    assert chunk["sides"] == chunk["ratios"] == found["targets"] == []
    assert not found["green"]


def test_measured_anyway_no_speed_up_is_told_and_no_page_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wrong_backend(**MODULO)
    found = whole(tmp_path, "--backend", name, "--measure-anyway", found=RED)
    assert [bool(case["not_equivalent"] and case["sides"]) for case in found["cells"]] == [True] * 2
    assert found["cells"][0]["ratios"] == found["targets"] == []
    said = capsys.readouterr().out
    assert "CHECKS DID NOT PASS" in said
    assert "over" not in said
    with pytest.raises(page.Refused, match=r"properties failed; decode .*k for everything"):
        page.accept(found | {"dry_run": False})


def test_a_red_check_and_checks_only_measure_nothing(tmp_path: Path) -> None:
    red, only = whole(tmp_path / "red", found=RED), whole(tmp_path / "only", "--checks-only")
    assert (red["green"], only["green"]) == (False, True)
    assert (red["finished"], red["cells"]) == (only["finished"], only["cells"]) == (False, [])


def test_a_wrong_model_turns_the_run_red(tmp_path: Path) -> None:
    def far_away() -> None:
        raise NotEquivalent("far away")

    found = whole(tmp_path, a_model=far_away)
    assert found["wrong"] == [{"cell": "a whole model", "why": "far away"}]
    assert found["cells"][0]["ratios"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the whole benchmark")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out


# --- cases, memory, time and inputs -------------------------------------------------------


def test_the_important_cases_come_first_and_all_are_there() -> None:
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names) == 4 * 3 * 3 + 3
    assert names[0] == "decode 32/8/128 n 128K B 1"
    assert names[3] == "prefill 32/8/128 n 1M B 1 Lq 512"
    assert {target.case for target in page.TARGETS} == set(names[:5])
    assert [case.name for case in cases.cases(quick=True)] == names[:4]
    planned = [case.name for case in cases.cases() if case.planned is not None]
    assert planned == [names[0], names[1], names[4], names[5]]
    assert len({case.name for case in cases.cases(dry=True)}) == len(names)


def test_cases_are_left_out_from_the_end_when_time_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def slow(case: Case, *_: Any) -> dict[str, Any]:
        clock[0] += 20.0
        return case.facts() | {"sides": [], "ratios": [], "is_headline": False}

    at_work = session(seconds=100.0)
    monkeypatch.setattr(at_work, "measure", slow)
    report = page.Report(copy.deepcopy(real()) | {"cells": [], "left_out": []}, [])
    at_work.work(report)
    names = [case.name for case in cases.cases(dry=True)]
    # 80 s are left after the first: a case is begun while 1.5 times what one takes, and 2 s, are.
    assert [case["name"] for case in report.content["cells"]] == names[:4]
    assert [case["cell"] for case in report.content["left_out"]] == names[4:]


def test_a_case_that_does_not_fit_into_memory_is_skipped_and_said() -> None:
    with pytest.raises(measure.Skipped, match=r"needs about 2\.0 GiB, 1\.0 GiB are free"):
        timed(DECODE, device=Cpu(free_bytes=2**30))
    sizes = {case.name: case.memory / 2**30 for case in cases.cases()}
    assert sizes["decode 32/8/128 n 1M B 32"] > 160
    assert sizes["decode 32/8/128 n 1M B 8"] < 70


# --- what it is compared with, and times --------------------------------------------------


# What is compiled on a GPU is not here.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [DECODE, CHUNK], ids=["decode", "chunk"])
def test_baselines_are_dense_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def on_cpu(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", on_cpu)  # which has no such product
    p = make(case)
    inputs, exact = Request(p.q, p.k_cache, p.v_cache, p.scale), truth(requests(p))
    ran = set()
    for one in baselines.dense(inputs, exact, 1):
        ready = one.make()
        with contextlib.suppress(RuntimeError, NotImplementedError):
            with ready.around():
                out = ready.run()
            assert out.shape == p.q.shape, one.name
            assert exact.share(out) <= 1, one.name
            ran.add(one.name)
    decode = {"sdpa flash, enable_gqa", "sdpa math, group folded", "matmul, float32 logits"}
    chunk = {"sdpa flash, causal_lower_right, enable_gqa"}
    assert ran >= {"flex_attention, compiled"} | (decode if case.Lq == 1 else chunk)
    if case.Lq > 1:  # by whichever kernel the CPU has
        assert exact.share(baselines._chunk_lower_right_expanded(inputs).run()) <= 1


def contender(name: str, role: str, **notes: Any) -> Contender:
    return Contender(name, role, Ready(lambda: name), 8, notes)


def test_the_strongest_exact_baseline_of_a_mode_is_the_one_compared_with() -> None:
    several = [
        *(contender("fresh", "whole"), contender("attend", "stage"), contender("select", "stage")),
        contender("rounded", "dense", is_baseline=False),
        contender("broken", "dense", error="RuntimeError"),
        *(contender(name, "dense", is_baseline=True) for name in ("one", "other")),
        contender("near", "gathered", is_baseline=True),
    ]
    graph = {"fresh": [2.0, 2.0, 4.0], "attend": [1.0] * 3, "select": [1.0], "rounded": [1.0] * 3}
    graph |= {"one": [8.0, 9.0, 8.0], "other": [4.0, 6.0, 4.0], "near": [3.0, 3.0]}
    times = {"graph": graph, "eager": graph | {"one": [3.0, 3.0, 3.0]}}
    found = {(r["of"], r["mode"], r["role"]): r for r in timing.ratios(several, times)}
    best = found["fresh", "graph", "dense"]
    assert (best["to"], best["median"], best["p10"]) == ("other", 2.0, pytest.approx(1.2))
    assert found["fresh", "eager", "dense"]["to"] == "one"
    assert found["attend", "graph", "gathered"]["median"] == 3.0
    assert ("select", "graph", "topk") not in found


def test_contenders_alternate_slow_ones_run_thrice_and_times_are_of_one_call() -> None:
    order: list[str] = []

    class Clock(Cpu):
        def eager(self, run: Callable[[], Any]) -> Callable[[], float]:
            order.append(run())
            return lambda: 1.0

    class Four:
        calls, reset_counts, check_counts = 4, quiet, quiet

    several = [
        replace(contender("a", "whole"), steps=Four, first=99.0),
        replace(contender("b", "dense", is_baseline=True), first=5.1),
        replace(contender("c", "dense", is_baseline=True), first=1.0),
        contender("d", "dense", error="no"),
        replace(contender("e", "dense", is_baseline=False), first=0.1),
    ]
    timing.set_slow_apart(several)
    assert [one.name for one in several if one.is_slow] == ["b"]
    times = timing.alternate(several, "eager", Clock(), 9.0, (5, 5))
    assert "".join(order) == "aceb" + "beca" + "aceb" + "eca" + "ace"
    assert times == {"a": [0.25] * 5, "b": [1.0] * 3, "c": [1.0] * 5, "e": [1.0] * 5}


def test_the_spread_is_linear_between_ranks() -> None:
    found = timing.spread([4.0, 1.0, 2.0, 3.0], "_us")
    assert found == pytest.approx({"median_us": 2.5, "p10_us": 1.3, "p90_us": 3.7})


def test_cuda_is_flushed_timed_and_captured_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = MagicMock()
    cuda.run.return_value = 7
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Cuda, "_flush", lambda _: cuda.flush())
    device = object.__new__(Cuda)
    device.at = torch.device("cpu")

    def log() -> list[str]:
        names = [name for name, *_ in cuda.mock_calls]
        cuda.reset_mock()
        return names

    timed = ["Event", "Event", "Event().record", "run", "Event().record"]
    device.eager(cuda.run)
    assert log() == ["flush", "synchronize", *timed]
    device.queued(cuda.run)
    assert log() == ["flush", *timed]
    assert device.capture(cuda.run).result == 7
    beside = ["stream", "stream().__enter__", *["run"] * 3, "stream().__exit__"]
    waits = [*("current_stream", "Stream", "Stream().wait_stream"), *beside]
    waits += ["current_stream().wait_stream", "synchronize"]
    captured = ["CUDAGraph", "graph", "graph().__enter__", "run", "graph().__exit__"]
    assert log() == [*waits, *captured]
    cuda.run.side_effect = [1, 2, 3, ZeroDivisionError]
    with pytest.raises(ZeroDivisionError):
        device.capture(cuda.run)
    assert cuda.mock_calls[-1] == call.set_stream(cuda.current_stream())


# --- the checks ---------------------------------------------------------------------------


def test_checks_run_at_the_same_time_and_are_stopped_in_time(tmp_path: Path) -> None:
    codes = {
        "good": "print('fine')",
        "bad": "print('E  worse'); raise SystemExit(3)",
        "late": "import time; time.sleep(60)",
    }
    wanted = [checks.Check(name, (sys.executable, "-c", code)) for name, code in codes.items()]
    wanted.append(checks.Check("absent", None, detail="no such tool"))
    found = {check["name"]: check for check in checks.run(wanted, 2.0, tmp_path, quiet)}
    assert {name: check["status"] for name, check in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "late": "unfinished",
        "absent": "skipped",
    }
    assert "worse" in "".join(found["bad"]["tail"])
    for names, green in (("good absent", True), ("good bad", False), ("late", False), ("", False)):
        assert checks.is_green([found[name] for name in names.split()]) is green


def junit(**outcomes: str) -> str:
    """What pytest writes of laws a, b, ... and of other tests."""
    laws = {name: f"test_law[{name}]" if len(name) == 1 else name for name in outcomes}
    tests = (f'<testcase name="{laws[name]}">{"" if outcome == "passed" else f"<{outcome}/>"}'
             "</testcase>" for name, outcome in outcomes.items())  # fmt: skip
    return f"<testsuite>{''.join(tests)}</testsuite>"


_RACES = "========= RACECHECK SUMMARY: 2 hazards displayed ({} error, {} warnings)"


@pytest.mark.parametrize(
    ("judge", "code", "said", "status"),
    [
        (checks.by_junit, 0, junit(a="passed", b="skipped"), "passed"),
        # Beyond most laws.
        (checks.by_junit, 0, junit(a="passed", other="passed", b="skipped", c="skipped"), "failed"),
        (checks.by_junit, None, junit(a="passed"), "unfinished"),
        (checks.by_junit, 5, junit(a="passed"), "failed"),
        (checks.by_junit, None, junit(a="failure"), "failed"),
        (checks.by_junit, 0, junit(a="error"), "failed"),
        (checks.by_json, 0, '{"device": 1}\na warning at the end', "passed"),
        (checks.by_json, 0, "no such thing", "failed"),
        (checks.by_json, 1, '{"device": 1}', "failed"),
        (checks.by_sanitizer, 0, "done\n==== ERROR SUMMARY: 0 errors", "passed"),
        (checks.by_sanitizer, 0, "==== Invalid read\n==== ERROR SUMMARY: 2 errors", "failed"),
        (checks.by_sanitizer, 1, "not finite\n==== ERROR SUMMARY: 0 errors", "failed"),
        (checks.by_sanitizer, 1, "an illegal memory access was encountered", "failed"),
        (checks.by_sanitizer, 1, "Device not supported", "skipped"),
        (checks.by_sanitizer, None, "", "skipped"),
        (checks.by_sanitizer, 0, _RACES.format(0, 2), "passed"),
        (checks.by_sanitizer, 1, _RACES.format(1, 0), "failed"),
        (checks.by_sanitizer, 1, "not finite\n" + _RACES.format(0, 0), "failed"),
    ],
)
def test_checks_are_judged_by_what_they_said(
    judge: Any, code: int | None, said: str, status: str, tmp_path: Path
) -> None:
    (tmp_path / "properties.xml").write_text(said)
    assert judge(Done(code, said, tmp_path)).status == status


def test_the_properties_and_the_small_calls_pass_as_they_are_called(tmp_path: Path) -> None:
    """As a dry run makes them: a GPU run does, but for a few options."""
    every = checks.checks("cpu", tmp_path, dry=True, quick=False)
    wanted = [check for check in every if check.name in ("properties", "memcheck")]
    found = checks.run(wanted, fresh.HANG, tmp_path, quiet)
    assert [check["status"] for check in found] == ["passed", "passed"], found


def test_the_checks_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {c.name: c for c in checks.checks("triton", tmp_path, dry=False, quick=False)}
    parts = ["tokenselect.check-1-of-2", "tokenselect.check-2-of-2"]
    halves = ["graphs-1-of-2", "graphs-2-of-2"]
    others = ["determinism", *halves, "models", "properties"]
    assert list(found) == ["memcheck", "racecheck", *parts, *others]
    assert "compute-sanitizer --tool racecheck" in " ".join(found["racecheck"].command or ())
    words = " ".join(found["properties"].command or ())
    assert "pytest properties --ignore=properties/test_graphs.py" in words
    assert "--hypothesis-profile=device" in words
    assert "--backend=triton" in words
    assert "-k triton and not mistake" in words
    quick = checks.checks("triton", tmp_path, dry=False, quick=True)
    assert [c.name for c in quick if c.command is None] == ["memcheck", "racecheck", "properties"]


def test_parts_are_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    every, ran, graphs = list(whole_check.KINDS), [], []
    monkeypatch.setattr(whole_check, "main", lambda _: ran.extend(whole_check.KINDS) or 0)
    monkeypatch.setattr(os, "execv", lambda _, command: graphs.append(command[-1]) or 0)
    for part in ("1", "2", "3"):
        monkeypatch.setattr(whole_check, "KINDS", dict.fromkeys(every))
        assert checks.main(["rules", "--dry-run", "--part", part, "--of", "3"]) == 0
    assert sorted(ran) == sorted(every)
    for part in ("1", "2"):
        assert checks.main(["graphs", "--dry-run", "--part", part, "--of", "2"]) == 0
    what = "bits_of_attention"
    assert graphs == [f"not mistake and {what}", f"not mistake and not {what}"]


def test_repeats_that_differ_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    name = wrong_backend(attend=otherwise_each_time(CPU.attend))
    assert checks.main(["determinism", "--backend", name, "--dry-run"]) == 1
    assert "lse of repeat 1 and of the first: 32 of 32" in capsys.readouterr().out


# --- planned steps ------------------------------------------------------------------------


def test_a_backend_without_plans_is_measured_and_told() -> None:
    found = timed(REUSED, wrong_backend(static=None))
    (said,) = (side for side in found["sides"] if side["role"] == "planned")
    assert "no stages that a plan can run" in said["error"]
    assert found["ratios"]


def traced(B: int, max_reuse: int) -> tuple[Problem, list[steps.Steps]]:
    problem = make(replace(DECODE, n=160, B=B))
    how = PlannedSteps(layers=2, max_reuse=max_reuse)
    return problem, list(steps.kinds(problem, "cpu", how, steps.copies(problem, 2, 2**40)))


def test_inputs_move_from_run_to_run_and_go_back_with_what_was_remembered() -> None:
    _, (hit, _, _, mixed) = traced(2, 10)
    for kind in (hit, mixed):
        kind.reset_counts()
        seen = []
        for _ in range(2 * kind.trace.n_runs + 1):
            with kind.next():
                seen += kind._lengths[:, 0].tolist()
                kind.run()
        kind.check_counts()
        assert seen == [*range(151, 161), *range(151, 161), *range(151, 151 + kind.trace.width)]
    assert (hit.calls, mixed.calls) == (2, 10)
    first = mixed.out.clone()  # a replay that keeps its first inputs
    mixed.check(mixed.run, "called", 10, near=0.05)
    with pytest.raises(NotEquivalent, match="mixed, replayed: step 6, layer 0 is"):
        mixed.check(lambda: mixed.out.copy_(first), "replayed", 10, near=0.05)


def test_of_a_mixed_trace_each_request_reuses_four_in_five_and_not_all_at_once() -> None:
    problem, _ = traced(3, 64)
    trace, cache = steps.mixed(problem, 64), SelectionCache(steps.THETA, 64)
    reused = []
    for q, lengths in zip(trace.queries, trace.lengths, strict=True):
        at = replace(problem, max_reuse=64, q=q, cache_seqlens=lengths)
        reused.append(run(at, "cpu", cache=cache, return_info=True)[1].reused)
    hits = torch.stack(reused[1:])
    assert (hits.view(12, 5, 3).sum(1) == 4).all()
    assert (~hits).sum(1).max() == 1


def test_as_many_copies_of_the_cache_as_a_quarter_of_memory_holds() -> None:
    problem, _ = traced(1, 10)
    size = 2 * problem.k_cache.numel() * 2
    for free, expected in ((0, 1), (4 * size, 2), (13 * size, 4), (2**40, 4)):
        layers = steps.copies(problem, 4, free)
        assert len(layers) == 4
        assert len({k.data_ptr() for k, _ in layers}) == expected


# --- processes that are lost --------------------------------------------------------------

_FAKE = """
import json, os, sys, time, pathlib
from bench.gpu.page import Report, put
folder = pathlib.Path(sys.argv[1])
task = json.loads((folder / "task.json").read_text())
report = Report(json.loads((folder / "report.json").read_text()), [], folder / "report.json")
def note(**what): put(folder / "now.json", what)
for case in ["first", "second", "third"]:
    if case in report.told: continue
    note(cell=case)
    if case == "first" and "hangs" not in task["banned"].get(case, []):
        note(cell=case, baseline="hangs"); time.sleep(60)
    if case == "second":
        note(cell=case, step="checking"); os._exit(139)
    report.content["cells"].append({"name": case, "ratios": []}); report.write(); note()
"""


@pytest.mark.parametrize("is_late", [False, True])
def test_a_lost_process_is_replaced_and_someone_blamed(
    is_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "COMMAND", (sys.executable, "-c", _FAKE))
    monkeypatch.setattr(command, "SILENCE", 3.0)
    content = copy.deepcopy(real()) | {"cells": [], "left_out": [], "wrong": [], "green": False}
    report = page.Report(content, [tmp_path / "out"])
    task = Task("cpu", time.time() + (-1 if is_late else 90), [])
    command.supervise(task, report)
    found = report.content
    assert [case["name"] for case in found["cells"]] == ([] if is_late else ["first", "third"])
    if is_late:
        assert [case["cell"] for case in found["left_out"]] == ["first"]
    else:
        assert task.banned == {"first": ["hangs"]}
        assert [case["cell"] for case in found["wrong"]] == ["second"]
        assert "exit code 139, checking" in found["wrong"][0]["why"]


def test_a_baseline_that_breaks_the_device_ends_the_process() -> None:
    class Broken(Cpu):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    with pytest.raises(measure.DeviceLost, match="misaligned"):
        session(device=Broken()).check_alive(RuntimeError("misaligned address\nmore"))


# --- a whole model ------------------------------------------------------------------------


def negates(*given: Any) -> Any:
    out, lse = CPU.static.attend(*given)  # type: ignore[union-attr]
    return out.mul_(-1.0), lse


@pytest.mark.parametrize(
    ("bent", "complaint"),
    [
        ({}, None),
        (planned_by(negates), "a logit of attention is"),
        (NEVER, "did not reuse"),
        ("dense", "layer 1, in float32, is"),
    ],
)  # fmt: skip
def test_a_model_that_is_wrong_is_not_shown_as_measured(
    bent: Any, complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    if bent == "dense":  # in a deep layer
        dense, bent = model._dense, {}
        monkeypatch.setattr(
            model, "_dense", lambda kind: lambda layer, *x: dense(kind)(layer, *x) * (1 - layer)
        )
    name = wrong_backend(**bent)
    if complaint is not None:
        with pytest.raises(NotEquivalent, match=complaint):
            model.measure(name, Cpu(), dry=True)
        return
    found = model.measure(name, Cpu(), dry=True)
    assert [side["name"] for side in found["sides"]][:3] == [model.STOCK, *model.DENSE]
    called = {model.STOCK, model.CALLED["sdpa"]}
    assert {ratio["over"] for ratio in found["ratios"]} - called < set(model.DENSE)


# --- targets and the page -----------------------------------------------------------------


@cache
def real(which: int = -1) -> dict[str, Any]:
    """A result of a GPU: the newest."""
    path = sorted((ROOT / "bench/results").glob("*-gpu.json"))[which]
    return dict(json.loads(path.read_text("utf-8")))


def test_the_page_shows_a_result_and_its_targets_as_they_were() -> None:
    found = copy.deepcopy(real())
    every = [real(i) for i, _ in enumerate((ROOT / "bench/results").glob("*-gpu.json"))]
    assert page.section(every) in (ROOT / "docs/benchmarks.md").read_text("utf-8")
    assert page.judged(found) == found["targets"]
    older = found | {"date": "1999-01-01T00:00:00+00:00", "command": "--old"}
    other = found | {"machine": found["machine"] | {"device": "NVIDIA L4"}, "finished": False}
    text = page.section([found, older, other])
    assert "--old" not in text
    _, *left = found["cells"]
    lacking = page.section([found | {"cells": left}, older])
    assert "#### On 1999-01-01: cells that no later run measured" in lacking
    assert lacking.count(f"\n| {found['cells'][0]['name']} |") > 3
    assert lacking.index("--old") < lacking.rindex(f"\n| {found['cells'][0]['name']} |")
    assert "NVIDIA L4" in text
    assert "cut off before its end" in text
    assert {row["reached"] for row in page.judged(other)} == {None}
    assert "No GPU figure has been measured yet." in page.section([])


@pytest.mark.parametrize(
    ("of", "what", "figure", "good", "bad"),
    [("select", "us", "median_us", 60.0, 61.0), ("score", "share", "gb_per_s", 2400.0, 2350.0)],
)
def test_a_target_is_reached_or_missed(
    of: str, what: str, figure: str, good: float, bad: float
) -> None:
    found = copy.deepcopy(real(0)) | {"copy": [{"median_gb_per_s": 2900.0}]}
    (case,) = (case for case in found["cells"] if case["name"] == "decode 32/8/128 n 1M B 1")
    page.side_of(case, "device copy")["graph"]["gb_per_s"] = 3000.0  # the faster one counts
    for value, reached in ((good, True), (bad, False)):
        page.side_of(case, of)["graph"][figure] = value
        rows = {(row["cell"], row["of"], row["what"]): row for row in page.judged(found)}
        assert rows[case["name"], of, what]["reached"] is reached


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dry_run": True}, "a dry run"),
        ({"green": False}, "did not pass"),
        ({"cells": []}, "measured nothing"),
        ({"green": False, "wrong": [{"cell": "decode", "why": "off"}]}, "decode: off"),
    ],
)
def test_the_page_refuses_what_is_no_measurement(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (tmp_path / "x-gpu.json").write_text(json.dumps(real() | changes))
    with pytest.raises(page.Refused, match=why):
        whole_page.page(tmp_path)
    unsaid = {name: value for name, value in real().items() if name not in changes}
    with pytest.raises(page.Refused):
        page.accept(unsaid)


def test_the_report_is_on_paper_after_every_case(tmp_path: Path) -> None:
    content = copy.deepcopy(real()) | {"cells": [], "wrong": []}
    kept = page.Report(content, [tmp_path / "results", tmp_path / "out"])

    def on_paper(name: str) -> list[list[Any]]:
        for folder in kept.folders:
            assert [path.name for path in folder.iterdir()] == [name]
        texts = [(folder / name).read_text("utf-8") for folder in kept.folders]
        return [json.loads(text)["cells"][0]["ratios"] for text in texts]

    kept.add(real()["cells"][0])
    assert all(on_paper(kept.name(green=True)))
    kept.refute("decode", "off")
    assert on_paper(kept.name(green=False)) == [[], []]


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_the_tree_is_git_s(tmp_path: Path) -> None:
    for name in ("a/b.py", "a.py", "run", "a/__pycache__/b.pyc", "empty/__pycache__/c.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "run").chmod(0o755)
    tree = page.tree_of(tmp_path)
    for arguments in (["init", "-q"], ["add", "a/b.py", "a.py", "run"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    done = subprocess.run(["git", "write-tree"], cwd=tmp_path, check=True, capture_output=True)
    assert done.stdout.decode().strip() == tree
