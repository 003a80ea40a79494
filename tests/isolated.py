"""An interpreter that finds some of the installed packages, and no others: an empty environment with these in it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def link_packages(folder: Path, *names: str) -> None:
    """Link the packages ``names``, and all that they require, into ``folder``, which is made."""
    folder.mkdir()
    waiting, seen = list(names), set[str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for part in {file.parts[0] for file in found.files or ()} - {".."}:
            if not (folder / part).exists():  # one that another package has, too
                (folder / part).symlink_to(Path(str(found.locate_file(part))))
        required = [Requirement(text) for text in found.requires or ()]
        waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]


def run_isolated(
    program: str, packages: Path, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in the folder ``cwd`` where it finds the standard library, ``packages`` and ``cwd``."""
    program = f"import sys; sys.path += [{str(packages)!r}, {str(cwd)!r}]\n{program}"
    line = [sys.executable, "-I", "-S", "-c", program, *arguments]
    return subprocess.run(line, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
