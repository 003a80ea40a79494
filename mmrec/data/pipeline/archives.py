"""Tars of texts, read as a stream and never unpacked; their members count by the same rule as files."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from mmrec.data.pipeline.formats import is_hidden, reader_of, why_skipped
from mmrec.data.pipeline.json_lines import json_records
from mmrec.data.pipeline.records import (
    LONGEST,
    Record,
    Rejected,
    WrongEncodingError,
    as_utf8,
    decode,
    decompressed,
    naming,
    not_in,
    open_shard,
)
from mmrec.data.pipeline.shards import Shard


def read_tar(shard: Shard, field: str) -> Iterator[Record]:
    """A tar: its text files, a document each, and its files of JSON lines, compressed or not."""
    with open_shard(shard.path) as file:
        yield from _members(file, shard, field, shard.path, "")


def read_tar_of_tars(shard: Shard, field: str) -> Iterator[Record]:
    """A tar that holds compressed tars of texts, as openwebtext.tar.xz."""
    with open_shard(shard.path) as file, tarfile.open(fileobj=file, mode="r|") as outer:
        for part in outer:
            content = outer.extractfile(part) if part.isfile() and part.name.endswith("_data.xz") else None
            if content is None:
                if not part.isdir():
                    yield Rejected("no format that is read", part.name)
                continue
            name = f"{shard.path}:{part.name}"
            with naming(name), decompressed(content, part.name) as inner:
                yield from _members(inner, shard, field, name, f"{part.name}/")


def _members(file: IO[bytes], shard: Shard, field: str, path: str, prefix: str) -> Iterator[Record]:
    """Yield the records of the members of the tar ``path``; ``prefix`` stands before their names in messages."""
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            where = f"{prefix}{member.name}"
            if member.isdir():
                continue
            content = archive.extractfile(member) if member.isfile() else None
            kind = reader_of(member.name)
            if content is None:
                yield Rejected("no file but a link or a device", where)
            elif is_hidden(member.name):
                yield Rejected("hidden", where)
            elif kind == "text":
                yield _text(content, member, f"{path}:{member.name}", where, shard.encoding)
            elif kind == "jsonl":
                yield from _json(content, member, f"{path}:{member.name}", where, shard.encoding, field)
            else:
                reason = why_skipped(member.name) if kind is None else "no format that is read inside of an archive"
                yield Rejected(reason, where)


def _json(
    content: IO[bytes], member: tarfile.TarInfo, path: str, where: str, encoding: str, field: str
) -> Iterator[Record]:
    """Yield the records of a member of JSON lines."""
    with naming(path), decompressed(content, member.name) as raw, as_utf8(raw, encoding) as lines:
        try:
            yield from json_records(lines, field, f"{where}: ")
        except WrongEncodingError as error:
            yield not_in(encoding, f"{where}: {error}")


def _text(content: IO[bytes], member: tarfile.TarInfo, path: str, where: str, encoding: str) -> Record:
    """Return the text of a member."""
    if member.size > LONGEST:
        return Rejected("longer than 32 MiB", where)
    with naming(path), decompressed(content, member.name) as file:
        data = file.read(LONGEST + 1)
    return Rejected("longer than 32 MiB", where) if len(data) > LONGEST else decode(data, where, encoding)
