"""The Selection Cache over hundreds of random steps, against a model of it in plain Python."""

import functools
import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor
from torch.nn import functional as F

from properties import guard
from properties.planted import PLANTED_CACHES, PlantedCache
from properties.recorded import Recorded
from tokenselect import (
    AttentionInfo,
    Backend,
    Problem,
    SelectConfig,
    Selection,
    SelectionCache,
    cuda_graph,
    plan,
    reasons,
)
from tokenselect.conformance.devices import back, device_of, for_the_cpu, on
from tokenselect.conformance.laws.attention import run
from tokenselect.conformance.laws.law import RAN, SHARES, of_the_profile
from tokenselect.conformance.tolerances import attend_tolerance, choice_finding, score_tolerance
from tokenselect.contract import CacheState, ReuseDecision
from tokenselect.dispatch import registry
from tokenselect.dispatch.registry import load, reuse_of

CONFIG = SelectConfig(k=3, n_sink=1, n_local=2)
THETA, MAX_REUSE = 0.9, 4
HKV, G, CAPACITY = 2, 2, 64
HEAD_DIMS = (8, 32, 64, 128)  # the first that the backend takes


@dataclass
class Stored:
    """What the model remembers of a request's last fresh selection."""

    query: Tensor  # float64
    positions: list[int]
    seqlen_at_selection: int


class Reuse(RuleBasedStateMachine):
    """Rows of a batch grow, are cut back, forgotten and reordered; every call is checked."""

    backend: str
    make_cache: type[SelectionCache]
    theta: float | None = THETA

    @property
    def D(self) -> int:
        return head_dim(load(self.backend))

    @property
    def device(self) -> str:
        return device_of(load(self.backend))

    @initialize(seed=st.integers(0, 2**16), B=st.sampled_from([1, 3]))
    def start(self, seed: int, B: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = self.make_cache(theta=self.theta, max_reuse=MAX_REUSE)
        self.k_cache = self._random(B, HKV, CAPACITY, self.D)
        self.v_cache = self._random(B, HKV, CAPACITY, self.D)
        self.n = [int(x) for x in torch.randint(0, 30, (B,), generator=self.generator)]
        self.stored: list[Stored | None] = [None] * B
        self.hits, self.misses = [0] * B, [0] * B
        self.last = self._random(B, HKV * G, 1, self.D)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    @rule(
        Lq=st.sampled_from([1, 1, 1, 3]),
        kinds=st.lists(
            st.sampled_from(["same", "same", "drift", "drift", "far", "zero"]),
            min_size=3,
            max_size=3,
        ),
        absent=st.lists(st.sampled_from([False] * 7 + [True]), min_size=3, max_size=3),
    )
    def append_and_attend(self, Lq: int, kinds: list[str], absent: list[bool]) -> None:
        B = len(self.n)
        q = self._queries(Lq, kinds)
        for b in range(B):
            if self.n[b] + Lq > CAPACITY:
                self._cut(b, 20)
                self._tell_lengths()
            start = self.n[b]
            self.k_cache[b, :, start : start + Lq] = self._random(HKV, Lq, self.D)
            self.v_cache[b, :, start : start + Lq] = self._random(HKV, Lq, self.D)
            self.n[b] = 0 if absent[b] else start + Lq
        self._attend(q)

    @rule(steps=st.integers(3, 7), kind=st.sampled_from(["same", "drift"]))
    def decode(self, steps: int, kind: str) -> None:
        """A run of alike queries: longer than max_reuse, or further than theta in sum."""
        for _ in range(steps):
            self.append_and_attend(1, [kind] * 3, [False] * 3)

    @rule(kinds=st.lists(st.sampled_from(["same", "far"]), min_size=3, max_size=3))
    def rewrite_the_newest_token(self, kinds: list[str]) -> None:
        """As after a rejected draft token, without telling the cache."""
        if min(self.n) < 1:
            return
        for b, n in enumerate(self.n):
            self.k_cache[b, :, n - 1] = self._random(HKV, self.D)
        self._attend(self._queries(1, kinds))

    def _queries(self, Lq: int, kinds: list[str]) -> Tensor:
        q = self.last.expand(-1, -1, Lq, -1).clone()
        for b in range(len(self.n)):
            if kinds[b] == "far":
                q[b] = self._random(*q.shape[1:2], 1, self.D)
            elif kinds[b] == "drift":  # near the query before, and soon far from the stored one
                step = self._random(*q.shape[1:2], 1, self.D)
                q[b] += 0.35 * step * q[b].norm() / step.norm() / math.sqrt(Lq)
            elif kinds[b] == "zero":
                q[b] = 0
        self.last = torch.where(
            q.mean(2, keepdim=True).norm() > 0, q.mean(2, keepdim=True), self.last
        )
        return q

    def _attend(self, q: Tensor) -> None:
        problem = Problem.build(
            q,
            self.k_cache,
            self.v_cache,
            CONFIG,
            cache_seqlens=torch.tensor(self.n, dtype=torch.int32),
            max_reuse=MAX_REUSE,
        )
        out, info = self.attended(problem)
        RAN[self.backend, "the Selection Cache"] += 1
        tolerance = score_tolerance(problem).votes
        for b, n in enumerate(self.n):
            query = q[b].double().mean(1).flatten()
            expected = self._reuses(b, n, problem, query)
            reused = bool(info.reused[b])
            assert expected is None or reused == expected, f"row {b}: reused is {reused}"
            count = int(info.selection.count[b, 0])
            positions = info.selection.positions[b, 0, :count].tolist()
            assert (info.selection.positions[b, 0, count:] == -1).all()
            if reused:
                stored = self.stored[b]
                assert positions == [*stored.positions, *range(stored.seqlen_at_selection, n)], (
                    f"row {b}"
                )
                assert info.retained_mass[b].isnan().all()
            else:
                self.stored[b] = Stored(query, positions, n) if n > 0 else None
            if n > 0:
                self.hits[b] += reused
                self.misses[b] += not reused
        self._check_fresh(problem, info.selection, info.reused, tolerance)
        finding = attend_tolerance(problem, info.selection).out.compare("out", out)
        assert finding.holds, finding
        assert self.cache.hits.tolist() == self.hits
        assert self.cache.misses.tolist() == self.misses

    def attended(self, problem: Problem) -> tuple[Tensor, AttentionInfo]:
        """`attention` on the backend, or what a subclass puts in its place."""
        return run(load(self.backend), problem, cache=self.cache)

    def _reuses(self, b: int, n: int, problem: Problem, query: Tensor) -> bool | None:
        """What the rule says; None where rounding decides."""
        stored = self.stored[b]
        if stored is None or n == 0 or self.theta is None:
            return False
        appended = n - stored.seqlen_at_selection
        if n - problem.Lq < stored.seqlen_at_selection or appended > MAX_REUSE:
            return False
        if len(stored.positions) + appended > problem.K:
            return False
        cosine = float(query @ stored.query / (query.norm() * stored.query.norm()))
        if math.isnan(cosine):
            return False
        return None if abs(cosine - self.theta) < 1e-5 else cosine >= self.theta

    def _check_fresh(
        self, problem: Problem, selection: Selection, reused: Tensor, tolerance: object
    ) -> None:
        """Fresh rows: what the votes allow. Reused rows are made absent for this check."""
        n = problem.cache_seqlens.masked_fill(reused, 0)
        fresh = Selection(
            selection.positions.masked_fill(reused[:, None, None], -1),
            selection.count.masked_fill(reused[:, None], 0),
        )
        finding = choice_finding(replace(problem, cache_seqlens=n), fresh, tolerance)
        assert finding.holds, finding

    @rule(to=st.floats(0, 1))
    def crop(self, to: float) -> None:
        for b, n in enumerate(self.n):
            self._cut(b, int(to * n))
        self._tell_lengths()

    def _cut(self, b: int, length: int) -> None:
        self.n[b] = min(self.n[b], length)
        stored = self.stored[b]
        if stored is not None and stored.seqlen_at_selection > self.n[b]:
            self.stored[b] = None

    def _tell_lengths(self) -> None:
        self.cache.crop(on(self.device, torch.tensor(self.n)))

    @rule(which=st.integers(0, 2))
    def reset(self, which: int) -> None:
        b = which % len(self.n)
        self.cache.reset(b)
        self.stored[b] = None
        self.hits[b] = self.misses[b] = 0

    @rule(order=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, order: list[int]) -> None:
        """As a beam search does: some rows twice, others gone."""
        order = [i % len(self.n) for i in order[: len(self.n)]]
        rows = torch.tensor(order)
        self.cache.reorder(on(self.device, rows))
        self.k_cache, self.v_cache = self.k_cache[rows].clone(), self.v_cache[rows].clone()
        self.last = self.last[rows].clone()
        self.n, self.stored = [self.n[i] for i in order], [self.stored[i] for i in order]
        self.hits, self.misses = [self.hits[i] for i in order], [self.misses[i] for i in order]
        if self.cache._memory is None:
            self.hits, self.misses = [0] * len(order), [0] * len(order)


class StaticStages(Reuse):
    """The same steps through plans: one for a query, one for three, over one SelectionCache."""

    def attended(self, problem: Problem) -> tuple[Tensor, AttentionInfo]:
        problem = on(self.device, problem)
        if not hasattr(self, "plans"):
            longer = replace(problem, q=problem.q[:, :, :1].expand(-1, -1, 3, -1))
            self.cache.state(longer)  # the one that needs more room first
            alone = replace(problem, q=problem.q[:, :, :1])
            self.plans = {p.Lq: plan(p, self.backend) for p in (alone, longer)}
        tensors = problem.q, problem.k_cache, problem.v_cache, problem.cache_seqlens
        out, info = self.plans[problem.Lq](*tensors, cache=self.cache, return_info=True)
        lse, mass, reused = back(info.lse, info.retained_mass, info.reused)
        selection = Selection(*(x.clone() for x in back(*info.selection)))
        return out.cpu(), AttentionInfo(lse, selection, mass, reused.clone(), info.backend)


def head_dim(backend: Backend) -> int:
    """The first of a few that the backend takes."""
    takes = backend.capability.head_dims
    return next((D for D in HEAD_DIMS if takes is None or D in takes), HEAD_DIMS[0])


def machine(
    backend: str,
    make_cache: type[SelectionCache],
    theta: float | None = THETA,
    kind: type[Reuse] = Reuse,
):
    """A machine class for one backend and one kind of cache."""
    given = {"backend": backend, "make_cache": make_cache, "theta": theta}
    return functools.partial(type("Reuse", (kind,), given))


def steps(examples: int, count: int, backend: str = "cpu") -> settings:
    if backend in SHARES:
        count = min(count, 12)
    # At least some, and not the shortest alone, which are tried first.
    examples = max(4, of_the_profile(examples, backend))
    return settings(settings.default, max_examples=examples, stateful_step_count=count)


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest) -> None:
    """The machine's problems are of one kind: a backend that cannot run it is not hidden here."""
    for name in {"backend_name", "plannable"}.intersection(request.fixturenames):
        backend = for_the_cpu(load(request.getfixturevalue(name)))
        x = torch.ones(1, HKV * G, 1, head_dim(backend))
        problem = Problem.build(x, x[:, :HKV], x[:, :HKV], CONFIG)
        why_not = reasons(backend, problem)
        if why_not:
            pytest.skip("; ".join(why_not))


@pytest.mark.slow("triton")
def test_cache_follows_the_model(backend: Backend) -> None:
    run_state_machine_as_test(
        machine(backend.name, SelectionCache), settings=steps(20, 50, backend.name)
    )


@pytest.mark.slow("triton")
def test_cache_follows_the_model_through_plans(
    plannable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard.take_off(monkeypatch)
    run_state_machine_as_test(
        machine(plannable, SelectionCache, kind=StaticStages), settings=steps(10, 50, plannable)
    )


@pytest.mark.slow("triton")
def test_cache_follows_the_model_through_replays(
    plannable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over CUDA's graphs, or, without a GPU, over recorded operators, which are not CUDA."""
    guard.take_off(monkeypatch)
    interface = None if device_of(load(plannable)) == "cuda" else Recorded()
    made = cuda_graph(plannable, name=f"{plannable}-replayed", interface=interface)
    monkeypatch.setitem(registry._targets, made.name, made)
    monkeypatch.setitem(registry._loaded, made.name, made)
    run_state_machine_as_test(
        machine(made.name, SelectionCache, kind=StaticStages), settings=steps(5, 40, plannable)
    )


@functools.cache
def decisions(B: int, D: int) -> list[tuple[Problem, CacheState, int, float, ReuseDecision]]:
    """Problems, a row, a theta, and what the reference decides; what several backends share.

    The cosine of that row is theta, but for a rounding.
    """
    generator, made = torch.Generator().manual_seed(5), []
    reference = reuse_of(load("reference"))
    for Lq, dtype, sign in ((1, torch.float32, 1), (3, torch.float32, 1), (1, torch.bfloat16, -1)):
        stored = torch.randn(B, HKV * G, 1, D, generator=generator)
        q = (sign * stored + 0.5 * torch.randn(B, HKV * G, Lq, D, generator=generator)).to(dtype)
        keys = torch.randn(B, HKV, 40, D, generator=generator).to(dtype)
        n = torch.full((B,), 20 + Lq, dtype=torch.int32)
        p = Problem.build(q, keys, keys, CONFIG, cache_seqlens=n, max_reuse=MAX_REUSE)
        memory = SelectionCache(max_reuse=MAX_REUSE).state(p)
        memory.query.copy_(stored.flatten(1))
        memory.seqlen_at_selection.fill_(20)
        memory.count.fill_(6)
        mean = q.double().mean(2).flatten(1)
        cosines = F.cosine_similarity(mean, stored.flatten(1).double(), dim=1).tolist()
        for b, cosine in enumerate(cosines):
            for theta in (cosine, math.nextafter(cosine, 2), math.nextafter(cosine, -2)):
                made.append((p, memory, b, theta, reference.decide_reuse(p, memory, theta)))
    flips = sum(int(expected.reused[b]) for _, _, b, _, expected in made)
    assert 5 < flips < len(made) - 5
    return made


@pytest.mark.slow("triton")
def test_decisions_are_those_of_the_reference_and_of_each_request_alone(backend: Backend) -> None:
    """To the bit, also where the cosine is theta but for a rounding."""
    mine = reuse_of(load(backend.name))
    device, D = device_of(load(backend.name)), head_dim(load(backend.name))
    B = 8 if backend.name in SHARES else 40
    for p, memory, b, theta, expected in decisions(B, D):
        there = CacheState(*(on(device, x) for x in memory.tensors()))
        for lone in (slice(b, b + 1), slice(0, B)):
            part = CacheState(*(x[lone] for x in there.tensors()))
            rows = replace(
                p, q=p.q[lone], k_cache=p.k_cache[lone], v_cache=p.v_cache[lone],
                cache_seqlens=p.cache_seqlens[lone],
            )  # fmt: skip
            found = mine.decide_reuse(on(device, rows), part, theta)
            for ours, its in zip(back(*found), expected, strict=True):
                assert torch.equal(ours, its[lone])


@pytest.mark.slow("triton")
def test_without_theta_nothing_is_reused(backend: Backend) -> None:
    run_state_machine_as_test(
        machine(backend.name, SelectionCache, None), settings=steps(4, 30, backend.name)
    )


@pytest.mark.parametrize("theta", [0.9, -1.0, None])
@pytest.mark.parametrize("Lq", [1, 3])
def test_steps_leave_what_the_reference_leaves(backend: Backend, Lq: int, theta: float) -> None:
    """Every tensor of the state and the selection, bit-identical, after each step of a trace."""
    generator = torch.Generator().manual_seed(Lq)
    D = head_dim(load(backend.name))
    device = device_of(load(backend.name))
    steps_of = [reuse_of(load(name)) for name in ("reference", backend.name)]
    base = torch.randn(2, HKV * G, Lq, D, generator=generator)
    keys = torch.randn(2, HKV, 80, D, generator=generator)
    states, reused = [], 0
    for t in range(6):
        q = base + (0.8 if t == 2 else 0.1) * torch.randn(2, HKV * G, Lq, D, generator=generator)
        n = torch.tensor([30 + t * Lq, 0 if t == 3 else 20 + 2 * t * Lq], dtype=torch.int32)
        p = Problem.build(q, keys, keys, CONFIG, cache_seqlens=n, max_reuse=MAX_REUSE)
        states = states or [SelectionCache(max_reuse=MAX_REUSE).state(p) for _ in steps_of]
        left = []
        for i, (steps_, where) in enumerate(zip(steps_of, ("cpu", device), strict=True)):
            there, state = on(where, p), CacheState(*(on(where, x) for x in states[i].tensors()))
            decision = steps_.decide_reuse(there, state, theta)
            missing = on(where, replace(p, cache_seqlens=back(decision.cache_seqlens)[0]))
            reference = load("reference")
            at_home = on("cpu", missing)
            selection = reference.select(reference.score(at_home).votes, at_home)
            selection = type(selection)(*(on(where, x) for x in selection))
            steps_.update(there, state, decision, selection)
            states[i] = CacheState(*back(*state.tensors()))
            left.append((*states[i].tensors(), *back(*selection, *decision)))
        assert all(map(torch.equal, *left)), f"step {t}"
        reused += int(left[0][-3].sum())
    assert (reused > 0) == (theta is not None)


_SEARCH = settings(
    steps(80, 40),
    max_examples=80,  # in every profile: each planted cache has to be caught
    derandomize=False,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", PLANTED_CACHES, ids=lambda cache: cache.__name__)
def test_planted_cache_is_caught(
    wrong: type[PlantedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load("cpu")
    bent = replace(right, reuse=wrong.reuse(reuse_of(right)))
    monkeypatch.setitem(registry._loaded, "cpu", bent)
    with pytest.raises(AssertionError):
        # This seed shows every one of them early.
        run_state_machine_as_test(seed(4)(machine("cpu", wrong)), settings=_SEARCH)


def test_a_cache_with_no_mistake_planted_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mistakes are planted in does not fail by itself."""
    right = load("cpu")
    bent = replace(right, reuse=PlantedCache.reuse(reuse_of(right)))
    monkeypatch.setitem(registry._loaded, "cpu", bent)
    run_state_machine_as_test(machine("cpu", PlantedCache), settings=steps(4, 30))
