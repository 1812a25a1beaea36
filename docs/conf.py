"""Sphinx, as `make docs` runs it: docs/ to build/site, with the extra `docs` installed."""

import html
import re
from typing import Any

from docutils import nodes

project = "tokenselect"
copyright = "the tokenselect authors"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # the lesson's pictures are made here, and not kept with it
nb_execution_raise_on_error = True
nb_execution_timeout = 300
html_theme = "furo"
html_title = "tokenselect"
html_extra_path = ["../build/explorer"]  # the page that `make docs` makes before
html_copy_source = False
autodoc_typehints = "none"  # signatures would be longer than what they say
autodoc_preserve_defaults = True
default_role = "literal"
# Anchors of HTML are not known to myst; docs/links.py looks at every link of what was built.
suppress_warnings = ["myst.xref_missing"]

# What scrolls sideways can be scrolled with the keyboard.
SCROLL = """addEventListener("DOMContentLoaded", () => document.querySelectorAll(
    "pre, .table-wrapper").forEach((box) => (box.tabIndex = 0)))"""

# Where tables are made by a benchmark and longer than so many rows, they fold.
GENERATED, LONGEST = {"benchmarks", "quality"}, 8


def as_written(
    app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep the layout of docstrings: a first line, then columns of names and what they mean."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
    lines[:] = []
    for paragraph in paragraphs:
        if paragraph.startswith(">>>"):
            lines += [*paragraph.splitlines(), ""]
        elif re.search(r"\S  +\S|^ ", paragraph, re.MULTILINE):
            lines += [
                ".. code-block:: text",
                "",
                *("    " + line for line in paragraph.splitlines()),
                "",
            ]
        else:
            lines += [*re.sub(r"([*|_])", r"\\\1", paragraph).splitlines(), ""]


def fold(app: Any, doctree: nodes.document, page: str) -> None:
    """Let long tables of figures be opened by who wants them."""
    for table in list(doctree.findall(nodes.table)) if page in GENERATED else ():
        head, *rows = table.findall(nodes.row)
        if len(rows) > LONGEST:
            section = table.parent
            while not isinstance(section, nodes.section):
                section = section.parent
            columns = [column for entry in head if (column := entry.astext())]
            named = f"{section[0].astext()}: {len(rows)} rows of {' · '.join(columns[:4])} …"
            start = f"<details><summary>{html.escape(named)}</summary>"
            at = table.parent.index(table)
            table.parent.insert(at + 1, nodes.raw("", "</details>", format="html"))
            table.parent.insert(at, nodes.raw("", start, format="html"))


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_written)
    app.connect("doctree-resolved", fold)
    app.add_js_file(None, body=SCROLL)
