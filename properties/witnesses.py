"""For each planted mistake a law and a problem that shows it: found by a search, and kept.

So nobody searches again, which takes a minute for some. Only where the kept problem shows nothing
any more is there a new search. `pytest -n 0 properties --update-snapshots` writes witnesses.txt.
"""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import Phase, settings

from properties.laws import LAWS
from tokenselect import Backend, SelectConfig
from tokenselect.conformance.laws.law import Law
from tokenselect.conformance.problems import Ballots, Case, Chosen
from tokenselect.reference import BACKEND as REFERENCE

FILE = Path(__file__).with_suffix(".txt")
NAMES = {
    **{kind.__name__: kind for kind in (Ballots, Case, Chosen, SelectConfig)},
    "torch": torch,
    "nan": math.nan,
    "inf": math.inf,
    "__builtins__": {},
}


class Witness(NamedTuple):
    law: str
    case: str  # as Python


@functools.cache
def known() -> dict[str, Witness]:
    """Return the kept ones by the backend's name."""
    lines = (line.split("\t") for line in FILE.read_text().splitlines())
    return {name: Witness(*kept) for name, *kept in lines}


def keep(name: str, found: Witness) -> None:
    known.cache_clear()  # other processes have written to it
    known()[name] = found
    lines = ("\t".join((name, *kept)) for name, kept in sorted(known().items()))
    FILE.write_text("\n".join(lines) + "\n")


def shows(kept: Witness, backend: Backend, raised: type[Exception], search: settings) -> bool:
    """Return whether `backend` breaks the law on the problem, and the reference keeps it.

    Else the problem is not one of the law's any more.
    """
    laws = [law for law in LAWS if law.name == kept.law]
    only = [replace(law, examples=(eval(kept.case, NAMES),)) for law in laws]
    once = settings(search, phases=[Phase.explicit])
    return any(
        sought(law, backend, raised, once) and not sought(law, REFERENCE, Exception, once)
        for law in only
    )


def sought(law: Law, backend: Backend, raised: type[Exception], search: settings) -> Witness | None:
    """Return a problem on which `backend` breaks the law by raising `raised`, if one is found."""
    last: Any = None

    def holds(asked: Backend, case: Any) -> None:
        nonlocal last
        last = case
        law.holds(asked, case)

    try:
        replace(law, holds=holds).check(backend, search)
    except raised:
        return Witness(law.name, repr(last))
    return None
