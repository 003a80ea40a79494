"""Compressors to compare a model with: xz, and PPMd, which mixes the counts of contexts of up to 16 bytes."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import

PPMD_ORDER = 16
PPMD_MEMORY = 256 << 20
"""Bytes of its counts; where they are full it begins anew."""
BLOCK = 1 << 20


class Compressor(Protocol):
    """What takes bytes and gives fewer."""

    def compress(self, data: bytes) -> bytes:
        """Take some bytes; return what of the result is ready."""

    def flush(self) -> bytes:
        """Return the rest of the result."""


class Compressors:
    """How many bits xz and PPMd take for each byte of a text, given that they have read another before.

    Args:
        before: a file that they read before; nothing if None.

    Raises:
        UserError: the package pyppmd is missing, or the file cannot be read.
    """

    def __init__(self, before: Path | None = None) -> None:
        self._running, self._bytes = _compressors(), 0
        self._sizes = dict.fromkeys(self._running, 0)
        if before is not None:
            alone = Compressors()
            for block in _blocks(before):
                alone.update(block)
                self._feed(block)
            self._sizes = {name: size - alone._finish()[name] for name, size in self._sizes.items()}

    def update(self, text: bytes) -> None:
        """Take some more of the text."""
        self._bytes += len(text)
        self._feed(text)

    def compute(self) -> dict[str, float]:
        """Return bits per byte by the name of the compressor; nothing can be taken any more."""
        return {name: 8 * size / self._bytes for name, size in self._finish().items()}

    def _feed(self, data: bytes) -> None:
        for name, compressor in self._running.items():
            self._sizes[name] += len(compressor.compress(data))

    def _finish(self) -> dict[str, int]:
        for name, compressor in self._running.items():
            self._sizes[name] += len(compressor.flush())
        self._running = {}
        return self._sizes


def xz_size(data: bytes) -> int:
    """Return how many bytes xz makes of ``data``."""
    compressor = _xz()
    return len(compressor.compress(data)) + len(compressor.flush())


def ppmd_sizes(parts: Sequence[bytes]) -> list[int] | None:
    """Return how many bytes PPMd has written after each of ``parts``, which it reads one after the other.

    A few bytes that it holds back between them are counted with the next. None where pyppmd is not installed.
    """
    if find_spec("pyppmd") is None:
        return None
    compressor, sizes, written = _ppmd(), [], 0
    for number, part in enumerate(parts, 1):
        written += len(compressor.compress(part))
        if number == len(parts):
            written += len(compressor.flush())
        sizes.append(written)
    return sizes


def _xz() -> Compressor:
    return lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)


def _ppmd() -> Compressor:
    compressor: Compressor = optional_import("pyppmd").PpmdCompressor(max_order=PPMD_ORDER, mem_size=PPMD_MEMORY)
    return compressor


def _compressors() -> dict[str, Compressor]:
    return {"xz -9e": _xz(), f"PPMd, order {PPMD_ORDER}": _ppmd()}


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
