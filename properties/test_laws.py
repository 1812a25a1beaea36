"""Every law on every backend."""

import pytest

from properties import (  # noqa: F401  # importing them registers their laws
    laws_attend,
    laws_attention,
    laws_metamorphic,
    laws_score,
    laws_select,
)
from properties.law import LAWS, RAN, Law
from tokenselect import Backend


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law(backend: Backend, law: Law) -> None:
    before = RAN[backend.name, law.name]
    law.check(backend)
    assert RAN[backend.name, law.name] > before, f"{backend.name} can run no problem of this law"
