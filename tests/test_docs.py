"""Every link of the docs leads somewhere, every file that they name is there, and the map of the code is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

DOCS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """Return the headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    names = re.findall(r"`((?:mmrec|tests|scripts|configs)/[\w./]+)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    for name, test in names:
        if not name.endswith("X.py"):
            assert (REPOSITORY / name).exists(), name
            assert f"def {test}(" in (REPOSITORY / name).read_text(encoding="utf-8") if test else True, test


def imported(file: Path) -> set[str]:
    """Return the modules, or names in them, that ``file`` imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    whole = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    parts = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return (
        whole
        | {f"{node.module}.{name.name}" for node in parts for name in node.names}
        | {f"{node.module}" for node in parts}
    )


def test_a_file_imports_only_from_those_above_it() -> None:
    """And each has its row; those of one row may import each other."""
    rows = re.findall(
        r"^\| `(mmrec/[\w/.]+)`", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    place: dict[Path, int] = {}
    for number, row in enumerate(rows):
        path = REPOSITORY / row
        place |= dict.fromkeys(path.rglob("*.py") if path.is_dir() else [path], number)
    package = REPOSITORY / "mmrec"
    assert set(place) == set(package.rglob("*.py")) - {package / "__init__.py", package / "__main__.py"}
    for file, number in place.items():
        for name in imported(file):
            module = REPOSITORY / name.replace(".", "/")
            found = place.get(module.with_suffix(".py"), place.get(module / "__init__.py", 0))
            assert found <= number, f"{file.relative_to(REPOSITORY)} imports {name}"
