"""The whole: dense attention as k grows, the best set of candidates, the mass that is retained."""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect import api
from tokenselect.api import AttentionInfo
from tokenselect.conformance.devices import back, device_of, on
from tokenselect.conformance.laws.law import able, law, only_read
from tokenselect.conformance.laws.score import check_fused_lse
from tokenselect.conformance.laws.strategies import cases
from tokenselect.conformance.paging import at, by_token
from tokenselect.conformance.problems import Case, with_config
from tokenselect.conformance.tolerances import (
    Tolerance,
    attend_tolerance,
    choice_finding,
    compare_selection,
    exact,
    score_tolerance,
)
from tokenselect.contract import Backend, Problem, SelectConfig, Selection
from tokenselect.dispatch import ops
from tokenselect.dispatch.registry import load
from tokenselect.selection_cache import SelectionCache

EVERYTHING = 10_000


def run(
    backend: Backend, problem: Problem, cache: SelectionCache | None = None
) -> tuple[Tensor, AttentionInfo]:
    """Run the whole call where the backend runs, with as much room as the cache asks for.

    Raises CannotRun if the problem is beyond what the backend declares.
    """
    registered = load(backend.name)
    problem = replace(problem, max_reuse=0 if cache is None else cache.max_reuse)
    problem = able(registered, on(device_of(registered), problem))
    with only_read(problem):
        out, info = api.run(problem, backend.name, cache=cache, return_info=True)
    expected = ops.fake_step(problem)
    for name, got, like in zip(
        ("out", "lse", "positions", "count"),
        (out, info.lse, *info.selection),
        expected,
        strict=False,
    ):
        came, due = (got.shape, got.dtype, got.device), (like.shape, like.dtype, like.device)
        assert came == due, f"{name} is {came}; due is {due}"
    lse, mass, reused = back(info.lse, info.retained_mass, info.reused)
    selection = Selection(*back(*info.selection))
    return out.cpu(), AttentionInfo(lse, selection, mass, reused, info.backend)


def everything(problem: Problem) -> Selection:
    """Every position of every request."""
    places = torch.arange(problem.Lk, dtype=torch.int32, device="cpu")
    n = problem.cache_seqlens
    positions = torch.where(places < n[:, None], places, -1)
    shape = (problem.B, problem.S)
    return Selection(
        positions[:, None].expand(*shape, -1).contiguous(), n[:, None].expand(shape).contiguous()
    )


def rows_of(problem: Problem, cache: Tensor, b: int) -> Tensor:
    """Return the first n rows of request b: (Hkv, n, width)."""
    positions = torch.arange(int(problem.cache_seqlens[b]), device="cpu")
    return by_token(problem, cache)[at(problem, b, positions)].transpose(0, 1)


def in_place(problem: Problem, b: int) -> tuple[Tensor, Tensor]:
    """Return queries (Hq, Lq, D) and keys (Hq, n, D) of request b, float64, rotated."""
    truth, n = exact(problem), int(problem.cache_seqlens[b])
    q, keys = truth.q[b], rows_of(truth, truth.k_cache, b).repeat_interleave(problem.G, 0)
    if problem.rope is not None and problem.rope.cached == "raw":
        positions = torch.arange(n, device="cpu")
        keys = problem.rope.reposition(keys, positions, positions)
        q = problem.rope.reposition(q, positions[-problem.Lq :], positions[-problem.Lq :])
    return q, keys


def torch_dense(problem: Problem) -> Tensor:
    """Dense attention by torch: scaled_dot_product_attention, in float64, request by request.

    Softcap and sink logits are what it lacks: for them the same formula by hand.
    """
    out = torch.zeros((*problem.q.shape[:3], problem.Dv), dtype=torch.float64, device="cpu")
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        q, k = in_place(problem, b)
        v = rows_of(problem, problem.v_cache, b).double().repeat_interleave(problem.G, 0)
        mask = torch.ones(problem.Lq, n, dtype=torch.bool, device="cpu").tril(n - problem.Lq)
        if problem.softcap is None and problem.sink_logits is None:
            out[b] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale)
            continue
        logits = problem.scale * (q @ k.transpose(1, 2))
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        logits = logits.masked_fill(~mask, -math.inf)
        if problem.sink_logits is not None:
            sinks = problem.sink_logits.double()[:, None, None].expand(-1, problem.Lq, 1)
            logits, v = torch.cat((logits, sinks), 2), F.pad(v, (0, 0, 0, 1))
        out[b] = torch.softmax(logits, -1) @ v
    return out


@law(
    cases(config={"k": EVERYTHING}, dtype=torch.float64),
    *(
        Case(
            lengths=(90, 7),
            Lq=Lq,
            page_size=size,
            strides=strides,  # type: ignore[arg-type]
            Dv=6,
            dtype=torch.float64,
            config=SelectConfig(EVERYTHING, 2, 3, vote=vote, scope=scope),  # type: ignore[arg-type]
        )
        for Lq, size, strides, vote, scope in [
            (1, None, "plain", "soft", "layer"),
            (5, None, "token-major", "logit", "group"),
            (1, 53, "plain", "hard", "layer"),
            (5, 1, "reversed dims", "soft", "group"),
        ]
    ),
)
def with_every_candidate_it_is_dense_attention(backend: Backend, case: Case) -> None:
    """Whatever the layout, strides, lengths, votes and scope. To 1e-12 in float64."""
    problem = case.problem()
    out, info = run(backend, problem)
    dense = torch_dense(problem)
    if problem.q.dtype == torch.float64:
        slack = (1e-12 * dense.abs().amax().clamp(min=1)).expand_as(dense)
    else:
        slack = attend_tolerance(problem, everything(problem)).out.slack
    finding = Tolerance(dense, slack).compare("out", out)
    assert finding.holds, finding
    count = info.selection.count
    assert (count == problem.cache_seqlens[:, None]).all(), f"{count.tolist()} selected of all"


@law(
    cases(config={"k": EVERYTHING}),
    Case(
        lengths=(60,),
        rope="rotated",
        rope_scaling=1.3,
        config=SelectConfig.extrapolate(k=EVERYTHING, n_sink=2, n_local=3),
    ),
)
def with_every_candidate_it_is_dense_attention_in_every_dtype(backend: Backend, case: Case) -> None:
    """Positions and scoring of any kind: where everything is selected, nothing moves."""
    problem = case.problem()
    out, info = run(backend, problem)
    truth = with_config(problem, positions="original", score_at="true", scope="layer")
    tolerance = attend_tolerance(truth, everything(truth))
    finding = tolerance.out.compare("out", out)
    assert finding.holds, finding
    finding = tolerance.lse.compare("lse", info.lse)
    assert finding.holds, finding
    off = (tolerance.out.truth - torch_dense(problem)).abs().max()
    assert torch.allclose(tolerance.out.truth, torch_dense(problem), rtol=1e-12, atol=1e-12), (
        f"the tolerance's truth is {off} off"
    )


@law(
    cases(),
    Case(lengths=(90, 0), config=SelectConfig(5, 2, 3, pool=3), content="integers"),
    Case(lengths=(90,), rope="rotated", config=SelectConfig(5, 2, 3, score_at="split")),
    Case(lengths=(90, 80), Lq=5, page_size=2, config=SelectConfig(5, 2, 3, n_query_means=2)),
)
def it_chooses_what_the_votes_allow_and_attends_to_that(backend: Backend, case: Case) -> None:
    """Hold the whole call to a choice that votes within tolerance could have made."""
    problem = replace(case, max_reuse=0).problem()
    out, info = run(backend, problem)
    assert info.backend == backend.name, f"{info.backend} ran"
    assert not info.reused.any(), "a selection is reused without a cache"
    finding = choice_finding(problem, info.selection, score_tolerance(problem).votes)
    assert finding.holds, finding
    tolerance = attend_tolerance(problem, info.selection)
    finding = max(tolerance.out.compare("out", out), tolerance.lse.compare("lse", info.lse))
    assert finding.holds, finding


@law(
    cases(),
    Case(lengths=(90, 0), content="equal", config=SelectConfig(5, 2, 3)),
    Case(lengths=(90,), Lq=5, content="equal", config=SelectConfig(5, 2, 3, scope="group")),
)
def a_call_is_its_stages_in_turn(backend: Backend, case: Case) -> None:
    """Select the same, ties and all, where one function computes all stages: `attend_fresh`."""
    problem = replace(case, max_reuse=0).problem()
    _, info = run(backend, problem)
    votes, _ = backend.score(problem)
    selection = backend.select(votes, problem)
    if load(backend.name).capability.deterministic:
        finding = compare_selection(info.selection, selection)
        assert finding.holds, finding
    check_fused_lse(backend, problem, votes)


def true_mass(problem: Problem, selection: Selection) -> Tensor:
    """Share of the dense softmax on the selection, head by head, in float64: (B, Hq). Lq = 1."""
    mass = torch.full((problem.B, problem.Hq), math.nan, dtype=torch.float64, device="cpu")
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        p = dense_weights(problem, b)
        for h in range(problem.Hq):
            s = h // problem.G if problem.S > 1 else 0
            kept = selection.positions[b, s][: int(selection.count[b, s])].long()
            mass[b, h] = p[h, kept].sum()
    return mass


def dense_weights(problem: Problem, b: int) -> Tensor:
    """Return the dense softmax (Hq, n) of the one query of request b."""
    q, keys = in_place(problem, b)
    logits = problem.scale * torch.einsum("hd,hnd->hn", q[:, 0], keys)
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return torch.softmax(logits, -1)


@law(
    cases(Lq=1),
    Case(lengths=(60, 0, 3)),
    Case(
        lengths=(60,),
        softcap=2.0,
        has_sink_logits=True,
        config=SelectConfig(4, 1, 2, scope="group"),
    ),
    Case(lengths=(60,), config=SelectConfig(4, 1, 2, select_scale=1.0)),
    Case(lengths=(60,), rope="rotated", config=SelectConfig(4, 1, 2, positions="contiguous")),
    Case(lengths=(60,), rope="rotated", config=SelectConfig(4, 1, 2, score_at="fixed")),
    Case(lengths=(60,), rope="raw", config=SelectConfig(4, 1, 2, score_at="split")),
    query_lengths=(1,),
)
def retained_mass_is_the_one_computed_densely(backend: Backend, case: Case) -> None:
    """Or NaN, where the two lse at hand are not of the same logits."""
    problem = replace(case, max_reuse=0).problem()
    _, info = run(backend, problem)
    c = problem.config
    is_known = (
        c.positions == "original"
        and c.score_at in ("true", "split")
        and c.select_scale in (None, problem.scale)
    )
    if not is_known:
        assert info.retained_mass.isnan().all(), "a mass of two kinds of logits"
        return
    truth = true_mass(problem, info.selection)
    slack = score_tolerance(problem).lse.slack
    slack = slack + attend_tolerance(problem, info.selection).lse.slack[:, :, 0]
    finding = Tolerance(truth, truth * torch.expm1(slack) + 1e-6).compare(
        "mass", info.retained_mass
    )
    assert finding.holds, finding
    assert not (info.retained_mass > 1).any(), f"a mass of {info.retained_mass.max()}"


@law(
    cases(Lq=1, config={"select_scale": None}),
    query_lengths=(1,),
    sink_logits=(False,),
    positions=("original",),
)
def what_is_left_out_bounds_the_error(backend: Backend, case: Case) -> None:
    """|out - dense| <= 2 (1 - mass) max |v|, head by head."""
    problem = case.problem()
    out, info = run(backend, problem)
    mass = true_mass(problem, info.selection).nan_to_num(1.0)
    largest = torch.stack(
        [
            rows_of(problem, problem.v_cache, b).double().abs().flatten(1).amax(1)
            if n > 0
            else torch.zeros(problem.Hkv, dtype=torch.float64, device="cpu")
            for b, n in enumerate(problem.cache_seqlens.tolist())
        ]
    ).repeat_interleave(problem.G, 1)
    bound = (2 * (1 - mass) * largest)[:, :, None, None]
    rounding = attend_tolerance(problem, info.selection).out.slack
    error = (out.double() - torch_dense(problem)).abs()
    beyond = error - (bound + rounding + 1e-9)
    assert (beyond <= 0).all(), f"an error of {beyond.max()} more than is left out"


# One query's votes are the mass of a token: summed over the heads of a selection.
VOTES_ARE_MASS = {
    "query_lengths": (1,),
    "votes": ("soft",),
    "normalizes": ("visible",),
    "pools": (1,),
    "score_ats": ("true",),
}


@law(
    cases(
        Lq=1,
        config={"k": 3, "n_sink": 1, "n_local": 2, "select_scale": None},
        dtype=torch.float64,
    ),
    Case(lengths=(12,), G=7, dtype=torch.float64, config=SelectConfig(3, 1, 2)),
    Case(lengths=(12,), G=3, dtype=torch.float64, config=SelectConfig(3, 1, 2, scope="group")),
    **VOTES_ARE_MASS,
)
def no_other_set_of_k_candidates_retains_more_mass(backend: Backend, case: Case) -> None:
    """Sum over the heads of a selection; compare with every set of as many candidates."""
    problem = replace(case, lengths=tuple(min(n, 12) for n in case.lengths)).problem()
    _, info = run(backend, problem)
    slack = score_tolerance(problem).votes.slack
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        masses = dense_weights(problem, b).unflatten(0, (problem.S, -1)).sum(1)
        candidates = range(*problem.config.regions(n, 1))
        for s, p in enumerate(masses):
            best = max(
                float(p[list(group)].sum())
                for group in itertools.combinations(candidates, min(3, len(candidates)))
            )
            kept = [j for j in info.selection.positions[b, s].tolist() if j in candidates]
            room = float(slack[b].sum()) + 1e-9
            assert float(p[kept].sum()) >= best - room, f"{kept} of request {b} is not the best"


@law(
    cases(Lq=1, config={"select_scale": None}),
    Case(lengths=(90,), content="needles"),
    **VOTES_ARE_MASS,
)
def retained_mass_never_falls_as_k_grows(backend: Backend, case: Case) -> None:
    """Retain all of the mass where all is selected."""
    problem = case.problem()
    slack = score_tolerance(problem)
    before = torch.zeros(problem.B, dtype=torch.float64, device="cpu")
    for k in (0, 1, 2, 4, 8, 16, 64, EVERYTHING):
        grown = with_config(problem, k=k)
        _, info = run(backend, grown)
        mass = true_mass(grown, info.selection).sum(1).nan_to_num(0.0)
        room = 2 * slack.votes.slack.flatten(1).sum(1) + 1e-9
        assert (mass >= before - room).all(), f"k={k}: {mass} after {before}"
        before = mass
    present = problem.cache_seqlens > 0
    whole = torch.tensor(float(problem.Hq), dtype=torch.float64, device="cpu")
    assert torch.allclose(mass[present], whole), f"{mass} of {whole} where all is selected"
