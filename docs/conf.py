"""Sphinx: the pages of this folder, and a reference from the docstrings. ``scripts/docs`` builds them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever is installed

from mmrec import __version__

project, author = "mmrec", "the mmrec authors"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"mmrec {version}"

# Links in the pages are GitHub's: to a file, or to a heading of it.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "amsmath"]

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # those of Lightning and transformers are on their pages
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A name in a docstring that leads nowhere is an error. Types in signatures are also those of other packages,
# whose pages are not looked up: that would need the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"(?!mmrec\.).*"),
    (r"py:(class|obj)", r"mmrec\.(.*\.)?([A-Z]|_\w+)"),  # type variables and private classes
    (r"py:(mod|class|func|meth|attr|data|obj|exc)", r"(torch|lightning|numpy|transformers|tokenizers)\..*"),
]
