"""What is asked of the system about files, each with a plain way where a system does not have it.

Linux has all of it. macOS lacks the swap of two names; Windows the locks, the swap, writing at a place, and
descriptors of folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import tempfile
import threading
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True
"""Whether files and folders can be locked by their descriptors, and replaced while they are open."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_seeking = threading.Lock()


def write_at(file: FileIO, place: int, data: bytes | memoryview) -> None:
    """Write ``data`` at byte ``place`` of an unbuffered file; several threads may do so at once."""
    left = memoryview(data)
    while left:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file.fileno(), left, place)
        else:
            with _seeking:
                file.seek(place)
                written = file.write(left)
        left, place = left[written:], place + written


def lock(descriptor: int, wait: bool = True) -> None:
    """Lock an open file or folder (flock); BlockingIOError where another has it and ``wait`` is false."""
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_folder(path: Path) -> int:
    """Return a descriptor of a folder; NotADirectoryError where it is something else."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def open_locked(staging: Path, folder: bool) -> int | None:
    """Return a descriptor of ``staging``, locked, or None where another process or user has it."""
    while True:
        try:
            descriptor = open_or_make(staging, folder)
        except PermissionError:
            if not os.path.lexists(staging):
                raise  # the folder around it cannot be written
            return None
        if descriptor is None:
            return None
        try:
            lock(descriptor, wait=False)
            if is_same(staging, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it took its place, or was deleted, between the opening and the lock


def open_or_make(staging: Path, folder: bool) -> int | None:
    """Return a descriptor of ``staging``, made where it is missing, or None where it is of another kind."""
    try:
        if folder:
            while True:
                with contextlib.suppress(FileExistsError):
                    staging.mkdir()
                with contextlib.suppress(FileNotFoundError):  # it took its place in between
                    return os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        descriptor = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO) and os.path.lexists(staging):
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def is_same(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still is what was opened as ``descriptor``."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def exchange_names(one: Path, other: Path) -> bool:
    """Swap two names in one step (renameat2(2) of Linux); return whether the system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # Windows has no library without a name
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def reserve(descriptor: int, size: int) -> None:
    """Make an open, empty file ``size`` bytes of zero; OSError where Linux has no room for them.

    Elsewhere the room is taken when they are written.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def synchronize(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, where the file system can (some network ones cannot)."""
    try:  # Windows wants a file open for writing
        descriptor = os.open(path, os.O_RDONLY if HAS_LOCKS or path.is_dir() else os.O_RDWR)
    except PermissionError:  # a folder that may be written and not listed, or any of Windows's
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def own_temporary_folder(name: str) -> Path:
    """Return a folder for temporary files that no other user may write into, and which the next process finds again.

    Where users have no numbers it is that for temporary files itself.

    Args:
        name: what the name of the folder begins with.

    Raises:
        OSError: it cannot be made, or others may write into it.
    """
    folder = Path(tempfile.gettempdir())
    if not hasattr(os, "getuid"):
        return folder
    folder /= f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise OSError(f"others may write into {folder}, which should be this user's alone; remove it")
    return folder
