"""Token folders on object storage: read block by block, through a local cache of bounded size."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.errors import UserError
from mmrec.tokens import MANIFEST, TokenFolder, describe_tokens, read_manifest, tokenizer_of

BLOCK = 1 << 22
"""Bytes that are fetched at once."""


def is_url(folder: Path | str) -> bool:
    """Whether ``folder`` is on object storage, as s3://bucket/folder."""
    return "://" in str(folder)


class RemoteTokens:
    """Tokens of a remote file, indexed like the memory map of a local one.

    Args:
        url: of the file, on any file system that fsspec knows.
        size: its bytes.
        dtype: of its tokens.
        cache: folder for the blocks, of this process alone.
        cache_bytes: most bytes that are kept there; the block used longest ago goes first.
    """

    def __init__(self, url: str, size: int, dtype: np.dtype, cache: Path, cache_bytes: int) -> None:
        self.url = url
        self.dtype = dtype
        self._size = size
        self._cache = cache
        self._most = max(1, cache_bytes // BLOCK)
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

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
        """Return a block, memory-mapped from the cache, fetched first where it is not there."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        first = number * BLOCK
        data = fetch(self.url, first, min(first + BLOCK, self._size))
        if len(self._blocks) >= self._most:
            oldest, _ = self._blocks.popitem(last=False)
            self._path(oldest).unlink()
        self._path(number).write_bytes(data)
        self._blocks[number] = np.memmap(self._path(number), dtype=self.dtype, mode="r")
        return self._blocks[number]

    def _path(self, number: int) -> Path:
        return self._cache / f"{self.url.rpartition('/')[2]}.{number}"


def fetch(url: str, first: int = 0, last: int | None = None) -> bytes:
    """Return the bytes from ``first`` to ``last`` of a remote file; UserError where it cannot be reached."""
    try:
        from fsspec.core import url_to_fs

        fs, name = url_to_fs(url)
        data: bytes = fs.cat_file(name, start=first, end=last)
    except Exception as error:  # every file system raises errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url}: cannot be read: {reason[:200]}") from None
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
    cache = Path(tempfile.mkdtemp(prefix="mmrec-tokens-", dir=os.environ.get("MMREC_CACHE")))
    url = url.rstrip("/")
    for name in (MANIFEST, "tokenizer.json"):
        (cache / name).write_bytes(fetch(f"{url}/{name}"))
    manifest: dict[str, Any] | None = read_manifest(cache)
    if manifest is None:
        raise UserError(f"{url}: holds no prepared tokens (no readable {MANIFEST})")
    dtype, sizes = describe_tokens(manifest, cache)
    tokenizer = tokenizer_of(cache, dtype)
    train, val = (
        RemoteTokens(f"{url}/{part}.bin", sizes[f"{part}.bin"], dtype, cache, cache_bytes // 2)
        for part in ("train", "val")
    )
    weakref.finalize(train, shutil.rmtree, cache, ignore_errors=True)
    return TokenFolder(Path(url), manifest, tokenizer, train, val)  # type: ignore[arg-type]
