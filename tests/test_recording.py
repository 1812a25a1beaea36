"""What the triton backend keeps of a call for the next one: the same launches, and no other."""

import contextlib
import inspect
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenselect import Problem, Rope, SelectConfig
from tokenselect.contract import CacheState, ReuseDecision, Scores, Selection
from tokenselect.scratch import Scratch

triton = pytest.importorskip("triton", reason="the package triton is not for this platform")

PACKAGE = "tokenselect.kernels.triton"
# The package's own names `score`, `select` and `attend` are the functions.
score, select, attend, reuse, step, launch, recording, device, configs = (
    import_module(f"{PACKAGE}.{name}")
    for name in (
        *("score", "select", "attend", "reuse", "step"),
        *("launch", "recording", "device", "configs"),
    )
)
INV_FREQ = 10000.0 ** (-torch.arange(0, 64, 2) / 64)


def problem(
    *,
    B: int = 2,
    Hq: int = 8,
    Hkv: int = 2,
    Lq: int = 1,
    Lk: int = 500,
    Dv: int = 64,
    pages: int | None = None,
    tokens_first: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    config: SelectConfig | None = None,
    **more: Any,
) -> Problem:
    shape = (B, Hkv, Lk) if pages is None else (B * pages + 3, 16, Hkv)
    k_cache, v_cache = (torch.zeros(*shape, size, dtype=dtype) for size in (64, Dv))
    if tokens_first:
        k_cache, v_cache = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)
        )
    if pages is not None:
        more["block_table"] = torch.zeros(B, pages, dtype=torch.int32)
    q = torch.zeros(B, Hq, Lq, 64, dtype=dtype)
    config = config or SelectConfig(k=40, n_sink=4, n_local=8)
    return Problem.build(q, k_cache, v_cache, config, **more)


def rope(**more: Any) -> Rope:
    return Rope(INV_FREQ.clone(), **more)


SPLIT = SelectConfig(k=40, n_sink=4, n_local=8, score_at="split", positions="contiguous")
# Each next to one that differs in one thing, so that a key that misses it is found out.
PROBLEMS = {
    "decode": problem(),
    "one request": problem(B=1),
    "longer": problem(Lk=512),
    "one head": problem(Hkv=1),
    "float16": problem(dtype=torch.float16),
    "float32": problem(dtype=torch.float32),
    "values of another size": problem(Dv=32),
    "tokens first": problem(tokens_first=True),
    "scale": problem(scale=0.3),
    "softcap": problem(softcap=30.0),
    "another softcap": problem(softcap=20.0),
    "max_reuse": problem(max_reuse=5),
    "sinks": problem(sink_logits=torch.zeros(8)),
    "sinks of another dtype": problem(sink_logits=torch.zeros(8).bfloat16()),
    "sinks apart": problem(sink_logits=torch.zeros(16)[::2]),
    "paged": problem(pages=30),
    "more pages": problem(pages=31),
    "chunk": problem(Lq=5),
    "long chunk": problem(Lq=200),
    "in halves": problem(Lq=5, config=SelectConfig(k=40, n_sink=4, n_local=8, n_query_means=2)),
    "k": problem(config=SelectConfig(k=41, n_sink=4, n_local=8)),
    "pool": problem(config=SelectConfig(k=40, n_sink=4, n_local=8, pool=3)),
    "wide pool": problem(config=SelectConfig(k=40, n_sink=4, n_local=8, pool=5)),
    "group": problem(config=SelectConfig(k=40, n_sink=4, n_local=8, scope="group")),
    "own scale": problem(config=SelectConfig(k=40, n_sink=4, n_local=8, select_scale=0.3)),
    "candidates": problem(config=SelectConfig(k=40, n_sink=4, n_local=8, normalize="candidates")),
    "rope in place": problem(rope=rope()),
    "rotated": problem(rope=rope(), config=SPLIT),
    "interleaved": problem(rope=rope(interleaved=True), config=SPLIT),
    "raw": problem(rope=rope(cached="raw"), config=SPLIT),
    "scaled": problem(rope=rope(cached="raw", scaling=1.5), config=SPLIT),
    "half": problem(rope=Rope(INV_FREQ[:16].clone()), config=SPLIT),
    "share": problem(rope=rope(), config=replace(SPLIT, fixed_share=0.5)),
}


class Lent(launch.Source):
    """Gives out the memory that a recorded run had."""

    def __init__(self, memory: list[Tensor]) -> None:
        self.memory = iter(memory)

    def empty(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        lent = next(self.memory)
        assert (lent.shape, lent.dtype) == (tuple(shape), dtype)
        return lent


def compared(module: Any, name: str, *given: Any, **more: Any) -> Any:
    """A stage's result, once its steps were held to what is planned for the same tensors."""
    memory: list[Tensor] = []
    runs: list[Any] = []

    def empty(*asked: Any) -> Tensor:
        memory.append(torch.empty(asked[0], dtype=asked[1]))
        return memory[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "empty", empty)
        patch.setattr(launch, "run", lambda *given: runs.append(given))
        result = recording.run(getattr(module, name), *given, **more)
        arch = launch.arch(torch.device("cpu"))
        planned, todo = getattr(module, name)(*given, arch=arch, source=Lent(memory), **more)
    ((steps, tensors, constants, _),) = runs
    assert len(steps) == len(todo) > 0
    for taken, one in zip(steps, todo, strict=True):
        options = launch.options(one, arch)
        expected = {"PDL": False, **one.args, **one.constants, **options}
        found = taken.pick((*tensors, *constants))
        for argument, value in zip(one.kernel.arg_names, found, strict=True):
            is_same = value is expected[argument]
            if not isinstance(value, Tensor):
                is_same = type(value) is type(expected[argument]) and value == expected[argument]
            assert is_same, f"{one.kernel.fn.__name__}: {argument}"
        assert (taken.kernel, taken.grid) == (one.kernel, one.grid)
        assert taken.options.items() <= options.items()
        assert not expected.keys() - set(one.kernel.arg_names) - taken.options.keys()
    if planned is not None:
        assert type(result) is type(planned)
        assert all(a is b for a, b in zip(result, planned, strict=True))
    return result


def memory_of(p: Problem) -> CacheState:
    numbers = torch.zeros(p.B, dtype=torch.int32)
    return CacheState(
        query=torch.zeros(p.B, p.Hq * p.D),
        positions=torch.zeros(p.B, p.S, p.K, dtype=torch.int32),
        count=torch.zeros(p.B, p.S, dtype=torch.int32),
        seqlen_at_selection=numbers,
        hits=numbers.long(),
        misses=numbers.long(),
    )


def all_stages(p: Problem) -> None:
    memory = memory_of(p)
    decision: ReuseDecision = compared(reuse, "decide_launches", p, memory, 0.9)
    compared(reuse, "decide_launches", p, memory, 0.8)
    compared(reuse, "decide_launches", p, memory, None)
    scores: Scores = compared(score, "launches", p, fills=True)
    compared(score, "launches", p, fills=False)
    selection: Selection = compared(select, "launches", scores.votes, p)
    compared(reuse, "update_launches", p, memory, decision, selection)
    compared(attend, "launches", p, selection, out=None)
    out = torch.empty(p.B, p.Hq, p.Lq, p.Dv, dtype=p.q.dtype)
    compared(attend, "launches", p, selection, out=out)
    compared(step, "fresh_launches", p, out=None)
    compared(step, "cached_launches", p, memory, 0.9, out=out)


@pytest.fixture(params=["interpreter", "sm_90"])
def _on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch", lambda device: request.param)
    monkeypatch.setattr(recording, "_recordings", {})


def anew(p: Problem) -> Problem:
    """The same structure in other memory."""

    def other(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_()

    names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")
    tensors = {name: getattr(p, name) for name in names}
    turning = p.rope and replace(p.rope, inv_freq=p.rope.inv_freq.clone())
    return replace(
        p, rope=turning, **{name: x if x is None else other(x) for name, x in tensors.items()}
    )


@pytest.mark.usefixtures("_on")
def test_recorded_launches_are_those_that_are_planned() -> None:
    for p in PROBLEMS.values():
        all_stages(p)
    many = len(recording._recordings)
    for p in PROBLEMS.values():
        all_stages(anew(p))
    assert len(recording._recordings) == many


@pytest.mark.usefixtures("_on")
def test_other_sizes_of_an_architecture_are_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    all_stages(problem())
    for name, sizes in configs.TABLE.items():
        monkeypatch.setitem(configs.TABLE, name, sizes._replace(select_block=128, gather=32))
    all_stages(problem())


@pytest.mark.usefixtures("_on")
def test_one_tensor_in_two_places_stays_two() -> None:
    p = problem()
    all_stages(replace(p, v_cache=p.k_cache))
    many = len(recording._recordings)
    both = torch.zeros(2, *p.k_cache.shape, dtype=p.q.dtype)
    all_stages(replace(p, k_cache=both[1], v_cache=both[0]))
    all_stages(p)
    assert len(recording._recordings) == many


def test_every_setting_is_in_the_key() -> None:
    p = problem(rope=rope())
    _, settings = recording._parts(p)
    assert len(recording._parts(p)[0]) + len(settings) - 1 == len(fields(p))
    assert len(settings[0]) == len(fields(Rope)) - 1


@pytest.mark.usefixtures("_on")
def test_tables_are_those_of_the_rope_that_came() -> None:
    p = PROBLEMS["rotated"]
    inv_freq = p.rope.inv_freq.clone()
    for change in (lambda: None, lambda: inv_freq.mul_(0.5)):
        change()
        for frequencies in (inv_freq, inv_freq + 1):
            mine = replace(p, rope=replace(p.rope, inv_freq=frequencies))
            seen: list[Any] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "run", lambda *given, seen=seen: seen.append(given))
                score.score(mine)
            ((_, tensors, _, _),) = seen
            cosines = (torch.arange(128).double()[:, None] * frequencies.double()).cos().float()
            assert torch.equal(tensors[-3][:, : len(frequencies)], cosines)


@pytest.mark.usefixtures("_on")
def test_recordings_stay_few_and_hold_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MOST", 2)
    monkeypatch.setattr(launch, "run", lambda *given: None)
    for n in (100, 101, 102):
        score.score(problem(Lk=n))
        assert 1 <= len(recording._recordings) <= 2
    (kept,) = recording._recordings.values()
    assert not any(isinstance(x, (Tensor, recording.Slot)) for x in kept.constants)


@pytest.mark.usefixtures("_on")
def test_a_plans_memory_is_what_it_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda *given: runs.append(given))
    scratch = Scratch()
    results = []
    for n in (500, 400, 400, 500):
        with scratch.section("score"):
            results.append(score.score(problem(Lk=n)))
        scratch.seal()
    places = [[x.data_ptr() for x in tensors[7:]] for _, tensors, _, _ in runs]
    assert places[0] == places[1] == places[2] == places[3]
    assert {x.data_ptr() for x in scratch.blocks()} == set(places[0])
    assert results[0].votes.data_ptr() == results[3].votes.data_ptr()


@pytest.mark.usefixtures("_on")
def test_memory_between_kernels_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; each part lies apart from the others, and what is returned is no part of it."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    runs: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda *given: runs.append(given))
    p = problem(config=SPLIT, rope=rope())
    done = recording.run(step.cached_launches, p, memory_of(p), 0.9, out=None)
    ((_, tensors, _, _),) = runs
    parts = [x for x in tensors if isinstance(x, launch.Part)]
    assert len(parts) > 10
    block = parts[0].block
    end = block.data_ptr()
    for part in parts:
        x = part.tensor()
        assert (x.data_ptr(), x.shape, x.dtype) == (part.data_ptr(), part.shape, part.dtype)
        assert x.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        assert x.data_ptr() % 16 == 0
        assert x.data_ptr() >= end
        end = x.data_ptr() + x.nbytes
    assert end <= block.data_ptr() + block.nbytes
    assert not any(isinstance(x, launch.Part) for x in done)


# --- what Triton compiled, again --------------------------------------------------------------


class Compiled:
    """Stands in for what Triton makes of a kernel."""

    function, packed_metadata = "function", "packed"

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def run(self, *given: Any) -> None:
        self.log.append(("again", given))


class Kernel:
    """Stands in for a kernel: notes what it is launched with, and what it was compiled for."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: Any) -> Compiled:
            self.log.append(("first", grid, arguments, options))
            return Compiled(self.log)

        return start


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    active = SimpleNamespace(get_current_stream=lambda index: "stream")
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return Kernel()


def started(kernel: Kernel, step: Any, *tensors: Tensor) -> Any:
    kernel.log.clear()
    launch.run([step], tensors, [7, "constexpr"], torch.device("cpu"))
    (only,) = kernel.log
    return only


def test_a_second_launch_asks_triton_nothing(kernel: Kernel) -> None:
    step = launch.Step(kernel, (5,), lambda x: (x[1], x[0], x[2], x[3]), {"num_warps": 4}, {})
    x, y = torch.zeros(64), torch.zeros(64)
    first = started(kernel, step, x, y)
    assert first == ("first", (5,), (y, x, 7, "constexpr"), {"num_warps": 4})
    part = launch.Part(x.data_ptr() + 64, x.view(torch.uint8), (4, 2), torch.float32)
    step = launch.Step(kernel, (5,), lambda x: (x[0],), {}, {})
    _, _, (given,), _ = started(kernel, step, part)
    assert (given.data_ptr(), given.shape) == (x[16:].data_ptr(), (4, 2))
    assert started(kernel, step, part)[1][-1] == part.data_ptr()
    step = launch.Step(kernel, (5,), lambda x: (x[1], x[0], x[2], x[3]), {}, {})
    started(kernel, step, x, y)
    for a, b in ((x, y), (y, x), (x, x)):
        _, given = started(kernel, step, a, b)
        assert given[:6] == (5, 1, 1, "stream", "function", "packed")
        assert given[6:9] == (None, None, None)
        assert given[9:] == (b.data_ptr(), a.data_ptr(), 7, "constexpr")


def test_tensors_that_are_aligned_otherwise_are_compiled_for(kernel: Kernel) -> None:
    step = launch.Step(kernel, (5,), lambda x: (x[0], x[1]), {}, {})
    x, y = torch.zeros(64), torch.zeros(64)
    for a, b in ((x, y), (x[1:], y), (x, y[1:]), (x[1:], y[1:])):
        assert started(kernel, step, a, b)[0] == "first"
        assert started(kernel, step, a, b)[0] == "again"
    assert started(kernel, step, x[4:], y)[0] == "again"


def test_profilers_see_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = launch.Step(kernel, (5,), lambda x: (x[0], x[1]), {}, {})
    x = torch.zeros(64)
    assert [started(kernel, step, x, x)[0] for _ in range(2)] == ["first", "again"]
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.runtime, name, lambda metadata: None)
            assert started(kernel, step, x, x)[0] == "first"
        assert started(kernel, step, x, x)[0] == "again"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert started(kernel, step, x, x)[0] == "first"


def test_no_constexpr_is_called_a_count() -> None:
    """Triton refuses that when it compiles."""
    files = Path(launch.__file__).parent.glob("[a-z]*.py")
    modules = [import_module(f"{PACKAGE}.{file.stem}") for file in files]
    kernels = [x for module in modules for x in vars(module).values() if hasattr(x, "arg_names")]
    seen = set()
    for one in kernels:
        known = one.kwargs["do_not_specialize"] if launch.INTERPRETED else one.do_not_specialize
        parameters = inspect.signature(one.fn).parameters
        named = set(known or ()) & set(parameters)
        wrong = [x for x in named if "constexpr" in str(parameters[x].annotation)]
        assert not wrong, f"{one.fn.__name__}: {wrong}"
        seen |= named
    assert seen >= set(device.COUNTS)
