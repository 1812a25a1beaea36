"""The arithmetic of the contract: regions, ballots, capacity, presets, and what Problem derives."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.problems import SMALL, lengths, paged, problem, rope, tensors
from tokenselect import (
    Backend,
    Capability,
    InvalidProblem,
    Problem,
    SelectConfig,
    SelectionCache,
    attention,
    reasons,
    score,
    select,
)


def stage(*_: object) -> None:
    raise AssertionError("metadata only")


def backend(name: str = "mine", lenders: tuple[Backend, ...] = (), **limits: object) -> Backend:
    return Backend(name, Capability(**limits), stage, stage, stage, lenders=lenders)


# --- regions, ballots, capacity -----------------------------------------------------------


@pytest.mark.parametrize("n_sink", [0, 1, 3, 7])
@pytest.mark.parametrize("n_local", [1, 2, 5])
@pytest.mark.parametrize("Lq", [1, 2, 4])
def test_regions_are_the_sets_of_the_definition(n_sink: int, n_local: int, Lq: int) -> None:
    config = SelectConfig(k=0, n_sink=n_sink, n_local=n_local)
    for n in range(Lq, 14):
        # Query i, at n - Lq + i, is sure to see its n_local newest tokens, itself included.
        local = {
            position
            for query in range(n - Lq, n)
            for position in range(query + 1 - n_local, query + 1)
            if position >= 0
        }
        sink = {position for position in range(n) if position < n_sink} - local
        sink_end, local_start = config.regions(n, Lq)
        assert set(range(sink_end)) == sink
        assert set(range(sink_end, local_start)) == set(range(n)) - local - sink
        assert set(range(local_start, n)) == local


def test_regions_of_a_request_that_is_not_there() -> None:
    assert SelectConfig().regions(0, 1) == (0, 0)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 8, 2048])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_split_ballots_share_k(k: int, share: float) -> None:
    config = SelectConfig(k=k, score_at="split", fixed_share=share)
    assert config.ballots == ("fixed", "true")
    fixed, true = config.shares(100)
    assert fixed + true == k
    exact = Fraction(str(share)) * k
    assert exact <= fixed < exact + 1


@pytest.mark.parametrize("score_at", ["true", "fixed"])
def test_one_ballot_takes_all_of_k(score_at: str) -> None:
    config = SelectConfig(k=9, score_at=score_at)
    assert (config.ballots, config.shares(100)) == ((score_at,), (9,))


LENGTHS = (0, 1, 2, 9, 10, 11, 30, 100, 999_999, 1_000_001, 2**31 - 1)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.07, 1 / 3, 2 / 3, 0.5, 0.000001, 0.999999])
def test_a_fraction_is_rounded_up_exactly(k: float) -> None:
    """As a decimal: in floating point a tenth of 10 is more than 1, and 0.07 * 100 more than 7."""
    for n in LENGTHS:
        exact = Fraction(f"{k:.6f}") * n
        assert exact <= SelectConfig(k=k).budget(n) < exact + 1


def test_bounds_of_a_fraction() -> None:
    config = SelectConfig(k=0.1, k_min=5, k_max=20)
    assert [config.budget(n) for n in (0, 1, 50, 51, 200, 201, 2**31 - 1)] == [
        *(5, 5, 5, 6, 20, 20, 20)
    ]
    assert {SelectConfig(k=7, k_min=5, k_max=20).budget(n) for n in LENGTHS} == {7}


@pytest.mark.parametrize("number", [np.float64, np.float32, np.array, torch.tensor])
def test_a_fraction_may_be_a_number_of_less_precision(number: Callable[[float], Any]) -> None:
    p = problem(config={"k": number(0.1)})
    assert [p.config.budget(n) for n in LENGTHS] == [SelectConfig(k=0.1).budget(n) for n in LENGTHS]


def test_the_budget_is_that_of_the_length_and_the_capacity_that_of_the_cache() -> None:
    p = problem(config={"k": 0.1}, cache_seqlens=lengths(40, 21))
    assert p.K == 2 + 4 + 4
    assert select(score(p).votes, p).count.tolist() == [[2 + 4 + 4], [2 + 3 + 4]]
    assert problem(config={"k": 0.5, "k_max": 7}).K == 2 + 7 + 4


@pytest.mark.parametrize("max_reuse", [0, 5])
@pytest.mark.parametrize("Lq", [1, 3])
def test_capacity(Lq: int, max_reuse: int) -> None:
    p = problem(shape={"Lq": Lq}, max_reuse=max_reuse)
    assert derived(p)["K"] == 2 + 4 + 4 + Lq - 1 + max_reuse


def test_capacity_is_never_more_than_the_cache() -> None:
    p = problem(config={"k": 10**9})
    assert p.K == p.Lk == 40


@pytest.mark.parametrize("Lq", [1, 3])
def test_a_full_selection_fills_the_capacity(Lq: int) -> None:
    p = problem(shape={"Lq": Lq})
    assert select(score(p).votes, p).count.unique().tolist() == [p.K]


# --- presets, and the configuration as a mapping ------------------------------------------


def test_faithful_is_the_default() -> None:
    assert SelectConfig.faithful() == SelectConfig()
    assert (SelectConfig().positions, SelectConfig().score_at) == ("original", "true")


def test_extrapolate() -> None:
    changed = {"positions": "contiguous", "score_at": "split"}
    assert SelectConfig.extrapolate() == SelectConfig(**changed)


def test_paper() -> None:
    assert SelectConfig.paper() == SelectConfig(select_scale=1.0)


@pytest.mark.parametrize("preset", ["faithful", "extrapolate", "paper"])
def test_presets_take_changes(preset: str) -> None:
    config = getattr(SelectConfig, preset)(k=7, score_at="fixed", select_scale=2.0)
    assert (config.k, config.score_at, config.select_scale) == (7, "fixed", 2.0)


@pytest.mark.parametrize("preset", ["faithful", "extrapolate", "paper"])
def test_attention_takes_a_configuration(preset: str) -> None:
    q, k_cache, v_cache = tensors()
    config = getattr(SelectConfig, preset)(**SMALL)
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    out = attention(q, k_cache, v_cache, **config, rope=rope())
    assert torch.equal(out, attention(q, k_cache, v_cache, **same, rope=rope()))


def test_the_presets_differ_where_it_matters() -> None:
    q, k_cache, v_cache = tensors(Lk=300)
    faithful, extrapolate, paper = (
        attention(q, k_cache, v_cache, **config(**SMALL), rope=rope(), return_info=True)[1]
        for config in (SelectConfig.faithful, SelectConfig.extrapolate, SelectConfig.paper)
    )
    assert not torch.equal(faithful.lse, extrapolate.lse)
    assert not torch.equal(faithful.selection.positions, paper.selection.positions)


def test_a_configuration_is_a_mapping_of_its_fields() -> None:
    config = SelectConfig(k=3, pool=5)
    assert dict(**config) == dict(config) == dataclasses.asdict(config)


@pytest.mark.parametrize("value", [SelectConfig(), Capability(), backend(), problem()])
def test_values_cannot_be_changed(value: object) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


def test_configurations_are_compared_and_hashed_by_value() -> None:
    assert SelectConfig(k=3) == SelectConfig(k=3) != SelectConfig(k=4)
    assert len({SelectConfig(k=3), SelectConfig(k=3), SelectConfig(k=4)}) == 2


# --- problems -----------------------------------------------------------------------------


def derived(p: Problem) -> dict[str, object]:
    names = ("B", "Hq", "Hkv", "G", "Lq", "D", "Dv", "R", "S", "K", "scale", "select_scale")
    return {name: getattr(p, name) for name in names}


def test_a_contiguous_problem() -> None:
    p = problem(shape={"Hq": 6, "Lq": 3, "D": 16, "Dv": 5})
    assert derived(p) == {
        "B": 2, "Hq": 6, "Hkv": 2, "G": 3, "Lq": 3, "D": 16, "Dv": 5, "R": 1, "S": 1, "K": 12,
        "scale": 0.25, "select_scale": 0.25,
    }  # fmt: skip
    assert (p.is_paged, p.page_size, p.Lk) == (False, 40, 40)


@pytest.mark.parametrize("page_size", [1, 3, 4, 64])
def test_a_paged_problem_derives_the_same(page_size: int) -> None:
    q, k_cache, v_cache = tensors(Hq=6, Lq=3, D=16, Dv=5)
    k_pages, v_pages, block_table = paged(k_cache, v_cache, page_size)
    p = problem(q, k_pages, v_pages, block_table=block_table)
    expected = derived(problem(q, k_cache, v_cache))
    assert derived(p) == expected
    assert (p.is_paged, p.page_size) == (True, page_size)
    assert p.Lk == -(-40 // page_size) * page_size


def test_lengths_default_to_the_capacity() -> None:
    p = problem()
    assert p.cache_seqlens.tolist() == [40, 40]
    assert p.cache_seqlens.dtype == torch.int32
    k_pages, v_pages, block_table = paged(*tensors()[1:], page_size=3)
    p = problem(None, k_pages, v_pages, block_table=block_table)
    assert p.cache_seqlens.tolist() == [42, 42]


def test_selections_and_ballots() -> None:
    assert problem(config={"scope": "group"}).S == 2
    assert problem(config={"score_at": "split"}, rope=rope()).R == 2


def test_scales() -> None:
    p = problem(scale=2)
    assert (p.scale, p.select_scale) == (2.0, 2.0)
    p = problem(scale=2, config={"select_scale": 1})
    assert (p.scale, p.select_scale) == (2.0, 1.0)
    assert isinstance(p.scale, float)
    assert isinstance(p.select_scale, float)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize("number", [np.float64, np.float32, np.array, torch.tensor])
def test_numbers_of_numpy_and_tensors_without_a_dimension_are_numbers(
    integer: Callable[[int], Any], number: Callable[[float], Any]
) -> None:
    integers = {"k": 5, "n_sink": 2, "n_local": 4, "pool": 3, "n_query_means": 1}
    integers |= {"k_min": 5, "k_max": 9}
    numbers = {"select_scale": 0.5, "fixed_share": 0.25}
    config = {name: integer(value) for name, value in integers.items()}
    config |= {name: number(value) for name, value in numbers.items()}
    expected = SelectConfig(**(integers | numbers))
    assert SelectConfig(**config) == expected
    assert {type(SelectConfig(**config)[name]) for name in config} == {int, float}

    p = problem(config=config, scale=number(0.5), softcap=number(2.0), max_reuse=integer(3))
    assert (p.scale, p.softcap, p.max_reuse, p.config) == (0.5, 2.0, 3, expected)
    assert repr(problem(scale=integer(2)).scale) == "2.0"
    assert repr(rope(scaling=number(1.5)).scaling) == "1.5"
    cache = SelectionCache(theta=number(0.5), max_reuse=integer(3))
    assert repr(cache) == "SelectionCache(theta=0.5, max_reuse=3; not used yet)"

    def call(cache: SelectionCache, **factors: Any) -> Tensor:
        given = {"cache": cache, "rope": rope(scaling=factors.pop("scaling"))} | factors
        return attention(*tensors(), **given)

    got = call(cache, **config, scale=number(0.5), softcap=number(2.0), scaling=number(1.5))
    plain = {"scale": 0.5, "softcap": 2.0, "scaling": 1.5}
    assert torch.equal(got, call(SelectionCache(0.5, 3), **integers, **numbers, **plain))
    cache.reset(integer(1))
    assert cache.misses.tolist() == [1, 0]


def test_a_scale_with_a_gradient_is_a_number_where_none_is_recorded() -> None:
    with torch.no_grad():
        assert problem(scale=torch.tensor(0.5, requires_grad=True)).scale == 0.5


@pytest.mark.parametrize(
    ("cached", "moving"),
    [("rotated", {"contiguous", "fixed"}), ("raw", {"original", "true", "contiguous", "fixed"})],
)
def test_what_moves(cached: str, moving: set[str]) -> None:
    p = problem(rope=rope(cached=cached))
    places = ("original", "true", "contiguous", "fixed")
    assert {where for where in places if p.needs_rotation(where)} == moving
    assert not any(problem().needs_rotation(where) for where in places)


def test_describe_gives_shapes_and_what_is_not_default() -> None:
    p = problem(shape={"Dv": 5, "dtype": torch.bfloat16}, config={"vote": "hard"})
    assert p.describe() == (
        "B=2 Hq=4 Hkv=2 Lq=1 Lk=40 D=8 Dv=5 torch.bfloat16 on cpu (contiguous) "
        "k=4 n_sink=2 n_local=4 vote='hard'"
    )


def test_describe_a_paged_problem() -> None:
    k_pages, v_pages, block_table = paged(*tensors()[1:], page_size=16)
    defaults = dataclasses.asdict(SelectConfig())
    p = problem(None, k_pages, v_pages, block_table=block_table, config=defaults)
    assert p.describe() == ("B=2 Hq=4 Hkv=2 Lq=1 Lk=48 D=8 Dv=8 torch.float32 on cpu (pages of 16)")


def test_the_first_broken_rule_speaks() -> None:
    q, k_cache, v_cache = tensors()
    with pytest.raises(InvalidProblem, match="q has shape"):
        Problem.build(q[0], k_cache, v_cache, SelectConfig(k=-1))


# --- why not ------------------------------------------------------------------------------


def test_no_limits_no_reasons() -> None:
    assert reasons(backend(), problem()) == []


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"devices": ("cuda", "xpu")}, "device is cpu; mine takes cuda, xpu"),
        ({"dtypes": (torch.float16,)}, "dtype is torch.float32; mine takes torch.float16"),
        ({"head_dims": (64, 128)}, "head dim is 8; mine takes 64, 128"),
        ({"head_dims": range(16, 257, 16)}, "head dim is 8; mine takes 16 to 256 in steps of 16"),
        ({"group_sizes": (1,)}, "query heads per KV head is 2; mine takes 1"),
        ({"group_sizes": range(4, 9)}, "query heads per KV head is 2; mine takes 4 to 8"),
        ({"query_lengths": range(2, 65)}, "number of queries is 1; mine takes 2 to 64"),
        ({"layouts": ("paged",)}, "cache layout is contiguous; mine takes paged"),
        ({"softcaps": (True,)}, "softcap in use is False; mine takes True"),
        ({"sink_logits": (True,)}, "sink_logits in use is False; mine takes True"),
        ({"ropes": ("rotated",)}, "rope is none; mine takes rotated"),
        ({"fractions": (True,)}, "fractional k is False; mine takes True"),
        ({"pools": (3, 5)}, "pool is 1; mine takes 3, 5"),
        ({"query_means": (2,)}, "query means is 1; mine takes 2"),
        ({"votes": ("hard",)}, "vote is soft; mine takes hard"),
        ({"normalizes": ("candidates",)}, "normalize is visible; mine takes candidates"),
        ({"scopes": ("group",)}, "scope is layer; mine takes group"),
        ({"positions": ("contiguous",)}, "positions is original; mine takes contiguous"),
        ({"score_ats": ("fixed", "split")}, "score_at is true; mine takes fixed, split"),
    ],
)
def test_a_reason_says_what_is_and_what_is_needed(limits: dict[str, object], expected: str) -> None:
    assert reasons(backend(**limits), problem()) == [expected]


def test_every_limit_has_its_reason() -> None:
    """No field of Capability that limits anything is left out of `reasons`."""
    k_pages, v_pages, block_table = paged(*tensors()[1:])
    p = problem(None, k_pages, v_pages, block_table=block_table)
    limits = {field.name for field in dataclasses.fields(Capability)}
    limits -= {"deterministic", "equal_keys"}
    for name in limits:
        assert len(reasons(backend(**{name: ()}), p)) == 1, name


def test_page_sizes_count_where_there_are_pages() -> None:
    k_pages, v_pages, block_table = paged(*tensors()[1:], page_size=4)
    mine = backend(page_sizes=(16, 32))
    p = problem(None, k_pages, v_pages, block_table=block_table)
    assert reasons(mine, p) == ["page size is 4; mine takes 16, 32"]
    assert reasons(mine, problem()) == []


def test_both_head_dims_count() -> None:
    assert reasons(backend(head_dims=(8,)), problem(shape={"Dv": 5})) == [
        "head dim is 5; mine takes 8"
    ]


def test_all_reasons_are_given() -> None:
    whys = reasons(backend(devices=("cuda",), votes=("hard",)), problem())
    assert whys == ["device is cpu; mine takes cuda", "vote is soft; mine takes hard"]


def test_a_lenders_limits_count() -> None:
    mine = backend(lenders=(backend("lender", layouts=("paged",)), backend("other")))
    assert reasons(mine, problem()) == [
        "(stage borrowed from lender) cache layout is contiguous; lender takes paged"
    ]


def test_reasons_read_no_tensor() -> None:
    q, k_cache, v_cache = (x.to("meta") for x in tensors())
    p = problem(q, k_cache, v_cache, cache_seqlens=lengths(4, 4).to("meta"))
    assert reasons(backend(devices=("meta",)), p) == []


def test_lengths_of_any_stride_become_contiguous() -> None:
    """Kernels would read the wrong ones."""
    for given in (lengths(40, 7, 9, 7)[::2], lengths(40).expand(2)):
        built = problem(cache_seqlens=given).cache_seqlens
        assert built.is_contiguous()
        assert torch.equal(built, given)


def test_what_kept_the_rules_once_lets_nothing_else_pass() -> None:
    """Problems of a kind are checked once: a kind is all that the rules look at."""
    q, k, v = tensors()
    same = {"n_sink": 1, "n_local": 4}

    def holds(*inputs: Any, **settings: Any) -> bool:
        try:
            attention(*(inputs or (q, k, v)), **{"k": 1} | same | settings)
        except InvalidProblem:
            return False
        return True

    for _ in range(2):
        assert holds()
        assert holds(scale=1)
        assert holds(scale=1.0)
        assert holds(sink_logits=torch.zeros(4))
        assert holds(rope=rope(), score_at="fixed")
        for wrong in (
            {"k": True},
            {"k": 1.0},
            {"n_sink": True},
            {"scale": True},
            {"scale": math.nan},
            {"softcap": 0},
            {"score_at": "fixed"},
            {"score_at": "fixed", "rope": rope(16)},
            {"sink_logits": torch.zeros(4, dtype=torch.int64)},
            {"sink_logits": torch.zeros(3)},
            {"cache_seqlens": lengths(9)},
            {"cache_seqlens": lengths(9, 9).long()},
        ):
            assert not holds(**wrong), wrong
        for inputs in ((q, k, v.half()), (q.double(), k, v), (q[:, :3], k, v), (q, k[:, :, :9], v)):
            assert not holds(*inputs)
