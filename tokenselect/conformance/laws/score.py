"""Stage 1: votes and lse are within their tolerance of the reference in float64."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenselect.conformance.devices import back, device_of, on
from tokenselect.conformance.laws.fitting import CannotRun
from tokenselect.conformance.laws.law import law
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.problems import FAR, Case
from tokenselect.conformance.tolerances import score_tolerance
from tokenselect.contract import Backend, Problem, Scores, SelectConfig
from tokenselect.dispatch.registry import load


@law(
    cases(),
    Case(lengths=(0,)),
    Case(lengths=(60,), config=SelectConfig(k=5, n_sink=2, n_local=4, vote="hard")),
    Case(lengths=(0, 40, 3), config=SelectConfig(k=4, n_sink=8, n_local=2)),
    Case(content="needles", config=SelectConfig(k=4, n_sink=1, n_local=2, select_scale=1.0)),
    Case(content="needles", dtype=torch.bfloat16, G=7),
    Case(lengths=(60,), softcap=1e5),
    Case(lengths=(60,), Lq=5, rope="rotated", D=16, config=SelectConfig(3, 1, 2, score_at="split")),
    Case(lengths=(60,), softcap=2.0, strides="sliced", page_size=53, filler="inf"),
    # More voters, and more queries, than a kernel takes at once.
    Case(lengths=(70, 41), Hkv=1, G=32, Lq=40, config=SelectConfig(5, 2, 3, n_query_means=3)),
    # Several tiles and segments of a kernel.
    Case(lengths=(150, 129), content="ascending", config=SelectConfig(5, 2, 3, pool=3)),
    Case(lengths=(150, 129), rope="rotated", config=SelectConfig(5, 2, 3, score_at="fixed")),
    Case(
        lengths=(60, 30),
        Lq=5,
        rope="raw",
        D=16,
        rotary_dim=16,
        interleaved=True,
        rope_scaling=1.3,
        config=SelectConfig(5, 2, 3, n_query_means=2, pool=3),
    ),
)
def votes_and_lse_are_within_tolerance(backend: Backend, case: Case) -> None:
    """Each vote and each lse; votes are never NaN."""
    problem = case.problem()
    scores = backend.score(problem)
    assert not scores.votes.isnan().any(), "votes are never NaN"
    finding = score_tolerance(problem).compare(scores)
    assert finding.holds, finding


_OF_ONE_HEAD = {"vote": "logit", "scope": "group", "pool": 1, "n_query_means": 1}


@law(
    cases(config=_OF_ONE_HEAD, content="few keys", G=1, rope=None),
    *(
        Case(
            lengths=(150, 129),
            G=1,
            D=D,
            content="few keys",
            softcap=softcap,
            config=SelectConfig(5, 0, 1, vote="logit", scope="group"),
        )
        for D, softcap in ((8, None), (80, 2.0))
    ),
)
def equal_keys_have_equal_logits_where_that_is_declared(backend: Backend, case: Case) -> None:
    """Of a head, for keys that are scored as they lie; what a sharded cache's bits rest on."""
    if not load(backend.name).capability.equal_keys:
        raise CannotRun("equal_keys")
    problem = case.problem()
    votes = backend.score(problem).votes
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        start, stop = problem.config.regions(n, problem.Lq)
        for kind in range(7):
            logits = votes[b, :, :, start:stop][..., (kind - start) % 7 :: 7]
            assert (logits == logits[..., :1]).all(), f"request {b}, keys {kind}: {logits}"


@law(
    cases(config={"vote": "soft"}, filler="nan"),
    Case(lengths=(50, 30), softcap=2.0, rope="rotated", D=16),
    # Everything is selected: attention has an lse too, but one with such keys.
    Case(lengths=(50, 30), config=SelectConfig(100, 2, 3)),
    Case(lengths=(50, 30), softcap=2.0, config=SelectConfig(100, 2, 3), seed=1),
)
def a_key_that_is_not_finite_gets_no_votes(backend: Backend, case: Case) -> None:
    """Inside a request too: such a key counts as -inf, and spoils no other candidate's votes."""
    problem = case.problem()
    if problem.is_paged:
        problem.k_cache[::3, 0] = torch.nan
    else:
        problem.k_cache[:, :, 5::11, 0] = torch.inf
        if case.seed % 4 != 1:  # else no logit is NaN, and a softcap could make all of them finite
            problem.k_cache[:, :, 3::7] = torch.nan
    scores = backend.score(problem)
    assert not scores.votes.isnan().any(), "votes are never NaN"
    finding = score_tolerance(problem).compare(scores)
    assert finding.holds, finding
    check_fused_lse(backend, problem, scores.votes)


def check_fused_lse(backend: Backend, problem: Problem, votes: Tensor) -> None:
    """Hold the lse of a fused step, if the backend has one, to that of the score stage."""
    registered = load(backend.name)
    if registered.attend_fresh is not None:
        _, _, lse = registered.attend_fresh(on(device_of(registered), problem))
        finding = score_tolerance(problem).compare(Scores(votes, *back(lse)))
        assert finding.holds, finding


NEARER = replace(FAR, lengths=(2**13,))  # all of them are scored, and fewer show it


@law(
    st.sampled_from(
        [
            replace(NEARER, rope="rotated", config=replace(NEARER.config, score_at="fixed")),
            replace(NEARER, rope="raw", rotary_dim=32),
        ]
    ),
    ropes=("rotated", "raw"),
)
def keys_far_out_are_moved_exactly(backend: Backend, case: Case) -> None:
    """Score keys far out, where a float32 angle is off: angles are float64, or tables exact."""
    problem = case.problem()
    finding = score_tolerance(problem).compare(backend.score(problem))
    assert finding.holds, finding
