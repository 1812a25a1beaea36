"""The laws as tests of one's own.

    from tokenselect.conformance.pytest import Laws

    class TestMine(Laws):
        backend = "my_module:BACKEND"

Each law is a test, tried on as many problems as the loaded profile of Hypothesis says.
"""

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from tokenselect.conformance import laws  # noqa: F401  # registers them
from tokenselect.conformance.laws.law import LAWS, RAN, Law
from tokenselect.conformance.laws.verdict import backend_of, hardly_tried, seeded, verdict
from tokenselect.contract import Backend


class Laws:
    """Tests that hold a backend to every law.

    backend  a Backend, its registered name, or "package.module:ATTRIBUTE"
    """

    backend: ClassVar[str | Backend]

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
    def test_law(self, law: Law) -> None:
        """Hold the backend to a law. Skip one of which every problem is beyond the backend."""
        backend = backend_of(self.backend)
        law.check(
            backend, settings(settings(), deadline=None, suppress_health_check=list(HealthCheck))
        )
        if not RAN[backend.name, law.name]:
            pytest.skip(f"every problem of this law is beyond what {backend.name} declares")

    def test_backend_was_really_tried(self) -> None:
        """Refuse a backend that declares itself out of nearly everything."""
        backend = backend_of(self.backend)
        had_problems = [
            law.name
            for law in LAWS
            if RAN[backend.name, law.name] or verdict(law, backend, seeded(3)).became != "beyond"
        ]
        why = hardly_tried(had_problems)
        assert why is None, f"{backend.name}: {why}"
