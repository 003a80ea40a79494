"""Takes from this process what Windows does not have; for a process of its own that then runs commands of mmrec.

Other packages are imported before: they have their own ways there. What is left is Linux without these names, where
a file that is open, or a folder with such a file, is not renamed or replaced, and a folder cannot be opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

OPEN = Path("/proc/self/fd")
MISSING = {
    os: ["O_DIRECTORY", "fork", "pwrite", "sched_getaffinity", "posix_fadvise", "mkfifo", "killpg", "setsid"],
    signal: ["SIGPIPE", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGQUIT"],
}
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")


def import_others() -> None:
    """Import what mmrec imports of other packages."""
    for name in ("filelock", "lightning.pytorch", "safetensors.torch", "torch.utils.tensorboard", "torchmetrics"):
        import_module(name)


def opened() -> set[str]:
    """Return the files that this process has open or mapped."""
    files = set()
    for descriptor in OPEN.iterdir():
        try:
            files.add(os.readlink(descriptor))
        except FileNotFoundError:  # that of the listing
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return files | {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) > 5}


def refuse_open(path: Any) -> None:
    """Raise PermissionError where ``path`` is open, or holds a file that is."""
    whole = os.path.realpath(path)
    for name in opened():
        if name == whole or name.startswith(whole + os.sep):
            raise PermissionError(errno.EACCES, f"{name} is open in this process", str(path))


def take_away() -> None:
    """Make this process one without what Windows lacks."""
    for owner, names in MISSING.items():
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    sys.modules |= dict.fromkeys(MODULES)  # type: ignore[arg-type]
    shutil._use_fd_functions = False  # type: ignore[attr-defined] # as there
    replace, rename, open_file, load = os.replace, os.rename, os.open, ctypes.CDLL

    def careful(move: Any) -> Any:
        def moved(source: Any, target: Any, **options: Any) -> None:
            refuse_open(source)
            refuse_open(target)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, "a folder is not replaced", str(target))
            move(source, target, **options)

        return moved

    def no_folders(path: Any, *args: Any, **options: Any) -> int:
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder is not opened", str(path))
        return open_file(path, *args, **options)

    def named(name: Any, *args: Any, **options: Any) -> Any:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return load(name, *args, **options)

    os.replace, os.rename, os.open, ctypes.CDLL = careful(replace), careful(rename), no_folders, named  # type: ignore


def main(lines: list[str]) -> int:
    """Run commands, each given as a line, without what Windows lacks; return the first exit status that is not 0."""
    import_others()
    take_away()
    from mmrec.cli import main as mmrec

    for line in lines:
        print(f"$ mmrec {line}", flush=True)
        status = mmrec(shlex.split(line))
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
