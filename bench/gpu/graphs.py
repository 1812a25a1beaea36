"""What is checked of plans and CUDA graphs: `python -m bench.gpu.checks graphs`.

Each check raises `NotEquivalent`, or returns what it has seen. Small problems of all kinds, and
decisions near theta, are the properties' to check; here are sizes as large as those that are timed,
and what CUDA adds: graphs in graphs, streams, memory, waiting and compiled code. In a dry run
graphs are those of `properties.recorded`, which is not CUDA: streams, memory and waiting are not
tried then.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenselect
from bench.checks import NotEquivalent
from bench.gpu.cases import CHUNK, MAIN, Case, K, case
from bench.gpu.device import Device, hold, nearness
from bench.workloads import make
from tokenselect import (
    NotCapturable,
    Plan,
    Problem,
    Rope,
    SelectConfig,
    SelectionCache,
    backends,
    register,
)
from tokenselect.dispatch.registry import load

THETA, MAX_REUSE = 0.9, 64


@dataclass(frozen=True)
class Ground:
    """Where the checks run. interface: of graphs; CUDA's own, but in a dry run."""

    backend: str
    device: Device
    dry: bool = False
    quick: bool = False
    interface: Any = None

    def __post_init__(self) -> None:
        if self.dry and self.interface is None:
            from properties.recorded import Recorded

            object.__setattr__(self, "interface", Recorded())

    @property
    def on_cuda(self) -> bool:
        return self.device.at.type == "cuda"

    @property
    def graphed(self) -> str:
        """The registered name of the backend that replays this one's plans."""
        name = f"{self.backend}-graphs"
        if name not in backends():
            made = tokenselect.cuda_graph(self.backend, name=name, interface=self.interface)
            register(name, made)
        return name

    def plans(self, problem: Problem) -> list[Plan]:
        """Plan for calls, and for replays."""
        return [tokenselect.plan(problem, backend) for backend in (self.backend, self.graphed)]

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return tokenselect.capture(step, interface=self.interface)

    def many(self, usual: int, dry: int, quick: int | None = None) -> int:
        return dry if self.dry else quick if self.quick and quick is not None else usual

    def problem(self, case: Case, max_reuse: int = MAX_REUSE) -> Problem:
        """Draw a case's problem, a small one in a dry run; with a rope if positions need one."""
        config = case.config
        if self.dry:
            heads = {"Hq": 3, "Hkv": 1} if case.Hq == 9 else {"Hq": 4, "Hkv": 2}
            sizes = {"D": 32, "n": 112 if case.n < 128 * K else 160, "Lq": min(case.Lq, 8)}
            case = replace(case, **heads, **sizes)
            config = replace(config, k=16, n_sink=4, n_local=8)
        # A drawn problem has no rope, and its configuration none that needs one.
        at = self.device.at
        p = make(replace(case, config=SelectConfig()), device=at, filler=torch.nan)
        rope = None
        if config.positions == "contiguous":
            rope = Rope(10000.0 ** -(torch.arange(0, p.D, 2, device=at).float() / p.D))
        return replace(p, config=config, rope=rope, max_reuse=max_reuse)


def caches(count: int) -> list[SelectionCache]:
    return [SelectionCache(THETA, MAX_REUSE) for _ in range(count)]


def check_counts(what: str, mine: SelectionCache, theirs: SelectionCache) -> None:
    hold(f"{what}: hits", mine.hits.cpu(), theirs.hits.cpu())
    hold(f"{what}: misses", mine.misses.cpu(), theirs.misses.cpu())


# --- plans, graphs of them, and attention ---


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


def calls_and_replays(ground: Ground) -> str:
    """A plan gives attention's bits, and its graph the plan's, whatever changes between calls."""
    group, contiguous = SelectConfig(scope="group"), SelectConfig(positions="contiguous")
    shapes: list[tuple[Case, tuple[bool, ...]]] = [
        (case(MAIN, 128 * K), (True,)),
        (case(MAIN, 32 * K), (False, True)),
        (case((9, 3, 64), 32 * K, 4), (False, True)),
        (case(MAIN, 32 * K, 2, page_size=16), (False, True)),
        (case(MAIN, 32 * K, Lq=CHUNK), (False, True)),
        (case(MAIN, 32 * K, 2, config=group), (True,)),
        (case(MAIN, 32 * K, config=contiguous), (True,)),
    ]
    count = 0
    for one, with_cache in shapes[:1] if ground.quick else shapes:
        for cached in with_cache:
            p = ground.problem(one)
            room = 0 if not cached else MAX_REUSE if p.Lq == 1 else 8 * p.Lq
            count += _one_problem(ground, one.name, replace(p, max_reuse=room))
        ground.device.synchronize()
    return f"{count} calls"


def _one_problem(ground: Ground, name: str, p: Problem) -> int:
    eager, graphed = ground.plans(p)
    name = f"{name}, page size {p.page_size}, {p.config.scope}, max_reuse {p.max_reuse}"
    near = nearness(ground.backend, ground.device.at)
    kept = [SelectionCache(THETA, p.max_reuse) if p.max_reuse else None for _ in range(3)]
    several, reused = list(calls(p)), 0
    for call in several:
        at = replace(p, q=call.q, cache_seqlens=call.lengths, block_table=call.table)
        right = _results(tokenselect.run(at, ground.backend, cache=kept[0], return_info=True))
        mine = _planned(p, eager, call, kept[1])
        for of, got in mine.items():
            if not near or of != "positions":
                hold(f"{name}: {call.what}: a plan and attention: {of}", got, right[of], near)
        for of, got in _planned(p, graphed, call, kept[2]).items():
            hold(f"{name}: {call.what}: a graph and the plan: {of}", got, mine[of])
        reused += int(mine["reused"].sum())
    if p.max_reuse and not 0 < reused < len(several) * p.B:
        raise NotEquivalent(f"{name}: {reused} of {len(several) * p.B} reused, where some should")
    return len(several)


def _planned(p: Problem, plan: Plan, call: Call, cache: SelectionCache | None) -> dict[str, Tensor]:
    for block in plan._scratch.blocks() if call.poison is not None else ():
        block.fill_(call.poison)
    more: dict[str, Any] = {"block_table": call.table, "cache": cache, "return_info": True}
    return _results(plan(call.q, p.k_cache, p.v_cache, call.lengths, **more))


def _results(called: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """Clone what a call gave, since a plan's memory is overwritten."""
    out, info = called
    found = {"out": out, "lse": info.lse, **info.selection._asdict(), "reused": info.reused}
    return {name: x.clone() for name, x in found.items()}


class _Layers:
    """Planned layers one after the other, each adding to what the next one asks."""

    def __init__(self, p: Problem, backend: str, count: int) -> None:
        self.p, self.plan, self.caches = p, tokenselect.plan(p, backend), caches(count)

    def step(self, qs: Tensor, lengths: Tensor) -> Tensor:
        """qs (B, layers, Hq, 1, D); returns what each layer gave, in the same shape."""
        outs: list[Tensor] = []
        for layer, cache in enumerate(self.caches):
            q = qs[:, layer] + 0.01 * outs[-1] if outs else qs[:, layer]
            out = self.plan(q, self.p.k_cache, self.p.v_cache, lengths, cache=cache)
            outs.append(out.clone())
        return torch.stack(outs, 1)


def several_layers(ground: Ground) -> str:
    """A captured step of 4 planned layers gives what the same layers give when called."""
    steps, n_layers, B = ground.many(64, 16), 4, 2
    p = ground.problem(case(MAIN, 32 * K, B))
    # The graph of a plan becomes a part of the step's.
    for backend in (ground.backend, ground.graphed):
        mine, theirs = (_Layers(p, backend, n_layers) for _ in range(2))
        captured = ground.capture(mine.step)
        random = torch.Generator().manual_seed(3)
        lengths = torch.full((B,), p.Lk - steps, dtype=torch.int32, device=p.q.device)
        qs = p.q[:, None].expand(-1, n_layers, -1, -1, -1).contiguous()
        for step in range(steps):
            unlike = (torch.rand(B, generator=random) < 0.3).to(qs.device)
            others = torch.randn(qs.shape, generator=random).to(qs)
            qs = torch.where(unlike.view(-1, 1, 1, 1, 1), others, qs)
            what = f"{n_layers} layers of {backend}, step {step}"
            hold(f"{what}: out", captured(qs, lengths), theirs.step(qs, lengths))
            for layer, pair in enumerate(zip(mine.caches, theirs.caches, strict=True)):
                check_counts(f"{what}, layer {layer}", *pair)
            lengths += 1
        hits, misses = (int(x.sum()) for x in (mine.caches[0].hits, mine.caches[0].misses))
        if not hits or misses <= B:
            raise NotEquivalent(f"{hits} hits and {misses} misses: the trace is to have many")
    return f"{steps} steps, {hits} hits and {misses} misses in the first layer"


# --- streams, memory, waiting ---


def two_streams(ground: Ground) -> str:
    """Two plans on two streams at once, and one plan on two streams by turns."""
    count, rounds = 24, 8
    p = ground.problem(case(MAIN, 32 * K), max_reuse=0)
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
        one, other = (tokenselect.plan(p, backend) for _ in range(2))
        alone = by_turns([one, one], [torch.cuda.current_stream()] * 2)
        for what, plans in (("two plans at once", [one, other]), ("one plan by turns", [one] * 2)):
            for again in range(rounds):
                name = f"{backend}, {what} on two streams: round {again}"
                hold(name, by_turns(plans, streams), alone)
    return f"{rounds * count} calls, each way"


def many_replays(ground: Ground) -> str:
    """Calls and replays, hits and misses, take no memory and wait for nothing; and end the same."""
    count, early = ground.many(10_000, 20, 2_000), ground.many(100, 5)
    p = ground.problem(case(MAIN, 32 * K))
    queries, plans, kept = (p.q, p.q.roll(1, 1).contiguous()), ground.plans(p), caches(2)
    lengths = [torch.full_like(p.cache_seqlens, p.Lk - count + i) for i in range(count)]

    def run(first: int, end: int) -> list[Tensor]:
        for i in range(first, end):
            q = queries[i // 4 % 2]
            outs = [plan(q, p.k_cache, p.v_cache, lengths[i], cache=cache)
                    for plan, cache in zip(plans, kept, strict=True)]  # fmt: skip
        return outs

    run(0, early)  # the first calls make views, state and graphs
    told = [(int(cache.hits), int(cache.misses)) for cache in kept]
    with _no_waiting(ground, f"{count} calls and replays"):
        eager, replayed = run(early, count)
    hold(f"replay {count}: out", replayed, eager)
    check_counts(f"after {count} replays", *kept)
    for cache, (hits, misses) in zip(kept, told, strict=True):
        found = int(cache.hits) - hits, int(cache.misses) - misses
        if found[1] < (count - early) // 4 - 1 or found[0] < 2 * found[1]:
            raise NotEquivalent(f"{found} hits and misses in {count}, where every fourth misses")
    return f"{count} calls and replays, {found[0]} hits and {found[1]} misses"


@contextmanager
def _no_waiting(ground: Ground, what: str) -> Iterator[None]:
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
    except RuntimeError as error:
        raise NotEquivalent(f"{what}: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode(usual)
    if (after := memory()) != before:
        raise NotEquivalent(f"{what}: allocations, bytes in use and reserved {before}, now {after}")


def host_reads_are_refused(ground: Ground) -> str:
    """A step that reads a tensor on the host is refused by name, and leaves nothing behind."""
    x = torch.ones(4, device=ground.device.at)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "item": lambda x: x * x.sum().item(),
        "index": lambda x: x[x > 0],
    }
    for operation, step in steps.items():
        try:
            ground.capture(step)(x)
        except NotCapturable as error:
            if operation not in str(error):
                raise NotEquivalent(f"the refusal does not name {operation}: {error}") from error
        else:
            raise NotEquivalent(f"a step that calls {operation} was captured")
    hold("a step captured after refusals", ground.capture(lambda x: x + 1)(x), x + 1)
    return f"{len(steps)} steps refused"


# --- compiled ---


class _Decoder(nn.Module):
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
        self.plan, (self.cache,) = tokenselect.plan(p, backend), caches(1)

    def forward(self, x: Tensor, at: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, width), its position at (1,): the layer's result, its queries and attention."""
        heads = (x.shape[0], 1, -1, self.p.D)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.k_cache.index_copy_(2, at, k)
        self.v_cache.index_copy_(2, at, v)
        out = self.plan(q, self.k_cache, self.v_cache, lengths, cache=self.cache)
        return self.o(out.transpose(1, 2).reshape(x.shape)), q.clone(), out.clone()


def compiled(ground: Ground) -> str:
    """A compiled layer's plan gives the bits of a plan that is called, and compiles once."""
    from torch._dynamo.utils import counters

    steps, warm, graphs = ground.many(20, 8), 4, 0
    p = ground.problem(case((8, 2, 64), 8 * K, config=SelectConfig(k=64, n_sink=8, n_local=32)))
    torch.manual_seed(5)
    layer = _Decoder(p, ground.backend)
    eager, (cache,) = tokenselect.plan(p, ground.backend), caches(1)
    how = {"mode": "reduce-overhead"} if ground.on_cuda else {"backend": "aot_eager"}
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(layer, fullgraph=True, **how)  # type: ignore[call-overload]
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
        check_counts(what, layer.cache, cache)
        hold(f"{what}: the layer's", result, layer.o(right.transpose(1, 2).reshape(x.shape)), 0.02)
        at += 1
        lengths += 1
        if step + 1 == warm:
            graphs = counters["stats"]["unique_graphs"]
    if (found := counters["stats"]["unique_graphs"]) != graphs:
        raise NotEquivalent(f"{found} graphs were compiled, {graphs} of them in {warm} steps")
    told = f"{steps} steps, {graphs} compiled graph(s), {int(cache.hits.sum())} hits"
    if counters["inductor"]["cudagraph_skips"]:  # right, and slower than it could be
        told += ", BUT TORCH.COMPILE DID WITHOUT CUDA GRAPHS: TORCH_LOGS=perf_hints says why"
    torch._dynamo.reset()
    return told


# --- all of them ---

Check = Callable[[Ground], str]

# Every second one is a part, of about the same length.
CHECKS: tuple[Check, ...] = (
    calls_and_replays,
    compiled,
    several_layers,
    many_replays,
    host_reads_are_refused,
    two_streams,
)


def run(ground: Ground, wanted: Sequence[Check] = CHECKS) -> int:
    """Run checks, each told as it ends; return 1 if one did not pass."""
    if load(ground.backend).static is None:
        print(f"{ground.backend} has no stages that a plan can run: NOTHING IS CHECKED", flush=True)
        return 0
    wrong, done = [], 0
    for check in wanted:
        name, begun = check.__name__.replace("_", " "), time.perf_counter()
        if check is two_streams and not ground.on_cuda:
            print(f"{name}: NOT TRIED: it needs CUDA", flush=True)
            continue
        if check is compiled and ground.quick:
            print(f"{name}: left out by --quick", flush=True)
            continue
        try:
            told = check(ground)
        except Exception as error:
            if not isinstance(error, NotEquivalent):
                traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            wrong.append(f"{name}: {type(error).__name__}: {first}")
            print(f"✗ {wrong[-1]}", flush=True)
        else:
            done += 1
            print(f"{name}: {told}, {time.perf_counter() - begun:.0f} s", flush=True)
    if wrong:
        print(f"✗ {len(wrong)} did not pass: {'; '.join(wrong)}", flush=True)
        return 1
    print(f"{done} of {len(wanted)} checks of plans and graphs", flush=True)
    return 0
