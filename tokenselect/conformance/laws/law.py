"""A law: something that holds for every backend on every problem it can run."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenselect.conformance.laws.fitting import CannotRun, fitted
from tokenselect.contract import (
    AttentionOutput,
    Backend,
    Capability,
    Problem,
    Scores,
    Selection,
    reasons,
)

# How many problems each law really ran on each backend, and how many the backend cannot run.
RAN: Counter[tuple[str, str]] = Counter()
UNABLE: Counter[tuple[str, str]] = Counter()
LAWS: list["Law"] = []
# Backends that get a share of a profile's examples, because a problem takes them so long.
SHARES: dict[str, float] = {}


def share(examples: float, backend: str) -> int:
    """Return the number of a backend's examples, where others get `examples`."""
    return max(1, round(examples * SHARES.get(backend, 1)))


def of_the_profile(examples: int, backend: str) -> int:
    """Return the same in the loaded profile, where `examples` are those of the profile `full`."""
    of_full = settings.get_profile("full").max_examples
    return share(examples * settings().max_examples / of_full, backend)


@dataclass(frozen=True)
class Law:
    """What `holds` of every backend, for the problems that it is `about`.

    Those that it is tried on are bent to what a backend declares. A stage that is then given
    another, say one that the law made of it, ends the example with CannotRun.
    """

    name: str
    holds: Callable[[Backend, Any], None]
    drawn: st.SearchStrategy[Any]
    examples: tuple[Any, ...]
    about: Capability = field(default_factory=Capability)

    def examples_for(self, search: settings | None) -> list[Any]:
        """Return all of them, or less where they cost too much.

        Those that cannot bend, which are large, to a search for planted mistakes, which small
        problems have to show; and tens of thousands of tokens to a quick run.
        """
        is_quick = settings.get_current_profile_name() == "quick"
        given = [(getattr(case, "case", case), case) for case in self.examples]
        if search is not None or is_quick:
            given = [(problem, case) for problem, case in given if problem.can_bend]
        if search is None and is_quick:
            given = [(problem, case) for problem, case in given if max(problem.lengths) < 10_000]
        return [case for _, case in given]

    def check(self, backend: Backend, search: settings | None = None) -> None:
        """Try the law on `backend`, as `search` or Hypothesis's loaded profile says.

        Raises AssertionError.
        """

        asked = asked_first(backend)

        def try_one(case: Any) -> None:
            try:
                case = fitted(case, backend, self.about)
                note(f"tried as {case}")
                self.holds(asked, case)
            except CannotRun:
                UNABLE[backend.name, self.name] += 1
            else:
                RAN[backend.name, self.name] += 1

        try_one.__qualname__ = f"{self.name}.{backend.name}"
        run = given(case=self.drawn)(try_one)
        tried = search or settings(settings.default)
        run = settings(tried, max_examples=share(tried.max_examples, backend.name))(run)
        # Hypothesis tries the outermost example first.
        for case in reversed(self.examples_for(search)):
            run = example(case=case)(run)
        run()


def law(drawn: st.SearchStrategy[Any], *examples: Any, **about: Any) -> Callable[[Any], Any]:
    """Register a function (backend, case) -> None as a law over what `drawn` draws.

    `about`: limits of a `Capability` that the law has of its own. Cases are bent to them too, the
    examples as well.
    """

    def add(holds: Callable[[Backend, Any], None]) -> Callable[[Backend, Any], None]:
        LAWS.append(Law(holds.__name__, holds, drawn, examples, Capability(**about)))
        return holds

    return add


def able(backend: Backend, problem: Problem) -> Problem:
    """`problem`, if the backend declares that it can run it. Raises CannotRun."""
    why_not = reasons(backend, problem)
    if why_not:
        raise CannotRun(why_not)
    return problem


def asked_first(backend: Backend) -> Backend:
    """`backend` with stages that are given only what it declares, and raise CannotRun else.

    What they are given has to be as it was afterwards.
    """

    def score(problem: Problem) -> Scores:
        with only_read(problem):
            return backend.score(able(backend, problem))

    def select(votes: Tensor, problem: Problem) -> Selection:
        with only_read(problem, votes):
            return backend.select(votes, able(backend, problem))

    def attend(problem: Problem, selection: Selection) -> AttentionOutput:
        with only_read(problem, *selection):
            return backend.attend(able(backend, problem), selection)

    return replace(backend, score=score, select=select, attend=attend)


@contextmanager
def only_read(problem: Problem, *others: Tensor) -> Iterator[None]:
    """Hold what runs inside to leave a problem's tensors, and others, as they are."""
    p = problem
    named = {name: getattr(p, name) for name in _TENSORS}
    named |= {"rope.inv_freq": None if p.rope is None else p.rope.inv_freq}
    named |= {f"argument {i}": x for i, x in enumerate(others)}
    given = [(name, x, x.clone()) for name, x in named.items() if x is not None]
    yield
    for name, x, before in given:
        same = (x == before) | (x.isnan() & before.isnan())
        assert same.all(), f"{name}{(~same).nonzero()[0].tolist()} was written to"


_TENSORS = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")
