"""The guard itself: it notices what it is there for, and nothing else; and how problems travel."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from properties.guard import Guard, Touched, run_guarded, run_twice, watched
from tokenselect import (
    AttentionOutput,
    Backend,
    Capability,
    Problem,
    Scores,
    Selection,
    SelectionCache,
    reasons,
)
from tokenselect.conformance.devices import device_of, for_the_cpu, moved
from tokenselect.conformance.problems import STRIDES, Case
from tokenselect.contract import CacheState, Reuse, ReuseDecision, StaticStages
from tokenselect.kernels.cpu import BACKEND as CPU
from tokenselect.reference import BACKEND as REFERENCE

CASE = Case(lengths=(40, 9), page_size=2, has_sink_logits=True, rope="rotated")


def fake(write) -> tuple[Backend, SimpleNamespace]:
    """A backend that gets its memory from `launch.empty` and then writes to it; and its launch."""
    launch = SimpleNamespace(empty=None)

    def score(problem: Problem) -> Scores:
        votes = launch.empty((problem.B, problem.R, problem.S, problem.Lk), torch.float32, "cpu")
        lse = launch.empty((problem.B, problem.Hq), torch.float32, "cpu")
        for mine, right in zip((votes, lse), CPU.score(problem), strict=True):
            mine.copy_(right)
        write(votes, problem)
        return Scores(votes, lse)

    return Backend("fake", CPU.capability, score, CPU.select, CPU.attend), launch


def beyond(x: torch.Tensor, places: int) -> torch.Tensor:
    """The element so many places after the last of x, or before the first."""
    at = x.numel() - 1 + places if places > 0 else places
    return x.as_strided((1,), (1,), x.storage_offset() + at)


def test_what_is_right_passes() -> None:
    backend, launch = fake(lambda votes, problem: None)
    problem = CASE.problem()
    assert all(map(torch.equal, watched(backend, launch).score(problem), CPU.score(problem)))


@pytest.mark.parametrize("places", [1, 2, 1000, -1, -7])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("-inf")])
def test_a_write_out_of_bounds_is_noticed(places: int, value: float) -> None:
    backend, launch = fake(lambda votes, problem: beyond(votes, places).fill_(value))
    with pytest.raises(Touched, match="a buffer"):
        watched(backend, launch).score(CASE.problem())


def test_a_stray_padding_is_noticed() -> None:
    """-1, which select pads with, one place too far."""
    guard = Guard(0)
    beyond(guard.empty((3,), torch.int32, "cpu"), 1).fill_(-1)
    with pytest.raises(Touched):
        guard.check()


@pytest.mark.parametrize("name", ["q", "k_cache", "cache_seqlens", "block_table", "sink_logits"])
def test_a_write_to_an_input_is_noticed(name: str) -> None:
    backend, launch = fake(lambda votes, problem: getattr(problem, name).view(-1)[-1:].add_(1))
    with pytest.raises(Touched, match="an input"):
        watched(backend, launch).score(replace(CASE, filler="zeros").problem())


def test_a_result_left_unwritten_is_noticed() -> None:
    def write(votes: torch.Tensor, problem: Problem) -> None:
        votes[0, 0, 0, 0] = launch.empty((1,), torch.float32, "cpu")[0]

    backend, launch = fake(write)
    with pytest.raises(AssertionError, match=r"votes\[0, 0, 0, 0\] depends on what was in"):
        run_twice(launch, backend.score, CASE.problem())


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("page_size", [None, 2])
def test_copies_are_the_same_problem(strides: str, page_size: int | None) -> None:
    """Values, strides and where in its memory a tensor starts; the results too."""
    problem = Case(lengths=(40, 9), strides=strides, page_size=page_size, rope="raw").problem()
    seen = []

    def copy(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.clone()

    there = moved(problem, copy)
    for name in ("q", "k_cache", "v_cache", "cache_seqlens"):
        one, other = getattr(problem, name), getattr(there, name)
        assert one.data_ptr() != other.data_ptr()
        assert (one.shape, one.stride()) == (other.shape, other.stride())
        assert one.storage_offset() == other.storage_offset()
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert len(seen) == 5 + (page_size is not None)
    assert all(x.dim() == 1 and x.is_contiguous() for x in seen)
    _, launch = fake(None)
    guarded = run_guarded(launch, CPU.score, problem)
    assert all(map(torch.equal, guarded, CPU.score(problem)))


def test_a_backend_runs_on_the_first_of_its_devices_that_is_here() -> None:
    def taking(*devices: str) -> Backend:
        return Backend("x", Capability(devices=devices), CPU.score, CPU.select, CPU.attend)

    assert device_of(taking("mtia", "cpu")) == "cpu"
    assert device_of(taking("cpu", "cuda")) == "cpu"
    assert device_of(CPU) == device_of(Backend("x", Capability(), "cpu", "cpu", "cpu")) == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of(taking("cuda")) == expected
    elsewhere = for_the_cpu(taking("cuda"))
    assert bool(reasons(elsewhere, CASE.problem())) == (expected == "cpu")


def test_a_backend_elsewhere_is_brought_its_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage gets every tensor there, and what it returns comes back."""
    went: list[int] = []

    def on(device: str, what):
        def send(x: torch.Tensor) -> torch.Tensor:
            went.append(x.numel())
            return x.clone()

        return moved(what, send)

    monkeypatch.setattr("tokenselect.conformance.devices.on", on)
    monkeypatch.setattr("tokenselect.conformance.devices.device_of", lambda backend: "elsewhere")
    lender = Backend("lender", Capability(devices=("elsewhere",)), "cpu", "cpu", "cpu")
    backend = Backend("x", Capability(devices=("elsewhere",)), CPU.score, CPU.select, CPU.attend)
    backend = for_the_cpu(replace(backend, lenders=(lender,)))
    problem = CASE.problem()
    assert not reasons(backend, problem)
    scores = backend.score(problem)
    selection = backend.select(scores.votes, problem)
    attended = backend.attend(problem, selection)
    assert len(went) == 7 + 8 + 9
    assert all(map(torch.equal, scores, CPU.score(problem)))
    assert all(map(torch.equal, selection, CPU.select(scores.votes, problem)))
    assert all(map(torch.equal, attended, CPU.attend(problem, selection)))


# --- what a stage is to write to ----------------------------------------------------------------


def into(write) -> Backend:
    """The CPU's stages; the plan's `attend` writes to `out`, and then what it should not."""

    def attend(problem: Problem, selection: Selection, out: torch.Tensor) -> AttentionOutput:
        attended = CPU.attend(problem, selection)
        write(out.copy_(attended.out), selection)
        return AttentionOutput(out, attended.lse)

    planned = StaticStages(CPU.score, CPU.select, attend)
    return watched(replace(CPU, static=planned, reuse=REFERENCE.reuse), SimpleNamespace(empty=None))


def test_out_is_written_to_and_returned() -> None:
    problem = CASE.problem()
    selection = CPU.select(CPU.score(problem).votes, problem)
    right = CPU.attend(problem, selection)
    out = torch.zeros_like(right.out)
    attended = into(lambda out, selection: None).static.attend(problem, selection, out)
    assert attended.out is out
    assert torch.equal(out, right.out)
    with pytest.raises(Touched, match="an argument"):
        into(lambda out, _: beyond(out, 1).fill_(0)).static.attend(problem, selection, out)
    with pytest.raises(Touched, match="an input"):
        into(lambda _, selection: selection.count.add_(1)).static.attend(problem, selection, out)


def remembered(problem: Problem) -> CacheState:
    return SelectionCache().state(problem)


def test_what_is_kept_is_written_back() -> None:
    problem, backend = CASE.problem(), into(lambda out, selection: None)
    fresh = CPU.select(CPU.score(problem).votes, problem)
    memory, right = remembered(problem), remembered(problem)
    decision = backend.reuse.decide_reuse(problem, memory, 0.9)
    assert not decision.reused.any()
    assert backend.reuse.update(problem, memory, decision, fresh) is None
    REFERENCE.reuse.update(problem, right, decision, fresh)
    assert right.seqlen_at_selection.tolist() == [40, 9]
    assert all(map(torch.equal, memory.tensors(), right.tensors()))


def test_a_decision_that_changes_something_is_noticed() -> None:
    def decide_reuse(problem: Problem, memory: CacheState, theta: float | None) -> ReuseDecision:
        memory.hits.add_(1)
        return REFERENCE.reuse.decide_reuse(problem, memory, theta)

    problem = CASE.problem()
    backend = replace(CPU, reuse=Reuse(decide_reuse, REFERENCE.reuse.update))
    with pytest.raises(Touched, match="an input"):
        watched(backend, SimpleNamespace(empty=None)).reuse.decide_reuse(
            problem, remembered(problem), 0.9
        )
