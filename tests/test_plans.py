"""Plans and captured steps by example. What holds of every backend is in properties/test_plans.py.

There is no CUDA here: where a capture is needed, `properties.recorded` stands for it.
"""

import copy
import functools
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from properties.recorded import Recorded
from tests import fresh
from tests.problems import SMALL, lengths, paged, problem, rope, tensors
from tokenselect import (
    InvalidProblem,
    NotCapturable,
    Problem,
    Rope,
    SelectConfig,
    SelectionCache,
    attention,
    capture,
    check_capturable,
    cuda_graph,
    plan,
)
from tokenselect.dispatch import registry
from tokenselect.scratch import empty

Q, K_CACHE, V_CACHE = tensors()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other)


def in_threads(run: Callable[[int], None], count: int) -> None:
    """run(0), run(1), ... at the same time."""
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_auto_plans_what_auto_would_run() -> None:
    planned = plan(problem())
    assert planned.backend == fresh.AUTO
    close(
        planned(Q, K_CACHE, V_CACHE, lengths(40, 9)),
        attention(Q, K_CACHE, V_CACHE, **SMALL, cache_seqlens=lengths(40, 9)),
    )


def test_info_is_that_of_attention() -> None:
    arguments = {"cache_seqlens": lengths(40, 9)}
    _, info = plan(problem())(Q, K_CACHE, V_CACHE, **arguments, return_info=True)
    _, expected = attention(Q, K_CACHE, V_CACHE, **SMALL, **arguments, return_info=True)
    close(info.lse, expected.lse)
    close(info.retained_mass, expected.retained_mass)
    assert torch.equal(info.selection.positions, expected.selection.positions)
    assert (info.reused.tolist(), info.backend) == ([False, False], fresh.AUTO)


def test_the_next_call_overwrites_a_result_but_not_out() -> None:
    planned, out = plan(problem()), torch.empty_like(Q)
    given = planned(Q, K_CACHE, V_CACHE, lengths(40, 9), out=out)
    assert given is out
    kept = out.clone()
    first = planned(Q, K_CACHE, V_CACHE, lengths(40, 9))
    second = planned(-Q, K_CACHE, V_CACHE, lengths(40, 9))
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(out, kept)
    assert not torch.equal(first, kept)


def test_plans_and_caches_say_what_they_are() -> None:
    planned, cache = plan(problem(max_reuse=8)), SelectionCache(max_reuse=8)
    assert repr(planned) == f"Plan({problem().describe()}; {fresh.AUTO}, {planned.bytes} bytes)"
    assert repr(cache) == "SelectionCache(theta=0.9, max_reuse=8; not used yet)"
    planned.prepare(cache)
    assert repr(cache) == "SelectionCache(theta=0.9, max_reuse=8; B=2)"


def test_a_copy_of_a_plan_has_memory_of_its_own() -> None:
    planned = plan(problem())
    twin = copy.deepcopy(planned)
    first = planned(Q, K_CACHE, V_CACHE, lengths(40, 9))
    kept = first.clone()
    twin(-Q, K_CACHE, V_CACHE, lengths(40, 9))
    assert torch.equal(first, kept)
    assert torch.equal(twin(Q, K_CACHE, V_CACHE, lengths(40, 9)), kept)


def test_bytes_are_of_the_capacity() -> None:
    small, large = plan(problem()), plan(problem(shape={"Lk": 400}))
    assert 0 < small.bytes < large.bytes < 20 * small.bytes


@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used", [torch.no_grad, torch.inference_mode])
def test_modes_do_not_mix_up(made: Callable[[], Any], used: Callable[[], Any]) -> None:
    cache = SelectionCache(max_reuse=8)
    with made():
        rotated = {"rope": rope(), "config": {"score_at": "split", "positions": "contiguous"}}
        planned = plan(problem(max_reuse=8, **rotated))
        planned(Q, K_CACHE, V_CACHE, lengths(39, 8), cache=cache)
    with used():
        planned(Q, K_CACHE, V_CACHE, lengths(40, 9), cache=cache)
    planned(Q, K_CACHE, V_CACHE, lengths(40, 10), cache=cache)
    assert cache.hits.tolist() == [2, 2]


def test_autocast_changes_nothing() -> None:
    planned = plan(problem())
    expected = planned(Q, K_CACHE, V_CACHE, lengths(40, 9)).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(planned(Q, K_CACHE, V_CACHE, lengths(40, 9)), expected)


def test_what_requires_grad_is_refused() -> None:
    planned = plan(problem())
    q = Q.clone().requires_grad_()
    with pytest.raises(InvalidProblem, match="q requires grad"):
        planned(q, K_CACHE, V_CACHE, lengths(40, 9))


def test_a_plan_keeps_its_rope() -> None:
    """Settings are as they were when planned, the frequencies too."""
    given = rope()
    settings = {"rope": given, "config": {"positions": "contiguous"}}
    planned = plan(problem(**settings))
    expected = planned(Q, K_CACHE, V_CACHE, lengths(40, 9)).clone()
    given.inv_freq.mul_(3)
    assert torch.equal(planned(Q, K_CACHE, V_CACHE, lengths(40, 9)), expected)
    assert not torch.allclose(
        plan(problem(**settings))(Q, K_CACHE, V_CACHE, lengths(40, 9)), expected
    )


def test_lengths_that_are_no_lengths_harm_no_other_request() -> None:
    """Nonsense for that request, and nothing read or written out of bounds."""
    planned = plan(problem())
    expected = planned(Q, K_CACHE, V_CACHE, lengths(40, 9)).clone()
    for bad in (-5, 41, 2**31 - 1, -(2**31)):
        assert torch.equal(planned(Q, K_CACHE, V_CACHE, lengths(bad, 9))[1], expected[1]), bad


def test_threads_take_turns() -> None:
    planned = plan(problem(shape={"B": 1, "Lk": 300}))
    inputs = [tensors(B=1, Lk=300, seed=seed) for seed in range(4)]
    n = lengths(300)
    expected = [planned(*given, n).clone() for given in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        out = torch.empty_like(expected[i])
        for _ in range(60):
            if not torch.equal(planned(*inputs[i], n, out=out), expected[i]):
                wrong.append(i)

    in_threads(run, len(inputs))
    assert not wrong


# --- a Selection Cache in a plan ------------------------------------------------------------


def test_a_cache_made_for_the_larger_call_serves_both() -> None:
    cache = SelectionCache(max_reuse=8)
    chunk = problem(shape={"Lq": 4}, max_reuse=8)
    chunked, single = plan(chunk), plan(problem(max_reuse=8))
    chunked.prepare(cache)
    chunked(chunk.q, K_CACHE, V_CACHE, lengths(20, 20), cache=cache)
    mean = chunk.q.mean(2, keepdim=True)
    single(mean, K_CACHE, V_CACHE, lengths(21, 21), cache=cache)
    assert cache.misses.tolist() == [1, 1]
    assert cache.hits.tolist() == [1, 1]


def test_reset_of_a_planned_cache_keeps_its_tensors() -> None:
    """A graph would go on to read and write them."""
    cache = SelectionCache(max_reuse=8)
    planned = plan(problem(max_reuse=8))
    planned(Q, K_CACHE, V_CACHE, lengths(20, 20), cache=cache)
    memory = cache.state(problem(max_reuse=8))
    places = [x.data_ptr() for x in memory.tensors()]
    cache.reset()
    planned(Q, K_CACHE, V_CACHE, lengths(21, 21), cache=cache)
    assert cache.misses.tolist() == [1, 1]
    assert [x.data_ptr() for x in cache.state(problem(max_reuse=8)).tensors()] == places


# --- captured steps -----------------------------------------------------------------------


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """The backend "graphed": cpu's planned stages, replayed by a recording."""
    recorded = Recorded()
    made = cuda_graph("cpu", name="graphed", interface=recorded)
    monkeypatch.setitem(registry._targets, "graphed", made)
    monkeypatch.setitem(registry._loaded, "graphed", made)
    return recorded


class Layers:
    """A few layers, each with a cache of its own, all with one plan."""

    def __init__(self, count: int = 3, backend: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = torch.randn(count, 2, 2, 40, 8, generator=generator)
        self.v = torch.randn(count, 2, 2, 40, 8, generator=generator)
        self.mix = torch.randn(count, 8, 8, generator=generator) / 3
        self.caches = [SelectionCache(theta=0.5, max_reuse=8) for _ in range(count)]
        self.plan = plan(problem(max_reuse=8), backend)

    def __call__(self, x: Tensor, n: Tensor) -> Tensor:
        for k, v, mix, cache in zip(self.k, self.v, self.mix, self.caches, strict=True):
            x = x + self.plan(x @ mix, k, v, n, cache=cache)
        return x

    def counts(self) -> list[list[int]]:
        return [(c.hits - c.misses).tolist() for c in self.caches]


def test_several_layers_are_one_capture() -> None:
    eager, captured, recorded = Layers(), Layers(), Recorded()
    step = capture(captured, interface=recorded)
    for i in range(12):
        x = Q + 0.1 * i if i % 4 else -Q
        n = lengths(20 + i, 0 if i == 5 else 28 + i)
        assert torch.equal(step(x, n), eager(x, n)), i
    assert captured.counts() == eager.counts() != [[-12, -11]] * 3
    assert (recorded.captured, recorded.replayed) == (1, 12)


def test_a_plan_that_replays_becomes_part_of_a_capture(graphed: Recorded) -> None:
    recorded, eager, captured = Recorded(), Layers(), Layers(backend="graphed")
    step = capture(captured, interface=recorded)
    for i in range(3):
        assert torch.equal(step(Q, lengths(20 + i, 9 + i)), eager(Q, lengths(20 + i, 9 + i)))
    assert (recorded.captured, graphed.captured) == (1, 0)


def test_attention_in_a_captured_step_by_stages_of_its_own(graphed: Recorded) -> None:
    for n in (lengths(40, 9), lengths(13, 0)):
        given = {"cache_seqlens": n, "return_info": True}
        out, info = attention(Q, K_CACHE, V_CACHE, **SMALL, **given, backend="graphed")
        expected, its = attention(Q, K_CACHE, V_CACHE, **SMALL, **given)
        close(out, expected)
        assert torch.equal(info.selection.positions, its.selection.positions)
    assert (graphed.captured, graphed.replayed) == (3, 6)


def test_results_of_stages_are_copies(graphed: Recorded) -> None:
    first = attention(Q, K_CACHE, V_CACHE, **SMALL, backend="graphed")
    kept = first.clone()
    attention(-Q, K_CACHE, V_CACHE, **SMALL, backend="graphed")
    assert torch.equal(first, kept)


def test_another_cache_is_another_capture_and_comes_back(graphed: Recorded) -> None:
    planned, eager = plan(problem(), "graphed"), plan(problem(), "cpu")
    caches = [(K_CACHE, V_CACHE), (K_CACHE.flip(2), V_CACHE.flip(2))]
    for k, v in caches * 2:
        assert torch.equal(planned(Q, k, v, lengths(40, 9)), eager(Q, k, v, lengths(40, 9)))
    assert graphed.captured == 2


def test_another_rope_is_another_capture(graphed: Recorded) -> None:
    """Though its frequencies may lie where those of one that is gone lay."""
    for base in (10.0, 1e4, 10.0, 1e6):
        turned = Rope(base ** (-torch.arange(0, 8, 2) / 8))
        given = SMALL | {"positions": "contiguous", "rope": turned}
        close(
            attention(Q, K_CACHE, V_CACHE, **given, backend="graphed"),
            attention(Q, K_CACHE, V_CACHE, **given),
        )
    assert graphed.captured == 3 * 4


def test_so_many_captures_are_kept() -> None:
    recorded = Recorded()
    step = capture(torch.neg, limit=2, interface=recorded)
    for size in (1, 2, 1, 3, 1, 2):
        x = torch.arange(float(size))
        assert torch.equal(step(x), -x)
    assert recorded.captured == 4  # 1, 2, 3, and 2 again, which 3 had driven out


def test_batches_share_captures() -> None:
    recorded = Recorded()

    def step(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x * n[:, None], n + 1

    captured = capture(step, batches=(2, 4), interface=recorded)
    for B in (1, 2, 3, 4, 1):
        x, n = torch.randn(B, 5), torch.arange(B)
        for got, expected in zip(captured(x, n), step(x, n), strict=True):
            assert torch.equal(got, expected)
    assert recorded.captured == 2
    with pytest.raises(InvalidProblem, match=r"with \[1, 2\] rows"):
        captured(torch.ones(1, 5), torch.ones(2))


def test_what_a_rehearsal_taught_a_cache_is_undone() -> None:
    """The first step is a miss, once, though it was run before it was captured."""
    layers = Layers(1)
    step = capture(layers, interface=Recorded())
    step(Q, lengths(20, 20))
    assert layers.caches[0].misses.tolist() == [1, 1]
    assert layers.caches[0].hits.tolist() == [0, 0]


UNSAFE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x * x.sum().item(), "Tensor.item"),
    "float": (lambda x: x * float(x.sum()), "__float__"),
    "tolist": (lambda x: x * x.tolist()[0], "Tensor.tolist"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "__bool__"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "mask": (lambda x: x[x > 0], "aten.index.Tensor"),
    "unique": (lambda x: x.unique(), "unique"),
    "select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "numpy": (lambda x: x + torch.from_numpy(x.numpy()), "Tensor.numpy"),
    "range": (lambda x: x[: x.long()[0]], "_local_scalar_dense"),
    "dlpack": (lambda x: torch.from_dlpack(x), "__dlpack__"),
    "sizes": (lambda x: x.tensor_split(torch.tensor([3]))[0], "tensor"),
    "values of a list": (lambda x: torch.tensor([x[0], x[1]]), "tensor"),
    "mask as a place": (lambda x: x.clone().__setitem__(x > 4, torch.ones(4)) or x, "index_put"),
    "cpu": (lambda x: x.cpu() + 1, "Tensor.cpu"),
    "to": (lambda x: x.to("cpu", torch.float64), "Tensor.to"),
    "print": (lambda x: print(x) or x, "Tensor.__repr__"),
    "format": (lambda x: f"{x}" and x, "__format__"),
    "new tensor": (lambda x: x + torch.tensor([1.0] * 8), "torch.tensor"),
    "assign by mask": (
        lambda x: x.clone().index_put_((x > 4,), torch.ones(4)),
        "aten.index_put_",
    ),
    "attention": (
        lambda x: attention(x.expand(2, 4, 1, 8), K_CACHE, V_CACHE, **SMALL),
        "tolist",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_step_that_waits_is_refused_and_the_operation_named(name: str) -> None:
    step, operation = UNSAFE[name]
    with pytest.raises(NotCapturable, match=operation) as caught:
        capture(step, interface=Recorded())(torch.arange(1.0, 9.0))
    assert operation in caught.value.operation


def test_what_is_safe_is_not_refused() -> None:
    def step(x: Tensor, i: Tensor) -> Tensor:
        y = torch.where(x > 0, x, 0).masked_fill(x > 5, 1)[i].to(torch.float32)
        y[y > 1] = torch.tensor(0.5)
        y = y.to(x.device)
        y[i] = y * 2
        y = y.repeat_interleave(torch.ones_like(i), output_size=3)
        return y.index_add(0, i, y).cumsum(0).sort().values.topk(2).values

    x, i = torch.randn(8), torch.tensor([2, 0, 1])
    assert torch.equal(capture(step, interface=Recorded())(x, i), step(x, i))


def test_what_cuda_refuses_names_the_line() -> None:
    class Refusing(Recorded):
        def capture(self, step: Callable[[], Any], pool: Any, device: Any) -> Any:
            self.captured += 1
            return step()

    recorded = Refusing()

    def step(x: Tensor) -> Tensor:
        if recorded.captured:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x.sin()

    with pytest.raises(NotCapturable, match=r"`raise Runtime.*` in step.*\n.*permitted") as caught:
        capture(step, interface=recorded)(torch.ones(3))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_compiled_functions_stay_compiled() -> None:
    """Once torch.compile met a mode such as a rehearsal's, it would skip the function for good."""
    ran = []

    def counting(module: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            ran.append(1)
            return module(*given)

        return run

    function = torch.compile(lambda x: x.sin() + 1, backend=counting)
    x = torch.ones(3)
    function(x)
    check_capturable(lambda x: function(x), x)
    capture(lambda x: function(x), interface=Recorded())(x)
    ran.clear()
    function(x)
    assert ran == [1]


def test_reset_crop_and_reorder_in_a_captured_step() -> None:
    """Each is done once a step, and what a rehearsal does of them is undone."""
    like = problem(shape={"B": 3}, max_reuse=8)
    q, k, v = tensors(B=3)
    planned, order = plan(like), torch.tensor([1, 2, 0])
    results = []
    for how in ("eager", "captured"):
        cache = SelectionCache(theta=0.5, max_reuse=8)
        planned.prepare(cache)

        def step(x: Tensor, n: Tensor, mask: Tensor, cache: SelectionCache = cache) -> Tensor:
            cache.reorder(order)
            cache.reset(mask)
            cache.crop(n)
            return planned(x, k, v, n, cache=cache)

        run = step if how == "eager" else capture(step, interface=Recorded())
        planned(q, k, v, lengths(20, 20, 19), cache=cache)
        planned(-q, k, v, lengths(22, 21, 20), cache=cache)
        for i in range(4):
            mask = torch.tensor([False, i == 2, False])
            run(-q[order], lengths(23 + i, 22 + i, 21 + i), mask)
        memory = cache.state(like)
        results.append([x.clone() for x in memory.tensors()])
    assert all(map(torch.equal, *results))
    before = [x.clone() for x in memory.tensors()]
    check_capturable(step, q, lengths(30, 30, 30), torch.ones(3, dtype=torch.bool))
    check_capturable(lambda x: cache.reset() or x, q)
    assert all(map(torch.equal, memory.tensors(), before))


def test_a_rehearsal_undoes_what_a_larger_call_did_to_a_cache() -> None:
    cache = SelectionCache(max_reuse=8)
    like = problem(max_reuse=8)
    given = SMALL | {"cache": cache, "cache_seqlens": lengths(30, 30)}
    attention(Q, K_CACHE, V_CACHE, **given)
    before = [x.clone() for x in cache.state(like).tensors()]

    def step(x: Tensor) -> Tensor:
        longer = given | {"cache_seqlens": lengths(38, 38), "validate": False}
        return attention(x, K_CACHE, V_CACHE, **longer, backend="reference")

    with pytest.raises(NotCapturable):  # the reference reads lengths, after the cache made room
        check_capturable(step, Q.expand(-1, -1, 4, -1))
    for now, kept in zip(cache.state(like).tensors(), before, strict=True):
        assert torch.equal(now[..., : kept.shape[-1]], kept)


def test_a_rehearsal_leaves_caches_of_other_threads_alone() -> None:
    cache, inside, done = SelectionCache(max_reuse=8), threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.set()
        done.wait(10)
        return x

    thread = threading.Thread(target=check_capturable, args=(slow, Q))
    thread.start()
    inside.wait(10)
    for n in (30, 31):
        attention(Q, K_CACHE, V_CACHE, **SMALL, cache=cache, cache_seqlens=lengths(n, n))
    done.set()
    thread.join()
    assert cache.hits.tolist() == cache.misses.tolist() == [1, 1]
    cache.reset()
    attention(Q[:1], K_CACHE[:1], V_CACHE[:1], **SMALL, cache=cache)  # it was not made to stay


def test_steps_over_one_plan_take_turns_when_replayed() -> None:
    planned = plan(problem(shape={"B": 1, "Lk": 300}))
    inputs = [tensors(B=1, Lk=300, seed=seed) for seed in range(3)]
    n = lengths(300)
    expected = [planned(*given, n).clone() for given in inputs]
    wrong: list[int] = []

    def step_of(i: int) -> Callable[[Tensor], Tensor]:
        q, k, v = inputs[i]
        return lambda n: planned(q, k, v, n).clone()

    steps = [capture(step_of(i), interface=Recorded()) for i in range(2)]
    for step in steps:
        step(n)

    def run(i: int) -> None:
        out = torch.empty_like(expected[i])
        for _ in range(60):
            # The third calls the plan as it is.
            got = steps[i](n) if i < 2 else planned(*inputs[i], n, out=out)
            if not torch.equal(got, expected[i]):
                wrong.append(i)

    in_threads(run, 3)
    assert not wrong


def test_attention_by_graphs_of_stages_is_safe_in_threads(graphed: Recorded) -> None:
    inputs = [tensors(B=1, seed=seed) for seed in range(3)]
    expected = [attention(*given, **SMALL, backend="graphed") for given in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(25):
            if not torch.equal(attention(*inputs[i], **SMALL, backend="graphed"), expected[i]):
                wrong.append(i)

    in_threads(run, 3)
    assert not wrong


def test_what_a_graph_depends_on_is_in_its_key(graphed: Recorded) -> None:
    """Selection Caches, theta and sink logits of a plan; settings and dtype of stages."""
    given = {"sink_logits": torch.zeros(4)}
    like = problem(max_reuse=8, **given)
    graph, eager = plan(like, "graphed"), plan(like, "cpu")
    sinks = [torch.zeros(4), torch.full((4,), 3.0)]
    pairs = [[SelectionCache(theta, max_reuse=8) for theta in (-1.0, None, -1.0)] for _ in range(2)]
    for i in range(4):
        for mine, theirs in zip(*pairs, strict=True):
            for sink in sinks[: 1 + i % 2]:
                n, more = lengths(20 + i, 9 + i), {"sink_logits": sink}
                got = graph(Q, K_CACHE, V_CACHE, n, cache=mine, **more)
                assert torch.equal(got, eager(Q, K_CACHE, V_CACHE, n, cache=theirs, **more))
            assert mine.hits.tolist() == theirs.hits.tolist()
    assert [cache.hits.sum() > 0 for cache in pairs[0]] == [True, False, True]
    q, k, v = (x.double() for x in (Q, K_CACHE, V_CACHE))
    for tensors_ in ((Q, K_CACHE, V_CACHE), (q, k, v)):
        for settings in ({}, {"k": 2}, {"softcap": 2.0}, {"scale": 0.1}, {"vote": "hard"}):
            call = SMALL | settings
            got = attention(*tensors_, **call, backend="graphed")
            close(got, attention(*tensors_, **call))


def test_out_is_written_by_a_replay_too(graphed: Recorded) -> None:
    planned = plan(problem(), "graphed")
    expected = plan(problem(), "cpu")(Q, K_CACHE, V_CACHE, lengths(40, 9)).clone()
    for _ in range(3):
        out = torch.full_like(Q, torch.nan)
        assert planned(Q, K_CACHE, V_CACHE, lengths(40, 9), out=out) is out
        assert torch.equal(out, expected)
    assert graphed.captured == 1


def test_padded_rows_are_zeros_whatever_was_there() -> None:
    step = capture(
        lambda x: x.sum(0, keepdim=True).expand_as(x), batches=(4,), interface=Recorded()
    )
    step(torch.ones(4, 3))
    assert torch.equal(step(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_nested_results_are_cut_back() -> None:
    planned = plan(problem(shape={"B": 2}))

    def step(x: Tensor, n: Tensor) -> dict[str, Any]:
        out, info = planned(x, K_CACHE, V_CACHE, n, return_info=True)
        return {"out": out, "info": info}

    k, v = K_CACHE, V_CACHE
    captured = capture(step, batches=(2,), interface=Recorded())
    done = captured(Q[:1], lengths(40))
    assert done["out"].shape[0] == done["info"].lse.shape[0] == 1
    assert done["info"].backend == fresh.AUTO
    assert torch.equal(done["out"], plan(problem())(Q, k, v, lengths(40, 0))[:1])


def test_a_step_that_writes_to_its_arguments_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="writes to its argument 1"):
        capture(lambda x, n: x * n.add_(1), interface=Recorded())(torch.ones(3), torch.ones(3))


def test_a_rehearsed_captured_step_teaches_nothing() -> None:
    layers = Layers(1)
    step = capture(layers, interface=Recorded())
    step(Q, lengths(20, 20))
    check_capturable(step, Q, lengths(21, 21))
    assert layers.caches[0].hits.tolist() == [0, 0]


def test_a_plan_does_not_keep_the_planned_tensors() -> None:
    like = problem()
    alive = [weakref.ref(getattr(like, name)) for name in ("q", "k_cache", "cache_seqlens")]
    given = [x.clone() for x in (like.q, like.k_cache, like.v_cache)]
    like = replace(like, q=given[0].clone(), k_cache=given[1].clone())
    alive = [weakref.ref(like.q), weakref.ref(like.k_cache)]
    planned = plan(like)
    del like
    assert [x() for x in alive] == [None, None]
    planned(*given, lengths(40, 9))


def test_captures_keep_the_rope_that_their_key_names(graphed: Recorded) -> None:
    turned = rope()
    alive = weakref.ref(turned.inv_freq)
    given = SMALL | {"positions": "contiguous", "rope": turned}
    attention(Q, K_CACHE, V_CACHE, **given, backend="graphed")
    del turned, given
    gc.collect()
    assert alive() is not None


def test_a_stage_that_asks_for_more_than_it_did_is_told() -> None:
    planned = plan(problem())
    with planned._scratch.section("score"), pytest.raises(RuntimeError, match="score asks for"):
        empty((10**6,), torch.float32, torch.device("cpu"))


def test_what_ends_a_failed_capture_hides_neither_line_nor_pool() -> None:
    """torch raises again when it leaves a capture that failed, and its pool is of no use then."""

    class Failing(Recorded):
        pools, is_failing = 0, False

        def pool(self) -> int:
            self.pools += 1
            return self.pools

        def capture(self, step: Callable[[], Any], pool: Any, device: Any) -> Any:
            if pool > 1:
                return super().capture(step, pool, device)
            self.is_failing = True
            try:
                return step()
            finally:
                self.is_failing = False
                raise RuntimeError("capture_end: previous error during capture")

    recorded = Failing()

    def step(x: Tensor) -> Tensor:
        assert not recorded.is_failing
        return x + 1

    captured = capture(step, interface=recorded)
    with pytest.raises(NotCapturable, match=r"`assert not recorded\.is_failing` in step"):
        captured(torch.ones(3))
    assert torch.equal(captured(torch.ones(3)), torch.full((3,), 2.0))
    assert recorded.pools == 2


def test_rehearsals_in_two_threads_leave_compiled_functions_compiled() -> None:
    ran, first, second = [], threading.Event(), threading.Event()

    def counting(module: Any, inputs: Any) -> Any:
        return lambda *given: ran.append(1) or module(*given)

    function = torch.compile(lambda x: x.cos() + 1, backend=counting)
    x = torch.ones(3)
    function(x)

    def early(x: Tensor) -> Tensor:
        first.set()
        second.wait(10)
        return function(x)

    def late(x: Tensor) -> Tensor:
        second.set()
        one.join(10)
        return function(x)

    one = threading.Thread(target=check_capturable, args=(early, x))
    one.start()
    first.wait(10)
    check_capturable(late, x)
    ran.clear()
    function(x)
    assert ran == [1]


def test_a_captured_step_that_only_edits_a_cache_holds_on_to_it() -> None:
    cache = SelectionCache(max_reuse=8)
    attention(Q, K_CACHE, V_CACHE, **SMALL, cache=cache, cache_seqlens=lengths(20, 20))
    move = capture(lambda order: cache.reorder(order) or order, interface=Recorded())
    move(torch.tensor([1, 0]))
    with pytest.raises(InvalidProblem, match="must not move"):
        attention(Q.expand(-1, -1, 4, -1), K_CACHE, V_CACHE, **SMALL, cache=cache)


def test_a_captured_step_inside_compiled_code_says_so() -> None:
    step = capture(torch.neg, interface=Recorded())
    step(Q)
    told = r"torch\.compile makes graphs of its own"
    if torch.__version__ < "2.12":  # shows only its kind, and the line that raises it
        told = r"(?s)NotCapturable.*cuda_graph\.py\", line \d+, in run\n"
    with pytest.raises(Exception, match=told):
        torch.compile(lambda x: step(x) + 1, fullgraph=True, backend="eager")(Q)


def test_a_padded_step_stays_padded_inside_another() -> None:
    planned, cache = plan(problem(max_reuse=8)), SelectionCache(max_reuse=8)

    def step(x: Tensor, n: Tensor) -> Tensor:
        return planned(x, K_CACHE, V_CACHE, n, cache=cache).clone()

    captured = capture(step, batches=(2,), interface=Recorded())
    expected = captured(Q[:1], lengths(20)).clone()
    assert torch.equal(check_capturable(captured, Q[:1], lengths(20)), expected)


def test_results_without_a_row_for_each_request_are_refused() -> None:
    step = capture(lambda x: x.sum(), batches=(2,), interface=Recorded())
    with pytest.raises(InvalidProblem, match=r"returns \(\) for a batch of 2"):
        step(torch.ones(2, 3))


def test_info_of_a_plan_is_its_own() -> None:
    planned = plan(problem())
    _, info = planned(Q, K_CACHE, V_CACHE, lengths(40, 9), return_info=True)
    kept = [x.clone() for x in (info.lse, info.retained_mass, *info.selection)]
    planned(-Q, K_CACHE, V_CACHE, lengths(20, 20))
    assert all(map(torch.equal, (info.lse, info.retained_mass, *info.selection), kept))


def test_paged_caches_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    made = cuda_graph("cpu", name="bucketed", batches=(1, 2), interface=recorded)
    monkeypatch.setitem(registry._targets, "bucketed", made)
    monkeypatch.setitem(registry._loaded, "bucketed", made)
    q, k, v = tensors(B=3)
    k_pages, v_pages, table = paged(k, v)
    p = Problem.build(q, k_pages, v_pages, SelectConfig(**SMALL), block_table=table)
    planned, n = plan(p, "bucketed"), lengths(40, 9, 23)
    expected = plan(p, "cpu")(q, k_pages, v_pages, n, block_table=table).clone()
    for rows in ([0], [1, 2], [0, 1, 2], [2]):
        given = functools.partial(planned, q[rows], k_pages, v_pages, n[rows])
        assert torch.equal(given(block_table=table[rows]), expected[rows])
    assert recorded.captured == 3


def test_a_cache_in_use_by_a_capture_must_not_move(graphed: Recorded) -> None:
    """Used in a captured step without a plan, too."""
    cache, given = SelectionCache(max_reuse=8), SMALL | {"backend": "graphed"}

    def step(x: Tensor, n: Tensor) -> Any:
        return attention(x, K_CACHE, V_CACHE, **given, cache_seqlens=n, cache=cache, validate=False)

    captured = capture(step, interface=Recorded())
    for i in range(3):
        captured(Q, lengths(20 + i, 9 + i))
    assert cache.hits.tolist() == [2, 2]
    with pytest.raises(InvalidProblem, match="must not move"):
        attention(Q.expand(-1, -1, 4, -1), K_CACHE, V_CACHE, **SMALL, cache=cache)


def test_the_tutorials_loop_writes_the_same_text_through_a_graph() -> None:
    """The example, which the page quotes, as it runs here, and as on a GPU but for CUDA."""
    page = (fresh.ROOT / "docs" / "tutorials" / "decoding.md").read_text(encoding="utf-8")
    block = (fresh.ROOT / "examples" / "decode_loop.py").read_text(encoding="utf-8")
    assert re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0] == block
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    choice = "step = capture(decode) if torch.cuda.is_available() else decode\n"
    assert choice in block
    recorded = Recorded()
    texts, hits = [], []
    for line in (choice, "step = capture(decode, interface=RECORDED)\n"):
        names: dict[str, Any] = {"RECORDED": recorded, "print": lambda *words: None}
        with torch.no_grad():  # the block sets it for good
            exec(compile(block.replace(choice, line), "decode_loop.py", "exec"), names)
            torch.set_default_device(None)
        texts.append(names["text"])
        hits.append([cache.hits.tolist() for cache in names["selections"]])
    assert torch.equal(*texts)
    assert hits[0] == hits[1]
    assert min(map(min, hits[0])) > 0
    assert max(map(max, hits[0])) < 40
    assert (recorded.captured, recorded.replayed) == (1, 40)


def test_an_out_that_cannot_be_written_to_is_refused_in_a_kind_that_was_seen() -> None:
    p, step = problem(), plan(problem(), "cpu")
    given = p.q, p.k_cache, p.v_cache, p.cache_seqlens
    step(*given, out=torch.empty_like(Q))
    with torch.inference_mode():
        frozen = torch.empty_like(Q)
        assert step(*given, out=frozen) is frozen
    for out, why in ((frozen, "inference mode"), (torch.empty_like(Q).requires_grad_(), "grad")):
        with pytest.raises(InvalidProblem, match=f"out .*{why}"):
            step(*given, out=out)


def test_a_program_does_not_take_another_plan_for_its_own() -> None:
    """A handle is no count: an exported program in another process must not meet one."""
    one, other = plan(problem(), "cpu"), plan(problem(), "cpu")
    assert abs(one._handle - other._handle) > 1
    given = (*(getattr(problem(), name) for name in ("q", "k_cache", "v_cache", "cache_seqlens")),)
    with pytest.raises(InvalidProblem, match="a plan that is gone, or of another process"):
        torch.ops.tokenselect.plan_step(*given, None, None, [], None, False, 0)
