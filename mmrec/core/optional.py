"""Packages that only some uses need: they come with the extras of this one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmrec.core.errors import UserError

EXTRAS = {"ray": "ray", "s3fs": "cloud", "gcsfs": "cloud", "pyppmd": "compressors", "huggingface_hub": "export"}
"""The extra that brings a module, where it is not "prepare"."""


def optional_import(name: str) -> Any:
    """Return an optional package; UserError says how to install it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        extra = EXTRAS.get(name, "prepare")
        raise UserError(f"this needs the package {name}; pip install 'mmrec[{extra}]'") from None
