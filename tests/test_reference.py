"""The pages and the reference are built without a warning: links and names in docstrings lead somewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytest.importorskip("myst_parser", reason="the extra docs is not installed")
pytest.importorskip("furo", reason="the extra docs is not installed")


@pytest.mark.slow
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    """As scripts/docs does, elsewhere."""
    source, html = tmp_path / "docs", tmp_path / "html"
    shutil.copytree(REPOSITORY / "docs", source, ignore=shutil.ignore_patterns("reference"))  # an earlier call's
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", source, html]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in (REPOSITORY / "mmrec").rglob("*.py")
        if path.name != "__main__.py"
    }
    assert modules == {path.name.removesuffix(".html") for path in (html / "reference").glob("*.html")}
    assert "MemoryLM" in (html / "genindex.html").read_text(encoding="utf-8")
