"""Every runnable example of the pages runs: a fenced block marked python, and nothing after it.

Blocks of one page share a namespace, top to bottom, in a process of their own. A block that is not
to be run is marked `python no-run`. A block marked text right below an example, with no word
between them, is what the example prints; "..." in it stands for what differs between machines.
"""

import doctest
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tokenselect
from docs.diagrams import DIAGRAMS, IMAGES
from docs.links import broken
from tests import fresh

LESSON = fresh.ROOT / "docs" / "lesson.ipynb"
PAGES = [fresh.ROOT / "README.md", *sorted((fresh.ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```", re.MULTILINE)
BLOCK = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
END = "\x1e"  # printed after each example
RUN = f"""
def run(page, blocks):
    names = {{"__name__": "__main__"}}
    for line, code in blocks:
        exec(compile("\\n" * line + code, page, "exec"), names)
        print(end={END!r}, flush=True)
"""


def examples(text: str) -> list[doctest.Example]:
    """The examples of a page: code, the lines above it, and what it prints ("" if not shown)."""
    found: list[doctest.Example] = []
    end, above = 0, "no block"
    for block in BLOCK.finditer(text):
        indent, mark, body = block.groups()
        body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        line = text.count("\n", 0, block.start()) + 1
        if mark == "python":
            found.append(doctest.Example(body, "", lineno=line))
        elif mark == "text" and end and not text[end : block.start()].strip():
            assert above == "python", f"line {line}: an output below {above!r}, which is not run"
            found[-1].want = body
        end, above = block.end(), mark
    n_blocks = len(BLOCK.findall(text))
    assert len(FENCE.findall(text)) == 2 * n_blocks, "a fenced block is not closed"
    return found


def run(page: Path) -> None:
    """Run a page's examples, and compare what they print with what the page shows."""
    found = examples(page.read_text(encoding="utf-8"))
    blocks = [(example.lineno, example.source) for example in found]
    done = fresh.run(f"{RUN}\nrun({str(page)!r}, {blocks!r})")
    assert done.returncode == 0, done.stderr
    outputs = done.stdout.split(END)[:-1]
    checker = doctest.OutputChecker()
    wrong = [
        f"{page}, line {example.lineno}:\n"
        + checker.output_difference(example, printed, doctest.REPORT_NDIFF)
        for example, printed in zip(found, outputs, strict=True)
        if example.want and not checker.check_output(example.want, printed, doctest.ELLIPSIS)
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_a_readme_with_an_example() -> None:
    assert examples(PAGES[0].read_text(encoding="utf-8"))


@pytest.mark.slow("docs/tutorials/transformers.md")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if examples(page.read_text(encoding="utf-8"))],
    ids=lambda page: str(page.relative_to(fresh.ROOT)),
)
def test_examples_run_and_print_what_is_shown(page: Path) -> None:
    run(page)


def test_only_blocks_marked_python_are_run() -> None:
    page = "\n".join(
        [
            "text", "```python", "x = 1", "```", "```python no-run", "raise SystemExit", "```",
            "said", "```text", "y", "```", "- item", "  ```python", "  if x:", "      print(x)",
            "  ```", "", "  ```text", "  1", "  ```",
        ]
    )  # fmt: skip
    found = [(example.lineno, example.source, example.want) for example in examples(page)]
    assert found == [(2, "x = 1\n", ""), (13, "if x:\n    print(x)\n", "1\n")]


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```python\nx = 1\n```\n\n```python\nx = 2\n", "not closed"),
        ("```sh\nmake\n```\n\n```text\nmade\n```\n", "line 5: an output below 'sh'"),
    ],
)
def test_a_page_that_cannot_be_checked_is_refused(page: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        examples(page)


def test_an_example_that_fails_is_named_by_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md\", line 4"):
        run(page)


def test_an_output_that_differs_is_named_by_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    code = "```python\nprint('share 0.0123')\nprint(2)\n```\n\n"
    page.write_text(f"{code}```text\nshare 0.0...\n2\n```\n")
    run(page)
    page.write_text(f"{code}{code}```text\nshare 0.0...\n3\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)page\.md, line 6:.*\n *- 3\n *\+ 2"):
        run(page)


@pytest.mark.slow
def test_the_short_backend_passes_the_way_its_page_says(tmp_path: Path) -> None:
    """The block that defines "mine", saved as my_module.py, and the command below it."""
    page = (fresh.ROOT / "docs" / "add-a-backend.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = (block for block in blocks if 'Backend("mine"' in block)
    assert len([line for line in block.splitlines() if line]) <= 20
    command = "python -m tokenselect.conformance my_module:BACKEND"
    assert command in page
    (tmp_path / "my_module.py").write_text(block)
    laws = ["select_is_bit_exact", "it_chooses_what_the_votes_allow_and_attends_to_that"]
    named = [x for law in laws for x in ("--law", law)]
    done = fresh.run([*command.split()[2:], "--examples", "15", *named], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for law in laws:
        assert re.search(rf"{law} +passed  [1-9]", done.stdout), done.stdout


# --- the site: `make docs` builds it, with warnings as errors ---


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_what_its_code_draws(name: str) -> None:
    assert (IMAGES / f"{name}.svg").read_text("utf-8") == DIAGRAMS[name](), (
        "run: python -m docs.diagrams"
    )


def test_pictures_have_texts_in_their_place() -> None:
    shown = set()
    for page in [*PAGES, fresh.ROOT / "CONTRIBUTING.md"]:
        for text, picture in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8")):
            assert len(text.split()) > 5, f"{page}: {picture}"
            assert (page.parent / picture).is_file()
            shown.add(Path(picture).stem)
    assert shown >= set(DIAGRAMS)


def test_the_api_page_has_every_public_name() -> None:
    from tokenselect.integrations import transformers

    page = (fresh.ROOT / "docs" / "api.md").read_text("utf-8")
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted({*tokenselect.__all__, *transformers.__all__} - {"NAME"})


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.html").write_text("<p id=here><a href='../two.html#x'>")
    right = "<i id=x><a href='a/one.html#here'></a><a href=https://other.site/none></a>"
    (tmp_path / "two.html").write_text(right)
    assert broken(tmp_path) == []
    (tmp_path / "two.html").write_text(right + "<a href='#y'></a><img src=none.png>")
    assert broken(tmp_path) == ["two.html: #y", "two.html: none.png"]
    unknown = "<span class='xref myst'>What</span>"
    (tmp_path / "two.html").write_text(f"{right}<a href='#x'>{unknown}</a>{unknown}")
    assert broken(tmp_path) == ["two.html: 'What' is linked to nothing known"]


def test_the_lesson_is_small_and_its_pictures_have_texts() -> None:
    cells = json.loads(LESSON.read_text("utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in codes)
    assert all("image" in cell["metadata"].get("mystnb", {}) for cell in codes
               if "plt.show()" in cell["source"])  # fmt: skip
    readme = (fresh.ROOT / "README.md").read_text("utf-8")
    (twelve,) = re.findall(r"(def tokenselect_step.*?)\n\n\n", readme, re.DOTALL)
    assert any(twelve in "".join(cell["source"]) for cell in codes)


def test_the_table_of_the_lesson_names_lines() -> None:
    pytest.importorskip("IPython")
    cells = json.loads(LESSON.read_text("utf-8"))["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if cell["id"] == "code-table")
    names: dict[str, Any] = {}
    exec(source, names)
    for in_paper, in_code, place in names["rows"]:
        path, line = re.findall(r"`(.*)`, (\d+)", place)[0]
        text = (fresh.ROOT / path).read_text("utf-8").splitlines()[int(line) - 1]
        words = re.findall(r"\w+", in_paper + in_code)
        assert set(words) & set(re.findall(r"\w+", text)), (in_paper, text)


def test_the_lesson_installs_what_its_cells_import() -> None:
    extras = tomllib.loads((fresh.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {"tokenselect[conformance]", "tokenselect[demo-tools]", "ipykernel", "matplotlib"}
    assert needed < set(extras["optional-dependencies"]["lesson"])
    assert "tokenselect[lesson]" in extras["optional-dependencies"]["docs"]


@pytest.mark.slow
def test_the_lesson_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(fresh.ROOT))
    lesson = nbformat.read(LESSON, as_version=4)
    folder = {"metadata": {"path": str(LESSON.parent)}}
    nbclient.NotebookClient(lesson, timeout=fresh.HANG, resources=folder).execute()
    printed = "".join(
        out.get("text", "") for cell in lesson.cells for out in cell.get("outputs", ())
    )
    assert "FAILED" in printed  # the planted mistake was found
