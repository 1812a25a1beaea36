from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenselect.dispatch import registry

SNAPSHOTS = Path(__file__).parent / "errors.txt"


@pytest.fixture(autouse=True)
def _leave_no_backend_behind() -> Iterator[None]:
    targets, loaded, auto = dict(registry._targets), dict(registry._loaded), registry.AUTO
    yield
    registry._targets.clear()
    registry._targets.update(targets)
    registry._loaded.clear()
    registry._loaded.update(loaded)
    registry.AUTO = auto


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def llama() -> Any:
    from tests.models import model_of  # takes transformers, which most tests do without

    return model_of("llama")


def snapshots() -> dict[str, str]:
    """The texts by name: each below a line `## NAME`."""
    sections = ("\n" + SNAPSHOTS.read_text(encoding="utf-8")).split("\n## ")[1:]
    return {name: text.rstrip("\n") for name, _, text in (x.partition("\n") for x in sections)}


def write_snapshots(texts: dict[str, str]) -> None:
    sections = [f"## {name}\n{text}\n" for name, text in sorted(texts.items())]
    SNAPSHOTS.write_text("\n".join(sections), encoding="utf-8")


@pytest.fixture
def check_snapshot(update_snapshots: bool) -> Callable[[str, str], None]:
    """Compare a text with that of its name in tests/errors.txt; a missing one is a failure."""

    def check(name: str, text: str) -> None:
        if update_snapshots:
            write_snapshots(snapshots() | {name: text})
        known = snapshots()
        assert name in known, f"no snapshot {name}; write it: pytest tests --update-snapshots"
        assert text == known[name]

    return check
