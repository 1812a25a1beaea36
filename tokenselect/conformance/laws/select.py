"""Stage 2: select is bit-exact, ties and all, against sorting in plain Python."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from tokenselect.conformance.laws.law import law
from tokenselect.conformance.laws.strategies import ballots
from tokenselect.conformance.problems import Ballots, Case
from tokenselect.conformance.tolerances import compare_selection
from tokenselect.contract import Backend, Problem, SelectConfig, Selection


def sorted_selection(votes: Tensor, problem: Problem) -> Selection:
    """Select by Python's sort: an oracle that shares no line with a backend."""
    positions, counts = [], []
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        c = problem.config
        window = [j for j in range(n) if j > n - problem.Lq - c.n_local]
        sink = [j for j in range(n) if j < c.n_sink and j not in window]
        candidates = [j for j in range(n) if j not in window and j not in sink]
        for s in range(problem.S):
            chosen: list[int] = []
            k = c.k
            if isinstance(k, float):
                k = max(c.k_min, math.ceil(Fraction(f"{k:.6f}") * n))
                k = k if c.k_max is None else min(c.k_max, k)
            shares = [k]
            if c.score_at == "split":
                fixed = math.ceil(Fraction(f"{c.fixed_share:.6f}") * k)
                shares = [fixed, k - fixed]
            for ballot, share in enumerate(shares):
                row = [-math.inf if math.isnan(x) else x for x in votes[b, ballot, s].tolist()]
                free = sorted(set(candidates).difference(chosen))
                chosen += sorted(free, key=lambda j: (-row[j], j))[:share]
            selected = sorted([*sink, *chosen, *window])
            positions.append(selected + [-1] * (problem.K - len(selected)))
            counts.append(len(selected))
    shape = (problem.B, problem.S)
    return Selection(
        torch.tensor(positions, dtype=torch.int32, device="cpu").view(*shape, problem.K),
        torch.tensor(counts, dtype=torch.int32, device="cpu").view(shape),
    )


@law(
    ballots(),
    Ballots(Case(lengths=(0, 30)), "all equal", 0),
    Ballots(Case(lengths=(60,)), "signed zeros", 1),
    Ballots(Case(lengths=(60,)), "infinite", 1),
    Ballots(
        Case(lengths=(60, 33), rope="raw", config=SelectConfig(7, 1, 2, score_at="split")), "nan", 2
    ),
    Ballots(Case(lengths=(60,), config=SelectConfig(k=0, n_sink=0, n_local=1)), "rising", 0),
    Ballots(Case(lengths=(60,), config=SelectConfig(5, 2, 4, scope="group")), "few values", 3),
    Ballots(Case(lengths=(30,), Lq=5), "rising", 0),
    # Budgets that differ: a tenth of 60, of 61 and of 1.
    Ballots(Case(lengths=(60, 61, 1), config=SelectConfig(0.1, 2, 4)), "normal", 0),
    Ballots(
        Case(
            lengths=(100, 20, 0),
            rope="raw",
            config=SelectConfig(0.3, 2, 4, score_at="split", fixed_share=0.07, k_max=29),
        ),
        "few values",
        1,
    ),
    # Winners, and ties across the k-th place, in several blocks of a kernel.
    Ballots(Case(lengths=(150, 140), config=SelectConfig(70, 2, 4)), "few values", 0),
    Ballots(Case(lengths=(150,), config=SelectConfig(110, 0, 4)), "all equal", 0),
    # More that tie than 16 bits can count.
    Ballots(
        Case(lengths=(80_000,), Hkv=1, G=1, D=2, Dv=1, config=SelectConfig(40_000, 1, 2)),
        "all equal",
        0,
    ),
)
def select_is_bit_exact(backend: Backend, drawn: Ballots) -> None:
    """Whatever the votes; which are left as they are."""
    votes, problem = drawn.make()
    before = votes.clone()
    finding = compare_selection(backend.select(votes, problem), sorted_selection(votes, problem))
    assert finding.holds, finding
    assert torch.equal(votes.nan_to_num(0), before.nan_to_num(0)), "select changed the votes"
