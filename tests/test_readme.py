"""The two READMEs say the same: commands, pictures, links and figures."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

ENGLISH = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TURKISH = (REPOSITORY / "README.tr.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def numbers(text: str) -> list[str]:
    """Return the numbers with a point or a comma in them, digits only: their order is that of the language."""
    return sorted(re.sub(r"\D", "", number) for number in re.findall(r"\d+(?:[.,]\d+)+", prose(text)))


def test_they_are_linked() -> None:
    assert "[Türkçe](README.tr.md)" in ENGLISH.split("##")[0]
    assert "[English](README.md)" in TURKISH.split("##")[0]


def test_blocks_of_code_are_the_same() -> None:
    assert len(blocks(ENGLISH)) >= 5
    assert blocks(TURKISH) == blocks(ENGLISH)


@pytest.mark.parametrize("what", [r"^#+ ", r"^\|", r"^!\["])
def test_as_many_headings_rows_and_pictures(what: str) -> None:
    assert len(re.findall(what, TURKISH, re.MULTILINE)) == len(re.findall(what, ENGLISH, re.MULTILINE))


def test_links_and_inline_code_are_the_same() -> None:
    other = {"README.md", "README.tr.md"}
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - other for text in (ENGLISH, TURKISH)]
    assert links[0] == links[1]
    for link in links[0]:
        assert (REPOSITORY / link).exists(), link
    english, turkish = (set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (ENGLISH, TURKISH))
    assert english <= turkish


def test_figures_are_the_same() -> None:
    assert numbers(TURKISH) == numbers(ENGLISH)
