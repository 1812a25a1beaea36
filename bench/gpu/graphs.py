"""What is checked of plans and CUDA graphs: `python -m bench.gpu.checks graphs`.

Each check raises `Differs`, which says what, or returns what it has seen. In a dry run graphs are
those of `properties.recorded`, which is not CUDA: streams, memory and waiting are not tried then.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tokenselect
from bench.gpu.cases import CHUNK, MAIN, Case, K
from bench.gpu.ground import (
    MAX_REUSE,
    THETA,
    Differs,
    Ground,
    caches,
    calls,
    check_bits,
    check_counts,
    check_same,
    given,
    planned,
)
from bench.gpu.steps import is_exact
from tokenselect import NotCapturable, Plan, Problem, SelectConfig, SelectionCache
from tokenselect.dispatch.registry import load

_SMALL = SelectConfig(k=64, n_sink=8, n_local=32)


def calls_and_replays(ground: Ground) -> str:
    """A plan gives attention's bits, and its graph the plan's, whatever changes between calls."""
    group, contiguous = SelectConfig(scope="group"), SelectConfig(positions="contiguous")
    long = Case(*MAIN, 128 * K)
    shapes: list[tuple[Case, tuple[bool, ...], dict[str, Any]]] = [
        (long, (True,), {}),
        (replace(long, n=32 * K), (False, True), {}),
        (Case(9, 3, 64, 32 * K, B=4), (False, True), {}),
        (Case(*MAIN, 32 * K, B=2), (False, True), {"page_size": 16}),
        (Case(*MAIN, 32 * K, Lq=CHUNK), (False, True), {}),
        (Case(*MAIN, 32 * K, B=2, config=group), (True,), {}),
        (Case(*MAIN, 32 * K, config=contiguous), (True,), {"has_rope": True}),
    ]
    count = 0
    for case, with_cache, more in shapes[:1] if ground.quick else shapes:
        for cached in with_cache:
            p = ground.problem(case, **more)
            room = 0 if not cached else MAX_REUSE if p.Lq == 1 else 8 * p.Lq
            name = f"{case.name}, {more | {'scope': case.config.scope, 'max_reuse': room}}"
            count += _one_problem(ground, name, replace(p, max_reuse=room))
        ground.device.synchronize()
    return f"{count} calls"


def _one_problem(ground: Ground, name: str, p: Problem) -> int:
    eager, graphed = ground.plans(p)
    exact = is_exact(ground.backend, ground.device.at)
    kept = [SelectionCache(THETA, p.max_reuse) if p.max_reuse else None for _ in range(3)]
    several, reused = list(calls(p)), 0
    for call in several:
        what = f"{name}: {call.what}"
        at = replace(p, q=call.q, cache_seqlens=call.lengths, block_table=call.table)
        run = tokenselect.run(at, ground.backend, cache=kept[0], return_info=True)
        mine = planned(p, eager, call, kept[1])
        check_same(f"{what}: a plan and attention", mine, given(*run), exact=exact)
        check_same(f"{what}: a graph and the plan", planned(p, graphed, call, kept[2]), mine)
        reused += int(mine["reused"].sum())
    if p.max_reuse and not 0 < reused < len(several) * p.B:
        raise Differs(f"{name}: {reused} of {len(several) * p.B} reused, where some should")
    return len(several)


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
    p = ground.problem(Case(*MAIN, 32 * K, B))
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
            check_bits(f"{what}: out", captured(qs, lengths), theirs.step(qs, lengths))
            for layer, pair in enumerate(zip(mine.caches, theirs.caches, strict=True)):
                check_counts(f"{what}, layer {layer}", *pair)
            lengths += 1
        hits, misses = (int(x.sum()) for x in (mine.caches[0].hits, mine.caches[0].misses))
        if not hits or misses <= B:
            raise Differs(f"{hits} hits and {misses} misses: the trace is to have many of both")
    return f"{steps} steps, {hits} hits and {misses} misses in the first layer"


def two_streams(ground: Ground) -> str:
    """Two plans on two streams at once, and one plan on two streams by turns."""
    count, rounds = 24, 8
    p = ground.problem(Case(*MAIN, 32 * K), max_reuse=0)
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
                for i, (out, right) in enumerate(zip(by_turns(plans, streams), alone, strict=True)):
                    name = f"{backend}, {what} on two streams: round {again}, call {i}"
                    check_bits(name, out, right)
    return f"{rounds * count} calls, each way"


def many_replays(ground: Ground) -> str:
    """Replays take no memory, and the last gives what a call gives."""
    count, early = ground.many(10_000, 20, 2_000), ground.many(100, 5)
    p = ground.problem(Case(*MAIN, 32 * K))
    eager, graphed = ground.plans(p)
    mine, theirs = caches(2)
    lengths = torch.full_like(p.cache_seqlens, p.Lk - count)
    before: tuple[int, ...] = ()
    for i in range(count):
        out = graphed(p.q, p.k_cache, p.v_cache, lengths, cache=mine)
        right = eager(p.q, p.k_cache, p.v_cache, lengths, cache=theirs)
        lengths += 1
        if i + 1 == early:
            before = _memory_in_use(ground)
    check_bits(f"replay {count}: out", out, right)
    check_counts(f"after {count} replays", mine, theirs)
    after = _memory_in_use(ground)
    if after != before:
        raise Differs(
            f"memory allocated and reserved: {before} after {early} replays, {after} after {count}"
        )
    return f"{count} replays, {int(mine.hits)} hits, memory as after {early}: {after}"


def _memory_in_use(ground: Ground) -> tuple[int, ...]:
    if not ground.on_cuda:
        return ()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def waits_for_nothing(ground: Ground) -> str:
    """A planned call neither waits for the device nor takes memory, in a hit and in a miss."""
    p = ground.problem(Case(*MAIN, 32 * K))
    others = p.q.roll(1, 1).contiguous()
    lengths = [torch.full_like(p.cache_seqlens, p.Lk - 8 + i) for i in range(6)]
    for plan in ground.plans(p):
        (cache,) = caches(1)

        def call(q: Tensor, i: int, plan: Plan = plan, cache: SelectionCache = cache) -> None:
            plan(q, p.k_cache, p.v_cache, lengths[i], cache=cache)

        for i, q in enumerate((p.q, others, others)):  # the first calls make views and state
            call(q, i)
        told = int(cache.hits), int(cache.misses)
        with _no_waiting(ground, plan.backend):
            for i, q in enumerate((others, p.q, p.q), 3):
                call(q, i)
        found = int(cache.hits) - told[0], int(cache.misses) - told[1]
        if found != (2, 1):
            raise Differs(f"{plan.backend}: {found} hits and misses, not (2, 1)")
    return "hits and misses, as calls and as replays"


@contextmanager
def _no_waiting(ground: Ground, what: str) -> Iterator[None]:
    if not ground.on_cuda:
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    usual = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise Differs(f"{what}: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode(usual)
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    if after != before:
        raise Differs(f"{what}: {after - before} allocations")


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
                raise Differs(f"the refusal does not name {operation}: {error}") from error
        else:
            raise Differs(f"a step that calls {operation} was captured")
    check_bits("a step captured after refusals", ground.capture(lambda x: x + 1)(x), x + 1)
    return f"{len(steps)} steps refused"


def decisions(ground: Ground) -> str:
    """Hits and misses are the reference's, for queries whose cosine lies near theta."""
    steps, B = ground.many(200, 24), 4
    total = [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        p = ground.problem(Case(8, 2, 64, 512, B, config=_SMALL))
        p = replace(p, q=p.q.to(dtype), k_cache=p.k_cache.to(dtype), v_cache=p.v_cache.to(dtype))
        names = ("q", "k_cache", "v_cache", "cache_seqlens")
        here = replace(p, **{name: getattr(p, name).cpu() for name in names})
        plans, (*mine, reference) = ground.plans(p), caches(3)
        random = torch.Generator().manual_seed(11)
        q, lengths = here.q, torch.full((B,), p.Lk // 2, dtype=torch.int32)
        for step in range(steps):
            at = replace(here, q=q, cache_seqlens=lengths)
            tokenselect.run(at, "reference", cache=reference)
            for plan, cache in zip(plans, mine, strict=True):
                plan(q.to(p.q), p.k_cache, p.v_cache, lengths.to(p.q.device), cache=cache)
                check_counts(f"{dtype}, {plan.backend}, step {step}", cache, reference)
            stored = reference._memory.query  # type: ignore[union-attr]  # it was used
            q = _near_theta(stored, random).view(q.shape).to(dtype)
            lengths = lengths + 1
            lengths[lengths > p.Lk] = p.Lk // 2
        hits, misses = int(reference.hits.sum()), int(reference.misses.sum())
        if min(hits, misses) < steps * B / 20:
            raise Differs(f"{dtype}: {hits} hits, {misses} misses: too few of one to tell")
        total = [total[0] + hits, total[1] + misses]
    return f"{total[0]} hits and {total[1]} misses as in the reference"


def _near_theta(stored: Tensor, random: torch.Generator) -> Tensor:
    """Return queries whose cosine with the stored ones (B, Hq * D) is theta, or a little off."""
    along = nn.functional.normalize(stored.double(), dim=1)
    across = torch.randn(along.shape, generator=random, dtype=torch.float64)
    across -= (across * along).sum(1, keepdim=True) * along
    across = nn.functional.normalize(across, dim=1)
    size = 10.0 ** -torch.randint(2, 10, (len(stored), 1), generator=random).double()
    cosine = THETA + size * (torch.randint(2, size.shape, generator=random) * 2 - 1)
    turned = cosine * along + (1 - cosine**2).sqrt() * across
    return (turned * stored.double().norm(dim=1, keepdim=True)).float()


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
    p = ground.problem(Case(8, 2, 64, 8 * K, config=_SMALL))
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
        check_bits(f"{what}: the plan's result", out, right)
        check_counts(what, layer.cache, cache)
        expected = layer.o(right.transpose(1, 2).reshape(x.shape))
        if not torch.allclose(result.float(), expected.float(), rtol=0.02, atol=0.02):
            raise Differs(f"{what}: the layer's result is far from the same layer's, called")
        at += 1
        lengths += 1
        if step + 1 == warm:
            graphs = counters["stats"]["unique_graphs"]
    if (found := counters["stats"]["unique_graphs"]) != graphs:
        raise Differs(f"{found} graphs were compiled, {graphs} of them in the first {warm} steps")
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
    decisions,
    waits_for_nothing,
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
        if check in (compiled, decisions) and ground.quick:
            print(f"{name}: left out by --quick", flush=True)
            continue
        try:
            told = check(ground)
        except Exception as error:
            if not isinstance(error, Differs):
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
