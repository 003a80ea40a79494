"""What a reader yields, and how a file is opened: local or remote, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from mmrec.core.encodings import is_ascii_taken_for_wide
from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import
from mmrec.core.urls import filesystem, is_url
from mmrec.data.pipeline.shards import UTF8

LONGEST = 1 << 25
"""Bytes of the longest record that is read; longer ones are set aside, so that memory stays bounded."""


MOST_EXPANSION = 500
"""Times its own size that a file may hold, beyond :data:`LONGEST`: text is seldom packed to a twentieth, and a file
that is made to fill a disk to a thousandth."""


@dataclass(frozen=True)
class Rejected:
    """A record that is not used.

    Attributes:
        reason: one of a few, to be counted.
        where: the place in its file, for a person.
        fields: of a record without the text, the names of some of its fields.
    """

    reason: str
    where: str
    fields: tuple[str, ...] = ()


Record = str | Rejected
"""The text of a document, or why there is none."""


ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def suffixes(path: str) -> list[str]:
    """Return the ends of a file's name, in lower case and without dots: "a.json.gz" gives json, gz."""
    return [part.lower() for part in PurePosixPath(path).name.split(".")[1:]]


@contextmanager
def open_raw(path: str) -> Iterator[IO[bytes]]:
    """Open a file of any file system that fsspec knows, as it is. UserError names it where that fails."""
    try:
        if is_url(path):
            fs, inside = filesystem(path)
            with fs.open(inside, "rb") as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError) as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {what}") from None


@contextmanager
def open_shard(path: str) -> Iterator[IO[bytes]]:
    """Open a file, decompressed by the end of its name; what is cut short or damaged is a UserError naming it."""
    with open_raw(path) as raw, naming(path), decompressed(raw, path) as file:
        yield file


@contextmanager
def decompressed(raw: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """Yield the content of ``raw``, which is compressed as the end of ``path`` says."""
    unpacked: Any
    match suffixes(path)[-1:]:
        case ["gz" | "tgz"]:
            unpacked = gzip.GzipFile(fileobj=raw)
        case ["bz2"]:
            unpacked = bz2.BZ2File(raw)
        case ["xz"]:
            unpacked = lzma.LZMAFile(raw)  # noqa: SIM115 -- _Bounded closes it
        case ["zst"]:
            # Not zstandard: at the end of a file that was cut short it just stops.
            unpacked = optional_import(ZSTD).ZstdFile(raw)
        case _:
            yield raw
            return
    with io.BufferedReader(_Bounded(unpacked, raw), 1 << 17) as file:
        yield file


class _Bounded(io.RawIOBase):
    """What is unpacked from ``raw``, which must not hold absurdly more than its size."""

    def __init__(self, unpacked: IO[bytes], raw: IO[bytes]) -> None:
        self.unpacked = unpacked
        self.raw = raw
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.unpacked.readinto(buffer)  # type: ignore[attr-defined]
        self.size += count
        check_expansion(self.size, self.raw.tell())
        return count

    def close(self) -> None:
        if not self.closed:
            self.unpacked.close()
        super().close()


def check_expansion(unpacked: int, packed: int) -> None:
    """Raise :class:`CutShort` where so many bytes cannot be the text of a file of so many."""
    if unpacked > LONGEST + MOST_EXPANSION * packed:
        raise CutShort(f"{packed:,} bytes of it hold {unpacked:,}, which is no text")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn what the libraries raise on damaged files into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = type(error).__name__
        damage = isinstance(error, DAMAGE) or kind in DAMAGE_NAMES or kind.startswith("Arrow")
        # bz2 raises an OSError, without the number that those of the system have.
        if not damage and not (isinstance(error, OSError) and error.errno is None):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is cut short or damaged ({what[:120]}); get it again") from None


DAMAGE: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
DAMAGE_NAMES = {"ZstdError", "ParseError", "ReadError", "StreamError", "CutShort"}
"""Of optional packages, and of modules that are slow to import."""


class CutShort(ValueError):
    """A file ends, or is damaged, inside a record."""


def decode(data: bytes, where: str, encoding: str = UTF8) -> Record:
    """Return ``data`` as text, without a byte order mark, or that it is not in ``encoding``."""
    if is_ascii_taken_for_wide(data, encoding) and data:
        return not_in(encoding, where)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError:
        return not_in(encoding, where)


def not_in(encoding: str, where: str) -> Rejected:
    """Return that what stands at ``where`` is in another encoding."""
    return Rejected(f"not {'UTF-8' if encoding == UTF8 else encoding}", where)


class WrongEncodingError(ValueError):
    """What is read is not in the encoding that was named; its text says where."""


@contextmanager
def as_utf8(file: IO[bytes], encoding: str) -> Iterator[IO[bytes]]:
    """Yield the content of ``file``, a text in ``encoding``, as UTF-8.

    Raises:
        WrongEncodingError: while it is read: it is in another encoding.
    """
    if encoding == UTF8:
        yield file
        return
    with io.BufferedReader(_Transcoded(file, encoding), 1 << 17) as transcoded:
        yield transcoded


class _Transcoded(io.RawIOBase):
    """The content of ``file``, a text in ``encoding``, as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self.file, self.encoding = file, encoding
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.ready = b""
        self.read_bytes = 0
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready and not self.ended:
            data = self.file.read(1 << 16)
            self.ended = not data
            if not self.read_bytes and data and is_ascii_taken_for_wide(data, self.encoding):
                raise WrongEncodingError("after byte 0")
            try:
                self.ready = self.decoder.decode(data, self.ended).encode("utf-8")
            except UnicodeError:
                raise WrongEncodingError(f"after byte {self.read_bytes}") from None
            self.read_bytes += len(data)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count
