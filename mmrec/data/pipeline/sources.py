"""From what a user names to shards: the files that count, and how each is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrec.core.errors import UserError
from mmrec.core.text_files import files_below
from mmrec.core.urls import filesystem, is_url, translate_errors
from mmrec.data.corpora.large import LARGE_CORPORA
from mmrec.data.pipeline.mediawiki import is_multistream, split_dump
from mmrec.data.pipeline.records import suffixes
from mmrec.data.pipeline.shards import Shard

FORMATS = {
    "txt": "text",
    "md": "text",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "parquet": "parquet",
    "tfrecord": "tfrecord",
    "tar": "tar",
    "xml": "mediawiki",
}
"""Reader by the end of a file's name, before that of its compression."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")


def reader_of(path: str) -> str | None:
    """Return the name of the reader for a file, by its name; None where there is none for it."""
    name = path.rpartition("/")[2].lower()
    if name.startswith(".") or "multistream-index" in name:
        return None
    if re.search(r"\.tfrecord-\d+-of-\d+$", name):
        return "tfrecord"
    if name.endswith("_data.xz"):
        return "tar"
    if name.startswith("openwebtext.tar"):
        return "tars"
    # A dump split into files by range is named ".xml-p1p41242.bz2".
    parts = [part.partition("-p")[0] for part in suffixes(path)]
    if parts and parts[-1] in COMPRESSIONS:
        parts.pop()
    return FORMATS.get(parts[-1]) if parts else None


def files_of(corpus: str, url: str) -> list[str]:
    """Return the URLs of the files of a corpus below ``url`` that are read here."""
    # A set on the hub has text files that speak of it.
    readers = LARGE_CORPORA[corpus].readers if corpus in LARGE_CORPORA else ("parquet", "jsonl")
    files = [file for file in _files_below(url) if reader_of(file) in readers]
    if not files:
        raise UserError(f"{url}: no file of a format that is read here")
    return files


def find_shards(corpus: str | None, paths: Sequence[str]) -> list[Shard]:
    """Return the shards of ``paths``, in an order that does not change.

    Args:
        corpus: name of one of :data:`LARGE_CORPORA`, or None for one's own files.
        paths: files and folders, local or remote.

    Raises:
        UserError: a path is missing, of no known format, or no file is found.
    """
    source = LARGE_CORPORA.get(corpus or "")
    shards: list[Shard] = []
    for path in paths:
        files = [str(path)] if not _is_folder(path) else _files_below(path)
        known = [(file, kind) for file in files if (kind := reader_of(file)) is not None]
        if source is not None:
            known = [(file, kind) for file, kind in known if kind in source.readers]
        if not known:
            formats = source.readers if source is not None else sorted({f".{name}" for name in FORMATS})
            raise UserError(f"{path}: no file of a format that is read here ({', '.join(formats)})")
        for file, kind in known:
            shards.extend(_parts(file, kind, files))
    if source is not None and source.val is not None:
        pattern = re.compile(source.val)
        own = [bool(pattern.search(shard.path.rpartition("/")[2])) for shard in shards]
        if any(own) and not all(own):
            shards = [
                Shard(s.reader, s.path, s.first, s.last, "val" if val else "train")
                for s, val in zip(shards, own, strict=True)
            ]
    return shards


def _parts(file: str, kind: str, files: Sequence[str]) -> list[Shard]:
    """Return the shards of one file: one, or several where an index beside it says where it can be cut."""
    if kind == "mediawiki" and is_multistream(file):
        folder, _, name = file.rpartition("/")
        stem = name.replace("multistream", "multistream-index")
        names = [stem, re.sub(r"\.xml([^.]*)\.bz2$", r".txt\1.bz2", stem), re.sub(r"\.xml.*$", ".txt", stem)]
        beside = [f"{folder}/{name}" if folder else name for name in names]
        index = next((name for name in beside if name in files or _exists(name)), None)
        if index is not None:
            return split_dump(file, index)
    return [Shard(kind, file)]


def _is_folder(path: str) -> bool:
    if is_url(path):
        return bool(_remote(path, lambda fs, inner: fs.isdir(inner)))
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    return Path(path).is_dir()


def _exists(path: str) -> bool:
    return bool(_remote(path, lambda fs, inner: fs.exists(inner))) if is_url(path) else Path(path).exists()


def _files_below(path: str) -> list[str]:
    """Return the files of a folder and its subfolders, sorted; hidden ones are left out."""
    if is_url(path):
        scheme = path.partition("://")[0]
        found = _remote(path, lambda fs, inner: fs.find(inner))
        return sorted(f"{scheme}://{name}" for name in found)
    return sorted(str(file) for file in files_below(path))


def _remote(path: str, ask: Callable[..., Any]) -> Any:
    """Return what ``ask`` finds out on a remote file system; UserError where that cannot be reached."""
    fs, inner = filesystem(path)
    with translate_errors(path):
        return ask(fs, inner)
