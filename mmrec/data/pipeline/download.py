"""Fetching the files of a corpus: going on where a download stopped, and checking what arrived."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import
from mmrec.core.urls import filesystem, translate_errors, why

BLOCK = 1 << 20
ATTEMPTS = 5
"""Times that a file is tried without a single new byte, before it is given up."""
VERSIONS = ("ETag", "Last-Modified", "LastModified", "etag", "updated", "blob_id")
"""What the file systems of fsspec call the marks of a version: of web servers, object storage, Hugging Face."""
PATIENCE = 1.0
"""Seconds before the second attempt; each later one waits twice as long."""


def download(urls: Sequence[str], folder: Path, base: str = "") -> list[str]:
    """Fetch files that are not there yet, and return their local paths.

    A file arrives as NAME.part, which a later call goes on with from its last byte (from its first, where the server
    sends nothing but the whole), unless the server has another file by then. It gets its name once its size, and its
    sha256, where the server tells it, is right.

    Args:
        urls: of any file system that fsspec knows: https, hf, s3, gs.
        folder: where they are kept; made where it is missing.
        base: what the URLs begin with; the rest is the path in ``folder``. Only their names are kept if left out.

    Raises:
        UserError: a server cannot be reached or sends something else, or the disk has too little room.
    """
    wanted = []
    for url in urls:
        fs, name = filesystem(url)
        with translate_errors(url):
            info = fs.info(name)
        if info.get("size") is None:
            folder.mkdir(parents=True, exist_ok=True)
            raise UserError(f"{url}: the server does not say how long the file is; fetch it by hand into {folder}")
        inside = url.removeprefix(base).lstrip("/") if base and url.startswith(base) else url.rpartition("/")[2]
        if ".." in inside.split("/"):
            raise UserError(f"{url}: a file outside of its folder is not fetched")
        wanted.append((url, fs, name, info, folder / inside))
    folder.mkdir(parents=True, exist_ok=True)
    left = [item for item in wanted if not item[4].exists() or item[4].stat().st_size != item[3]["size"]]
    size = sum(info["size"] for _, _, _, info, _ in left)
    there = sum(part.stat().st_size for *_, path in left if (part := _part(path)).exists())
    room = shutil.disk_usage(folder).free
    if size - there > room:
        raise UserError(f"{folder}: {size - there:,} bytes are to be fetched, and there is room for {room:,}")
    if left:
        print(f"{len(left):,} files to fetch into {folder}: {size - there:,} bytes left of {size:,}")
    with tqdm(
        total=size,
        initial=there,
        unit="B",
        unit_scale=True,
        desc="downloading",
        disable=not left or not sys.stderr.isatty(),
    ) as bar:
        for url, fs, name, info, path in left:
            _fetch(url, fs, name, info, path, bar)
    return [str(path) for *_, path in wanted]


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _version(info: dict[str, Any]) -> str:
    """Return what a server says by which one version of a file differs from another."""
    return "\n".join(f"{name} {info[name]}" for name in ("size", *VERSIONS) if info.get(name) is not None)


def _fetch(url: str, fs: Any, name: str, info: dict[str, Any], path: Path, bar: tqdm[Any]) -> None:
    part, attempt = _part(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    noted, version = part.with_name(f"{part.name}.version"), _version(info)
    if noted.exists() and noted.read_text(encoding="utf-8") != version:
        part.unlink(missing_ok=True)
    noted.write_text(version, encoding="utf-8")
    part.touch()
    by_ranges = bool(info.get("partial", True))
    while True:
        before = part.stat().st_size
        if before == info["size"]:
            break
        if before > info["size"]:
            os.truncate(part, 0)
            continue
        done = before if by_ranges else 0
        bar.update(done - before)
        try:
            with open(part, "ab") as target, _opened(fs, name, info, by_ranges) as file:
                file.seek(done)
                target.truncate(done)
                while data := file.read(min(BLOCK, info["size"] - done)):
                    target.write(data)
                    bar.update(len(data))
                    done += len(data)
                target.flush()
                os.fsync(target.fileno())
            problem = "the server sent less than it said"
        except OSError as error:
            if error.errno is not None and error.filename == str(part):
                raise
            problem = why(error)
        except Exception as error:  # every file system raises errors of its own
            problem = why(error)
            if isinstance(error, ValueError) and by_ranges and "https" in fs.protocol:
                by_ranges = False  # fsspec's word for a server that sends a file as a whole or not at all
                continue
        after = part.stat().st_size
        attempt = 0 if after > before else attempt + 1
        if after != info["size"] and attempt >= ATTEMPTS:
            raise UserError(f"{url}: {problem}; {after:,} of {info['size']:,} bytes are kept, try again later")
        if after < info["size"]:
            time.sleep(PATIENCE * 2**attempt)
    expected = _sha256(info)
    if expected is not None:
        with open(part, "rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() != expected:
                part.unlink()
                noted.unlink()
                raise UserError(
                    f"{url}: what arrived has another sha256 than the server says; it was deleted, try again"
                )
    os.replace(part, path)
    noted.unlink()


def _opened(fs: Any, name: str, info: dict[str, Any], by_ranges: bool) -> Any:
    """Return a remote file, opened; one that is not read by ranges may take hours, but no minute without a byte."""
    if by_ranges:
        return fs.open(name, "rb", block_size=4 * BLOCK, cache_type="readahead")
    timeout = optional_import("aiohttp").ClientTimeout(total=None, sock_read=60)
    return fs.open(name, "rb", block_size=0, size=info["size"], timeout=timeout)


def _sha256(info: dict[str, Any]) -> str | None:
    """Return the sha256 that a server gives: Hugging Face's does, for its large files."""
    lfs = info.get("lfs")
    value = getattr(lfs, "sha256", None) or (lfs.get("sha256") if isinstance(lfs, dict) else None)
    return str(value) if value else None
