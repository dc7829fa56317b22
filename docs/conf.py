"""How Sphinx builds these pages: sphinx-build -W docs docs/_build/html."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed_version
from typing import Any

project = "cnf"
author = "The cnf authors"
project_copyright = "2026, The cnf authors"
release = version = installed_version("cnf-torch")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_timeout = 900  # of a cell: other work beside it, or a slow machine, is no error
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for which idle threads make room
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
python_maximum_signature_line_length = 88
default_role = "code"
smartquotes = False  # "dopri5" in a docstring is a string

html_theme = "furo"
html_title = f"cnf {release}"


def plain_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings here are plain sentences: `*shape` and `|x|` in them are no markup."""
    rewritten: list[str] = []
    in_doctest = False
    for line in lines:
        starts_doctest = line.startswith(">>>") and not in_doctest
        in_doctest = bool(line) and (in_doctest or starts_doctest)
        if starts_doctest or line.startswith(("Raises ", "Source: ", "Sources: ")):
            rewritten.append("")  # a paragraph of its own
        rewritten.append(line if in_doctest else escaped(line.strip()))
    lines[:] = rewritten


def escaped(line: str) -> str:
    """The line with RST's marks made plain, except inside backticks."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(
        part if i % 2 else re.sub(r"([\\*|]|_\b)", r"\\\1", part) for i, part in enumerate(parts)
    )


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_docstring)
