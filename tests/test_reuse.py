"""The Selection Cache by example: when a selection is reused, and what is then attended to."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import fresh
from tests.problems import SMALL, lengths, problem, tensors
from tokenselect import AttentionInfo, SelectionCache, attention
from tokenselect.dispatch.registry import load, reuse_of
from tokenselect.errors import InvalidProblem

LK = 64
_, K_CACHE, V_CACHE = tensors(Lk=LK)


def query(*seeds: int, Lq: int = 1) -> Tensor:
    """A query a request, by its seed: equal seeds are equal queries."""
    return torch.cat([tensors(B=1, Lq=Lq, seed=seed)[0] for seed in seeds])


def step(cache: SelectionCache | None, q: Tensor, *n: int, **arguments: Any) -> AttentionInfo:
    """One call with n tokens in each request; checks what holds of every selection."""
    given = {"k_cache": K_CACHE, "v_cache": V_CACHE} | arguments
    B = len(q)
    k_cache, v_cache = given.pop("k_cache")[:B], given.pop("v_cache")[:B]
    out, info = attention(
        q,
        k_cache,
        v_cache,
        **(SMALL | given),
        cache_seqlens=lengths(*n),
        cache=cache,
        return_info=True,
    )
    for b in range(B):
        for s in range(info.selection.count.shape[1]):
            chosen = positions(info, b, s)
            assert chosen == sorted(set(chosen))
            assert all(0 <= position < n[b] for position in chosen)
            assert (info.selection.positions[b, s, len(chosen) :] == -1).all()
            assert set(range(max(0, n[b] - 4), n[b])) <= set(chosen)
    torch.testing.assert_close(out, softmax_attention(q, k_cache, v_cache, info, n))
    return info


def softmax_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, info: AttentionInfo, n: tuple[int, ...]
) -> Tensor:
    """Attention over the positions that info says were attended to, a query at a time."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        s = h // 2 if info.selection.count.shape[1] > 1 else 0
        seen = [j for j in positions(info, b, s) if j <= n[b] - q.shape[2] + i]
        if seen:
            logits = k_cache[b, h // 2, seen] @ q[b, h, i] / math.sqrt(q.shape[3])
            out[b, h, i] = torch.softmax(logits, 0) @ v_cache[b, h // 2, seen]
    return out


def positions(info: AttentionInfo, b: int = 0, s: int = 0) -> list[int]:
    return info.selection.positions[b, s, : int(info.selection.count[b, s])].tolist()


def reused(*infos: AttentionInfo) -> list[bool]:
    return [bool(info.reused[0]) for info in infos]


def test_like_queries_hit_and_unlike_ones_miss() -> None:
    cache = SelectionCache(theta=0.9)
    infos = [step(cache, query(seed), 30 + i) for i, seed in enumerate([1, 1, 1, 2, 2, 1])]
    assert reused(*infos) == [False, True, True, False, True, False]
    assert (int(cache.hits), int(cache.misses)) == (3, 3)
    assert cache.hits.dtype == cache.misses.dtype == torch.int64


def test_reuse_attends_to_the_stored_positions_and_all_appended_since() -> None:
    cache = SelectionCache()
    stored = positions(step(cache, query(1), 30))
    for n in range(31, 50):
        info = step(cache, query(1), n)
        assert reused(info) == [True]
        assert positions(info) == stored + list(range(30, n))


def test_a_miss_selects_what_a_call_without_cache_selects() -> None:
    cache = SelectionCache()
    for n, seed in [(30, 1), (31, 2), (32, 3)]:
        info = step(cache, query(seed), n)
        assert reused(info) == [False]
        assert positions(info) == positions(step(None, query(seed), n))


def test_compared_is_the_query_of_the_last_fresh_selection() -> None:
    """Queries that drift a little at each step do not drag the comparison along."""
    start, away = query(1), query(2)
    cache = SelectionCache(theta=0.9)
    infos = [step(cache, start + 0.15 * i * away, 30 + i) for i in range(8)]
    mean_queries = [(start + 0.15 * i * away).flatten() for i in range(8)]
    last, expected = mean_queries[0], []
    for mean_query in mean_queries:
        is_like = bool(torch.cosine_similarity(mean_query, last, 0) >= 0.9)
        expected.append(is_like and bool(expected))
        last = mean_query if not expected[-1] else last
    assert reused(*infos) == expected
    assert expected[:2] == [False, True]
    assert False in expected[2:]
    assert torch.cosine_similarity(mean_queries[-1], mean_queries[-2], 0) > 0.9


def test_the_cosine_is_one_over_all_heads() -> None:
    """A head that turns round does not matter where the others outweigh it."""
    q = query(1)
    q[:, 0] *= 0.01
    turned = q.clone()
    turned[:, 0] *= -1
    cache = SelectionCache(theta=0.99)
    assert reused(step(cache, q, 30), step(cache, turned, 31)) == [False, True]


def test_the_length_of_the_query_does_not_matter() -> None:
    cache = SelectionCache(theta=0.99)
    assert reused(step(cache, query(1), 30), step(cache, 100 * query(1), 31)) == [False, True]


@pytest.mark.parametrize(("name", "bad"), [("theta", 2), ("max_reuse", 1.5)])
def test_what_is_set_later_is_checked_too(name: str, bad: float) -> None:
    cache = SelectionCache(theta=0.99, max_reuse=3)
    with pytest.raises(InvalidProblem, match=f"{name}={bad}"):
        setattr(cache, name, bad)
    assert (cache.theta, cache.max_reuse) == (0.99, 3)
    cache.theta = None
    assert reused(step(cache, query(1), 30), step(cache, query(1), 31)) == [False, False]


@pytest.mark.parametrize("max_reuse", [0, 1, 3])
def test_at_most_max_reuse_tokens_are_appended(max_reuse: int) -> None:
    cache = SelectionCache(max_reuse=max_reuse)
    infos = [step(cache, query(1), 30 + i) for i in range(2 * max_reuse + 2)]
    assert reused(*infos) == 2 * ([False] + max_reuse * [True])


def test_max_reuse_counts_tokens_not_calls() -> None:
    cache = SelectionCache(max_reuse=5)
    infos = [step(cache, query(1, Lq=3), n) for n in (30, 33, 36)]
    assert reused(*infos) == [False, True, False]


def test_theta_none_never_reuses() -> None:
    cache = SelectionCache(theta=None)
    infos = [step(cache, query(1), 30 + i) for i in range(3)]
    assert reused(*infos) == 3 * [False]
    assert (int(cache.hits), int(cache.misses)) == (0, 3)


def test_theta_minus_one_takes_any_direction() -> None:
    cache = SelectionCache(theta=-1)
    assert reused(step(cache, query(1), 30), step(cache, query(2), 31)) == [False, True]


def test_theta_one_takes_the_same_direction_only() -> None:
    ones = torch.ones_like(query(1))  # its norm and products are exact
    nudged = ones.clone()
    nudged[0, 0, 0, 0] += 0.1
    cache = SelectionCache(theta=1)
    infos = [step(cache, q, 30 + i) for i, q in enumerate([ones, ones, 2 * ones, nudged])]
    assert reused(*infos) == [False, True, True, False]


@pytest.mark.parametrize("theta", [0.9, 0.0, -1.0])
def test_a_query_without_direction_never_reuses(theta: float) -> None:
    zero = torch.zeros_like(query(1))
    cache = SelectionCache(theta=theta)
    infos = [step(cache, q, 30 + i) for i, q in enumerate([zero, zero, query(1), zero])]
    assert reused(*infos) == 4 * [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_never_reuses(bad: float) -> None:
    broken = query(1)
    broken[0, 0, 0, 0] = bad
    cache = SelectionCache(theta=-1)
    for i, q in enumerate([query(1), broken, broken, query(1)]):
        out, info = attention(
            q,
            K_CACHE[:1],
            V_CACHE[:1],
            **SMALL,
            cache_seqlens=lengths(30 + i),
            cache=cache,
            return_info=True,
        )
        assert reused(info) == [False]
    assert out.isfinite().all()


def test_a_token_written_again_makes_a_fresh_selection() -> None:
    cache = SelectionCache()
    infos = [step(cache, query(1), n) for n in (30, 30, 31, 29)]
    assert reused(*infos) == [False, False, True, False]


# --- batches ------------------------------------------------------------------------------


def test_requests_decide_for_themselves() -> None:
    cache = SelectionCache()
    first = step(cache, query(1, 2), 30, 40)
    second = step(cache, query(1, 3), 31, 41)
    assert second.reused.tolist() == [True, False]
    assert positions(second, 0) == [*positions(first, 0), 30]
    assert positions(second, 1) == positions(step(None, query(1, 3), 31, 41), 1)
    assert cache.hits.tolist() == [1, 0]
    assert cache.misses.tolist() == [1, 2]


def test_a_request_that_is_not_there_forgets_and_counts_nothing() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    absent = step(cache, query(1, 2), 31, 0)
    assert absent.reused.tolist() == [True, False]
    assert positions(absent, 1) == []
    assert step(cache, query(1, 2), 32, 41).reused.tolist() == [True, False]
    assert cache.hits.tolist() == [2, 0]
    assert cache.misses.tolist() == [1, 2]


def test_a_hit_leaves_the_retained_mass_unknown() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    info = step(cache, query(1, 3), 31, 41)
    assert info.retained_mass[0].isnan().all()
    assert info.retained_mass[1].isfinite().all()


def test_one_selection_a_group() -> None:
    cache = SelectionCache()
    first = step(cache, query(1), 30, scope="group")
    second = step(cache, query(1), 31, scope="group")
    assert reused(second) == [True]
    assert positions(first, s=0) != positions(first, s=1)
    for s in range(2):
        assert positions(second, s=s) == [*positions(first, s=s), 30]


def test_caches_know_nothing_of_one_another() -> None:
    one, other = SelectionCache(), SelectionCache()
    step(one, query(1), 30)
    assert reused(step(other, query(1), 31)) == [False]
    assert reused(step(one, query(1), 31)) == [True]


# --- forgetting ---------------------------------------------------------------------------


def test_reset_of_one_request() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    cache.reset(0)
    assert cache.misses.tolist() == [0, 1]
    assert step(cache, query(1, 2), 31, 41).reused.tolist() == [False, True]


def test_reset_of_marked_requests() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    cache.reset(torch.tensor([False, True]))
    assert step(cache, query(1, 2), 31, 41).reused.tolist() == [True, False]


def test_reset_of_everything_frees_the_geometry() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    cache.reset()
    assert reused(step(cache, query(1), 31)) == [False]
    assert reused(step(cache, query(1), 32)) == [True]


def test_reset_of_an_unused_cache_is_nothing() -> None:
    cache = SelectionCache()
    cache.reset()
    cache.reset(0)
    assert reused(step(cache, query(1), 30)) == [False]


@pytest.mark.parametrize(
    ("length", "hits"), [(29, False), (30, True), (31, True), (32, True), (40, True)]
)
def test_crop_drops_a_selection_that_saw_what_is_cut(length: int, hits: bool) -> None:
    """The selection was made at n = 30; then 31 and 32 were appended, and cut back to `length`."""
    cache = SelectionCache()
    for n in (30, 31, 32):
        step(cache, query(1), n)
    cache.crop(torch.tensor([length]))
    assert reused(step(cache, query(1), 31)) == [hits]


def test_crop_is_a_matter_of_each_request() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    cache.crop(torch.tensor([30, 39]))
    assert step(cache, query(1, 2), 31, 41).reused.tolist() == [True, False]


def test_reorder_moves_rows() -> None:
    cache = SelectionCache()
    first = step(cache, query(1, 2), 30, 40)
    cache.reorder(torch.tensor([1, 0]))
    swapped = {"k_cache": K_CACHE[[1, 0]], "v_cache": V_CACHE[[1, 0]]}
    second = step(cache, query(2, 1), 41, 31, **swapped)
    assert second.reused.tolist() == [True, True]
    assert positions(second, 0) == [*positions(first, 1), 40]
    assert positions(second, 1) == [*positions(first, 0), 30]


def test_resize_keeps_the_first_rows() -> None:
    cache = SelectionCache(theta=-1.0)
    first = step(cache, query(1, 2), 30, 40)
    cache.resize(3)
    wider = {"k_cache": K_CACHE[[0, 1, 1]], "v_cache": V_CACHE[[0, 1, 1]]}
    second = step(cache, query(1, 2, 3), 31, 41, 41, **wider)
    assert second.reused.tolist() == [True, True, False]
    assert positions(second, 1) == [*positions(first, 1), 40]
    cache.resize(1)
    assert reused(step(cache, query(1), 32)) == [True]
    assert (int(cache.hits), int(cache.misses)) == (2, 1)


def test_resize_moves_nothing_that_a_plan_uses() -> None:
    cache = SelectionCache()
    asked = problem(max_reuse=cache.max_reuse)
    cache.state(asked, stays=True)
    with pytest.raises(InvalidProblem, match="resize"):
        cache.resize(asked.B + 1)


def test_reorder_doubles_a_beam() -> None:
    cache = SelectionCache()
    first = step(cache, query(1, 2), 30, 40)
    cache.reorder(torch.tensor([1, 1], dtype=torch.int32))
    doubled = {"k_cache": K_CACHE[[1, 1]], "v_cache": V_CACHE[[1, 1]]}
    second = step(cache, query(2, 2), 41, 41, **doubled)
    assert second.reused.tolist() == [True, True]
    assert positions(second, 0) == positions(second, 1) == [*positions(first, 1), 40]


# --- capacity and state -------------------------------------------------------------------


@pytest.mark.parametrize("k", [4, 0.2])
def test_a_cache_that_grows_by_concatenation(k: int | float) -> None:
    """Lk is n at every step, at first below the capacity K; of a fraction, K grows with it."""
    cache = SelectionCache(max_reuse=8)
    stored: list[int] = []
    for n in range(3, LK + 1):
        grown = {"k_cache": K_CACHE[:, :, :n], "v_cache": V_CACHE[:, :, :n]}
        info = step(cache, query(1), n, k=k, **grown)
        assert reused(info) == [(n - 3) % 9 != 0]
        stored = [*stored, n - 1] if info.reused else positions(info)
        assert positions(info) == stored


@pytest.mark.parametrize(("max_reuse", "hits"), [(4, False), (7, False), (8, True), (64, True)])
def test_decode_after_a_prefill_chunk(max_reuse: int, hits: bool) -> None:
    """A selection of the chunk is reused where it and the new token fit the decode capacity."""
    cache = SelectionCache(max_reuse=max_reuse)
    chunk = query(1, Lq=8)
    first = step(cache, chunk, 40)
    assert len(positions(first)) == 2 + 4 + 4 + 7
    decode = step(cache, chunk.mean(2, keepdim=True), 41)
    assert reused(decode) == [hits]
    assert decode.selection.positions.shape[2] == min(2 + 4 + 4 + max_reuse, LK)
    if hits:
        assert positions(decode) == [*positions(first), 40]


@pytest.mark.parametrize("backend", sorted({"reference", "cpu", fresh.AUTO}))
def test_a_fraction_is_of_the_length_at_which_a_selection_is_made(backend: str) -> None:
    cache, given = SelectionCache(max_reuse=3), {"k": 0.1, "backend": backend}
    infos = [step(cache, query(1, 1), n, n + 20, **given) for n in range(28, 37)]
    assert reused(*infos) == [False, True, True, True, False, True, True, True, False]
    counts = [info.selection.count[:, 0].tolist() for info in infos]
    # 2 first and 4 newest; a tenth of 28 and of 48, of 32 and 52, of 36 and 56; the appended
    assert counts[::4] == [[6 + 3, 6 + 5], [6 + 4, 6 + 6], [6 + 4, 6 + 6]]
    assert counts[3] == [6 + 3 + 3, 6 + 5 + 3]


def test_a_chunk_between_decode_steps() -> None:
    cache = SelectionCache(max_reuse=12)
    q = query(1)
    chunk = q.expand(-1, -1, 6, -1)
    infos = [step(cache, x, n) for x, n in ((q, 30), (chunk, 36), (q, 37), (chunk, 43), (q, 44))]
    assert reused(*infos) == [False, True, True, False, True]
    assert positions(infos[2]) == [*positions(infos[0]), *range(30, 37)]
    assert positions(infos[4]) == [*positions(infos[3]), 43]


def test_state_stays_where_it_is() -> None:
    """Hits, misses, resets and reorders write in place: what a captured graph needs."""
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    assert cache._memory is not None
    places = [tensor.data_ptr() for tensor in cache._memory.tensors()]
    for n, seed in [(31, 1), (32, 3), (33, 3)]:
        step(cache, query(seed, 2), n, n + 10)
    cache.reset(0)
    cache.crop(torch.tensor([10, 60]))
    cache.reorder(torch.tensor([1, 0]))
    step(cache, query(1, 2), 34, 44)
    assert [tensor.data_ptr() for tensor in cache._memory.tensors()] == places


def test_what_a_call_returned_is_not_changed_by_the_next() -> None:
    cache = SelectionCache()
    infos = [step(cache, query(1), 30), step(cache, query(1), 31)]
    before = [[tensor.clone() for tensor in info.selection] for info in infos]
    step(cache, query(2), 32)
    for info, kept in zip(infos, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(info.selection, kept, strict=True))


def test_deciding_changes_nothing() -> None:
    cache = SelectionCache()
    step(cache, query(1, 2), 30, 40)
    p = problem(query(1, 3), K_CACHE, V_CACHE, cache_seqlens=lengths(31, 41), max_reuse=64)
    memory = cache.state(p)
    before = [tensor.clone() for tensor in memory.tensors()]
    for _ in range(2):
        decision = reuse_of(load("cpu")).decide_reuse(p, memory, cache.theta)
        assert decision.reused.tolist() == [True, False]
        assert decision.cache_seqlens.tolist() == [0, 41]
    assert all(map(torch.equal, memory.tensors(), before))


def test_equal_queries_are_reused_at_theta_one() -> None:
    """Their cosine is 1, whatever rounding makes of their norms."""
    for seed in range(100):
        q, k_cache, v_cache = tensors(seed=seed, Hq=4, D=64, Dv=64)
        cache = SelectionCache(theta=1)
        reused = []
        for n in (30, 31):
            _, info = attention(
                q,
                k_cache,
                v_cache,
                **SMALL,
                cache_seqlens=lengths(n, n),
                cache=cache,
                return_info=True,
            )
            reused += info.reused.tolist()
        assert reused == [False, False, True, True], seed
