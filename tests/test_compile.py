"""torch.compile(fullgraph=True) goes through `attention`, with the very same result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from properties.recorded import Recorded
from tests.fresh import need_a_cpp_compiler
from tests.problems import SMALL, lengths, paged, problem, rope, tensors
from tokenselect import (
    InvalidProblem,
    Plan,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    SelectionCache,
    attend,
    attention,
    capture,
    cuda_graph,
    plan,
    score,
    select,
)
from tokenselect.dispatch import ops, registry

COMPILERS = ("eager", "aot_eager", "inductor")
ROPE = rope()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], compiler: str = "aot_eager"
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The function in one graph, and a counter of its compilations."""
    if compiler == "inductor":
        need_a_cpp_compiler()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True), counter


def same(got: Any, expected: Any) -> bool:
    """Bitwise equality of out, or of (out, info)."""
    if isinstance(expected, Tensor):
        return got.dtype == expected.dtype and torch.equal(
            got.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0)
        )
    if isinstance(expected, tuple):
        return all(same(*pair) for pair in zip(got, expected, strict=True))
    return bool(got == expected)


CALLS: dict[str, dict[str, Any]] = {
    "decode": {},
    "with_info": {"return_info": True},
    "group_scope": {"scope": "group", "return_info": True},
    "votes_hard_pooled": {"vote": "hard", "pool": 3, "return_info": True},
    "a_fraction": {"k": 0.1, "k_min": 1, "cache_seqlens": lengths(33, 9), "return_info": True},
    "softcap_and_sinks": {"softcap": 5.0, "sink_logits": torch.arange(4.0), "scale": 0.3},
    "contiguous_split": {
        "positions": "contiguous",
        "score_at": "split",
        "rope": ROPE,
        "return_info": True,
    },
    "lengths": {"cache_seqlens": lengths(33, 0), "return_info": True},
    "by_name": {"backend": "reference", "return_info": True},
}


@pytest.mark.slow("inductor")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name: str, compiler: str) -> None:
    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        return attention(q, k_cache, v_cache, **(SMALL | CALLS[name]))

    inputs = tensors()
    function, counter = compiled(call, compiler)
    assert same(function(*inputs), call(*inputs))
    assert counter.frame_count == 1


@pytest.mark.slow("inductor")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_paged_decode_with_a_cache_and_info(compiler: str) -> None:
    """The serving case in one graph: pages, lengths, reuse, information; hits and misses occur."""
    _, k_cache, v_cache = tensors()
    k_pages, v_pages, block_table = paged(k_cache, v_cache)
    caches = SelectionCache(max_reuse=3), SelectionCache(max_reuse=3)

    def call(q: Tensor, cache_seqlens: Tensor, cache: SelectionCache = caches[0]) -> Any:
        return attention(
            q,
            k_pages,
            v_pages,
            **SMALL,
            block_table=block_table,
            cache_seqlens=cache_seqlens,
            cache=cache,
            return_info=True,
        )

    function, counter = compiled(call, compiler)
    reused = []
    for i in range(8):
        q, n = tensors(seed=i // 6)[0], lengths(25 + i, 20 + i)
        (out, info), (eager_out, eager_info) = function(q, n), call(q, n, caches[1])
        # Inductor has an exp of its own, for the mass alone: it may differ in the last bit.
        mass, eager_mass = info.retained_mass, eager_info.retained_mass
        torch.testing.assert_close(mass, eager_mass, rtol=2**-22, atol=0, equal_nan=True)
        assert same((out, info._replace(retained_mass=eager_mass)), (eager_out, eager_info)), i
        reused.append(info.reused.tolist())
    assert reused == [[i % 4 != 0 and i != 6] * 2 for i in range(6)] + [[False] * 2, [True] * 2]
    assert caches[0].hits.tolist() == caches[1].hits.tolist() == [5, 5]
    assert caches[0].misses.tolist() == caches[1].misses.tolist() == [3, 3]
    # Once before the cache has state, once for all after.
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_growing_cache_is_compiled_a_bounded_number_of_times(with_cache: bool) -> None:
    _, k_cache, v_cache = tensors(Lk=64)
    caches = (SelectionCache(), SelectionCache()) if with_cache else (None, None)

    def call(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: SelectionCache | None = caches[0]
    ) -> Any:
        return attention(q, k_cache, v_cache, **SMALL, cache=cache, return_info=True)

    function, counter = compiled(call)
    for n in range(20, 65):
        q = tensors(seed=n // 16)[0]
        inputs = q, k_cache[:, :, :n], v_cache[:, :, :n]
        assert same(function(*inputs), call(*inputs, caches[1])), n
    # The first length as a constant, then any length; with a cache each once before its state.
    assert counter.frame_count <= 4
    assert caches[0] is None or 30 < int(caches[0].hits[0]) < 45


def test_settings_of_a_config() -> None:
    q, k_cache, v_cache = tensors()
    config = SelectConfig(**SMALL)
    for call in (
        lambda q: attention(q, k_cache, v_cache, config=config),
        lambda q: attention(q, k_cache, v_cache, config=config, n_sink=SMALL["n_sink"]),
        lambda q: attention(q, k_cache, v_cache, config=SelectConfig(**SMALL)),
    ):
        function, _ = compiled(call)
        assert same(function(q), attention(q, k_cache, v_cache, **SMALL))


def test_chunks_of_many_lengths_are_compiled_a_bounded_number_of_times() -> None:
    _, k_cache, v_cache = tensors()
    function, counter = compiled(lambda q: attention(q, k_cache, v_cache, **SMALL))
    for Lq in range(2, 12):
        q = tensors(Lq=Lq)[0]
        assert same(function(q), attention(q, k_cache, v_cache, **SMALL)), Lq
    assert counter.frame_count <= 3


@pytest.mark.parametrize(
    ("values", "compilations"),
    [(range(3, 12), 2), ([0.1, 0.2, 0.3], 4)],  # torch.compile makes constants of floats
    ids=["integers", "fractions"],
)
def test_k_may_be_an_argument(values: list[Any], compilations: int) -> None:
    inputs = tensors()
    function, counter = compiled(
        lambda *inputs: attention(*inputs, n_sink=2, n_local=4, return_info=True)
    )
    for k in values:
        assert same(
            function(*inputs, k), attention(*inputs, k, n_sink=2, n_local=4, return_info=True)
        )
    assert counter.frame_count <= compilations


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_lengths_are_still_checked_in_compiled_code(compiler: str) -> None:
    _, k_cache, v_cache = tensors()
    q = tensors(Lq=3)[0]
    function, counter = compiled(
        lambda n: attention(q, k_cache, v_cache, **SMALL, cache_seqlens=n), compiler
    )
    function(lengths(40, 3))
    for bad, came in (((40, 41), r"cache_seqlens\[1\]=41"), ((2, 40), r"cache_seqlens\[0\]=2")):
        with pytest.raises(InvalidProblem, match=came):
            function(lengths(*bad))
    assert counter.frame_count == 1


def test_pages_are_still_checked_in_compiled_code() -> None:
    q, k_cache, v_cache = tensors()
    k_pages, v_pages, block_table = paged(k_cache, v_cache)
    function, _ = compiled(lambda table: attention(q, k_pages, v_pages, **SMALL, block_table=table))
    function(block_table)
    block_table[1, 2] = -1
    with pytest.raises(InvalidProblem, match=r"block_table\[1, 2\]=-1"):
        function(block_table)


def test_the_stages_in_one_graph() -> None:
    def stages(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        p = Problem.build(q, k_cache, v_cache, SelectConfig(**SMALL))
        return attend(p, select(score(p).votes, p), validate=False).out

    inputs = tensors()
    assert same(compiled(stages)[0](*inputs), stages(*inputs))


# --- a plan and a Selection Cache; properties/test_graphs.py has a layer of both ---------------


def test_a_cache_that_is_new_inside_compiled_code_is_refused() -> None:
    """Its state would lie in the memory of a graph. The error shows through the compiler."""
    planned, cache = plan(problem(max_reuse=8)), SelectionCache(max_reuse=8)
    function, _ = compiled(lambda *given: planned(*given, cache=cache), "eager")
    told = r"its state is made outside.*before"
    if torch.__version__ < "2.12":  # shows only its kind, and the line that raises it
        told = r"(?s)InvalidProblem.* in _refuse_in_a_capture\n"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=told):
        function(*tensors(), lengths(40, 9))


def test_a_compiled_plan_returns_info_too() -> None:
    planned, given = plan(problem()), (*tensors(), lengths(40, 9))
    function, counter = compiled(lambda *given: planned(*given, return_info=True))
    out, info = function(*given)
    expected, its = planned(*given, return_info=True)
    assert same((out, info), (expected, its))
    assert counter.frame_count == 1


def test_a_compiled_step_that_crops_counts_once_when_it_is_captured() -> None:
    planned = plan(problem(max_reuse=8))
    cache = SelectionCache(max_reuse=8)
    planned.prepare(cache)
    inputs = tensors()

    def step(n: Tensor) -> Tensor:
        cache.crop(n)
        return planned(*inputs, n, cache=cache)

    captured = capture(torch.compile(step, fullgraph=True, backend="eager"), interface=Recorded())
    for i in range(3):
        captured(lengths(20 + i, 9 + i))
    assert cache.misses.tolist() == [1, 1]
    assert cache.hits.tolist() == [2, 2]


def test_what_compiled_plans_return_is_their_own() -> None:
    planned, given = plan(problem()), (*tensors(), lengths(40, 9))
    function, _ = compiled(lambda *given: planned(*given, return_info=True))
    out, info = function(*given)
    kept = [x.clone() for x in (out, info.lse, *info.selection)]
    function(-given[0], *given[1:])
    assert all(map(torch.equal, (out, info.lse, *info.selection), kept))


def test_a_plan_that_replays_is_captured_once_by_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded()
    made = cuda_graph("cpu", name="replayed", interface=recorded)
    monkeypatch.setitem(registry._targets, "replayed", made)
    monkeypatch.setitem(registry._loaded, "replayed", made)
    planned, expected = plan(problem(), "replayed"), plan(problem(), "cpu")
    function, _ = compiled(lambda *given: planned(*given) * 1)
    inputs = tensors()
    for n in (40, 30, 9):
        given = (*inputs, lengths(n, 9))
        assert torch.equal(function(*given), expected(*given))
    assert recorded.captured == 1


def test_a_compiled_plan_writes_to_out() -> None:
    planned = plan(problem())
    function, _ = compiled(lambda *given, out: planned(*given, out=out) + 1)
    out, given = torch.empty(2, 4, 1, 8), (*tensors(), lengths(40, 9))
    expected = planned(*given).clone()
    assert torch.equal(function(*given, out=out), expected + 1)
    assert torch.equal(out, expected)


# --- the operators ------------------------------------------------------------------------


def samples() -> dict[str, Problem]:
    q, k_cache, v_cache = tensors(Lq=3)
    k_pages, v_pages, block_table = paged(k_cache, v_cache)
    return {
        "decode": problem(),
        "chunk": problem(q, k_cache, v_cache, cache_seqlens=lengths(40, 3)),
        "paged": problem(q, k_pages, v_pages, block_table=block_table),
        "token_major": problem(
            q.transpose(1, 2).contiguous().transpose(1, 2),
            k_cache.transpose(1, 2).contiguous().transpose(1, 2),
            v_cache.transpose(1, 2).contiguous().transpose(1, 2),
        ),
        "bf16": problem(shape={"dtype": torch.bfloat16, "Dv": 5}, cache_seqlens=lengths(40, 0)),
        "rope": problem(rope=rope(cached="raw", scaling=1.2), max_reuse=5),
        "split": problem(
            rope=rope(interleaved=True),
            config={"positions": "contiguous", "score_at": "split", "scope": "group"},
        ),
        "capped": problem(softcap=5.0, sink_logits=torch.arange(4.0), config={"vote": "logit"}),
    }


def arguments(operator: str, p: Problem) -> tuple[Any, ...]:
    flat = ops.flattened(p)
    selection = select(score(p).votes, p)
    memory = SelectionCache(max_reuse=p.max_reuse).state(p)
    planned = plan(p, "cpu")
    return {
        "attention": (*flat, None, "cpu", True),
        "attention_with_cache": (*flat, *memory.tensors(), 0.9, None, "cpu", True),
        "plan_step": (
            p.q, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.sink_logits,
            list(memory.tensors()), 0.9, True, kept_alive(planned)._handle,
        ),
        "score": (*flat, "cpu", True),
        "select": (score(p).votes, *flat, "cpu", False),
        "attend": (*selection, *flat, "cpu", True),
    }[operator]  # fmt: skip


_alive: list[Plan] = []


def kept_alive(planned: Plan) -> Plan:
    _alive.append(planned)
    return planned


IN_PLACE = ("attention_with_cache", "plan_step")  # in the Selection Cache's state
OPERATORS = ("attention", "score", "select", "attend", *IN_PLACE)
SAMPLES = samples()


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(operator: str, sample: str) -> None:
    overload = getattr(torch.ops.tokenselect, operator).default
    results = torch.library.opcheck(overload, arguments(operator, SAMPLES[sample]))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in IN_PLACE])
@pytest.mark.parametrize("sample", SAMPLES)
def test_outputs_are_of_their_own(operator: str, sample: str) -> None:
    given = arguments(operator, SAMPLES[sample])
    before = [x.clone() if isinstance(x, Tensor) else x for x in given]
    outputs = getattr(torch.ops.tokenselect, operator)(*given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    places = [x.untyped_storage().data_ptr() for x in (*given, *outputs) if isinstance(x, Tensor)]
    assert not set(places[-len(outputs) :]) & set(places[: -len(outputs)])
    assert len(set(places[-len(outputs) :])) == len(outputs)
    for kept, now in zip(before, given, strict=True):
        if isinstance(kept, Tensor):  # and no input was written to
            assert torch.equal(kept.nan_to_num(7.0), now.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_results_look_like_real_ones(backend: str, sample: str) -> None:
    p = SAMPLES[sample]
    real = stages(p, backend)
    with FakeTensorMode() as mode:
        flat = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in ops.flattened(p)]
        fake = stages(ops.rebuilt(*flat), backend)
    for true, pretended in zip(real, fake, strict=True):
        assert (true.shape, true.dtype, true.device, true.stride()) == (
            pretended.shape,
            pretended.dtype,
            pretended.device,
            pretended.stride(),
        )


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (6, 2)])
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (1, 40), (7, 9)])
@pytest.mark.parametrize("settings", [{}, {"scope": "group", "k": 0}, {"score_at": "split"}])
def test_fake_shapes_over_a_grid(
    B: int, Hq: int, Hkv: int, Lq: int, Lk: int, settings: dict[str, Any]
) -> None:
    shape = {"B": B, "Hq": Hq, "Hkv": Hkv, "Lq": Lq, "Lk": Lk, "Dv": 5}
    p = problem(shape=shape, config=settings, rope=ROPE)
    real = stages(p, "cpu")
    with FakeTensorMode() as mode:
        flat = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in ops.flattened(p)]
        fake = stages(ops.rebuilt(*flat), "cpu")
    assert [x.shape for x in fake] == [x.shape for x in real]
    assert [x.dtype for x in fake] == [x.dtype for x in real]


def stages(p: Problem, backend: str) -> tuple[Tensor, ...]:
    scores: Scores = ops.score(backend, p, False)
    selection: Selection = ops.select(backend, scores.votes, p, False)
    attended = ops.attend(backend, p, selection, False)
    return *scores, *selection, *attended, *ops.attention(backend, p, False)[:-1]


def test_the_operators_of_a_backend_are_its_stages() -> None:
    """Nothing is added on the way: the operators return what the backend's functions do."""
    p, backend = problem(), registry.load("cpu")
    scores = backend.score(p)
    selection = backend.select(scores.votes, p)
    attended = backend.attend(p, selection)
    step = (*attended, *selection, scores.lse)
    direct = (*scores, *selection, *attended, *step)
    assert all(map(torch.equal, stages(p, "cpu"), direct))
