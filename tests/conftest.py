from collections.abc import Callable
from pathlib import Path

import pytest

SNAPSHOTS = Path(__file__).parent / "snapshots"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write tests/snapshots/*.txt anew instead of comparing with them, drop unused ones",
    )


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
