"""Sphinx: sphinx-build docs BUILD, with the `docs` extra installed."""

project = "tokenselect"
copyright = "the tokenselect authors"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_sidebars = {"**": ["about.html", "searchfield.html"]}
# The map of the pages is a table that reads well on a code host too, instead of a toctree.
suppress_warnings = ["toc.not_included"]
