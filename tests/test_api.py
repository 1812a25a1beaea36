"""How a call is said: settings whole or by name, out, run, and a backend that does all in one."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests import fresh
from tests.problems import problem
from tokenselect import (
    InvalidProblem,
    Problem,
    SelectConfig,
    SelectionCache,
    attention,
    explain,
    plan,
    register,
    run,
)
from tokenselect.dispatch import ops
from tokenselect.dispatch.registry import load

Q, K, V = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
SETTINGS: dict[str, Any] = {"k": 5, "n_sink": 2, "n_local": 4, "vote": "hard", "pool": 3}


def test_settings_come_by_name_or_whole_or_both_if_they_agree() -> None:
    by_name = attention(Q, K, V, **SETTINGS)
    config = SelectConfig(**SETTINGS)
    for ways in ({"config": config}, {"config": config, "k": 5, "pool": 3}, dict(config)):
        assert torch.equal(attention(Q, K, V, **ways), by_name)
    assert not torch.equal(attention(Q, K, V), by_name)
    assert explain(Q, K, V, config=config).problem == explain(Q, K, V, **SETTINGS).problem


@pytest.mark.parametrize("named", [{"k": 6}, {"k": 2048}, {"vote": "soft"}, {"n_sink": 0}])
def test_a_setting_named_both_ways_has_one_value(named: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblem, match="a setting that is named both ways has one value"):
        attention(Q, K, V, config=SelectConfig(**SETTINGS), **named)


def test_an_unknown_argument_is_named_with_what_was_meant() -> None:
    with pytest.raises(TypeError, match=r"argument 'n_locals'; did you mean n_local\?"):
        attention(Q, K, V, n_locals=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="argument 'causal'"):
        explain(Q, K, V, causal=True)
    with pytest.raises(InvalidProblem, match="config is a dict"):
        attention(Q, K, V, config=SETTINGS)  # type: ignore[call-overload]


def test_run_is_attention_of_a_problem() -> None:
    p = problem(max_reuse=4)
    one, other = SelectionCache(max_reuse=4), SelectionCache(max_reuse=4)
    for _ in range(2):
        out, info = run(p, cache=one, return_info=True)
        expected, more = attention(
            p.q, p.k_cache, p.v_cache, config=p.config, cache=other, return_info=True
        )
        assert torch.equal(out, expected)
        assert torch.equal(info.selection.positions, more.selection.positions)
    with pytest.raises(InvalidProblem, match=r"problem.max_reuse=4, the cache's is 64"):
        run(p, cache=SelectionCache())


def test_out_is_written_to_and_returned() -> None:
    out = torch.empty(2, 4, 1, 8)
    assert attention(Q, K, V, out=out) is out
    assert torch.equal(out, attention(Q, K, V))
    with pytest.raises(InvalidProblem, match="out is "):
        attention(Q, K, V, out=out.double())


def test_a_backend_may_do_the_three_stages_in_one() -> None:
    """Where there is no Selection Cache; with one, `attend_cached` may."""
    cpu, calls = load("cpu"), []

    def fused(p: Any) -> Any:
        calls.append(p)
        scores = cpu.score(p)
        selection = cpu.select(scores.votes, p)
        return cpu.attend(p, selection), selection, scores.lse

    def never(*_: Any) -> Any:
        raise AssertionError("the fused step does this stage's work")

    register("in-one", replace(cpu, name="in-one", static=None, score=never, attend_fresh=fused))
    out, info = attention(Q, K, V, k=5, n_local=4, backend="in-one", return_info=True)
    expected, more = attention(Q, K, V, k=5, n_local=4, backend="cpu", return_info=True)
    assert torch.equal(out, expected)
    assert torch.equal(info.retained_mass, more.retained_mass)
    assert len(calls) == 1
    with pytest.raises(AssertionError, match="the fused step"):
        attention(Q, K, V, cache=SelectionCache(), backend="in-one")


class Seen(TorchDispatchMode):
    """Notes the names of operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Seen":
        self.names: list[str] = []
        return super().__enter__()


class Labelled(torch.Tensor):
    """A subclass that sees operators."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("cached", [False, True], ids=["", "with a cache"])
def test_whoever_looks_at_operators_sees_one_and_all_get_the_same_bits(cached: bool) -> None:
    name = "tokenselect::attention" + "_with_cache" * cached

    def call(q: torch.Tensor = Q) -> torch.Tensor:
        return attention(q, K, V, 5, n_local=4, cache=SelectionCache() if cached else None)

    with pytest.MonkeyPatch.context() as patch:  # nobody looks: no operator
        patch.setattr(ops, "flattened", None)
        expected = call()
    with Seen() as seen:
        assert torch.equal(call(), expected)
    assert name in seen.names
    with torch.profiler.profile() as profiled:
        assert torch.equal(call(), expected)
    assert name in {event.name for event in profiled.events()}
    assert torch.equal(call(Q.as_subclass(Labelled)), expected)
    assert any(name.replace("::", ".") in one for one in Labelled.seen)
    if not cached:
        traced = make_fx(lambda q: call(q))(Q)
        assert name.replace("::", ".") in traced.code
        assert torch.equal(traced(Q), expected)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_views_that_are_to_be_negated_are_read_so(name: str, backend: str) -> None:
    given = {"q": Q, "k_cache": K, "v_cache": V}
    expected = attention(**given | {name: -given[name]}, k=5, n_local=4, backend=backend)
    negated = torch.complex(given[name], given[name]).conj().imag
    assert negated.is_neg()
    out = attention(**given | {name: negated}, k=5, n_local=4, backend=backend)
    assert torch.equal(out, expected)
    if backend != "reference":
        p = Problem.build(Q, K, V, SelectConfig(k=5, n_local=4))
        call = plan(p, backend)
        call(Q, K, V, p.cache_seqlens)
        with pytest.raises(InvalidProblem, match=f"{name} is a view that is to be negated"):
            call(**given | {name: negated}, cache_seqlens=p.cache_seqlens)


def test_a_cache_of_another_kind_of_tensor_is_no_memory_to_read() -> None:
    cache = SelectionCache()
    with FakeTensorMode() as mode:
        attention(*map(mode.from_tensor, (Q, K, V)), k=5, cache=cache)
    with pytest.raises(AssertionError, match="Fake"):
        attention(Q, K, V, k=5, cache=cache)
    on_meta = [x.to("meta") for x in (Q, K, V)]
    assert attention(*on_meta, k=5, backend="reference").is_meta


def test_what_explain_says_is_of_the_call_that_runs() -> None:
    arguments: dict[str, Any] = {"k": 5, "n_sink": None, "positions": None, "vote": "hard"}
    attention(Q, K, V, **arguments)
    assert explain(Q, K, V, **arguments).chosen == fresh.AUTO


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's
def test_forward_mode_differentiation_is_refused() -> None:
    with pytest.raises(InvalidProblem, match="q requires grad"):
        torch.func.jvp(lambda q: attention(q, K, V, 5), (Q,), (Q,))


def test_an_out_that_cannot_be_written_to_is_refused_before_a_cache_learns() -> None:
    cache = SelectionCache()
    with torch.inference_mode():
        inference = torch.empty(2, 4, 1, 8)
    for out in (torch.empty(2, 4, 1, 8, requires_grad=True), inference):
        with pytest.raises(InvalidProblem, match="out "):
            attention(Q, K, V, cache=cache, out=out)
    assert "not used yet" in repr(cache)
