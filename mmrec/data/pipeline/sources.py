"""From what a user names to shards: the files that count, and how each is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrec.core.errors import UserError
from mmrec.core.text_files import files_below
from mmrec.core.urls import filesystem, is_url, translate_errors
from mmrec.data.corpora.large import LARGE_CORPORA, LargeCorpus
from mmrec.data.pipeline.formats import FORMATS, reader_of, why_skipped
from mmrec.data.pipeline.mediawiki import is_multistream, split_dump
from mmrec.data.pipeline.shards import Shard
from mmrec.data.provenance import NAMED_BEFORE, Provenance, skipped_line
from mmrec.data.store import written_by_prepare


def files_of(corpus: str, url: str) -> list[str]:
    """Return the URLs of the files of a corpus below ``url`` that are read here."""
    # A set on the hub has text files that speak of it.
    readers = LARGE_CORPORA[corpus].readers if corpus in LARGE_CORPORA else ("parquet", "jsonl")
    files = [file for file in _files_below(url) if reader_of(file) in readers]
    if not files:
        raise UserError(f"{url}: no file of a format that is read here")
    return files


def find_shards(corpus: str | None, paths: Sequence[str]) -> tuple[list[Shard], Provenance]:
    """Return the shards of ``paths``, in an order that does not change, and the files that are skipped.

    Args:
        corpus: name of one of ``LARGE_CORPORA``, or None for one's own files.
        paths: files and folders, local or remote.

    Raises:
        UserError: a path is missing, of no known format, or no file is found.
    """
    source = LARGE_CORPORA.get(corpus or "")
    shards: list[Shard] = []
    provenance = Provenance()
    seen: set[str] = set()
    for path in paths:
        skipped = Provenance()
        files = [str(path)] if not _is_folder(path) else _files_below(path, skipped)
        known: list[tuple[str, str]] = []
        named_before = 0
        for file in files:
            kind = reader_of(file)
            place = file if is_url(file) else os.path.realpath(file)
            if place in seen:
                named_before += 1
                skipped.skip(file, NAMED_BEFORE)
            elif kind is None or (source is not None and kind not in source.readers):
                skipped.skip(file, why_skipped(file) if kind is None else f"no format of {corpus}")
            else:
                seen.add(place)
                known.append((file, kind))
        if not known and not named_before:
            formats = source.readers if source is not None else sorted({f".{name}" for name in FORMATS})
            there = skipped_line(skipped.rows, "")
            raise UserError(
                f"{path}: no file of a format that is read here ({', '.join(formats)})" + (there and f"; {there}")
            )
        provenance.rows += skipped.rows
        for file, kind in known:
            shards.extend(_parts(file, kind, files))
    return _own_parts(shards, source), provenance


def _own_parts(shards: list[Shard], source: LargeCorpus | None) -> list[Shard]:
    """Return the shards with "val" and "train" where the corpus has validation files of its own."""
    if source is None or source.val is None:
        return shards
    pattern = re.compile(source.val)
    own = [bool(pattern.search(shard.path.rpartition("/")[2])) for shard in shards]
    if not any(own) or all(own):
        return shards
    return [replace(shard, part="val" if val else "train") for shard, val in zip(shards, own, strict=True)]


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


def _files_below(path: str, skipped: Provenance | None = None) -> list[str]:
    """Return the files of a folder and its subfolders, sorted; hidden ones are left out, and noted in ``skipped``."""
    if is_url(path):
        scheme = path.partition("://")[0]
        found = _remote(path, lambda fs, inner: fs.find(inner))
        return sorted(name if is_url(name) else f"{scheme}://{name}" for name in found)
    noted = Provenance() if skipped is None else skipped
    found = files_below(path, lambda file, reason: noted.skip(str(file), reason), written_by_prepare)
    return sorted(map(str, found))


def _remote(path: str, ask: Callable[..., Any]) -> Any:
    """Return what ``ask`` finds out on a remote file system; UserError where that cannot be reached."""
    fs, inner = filesystem(path)
    with translate_errors(path):
        return ask(fs, inner)
