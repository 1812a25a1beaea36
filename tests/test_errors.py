"""Every bad input raises an error of the right class that says what came, the rule, what to do.

The full texts are in tests/errors.txt. `pytest -n 0 tests --update-snapshots` rewrites
them; read the diff.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import fresh
from tests.conftest import snapshots, write_snapshots
from tests.problems import SMALL, lengths, paged, problem, rope, tensors
from tokenselect import (
    Backend,
    Capability,
    InvalidProblem,
    Problem,
    Rope,
    SelectConfig,
    Selection,
    SelectionCache,
    TokenSelectError,
    UnknownBackend,
    UnsupportedProblem,
    attend,
    attention,
    capture,
    cuda_graph,
    explain,
    plan,
    register,
    score,
    select,
)
from tokenselect.dispatch import registry

Q, K_CACHE, V_CACHE = tensors()
META = torch.device("meta")
TABLE = paged(K_CACHE, V_CACHE)[2]


def call(q: Any = Q, k_cache: Any = K_CACHE, v_cache: Any = V_CACHE, **arguments: Any) -> object:
    return attention(q, k_cache, v_cache, **(SMALL | arguments))


def call_paged(page_size: int = 4, **arguments: Any) -> object:
    """The same call with a paged cache; `edit` changes entries of its block table."""
    k_cache, v_cache, block_table = paged(K_CACHE, V_CACHE, page_size)
    for place, value in arguments.pop("edit", {}).items():
        block_table[place] = value
    return call(k_cache=k_cache, v_cache=v_cache, **({"block_table": block_table} | arguments))


def call_with_used_cache(arguments: dict[str, Any] | None = None, **shape: Any) -> object:
    """A second call, of another shape or with other arguments, with one SelectionCache."""
    cache = SelectionCache()
    call(cache=cache)
    return call(*tensors(**shape), cache=cache, **(arguments or {}))


def used_cache() -> SelectionCache:
    cache = SelectionCache()
    call(cache=cache)
    return cache


def call_plan(arguments: dict[str, Any] | None = None, **given: Any) -> object:
    """A call of a plan for the problem of SMALL, with max_reuse=8; `given` changes tensors."""
    planned = plan(problem(max_reuse=8, **(arguments or {})), "cpu")
    tensors_ = {"q": Q, "k_cache": K_CACHE, "v_cache": V_CACHE, "cache_seqlens": lengths(40, 9)}
    return planned(**(tensors_ | given))


def call_plan_twice() -> object:
    planned = plan(problem(), "cpu")
    out = planned(Q, K_CACHE, V_CACHE, lengths(40, 9))
    return planned(out, K_CACHE, V_CACHE, lengths(40, 9))


def paged_plan_twice() -> object:
    """The block table of the second call lies in what the first one returned."""
    k_pages, v_pages, _ = paged(K_CACHE, V_CACHE)
    planned = plan(problem(Q, k_pages, v_pages, block_table=TABLE), "cpu")
    given = Q, k_pages, v_pages, lengths(40, 9)
    table = planned(*given, block_table=TABLE).view(torch.int32).view(2, 32)[:, :10]
    return planned(*given, block_table=table)


def sinks_in_out() -> object:
    out = torch.zeros(2, 4, 1, 8)
    planned = plan(problem(sink_logits=torch.ones(4)), "cpu")
    sinks = out.view(-1)[:4]
    return planned(Q, K_CACHE, V_CACHE, lengths(40, 9), sink_logits=sinks, out=out)


def out_in_the_plan() -> object:
    planned = plan(problem(), "cpu")
    given = Q, K_CACHE, V_CACHE, lengths(40, 9)
    return planned(*given, out=planned(*given))


def planned_cache(*, Lq: int) -> object:
    """A cache in use by a plan for one query, given to a call of Lq."""
    cache = SelectionCache(max_reuse=8)
    call_plan(cache=cache)
    return call(q=Q.expand(-1, -1, Lq, -1), cache=cache)


def reset_and_used_again() -> object:
    """A cache in use by a plan, reset, and given to a call of another batch."""
    cache = SelectionCache(max_reuse=8)
    call_plan(cache=cache)
    cache.reset()
    return call(*tensors(B=3), cache=cache)


def captured(step: Callable[..., Any], *inputs: Any, **settings: Any) -> object:
    return capture(step, **settings)(*inputs)


def select_given(change: Callable[[Tensor], Any]) -> object:
    p = problem()
    return select(change(score(p).votes), p)


def attend_given(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> object:
    p = problem()
    selection = select(score(p).votes, p)
    return attend(p, Selection(*change(*selection)))


def edited(tensor: Tensor, place: tuple[int, ...], value: int) -> Tensor:
    tensor[place] = value
    return tensor


def registered(name: Any, target: Any) -> Callable[[], object]:
    return lambda: register(name, target)


def run_on(backend: Backend) -> object:
    register(backend.name, backend)
    return call(backend=backend.name)


@pytest.fixture(autouse=True)
def _only_built_in_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts list the registered names: here those of this library, and for one test only."""
    own = {
        name: target
        for name, target in registry._targets.items()
        if isinstance(target, str) and target.startswith("tokenselect.")
    }
    monkeypatch.setattr(registry, "_targets", own)
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_scanned", True)


class Case(NamedTuple):
    """A call that must fail; the argument and its value as the first line must name them."""

    call: Callable[[], object]
    mentions: tuple[str, ...]
    error: type[TokenSelectError] = InvalidProblem


CASES: dict[str, Case] = {
    # tensors
    "q_is_a_list": Case(lambda: call(q=[[1.0]]), ("q", "list")),
    "q_is_none": Case(lambda: call(q=None), ("q", "NoneType")),
    "k_cache_is_a_tuple": Case(lambda: call(k_cache=(1, 2)), ("k_cache", "tuple")),
    "cache_seqlens_is_a_list": Case(lambda: call(cache_seqlens=[3, 4]), ("cache_seqlens", "list")),
    "block_table_is_a_list": Case(lambda: call(block_table=[[0]]), ("block_table", "list")),
    "sink_logits_is_a_float": Case(lambda: call(sink_logits=1.0), ("sink_logits", "float")),
    "rank_q": Case(lambda: call(q=Q[:, :, 0]), ("q", "(2, 4, 8)", "3 dimensions")),
    "rank_k_cache": Case(lambda: call(k_cache=K_CACHE[0]), ("k_cache", "(2, 40, 8)")),
    "rank_v_cache": Case(lambda: call(v_cache=V_CACHE[None]), ("v_cache", "(1, 2, 2, 40, 8)")),
    "rank_cache_seqlens": Case(
        lambda: call(cache_seqlens=lengths(40, 40)[None]), ("cache_seqlens", "(1, 2)")
    ),
    "rank_block_table": Case(
        lambda: call_paged(block_table=lengths(0, 1)), ("block_table", "(2,)")
    ),
    "rank_sink_logits": Case(
        lambda: call(sink_logits=torch.zeros(4, 1)), ("sink_logits", "(4, 1)")
    ),
    "empty_batch": Case(lambda: call(Q[:0], K_CACHE[:0], V_CACHE[:0]), ("q", "(0, 4, 1, 8)")),
    "empty_queries": Case(lambda: call(q=Q[:, :, :0]), ("q", "(2, 4, 0, 8)")),
    "empty_cache": Case(lambda: call(k_cache=K_CACHE[:, :, :0]), ("k_cache", "(2, 2, 0, 8)")),
    "empty_values": Case(lambda: call(v_cache=V_CACHE[..., :0]), ("v_cache", "(2, 2, 40, 0)")),
    "empty_block_table": Case(
        lambda: call_paged(block_table=torch.zeros(2, 0, dtype=torch.int32)),
        ("block_table", "(2, 0)"),
    ),
    "device_k_cache": Case(lambda: call(k_cache=K_CACHE.to(META)), ("k_cache", "meta", "cpu")),
    "device_v_cache": Case(lambda: call(v_cache=V_CACHE.to(META)), ("v_cache", "meta", "cpu")),
    "device_cache_seqlens": Case(
        lambda: call(cache_seqlens=lengths(4, 4).to(META)), ("cache_seqlens", "meta", "cpu")
    ),
    "device_block_table": Case(
        lambda: call_paged(block_table=torch.zeros(2, 10, dtype=torch.int32, device=META)),
        ("block_table", "meta", "cpu"),
    ),
    "device_sink_logits": Case(
        lambda: call(sink_logits=torch.zeros(4, device=META)), ("sink_logits", "meta", "cpu")
    ),
    "device_rope": Case(
        lambda: call(rope=Rope(torch.ones(4, device=META))), ("rope.inv_freq", "meta", "cpu")
    ),
    "dtype_k_cache_differs": Case(
        lambda: call(k_cache=K_CACHE.half()), ("k_cache", "float16", "float32")
    ),
    "dtype_v_cache_differs": Case(
        lambda: call(v_cache=V_CACHE.bfloat16()), ("v_cache", "bfloat16", "float32")
    ),
    "dtype_integer": Case(
        lambda: call(Q.int(), K_CACHE.int(), V_CACHE.int()), ("q", "torch.int32")
    ),
    "dtype_complex": Case(
        lambda: call(Q.cfloat(), K_CACHE.cfloat(), V_CACHE.cfloat()), ("q", "torch.complex64")
    ),
    "dtype_float8": Case(
        lambda: call(*(x.to(torch.float8_e4m3fn) for x in (Q, K_CACHE, V_CACHE))),
        ("q", "torch.float8_e4m3fn"),
    ),
    "dtype_cache_seqlens": Case(
        lambda: call(cache_seqlens=torch.tensor([40, 40])), ("cache_seqlens", "torch.int64")
    ),
    "dtype_block_table": Case(
        lambda: call_paged(block_table=torch.zeros(2, 10, dtype=torch.int64)),
        ("block_table", "torch.int64"),
    ),
    "dtype_sink_logits_integer": Case(
        lambda: call(sink_logits=torch.zeros(4, dtype=torch.int64)), ("sink_logits", "torch.int64")
    ),
    "dtype_sink_logits_complex": Case(
        lambda: call(sink_logits=torch.zeros(4, dtype=torch.complex64)),
        ("sink_logits", "torch.complex64"),
    ),
    "caches_differ": Case(
        lambda: call(v_cache=V_CACHE[:, :, :39]),
        ("k_cache", "(2, 2, 40, 8)", "v_cache", "(2, 2, 39, 8)"),
    ),
    "batch_k_cache": Case(
        lambda: call(q=Q[:1]), ("k_cache", "(2, 2, 40, 8)", "q", "(1, 4, 1, 8)", "B=2 and B=1")
    ),
    "batch_cache_seqlens": Case(
        lambda: call(cache_seqlens=lengths(40)), ("cache_seqlens", "(1,)", "B=1 and B=2")
    ),
    "batch_block_table": Case(
        lambda: call_paged(block_table=torch.zeros(3, 10, dtype=torch.int32)),
        ("block_table", "(3, 10)", "B=3 and B=2"),
    ),
    "head_dim_differs": Case(
        lambda: call(q=tensors(D=6)[0]), ("q", "(2, 4, 1, 6)", "k_cache", "(2, 2, 40, 8)")
    ),
    "heads_do_not_divide": Case(
        lambda: call(q=tensors(Hq=3)[0]), ("q", "(2, 3, 1, 8)", "k_cache", "Hq=3, Hkv=2")
    ),
    "fewer_query_heads_than_kv_heads": Case(lambda: call(q=Q[:, :1]), ("q", "Hq=1, Hkv=2")),
    "more_queries_than_cache": Case(lambda: call(q=tensors(Lq=41)[0]), ("Lq=41", "Lk=40")),
    "cache_too_long": Case(
        lambda: call(
            k_cache=torch.zeros(2, 2, 1, 8).expand(2, 2, 2**31, 8),
            v_cache=torch.zeros(2, 2, 1, 8).expand(2, 2, 2**31, 8),
        ),
        ("Lk=2147483648",),
    ),
    "sink_logits_of_another_layer": Case(
        lambda: call(sink_logits=torch.zeros(3)), ("sink_logits", "(3,)", "q", "(2, 4, 1, 8)")
    ),
    "q_requires_grad": Case(lambda: call(q=Q.clone().requires_grad_()), ("q", "requires grad")),
    "v_cache_requires_grad": Case(
        lambda: call(v_cache=V_CACHE.clone().requires_grad_()), ("v_cache", "requires grad")
    ),
    "sink_logits_require_grad": Case(
        lambda: call(sink_logits=torch.zeros(4, requires_grad=True)),
        ("sink_logits", "requires grad"),
    ),
    # lengths and block tables
    "length_beyond_cache": Case(
        lambda: call(cache_seqlens=lengths(40, 41)), ("cache_seqlens[1]=41", "Lk=40")
    ),
    "length_negative": Case(lambda: call(cache_seqlens=lengths(-1, 40)), ("cache_seqlens[0]=-1",)),
    "length_shorter_than_call": Case(
        lambda: call(q=tensors(Lq=3)[0], cache_seqlens=lengths(3, 2)),
        ("cache_seqlens[1]=2", "Lq=3"),
    ),
    "length_of_a_scored_problem": Case(
        lambda: score(problem(cache_seqlens=lengths(40, 41))), ("cache_seqlens[1]=41", "Lk=40")
    ),
    "page_outside_pool": Case(
        lambda: call_paged(edit={(0, 3): 23}), ("block_table[0, 3]=23", "n_pages=23")
    ),
    "page_negative": Case(
        lambda: call_paged(edit={(1, 9): -1}), ("block_table[1, 9]=-1", "n_pages=23")
    ),
    "page_outside_pool_last_in_use": Case(
        lambda: call_paged(edit={(1, 5): 99}, cache_seqlens=lengths(40, 21)),
        ("block_table[1, 5]=99",),
    ),
    # settings
    "k_negative": Case(lambda: call(k=-1), ("k=-1",)),
    "k_float": Case(lambda: call(k=2.0), ("k=2.0",)),
    "k_bool": Case(lambda: call(k=True), ("k=True",)),
    "k_numpy_float": Case(lambda: call(k=np.float64(2.0)), ("k=2.0",)),
    "k_numpy_bool": Case(lambda: call(k=np.bool_(True)), ("k=True",)),
    "k_tensor_of_a_float": Case(lambda: call(k=torch.tensor(2.0)), ("k=2.0",)),
    "k_tensor_of_a_bool": Case(lambda: call(k=torch.tensor(True)), ("k=True",)),
    "k_tensor_elsewhere": Case(
        lambda: call(k=torch.tensor(4, device=META)), ("k=tensor(", "device='meta'")
    ),
    "k_string": Case(lambda: call(k="4"), ("k='4'",)),
    "k_nan": Case(lambda: call(k=math.nan), ("k=nan",)),
    "k_tensor": Case(lambda: call(k=torch.tensor([4])), ("k=tensor([4])",)),
    "k_one_as_a_float": Case(lambda: call(k=1.0), ("k=1.0",)),
    "k_zero_as_a_float": Case(lambda: call(k=0.0), ("k=0.0",)),
    "k_more_than_all": Case(lambda: call(k=2.5), ("k=2.5",)),
    "k_negative_fraction": Case(lambda: call(k=-0.1), ("k=-0.1",)),
    "k_less_than_a_millionth": Case(lambda: call(k=4e-7), ("k=4e-07",)),
    "k_nearly_all": Case(lambda: call(k=1 - 4e-7), ("k=0.9999996",)),
    "k_min_float": Case(lambda: call(k=0.1, k_min=0.5), ("k_min=0.5",)),
    "k_min_negative": Case(lambda: call(k=0.1, k_min=-1), ("k_min=-1",)),
    "k_max_float": Case(lambda: call(k=0.1, k_max=5.0), ("k_max=5.0",)),
    "k_max_below_k_min": Case(lambda: call(k=0.1, k_min=6, k_max=5), ("k_max=5", "k_min=6")),
    "k_above_k_max": Case(lambda: call(k=6, k_max=5), ("k=6", "k_max=5")),
    "k_below_k_min": Case(lambda: call(k=6, k_min=7), ("k=6", "k_min=7")),
    "n_sink_negative": Case(lambda: call(n_sink=-1), ("n_sink=-1",)),
    "n_sink_float": Case(lambda: call(n_sink=0.5), ("n_sink=0.5",)),
    "n_local_zero": Case(lambda: call(n_local=0), ("n_local=0",)),
    "n_local_bool": Case(lambda: call(n_local=True), ("n_local=True",)),
    "pool_even": Case(lambda: call(pool=4), ("pool=4",)),
    "pool_zero": Case(lambda: call(pool=0), ("pool=0",)),
    "pool_float": Case(lambda: call(pool=3.0), ("pool=3.0",)),
    "n_query_means_zero": Case(lambda: call(n_query_means=0), ("n_query_means=0",)),
    "vote_unknown": Case(lambda: call(vote="sotf"), ("vote='sotf'",)),
    "vote_list": Case(lambda: call(vote=["soft"]), ("vote=['soft']",)),
    "normalize_unknown": Case(lambda: call(normalize="all"), ("normalize='all'",)),
    "scope_unknown": Case(lambda: call(scope="head"), ("scope='head'",)),
    "positions_unknown": Case(lambda: call(positions="close"), ("positions='close'",)),
    "score_at_unknown": Case(lambda: call(score_at="near"), ("score_at='near'",)),
    "scale_negative": Case(lambda: call(scale=-1.0), ("scale=-1.0",)),
    "scale_zero": Case(lambda: call(scale=0), ("scale=0",)),
    "scale_nan": Case(lambda: call(scale=math.nan), ("scale=nan",)),
    "scale_infinite": Case(lambda: call(scale=math.inf), ("scale=inf",)),
    "scale_too_large_for_a_float": Case(lambda: call(scale=10**400), ("scale=1000000",)),
    "scale_string": Case(lambda: call(scale="0.5"), ("scale='0.5'",)),
    "scale_bool": Case(lambda: call(scale=True), ("scale=True",)),
    "scale_tensor": Case(lambda: call(scale=torch.tensor([0.5])), ("scale=tensor([0.5000])",)),
    "scale_numpy_nan": Case(lambda: call(scale=np.float32("nan")), ("scale=nan",)),
    "scale_tensor_requires_grad": Case(
        lambda: call(scale=torch.tensor(0.5, requires_grad=True)), ("scale=", "requires_grad=True")
    ),
    "softcap_negative": Case(lambda: call(softcap=-30.0), ("softcap=-30.0",)),
    "softcap_zero": Case(lambda: call(softcap=0.0), ("softcap=0.0",)),
    "softcap_nan": Case(lambda: call(softcap=math.nan), ("softcap=nan",)),
    "softcap_infinite": Case(lambda: call(softcap=math.inf), ("softcap=inf",)),
    "select_scale_negative": Case(lambda: call(select_scale=-1.0), ("select_scale=-1.0",)),
    "select_scale_nan": Case(lambda: call(select_scale=math.nan), ("select_scale=nan",)),
    "select_scale_infinite": Case(lambda: call(select_scale=-math.inf), ("select_scale=-inf",)),
    "fixed_share_negative": Case(lambda: call(fixed_share=-0.1), ("fixed_share=-0.1",)),
    "fixed_share_above_one": Case(lambda: call(fixed_share=25), ("fixed_share=25",)),
    "fixed_share_nan": Case(lambda: call(fixed_share=math.nan), ("fixed_share=nan",)),
    "fixed_share_none": Case(lambda: call(fixed_share=None), ("fixed_share=None",)),
    "fixed_share_bool": Case(lambda: call(fixed_share=True), ("fixed_share=True",)),
    "contiguous_without_rope": Case(
        lambda: call(positions="contiguous"), ("positions='contiguous'", "rope=None")
    ),
    "fixed_without_rope": Case(lambda: call(score_at="fixed"), ("score_at='fixed'", "rope=None")),
    "split_without_rope": Case(lambda: call(score_at="split"), ("score_at='split'", "rope=None")),
    "setting_of_explain": Case(
        lambda: explain(Q, K_CACHE, V_CACHE, k=-1, validate=True, return_info=True), ("k=-1",)
    ),
    "setting_of_a_problem": Case(
        lambda: Problem.build(Q, K_CACHE, V_CACHE, SelectConfig(n_sink=-2)), ("n_sink=-2",)
    ),
    # rope
    "rope_is_a_tensor": Case(lambda: call(rope=torch.ones(4)), ("rope", "Tensor")),
    "rope_too_wide": Case(lambda: call(rope=rope(10)), ("rope", "10 rotary dims", "(2, 4, 1, 8)")),
    "rope_inv_freq_list": Case(lambda: Rope([1.0, 0.5]), ("inv_freq", "list")),
    "rope_inv_freq_integer": Case(
        lambda: Rope(torch.ones(4, dtype=torch.int64)), ("inv_freq", "(4,)", "torch.int64")
    ),
    "rope_inv_freq_matrix": Case(lambda: Rope(torch.ones(4, 2)), ("inv_freq", "(4, 2)")),
    "rope_cached_unknown": Case(lambda: rope(cached="unrotated"), ("cached='unrotated'",)),
    "rope_scaling_nan": Case(lambda: rope(scaling=math.nan), ("scaling=nan",)),
    "rope_scaling_zero": Case(lambda: rope(scaling=0.0), ("scaling=0.0",)),
    "rope_scaling_bool": Case(lambda: rope(scaling=True), ("scaling=True",)),
    "rope_scaling_string": Case(lambda: rope(scaling="2"), ("scaling='2'",)),
    # the Selection Cache
    "theta_above_one": Case(lambda: SelectionCache(theta=1.01), ("theta=1.01",)),
    "theta_below_minus_one": Case(lambda: SelectionCache(theta=-2), ("theta=-2",)),
    "theta_nan": Case(lambda: SelectionCache(theta=math.nan), ("theta=nan",)),
    "theta_string": Case(lambda: SelectionCache(theta="0.9"), ("theta='0.9'",)),
    "theta_bool": Case(lambda: SelectionCache(theta=True), ("theta=True",)),
    "theta_numpy_bool": Case(lambda: SelectionCache(theta=np.True_), ("theta=True",)),
    "max_reuse_negative": Case(lambda: SelectionCache(max_reuse=-1), ("max_reuse=-1",)),
    "max_reuse_float": Case(lambda: SelectionCache(max_reuse=64.0), ("max_reuse=64.0",)),
    "max_reuse_none": Case(lambda: SelectionCache(max_reuse=None), ("max_reuse=None",)),
    "cache_is_a_dict": Case(lambda: call(cache={}), ("cache", "dict")),
    "cache_is_the_class": Case(lambda: call(cache=SelectionCache), ("cache", "type")),
    "cache_of_another_batch": Case(lambda: call_with_used_cache(B=3), ("cache", "B=2", "B=3")),
    "cache_of_other_heads": Case(lambda: call_with_used_cache(Hq=2), ("cache", "Hq=4", "Hq=2")),
    "cache_of_other_kv_heads": Case(
        lambda: call_with_used_cache(Hkv=4), ("cache", "Hkv=2", "Hkv=4")
    ),
    "cache_of_another_head_dim": Case(lambda: call_with_used_cache(D=6), ("cache", "D=8", "D=6")),
    "cache_of_another_configuration": Case(
        lambda: call_with_used_cache({"k": 5}), ("cache", "k=4", "k=5")
    ),
    "cache_of_another_device": Case(
        lambda: attention(
            *(x.to(META) for x in (Q, K_CACHE, V_CACHE)),
            **SMALL,
            cache=used_cache(),
            backend="reference",
        ),
        ("cache", "device=cpu", "device=meta"),
    ),
    "cache_not_used_yet": Case(lambda: SelectionCache().hits, ("SelectionCache", "not been used")),
    "reset_outside_batch": Case(lambda: used_cache().reset(2), ("b=2", "B=2")),
    "reset_numpy_outside_batch": Case(lambda: used_cache().reset(np.int64(2)), ("b=2", "B=2")),
    "reset_float": Case(lambda: used_cache().reset(1.5), ("b=1.5",)),
    "reset_mask_of_another_batch": Case(
        lambda: used_cache().reset(torch.ones(3, dtype=torch.bool)), ("b", "(3,)", "B=2")
    ),
    "crop_list": Case(lambda: used_cache().crop([1, 2]), ("lengths", "list")),
    "crop_of_another_batch": Case(
        lambda: used_cache().crop(torch.tensor([1])), ("lengths", "(1,)", "B=2")
    ),
    "crop_float": Case(
        lambda: used_cache().crop(torch.tensor([1.0, 2.0])), ("lengths", "torch.float32")
    ),
    "reorder_list": Case(lambda: used_cache().reorder([1, 0]), ("order", "list")),
    "reorder_of_another_batch": Case(
        lambda: used_cache().reorder(torch.tensor([0, 1, 0])), ("order", "(3,)", "B=2")
    ),
    # stages
    "score_of_a_tensor": Case(lambda: score(Q), ("problem", "Tensor")),
    "votes_shape": Case(
        lambda: select_given(lambda votes: votes[:, :, :, 1:]), ("votes", "(2, 1, 1, 39)")
    ),
    "votes_dtype": Case(lambda: select_given(Tensor.double), ("votes", "torch.float64")),
    "votes_device": Case(lambda: select_given(lambda votes: votes.to(META)), ("votes", "meta")),
    "votes_are_scores": Case(lambda: select(score(problem()), problem()), ("votes", "Scores")),
    "selection_is_none": Case(lambda: attend(problem(), None), ("selection", "NoneType")),
    "selection_out_of_range": Case(
        lambda: attend_given(lambda p, count: (edited(p, (1, 0, 9), 40), count)),
        ("selection.positions[1, 0, 9]=40", "n=40"),
    ),
    "selection_negative": Case(
        lambda: attend_given(lambda p, count: (edited(p, (0, 0, 0), -1), count)),
        ("selection.positions[0, 0, 0]=-1", "count=10"),
    ),
    "selection_not_ascending": Case(
        lambda: attend_given(lambda p, count: (edited(p, (0, 0, 2), 1), count)),
        ("selection.positions[0, 0, 2]=1",),
    ),
    "selection_junk_past_count": Case(
        lambda: attend_given(lambda p, count: (p, count - 1)),
        ("selection.positions[0, 0, 9]=39", "count=9"),
    ),
    "selection_count_beyond_capacity": Case(
        lambda: attend_given(lambda p, count: (p, count + 1)), ("selection.count[0, 0]=11", "K=10")
    ),
    "selection_count_negative": Case(
        lambda: attend_given(lambda p, count: (p * 0 - 1, count * 0 - 1)),
        ("selection.count[0, 0]=-1",),
    ),
    "selection_shape": Case(
        lambda: attend_given(lambda p, count: (p[:1], count)), ("positions (1, 1, 10)",)
    ),
    "selection_rank": Case(
        lambda: attend_given(lambda p, count: (p[:, 0], count)), ("positions (2, 10)",)
    ),
    "selection_dtype": Case(
        lambda: attend_given(lambda p, count: (p.long(), count)), ("positions", "torch.int64")
    ),
    "selection_count_dtype": Case(
        lambda: attend_given(lambda p, count: (p, count.float())), ("count", "torch.float32")
    ),
    "selection_device": Case(
        lambda: attend_given(lambda p, count: (p.to(META), count)), ("positions", "meta")
    ),
    # plans and graphs
    "plan_of_a_tensor": Case(lambda: plan(Q), ("problem", "Tensor")),
    "plan_on_the_reference": Case(
        lambda: plan(problem(), "reference"), ("B=2", "k=4"), UnsupportedProblem
    ),
    "plan_on_cuda_graph": Case(
        lambda: plan(problem(shape={"D": 32, "Dv": 32}), "cuda_graph"), ("cpu",), UnsupportedProblem
    ),
    "plan_of_unknown_backend": Case(
        lambda: plan(problem(), "tritn"), ("backend='tritn'",), UnknownBackend
    ),
    "planned_other_heads": Case(lambda: call_plan(q=torch.ones(2, 2, 1, 8)), ("Hq=2", "Hq=4")),
    "planned_more_queries": Case(lambda: call_plan(q=torch.ones(2, 4, 3, 8)), ("Lq=3", "Lq=1")),
    "planned_other_dtype": Case(
        lambda: call_plan(q=Q.bfloat16(), k_cache=K_CACHE.bfloat16(), v_cache=V_CACHE.bfloat16()),
        ("dtype=torch.bfloat16", "dtype=torch.float32"),
    ),
    "planned_larger_batch": Case(
        lambda: call_plan(
            **dict(zip(("q", "k_cache", "v_cache"), tensors(B=3), strict=True)),
            cache_seqlens=lengths(4, 4, 4),
        ),
        ("B=3", "B=2"),
    ),
    "planned_longer_cache": Case(
        lambda: call_plan(**dict(zip(("q", "k_cache", "v_cache"), tensors(Lk=41), strict=True))),
        ("Lk=41", "Lk=40"),
    ),
    "planned_sink_logits": Case(
        lambda: call_plan(sink_logits=torch.ones(4)), ("sink_logits=given", "sink_logits=none")
    ),
    "planned_without_block_table": Case(
        lambda: plan(problem(Q, *paged(K_CACHE, V_CACHE)[:2], block_table=TABLE), "cpu")(
            Q, *paged(K_CACHE, V_CACHE)[:2], lengths(40, 9)
        ),
        ("no block_table", "pages of 4"),
    ),
    "planned_with_a_block_table": Case(
        lambda: call_plan(block_table=TABLE), ("a block_table", "contiguous")
    ),
    "planned_reset_cache_of_another_batch": Case(reset_and_used_again, ("B=2", "B=3")),
    "setting_max_reuse": Case(lambda: problem(max_reuse=-5), ("max_reuse=-5",)),
    "setting_max_reuse_bool": Case(lambda: problem(max_reuse=True), ("max_reuse=True",)),
    "config_is_a_dict": Case(
        lambda: Problem.build(Q, K_CACHE, V_CACHE, {"k": 3}), ("config", "dict")
    ),
    "planned_other_page_size": Case(
        lambda: plan(problem(Q, *paged(K_CACHE, V_CACHE)[:2], block_table=TABLE), "cpu")(
            Q, *paged(K_CACHE, V_CACHE, 8)[:2], lengths(40, 9), block_table=TABLE[:, :5]
        ),
        ("page_size=8", "page_size=4"),
    ),
    "block_table_in_the_plan": Case(paged_plan_twice, ("block_table",)),
    "sink_logits_in_out": Case(sinks_in_out, ("sink_logits",)),
    "out_in_the_plan": Case(out_in_the_plan, ("out",)),
    "planned_without_lengths": Case(
        lambda: call_plan(cache_seqlens=None), ("cache_seqlens", "NoneType")
    ),
    "planned_strided_lengths": Case(
        lambda: call_plan(cache_seqlens=lengths(40, 0, 9, 0)[::2]), ("cache_seqlens", "(2,)")
    ),
    "planned_cache_is_a_dict": Case(lambda: call_plan(cache={}), ("cache", "dict")),
    "planned_cache_of_other_max_reuse": Case(
        lambda: call_plan(cache=SelectionCache()), ("max_reuse=64", "max_reuse=8")
    ),
    "planned_cache_and_part_of_the_batch": Case(
        lambda: call_plan(
            **dict(zip(("q", "k_cache", "v_cache"), tensors(B=1), strict=True)),
            cache_seqlens=lengths(4),
            cache=SelectionCache(max_reuse=8),
        ),
        ("B=1", "B=2"),
    ),
    "planned_cache_has_to_stay": Case(lambda: planned_cache(Lq=4), ("K=18", "K=21")),
    "out_shape": Case(lambda: call_plan(out=torch.empty(2, 4, 8)), ("out", "(2, 4, 8)")),
    "out_dtype": Case(lambda: call_plan(out=torch.empty(2, 4, 1, 8).double()), ("torch.float64",)),
    "out_strides": Case(
        lambda: call_plan(out=torch.empty(2, 4, 1, 16)[..., ::2]), ("out", "strides")
    ),
    "out_is_a_list": Case(lambda: call_plan(out=[]), ("out", "list")),
    "out_is_q": Case(lambda: call_plan(out=Q), ("q",)),
    "plan_of_its_own_result": Case(call_plan_twice, ("q",)),
    "capture_without_cuda": Case(lambda: captured(torch.neg, Q), ("cpu",)),
    "capture_of_a_list": Case(lambda: captured(torch.neg, [1.0]), ("argument 0", "list")),
    "capture_of_nothing": Case(
        lambda: captured(
            torch.ones,
        ),
        ("no tensor",),
    ),
    "capture_batches": Case(lambda: capture(torch.neg, batches=(1, 0)), ("batches=(1, 0)",)),
    "capture_batches_numpy_bool": Case(
        lambda: capture(torch.neg, batches=np.array([True])), ("batches=(True,)",)
    ),
    "capture_beyond_batches": Case(
        lambda: captured(torch.neg, Q, batches=(1,)), ("batch of 2", "batches=(1,)")
    ),
    "cuda_graph_of_the_reference": Case(lambda: cuda_graph("reference"), ("'reference'",)),
    "cuda_graph_of_unknown": Case(
        lambda: cuda_graph("tritn"), ("backend='tritn'",), UnknownBackend
    ),
    # backends
    "backend_near_miss": Case(
        lambda: call(backend="referense"), ("backend='referense'",), UnknownBackend
    ),
    "backend_unlike_any": Case(lambda: call(backend="xyz"), ("backend='xyz'",), UnknownBackend),
    "backend_none": Case(lambda: call(backend=None), ("backend=None",), UnknownBackend),
    "backend_list": Case(lambda: call(backend=["cpu"]), ("backend=['cpu']",), UnknownBackend),
    "backend_of_explain": Case(
        lambda: explain(Q, K_CACHE, V_CACHE, backend="cqu"), ("backend='cqu'",), UnknownBackend
    ),
    "register_taken_name": Case(registered("cpu", "some.module:BACKEND"), ("'cpu'",)),
    "register_auto": Case(registered("auto", "some.module:BACKEND"), ("'auto'",)),
    "register_empty_name": Case(registered("", "some.module:BACKEND"), ("register(''",)),
    "register_number_as_name": Case(registered(3, "some.module:BACKEND"), ("register(3",)),
    "register_no_attribute": Case(registered("mine", "some.module"), ("'some.module'",)),
    "register_number": Case(registered("mine", 7), ("7",)),
    "register_under_another_name": Case(
        registered("mine", Backend("yours", Capability(), "cpu", "cpu", "cpu")), ("mine", "yours")
    ),
    "backend_borrows_from_itself": Case(
        lambda: run_on(Backend("narcissus", Capability(), "narcissus", "cpu", "cpu")),
        ("narcissus",),
    ),
    "backends_borrow_in_a_circle": Case(
        lambda: (
            register("one", Backend("one", Capability(), "other", "cpu", "cpu")),
            run_on(Backend("other", Capability(), "one", "cpu", "cpu")),
        ),
        ("'one'", "score='other'"),
    ),
    "backend_borrows_from_nobody": Case(
        lambda: run_on(Backend("orphan", Capability(), "nobody", "cpu", "cpu")),
        ("backend='nobody'",),
        UnknownBackend,
    ),
    "backend_stage_is_a_number": Case(
        lambda: run_on(Backend("counter", Capability(), 3, "cpu", "cpu")), ("counter", "score=3")
    ),
    "unsupported_by_name": Case(
        lambda: run_on(
            Backend(
                "picky",
                Capability(
                    devices=("cuda",),
                    dtypes=(torch.float16, torch.bfloat16),
                    head_dims=range(16, 257, 16),
                    votes=("hard",),
                ),
                "cpu",
                "cpu",
                "cpu",
            )
        ),
        ("Lk=40", "float32"),
        UnsupportedProblem,
    ),
    "unsupported_by_auto": Case(
        lambda: call(*(x.to(META) for x in (Q, K_CACHE, V_CACHE))),
        ("Lk=40", "on meta"),
        UnsupportedProblem,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_says_what_came_the_rule_and_what_to_do(
    name: str, check_snapshot: Callable[[str, str], None]
) -> None:
    case = CASES[name]
    with pytest.raises(TokenSelectError) as caught:
        case.call()
    assert type(caught.value) is case.error
    assert isinstance(caught.value, ValueError)
    # A machine without a compiler has one reason more.
    text = str(caught.value).replace(f"  native: {registry.load('native').unavailable}\n", "")
    came = text.split("\n  rule:")[0].splitlines()[0]
    assert all(mention in came for mention in case.mentions), text
    if case.error is UnsupportedProblem:
        *_, reason, do = text.splitlines()
        assert " is " in reason
        assert " takes " in reason
    else:
        *_, rule, do = text.splitlines()
        assert rule.startswith("  rule: ")
    assert do.startswith("  do:")
    check_snapshot(name, text)


def test_every_snapshot_is_used(update_snapshots: bool) -> None:
    used = {name: text for name, text in snapshots().items() if name in CASES}
    if update_snapshots:
        write_snapshots(used)
    else:
        assert used == snapshots(), "drop the others: pytest tests --update-snapshots"


def test_unsupported_problem_carries_its_reasons() -> None:
    with pytest.raises(UnsupportedProblem) as caught:
        call(*(x.to(META) for x in (Q, K_CACHE, V_CACHE)))
    reasons = caught.value.reasons
    assert reasons["cpu"] == ["device is meta; cpu takes cpu"]
    assert list(reasons) == ["native", "cpu", "triton"]
    assert reasons["triton"][0].startswith("device is meta; triton takes ")


def test_entries_past_the_last_page_in_use_may_be_anything() -> None:
    n = lengths(21, 20)
    expected = call_paged(cache_seqlens=n)
    junk = {(0, 6): -1, (0, 9): 2**31 - 1, (1, 5): -(2**31), (1, 7): 23}
    assert torch.equal(call_paged(cache_seqlens=n, edit=junk), expected)


def test_values_are_not_read_when_validate_is_false() -> None:
    """Then a length that is wrong is the caller's business; what is checked by shape still is."""
    with pytest.raises(InvalidProblem):
        call(cache_seqlens=lengths(40, 41), validate=True)
    with pytest.raises(InvalidProblem, match="k=-1"):
        call(k=-1, validate=False)


def test_a_gradient_is_no_obstacle_where_none_is_recorded() -> None:
    with torch.no_grad():
        out = call(q=Q.clone().requires_grad_())
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(call(q=Q.clone().requires_grad_()), out)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("raise ImportError('libfast.so: cannot open shared object file')", "ImportError"),
        ("import a_package_that_is_not_here", "ModuleNotFoundError"),
        ("raise RuntimeError('driver too old')", "RuntimeError"),
    ],
)
def test_a_backend_that_fails_to_import_raises_its_own_error(
    module: str, error: str, tmp_path: Any
) -> None:
    (tmp_path / "broken_backend.py").write_text(module)
    done = fresh.run(
        "import torch, tokenselect\n"
        "tokenselect.register('broken', 'broken_backend:BACKEND')\n"
        "x = torch.ones(1, 1, 1, 8)\n"
        "print(tokenselect.attention(x, x, x).shape)\n"
        "tokenselect.attention(x, x, x, backend='broken')\n",
        tmp_path,
    )
    assert done.stdout == "torch.Size([1, 1, 1, 8])\n", done.stderr
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{error}: ")
    assert "broken_backend.py" in done.stderr


def test_errors_survive_pickling() -> None:
    """As they must to come back from a worker process."""
    for error in (
        InvalidProblem("k=-1", "k >= 0", "pass 0"),
        UnknownBackend("cppu", ["cpu"]),
        UnsupportedProblem("B=1", {"cpu": ["dtype"]}, "change it"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
