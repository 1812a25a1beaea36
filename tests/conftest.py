import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# As in properties/conftest.py: before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SNAPSHOTS = Path(__file__).parent / "snapshots"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write tests/snapshots/*.txt anew instead of comparing with them, drop unused ones",
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The problems are small, and other runs may share the cores: threads would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def update_snapshots(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-snapshots"))


@pytest.fixture
def check_snapshot(update_snapshots: bool) -> Callable[[str, str], None]:
    """Compare a text with tests/snapshots/NAME.txt; a missing file is a failure."""

    def check(name: str, text: str) -> None:
        path = SNAPSHOTS / f"{name}.txt"
        if update_snapshots:
            path.write_text(text + "\n", encoding="utf-8")
        assert path.exists(), f"no snapshot {path.name}; write it: pytest tests --update-snapshots"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return check
