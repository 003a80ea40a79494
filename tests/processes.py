"""Commands in processes of their own, forked from a server that has imported everything.

A start takes a tenth of a second, where torch and Lightning take seconds to import. What happens at that import or
before it, and the processes that Lightning starts by itself, want a new interpreter: those tests start one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

OUTPUT = "output.txt"
"""What the processes that were started in a folder have printed, and said of their failures."""


@cache
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # it is not told where pytest finds the modules of the tests
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def start(
    folder: Path, arguments: Sequence[object], prepare: Callable[..., None] | None = None, *more: object
) -> ForkServerProcess:
    """Start ``mmrec`` with ``arguments`` in ``folder``, after ``prepare(*more)`` in the new process."""
    process = server().Process(target=_command, args=(folder, [str(one) for one in arguments], prepare, more))
    process.start()
    return process


def start_ranks(
    folder: Path, arguments: Sequence[object], count: int, prepare: Callable[[], None] | None = None
) -> list[ForkServerProcess]:
    """Start ``count`` processes that train together, as torchrun does: each is told its rank. One is told nothing.

    Each calls ``prepare`` before it begins.
    """
    if count == 1:
        return [start(folder, arguments, prepare)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    ranks = [common | {"LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(folder, arguments, _be_rank, rank, prepare) for rank in ranks]


def wait(processes: Sequence[ForkServerProcess], seconds: float = 240) -> int:
    """Return the exit status of the first of ``processes``, negative for a signal, when all have ended."""
    for process in processes:
        process.join(seconds)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late, f"{len(late)} of {len(processes)} processes have not ended"
    assert processes[0].exitcode is not None
    return processes[0].exitcode


def run(
    folder: Path, *arguments: object, ranks: int = 1, status: int = 0, prepare: Callable[[], None] | None = None
) -> str:
    """Run a command in ``folder`` in ``ranks`` processes to its end, and return what they printed or said."""
    output = folder / OUTPUT
    output.unlink(missing_ok=True)
    processes = start_ranks(folder, arguments, ranks, prepare)
    wait(processes)
    said = output.read_text(encoding="utf-8")
    assert {process.exitcode for process in processes} == {status}, said
    return said


def run_program(folder: Path, program: Path, *arguments: str) -> str:
    """Run a program of Python in ``folder`` to its end, and return what it printed or said."""
    output = folder / OUTPUT
    output.unlink(missing_ok=True)
    process = server().Process(target=_program, args=(folder, [str(program), *arguments]))
    process.start()
    status, said = wait([process]), output.read_text(encoding="utf-8")
    assert status == 0, said
    return said


def interrupt(processes: Sequence[ForkServerProcess], number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to all of them, as a terminal does."""
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


def _be_rank(environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    if prepare is not None:
        prepare()


def _enter(folder: Path) -> None:
    """Go to ``folder``, be no part of the tests' group of processes, and write into a file there."""
    assert "preloaded" in sys.modules, "the server has imported nothing"
    import torch

    os.chdir(folder)
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _command(
    folder: Path, arguments: list[str], prepare: Callable[..., None] | None, more: tuple[object, ...]
) -> None:
    from mmrec.cli import main

    _enter(folder)
    if prepare is not None:
        prepare(*more)
    raise SystemExit(main(arguments))


def _program(folder: Path, line: list[str]) -> None:
    _enter(folder)
    os.environ["MPLBACKEND"] = "Agg"
    sys.argv = line
    sys.path.insert(0, str(Path(line[0]).resolve().parent))
    runpy.run_path(line[0], run_name="__main__")
