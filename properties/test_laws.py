"""Every law on every backend."""

import ast
import inspect
import sys

import pytest

from properties.laws import LAWS
from tokenselect import Backend
from tokenselect.conformance.laws.law import RAN, Law


@pytest.mark.slow(
    "triton-retained_mass_never_falls_as_k_grows",
    "triton-keys_far_out_are_moved_exactly",
    "triton-what_fits_is_not_moved",
    "triton-it_repeats_twenty_times_bit_for_bit",
)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law(backend: Backend, law: Law) -> None:
    law.check(backend)
    if not RAN[backend.name, law.name]:
        pytest.skip(f"every problem of this law is beyond what {backend.name} declares")


def test_backend_was_really_tried(backend: Backend) -> None:
    """A backend that declares itself out of everything has not passed anything."""
    laws = {law for name, law in RAN if name == backend.name}
    assert len(laws) >= len(LAWS) / 2, f"{backend.name} ran problems of {len(laws)} laws only"


@pytest.mark.parametrize("module", sorted({law.holds.__module__ for law in LAWS}))
def test_asserts_say_what_was_wrong(module: str) -> None:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    silent = [x.lineno for x in ast.walk(tree) if isinstance(x, ast.Assert) and x.msg is None]
    assert not silent, f"asserts without a message in lines {silent} of {module}"
