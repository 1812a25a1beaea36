"""Every runnable example of the pages runs: a fenced block marked python, and nothing after it.

Blocks of one page share a namespace, top to bottom, in a process of their own. A block that is not
to be run is marked `python no-run`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fresh

PAGES = [fresh.ROOT / "README.md", *sorted((fresh.ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(.*)$")


def script(text: str) -> tuple[str, int]:
    """The runnable blocks on the lines where they stand, all else blank; and how many there are."""
    lines, blocks, fence = [], 0, None
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence is None:
            fence = (mark[1], mark[2].strip() == "python") if mark else None
            blocks += bool(fence and fence[1])
            lines.append("")
        elif mark and not mark[2].strip():
            fence = None
            lines.append("")
        else:
            indent, is_runnable = fence
            lines.append(line.removeprefix(indent) if is_runnable else "")
    assert fence is None, "a fenced block is not closed"
    return "\n".join(lines) + "\n", blocks


def test_there_is_a_readme_with_an_example() -> None:
    assert PAGES[0].exists()
    assert script(PAGES[0].read_text(encoding="utf-8"))[1] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(fresh.ROOT)))
def test_examples_run(page: Path) -> None:
    code, _ = script(page.read_text(encoding="utf-8"))
    run = f"exec(compile({code!r}, {str(page)!r}, 'exec'), {{'__name__': '__main__'}})"
    done = fresh.run(run, timeout=180)
    assert done.returncode == 0, done.stderr


def test_only_blocks_marked_python_are_run() -> None:
    page = "\n".join(
        [
            "text", "```python", "x = 1", "```", "```python no-run", "raise SystemExit", "```",
            "```text", "y", "```", "- item", "  ```python", "  if x:", "      print(x)", "  ```",
        ]
    )  # fmt: skip
    assert script(page) == (
        "\n\nx = 1\n\n\n\n\n\n\n\n\n\nif x:\n    print(x)\n\n",
        2,
    )


def test_an_example_that_fails_is_named_by_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md\", line 4"):
        test_examples_run(page)


def test_the_readme_backend_passes_the_way_the_readme_says(tmp_path: Path) -> None:
    """The last block, saved as my_module.py, and the command below it."""
    readme = PAGES[0].read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[-1]
    assert len([line for line in block.splitlines() if line]) <= 20
    command = "pytest properties --backend=my_module:BACKEND"
    assert command in readme
    (tmp_path / "my_module.py").write_text(block)
    arguments = [*command.split()[1:], "-q", "-p", "no:cacheprovider", "-k", "test_law and select"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=fresh.ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"mine +[1-9][0-9]* run", done.stdout), done.stdout
