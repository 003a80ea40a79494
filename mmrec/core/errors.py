"""Errors that a user can act on: one clear line, exit status 2, never a traceback."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable

SIGPIPE = 13
"""The number of the signal, also where there is none (Windows)."""


class UserError(Exception):
    """Something the user gave is wrong. The message says what it is and what to do, in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(message: object) -> str:
    """Return ``message`` with every run of white space made one space."""
    return " ".join(str(message).split())


def exit_status(command: Callable[[], object], program: str = "mmrec") -> int:
    """Run ``command`` and return the exit status of the process.

    0 when it ends well; 2 after printing one line to standard error when it raises :class:`UserError`,
    or an :class:`OSError` that names a path (a full disk, a folder without permission); 130 after Ctrl-C, and 141,
    without a word, where nobody reads the output any more (``| head``): what a shell gives for these signals.
    """
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # here, where a failure can still be told
    except (KeyboardInterrupt, RuntimeError, SystemExit) as error:
        if not _interrupted(error):
            raise
        print(f"\n{program}: stopped by Ctrl-C", file=sys.stderr)  # after the terminal's ^C
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _close_output()
        return 128 + SIGPIPE
    except UserError as error:
        message = one_line(error)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        if error.filename is None:
            _close_output()
        message = one_line(f"{error.filename or 'output'}: {error.strerror or error}")
    else:
        return 0
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


def _interrupted(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or what a library made of it: loguru fails as it cleans up, Lightning exits with 1."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _close_output() -> None:
    """Drop what could not be printed: Python would try once more at its end, and complain."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
