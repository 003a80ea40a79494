"""Atomic writes: a file or a folder that stands at its path whole, or not at all.

What is written is staged beside its target, under a hidden name, brought to the disk (fsync) and then renamed over
the target: whoever opens the target finds what stood there before or what was written, never a part of it, also
after a full disk, ``kill -9`` or a power cut.

One naming scheme: ``.NAME.part``, and ``.NAME.1.part``, ``.NAME.2.part`` where others write the same file at this
moment. A staged file is locked (flock) for as long as its process lives. So two processes never write into one
staged file, and what a killed process left is taken over by the next that writes there: leftovers do not pile up.

Where the system has no such locks (Windows), staged names are random, as on a file system without locks: what is
written is still whole or absent, and what a killed process left stays there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO

from mmrec.core import file_system
from mmrec.core.errors import UserError
from mmrec.core.file_system import exchange_names, is_same, lock, open_folder, open_locked, open_or_make, synchronize

__all__ = [
    "refuse_to_replace",
    "refuse_to_replace_picture",
    "staged_file",
    "staged_folder",
    "staged_text",
    "write_file",
]

PICTURE_ENDS = 1 << 16
"""Bytes at the beginning and at the end of a picture, in which its maker's name stands."""
SLOTS = 100
"""So many may write the same file at once before one of them is refused."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What a file system without locks says (NFS says EBADF of a folder); its staged names are random."""


def write_file(path: Path, data: bytes | str, parents: bool = False) -> None:
    """Write ``data`` (a text as UTF-8, its line ends as they are) to ``path`` as :func:`staged_file` does."""
    with staged_file(path, parents=parents) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def refuse_to_replace(path: Path, begins: bytes, what: str, option: str) -> None:
    """Raise UserError where ``path`` is a file of a person's, which the output of a command would replace.

    Args:
        path: that a person named for the output.
        begins: the first bytes of such an output, by which an earlier one is known.
        what: the output is.
        option: that names it.
    """
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(len(begins))
        if head not in (b"", begins):
            raise UserError(f"{path}: holds something else than {what}; choose another {option}")


def refuse_to_replace_picture(path: Path, option: str) -> None:
    """Raise UserError where ``path`` is a file that Matplotlib has not drawn; it names itself in all that it writes.

    Args:
        path: that a picture is to be written to.
        option: that names it.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        ends = file.read(PICTURE_ENDS)
        file.seek(max(file.tell(), path.stat().st_size - PICTURE_ENDS))
        ends += file.read()
    if ends and b"matplotlib" not in ends.lower():
        raise UserError(f"{path}: holds something else than a picture of Matplotlib's; choose another {option}")


@contextmanager
def staged_file(path: Path, keep: Path | None = None, parents: bool = False) -> Iterator[BinaryIO]:
    """Yield a new binary file, open for writing and reading, that takes its place at ``path`` at the end.

    A library that wants a path writes to ``file.name``. A symbolic link stays one: the file that it leads to is
    replaced. What is no file (``/dev/stdout``, a named pipe) is written to directly.

    Args:
        path: the target; in an existing folder. It is no folder, unless that is kept.
        keep: under this name, in the same file system, what stood at ``path`` is kept; a second name (hard link)
            where the file system has them, so that at no moment there is neither.
        parents: make the folder where there is none.

    Raises:
        OSError: it cannot be written; names ``path``. What stood there still does. An error of the body that names
            another file is passed on as it is.
    """
    with _errors_name(path):
        if _is_stream(path):
            with open(path, "wb") as file:
                yield file
            return
        target = _target(path, parents)
        if target.is_dir() and keep is None:
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(target))
        with _reserved(target, folder=False) as staging:
            with open(staging, "w+b") as file:
                yield file
                if not file.closed:
                    file.flush()
            synchronize(staging)
            _replace(staging, target, keep)


@contextmanager
def staged_text(path: Path, parents: bool = False) -> Iterator[TextIO]:
    """Yield a new text file (UTF-8, line ends as they are written); else as :func:`staged_file`."""
    with staged_file(path, parents=parents) as file:
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.detach()  # flushes, and leaves the file open for fsync


@contextmanager
def staged_folder(path: Path, keep: Path | None = None, parents: bool = True) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` at the end, with all files in it on the disk.

    On Linux a folder that stood there is swapped with the new one in one step; elsewhere there is a moment without
    either, after which the old one is back if the new one cannot take its place.

    Args:
        path: the target; what stands there is replaced, a folder with all that it holds.
        keep: what stood there is kept under this name, in place of what had it; else it is deleted.
        parents: make the folder around it where there is none.

    Raises:
        OSError: as :func:`staged_file`.
    """
    with _errors_name(path):
        target = _target(path, parents)
        with _reserved(target, folder=True) as staging:
            yield staging
            for folder, _, names in os.walk(staging, topdown=False):
                for name in names:
                    if not (file := Path(folder, name)).is_symlink():
                        synchronize(file)
                synchronize(Path(folder))
            _replace(staging, target, keep)


def _is_stream(path: Path) -> bool:
    """Whether ``path`` is no file that could be replaced: a device, a pipe, or a name of an open file."""
    folder = str(path.absolute().parent)
    return path.exists() and (folder in ("/dev", "/dev/fd", "/proc/self/fd") or not (path.is_file() or path.is_dir()))


def _target(path: Path, parents: bool) -> Path:
    """Return what ``path`` leads to by symbolic links, beside which a file is staged; its folder exists then."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}")
    return target


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Make an error of writing name ``path``; the staged file, which is named in some, is nobody's concern."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _is_staged(str(error.filename), path):
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot be written: {reason}", str(path)) from error


def _is_staged(name: str, path: Path) -> bool:
    """Whether an error about ``name`` is one about writing ``path``: the target, its folder, or staged for it."""
    target = Path(os.path.realpath(path))
    parts = Path(os.path.abspath(name)).parts
    around = target.parent.parts
    if parts[: len(around)] != around:
        return around[: len(parts)] == parts  # a folder above it that could not be made
    inside = parts[len(around)] if len(parts) > len(around) else target.name
    return inside == target.name or (inside.startswith(f".{target.name}.") and ".part" in inside)


@contextmanager
def _reserved(target: Path, folder: bool) -> Iterator[Path]:
    """Yield an empty staged file or folder for ``target``; nothing of it is left behind."""
    staging, descriptor = _reserve(target, folder)
    try:
        yield staging
    finally:
        with contextlib.suppress(OSError):
            # Not another's, who took the name after a good end.
            if descriptor is None or is_same(staging, descriptor):
                _remove(staging)
        if descriptor is not None:
            os.close(descriptor)


def _random_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


def _reserve(target: Path, folder: bool) -> tuple[Path, int | None]:
    """Return the first staged name that no living process holds, and the descriptor that holds it now.

    Without locks the name is random, and there is no descriptor: Windows renames no file that is open.
    """
    if not file_system.HAS_LOCKS:
        staging = _random_name(target)
        staging.mkdir() if folder else staging.touch(exist_ok=False)
        return staging, None
    for slot in range(SLOTS):
        staging = target.with_name(f".{target.name}.{slot}.part" if slot else f".{target.name}.part")
        try:
            descriptor = open_locked(staging, folder)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            staging = _random_name(target)
            descriptor = open_or_make(staging, folder)
        if descriptor is not None:
            _empty(staging, descriptor, target, folder)
            return staging, descriptor
    raise OSError(errno.EBUSY, f"{SLOTS} others are writing it", str(target))


def _empty(staging: Path, descriptor: int, target: Path, folder: bool) -> None:
    """Delete what a killed process left in the staged file or folder, and finish what it had begun to replace."""
    old = staging.with_name(f"{staging.name}.keep")
    if folder and old.exists() and not target.exists():
        os.replace(old, target)
    _remove(old)
    if not folder:
        os.ftruncate(descriptor, 0)
        return
    for entry in staging.iterdir():
        _remove(entry)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(staging: Path, target: Path, keep: Path | None) -> None:
    """Put ``staging``, which is on the disk, in the place of ``target``, which is kept or deleted."""
    if not staging.is_dir() and not target.is_dir():
        if keep is not None and target.exists():
            _link(target, keep, staging.with_name(f"{staging.name}.keep"))
        os.replace(staging, target)
        synchronize(target.parent)
        return
    with _alone(target):
        old = _swap(staging, target)
        if old is not None and keep is not None:
            _remove(keep)
            os.replace(old, keep)
        synchronize(target.parent)
        if old is not None:
            _remove(old)


def _link(target: Path, keep: Path, link: Path) -> None:
    """Make ``keep`` a second name of the file ``target``."""
    if keep.is_dir():
        _remove(keep)
    try:
        os.link(target, link)
    except OSError:  # a file system without links
        os.replace(target, keep)
    else:
        os.replace(link, keep)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Lock the folder ``target``: two that replace it do so one after the other. Nothing where there is none."""
    if not file_system.HAS_LOCKS:
        yield
        return
    while True:
        try:
            descriptor = open_folder(target)
        except (FileNotFoundError, NotADirectoryError):
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                lock(descriptor)
            if is_same(target, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _swap(staging: Path, target: Path) -> Path | None:
    """Put ``staging`` in the place of ``target``, one of them a folder; return where the old one is now."""
    if not target.exists():
        os.replace(staging, target)
        return None
    if exchange_names(staging, target):
        return staging
    old = staging.with_name(f"{staging.name}.keep")
    _remove(old)
    os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError:
        os.replace(old, target)
        raise
    return old
