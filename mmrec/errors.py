"""Errors that a user can act on: one clear line, exit status 2, never a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


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
    or an :class:`OSError` that names a path (a full disk, a folder without permission); 130 after Ctrl-C.
    """
    try:
        command()
    except UserError as error:
        message = one_line(error)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        message = one_line(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2
