"""How Sphinx builds these pages, offline: `python -m sphinx -W -b html docs OUT`."""

import re

from sphinx.application import Sphinx

from featcal_fast import __version__

project = "featcal_fast"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
html_title = f"featcal_fast {__version__}"
html_copy_source = False


def adapt(app: Sphinx, name: str, text: list[str]) -> None:
    """Pages are written for a checkout: files outside of docs/ are handed over as they are, and the index is a menu."""
    text[0] = re.sub(r"\]\(\.\./([^)#]+\.(?:md|cff))(?:#[^)]*)?\)", r"](path:../\1)", text[0])
    if name == root_doc:
        pages = dict.fromkeys(re.findall(r"\]\(([\w-]+)\.md\)", text[0]))
        text[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def mark_code(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Docstrings mark code as Markdown does, with one backtick."""
    lines[:] = [re.sub(r"`([^`]+)`", r"``\1``", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon reads sections
