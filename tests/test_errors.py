"""How a command ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmrec.core.errors import exit_status

Command = Callable[..., int]


def test_ctrl_c_stays_ctrl_c_where_a_library_fails_on_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("a lock that is held")

    assert exit_status(command) == 130
    assert capsys.readouterr().err == "\nmmrec: stopped by Ctrl-C\n"


def test_what_has_gone_wrong_by_itself_is_not_taken_for_it() -> None:
    def command() -> None:
        raise RuntimeError("a lock that is held")

    with pytest.raises(RuntimeError, match="a lock"):
        exit_status(command)


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)  # the fixture goes back
    gone.rmdir()
    for command in ("generate", "prepare"):
        assert mmrec(command) == 2
        assert capsys.readouterr().err == (
            "mmrec: error: the current folder is no longer there; change to one that is\n"
        )
