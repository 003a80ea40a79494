"""Copies of a process: what they return, raise, and when one can be made that trains."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import server

from mmrec.core import forks
from mmrec.core.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no copies of processes")


def test_each_copy_returns_what_it_found() -> None:
    found = forks.call_in_copies(lambda rank: (rank, os.getpid(), os.getppid()), 3)
    assert [rank for rank, *_ in found] == [0, 1, 2]
    assert len({number for _, number, _ in found}) == 3
    assert {parent for *_, parent in found} == {os.getpid()}


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    def fail(rank: int) -> int:
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        forks.call_in_copies(fail, 2)


def test_a_copy_that_the_system_ends_is_told_of() -> None:
    with pytest.raises(UserError, match="too little memory"):
        forks.call_in_copies(lambda _: os.kill(os.getpid(), signal.SIGKILL), 1)


def test_a_copy_ends_with_its_status_and_says_why_it_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert forks.wait_for(forks.fork(lambda: 7)) == 7

    def fail() -> int:
        raise ValueError("this is a bug")

    assert forks.wait_for(forks.fork(fail)) == 1
    assert "this is a bug" in capfd.readouterr().err


def test_a_copy_that_ctrl_c_ends_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends it to all processes; the first one says so."""

    def interrupt() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    assert forks.wait_for(forks.fork(interrupt)) == 130
    assert capfd.readouterr() == ("", "")


def _try(folder: Path) -> None:
    """Write what :func:`can_fork` says of this process alone, with a second thread, and where no gradient comes."""
    torch.set_num_threads(1)
    said = [forks.can_fork()]
    held = threading.Event()
    thread = threading.Thread(target=held.wait)
    thread.start()
    said.append(forks.can_fork())
    held.set()
    thread.join()

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")

    torch.Tensor.backward = refuse  # type: ignore[method-assign]
    said.append(forks.can_fork())
    (folder / "said").write_text(repr(said), encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has copies that train")
def test_a_process_is_copied_where_the_copy_can_compute_gradients(tmp_path: Path) -> None:
    process = server().Process(target=_try, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "said").read_text(encoding="utf-8") == "[True, False, False]"
