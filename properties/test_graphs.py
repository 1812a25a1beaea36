"""Plans and CUDA graphs at the sizes that are timed; streams, memory, waiting and compiled code.

On a GPU with CUDA's graphs, see `bench.gpu`; elsewhere small, with those of `properties.recorded`,
which is not CUDA: streams, memory and waiting are not tried then.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bench.checks import NotEquivalent
from bench.gpu.device import hold, nearness
from bench.workloads import PAPER_SIZES, Workload, make
from properties import guard
from properties.recorded import Recorded
from tests.fresh import need_a_cpp_compiler
from tokenselect import (
    NotCapturable,
    Plan,
    Problem,
    Rope,
    SelectConfig,
    SelectionCache,
    capture,
    cuda_graph,
    plan,
    register,
    run,
)
from tokenselect.conformance.check.report import is_interpreted
from tokenselect.conformance.devices import device_of
from tokenselect.contract import Reuse
from tokenselect.dispatch import registry
from tokenselect.dispatch.registry import load
from tokenselect.kernels import torch_reuse
from tokenselect.kernels.cpu import BACKEND as CPU

pytestmark = pytest.mark.slow("triton")

THETA, MAX_REUSE = 0.9, 64
K = 1024
MAIN, ODD = (32, 8, 128), (9, 3, 64)


class Ground(NamedTuple):
    """Where it is tried. graphed: the backend that replays this one's plans."""

    backend: str
    graphed: str
    device: str
    interface: Any = None

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    def plans(self, problem: Problem) -> list[Plan]:
        """Plan for calls, and for replays."""
        return [plan(problem, backend) for backend in (self.backend, self.graphed)]

    def problem(
        self, heads: tuple[int, int, int], n: int, B: int = 1, Lq: int = 1, **more: Any
    ) -> Problem:
        """Draw a problem, a small one where there is no GPU; with a rope if positions need one."""
        config, max_reuse = more.pop("config", PAPER_SIZES), more.pop("max_reuse", MAX_REUSE)
        if not self.on_cuda:
            heads, Lq, n = (3, 1, 32) if heads[0] == 9 else (4, 2, 32), min(Lq, 8), n // K + 80
            config = replace(config, k=16, n_sink=4, n_local=8)
        # A drawn problem has no rope, and its configuration none that needs one.
        drawn = Equal("", *heads, n, B=B, Lq=Lq, config=SelectConfig(), **more)
        p = make(drawn, device=self.device, filler=torch.nan)
        rope = None
        if config.positions == "contiguous":
            rope = Rope(10000.0 ** -(torch.arange(0, p.D, 2, device=p.q.device).float() / p.D))
        return replace(p, config=config, rope=rope, max_reuse=max_reuse)


class Equal(Workload):
    """Requests of n tokens each."""

    def lengths(self) -> list[int]:
        return [self.n] * self.B


@pytest.fixture(autouse=True)
def _unguarded(_guarded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    guard.take_off(monkeypatch)


@pytest.fixture
def ground(plannable: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: Any) -> Ground:
    if is_interpreted(load(plannable)) and not pytestconfig.getoption("--backend"):
        pytest.skip("Triton's interpreter takes minutes for these: --backend=triton runs them")
    return over(plannable, monkeypatch)


def over(name: str, monkeypatch: pytest.MonkeyPatch, interface: Any = None) -> Ground:
    device = device_of(load(name))
    interface = interface or (None if device == "cuda" else Recorded())
    made = cuda_graph(name, name=f"{name}-replayed", interface=interface)
    monkeypatch.setitem(registry._targets, made.name, made)
    monkeypatch.setitem(registry._loaded, made.name, made)
    return Ground(name, made.name, device, interface)


def caches(count: int) -> list[SelectionCache]:
    return [SelectionCache(THETA, MAX_REUSE) for _ in range(count)]


def hold_counts(what: str, mine: SelectionCache, theirs: SelectionCache) -> None:
    hold(f"{what}: hits", mine.hits.cpu(), theirs.hits.cpu())
    hold(f"{what}: misses", mine.misses.cpu(), theirs.misses.cpu())


# --- plans, graphs of them, and attention ---------------------------------------------------


class Call(NamedTuple):
    """Inputs of one call. poison: what the plans' memory is filled with before it."""

    what: str
    q: Tensor
    lengths: Tensor
    table: Tensor | None
    poison: int | None = None


def calls(p: Problem) -> Iterator[Call]:
    """What may change from call to call: queries, lengths, the block table; and what must not."""
    near = p.Lk - 6 * p.Lq - 8 - torch.arange(p.B, dtype=torch.int32, device=p.q.device)
    usual = Call("as captured", p.q, near, p.block_table)
    missing = near.clone()
    missing[p.B // 2] = 0
    yield usual
    yield usual._replace(what="as captured, again")
    yield usual._replace(what="longer", lengths=near + p.Lq)
    yield usual._replace(what="shorter", lengths=p.Lq + near // 3)
    yield usual._replace(what="a request of length 0", lengths=missing)
    yield usual._replace(what="at capacity", lengths=torch.full_like(near, p.Lk))
    yield usual._replace(what="other queries", q=p.q.roll(1, 1) - p.q)
    if p.block_table is not None:
        table = p.block_table.flip(1).contiguous()
        yield usual._replace(what="another block table", table=table)
    for poison in (0xFF, 0x7F):
        what = f"the plan's memory filled with 0x{poison:02X}"
        yield usual._replace(what=what, poison=poison)
        yield usual._replace(what=f"{what}, longer", lengths=near + p.Lq, poison=poison)


SHAPES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "long": ((MAIN, 128 * K), {}),
    "usual": ((MAIN, 32 * K), {}),
    "batch": ((ODD, 32 * K, 4), {}),
    "paged": ((MAIN, 32 * K, 2), {"page_size": 16}),
    "chunk": ((MAIN, 32 * K, 1, 512), {}),
    "group": ((MAIN, 32 * K, 2), {"config": SelectConfig(scope="group")}),
    "contiguous": ((MAIN, 32 * K), {"config": SelectConfig(positions="contiguous")}),
}
_ALWAYS_REUSED = ("long", "group", "contiguous")


@pytest.mark.parametrize(
    ("shape", "cached"),
    [
        pytest.param(shape, cached, marks=[] if shape == "long" else pytest.mark.slow)
        for shape in SHAPES
        for cached in ((True,) if shape in _ALWAYS_REUSED else (False, True))
    ],
)
def test_a_plan_gives_the_bits_of_attention_and_its_graph_those_of_the_plan(
    ground: Ground, shape: str, cached: bool
) -> None:
    """Whatever changes between calls."""
    p = ground.problem(*SHAPES[shape][0], **SHAPES[shape][1])
    p = replace(p, max_reuse=0 if not cached else MAX_REUSE if p.Lq == 1 else 8 * p.Lq)
    eager, graphed = ground.plans(p)
    near = nearness(ground.backend, p.q.device)
    kept = [SelectionCache(THETA, p.max_reuse) if p.max_reuse else None for _ in range(3)]
    several, reused = list(calls(p)), 0
    for call in several:
        at = replace(p, q=call.q, cache_seqlens=call.lengths, block_table=call.table)
        right = results(run(at, ground.backend, cache=kept[0], return_info=True))
        mine = planned(p, eager, call, kept[1])
        for of, got in mine.items():
            if not near or of != "positions":
                hold(f"{call.what}: a plan and attention: {of}", got, right[of], near)
        for of, got in planned(p, graphed, call, kept[2]).items():
            hold(f"{call.what}: a graph and the plan: {of}", got, mine[of])
        reused += int(mine["reused"].sum())
    assert not cached or 0 < reused < len(several) * p.B, f"{reused} reused"


def planned(p: Problem, of: Plan, call: Call, cache: SelectionCache | None) -> dict[str, Tensor]:
    for block in of._scratch.blocks() if call.poison is not None else ():
        block.fill_(call.poison)
    more: dict[str, Any] = {"block_table": call.table, "cache": cache, "return_info": True}
    return results(of(call.q, p.k_cache, p.v_cache, call.lengths, **more))


def results(called: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """Clones, since a plan's memory is overwritten."""
    out, info = called
    found = {"out": out, "lse": info.lse, **info.selection._asdict(), "reused": info.reused}
    return {name: x.clone() for name, x in found.items()}


class Layers:
    """Planned layers one after the other, each adding to what the next one asks."""

    def __init__(self, p: Problem, backend: str, count: int) -> None:
        self.p, self.plan, self.caches = p, plan(p, backend), caches(count)

    def step(self, qs: Tensor, lengths: Tensor) -> Tensor:
        """qs (B, layers, Hq, 1, D); returns what each layer gave, in the same shape."""
        outs: list[Tensor] = []
        for layer, cache in enumerate(self.caches):
            q = qs[:, layer] + 0.01 * outs[-1] if outs else qs[:, layer]
            out = self.plan(q, self.p.k_cache, self.p.v_cache, lengths, cache=cache)
            outs.append(out.clone())
        return torch.stack(outs, 1)


@pytest.mark.parametrize("graphs_within", [False, True])
def test_a_captured_step_of_layers_gives_what_they_give_when_called(
    ground: Ground, graphs_within: bool
) -> None:
    """The graph of a plan becomes a part of the step's."""
    steps, n_layers, B = 64 if ground.on_cuda else 16, 4, 2
    p = ground.problem(MAIN, 32 * K, B)
    backend = ground.graphed if graphs_within else ground.backend
    mine, theirs = (Layers(p, backend, n_layers) for _ in range(2))
    captured = capture(mine.step, interface=ground.interface)
    random = torch.Generator().manual_seed(3)
    lengths = torch.full((B,), p.Lk - steps, dtype=torch.int32, device=p.q.device)
    qs = p.q[:, None].expand(-1, n_layers, -1, -1, -1).contiguous()
    for step in range(steps):
        unlike = (torch.rand(B, generator=random) < 0.3).to(qs.device)
        others = torch.randn(qs.shape, generator=random).to(qs)
        qs = torch.where(unlike.view(-1, 1, 1, 1, 1), others, qs)
        hold(f"step {step}: out", captured(qs, lengths), theirs.step(qs, lengths))
        for layer, pair in enumerate(zip(mine.caches, theirs.caches, strict=True)):
            hold_counts(f"step {step}, layer {layer}", *pair)
        lengths += 1
    assert mine.caches[0].hits.sum() > 0
    assert mine.caches[0].misses.sum() > B


# --- streams, memory, waiting -----------------------------------------------------------------


def test_two_streams_take_turns_at_a_plan(ground: Ground) -> None:
    """Two plans on two streams at once, and one plan on two streams by turns."""
    if not ground.on_cuda:
        pytest.skip("streams need CUDA")
    count, rounds = 24, 8
    p = ground.problem(MAIN, 32 * K, max_reuse=0)
    inputs = [(p.q + 0.1 * i, p.cache_seqlens - p.Lk // 64 * i) for i in range(count)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def by_turns(plans: Sequence[Plan], streams: Sequence[torch.cuda.Stream]) -> list[Tensor]:
        """Each input's call on one of two plans and streams, which only the plans keep in order."""
        outs = [torch.full_like(p.q, torch.nan) for _ in inputs]
        torch.cuda.synchronize()
        for stream in streams:  # so that calls of both wait side by side
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
        for i, ((q, lengths), out) in enumerate(zip(inputs, outs, strict=True)):
            with torch.cuda.stream(streams[i % 2]):
                plans[i % 2](q, p.k_cache, p.v_cache, lengths, out=out)
        torch.cuda.synchronize()
        return outs

    for backend in (ground.backend, ground.graphed):
        one, other = (plan(p, backend) for _ in range(2))
        alone = by_turns([one, one], [torch.cuda.current_stream()] * 2)
        for what, plans in (("two plans at once", [one, other]), ("one plan by turns", [one] * 2)):
            for again in range(rounds):
                hold(f"{backend}, {what}: round {again}", by_turns(plans, streams), alone)


@pytest.mark.parametrize("count", [2_000, pytest.param(8_000, marks=pytest.mark.slow)])
def test_calls_and_replays_take_no_memory_and_wait_for_nothing(ground: Ground, count: int) -> None:
    """In hits and misses; and the last gives the same."""
    count, early = (count, 100) if ground.on_cuda else (20, 8)
    p = ground.problem(MAIN, 32 * K)
    queries, plans, kept = (p.q, p.q.roll(1, 1).contiguous()), ground.plans(p), caches(2)
    lengths = [torch.full_like(p.cache_seqlens, p.Lk - count + i) for i in range(count)]

    def steps(first: int, end: int) -> list[Tensor]:
        for i in range(first, end):
            q = queries[i // 4 % 2]
            outs = [one(q, p.k_cache, p.v_cache, lengths[i], cache=cache)
                    for one, cache in zip(plans, kept, strict=True)]  # fmt: skip
        return outs

    steps(0, early)  # the first calls make views, state and graphs
    told = [(int(cache.hits), int(cache.misses)) for cache in kept]
    with no_waiting(ground):
        eager, replayed = steps(early, count)
    hold(f"replay {count}: out", replayed, eager)
    for cache, (hits, misses) in zip(kept, told, strict=True):
        found = int(cache.hits) - hits, int(cache.misses) - misses
        assert found == ((count - early) // 4 * 3, (count - early) // 4)


@contextlib.contextmanager
def no_waiting(ground: Ground) -> Iterator[None]:
    """Raise AssertionError or RuntimeError if memory is taken or the device waited for inside."""
    if not ground.on_cuda:
        yield
        return

    def memory() -> tuple[int, ...]:
        torch.cuda.synchronize()
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
        return allocations, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before, usual = memory(), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(usual)
    assert memory() == before, "allocations, bytes in use and reserved"


def test_host_reads_are_refused_by_name_and_leave_nothing_behind(ground: Ground) -> None:
    x = torch.ones(4, device=ground.device)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "item": lambda x: x * x.sum().item(),
        "index": lambda x: x[x > 0],
    }
    for operation, step in steps.items():
        with pytest.raises(NotCapturable, match=operation):
            capture(step, interface=ground.interface)(x)
    hold("a step", capture(lambda x: x + 1, interface=ground.interface)(x), x + 1)


# --- compiled ---------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Projections, a cache that is written to, a plan with a SelectionCache: one layer's decode."""

    def __init__(self, p: Problem, backend: str) -> None:
        super().__init__()
        self.p, self.width = p, p.Hq * p.D
        settings: dict[str, Any] = {"bias": False, "device": p.q.device, "dtype": p.q.dtype}
        self.q, self.k, self.v, self.o = (
            nn.Linear(self.width, heads * p.D, **settings) for heads in (p.Hq, p.Hkv, p.Hkv, p.Hq)
        )
        self.register_buffer("k_cache", p.k_cache.clone())
        self.register_buffer("v_cache", p.v_cache.clone())
        self.plan, (self.cache,) = plan(p, backend), caches(1)

    def forward(self, x: Tensor, at: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, width), its position at (1,): the layer's result, its queries and attention."""
        heads = (x.shape[0], 1, -1, self.p.D)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.k_cache.index_copy_(2, at, k)
        self.v_cache.index_copy_(2, at, v)
        out = self.plan(q, self.k_cache, self.v_cache, lengths, cache=self.cache)
        return self.o(out.transpose(1, 2).reshape(x.shape)), q.clone(), out.clone()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "aot_eager", "inductor", "reduce-overhead"])
@torch.no_grad()
def test_a_compiled_layer_gives_the_bits_of_a_plan_and_compiles_once(
    ground: Ground, how: str
) -> None:
    """reduce-overhead is CUDA's graphs on a GPU; here it shows that nothing stands in their way."""
    if ground.on_cuda and how != "reduce-overhead":
        pytest.skip("a GPU's time is for what can only be tried there")
    if how in ("inductor", "reduce-overhead"):
        need_a_cpp_compiler()
    steps, warm, graphs = 20 if ground.on_cuda else 8, 4, 0
    p = ground.problem((8, 2, 64), 8 * K, config=SelectConfig(k=64, n_sink=8, n_local=32))
    torch.manual_seed(5)
    layer = Decoder(p, ground.backend)
    eager, (cache,) = plan(p, ground.backend), caches(1)
    settings = {"mode": how} if how == "reduce-overhead" else {"backend": how}
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(layer, fullgraph=True, **settings)  # type: ignore[call-overload]
    at = torch.full((1,), p.Lk - steps - 1, device=p.q.device)
    lengths = torch.full((p.B,), p.Lk - steps, dtype=torch.int32, device=p.q.device)
    x = torch.randn(p.B, 1, layer.width, device=p.q.device).to(p.q.dtype)
    # Called once as it is, so that the SelectionCache's state is no part of what is compiled.
    _, q, _ = layer(x, at - 1, lengths - 1)
    eager(q, layer.k_cache, layer.v_cache, lengths - 1, cache=cache)
    for step in range(steps):
        if step % 3 == 0:
            x = torch.randn_like(x)
        if ground.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        result, q, out = (y.clone() for y in fast(x, at, lengths))
        right = eager(q, layer.k_cache, layer.v_cache, lengths, cache=cache)
        what = f"compiled, step {step}"
        hold(f"{what}: the plan's result", out, right)
        hold_counts(what, layer.cache, cache)
        hold(f"{what}: the layer's", result, layer.o(right.transpose(1, 2).reshape(x.shape)), 0.02)
        at += 1
        lengths += 1
        if step + 1 == warm:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs
    if ground.on_cuda and counters["inductor"]["cudagraph_skips"]:
        # Right, and slower than it could be.
        warnings.warn("torch.compile did without CUDA graphs: TORCH_LOGS=perf_hints", stacklevel=1)
    torch._dynamo.reset()


# --- a test of these tests ----------------------------------------------------------------------


def planned_by(attend: Callable[..., Any]) -> dict[str, Any]:
    """What makes of the cpu backend one whose plans attend by this."""
    return {"static": CPU.static._replace(attend=attend)}  # type: ignore[union-attr]


def reads_a_length(p: Problem, *more: Any) -> Any:
    assert int(p.cache_seqlens[0]) >= 0
    return CPU.static.attend(p, *more)  # type: ignore[union-attr]


def otherwise_each_time() -> Callable[..., Any]:
    calls = []

    def attend(*given: Any) -> Any:
        calls.append(1)
        attended = CPU.static.attend(*given)  # type: ignore[union-attr]
        attended.lse.add_(1e-5 * len(calls))
        return attended

    return attend


def remembers_the_first_lengths() -> Callable[..., Any]:
    """Right in calls of one length each; a replay would not see it."""
    first: list[Tensor] = []

    def attend(p: Problem, *more: Any) -> Any:
        first.append(p.cache_seqlens.clone())
        old = first[0] if first[0].shape == p.cache_seqlens.shape else p.cache_seqlens
        attended = CPU.static.attend(p, *more)  # type: ignore[union-attr]
        attended.lse.add_((p.cache_seqlens - old)[:, None, None])
        return attended

    return attend


def never_reuses(p: Problem, state: Any, theta: float | None) -> Any:
    decision = torch_reuse.decide_reuse(p, state, theta)
    return decision._replace(
        reused=torch.zeros_like(decision.reused), cache_seqlens=p.cache_seqlens
    )


NEVER = {"reuse": Reuse(never_reuses, torch_reuse.update)}


class Stale(Recorded):
    def capture(self, *given: Any) -> Any:
        outputs, replay = super().capture(*given)
        replay()
        return outputs, lambda: None


def check_bits(ground: Ground) -> None:
    test_a_plan_gives_the_bits_of_attention_and_its_graph_those_of_the_plan(ground, "long", True)


def check_layers(ground: Ground) -> None:
    test_a_captured_step_of_layers_gives_what_they_give_when_called(ground, False)


def check_memory(ground: Ground) -> None:
    test_calls_and_replays_take_no_memory_and_wait_for_nothing(ground, 20)


def planted(monkeypatch: pytest.MonkeyPatch, interface: Any = None, **bent: Any) -> Ground:
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    registry._loaded.pop("wrong", None)
    registry._targets.pop("wrong", None)
    register("wrong", replace(CPU, name="wrong", **bent))
    return over("wrong", monkeypatch, interface)


@pytest.mark.parametrize(
    ("bent", "interface", "checked", "complaint"),
    [
        (planned_by(reads_a_length), None, check_bits, r"^Tensor.__int__"),
        (planned_by(remembers_the_first_lengths()), None, check_bits, "plan and attention: lse"),
        (planned_by(otherwise_each_time()), None, check_bits, "a graph and the plan: lse"),
        (NEVER, None, check_bits, "^0 reused"),
        (NEVER, None, check_memory, r"^assert \(0, 12\) == \(9, 3\)"),
        ({}, Stale, check_bits, "a graph and the plan"),
        ({}, Stale, check_layers, "^step 0, layer 0: misses"),
        ({}, Stale, check_memory, "^replay 20: out"),
    ],
)
def test_a_mistake_of_a_plan_or_graph_is_caught(
    bent: Any, interface: Any, checked: Any, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = planted(monkeypatch, interface and interface(), **bent)
    with pytest.raises((NotEquivalent, NotCapturable, AssertionError), match=complaint):
        checked(where)


def test_a_mistake_of_waiting_or_taking_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what torch.cuda tells, which is a stand-in's here."""
    modes, allocated = [], [0]
    for name, stub in {
        "Stream": object,
        "current_stream": object,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "memory_stats": lambda: {"allocation.all.allocated": allocated[0]},
        "memory_allocated": lambda: 1,
        "memory_reserved": lambda: 1,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": modes.append,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(Ground, "on_cuda", True)
    small = Ground.problem
    monkeypatch.setattr(
        Ground, "problem", lambda self, heads, n, **more: small(self, (4, 2, 32), 160, **more)
    )

    class Takes(Recorded):
        def capture(self, *given: Any) -> Any:
            outputs, replay = super().capture(*given)
            return outputs, lambda: (replay(), allocated.__setitem__(0, allocated[0] + 1))

    test_two_streams_take_turns_at_a_plan(planted(monkeypatch))
    with no_waiting(planted(monkeypatch)):
        assert modes == ["error"]
    assert modes == ["error", 0]
    with pytest.raises(AssertionError, match="allocations"):
        test_calls_and_replays_take_no_memory_and_wait_for_nothing(
            planted(monkeypatch, Takes()), 120
        )
