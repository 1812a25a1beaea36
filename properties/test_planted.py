"""A test of the tests: every planted mistake is caught, by an assertion of some law."""

import pytest
from hypothesis import HealthCheck, Phase, settings

from properties import native, witnesses
from properties.backends import chosen
from properties.laws import LAWS
from properties.mutants import MUTANTS
from properties.planted import BASES, PLANTED, planted
from properties.witnesses import Witness
from tokenselect import Backend, backends, register
from tokenselect.conformance.devices import for_the_cpu
from tokenselect.conformance.laws.law import SHARES, Law
from tokenselect.dispatch.registry import load

STAGE_LAWS = {  # a stage's own laws first: they are the ones that should catch it
    "score": ".score",
    "select": ".select",
    "attend": ".attend",
    "attend_fresh": ".attention",
}
SEARCH = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
# Most mistakes break one law or another at once.
FIRST = settings(SEARCH, max_examples=8, phases=[Phase.generate])


def laws_by_stage(stage: str) -> list[Law]:
    """All of them; a stage's own come first."""
    return sorted(LAWS, key=lambda law: not law.holds.__module__.endswith(STAGE_LAWS[stage]))


def catcher(
    backend: Backend, bent: str, raised: type[Exception] = AssertionError, update: bool = False
) -> Witness | None:
    """A law that `backend`, of which one stage is bent, breaks, and the problem that shows it.

    The one that is kept; if it shows nothing any more, or with `update`, one that is sought.
    """
    kept = witnesses.known().get(backend.name)
    if kept and not update and witnesses.shows(kept, backend, raised, SEARCH):
        return kept
    # Where a problem takes long, the stage's own laws and their examples are the shortest way.
    searches = (SEARCH,) if SHARES.get(backend.name, 1) < 1 else (FIRST, SEARCH)
    for search in searches:
        for law in laws_by_stage(bent):
            found = witnesses.sought(law, backend, raised, search)
            if found:
                return found
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Mistakes are planted in those of the chosen backends that are bases, or in cpu."""
    if "mistake" in metafunc.fixturenames:
        bases = [name for name in chosen(metafunc.config) if name in BASES] or ["cpu"]
        both = [(base, mistake) for base in bases for mistake in PLANTED]
        ids = [f"{base}-{mistake}" for base, mistake in both]
        metafunc.parametrize(("base", "mistake"), both, ids=ids)


@pytest.mark.slow
def test_planted_mistake_is_caught(base: str, mistake: str, update_snapshots: bool) -> None:
    right = for_the_cpu(load(base))
    if mistake in BASES[base]:
        limit, value = BASES[base][mistake]
        assert value not in getattr(right.capability, limit), f"{mistake} can show in {base}"
        pytest.skip(f"{mistake} is beyond {base}: it declares no {limit} of {value!r}")
    backend = planted(mistake, right)
    if backend.name not in backends():
        register(backend.name, backend)
    SHARES[backend.name] = 0.2 if base in SHARES else 1
    found = catcher(backend, PLANTED[mistake].stage, update=update_snapshots)
    assert found, f"no law notices {backend.name}"
    if update_snapshots:
        witnesses.keep(backend.name, found)


def test_each_has_its_witness() -> None:
    bent = {
        f"planted-{base}-{mistake}"
        for base, beyond in BASES.items()
        for mistake in PLANTED.keys() - beyond.keys()
    }
    of_laws = {f"planted-{mutant.name}" for mutant in MUTANTS if mutant.stage in STAGE_LAWS}
    of_laws |= {f"planted-native-{mutant.name}" for mutant in native.MUTANTS
                if mutant.stage in STAGE_LAWS}  # fmt: skip
    assert witnesses.known().keys() == bent | of_laws, "run with -n 0 --update-snapshots"


def test_a_witness_of_another_kind_shows_nothing() -> None:
    for law, case in (("select_is_bit_exact", "Case()"), (LAWS[0].name, "Case()")):
        kept = Witness(law, case)
        assert not witnesses.shows(kept, load("cpu"), Exception, SEARCH)


def test_there_are_many() -> None:
    assert len(PLANTED) >= 15
    for base, beyond in BASES.items():
        assert beyond.keys() <= PLANTED.keys(), f"{base}: {beyond}"
