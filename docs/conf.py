"""Sphinx: the pages of this folder, and a reference from the docstrings. ``scripts/docs`` builds them."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever is installed

from mmrec import __version__

# The modules of kernels are read here and not run: a GPU is not missed.
warnings.filterwarnings("ignore", message="Triton is not supported on current platform")

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
    (r"py:(attr|data)", r".*"),  # only those with a docstring of their own have a place
    (r"py:(mod|func|meth|obj|exc)", r"(torch|lightning|numpy|transformers|tokenizers)\..*"),
]


def find_object(name: str) -> Any:
    """Return the object of the dotted ``name``, None where there is none."""
    module, _, rest = name.partition(".")
    found: Any = import_module(module) if module == "mmrec" else None
    for part in filter(None, rest.split(".")):
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(f"{found.__name__}.{part}")
        except (AttributeError, ModuleNotFoundError):
            return None
    return found


def find_by_import(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Lead a name as the module or class of its docstring knows it, imported or inherited, to its place."""
    if node.get("refdomain") != "py" or not node.get("py:module"):
        return None
    scopes = [node["py:module"], f"{node['py:module']}.{node.get('py:class')}"]
    objects = (find_object(f"{scope}.{node['reftarget']}") for scope in scopes)
    found = next((each for each in objects if each is not None), None)
    if found is None:
        return None
    name = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, content) or content


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", find_by_import)
