"""Token folders on object storage: read block by block, through a local cache of bounded size."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.core.urls import filesystem, retry, translate_errors
from mmrec.data.store import MANIFEST, TokenFolder, describe_tokens, read_manifest, tokenizer_of

BLOCK = 1 << 22
"""Bytes that are fetched at once."""


class RemoteTokens:
    """Tokens of a remote file, indexed like the memory map of a local one.

    The blocks used last are kept in a file without a name (in ``MMREC_CACHE``, or where temporary files go): its room
    is free again when the process ends, however it ends.

    Args:
        url: of the file, on any file system that fsspec knows.
        size: its bytes.
        dtype: of its tokens.
        cache_bytes: most bytes that are kept on this machine; the block used longest ago goes first.
    """

    def __init__(self, url: str, size: int, dtype: np.dtype, cache_bytes: int) -> None:
        self.url = url
        self.dtype = dtype
        self._size = size
        places = min(-(-size // BLOCK), max(1, cache_bytes // BLOCK))
        self._file = tempfile.TemporaryFile(dir=os.environ.get("MMREC_CACHE"))  # noqa: SIM115 - open as long as this is
        weakref.finalize(self, self._file.close)
        self._file.truncate(places * BLOCK)
        self._cached = np.memmap(self._file, dtype=dtype, mode="r", shape=(places, BLOCK // dtype.itemsize))
        self._places: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(places))

    def __len__(self) -> int:
        return self._size // self.dtype.itemsize

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        places = np.asarray(index)
        per_block = BLOCK // self.dtype.itemsize
        found = np.empty(places.shape, dtype=self.dtype)
        numbers = places // per_block
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self._block(int(number))[places[here] - number * per_block]
        return found

    def _block(self, number: int) -> np.ndarray:
        """Return a block as it lies in the cache, fetched first where it is not there; good until the next call."""
        if number in self._places:
            self._places.move_to_end(number)
            block: np.ndarray = self._cached[self._places[number]]
            return block
        first = number * BLOCK
        data = retry(lambda: fetch(self.url, first, min(first + BLOCK, self._size)))
        if not self._free:
            self._free.append(self._places.popitem(last=False)[1])
        self._file.seek(self._free[-1] * BLOCK)
        self._file.write(data)  # not through the memory map, where a full disk would kill the process
        self._file.flush()
        self._places[number] = self._free.pop()
        block = self._cached[self._places[number]]
        return block


def fetch(url: str, first: int = 0, last: int | None = None) -> bytes:
    """Return the bytes from ``first`` to ``last`` of a remote file; UserError where it cannot be reached."""
    fs, name = filesystem(url)
    with translate_errors(url):
        data: bytes = fs.cat_file(name, start=first, end=last)
    if last is not None and len(data) != last - first:
        raise UserError(
            f"{url}: has {first + len(data):,} bytes, {last:,} are needed; it is not the file of its manifest"
        )
    return data


def open_remote_tokens(url: str, cache_bytes: int) -> TokenFolder:
    """Open a token folder on object storage.

    Args:
        url: of the folder.
        cache_bytes: most bytes of its tokens that are kept on this machine, by this process.
    """
    url = url.rstrip("/")
    with tempfile.TemporaryDirectory() as here:
        folder = Path(here)
        for name in (MANIFEST, "tokenizer.json"):
            (folder / name).write_bytes(fetch(f"{url}/{name}"))
        manifest: dict[str, Any] | None = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{url}: holds no prepared tokens (no readable {MANIFEST})")
        try:
            dtype, sizes = describe_tokens(manifest, folder)
            tokenizer = tokenizer_of(folder, dtype)
        except UserError as error:  # speaks of the copy
            raise UserError(str(error).replace(here, url)) from None
    train, val = (
        RemoteTokens(f"{url}/{part}.bin", sizes[f"{part}.bin"], dtype, cache_bytes // 2) for part in ("train", "val")
    )
    return TokenFolder(Path(url), manifest, tokenizer, train, val)  # type: ignore[arg-type]
