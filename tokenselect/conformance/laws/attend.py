"""Stage 3: attention over any selection is within its tolerance, row by row."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from tokenselect.conformance.laws.law import law
from tokenselect.conformance.laws.strategies import chosen
from tokenselect.conformance.paging import at, by_token, overwrite_unselected
from tokenselect.conformance.problems import FAR, FILL, Case, Chosen
from tokenselect.conformance.tolerances import attend_tolerance
from tokenselect.contract import Backend, Problem, SelectConfig, Selection

ATTENDED = (
    Chosen(Case(lengths=(0, 30)), 0.5, 0),
    Chosen(Case(lengths=(40,)), 0.0, 0),
    Chosen(Case(lengths=(40,), has_sink_logits=True, softcap=2.0, G=3), 0.5, 2),
    Chosen(
        Case(
            lengths=(60, 9),
            rope="raw",
            D=16,
            rotary_dim=16,
            interleaved=True,
            rope_scaling=1.3,
            has_sink_logits=True,
            page_size=2,
            config=SelectConfig(5, 2, 3, positions="contiguous", scope="group"),
        ),
        0.3,
        1,
    ),
    # More rows of queries than a kernel takes at once.
    Chosen(Case(lengths=(130, 90), Hkv=1, G=7, Lq=80, filler="inf"), 0.3, 0),
    Chosen(
        Case(
            lengths=(330, 0, 90),
            G=3,
            Lq=45,
            D=40,
            Dv=72,
            dtype=torch.bfloat16,
            has_sink_logits=True,
            config=SelectConfig(300, 2, 4, scope="group"),
        ),
        0.9,
        0,
    ),
    Chosen(Case(lengths=(40,), Lq=5, filler="nan", page_size=2), 0.5, 1),
    Chosen(
        Case(lengths=(40,), content="needles", dtype=torch.bfloat16, has_sink_logits=True), 1, 1
    ),
    # Fewer selected than there are queries: the first ones are attended before position 0.
    Chosen(
        Case(lengths=(40,), Lq=5, rope="raw", config=SelectConfig(5, 2, 3, positions="contiguous")),
        0.1,
        3,
    ),
    Chosen(Case(lengths=(40,), softcap=1e5), 0.5, 1),
    Chosen(
        Case(
            lengths=(60, 9),
            Lq=2,
            rope="rotated",
            config=SelectConfig(5, 2, 3, positions="contiguous"),
        ),
        0.3,
        2,
    ),
)


@law(chosen(), *ATTENDED)
def out_and_lse_are_within_tolerance(backend: Backend, drawn: Chosen) -> None:
    """Hold attention over any selection to its tolerance."""
    problem, selection = drawn.make()
    finding = attend_tolerance(problem, selection).compare(backend.attend(problem, selection))
    assert finding.holds, finding


@law(chosen(), *ATTENDED)
def rows_that_are_not_selected_have_no_influence(backend: Backend, drawn: Chosen) -> None:
    """Keys and values, with NaN or inf in them or without: not a bit changes."""
    problem, selection = drawn.make()
    if problem.S > 1:  # one list for all heads, so that a row is selected or not
        first = [x[:, :1].expand_as(x).contiguous() for x in selection]
        selection = Selection(*first)
    clean = backend.attend(problem, selection)
    k_cache, v_cache = problem.k_cache.clone(), problem.v_cache.clone()
    overwrite_unselected(problem, k_cache, selection, FILL["nan"])
    overwrite_unselected(problem, v_cache, selection, FILL["inf"])
    poisoned = backend.attend(replace(problem, k_cache=k_cache, v_cache=v_cache), selection)
    for name, before, after in zip(("out", "lse"), clean, poisoned, strict=True):
        assert torch.equal(before.nan_to_num(0), after.nan_to_num(0)), f"{name} changed"
        assert torch.equal(before.isnan(), after.isnan()), f"{name}: NaN came or went"


@law(
    chosen(Lq=3),
    Chosen(Case(lengths=(40, 7), Lq=5), 1.0, 0),
    Chosen(Case(lengths=(40,), Lq=2, page_size=2, G=3), 1.0, 1),
    Chosen(Case(lengths=(40,), Lq=20, dtype=torch.bfloat16), 1.0, 0),
    query_lengths=range(2, 2**31),
)
def the_newest_value_leaves_earlier_queries_as_they_were(backend: Backend, drawn: Chosen) -> None:
    """NaN and inf in the newest token's value leave the call's earlier queries as they were."""
    problem, selection = drawn.make()
    v_cache = problem.v_cache.clone()
    newest = torch.full((problem.Dv,), torch.nan, dtype=v_cache.dtype, device="cpu")
    newest[0] = torch.inf
    for b, n in enumerate(problem.cache_seqlens):
        if n > 0:
            by_token(problem, v_cache)[at(problem, b, n[None] - 1)] = newest
    spoiled = backend.attend(replace(problem, v_cache=v_cache), selection)
    tolerance = attend_tolerance(problem, selection).out
    finding = tolerance.compare("out", replace_rows(tolerance.truth, spoiled.out.double()))
    assert finding.holds, finding


def replace_rows(truth: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """`got`, but for the last query, whose row is taken from `truth`."""
    return torch.cat((got[:, :, :-1], truth[:, :, -1:]), dim=2)


# Infinite keys that are moved are no longer infinite, nor are logits that are capped.
UNMOVED_AND_UNCAPPED = {"ropes": ("none",), "softcaps": (False,)}


@law(
    chosen(),
    Chosen(Case(lengths=(1, 30)), 1.0, 0),
    Chosen(Case(lengths=(30,), G=7), 1.0, 0),
    **UNMOVED_AND_UNCAPPED,
)
def logits_that_are_all_minus_infinity_give_what_dense_attention_gives(
    backend: Backend, drawn: Chosen
) -> None:
    """NaN: such a query sees tokens, and none of them has any weight. With a sink: zeros."""
    problem, selection = drawn.make()
    filled = replace(
        problem,
        q=torch.ones_like(problem.q),
        k_cache=torch.full_like(problem.k_cache, -torch.inf),
    )
    finding = attend_tolerance(filled, selection).compare(backend.attend(filled, selection))
    assert finding.holds, finding


def first(problem: Problem, count: int) -> Selection:
    """So many positions from 0 on, for each request."""
    places = torch.arange(problem.K, dtype=torch.int32, device="cpu")
    shape = (problem.B, problem.S)
    positions = torch.where(places < count, places, -1).expand(*shape, -1).contiguous()
    return Selection(positions, torch.full(shape, count, dtype=torch.int32, device="cpu"))


@law(
    st.just(Case(lengths=(20,), Hkv=6, G=3, has_sink_logits=True)),
    **UNMOVED_AND_UNCAPPED,
    sink_logits=(True,),
)
def a_sink_takes_all_where_no_logit_is_finite(backend: Backend, case: Case) -> None:
    """However small, or large, its own logit: zeros."""
    problem = case.problem()
    problem.k_cache.fill_(-torch.inf)
    problem.q.fill_(1)
    sinks = torch.tensor([-105.0, -3e38, 0.0, 3e38, -1e4, 105.0], device="cpu").repeat(problem.G)
    problem = replace(problem, sink_logits=sinks)
    out = backend.attend(problem, first(problem, 9)).out
    assert (out == 0).all(), f"{out[out != 0][0]} beside a sink that takes all"


@law(st.just(Case(lengths=(12,), Hkv=1, G=1, Lq=2, D=8, Dv=3)), **UNMOVED_AND_UNCAPPED)
def an_infinite_value_of_weight_zero_is_not_a_number(backend: Backend, case: Case) -> None:
    """As in dense attention: 0 * inf, for a value that is selected and seen."""
    problem = case.problem()
    problem.q[:] = 20
    keys, values = by_token(problem, problem.k_cache), by_token(problem, problem.v_cache)
    keys[at(problem, 0, torch.arange(12, device="cpu"))] = 1
    keys[at(problem, 0, torch.arange(3, device="cpu"))] = -100
    values[at(problem, 0, torch.arange(1, device="cpu"))] = torch.inf
    selection = first(problem, 12)
    attended = backend.attend(problem, selection)
    finding = attend_tolerance(problem, selection).compare(attended)
    assert finding.holds, finding
    assert attended.out.isnan().all(), "0 * inf is NaN"


@law(
    st.builds(
        Chosen,
        st.sampled_from(
            [
                replace(FAR, rope="rotated", config=replace(FAR.config, positions="contiguous")),
                replace(FAR, rope="raw", rotary_dim=32),
            ]
        ),
        st.sampled_from([0.5, 14 / 2**16]),  # of the newest, and of all
        st.just(0),
    ),
    ropes=("rotated", "raw"),
)
def keys_far_out_are_attended_to_exactly(backend: Backend, drawn: Chosen) -> None:
    """Move keys to the front, or rotate raw ones where they are: exact far out, as in scoring."""
    problem, selection = drawn.make()
    finding = attend_tolerance(problem, selection).compare(backend.attend(problem, selection))
    assert finding.holds, finding
