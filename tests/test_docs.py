"""Every link of the docs leads somewhere, and every file that they name is there."""

from __future__ import annotations

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
