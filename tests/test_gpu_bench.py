"""The GPU benchmark without a GPU: everything but CUDA, by dry runs and planted mistakes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import page as whole_page
from bench.gpu import __main__ as command
from bench.gpu import (
    gate,
    graphs,
    measure,
    model,
    page,
    parent,
    plan,
    probe,
    report,
    reuse,
    rivals,
    truth,
    worker,
)
from bench.gpu.device import Captured, Cpu, Cuda, host
from bench.gpu.gate import Done
from bench.gpu.inputs import add_rows, draw
from bench.gpu.measure import Limits, Side, Skipped
from bench.gpu.plan import Cell
from bench.gpu.rivals import Asked, Ready
from bench.gpu.worker import Task
from bench.run import NotEquivalent
from properties.recorded import Recorded
from tests import fresh
from tokenselect import Problem, Scores, SelectConfig, Selection, SelectionCache, check, register
from tokenselect.contract import Reuse
from tokenselect.dispatch import registry
from tokenselect.kernels.cpu import BACKEND as CPU
from tokenselect.reference import reuse as reference

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
_CONFIG = SelectConfig(k=64, n_sink=8, n_local=32)
DECODE = Cell("decode", 8, 2, 32, 600, B=2, config=_CONFIG)
CHUNK = Cell("prefill", 8, 2, 32, 600, Lq=16, config=_CONFIG)
LIMITS = Limits(lambda: 60.0, 0.05, (2, 3))


@pytest.fixture(autouse=True)
def _leave_all_as_it_was() -> Iterator[None]:
    targets, interpret = dict(registry._targets), os.environ.get("TRITON_INTERPRET")
    registry._loaded.pop("wrong", None)  # of another file's
    yield
    # A real run asks for no interpreter; the tests after this one do.
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    for name in set(registry._targets) - set(targets):
        registry._loaded.pop(name, None)
    registry._targets.clear()
    registry._targets.update(targets)


def quiet(*_: Any, **__: Any) -> None:
    pass


# --- a backend that is wrong --------------------------------------------------------------


def votes_for_the_worst(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    return Scores(torch.where(votes.isfinite(), -votes, votes), lse)


def rounds_its_votes(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    return Scores(votes.bfloat16().float(), lse)


def votes_for_the_sink(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    votes[..., 0] = 0.0
    return Scores(votes, lse)


def claims_to_keep_everything(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    return Scores(votes, lse - 1)


def forgets_the_best(votes: Tensor, p: Problem) -> Selection:
    return CPU.select(votes.masked_fill(votes == votes.amax(-1, keepdim=True), 0.0), p)


def reads_kv_head_modulo(p: Problem, selection: Selection) -> Any:
    order = torch.argsort(torch.arange(p.Hq) % p.Hkv, stable=True)
    out, lse = CPU.attend(replace(p, q=p.q[:, order]), selection)
    back = torch.argsort(order)
    return type(CPU.attend(p, selection))(out[:, back], lse[:, back])


def rounds_twice(p: Problem, selection: Selection) -> Any:
    attended = CPU.attend(p, selection)
    return attended._replace(out=attended.out.to(torch.float8_e4m3fn).to(attended.out.dtype))


def answers_otherwise_each_time() -> Callable[[Problem, Selection], Any]:
    calls = [0]

    def attend(p: Problem, selection: Selection) -> Any:
        calls[0] += 1
        attended = CPU.attend(p, selection)
        return attended._replace(lse=attended.lse + 1e-5 * calls[0])

    return attend


def wrong_backend(**bent: Any) -> str:
    register("wrong", replace(CPU, name="wrong", **bent))
    return "wrong"


@pytest.mark.parametrize(
    ("bent", "complaint"),
    [
        ({"score": votes_for_the_worst}, "a vote is"),
        ({"score": rounds_its_votes}, "a vote is"),
        ({"score": votes_for_the_sink}, "off the candidates"),
        ({"score": claims_to_keep_everything}, "score's lse"),
        ({"select": forgets_the_best}, "stable sort"),
        ({"attend": reads_kv_head_modulo}, "k for everything"),
        ({"attend": rounds_twice}, "k for everything"),
        ({"attend": answers_otherwise_each_time()}, "differ from those of its stages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_backend_is_not_timed(bent: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NotEquivalent, match=complaint):
        measure.measure(DECODE, Cpu(), wrong_backend(**bent), LIMITS, quiet)


def test_a_wrong_chunk_is_not_timed() -> None:
    with pytest.raises(NotEquivalent, match="k for everything"):
        measure.measure(CHUNK, Cpu(), wrong_backend(attend=reads_kv_head_modulo), LIMITS, quiet)


def test_a_graph_that_replays_something_else_is_not_timed() -> None:
    class Stale(Cpu):
        def capture(self, run: Callable[[], Any]) -> Captured:
            return Captured(quiet, run())

    with pytest.raises(NotEquivalent, match="a replayed graph"):
        measure.measure(DECODE, Stale(), "cpu", LIMITS, quiet)


@pytest.fixture
def two_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "cells", lambda **_: [DECODE, CHUNK])


def green_gate(*_: Any) -> list[dict[str, Any]]:
    return [{"name": "all", "status": "passed", "detail": "", "seconds": 1.0, "command": ""}]


def red_gate(*_: Any) -> list[dict[str, Any]]:
    check = {"name": "properties", "status": "failed", "detail": "3 failed", "seconds": 1.0}
    return [check | {"command": "", "tail": ["E   assert wrong"]}]


def here(task: Task, take: Callable[[str, dict[str, Any]], None], _: Any) -> None:
    """The worker's work in this process."""
    watched = parent.Watched()

    def say(event: str, **what: Any) -> None:
        if watched.take(event, what):
            take(event, what)

    worker.work(task, say)


def run_here(
    folder: Path, *more: str, run_gate: Any = green_gate, found: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """A dry run in this process, with what the measurement of a whole model found."""
    found = found or {"left_out": "by this test"}
    arguments = ["--dry-run", "--seconds", "100", "--out", str(folder), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "facts", lambda _: Cpu().facts() | host())
        code = command.main(arguments, run_gate=run_gate, measure=here, model=lambda *_: found)
    (path,) = folder.glob("*-gpu*.json")
    assert path.name.endswith("-red.json") is (code != 0)
    return code, json.loads(path.read_text("utf-8"))


@pytest.mark.usefixtures("two_cells")
def test_no_speed_up_is_reported_of_a_wrong_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wrong_backend(attend=reads_kv_head_modulo)
    code, found = run_here(tmp_path, "--backend", name)
    said = capsys.readouterr().out
    assert code == 1
    assert [cell["cell"] for cell in found["wrong"]] == [DECODE.name, CHUNK.name]
    assert found["cells"] == []
    assert not found["green"]
    assert "NOT EQUIVALENT" in said
    assert "no speed-up is reported" in said
    assert "speed-up fresh" not in said
    assert "targets" not in said


@pytest.mark.usefixtures("two_cells")
def test_once_wrong_the_rest_is_checked_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_when_decoding(p: Problem, selection: Selection) -> Any:
        return (reads_kv_head_modulo if p.Lq == 1 else CPU.attend)(p, selection)

    code, found = run_here(tmp_path, "--backend", wrong_backend(attend=wrong_when_decoding))
    assert code == 1
    assert [cell["cell"] for cell in found["wrong"]] == [DECODE.name]
    (chunk,) = found["cells"]
    assert chunk["name"] == CHUNK.name
    assert chunk["sides"] == chunk["ratios"] == []
    assert "speed-up fresh" not in capsys.readouterr().out


@pytest.mark.usefixtures("two_cells")
def test_measured_anyway_no_speed_up_is_printed_and_no_page_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = wrong_backend(attend=reads_kv_head_modulo)
    code, found = run_here(tmp_path, "--backend", name, "--measure-anyway", run_gate=red_gate)
    said = capsys.readouterr().out
    assert code == 1
    assert not found["green"]
    assert [cell["not_equivalent"] != "" for cell in found["cells"]] == [True, True]
    assert found["cells"][0]["sides"]
    assert found["cells"][0]["ratios"] == found["targets"] == []
    assert "CHECKS DID NOT PASS" in said
    assert "speed-up fresh" not in said
    with pytest.raises(page.Refused, match=r"properties failed; decode .*k for everything"):
        page.accept(found | {"dry_run": False})


def test_a_red_check_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured all the same")

    monkeypatch.setattr(worker, "work", never)
    code, found = run_here(tmp_path, run_gate=red_gate)
    said = capsys.readouterr().out
    assert code == 1
    assert "properties failed: 3 failed" in said
    assert "assert wrong" in said
    assert "nothing is measured" in said
    assert not found["green"]
    with pytest.raises(page.Refused, match="properties failed"):
        page.accept(found | {"dry_run": False})


def test_checks_only_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "work", None)
    code, found = run_here(tmp_path, "--checks-only")
    assert code == 0
    assert found["green"]
    assert not found["finished"]
    assert found["cells"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the whole benchmark")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)], run_gate=red_gate) == 1
    assert "no NVIDIA GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# --- cells, memory and time ---------------------------------------------------------------


def test_the_important_cells_come_first_and_all_are_there() -> None:
    names = [cell.name for cell in plan.cells()]
    assert len(set(names)) == len(names) == 4 * 3 * 3 + 3
    assert names[:4] == [
        "decode 32/8/128 n 128K B 1",
        "decode 32/8/128 n 1M B 1",
        "prefill 32/8/128 n 128K B 1 Lq 512",
        "prefill 32/8/128 n 1M B 1 Lq 512",
    ]
    assert {target.cell for target in report.TARGETS} == set(names[:5])
    assert [cell.name for cell in plan.cells(quick=True)] == names[:4]
    reused = [cell.name for cell in plan.cells() if cell.planned is not None]
    assert reused == [
        *(names[0], names[1], "decode 32/8/128 n 32K B 1", "decode 32/8/128 n 128K B 8")
    ]
    assert names[4:6] == reused[2:]
    batches = [cell.B for cell in plan.cells()[6:]]
    assert batches == sorted(batches)
    dry = [cell.name for cell in plan.cells(dry=True)]
    assert len(set(dry)) == len(dry) == len(names)


def test_cells_are_left_out_from_the_end_when_time_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(worker.time, "time", lambda: clock[0])

    def slow(cell: Cell, *_: Any) -> dict[str, Any]:
        clock[0] += 20.0
        return cell.facts()

    monkeypatch.setattr(worker, "measure", slow)
    heard: list[tuple[str, str]] = []
    say = lambda event, **what: heard.append((event, what.get("cell", "")))  # noqa: E731
    worker.work(Task("cpu", ends_at=1100.0, dry=True, quick=False), say)
    names = [cell.name for cell in plan.cells(dry=True)]
    # 80 s are left after the first: a cell is begun while 1.5 times what one takes, and 2 s, are.
    assert [name for event, name in heard if event == "cell"] == names[:4]
    assert [name for event, name in heard if event == "left out"] == names[4:]


def test_a_cell_is_begun_only_if_it_is_likely_to_end() -> None:
    assert plan.fits(12.0, [])
    assert not plan.fits(11.9, [])
    assert plan.fits(5.0, [1.0, 2.0, 30.0])
    assert not plan.fits(4.9, [1.0, 2.0, 30.0])


def test_headlines_get_more_rounds_and_none_gets_it_all() -> None:
    headline, other = plan.cells()[0], plan.cells()[-1]
    assert 2.0 <= plan.seconds_for(headline, 240.0, 39) <= 5.0
    assert 0.4 <= plan.seconds_for(other, 5.0, 30) < plan.seconds_for(other, 240.0, 39) <= 2.5


def test_a_cell_that_does_not_fit_into_memory_is_skipped_and_said() -> None:
    with pytest.raises(Skipped, match=r"needs about 2\.0 GiB, 1\.0 GiB are free"):
        measure.measure(DECODE, Cpu(free_bytes=2**30), "cpu", LIMITS, quiet)
    sizes = {cell.name: plan.memory(cell) / 2**30 for cell in plan.cells()}
    assert sizes["decode 32/8/128 n 1M B 32"] > 160
    assert sizes["decode 32/8/128 n 1M B 8"] < 70
    assert sizes["decode 32/8/128 n 1M B 1"] < 16


# --- inputs -------------------------------------------------------------------------------


def test_inputs_have_something_to_select() -> None:
    cell = Cell("decode", 32, 8, 128, 16 * 1024)
    p = draw(cell, torch.device("cpu"), torch.bfloat16)
    assert (p.B, p.Hq, p.Hkv, p.Lq, p.D, p.Lk) == (1, 32, 8, 1, 128, cell.n)
    _, info = truth.attention(p, "cpu", return_info=True)
    assert 0.8 < info.retained_mass.mean() < 0.9999
    recent = replace(p, config=replace(p.config, k=0, n_local=p.config.k + p.config.n_local))
    _, without = truth.attention(recent, "cpu", return_info=True)
    assert without.retained_mass.mean() < info.retained_mass.mean() - 0.1


def test_a_seed_reproduces_its_inputs() -> None:
    def keys(seed: int) -> Tensor:
        return draw(CHUNK, torch.device("cpu"), torch.float32, seed).k_cache

    assert torch.equal(keys(1), keys(1))
    assert not torch.equal(keys(1), keys(2))


def test_rows_that_come_twice_are_added_twice() -> None:
    x = torch.ones(4, 2, dtype=torch.bfloat16)
    add_rows(x, torch.tensor([1, 3, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert x.tolist() == [[1, 1], [7, 9], [1, 1], [4, 5]]


# --- what it is compared with -------------------------------------------------------------


def _asked(cell: Cell) -> tuple[Asked, Any]:
    problem = draw(cell, torch.device("cpu"), torch.bfloat16)
    asked = Asked(problem.q, problem.k_cache, problem.v_cache, problem.scale)
    return asked, truth.exact_of(problem).dense


# What is compiled on a GPU is not here.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cell", [DECODE, CHUNK], ids=lambda cell: cell.kind)
def test_rivals_that_run_here_are_dense_attention(cell: Cell) -> None:
    asked, exact = _asked(cell)
    ran = set()
    for rival in rivals.dense(cell.Lq, cell.B):
        try:
            ready = rival.prepare(asked)
            with ready.around():
                out = ready.run()
        except (RuntimeError, NotImplementedError):
            continue
        assert out.shape == asked.q.shape, rival.name
        assert exact.share(out) <= 1, rival.name
        ran.add(rival.name)
    decode = {"sdpa flash, enable_gqa", "sdpa math, group folded", "flex_attention, compiled"}
    chunk = {"sdpa flash, causal_lower_right, enable_gqa", "flex_attention, compiled"}
    assert ran >= (decode if cell.Lq == 1 else chunk)


def test_every_backend_of_sdpa_is_tried_both_ways() -> None:
    names = {rival.name for rival in rivals.dense(1, 8)}
    for backend in ("flash", "efficient", "cudnn", "math"):
        assert {f"sdpa {backend}, enable_gqa", f"sdpa {backend}, group folded"} <= names
    assert {"flex_attention, compiled", "matmul, float32 logits"} <= names


def test_the_products_of_groups_are_what_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one rival that has no kernel on the CPU, with a product that has."""
    bmm = torch.bmm

    def on_cpu(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", on_cpu)
    asked, exact = _asked(DECODE)
    assert exact.share(rivals._matmul(asked).run()) <= 1


def test_a_group_as_heads_of_a_batch_entry_is_the_same_attention() -> None:
    asked, exact = _asked(CHUNK)
    ready = rivals._chunk_lower_right_expanded(asked)
    assert exact.share(ready.run()) <= 1  # by whichever kernel the CPU has


class Flash:
    """Stands in for FlashInfer's module: what the real one computes, in torch's words."""

    def __init__(self) -> None:
        self.static: tuple[Any, ...] = ()

    def single_decode_with_kv_cache(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        assert given["kv_layout"] == "HND"
        settings = {"scale": given["sm_scale"], "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(
            q[None, :, None], k[None], v[None], **settings
        )[0, :, 0]

    def single_prefill_with_kv_cache(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        assert given["causal"]
        assert given["kv_layout"] == "HND"
        asked = Asked(q.transpose(0, 1)[None], k[None], v[None], given["sm_scale"])
        return rivals._chunk_lower_right(asked).run()[0].transpose(0, 1)

    def BatchDecodeWithPagedKVCacheWrapper(self, *_: Any, **__: Any) -> "Flash":
        return self

    def plan(self, *given: Any, **named: Any) -> None:
        self.static, self.scale = given, named["sm_scale"]

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        indptr, indices, last, Hq, Hkv, D, page_size = self.static
        assert (q.shape[1], pages[0].shape[1:]) == (Hq, (Hkv, page_size, D))
        outs = []
        for b in range(len(q)):
            mine = indices[indptr[b] : indptr[b + 1]].long()
            n = (len(mine) - 1) * page_size + int(last[b])
            k, v = (x[mine].transpose(0, 1).flatten(1, 2)[:, :n] for x in pages)
            outs.append(self.single_decode_with_kv_cache(
                q[b], k, v, kv_layout="HND", sm_scale=self.scale))  # fmt: skip
        return torch.stack(outs)


def test_flashinfer_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", Flash())
    monkeypatch.setattr(rivals, "has_flashinfer", lambda: True)
    paged = replace(DECODE, n=608)
    cases = [(paged, 1), (replace(paged, B=1), 2), (CHUNK, 1)]
    for cell, expected in cases:
        asked, exact = _asked(cell)
        named = [rival for rival in rivals.dense(cell.Lq, cell.B) if "flashinfer" in rival.name]
        assert len(named) == expected
        for rival in named:
            assert exact.share(rival.prepare(asked).run()) <= 1, rival.name


# --- arithmetic ---------------------------------------------------------------------------


def test_median_and_spread() -> None:
    assert measure.spread([4.0, 1.0, 2.0, 3.0], "_us") == {
        "median_us": 2.5,
        "p10_us": pytest.approx(1.3),
        "p90_us": pytest.approx(3.7),
    }
    assert measure.percentile([7.0], 0.9) == 7.0
    assert measure.percentile(list(range(11)), 0.1) == 1.0


def side(name: str, role: str, **notes: Any) -> Side:
    return Side(name, role, Ready(quiet), 8, notes)


def test_the_strongest_exact_rival_of_a_mode_is_the_one_compared_with() -> None:
    sides = [
        side("fresh", "whole"),
        side("attend", "stage"),
        side("select", "stage"),
        side("rounded", "dense", is_baseline=False, share_of_budget=3.0),
        side("broken", "dense", error="RuntimeError"),
        side("one", "dense", is_baseline=True),
        side("other", "dense", is_baseline=True),
        side("near", "gathered", is_baseline=True),
    ]
    graph = {
        "fresh": [2.0, 2.0, 4.0],
        "attend": [1.0, 1.0, 1.0],
        "select": [1.0],
        "rounded": [1.0] * 3,
        "one": [8.0, 9.0, 8.0],
        "other": [4.0, 6.0, 4.0],
        "near": [3.0],
    }
    eager = graph | {"one": [3.0, 3.0, 3.0]}
    found = {(r["of"], r["mode"], r["role"]): r
             for r in measure.ratios(sides, {"graph": graph, "eager": eager})}  # fmt: skip
    fresh = found["fresh", "graph", "dense"]
    assert (fresh["to"], fresh["median"]) == ("other", 2.0)
    assert fresh["p10"] == pytest.approx(1.2)
    assert found["fresh", "eager", "dense"]["to"] == "one"
    assert found["attend", "graph", "gathered"]["median"] == 3.0
    assert ("select", "graph", "topk") not in found


class Clock(Cpu):
    """A device that tells the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def eager(self, run: Callable[[], Any]) -> Callable[[], float]:
        self.order.append(run())
        return lambda: 1.0

    queued = eager


def test_sides_alternate_and_slow_ones_run_thrice() -> None:
    device = Clock()
    sides = [
        Side("a", "whole", Ready(lambda: "a")),
        Side("b", "dense", Ready(lambda: "b"), notes={"slow": "yes"}),
        Side("c", "dense", Ready(lambda: "c")),
        Side("d", "dense", Ready(lambda: "d"), notes={"error": "no"}),
    ]
    limits = Limits(lambda: 9.0, 9.0, (5, 5))
    first = {"a": 1.0, "b": 9.0, "c": 1.0}
    times = measure.alternate(sides, "eager", device, first, limits)
    assert "".join(device.order) == "acb" + "bca" + "acb" + "ca" + "ac"
    assert {name: len(took) for name, took in times.items()} == {"a": 5, "b": 3, "c": 5}


def test_a_slow_rival_is_told_apart_by_the_fastest_exact_one() -> None:
    sides = [
        side("quick but wrong", "dense", is_baseline=False),
        side("fast", "dense", is_baseline=True),
        side("slow", "dense", is_baseline=True),
        side("ours", "whole"),
    ]
    first = {"quick but wrong": 0.1, "fast": 1.0, "slow": 5.1, "ours": 99.0}
    measure._set_slow_apart(sides, first)
    assert [side.name for side in sides if "slow" in side.notes] == ["slow"]


# --- CUDA's calls, in CUDA's absence ------------------------------------------------------


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> tuple[Cuda, list[str]]:
    """A `Cuda` whose every call to torch.cuda is written down."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: "Event") -> float:
            return 2.5

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            pass

        def wait_stream(self, other: "Stream") -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append(f"end of {name}")

    for name, stub in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: within("capture"),
        "stream": lambda stream: within("stream"),
        "set_stream": lambda stream: log.append("back"),
        "current_stream": lambda device: Stream(),
        "synchronize": lambda device: log.append("synchronize"),
        "empty_cache": lambda: log.append("empty"),
        "mem_get_info": lambda device: (3, 4),
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(Cuda, "_flush", lambda self: log.append("flush"))
    device = object.__new__(Cuda)
    device.at = torch.device("cpu")
    return device, log


def test_an_eager_call_is_timed_from_an_idle_device(logged: tuple[Cuda, list[str]]) -> None:
    device, log = logged
    reading = device.eager(lambda: log.append("run"))
    assert log == ["flush", "synchronize", "record", "run", "record"]
    assert reading() == 2.5


def test_a_replay_is_queued_behind_the_flush(logged: tuple[Cuda, list[str]]) -> None:
    device, log = logged
    device.queued(lambda: log.append("run"))
    assert log == ["flush", "record", "run", "record"]


def test_a_call_is_warmed_up_beside_before_it_is_captured(logged: tuple[Cuda, list[str]]) -> None:
    device, log = logged
    captured = device.capture(lambda: log.append("run") or 7)
    beside = ["wait", "stream", "run", "run", "run", "end of stream", "wait", "synchronize"]
    assert log == [*beside, "capture", "run", "end of capture"]
    assert captured.result == 7
    captured.replay()
    assert log[-1] == "replay"
    assert device.free_bytes() == 3


def test_a_capture_that_breaks_off_leaves_the_stream_as_it_was(
    logged: tuple[Cuda, list[str]],
) -> None:
    device, log = logged

    def run() -> None:
        if "capture" in log:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture(run)
    assert log[-1] == "back"


def test_the_flush_writes_and_then_reads_more_than_the_cache_holds() -> None:
    device = object.__new__(Cuda)
    device._buffer, device._sum = torch.zeros(1000), torch.zeros(())
    device._flush()
    assert device._sum == 1000


# --- the gate -----------------------------------------------------------------------------


def _python(code: str, judge: Any = gate.by_exit_code, name: str = "it") -> gate.Check:
    return gate.Check(name, (sys.executable, "-c", code), judge)


def test_checks_run_at_the_same_time_and_are_stopped_in_time(tmp_path: Path) -> None:
    hang = "import time; print('begun', flush=True); time.sleep(60)"
    wanted = [
        _python("print('fine')", name="good"),
        _python("print('E  worse'); raise SystemExit(3)", name="bad"),
        _python(hang, name="late"),
        gate.Check("absent", None, gate.by_exit_code, "no such tool"),
    ]
    heard: list[str] = []
    found = {check["name"]: check for check in gate.run(wanted, 2.0, tmp_path, heard.append)}
    assert {name: check["status"] for name, check in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "late": "unfinished",
        "absent": "skipped",
    }
    assert "worse" in "".join(found["bad"]["tail"])
    assert any("SKIPPED" in line for line in heard)
    assert not gate.is_green(list(found.values()))
    assert gate.is_green([found["good"], found["absent"]])
    assert not gate.is_green([])


def _junit(folder: Path, outcomes: dict[str, str]) -> None:
    cases = "".join(
        f'<testcase name="{name}">{"" if outcome == "passed" else f"<{outcome}/>"}</testcase>'
        for name, outcome in outcomes.items()
    )
    (folder / "properties.xml").write_text(
        f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
    )


def test_the_properties_are_judged_by_what_they_wrote(tmp_path: Path) -> None:
    _junit(tmp_path, {"test_law[a]": "passed", "test_law[b]": "skipped"})
    assert gate.by_junit(Done(0, "ok", tmp_path)).status == "passed"
    _junit(tmp_path, {"test_law[a]": "passed", "test_law[b]": "skipped", "test_law[c]": "skipped"})
    assert gate.by_junit(Done(0, "ok", tmp_path)).status == "failed"  # beyond most laws
    _junit(tmp_path, {"test_law[a]": "passed"})
    assert gate.by_junit(Done(None, "...", tmp_path)).status == "unfinished"
    assert gate.by_junit(Done(5, "no tests ran", tmp_path)).status == "failed"
    _junit(tmp_path, {"test_law[a]": "failure"})
    late = gate.by_junit(Done(None, "...", tmp_path))
    assert late.status == "failed"
    assert "test_law[a]" in late.detail


def test_only_what_the_sanitizer_found_is_a_failure() -> None:
    def verdict(code: int | None, text: str) -> str:
        return gate.by_sanitizer(Done(code, text, ROOT)).status

    assert verdict(0, "tiny: done\n========= ERROR SUMMARY: 0 errors") == "passed"
    invalid = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors"
    assert verdict(1, invalid) == "failed"
    assert verdict(1, "not finite\n========= ERROR SUMMARY: 0 errors") == "failed"
    assert verdict(1, "CUDA error: an illegal memory access was encountered") == "failed"
    assert verdict(1, "Device not supported") == "skipped"
    assert verdict(None, "") == "skipped"


def test_hazards_are_failures_and_warnings_are_told() -> None:
    def verdict(code: int | None, text: str) -> gate.Verdict:
        return gate.by_racecheck(Done(code, text, ROOT))

    summary = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)"
    assert verdict(0, summary.format(0, 0, 0)) == ("passed", "0 errors, 0 warnings")
    assert verdict(0, summary.format(2, 0, 2)) == ("passed", "0 errors, 2 warnings")
    race = "========= Error: Race reported between Write access at keep and Read access at keep\n"
    found = verdict(
        1, race + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    )
    assert found.status == "failed"
    assert "Race reported between Write access" in found.detail
    assert verdict(1, "not finite\n" + summary.format(0, 0, 0)).status == "failed"
    assert verdict(1, "Device not supported").status == "skipped"
    assert verdict(None, "").status == "skipped"


def test_the_properties_and_the_small_calls_pass_as_they_are_called(tmp_path: Path) -> None:
    """As a dry run makes them: a GPU run does, but for a few options."""
    every = gate.checks("cpu", tmp_path, dry=True, quick=False)
    wanted = [check for check in every if check.name in ("properties", "memcheck", "racecheck")]
    found = gate.run(wanted, fresh.HANG, tmp_path, quiet)
    assert {check["name"]: check["status"] for check in found} == {
        "properties": "passed",
        "memcheck": "passed",
        "racecheck": "skipped",  # the same calls as memcheck's
    }, found


def test_the_checks_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gate.shutil, "which", lambda name: None)
    found = {c.name: c for c in gate.checks("triton", tmp_path, dry=False, quick=False)}
    parts = [f"tokenselect.check-{i}-of-2" for i in range(1, 3)]
    sanitizers = ["memcheck", "racecheck"]
    halves = ["graphs-1-of-2", "graphs-2-of-2"]
    assert list(found) == [*sanitizers, *parts, "determinism", *halves, "properties"]
    assert not any(check.after for check in found.values())
    assert [found[name].command for name in sanitizers] == [None, None]
    assert "no compute-sanitizer" in found["racecheck"].detail
    properties = " ".join(found["properties"].command or ())
    assert "pytest properties --backend=triton --hypothesis-profile=device" in properties
    assert "-p no:cacheprovider -o minversion=7.0" in properties
    assert "-k triton and not mistake" in properties
    quick = gate.checks("triton", tmp_path, dry=False, quick=True)
    assert [c.name for c in quick if c.command is None] == [*sanitizers, "properties"]
    (graphs,) = (c for c in quick if c.name == "graphs")
    assert graphs.command is not None
    assert graphs.command[-1] == "--quick"
    monkeypatch.setattr(gate.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {c.name: c for c in gate.checks("triton", tmp_path, dry=False, quick=False)}
    for name in sanitizers:
        words = " ".join(found[name].command or ())
        assert f"compute-sanitizer --tool {name}" in words
        assert "bench.gpu.probe small --backend triton" in words
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in found["racecheck"].environment
    assert [name for name, check in found.items() if check.after] == parts[:1]


def test_parts_of_the_rules_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(check.KINDS)
    ran: list[str] = []
    for part in (1, 2, 3):
        monkeypatch.setattr(check, "KINDS", dict.fromkeys(every))
        monkeypatch.setattr(check, "main", lambda _: ran.extend(check.KINDS) or 0)
        assert probe.main(["rules", "--part", str(part), "--of", "3"]) == 0
    assert sorted(ran) == sorted(every)


def test_repeats_that_differ_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    name = wrong_backend(attend=answers_otherwise_each_time())
    assert probe.main(["determinism", "--backend", name, "--dry-run"]) == 1
    assert "lse of repeat 1 differ" in capsys.readouterr().out


# --- plans and graphs ---------------------------------------------------------------------


def ground(backend: str = "cpu") -> graphs.Ground:
    return graphs.Ground(backend, Cpu(), dry=True, interface=Recorded())


def only(check: Callable[[graphs.Ground], str]) -> list[graphs.Named]:
    return [named for named in graphs.CHECKS if named.run is check]


def planned_backend(**bent: Any) -> str:
    assert CPU.static is not None
    return wrong_backend(static=CPU.static._replace(**bent))


def reuses_what(decide_reuse: Callable[[Any], Any]) -> str:
    """A backend whose decisions are the reference's, then bent."""

    def bent(problem: Problem, memory: Any, theta: float | None) -> Any:
        return decide_reuse(decide_right(problem, memory, theta))

    decide_right = reference.decide_reuse
    return wrong_backend(reuse=Reuse(bent, reference.update))


def never_reuses(decision: Any) -> Any:
    reused = torch.zeros_like(decision.reused)
    return decision._replace(reused=reused)


def reads_a_length(p: Problem, selection: Selection, out: Tensor | None) -> Any:
    assert CPU.static is not None
    assert int(p.cache_seqlens[0]) >= 0
    return CPU.static.attend(p, selection, out)


def remembers_the_first_lengths() -> Callable[..., Any]:
    """Right in calls of one length each; a replay would not see it."""
    first: list[Tensor] = []

    def attend(p: Problem, selection: Selection, out: Tensor | None) -> Any:
        assert CPU.static is not None
        first.append(p.cache_seqlens.clone())
        old = first[0] if first[0].shape == p.cache_seqlens.shape else p.cache_seqlens
        attended = CPU.static.attend(p, selection, out)
        attended.lse.add_((p.cache_seqlens - old)[:, None, None])
        return attended

    return attend


def computes_at_capture() -> Callable[..., Any]:
    """A number of the host's, which a graph keeps as it was."""
    calls = [0]

    def attend(p: Problem, selection: Selection, out: Tensor | None) -> Any:
        assert CPU.static is not None
        calls[0] += 1
        attended = CPU.static.attend(p, selection, out)
        attended.lse.add_(calls[0])
        return attended

    return attend


@pytest.mark.parametrize(
    ("make", "check", "complaint"),
    [
        (lambda: planned_backend(attend=reads_a_length), graphs.calls_and_replays, "NotCapturable"),
        (
            lambda: planned_backend(attend=remembers_the_first_lengths()),
            graphs.calls_and_replays,
            "a plan and attention: lse",
        ),
        (
            lambda: planned_backend(attend=computes_at_capture()),
            graphs.calls_and_replays,
            "lse",
        ),
        (lambda: reuses_what(never_reuses), graphs.decisions, "hits: "),
        (lambda: reuses_what(never_reuses), graphs.waits_for_nothing, "hits and misses, not"),
    ],
    ids=["reads", "remembers", "counts", "decides otherwise", "never hits"],
)
def test_a_plan_that_is_wrong_turns_the_check_red(
    make: Callable[[], str], check: Any, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        assert graphs.run(ground(make()), only(check)) == 1
    assert complaint in capsys.readouterr().out


def test_a_graph_that_replays_nothing_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    class Stale(Recorded):
        def capture(self, *given: Any) -> Any:
            outputs, replay = super().capture(*given)
            replay()
            return outputs, quiet

    stale = replace(ground(), interface=Stale())
    register("stale", replace(CPU, name="stale"))
    with torch.no_grad():
        for check in (graphs.calls_and_replays, graphs.several_layers, graphs.many_replays):
            assert graphs.run(replace(stale, backend="stale"), only(check)) == 1
    said = capsys.readouterr().out
    assert "a graph and the plan" in said
    assert "4 layers of stale, step" in said
    assert "replay 20" in said or "after 20 replays" in said


def test_parts_of_the_checks_of_graphs_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(_: Any, wanted: Any) -> int:
        ran.extend(named.name for named in wanted)
        return 0

    monkeypatch.setattr(graphs, "run", note)
    for part in ("1", "2"):
        assert probe.main(["graphs", "--dry-run", "--part", part, "--of", "2"]) == 0
    assert sorted(ran) == sorted(named.name for named in graphs.CHECKS)


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's calls, which do nothing here; what they were told."""
    told: dict[str, Any] = {"modes": [], "streams": [], "allocated": 0}
    for name, stub in {
        "Stream": object,
        "stream": lambda stream: contextlib.nullcontext(told["streams"].append(stream)),
        "current_stream": object,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "memory_stats": lambda: {"allocation.all.allocated": told["allocated"]},
        "memory_allocated": lambda: 1,
        "memory_reserved": lambda: told["allocated"],
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: told["modes"].append(mode),
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stub)
    return told


class OnCuda(graphs.Ground):
    on_cuda = True  # type: ignore[assignment]


def test_what_needs_cuda_calls_it_as_it_is_to_be_called(like_cuda: dict[str, Any]) -> None:
    on = OnCuda("cpu", Cpu(), dry=True, interface=Recorded())
    with torch.no_grad():
        assert "calls, each way" in graphs.two_streams(on)
        graphs.waits_for_nothing(on)
        graphs.many_replays(on)
    assert like_cuda["modes"] == ["error", 0] * 2
    assert len(set(map(id, like_cuda["streams"]))) > 2


def test_waiting_and_taking_memory_are_noticed(like_cuda: dict[str, Any]) -> None:
    on = OnCuda("cpu", Cpu(), dry=True, interface=Recorded())
    with pytest.raises(graphs.Differs, match="it: 3 allocations"), graphs._no_waiting(on, "it"):
        like_cuda["allocated"] += 3
    with pytest.raises(graphs.Differs, match="it: called a sync"), graphs._no_waiting(on, "it"):
        raise RuntimeError("called a synchronizing CUDA operation")

    class Takes(Recorded):
        def capture(self, *given: Any) -> Any:
            outputs, replay = super().capture(*given)

            def taking() -> None:
                like_cuda["allocated"] += 1
                replay()

            return outputs, taking

    with torch.no_grad(), pytest.raises(graphs.Differs, match="memory allocated and reserved"):
        graphs.many_replays(replace(on, interface=Takes(), backend=wrong_backend()))


def test_a_backend_without_plans_is_not_held_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert graphs.run(ground(wrong_backend(static=None))) == 0
    assert "NOTHING IS CHECKED" in capsys.readouterr().out


REUSED = replace(DECODE, n=160, planned=plan.PlannedSteps(layers=2, max_reuse=10, short=120))


def test_a_wrong_plan_is_not_timed() -> None:
    assert CPU.static is not None
    right = CPU.static.attend

    def rounds(p: Problem, selection: Selection, out: Tensor | None) -> Any:
        attended = right(p, selection, out)
        coarse = attended.out.to(torch.float8_e4m3fn).to(attended.out.dtype)
        return attended._replace(out=attended.out.copy_(coarse))

    with pytest.raises(NotEquivalent, match=r"a plan is .* budget away"):
        measure.measure(REUSED, Cpu(), planned_backend(attend=rounds), LIMITS, quiet)


def test_a_step_that_does_not_reuse_is_not_timed_as_one_that_does() -> None:
    # It computes what it should, all over again.
    with pytest.raises(NotEquivalent, match=r"hit, graph: layer 0, request 0: 0 hits"):
        measure.measure(REUSED, Cpu(), reuses_what(never_reuses), LIMITS, quiet)


def test_a_replay_that_keeps_its_first_inputs_is_noticed() -> None:
    problem, how = _traced(1, 10)
    (_, _, _, mixed) = reuse.kinds(problem, "cpu", how, reuse.copies(problem, 2, 2**40))
    with mixed.steps.next():
        first = mixed.steps.run().clone()
    reuse.hold(mixed, mixed.steps.run, "called", 10, exact=False)
    with pytest.raises(NotEquivalent, match="mixed, replayed: step 6, layer 0 is"):
        reuse.hold(mixed, lambda: mixed.steps.out.copy_(first), "replayed", 10, exact=False)


def test_without_plans_a_cell_says_so_and_is_measured() -> None:
    found = measure.measure(REUSED, Cpu(), wrong_backend(static=None), LIMITS, quiet)
    (said,) = (side for side in found["sides"] if side["role"] == "planned")
    assert "no stages that a plan can run" in said["error"]
    assert found["ratios"]


def _traced(B: int, max_reuse: int) -> tuple[Problem, plan.PlannedSteps]:
    cell = replace(DECODE, n=160, B=B)
    problem = draw(cell, torch.device("cpu"), torch.bfloat16)
    return problem, plan.PlannedSteps(layers=2, max_reuse=max_reuse)


def test_of_a_mixed_trace_each_request_reuses_four_in_five_and_not_all_at_once() -> None:
    problem, how = _traced(3, 64)
    trace = reuse.mixed(problem, how)
    assert trace.n_runs == 12
    room = replace(problem, max_reuse=64)
    cache = SelectionCache(reuse.THETA, 64)
    reused = []
    for q, lengths in zip(trace.queries, trace.lengths, strict=True):
        at = replace(room, q=q, cache_seqlens=lengths)
        _, info = truth.attention(at, "cpu", cache=cache, return_info=True)
        reused.append(info.reused)
    hits = torch.stack(reused[1:])
    assert (hits.view(12, 5, 3).sum(1) == 4).all()
    assert (~hits).sum(1).max() == 1


def test_inputs_move_from_run_to_run_and_go_back_with_what_was_remembered() -> None:
    problem, how = _traced(2, 10)
    layers = reuse.copies(problem, 2, 2**40)
    (hit, _, _, mixed) = reuse.kinds(problem, "cpu", how, layers)
    for kind in (hit, mixed):
        steps = kind.steps
        steps.count_anew()
        seen = []
        for _ in range(2 * steps.trace.n_runs + 1):
            with steps.next():
                seen += steps._lengths[:, 0].tolist()
                steps.run()
        steps.counted()
        growing = list(range(151, 161))
        assert seen == [*growing, *growing, *growing[: steps.trace.width]]
    assert hit.steps.calls == 2
    assert mixed.steps.calls == 10


def test_as_many_copies_of_the_cache_as_a_third_of_memory_holds() -> None:
    problem, _ = _traced(1, 10)
    size = 2 * problem.k_cache.numel() * 2
    for free, expected in ((0, 1), (3 * size, 2), (10 * size, 4), (2**40, 4)):
        layers = reuse.copies(problem, 4, free)
        assert len(layers) == 4
        assert len({k.data_ptr() for k, _ in layers}) == expected
        assert layers[0][0] is problem.k_cache


def test_times_are_those_of_one_call() -> None:
    device = Clock()
    sides = [Side("a", "planned", Ready(lambda: "a"), calls=4)]
    times = measure.alternate(sides, "eager", device, {"a": 1.0}, Limits(lambda: 9.0, 9.0, (3, 3)))
    assert times == {"a": [0.25] * 3}


# --- the parent and its worker ------------------------------------------------------------

_FAKE = """
import json, os, sys, time
task = json.load(open(sys.argv[1]))
def say(event, **what): print({mark!r} + json.dumps(dict(event=event, **what)), flush=True)
for cell in ["first", "second", "third"]:
    if cell in task["done"]: continue
    say("start", cell=cell)
    if cell == "first":
        say("rival", name="fine")
        if "hangs" not in task["banned"].get(cell, []):
            say("rival", name="hangs"); time.sleep(60)
    if cell == "second":
        say("step", text="checking"); print("Segmentation fault"); sys.stdout.flush(); os._exit(139)
    say("cell", cell=cell, result=dict(name=cell, banned=task["banned"].get(cell, [])))
say("end")
"""


def test_a_lost_worker_is_replaced_and_someone_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(_FAKE.format(mark=worker.MARK))
    monkeypatch.setattr(parent, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(parent, "SILENCE", 1.5)
    taken: list[tuple[str, dict[str, Any]]] = []
    said: list[str] = []
    task = Task("cpu", ends_at=parent.time.time() + 50)
    parent.supervise(task, lambda event, what: taken.append((event, what)), said.append)
    assert [(event, what["cell"]) for event, what in taken] == [
        *(("cell", "first"), ("wrong", "second"), ("cell", "third"))
    ]
    assert taken[0][1]["result"]["banned"] == ["hangs"]
    assert "exit code 139, checking" in taken[1][1]["why"]
    assert any("said nothing" in line for line in said)
    assert any("Segmentation fault" in line for line in said)


def test_a_worker_is_stopped_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(_FAKE.format(mark=worker.MARK))
    monkeypatch.setattr(parent, "COMMAND", (sys.executable, str(script)))
    taken: list[tuple[str, dict[str, Any]]] = []
    task = Task("cpu", ends_at=parent.time.time() - 1)
    parent.supervise(task, lambda event, what: taken.append((event, what)), quiet)
    assert [(event, what["cell"]) for event, what in taken] == [("left out", "first")]


def test_a_rival_that_breaks_the_device_ends_the_process() -> None:
    class Broken(Cpu):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    with pytest.raises(measure.DeviceLost, match="misaligned"):
        measure._check_alive(Broken(), RuntimeError("misaligned address\nmore"))


# --- targets and the page -----------------------------------------------------------------


def _times(median: float, **more: float) -> dict[str, float]:
    spread = {"median_us": median, "p10_us": 0.9 * median, "p90_us": 1.2 * median}
    return spread | {"rounds": 30} | more


def made_up(**changes: Any) -> dict[str, Any]:
    """A report as a GPU might give it. The figures are nobody's: they test the page alone."""
    cells = []
    for cell in plan.cells(quick=True):
        ratio = {"mode": "graph", "role": "dense", "to": "sdpa flash, group folded"}
        spread = {"median": 7.0, "p10": 6.5, "p90": 7.25}
        sides = [
            {"name": "fresh", "role": "whole", "bytes": 10**9, "graph": _times(321.0)},
            {"name": "score", "role": "stage", "bytes": 10**9,
             "graph": _times(300.0, gb_per_s=2700.0), "eager": _times(310.0, gb_per_s=2600.0)},
            {"name": "select", "role": "stage", "bytes": 4 * 10**6, "graph": _times(61.0)},
            {"name": "attend", "role": "stage", "bytes": 11 * 10**6, "graph": _times(14.0)},
            {"name": "sdpa flash, group folded", "role": "dense", "bytes": 4 * 10**9,
             "share_of_budget": 0.3, "is_baseline": True, "graph": _times(2247.0)},
            {"name": "sdpa cudnn, enable_gqa", "role": "dense", "bytes": 4 * 10**9,
             "error": "RuntimeError: No available | kernel"},
            {"name": "hit", "role": "planned", "bytes": 10**7, "calls": 16,
             "graph": _times(11.5)},
            {"name": "short", "role": "planned", "bytes": None, "calls": 16,
             "graph": _times(42.0)},
            {"name": "device copy", "role": "copy", "bytes": 10**9,
             "graph": _times(333.0, gb_per_s=3000.0)},
        ]  # fmt: skip
        cells.append(
            cell.facts()
            | {"dtype": "bfloat16", "config": {"k": 2048}, "checks": {"lse": 1e-6}}
            | {"attended": 2688, "sides": sides, "seconds": 3.0}
            | {"reuse": {"layers": 16, "kv_copies": 6, "max_reuse": 64, "theta": 0.9}}
            | {"ratios": [{"of": of, **ratio, **spread} for of in ("fresh", "attend", "mixed")]}
        )
    found = {
        "schema": 1, "kind": "gpu", "dry_run": False, "quick": False, "green": True,
        "finished": True, "date": "2000-01-02T03:04:05+00:00", "command": "python -m bench.gpu",
        "backend": "triton", "seconds": 400.0,
        "machine": {"device": "NVIDIA H100 of nowhere", "driver": "1.2", "cuda": "13.0",
                    "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
                    "memory_bytes": 80 * 2**30},
        "source": {"commit": "0123abc", "tree": "feed"},
        "checks": [{"name": "properties", "status": "passed", "detail": "40 passed",
                    "seconds": 99.0, "command": "pytest"}],
        "copy": [{"median_gb_per_s": 2900.0}], "clock_floor": {"median_us": 2.5},
        "cells": cells, "wrong": [],
        "left_out": [{"cell": "decode 32/8/128 n 1M B 32", "why": "needs 170 GiB"}],
    } | changes  # fmt: skip
    for cell in cells:
        to = {"mode": "graph", "role": "planned", "to": "short, own capacity"}
        cell["ratios"] += [{"of": "hit", **ratio, **spread | {"median": 89.0}}]
        cell["ratios"] += [{"of": "short", **to, "median": 0.8, "p10": 0.7, "p90": 0.9}]
    found["targets"] = report.held(found)
    return found


def test_a_whole_model_is_measured_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert model.main(["--dry-run", "--backend", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [side["name"] for side in found["sides"]][:3] == [model.STOCK, *model.DENSE]
    assert len(found["sides"]) == 5
    fastest = {ratio["over"] for ratio in found["ratios"]} - {model.STOCK}
    assert len(fastest) == 1
    assert fastest < set(model.DENSE)
    text = "\n".join(page._model(found))
    for side in found["sides"]:
        assert f"| {side['name']} | {side['median_ms']:.2f}" in text
        assert f"  {side['name']:44} {side['median_ms']:8.2f}" in report.model_table(
            found, ratios=True
        )
    assert "Not measured: no room" in "\n".join(page._model({"left_out": "no room"}))


def test_a_model_is_measured_in_a_process_whose_end_is_not_overlooked() -> None:
    pytest.importorskip("transformers")
    asked = command.arguments(["--dry-run"])
    assert "sides" in command.whole_model(asked, 100.0)
    asked.backend = "no_such_module:BACKEND"
    assert "No module named 'no_such_module'" in command.whole_model(asked, 100.0)["wrong"]


def test_a_dense_attention_that_is_wrong_in_a_deep_layer_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    dense = model._dense

    def wrong(kind: Any) -> Any:
        return lambda layer, q, k, v: dense(kind)(layer, q, k, v) * (1 - layer)

    monkeypatch.setattr(model, "_dense", wrong)
    assert model.main(["--dry-run", "--backend", "cpu"]) == 1
    assert "layer 1 is" in json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"]


@pytest.mark.parametrize("stage", ["attend", "reuse"])
def test_a_model_whose_plans_are_wrong_is_not_shown_as_measured(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")

    def attend(p: Problem, selection: Selection, out: Any) -> Any:
        out, lse = CPU.static.attend(p, selection, out)
        return out.mul_(-1.0), lse

    def decide_reuse(p: Problem, memory: Any, theta: Any) -> Any:
        nobody = torch.zeros(p.B, dtype=torch.bool)
        found = reference.decide_reuse(p, memory, theta)
        return found._replace(reused=nobody, cache_seqlens=p.cache_seqlens)

    wrong = {
        "attend": {"static": CPU.static._replace(attend=attend)},
        "reuse": {"reuse": Reuse(decide_reuse, reference.update)},
    }
    name = f"model-{stage}"
    register(name, replace(CPU, name=name, **wrong[stage]))
    assert model.main(["--dry-run", "--backend", name]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {"attend": "far from those of attention", "reuse": "did not reuse"}
    assert expected[stage] in found["wrong"]


@pytest.mark.usefixtures("two_cells")
def test_a_wrong_model_turns_the_run_red(tmp_path: Path) -> None:
    code, found = run_here(tmp_path, found={"wrong": "far away"})
    assert code == 1
    assert found["wrong"] == [{"cell": "a whole model", "why": "far away"}]
    assert found["cells"][0]["ratios"] == []


def test_targets_are_judged_on_the_device_they_are_for() -> None:
    rows = {(row["cell"], row["of"]): row for row in made_up()["targets"]}
    decode, chunk = "decode 32/8/128 n {} B 1", "prefill 32/8/128 n {} B 1 Lq 512"
    assert rows[decode.format("128K"), "fresh"]["reached"] is True
    assert rows[decode.format("1M"), "attend"]["reached"] is True
    assert rows[decode.format("1M"), "select"]["reached"] is False
    assert rows[decode.format("1M"), "score"]["graph"] == pytest.approx(0.9)  # of 3000, not 2900
    assert rows[decode.format("1M"), "score"]["reached"] is True
    told = {(row["cell"], row["of"], row["what"]): row for row in made_up()["targets"]}
    assert told[decode.format("128K"), "hit", "us"]["graph"] == 11.5
    assert told[decode.format("128K"), "hit", "us"]["reached"] is True
    assert told[decode.format("32K"), "hit", "us"]["reached"] is None
    assert told[decode.format("128K"), "hit", "speed-up"]["reached"] is True
    assert told[decode.format("1M"), "hit", "speed-up"]["reached"] is False
    assert told[decode.format("128K"), "mixed", "speed-up"]["reached"] is True
    assert told[decode.format("1M"), "short", "cost"]["graph"] == pytest.approx(1.25)
    assert told[decode.format("1M"), "short", "cost"]["reached"] is False
    assert rows[chunk.format("128K"), "fresh"]["reached"] is True
    assert rows[chunk.format("1M"), "fresh"]["reached"] is False
    elsewhere = made_up(machine={"device": "NVIDIA L4", "driver": "1", "torch": "", "triton": "",
                                 "python": ""})  # fmt: skip
    assert {row["reached"] for row in elsewhere["targets"]} == {None}


def test_the_page_has_a_section_of_the_newest_result_of_each_gpu(tmp_path: Path) -> None:
    older = made_up(date="1999-01-01T00:00:00+00:00", command="python -m bench.gpu --old")
    machine = made_up()["machine"] | {"device": "NVIDIA L4"}
    for name, found in (
        ("a", older),
        ("b", made_up()),
        ("c", made_up(machine=machine, quick=True, finished=False)),
    ):
        (tmp_path / f"{name}-gpu.json").write_text(json.dumps(found))
    text = whole_page.page(tmp_path)
    assert "--old" not in text
    assert "### 2000-01-02: NVIDIA H100 of nowhere" in text
    assert "### 2000-01-02: NVIDIA L4" in text
    for shown in (
        *("321.0 (288.9–385.2)", "7.00 (6.50–7.25)", "sdpa flash, group folded (graph)"),
        *("RuntimeError: No available \\| kernel", "needs 170 GiB", "2900 GB/s", "0123abc", "feed"),
        *("a quick run", "cut off before its end", "| reached |", "| missed |", "40 passed"),
    ):
        assert shown in text, shown
    assert "No GPU figure" not in text
    decode = "decode 32/8/128 n 128K B 1"
    assert f"| {decode} | 321.0 | 300.0 | 61.0 | 14.0 | 2247.0 | - | - |" in text
    assert f"| {decode} | 11.5 | - | - | - | 42.0 | - | 89.00 (6.50–7.25) | - | 7.00" in text
    assert "16 layers over 6 copies of the KV cache, max_reuse 64, theta 0.9." in text
    assert "a call, of 16 in a graph" in text


def test_without_a_result_the_page_says_so(tmp_path: Path) -> None:
    assert "No GPU figure has been measured yet." in whole_page.page(tmp_path)


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
    (tmp_path / "x-gpu.json").write_text(json.dumps(made_up(**changes)))
    with pytest.raises(page.Refused, match=why):
        whole_page.page(tmp_path)
    unsaid = made_up()
    del unsaid[next(iter(changes))]
    with pytest.raises(page.Refused):
        page.section([unsaid])


def test_the_report_is_on_paper_after_every_cell(tmp_path: Path) -> None:
    content = made_up(cells=[], date="2000-01-02T03:04:05+00:00")
    kept = report.Report(content, [tmp_path / "results", tmp_path / "out"])
    (first, second) = kept.write()
    assert first.name == second.name == "2000-01-02-0304-nvidia-h100-of-nowhere-gpu.json"
    content["cells"].append(made_up()["cells"][0])
    kept.write()
    for path in (first, second):
        assert len(json.loads(path.read_text("utf-8"))["cells"]) == 1
    content["green"] = False
    (red, _) = kept.write()
    assert red.name == "2000-01-02-0304-nvidia-h100-of-nowhere-gpu-red.json"
    assert sorted(tmp_path.rglob("*.*")) == sorted(kept.write())


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_the_tree_is_git_s(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x = 1\n")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "b.pyc").write_text("x")
    (tmp_path / "empty" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a.py").write_text("y = 2\n")
    (tmp_path / "run").write_text("#!/bin/sh\n")
    (tmp_path / "run").chmod(0o755)
    tree = report.tree_of(tmp_path)
    for arguments in (["init", "-q"], ["add", "a/b.py", "a.py", "run"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    done = subprocess.run(
        ["git", "write-tree"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == tree


def test_the_stages_of_a_backend_account_for_their_bytes() -> None:
    problem = draw(DECODE, torch.device("cpu"), torch.bfloat16)
    found = truth.check(problem, "cpu", truth.exact_of(problem), Cpu())
    moved, by = measure.bytes_of(problem, "cpu", "score", found)
    assert (moved, by) == (2 * 600 * 2 * 32 * 2, "read, by bench.run")
    whole, _ = measure.bytes_of(problem, "cpu", "fresh", found)
    assert whole == moved + 2 * 104 * 2 * (32 + 32) * 2
