"""A law: something that holds for every backend on every problem it can run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from properties.strategies import fitted
from tokenselect import Backend, Problem, reasons

# How many problems each law really ran on each backend, and how many the backend cannot run.
RAN: Counter[tuple[str, str]] = Counter()
UNABLE: Counter[tuple[str, str]] = Counter()
LAWS: list["Law"] = []
# Backends that get a share of a profile's examples, because a problem takes them so long.
SHARES: dict[str, float] = {}


class CannotRun(Exception):
    """The backend declares that it cannot run this problem: not a failure, but counted."""


@dataclass(frozen=True)
class Law:
    name: str
    holds: Callable[[Backend, Any], None]
    drawn: st.SearchStrategy[Any]
    examples: tuple[Any, ...]

    @property
    def small(self) -> list[Any]:
        """The examples that are not named workloads."""
        return [case for case in self.examples if getattr(case, "case", case).workload is None]

    def check(self, backend: Backend, search: settings | None = None) -> None:
        """Try the law on `backend`, as `search` or Hypothesis's loaded profile says.

        Raises AssertionError.
        """

        def try_one(case: Any) -> None:
            case = fitted(case, backend)
            note(f"tried as {case}")
            try:
                self.holds(backend, case)
            except CannotRun:
                UNABLE[backend.name, self.name] += 1
            else:
                RAN[backend.name, self.name] += 1

        try_one.__qualname__ = f"{self.name}.{backend.name}"
        run = given(case=self.drawn)(try_one)
        tried = search or settings(settings.default)
        examples = max(1, round(tried.max_examples * SHARES.get(backend.name, 1)))
        run = settings(tried, max_examples=examples)(run)
        # A planted mistake must be caught on small problems; the named ones cost too much for that.
        # Hypothesis tries the outermost example first.
        for case in reversed(self.examples if search is None else self.small):
            run = example(case=case)(run)
        run()


def law(drawn: st.SearchStrategy[Any], *examples: Any) -> Callable[[Any], Any]:
    """Register a function (backend, case) -> None as a law over what `drawn` draws."""

    def add(holds: Callable[[Backend, Any], None]) -> Callable[[Backend, Any], None]:
        LAWS.append(Law(holds.__name__, holds, drawn, examples))
        return holds

    return add


def able(backend: Backend, problem: Problem) -> Problem:
    """`problem`, if the backend can run it."""
    why_not = reasons(backend, problem)
    if why_not:
        raise CannotRun(why_not)
    return problem
