"""The pages and the reference are built without a warning: links and names in docstrings lead somewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

HAS_SPHINX = all(find_spec(name) is not None for name in ("sphinx", "myst_parser", "furo"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SPHINX, reason="the extra docs is not installed")
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    """As scripts/docs does, elsewhere, and without writing pages: names are looked up all the same."""
    source = tmp_path / "docs"
    shutil.copytree(REPOSITORY / "docs", source, ignore=shutil.ignore_patterns("reference"))  # an earlier call's
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    options = ["-b", "dummy", "-W", "--keep-going", "-q", str(source), str(tmp_path / "built")]
    command = [sys.executable, "-m", "sphinx", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in (REPOSITORY / "mmrec").rglob("*.py")
        if path.name != "__main__.py"
    }
    assert modules == {path.stem for path in (source / "reference").glob("*.rst")}
