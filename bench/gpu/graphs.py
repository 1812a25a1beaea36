"""What the gate asks of plans and CUDA graphs: `python -m bench.gpu.probe graphs`.

Each check raises `Differs`, which says what, or returns what it has seen. In a dry run graphs are
those of `properties.recorded`, which is not CUDA: streams, memory and waiting are not tried then.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenselect
from bench.gpu import truth
from bench.gpu.device import Device
from bench.gpu.inputs import draw
from bench.gpu.plan import CHUNK, MAIN, Cell
from bench.gpu.reuse import is_exact
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
_NEAR = 0.1  # of plans to calls, on the CPU of a dry run only
_POISON = (0xFF, 0x7F)


class Differs(Exception):
    """What differs, and where."""


@dataclass(frozen=True)
class Ground:
    """Where the checks run. interface: None is CUDA's own graphs."""

    backend: str
    device: Device
    dry: bool = False
    quick: bool = False
    interface: Any = None

    @property
    def on_cuda(self) -> bool:
        return self.device.at.type == "cuda"

    @property
    def exact(self) -> bool:
        return is_exact(self.backend, self.device.at)

    @property
    def graphed(self) -> str:
        """The registered name of the backend that replays this one's plans."""
        name = f"{self.backend}-graphs"
        if name not in backends():
            made = tokenselect.cuda_graph(self.backend, name=name, interface=self.interface)
            register(name, made)
        return name

    def capture(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return tokenselect.capture(step, interface=self.interface)

    def many(self, usual: int, dry: int, quick: int | None = None) -> int:
        return dry if self.dry else quick if self.quick and quick is not None else usual


# --- problems ---


@dataclass(frozen=True)
class Shape:
    """A problem to try. with_cache: without, with, or both."""

    cell: Cell
    page_size: int | None = None
    has_rope: bool = False
    with_cache: tuple[bool, ...] = (False, True)

    @property
    def name(self) -> str:
        more = f", pages of {self.page_size}" if self.page_size else ""
        more += ", contiguous positions" if self.has_rope else ""
        more += ", a selection a group" if self.cell.config.scope == "group" else ""
        return self.cell.name + more

    def problem(self, device: torch.device) -> Problem:
        # A drawn problem has no rope, and its configuration none that needs one.
        p = draw(replace(self.cell, config=SelectConfig()), device, torch.bfloat16)
        rope = None
        if self.has_rope:
            exponents = torch.arange(0, p.D, 2, device=device, dtype=torch.float32) / p.D
            rope = Rope(10000.0**-exponents)
        paged = (p.k_cache, p.v_cache, None)
        if self.page_size is not None:
            paged = _paged(p.k_cache, p.v_cache, self.page_size)
        k, v, table = paged
        return Problem.build(p.q, k, v, self.cell.config, block_table=table, rope=rope)


def _paged(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The caches as pages in a random order, and the table that tells where they are."""
    B, _, n, _ = k.shape
    random = torch.Generator().manual_seed(7)
    order = torch.randperm(B * n // size, generator=random).to(k.device)
    pools = []
    for x in (k, v):
        pages = x.unflatten(2, (-1, size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        pool = torch.empty_like(pages, memory_format=torch.contiguous_format)
        pool[order] = pages
        pools.append(pool)
    return pools[0], pools[1], order.view(B, -1).int()


def shapes(ground: Ground) -> list[Shape]:
    """What the first check goes through; the headline's alone if quick."""
    K = 1024
    group = SelectConfig(scope="group")
    contiguous = SelectConfig(positions="contiguous")
    found = [
        Shape(Cell("decode", *MAIN, 32 * K)),
        Shape(Cell("decode", *MAIN, 128 * K), with_cache=(True,)),
        Shape(Cell("decode", 9, 3, 64, 32 * K, B=4)),
        Shape(Cell("decode", *MAIN, 32 * K, B=2), page_size=16),
        Shape(Cell("prefill", *MAIN, 32 * K, Lq=CHUNK)),
        Shape(Cell("decode", *MAIN, 32 * K, B=2, config=group), with_cache=(True,)),
        Shape(Cell("decode", *MAIN, 32 * K, config=contiguous), has_rope=True, with_cache=(True,)),
    ]
    if ground.dry:
        found = [_shrunk(shape) for shape in found]
    return found[1:2] if ground.quick else found


def _shrunk(shape: Shape) -> Shape:
    cell = shape.cell
    heads = (3, 1, 32) if cell.Hq == 9 else (4, 2, 32)
    config = replace(cell.config, k=16, n_sink=4, n_local=8)
    Hq, Hkv, D = heads
    Lq = min(cell.Lq, 8)
    n = 112 if cell.n < 128 * 1024 else 160
    return replace(shape, cell=replace(cell, Hq=Hq, Hkv=Hkv, D=D, n=n, Lq=Lq, config=config))


def _decode(ground: Ground, n: int, B: int = 1, small: bool = False) -> Problem:
    """A decode problem of the main geometry, or of a small one."""
    config = SelectConfig(k=64, n_sink=8, n_local=32) if small else SelectConfig()
    heads = (8, 2, 64) if small else MAIN
    shape = Shape(Cell("decode", *heads, n, B=B, config=config))
    if ground.dry:
        shape = _shrunk(shape)
    return replace(shape.problem(ground.device.at), max_reuse=MAX_REUSE)


# --- calls, and what they give ---


class Call(NamedTuple):
    """Inputs of one call. poison: what the plans' memory is filled with before it."""

    what: str
    q: Tensor
    lengths: Tensor
    table: Tensor | None
    poison: int | None = None


class Given(NamedTuple):
    out: Tensor
    lse: Tensor
    positions: Tensor
    count: Tensor
    reused: Tensor


def calls(p: Problem) -> Iterator[Call]:
    """What may change from call to call: queries, lengths, the block table; and what must not."""
    B, room = p.B, p.Lk - p.Lq
    near = p.Lk - 6 * p.Lq - 8 - torch.arange(B, dtype=torch.int32, device=p.q.device)
    usual = Call("as captured", p.q, near, p.block_table)
    yield usual
    yield usual._replace(what="as captured, again")
    yield usual._replace(what="longer", lengths=near + p.Lq)
    yield usual._replace(what="shorter", lengths=p.Lq + near // 3)
    missing = near.clone()
    missing[B // 2] = 0
    yield usual._replace(what="a request of length 0", lengths=missing)
    yield usual._replace(what="at capacity", lengths=torch.full_like(near, room + p.Lq))
    others = p.q.roll(1, 1) - p.q
    yield usual._replace(what="other queries", q=others)
    if p.block_table is not None:
        table = p.block_table.flip(1).contiguous()
        yield usual._replace(what="another block table", table=table)
    for poison in _POISON:
        what = f"the plan's memory filled with 0x{poison:02X}"
        yield usual._replace(what=what, poison=poison)
        longer = near + p.Lq
        yield usual._replace(what=f"{what}, longer", lengths=longer, poison=poison)


def _attended(p: Problem, backend: str, call: Call, cache: SelectionCache | None) -> Given:
    """`attention` on a call's inputs."""
    at = replace(p, q=call.q, cache_seqlens=call.lengths)
    out, info = truth.attention(
        at, backend, block_table=call.table, rope=p.rope, cache=cache, return_info=True
    )
    return Given(out, info.lse, *info.selection, info.reused)


def _planned(p: Problem, plan: Plan, call: Call, cache: SelectionCache | None) -> Given:
    """A plan on a call's inputs; clones, since the plan's memory is overwritten."""
    if call.poison is not None:
        for block in plan._scratch.blocks():
            block.fill_(call.poison)
    given: dict[str, Any] = {"block_table": call.table, "cache": cache, "return_info": True}
    out, info = plan(call.q, p.k_cache, p.v_cache, call.lengths, **given)
    return Given(*(x.clone() for x in (out, info.lse, *info.selection, info.reused)))


def _hold(what: str, got: Given, right: Given, *, exact: bool = True) -> None:
    """Raises Differs unless both are bitwise the same; or nearly, where exact is not asked for."""
    for name, mine, theirs in zip(Given._fields, got, right, strict=True):
        if not exact and name == "positions":
            continue
        if exact or name in ("count", "reused"):
            _hold_bits(f"{what}: {name}", mine, theirs)
            continue
        far = (mine.float() - theirs.float()).nan_to_num(0.0, 0.0, 0.0).abs().max()
        if not far <= _NEAR * (1 + theirs.float().nan_to_num(0.0, 0.0, 0.0).abs().max()):
            raise Differs(f"{what}: {name} is {float(far):.3g} away")


def _hold_bits(what: str, got: Tensor, right: Tensor) -> None:
    if got.shape != right.shape or got.dtype != right.dtype:
        raise Differs(f"{what}: {tuple(got.shape)} {got.dtype}, not "
                      f"{tuple(right.shape)} {right.dtype}")  # fmt: skip
    if truth.same(got, right):
        return
    other = truth.bits(got) != truth.bits(right)
    first = tuple(other.nonzero()[0].tolist())
    raise Differs(
        f"{what}: {int(other.sum())} of {other.numel()} values differ, the first at {first}: "
        f"{got[first].item()!r}, not {right[first].item()!r}"
    )


# --- the checks ---


def calls_and_replays(ground: Ground) -> str:
    """A plan gives attention's bits, and its graph the plan's, whatever changes between calls."""
    count = 0
    for shape in shapes(ground):
        p = shape.problem(ground.device.at)
        for cached in shape.with_cache:
            count += _one_problem(ground, shape.name, p, cached)
        ground.device.synchronize()
    return f"{count} calls"


def _one_problem(ground: Ground, name: str, p: Problem, cached: bool) -> int:
    room = 0
    if cached:
        room = MAX_REUSE if p.Lq == 1 else 8 * p.Lq
    name += ", a SelectionCache" if cached else ""
    like = replace(p, max_reuse=room)
    eager, graphed = (tokenselect.plan(like, each) for each in (ground.backend, ground.graphed))
    caches = [SelectionCache(THETA, room) if cached else None for _ in range(3)]
    count, reused = 0, 0
    for call in calls(p):
        what = f"{name}: {call.what}"
        expected = _attended(p, ground.backend, call, caches[0])
        mine = _planned(p, eager, call, caches[1])
        _hold(f"{what}: a plan and attention", mine, expected, exact=ground.exact)
        _hold(f"{what}: a graph and the plan", _planned(p, graphed, call, caches[2]), mine)
        reused += int(mine.reused.sum())
        count += 1
    if cached and not 0 < reused < count * p.B:
        raise Differs(f"{name}: {reused} of {count * p.B} reused, where some should")
    return count


def several_layers(ground: Ground) -> str:
    """A captured step of 4 planned layers gives what the same layers give when called."""
    steps, n_layers, B = ground.many(64, 16), 4, 2
    p = _decode(ground, 32 * 1024, B)
    inside = ground.graphed  # the graph of a plan becomes a part of the step's
    for backend in (ground.backend, inside):
        mine, theirs = (_Layers(p, backend, n_layers) for _ in range(2))
        captured = ground.capture(mine.step)
        random = torch.Generator().manual_seed(3)
        lengths = torch.full((B,), p.Lk - steps, dtype=torch.int32, device=p.q.device)
        qs = p.q[:, None].expand(-1, n_layers, -1, -1, -1).contiguous()
        for step in range(steps):
            unlike = torch.rand(B, generator=random) < 0.3
            fresh = torch.randn(qs.shape, generator=random).to(qs)
            qs = torch.where(unlike.to(qs.device).view(-1, 1, 1, 1, 1), fresh, qs)
            got, right = captured(qs, lengths), theirs.step(qs, lengths)
            what = f"{n_layers} layers of {backend}, step {step}"
            _hold_bits(f"{what}: out", got, right)
            for layer, (one, other) in enumerate(zip(mine.caches, theirs.caches, strict=True)):
                _hold_bits(f"{what}, layer {layer}: hits", one.hits, other.hits)
                _hold_bits(f"{what}, layer {layer}: misses", one.misses, other.misses)
            lengths += 1
        hits, misses = (int(x.sum()) for x in (mine.caches[0].hits, mine.caches[0].misses))
        if not hits or misses <= B:
            raise Differs(f"{hits} hits and {misses} misses: the trace is to have many of both")
    return f"{steps} steps, {hits} hits and {misses} misses in the first layer"


class _Layers:
    """Planned layers one after the other, each adding to what the next one asks."""

    def __init__(self, p: Problem, backend: str, count: int) -> None:
        self.p, self.plan = p, tokenselect.plan(p, backend)
        self.caches = [SelectionCache(THETA, MAX_REUSE) for _ in range(count)]

    def step(self, qs: Tensor, lengths: Tensor) -> Tensor:
        """qs (B, layers, Hq, 1, D); returns what each layer gave, in the same shape."""
        outs: list[Tensor] = []
        for layer, cache in enumerate(self.caches):
            q = qs[:, layer] + 0.01 * outs[-1] if outs else qs[:, layer]
            given = (q, self.p.k_cache, self.p.v_cache, lengths)
            outs.append(self.plan(*given, cache=cache).clone())
        return torch.stack(outs, 1)


def two_streams(ground: Ground) -> str:
    """Two plans on two streams at once, and one plan on two streams by turns."""
    count, rounds = 24, 8
    p = _decode(ground, 32 * 1024)
    like, less = replace(p, max_reuse=0), p.Lk // 64
    inputs = [(p.q + 0.1 * i, p.cache_seqlens - less * i) for i in range(count)]
    outs = [torch.empty_like(p.q) for _ in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for backend in (ground.backend, ground.graphed):
        plans = [tokenselect.plan(like, backend) for _ in range(2)]
        here = [torch.cuda.current_stream()] * 2
        _by_turns(plans[:1] * 2, here, p, inputs, outs)
        alone = [out.clone() for out in outs]
        for what, of in (("two plans at once", plans), ("one plan by turns", plans[:1] * 2)):
            for again in range(rounds):
                _by_turns(of, streams, p, inputs, outs)
                for i, (out, right) in enumerate(zip(outs, alone, strict=True)):
                    name = f"{backend}, {what} on two streams: round {again}, call {i}"
                    _hold_bits(name, out, right)
    return f"{rounds * count} calls, each way"


def _by_turns(
    plans: Sequence[Plan],
    streams: Sequence[torch.cuda.Stream],
    p: Problem,
    inputs: Sequence[tuple[Tensor, Tensor]],
    outs: Sequence[Tensor],
) -> None:
    """Each input's call on one of two plans and streams, which only the plans keep in order."""
    for out in outs:
        out.fill_(torch.nan)
    torch.cuda.synchronize()
    for stream in streams:  # so that calls of both wait side by side
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
    for i, ((q, lengths), out) in enumerate(zip(inputs, outs, strict=True)):
        with torch.cuda.stream(streams[i % 2]):
            plans[i % 2](q, p.k_cache, p.v_cache, lengths, out=out)
    torch.cuda.synchronize()


def many_replays(ground: Ground) -> str:
    """Replays take no memory, and the last gives what a call gives."""
    count, early = ground.many(10_000, 20, 2_000), ground.many(100, 5)
    p = _decode(ground, 32 * 1024)
    eager, graphed = (tokenselect.plan(p, each) for each in (ground.backend, ground.graphed))
    mine, theirs = SelectionCache(THETA, MAX_REUSE), SelectionCache(THETA, MAX_REUSE)
    lengths = torch.full_like(p.cache_seqlens, p.Lk - count)
    before: tuple[int, ...] = ()
    for i in range(count):
        out = graphed(p.q, p.k_cache, p.v_cache, lengths, cache=mine)
        right = eager(p.q, p.k_cache, p.v_cache, lengths, cache=theirs)
        lengths += 1
        if i + 1 == early:
            before = _memory_in_use(ground)
    _hold_bits(f"replay {count}: out", out, right)
    _hold_bits(f"after {count} replays: hits", mine.hits, theirs.hits)
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


def _one_of(
    plan: Plan, p: Problem, lengths: list[Tensor], cache: SelectionCache, q: Tensor, i: int
) -> None:
    plan(q, p.k_cache, p.v_cache, lengths[i], cache=cache)


def waits_for_nothing(ground: Ground) -> str:
    """A planned call neither waits for the device nor takes memory, in a hit and in a miss."""
    p = _decode(ground, 32 * 1024)
    others = p.q.roll(1, 1).contiguous()
    n = p.Lk - 8
    lengths = [torch.full_like(p.cache_seqlens, n + i) for i in range(6)]
    for backend in (ground.backend, ground.graphed):
        plan, cache = tokenselect.plan(p, backend), SelectionCache(THETA, MAX_REUSE)
        call = partial(_one_of, plan, p, lengths, cache)
        for i, q in enumerate((p.q, others, others)):  # the first calls make views and state
            call(q, i)
        told = int(cache.hits), int(cache.misses)
        with _no_waiting(ground, backend):
            call(others, 3)
            call(p.q, 4)
            call(p.q, 5)
        found = int(cache.hits) - told[0], int(cache.misses) - told[1]
        if found != (2, 1):
            raise Differs(f"{backend}: {found} hits and misses, not (2, 1)")
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

    def reads(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def sizes(x: Tensor) -> Tensor:
        return x[x > 0]

    names = {}
    for step, operation in ((reads, "item"), (sizes, "index")):
        try:
            ground.capture(step)(x)
        except NotCapturable as error:
            names[step.__name__] = str(error)
            if operation not in str(error):
                raise Differs(f"the refusal does not name {operation}: {error}") from error
        else:
            raise Differs(f"a step that calls {operation} was captured")
    _hold_bits("a step captured after refusals", ground.capture(lambda x: x + 1)(x), x + 1)
    return f"{len(names)} steps refused"


def decisions(ground: Ground) -> str:
    """Hits and misses are the reference's, for queries whose cosine lies near theta."""
    steps, B, n = ground.many(200, 24), 4, 512
    total = [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        p = _decode(ground, n, B, small=True)
        p = replace(p, q=p.q.to(dtype), k_cache=p.k_cache.to(dtype), v_cache=p.v_cache.to(dtype))
        here = replace(
            p, q=p.q.cpu(), k_cache=p.k_cache.cpu(), v_cache=p.v_cache.cpu(),
            cache_seqlens=p.cache_seqlens.cpu(),
        )  # fmt: skip
        plans = [tokenselect.plan(p, each) for each in (ground.backend, ground.graphed)]
        several = [SelectionCache(THETA, MAX_REUSE) for _ in range(2)]
        reference = SelectionCache(THETA, MAX_REUSE)
        random = torch.Generator().manual_seed(11)
        q, lengths = here.q, torch.full((B,), p.Lk // 2, dtype=torch.int32)
        for step in range(steps):
            at = replace(here, q=q, cache_seqlens=lengths)
            truth.attention(at, "reference", cache=reference)
            for plan, cache in zip(plans, several, strict=True):
                plan(q.to(p.q), p.k_cache, p.v_cache, lengths.to(p.q.device), cache=cache)
                what = f"{dtype}, {plan.backend}, step {step}"
                _hold_bits(f"{what}: hits", cache.hits.cpu(), reference.hits)
                _hold_bits(f"{what}: misses", cache.misses.cpu(), reference.misses)
            stored = reference._memory.query  # type: ignore[union-attr]  # it was used
            q = _near_theta(stored, q.shape, random).to(dtype)
            lengths = lengths + 1
            lengths[lengths > p.Lk] = p.Lk // 2
        hits, misses = int(reference.hits.sum()), int(reference.misses.sum())
        if min(hits, misses) < steps * B / 20:
            raise Differs(f"{dtype}: {hits} hits, {misses} misses: too few of one to tell")
        total = [total[0] + hits, total[1] + misses]
    return f"{total[0]} hits and {total[1]} misses as in the reference"


def _near_theta(stored: Tensor, shape: torch.Size, random: torch.Generator) -> Tensor:
    """A query for each request whose cosine with the stored one is theta and a little, or less."""
    B = len(stored)
    along = nn.functional.normalize(stored.double(), dim=1)
    across = torch.randn(along.shape, generator=random, dtype=torch.float64)
    across -= (across * along).sum(1, keepdim=True) * along
    across = nn.functional.normalize(across, dim=1)
    size = 10.0 ** -torch.randint(2, 10, (B, 1), generator=random).double()
    sign = torch.randint(2, (B, 1), generator=random) * 2 - 1
    cosine = THETA + sign * size
    turned = cosine * along + (1 - cosine**2).sqrt() * across
    return (turned * stored.double().norm(dim=1, keepdim=True)).view(shape).float()


# --- torch.compile ---


class _Decoder(nn.Module):
    """Projections, a cache that is written to, a plan with a SelectionCache: one layer's decode."""

    def __init__(self, p: Problem, backend: str) -> None:
        super().__init__()
        self.p, self.width = p, p.Hq * p.D
        settings: dict[str, Any] = {"bias": False, "device": p.q.device, "dtype": p.q.dtype}
        self.q = nn.Linear(self.width, self.width, **settings)
        self.k = nn.Linear(self.width, p.Hkv * p.D, **settings)
        self.v = nn.Linear(self.width, p.Hkv * p.D, **settings)
        self.o = nn.Linear(self.width, self.width, **settings)
        self.register_buffer("k_cache", p.k_cache.clone())
        self.register_buffer("v_cache", p.v_cache.clone())
        self.plan, self.cache = tokenselect.plan(p, backend), SelectionCache(THETA, MAX_REUSE)

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

    steps, warm = ground.many(20, 8), 4
    p = _decode(ground, 8 * 1024, small=True)
    torch.manual_seed(5)
    layer = _Decoder(p, ground.backend)
    how: dict[str, Any] = (
        {"mode": "reduce-overhead"} if ground.on_cuda else {"backend": "aot_eager"}
    )
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(layer, fullgraph=True, **how)
    eager, cache = tokenselect.plan(p, ground.backend), SelectionCache(THETA, MAX_REUSE)
    at = torch.full((1,), p.Lk - steps - 1, device=p.q.device)
    lengths = torch.full((p.B,), p.Lk - steps, dtype=torch.int32, device=p.q.device)
    x, graphs = torch.randn(p.B, 1, layer.width, device=p.q.device).to(p.q.dtype), 0
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
        _hold_bits(f"{what}: the plan's result", out, right)
        _hold_bits(f"{what}: hits", layer.cache.hits, cache.hits)
        _hold_bits(f"{what}: misses", layer.cache.misses, cache.misses)
        expected = layer.o(right.transpose(1, 2).reshape(x.shape))
        if not torch.allclose(result.float(), expected.float(), rtol=0.02, atol=0.02):
            raise Differs(f"{what}: the layer's result is far from the same layer's, called")
        at += 1
        lengths += 1
        if step + 1 == warm:
            graphs = counters["stats"]["unique_graphs"]
    if counters["stats"]["unique_graphs"] != graphs:
        raise Differs(
            f"{counters['stats']['unique_graphs']} graphs were compiled, {graphs} of them in the "
            f"first {warm} steps"
        )
    told = f"{steps} steps, {graphs} compiled graph(s), {int(cache.hits.sum())} hits"
    if counters["inductor"]["cudagraph_skips"]:  # right, and slower than it could be
        told += ", BUT TORCH.COMPILE DID WITHOUT CUDA GRAPHS: TORCH_LOGS=perf_hints says why"
    torch._dynamo.reset()
    return told


# --- all of them ---

Check = Callable[[Ground], str]


@dataclass(frozen=True)
class Named:
    name: str
    run: Check
    needs_cuda: bool = False
    if_quick: bool = True


# Every second one is a part, of about the same length.
CHECKS: tuple[Named, ...] = (
    Named("calls and replays", calls_and_replays),
    Named("torch.compile", compiled, if_quick=False),
    Named("several layers in a graph", several_layers),
    Named("decisions", decisions, if_quick=False),
    Named("a call waits for nothing", waits_for_nothing),
    Named("many replays", many_replays),
    Named("host reads are refused", host_reads_are_refused),
    Named("two streams", two_streams, needs_cuda=True),
)


def run(ground: Ground, wanted: Sequence[Named] = CHECKS) -> int:
    """All checks, each told as it ends; 1 if one did not pass."""
    if load(ground.backend).static is None:
        print(f"{ground.backend} has no stages that a plan can run: NOTHING IS CHECKED", flush=True)
        return 0
    wrong, done = [], 0
    for check in wanted:
        if check.needs_cuda and not ground.on_cuda:
            print(f"{check.name}: NOT TRIED: it needs CUDA", flush=True)
            continue
        if ground.quick and not check.if_quick:
            print(f"{check.name}: left out by --quick", flush=True)
            continue
        begun = time.perf_counter()
        try:
            told = check.run(ground)
        except Exception as error:
            if not isinstance(error, Differs):
                traceback.print_exc()
            first = str(error).splitlines()[0] if str(error) else ""
            wrong.append(f"{check.name}: {type(error).__name__}: {first}")
            print(f"✗ {wrong[-1]}", flush=True)
        else:
            done += 1
            print(f"{check.name}: {told}, {time.perf_counter() - begun:.0f} s", flush=True)
    if wrong:
        print(f"✗ {len(wrong)} did not pass: {'; '.join(wrong)}", flush=True)
        return 1
    print(f"{done} of {len(wanted)} checks of plans and graphs", flush=True)
    return 0
