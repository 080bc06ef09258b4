"""The documentation's site: `make docs` builds it into site/, with every link and reference checked."""

import re
from pathlib import Path

import xgrad_optim

project = "xgrad_optim"
author = copyright = "The xgrad_optim authors"
release = version = xgrad_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"xgrad_optim {release}"
html_copy_source = html_show_sourcelink = False

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what an argument may be
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"torch\..*"),  # their own site has these, and would be asked for them
    ("py:class", r"optional|pair|floats|1-element Tensor"),  # words in the types of arguments
    ("py:meth", r"step|eval|train"),  # the docstrings' common part, which stands in every class
]


def setup(app) -> None:
    """Links in Markdown are those of the repository, as a host of repositories shows it."""
    app.connect("source-read", _read)


def _read(app, page: str, source: list[str]) -> None:
    """The README is the front page; other Markdown beside docs/ can be downloaded, as linked scripts can."""
    text = source[0]
    if page == "index":
        readme = (Path(app.srcdir).parent / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#)", "](../", readme).replace("](../docs/", "](") + text
    text = text.replace("](../README.md", "](index.md")
    source[0] = re.sub(r"\]\((\.\./[\w/]+\.md)", r"](path:\1", text)
