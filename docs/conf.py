"""How `make docs` turns the pages of this folder, and the docstrings of the package, into a site."""

import re
from importlib.metadata import version as installed
from typing import Any

project = "zeropipe"
version = release = installed("zeropipe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["pictures"]
html_theme = "furo"
html_title = "zeropipe"
html_copy_source = False

myst_heading_anchors = 4  # as a Git host makes them, so that links work in both places
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True

# Files beside this folder are no part of the site: a link to one becomes its text.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def without_links_outside(app: Any, name: str, source: list[str]) -> None:
    source[0] = _OUTSIDE.sub(r"\1", source[0])


def drawings_as_they_are(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What stands indented in the docstring of a module is a drawing or formulas: a literal block."""
    if what == "module":
        pairs = list(zip(["", *lines], [*lines, ""], strict=True))
        lines[:] = [
            part
            for before, line in pairs
            for part in (("::", "", line) if line.startswith(" ") and not before.strip() else (line,))
        ]


def setup(app: Any) -> None:
    app.connect("source-read", without_links_outside)
    app.connect("autodoc-process-docstring", drawings_as_they_are, priority=100)
