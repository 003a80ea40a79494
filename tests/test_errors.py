"""How a command ends."""

from __future__ import annotations

import pytest

from mmrec.core.errors import exit_status


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
