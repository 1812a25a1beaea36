"""What must not change a result: where slots lie, who shares the batch, how heads are ordered."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenselect.conformance.laws.attention import rows_of, run
from tokenselect.conformance.laws.fitting import CannotRun
from tokenselect.conformance.laws.law import law
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.paging import at, by_token
from tokenselect.conformance.problems import FILL, Case, with_config
from tokenselect.conformance.tolerances import (
    Tolerance,
    attend_tolerance,
    compare_selection,
    score_tolerance,
)
from tokenselect.contract import Backend, Problem, Scores, SelectConfig


def same(backend: Backend, name: str, one: Tensor, other: Tensor) -> None:
    """Compare bit for bit, NaN and all."""
    equal = (one == other) | (one.isnan() & other.isnan())
    assert equal.all(), f"{backend.name}: {name} changed at {(~equal).nonzero()[0].tolist()}"


def near(name: str, one: Tensor, other: Tensor, tolerance: Tolerance) -> None:
    """Both within the tolerance of one truth, hence within twice of each other."""
    finding = Tolerance(one.double(), 2 * tolerance.slack).compare(name, other)
    assert finding.holds, finding


def near_scores(one: Scores, other: Scores, problem: Problem) -> None:
    """Both within the tolerance of one truth."""
    tolerance = score_tolerance(problem)
    near("votes", one.votes, other.votes, tolerance.votes)
    near("lse", one.lse, other.lse, tolerance.lse)


@law(
    cases(),
    Case(lengths=(30, 9), page_size=2),
    Case(lengths=(30, 9), page_size=53),
    layouts=("paged",),
)
def moving_pages_within_the_pool_changes_nothing(backend: Backend, case: Case) -> None:
    """Not a bit: only the block table says where a page is."""
    problem = case.problem()
    n_pages, pages = problem.k_cache.shape[0], problem.block_table
    assert pages is not None, "a law about pages"
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(n_pages, generator=generator, device="cpu")
    place = torch.empty_like(order)
    place[order] = torch.arange(n_pages, device="cpu")
    in_pool = (pages >= 0) & (pages < n_pages)
    table = torch.where(in_pool, place[pages.clamp(0, n_pages - 1).long()], pages)
    moved = replace(
        problem,
        k_cache=problem.k_cache[order],
        v_cache=problem.v_cache[order],
        block_table=table.int(),
    )
    (out, info), (moved_out, moved_info) = run(backend, problem), run(backend, moved)
    same(backend, "positions", info.selection.positions, moved_info.selection.positions)
    same(backend, "out", out, moved_out)
    same(backend, "lse", info.lse, moved_info.lse)


@law(
    cases(),
    Case(lengths=(30, 9), page_size=2),
    Case(lengths=(30,), Lq=5, page_size=64),
    layouts=("paged",),
)
def paging_changes_nothing(backend: Backend, case: Case) -> None:
    """Against the contiguous cache of the same tokens."""
    paged = replace(case, spare=0).problem()
    Lk = paged.Lk
    caches = []
    for cache in (paged.k_cache, paged.v_cache):
        whole = cache.new_full((paged.B, paged.Hkv, Lk, cache.shape[-1]), FILL[case.filler])
        for b, n in enumerate(paged.cache_seqlens.tolist()):
            whole[b, :, :n] = rows_of(paged, cache, b)
        caches.append(whole)
    flat = replace(paged, k_cache=caches[0], v_cache=caches[1], block_table=None)
    scores = backend.score(paged)
    near_scores(scores, backend.score(flat), paged)
    selection = backend.select(scores.votes, paged)
    finding = compare_selection(backend.select(scores.votes, flat), selection)
    assert finding.holds, finding
    tolerance = attend_tolerance(paged, selection)
    one, other = backend.attend(paged, selection), backend.attend(flat, selection)
    near("out", one.out, other.out, tolerance.out)
    near("lse", one.lse, other.lse, tolerance.lse)


@law(cases(), Case(lengths=(40, 0, 9), G=3))
def a_request_gets_the_same_alone(backend: Backend, case: Case) -> None:
    """Within tolerance: votes, selection and attention."""
    problem = case.problem()
    scores = backend.score(problem)
    selection = backend.select(scores.votes, problem)
    attended = backend.attend(problem, selection)
    tolerance = attend_tolerance(problem, selection)
    score_room = score_tolerance(problem)
    for b in range(problem.B):
        one = slice(b, b + 1)
        alone = replace(
            problem,
            q=problem.q[one],
            cache_seqlens=problem.cache_seqlens[one],
            k_cache=problem.k_cache if problem.is_paged else problem.k_cache[one],
            v_cache=problem.v_cache if problem.is_paged else problem.v_cache[one],
            block_table=None if problem.block_table is None else problem.block_table[one],
        )
        votes, lse = backend.score(alone)
        near("votes", scores.votes[one], votes, Tolerance(votes, score_room.votes.slack[one]))
        near("lse", scores.lse[one], lse, Tolerance(lse, score_room.lse.slack[one]))
        mine = type(selection)(*(x[one] for x in selection))
        finding = compare_selection(backend.select(scores.votes[one], alone), mine)
        assert finding.holds, finding
        out, lse = backend.attend(alone, mine)
        near("out", attended.out[one], out, Tolerance(out, tolerance.out.slack[one]))
        near("lse", attended.lse[one], lse, Tolerance(lse, tolerance.lse.slack[one]))


@law(cases(), Case(lengths=(40,), G=7, config=SelectConfig(4, 1, 2, scope="group")))
def heads_of_a_group_may_be_permuted(backend: Backend, case: Case) -> None:
    """Permute the heads of a group: the same votes; the outputs permuted likewise."""
    problem = case.problem()
    generator = torch.Generator().manual_seed(case.seed)
    orders = [
        torch.randperm(problem.G, generator=generator, device="cpu") for _ in range(problem.Hkv)
    ]
    order = torch.cat([g * problem.G + within for g, within in enumerate(orders)])
    sinks = problem.sink_logits
    permuted = replace(
        problem, q=problem.q[:, order], sink_logits=None if sinks is None else sinks[order]
    )
    scores, shuffled = backend.score(problem), backend.score(permuted)
    tolerance = score_tolerance(problem)
    near("votes", scores.votes, shuffled.votes, tolerance.votes)
    permuted_lse = Tolerance(tolerance.lse.truth[:, order], tolerance.lse.slack[:, order])
    near("lse", scores.lse[:, order], shuffled.lse, permuted_lse)
    selection = backend.select(scores.votes, problem)
    allowed = attend_tolerance(problem, selection).out
    attended, moved = backend.attend(problem, selection), backend.attend(permuted, selection)
    room = Tolerance(allowed.truth[:, order], allowed.slack[:, order])
    near("out", attended.out[:, order], moved.out, room)


@law(cases(), Case(lengths=(40,), page_size=53), Case(lengths=(40, 0), filler="inf"))
def what_lies_beyond_a_request_changes_nothing(backend: Backend, case: Case) -> None:
    """Rows past n, pages of nobody and unused table entries: not a bit, whatever they hold."""
    clean = replace(case, filler="zeros").problem()
    dirty = replace(case, filler="nan" if case.filler == "zeros" else case.filler).problem()
    (out, info), (dirty_out, dirty_info) = run(backend, clean), run(backend, dirty)
    same(backend, "positions", info.selection.positions, dirty_info.selection.positions)
    same(backend, "out", out, dirty_out)
    same(backend, "lse", info.lse, dirty_info.lse)
    same(backend, "retained_mass", info.retained_mass, dirty_info.retained_mass)


@law(cases(), Case(lengths=(40,), page_size=2), Case(lengths=(60,), Lq=5))
def unselected_values_change_nothing(backend: Backend, case: Case) -> None:
    """NaN in every value that the call does not select."""
    problem = case.problem()
    out, info = run(backend, problem)
    v_cache = problem.v_cache.clone()
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        left_out = torch.ones(n, dtype=torch.bool, device="cpu")
        kept = info.selection.positions[b].flatten()
        left_out[kept[kept >= 0].long()] = False
        by_token(problem, v_cache)[at(problem, b, left_out.nonzero()[:, 0])] = torch.nan
    again, _ = run(backend, replace(problem, v_cache=v_cache))
    same(backend, "out", out, again)


@law(
    cases(),
    Case(lengths=(40,), page_size=2),
    Case(lengths=(60,), Lq=5),
    sink_logits=(False,),
)
def a_constant_added_to_all_values_moves_the_output_by_it(backend: Backend, case: Case) -> None:
    """Weights add up to one."""
    problem = replace(case, filler="zeros").problem()
    constant = 4.0
    shifted = replace(problem, v_cache=problem.v_cache + constant)
    (out, info), (shifted_out, _) = run(backend, problem), run(backend, shifted)
    one, other = (
        attend_tolerance(problem, info.selection),
        attend_tolerance(shifted, info.selection),
    )
    # Adding the constant rounds each value once, in the cache's own dtype.
    largest = shifted.v_cache.double().abs().amax()
    room = one.out.slack + other.out.slack + torch.finfo(out.dtype).eps * largest
    moved = torch.where(problem.cache_seqlens[:, None, None, None] > 0, out.double() + constant, 0)
    finding = Tolerance(moved, room).compare("out", shifted_out)
    assert finding.holds, finding


@law(
    cases(dtype=torch.float64, content="normal"),
    Case(
        lengths=(50,),
        rope="rotated",
        dtype=torch.float64,
        rope_scaling=1.3,
        Lq=5,
        D=16,
        config=SelectConfig(5, 2, 3, positions="contiguous", score_at="split"),
    ),
    ropes=("raw",),
    dtypes=(torch.float64, torch.float32),
)
def keys_may_be_cached_rotated_or_raw(backend: Backend, case: Case) -> None:
    """Raw queries and keys, against the same rotated at their true positions beforehand."""
    raw = case.problem()
    rope, n = raw.rope, raw.cache_seqlens
    assert rope is not None, "a law about raw keys"
    new = torch.arange(-raw.Lq, 0, device="cpu") + n[:, None]
    k_cache = raw.k_cache.clone()
    for b in range(raw.B):
        places = torch.arange(int(n[b]), device="cpu")
        turned = rope.reposition(rows_of(raw, raw.k_cache, b), places, places)
        by_token(raw, k_cache)[at(raw, b, places)] = turned.transpose(0, 1)
    rotated = replace(
        raw,
        k_cache=k_cache,
        q=rope.reposition(raw.q, new[:, None], new[:, None]),
        rope=replace(rope, cached="rotated"),
    )
    one, other = backend.score(raw), backend.score(rotated)
    selection = backend.select(one.votes, raw)
    attended, moved = backend.attend(raw, selection), backend.attend(rotated, selection)
    if raw.q.dtype == torch.float64:
        assert torch.allclose(one.votes, other.votes, rtol=1e-5, atol=1e-7), "votes differ"
        assert torch.allclose(one.lse, other.lse, rtol=1e-5, atol=1e-6), "lse differs"
        assert torch.allclose(attended.out, moved.out, rtol=1e-9, atol=1e-9), "out differs"
        return
    # Rotating in float32 beforehand is two of the roundings that the tolerance has for a rotation.
    tolerance, room = score_tolerance(raw), 1.5
    near(
        "votes",
        one.votes,
        other.votes,
        tolerance.votes._replace(slack=room * tolerance.votes.slack),
    )
    near("lse", one.lse, other.lse, tolerance.lse._replace(slack=room * tolerance.lse.slack))
    allowed = attend_tolerance(raw, selection).out
    near("out", attended.out, moved.out, allowed._replace(slack=room * allowed.slack))


@law(
    cases(),
    Case(lengths=(9,), rope="raw", config=SelectConfig.extrapolate(k=4)),
    ropes=("rotated", "raw"),
)
def what_fits_is_not_moved(backend: Backend, case: Case) -> None:
    """Contiguous positions of a selection of everything are the original ones."""
    problem = case.problem()
    original = with_config(problem, positions="original", k=problem.Lk)
    contiguous = with_config(problem, positions="contiguous", k=problem.Lk)
    (out, info), (moved, _) = run(backend, original), run(backend, contiguous)
    near("out", out, moved, attend_tolerance(original, info.selection).out)


@law(
    st.sampled_from(
        [
            Case(lengths=(66, 0, 40), Hkv=1, G=3),
            Case(lengths=(90,), Hkv=1, Lq=5, content="equal", page_size=16),
            Case(
                lengths=(70, 40),
                dtype=torch.bfloat16,
                rope="rotated",
                config=SelectConfig.extrapolate(k=20, n_sink=2, n_local=4, scope="group"),
            ),
        ]
    )
)
def it_repeats_twenty_times_bit_for_bit(backend: Backend, case: Case) -> None:
    """Few problems, often: what depends on which of two writes comes first shows now and then."""
    if not backend.capability.deterministic:
        raise CannotRun("deterministic")
    problem = case.problem()
    scores = backend.score(problem)
    selection = backend.select(scores.votes, problem)
    attended = backend.attend(problem, selection)
    for _ in range(19):
        again = backend.score(problem)
        same(backend, "votes", scores.votes, again.votes)
        same(backend, "lse of scores", scores.lse, again.lse)
        repeated = backend.select(scores.votes, problem)
        same(backend, "positions", selection.positions, repeated.positions)
        same(backend, "count", selection.count, repeated.count)
        out, lse = backend.attend(problem, selection)
        same(backend, "out", attended.out, out)
        same(backend, "lse", attended.lse, lse)


@law(cases(), Case(lengths=(60,), content="equal", Lq=5), Case(lengths=(60, 9), page_size=2))
def what_is_declared_deterministic_repeats_bit_for_bit(backend: Backend, case: Case) -> None:
    """Call twice; the results are bit-identical."""
    if not backend.capability.deterministic:
        raise CannotRun("deterministic")
    problem = case.problem()
    (out, info), (again, repeated) = run(backend, problem), run(backend, problem)
    same(backend, "positions", info.selection.positions, repeated.selection.positions)
    same(backend, "out", out, again)
    same(backend, "lse", info.lse, repeated.lse)
