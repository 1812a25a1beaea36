"""A test of the tests: every planted mistake is caught, by an assertion of some law."""

import pytest
from hypothesis import HealthCheck, Phase, settings

from properties import test_laws  # noqa: F401  # registers the laws
from properties.law import LAWS
from properties.planted import CPU, PLANTED
from tokenselect import Backend, register

_STAGE_LAWS = {  # a stage's own laws first: they are the ones that should catch it
    "score": "laws_score",
    "select": "laws_select",
    "attend": "laws_attend",
}
_SEARCH = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def catcher(backend: Backend) -> str | None:
    """The law that `backend` breaks, its bent stage's own laws tried first."""
    bent = next(s for s in _STAGE_LAWS if getattr(backend, s) is not getattr(CPU, s))
    own = [law for law in LAWS if law.holds.__module__.endswith(_STAGE_LAWS[bent])]
    for law in [*own, *(law for law in LAWS if law not in own)]:
        try:
            law.check(backend, _SEARCH)
        except AssertionError:
            return law.name
    return None


@pytest.mark.parametrize("backend", PLANTED, ids=lambda backend: backend.name)
def test_planted_backend_is_caught(backend: Backend) -> None:
    register(backend.name, backend)
    assert catcher(backend) is not None, f"no law notices {backend.name}"


def test_there_are_many_and_their_names_differ() -> None:
    assert len({backend.name for backend in PLANTED}) == len(PLANTED) >= 15
