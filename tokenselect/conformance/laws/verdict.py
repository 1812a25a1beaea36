"""What became of a law on a backend."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, settings

from tokenselect.conformance.devices import for_the_cpu
from tokenselect.conformance.laws.fitting import CannotRun
from tokenselect.conformance.laws.law import LAWS, RAN, UNABLE, Law
from tokenselect.contract import Backend
from tokenselect.dispatch import registry


@dataclass(frozen=True)
class Verdict:
    """What became of one law.

    ran, unable  how many problems the backend ran, and how many are beyond what it declares
    case         where it failed: the smallest problem that was found, which prints as Python
    error        and what was raised there
    """

    law: str
    became: Literal["passed", "failed", "beyond"]
    ran: int
    unable: int
    case: Any = None
    error: Exception | None = None


def backend_of(asked: str | Backend) -> Backend:
    """Return a backend, registered, with stages that take problems on the CPU.

    asked  the Backend, its registered name, or "package.module:ATTRIBUTE"
    """
    name = registry.registered(asked) if isinstance(asked, Backend) else registry.named(asked)
    return for_the_cpu(registry.load(name))


def seeded(examples: int) -> settings:
    """Return settings of Hypothesis for so many problems per law, the same ones every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def verdict(law: Law, backend: Backend, tried: settings) -> Verdict:
    """Try a law on a backend. Whatever a stage raises is a failure."""
    failed: list[Any] = []

    def holds(backend: Backend, case: Any) -> None:
        try:
            law.holds(backend, case)
        except CannotRun:
            raise
        except Exception:
            failed.append(case)  # the last one is the one that Hypothesis reports
            raise

    key = backend.name, law.name
    ran, unable = RAN[key], UNABLE[key]
    error = None
    try:
        replace(law, holds=holds).check(backend, tried)
    except Exception as raised:
        error = raised
    counts = RAN[key] - ran, UNABLE[key] - unable
    if error is not None:
        return Verdict(law.name, "failed", *counts, failed[-1] if failed else None, error)
    return Verdict(law.name, "passed" if counts[0] else "beyond", *counts)


def hardly_tried(laws: Iterable[str]) -> str | None:
    """Return why a backend of which these laws had problems to try proves nothing, if so."""
    tried = len(set(laws))
    if tried < len(LAWS) / 2:
        return f"it declares itself out of too much: of {len(LAWS)} laws {tried} had a problem"
    return None
