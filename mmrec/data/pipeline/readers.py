"""One function a format: from a shard to its records, in their order, in bounded memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import
from mmrec.data.pipeline.archives import read_tar, read_tar_of_tars
from mmrec.data.pipeline.json_lines import read_json_lines
from mmrec.data.pipeline.mediawiki import read_mediawiki
from mmrec.data.pipeline.records import (
    LONGEST,
    CutShort,
    Record,
    Rejected,
    as_utf8,
    check_expansion,
    decode,
    naming,
    open_raw,
    open_shard,
)
from mmrec.data.pipeline.shards import Shard

ZERO_BYTE = "a zero byte: it is binary, or in UTF-16 (--encoding utf-16 reads that)"
"""Why a plain text is rejected that no text editor has written in UTF-8."""
PIECE = 1 << 20
"""Bytes of a text file that make one document, where the file is longer."""

ROWS = 8
"""Rows of a Parquet file that are held at once; each may be of LONGEST bytes."""


def read_text_file(shard: Shard, field: str) -> Iterator[Record]:
    """A plain text file: one document, or, of a long file, documents of about a megabyte that end at line ends.

    A line of more than ``LONGEST`` bytes is cut between two characters.
    """
    start, half = 0, b""
    with open_shard(shard.path) as raw, as_utf8(raw, shard.encoding) as file:
        while data := half + file.read(PIECE):
            half = b""
            if len(data) >= PIECE:
                rest = file.readline(LONGEST)
                data += rest
                if len(rest) == LONGEST:
                    end = _whole_characters(data)
                    data, half = data[:end], data[end:]
            where = f"byte {start}"
            yield Rejected(ZERO_BYTE, where) if b"\0" in data else decode(data, where)
            start += len(data)


def read_parquet(shard: Shard, field: str) -> Iterator[Record]:
    """A Parquet file; the text is in the column ``field``."""
    parquet = optional_import("pyarrow.parquet")
    with open_raw(shard.path) as file, naming(shard.path):
        _check_column(shard.path, parquet.read_schema(file), field)
        packed = file.seek(0, 2)
        # By default whole columns of a row group are fetched at once: a file may be one row group.
        bounded = {"buffer_size": PIECE, "pre_buffer": False}
        table = parquet.ParquetFile(file, **bounded)
        check_expansion(sum(table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)), packed)
        # The same with repeated texts as references to one: slow, as every batch has its own copy of that one.
        referring = parquet.ParquetFile(file, **bounded, read_dictionary=[field])
        row = size = 0
        for group in range(table.num_row_groups):
            source = referring if _longest_repeated(referring, group, field) > LONGEST else table
            for batch in source.iter_batches(ROWS, row_groups=[group], columns=[field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    size += len(text) if isinstance(text, str | bytes) else 0
                    check_expansion(size, packed)
                    if isinstance(text, str | bytes) and len(text) > LONGEST:
                        yield Rejected("longer than 32 MiB", f"row {row}")
                    elif isinstance(text, bytes):
                        yield decode(text, f"row {row}")
                    else:
                        yield text if text is not None else Rejected(f"no text in {field}", f"row {row}")


def _check_column(path: str, schema: Any, field: str) -> None:
    """Raise UserError where the column ``field`` is missing or holds no text: strings, or bytes of UTF-8."""
    kinds = optional_import("pyarrow.types")

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
        return any(getattr(kinds, f"is_{name}", lambda kind: False)(kind) for name in names)

    if field not in schema.names:
        columns = (column.name if is_text(column.type) else f"{column.name} ({column.type})" for column in schema)
        raise UserError(f"{path}: has no column {field!r}, but {', '.join(columns)}; name one by --text_field")
    kind = schema.field(field).type
    if not is_text(kind):
        others = ", ".join(column.name for column in schema if is_text(column.type))
        hint = f"name a column of text by --text_field: {others}" if others else "no column of it holds text"
        raise UserError(f"{path}: the column {field!r} is of type {kind}, not text; {hint}")


def _longest_repeated(table: Any, group: int, field: str) -> int:
    """Return the bytes of the longest text that rows of a row group refer to: each of a batch may be that one."""
    compute = optional_import("pyarrow.compute")
    batch = next(table.iter_batches(1, row_groups=[group], columns=[field], use_threads=False), None)
    texts = None if batch is None else getattr(batch.column(0), "dictionary", None)
    return 0 if texts is None else compute.max(compute.binary_length(texts)).as_py() or 0


def read_tfrecord(shard: Shard, field: str) -> Iterator[Record]:
    """Records of tf.Example, as TensorFlow Datasets writes them, without TensorFlow; checksums are checked.

    Each record is its length (8 bytes, little-endian), a masked CRC-32C of that, the data, and one of them.
    """
    example = optional_import("tfrecord.example_pb2").Example
    crc = optional_import("google_crc32c").value

    def check(data: bytes, expected: bytes) -> None:
        value = crc(data)
        masked = ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if struct.pack("<I", masked) != expected:
            raise CutShort(f"wrong checksum in record {number}")

    with open_shard(shard.path) as file:
        number = 0
        while head := file.read(12):
            number += 1
            if len(head) < 12:
                raise CutShort(f"ends inside record {number}")
            check(head[:8], head[8:])
            (length,) = struct.unpack("<Q", head[:8])
            where = f"record {number}"
            if length > LONGEST:
                _skip(file, length + 4)
                yield Rejected("longer than 32 MiB", where)
                continue
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise CutShort(f"ends inside record {number}")
            check(data[:-4], data[-4:])
            try:
                features = example.FromString(data[:-4]).features.feature
            except Exception:  # protobuf's DecodeError, wherever its version keeps it
                yield Rejected("not a tf.Example", where)
                continue
            values = features[field].bytes_list.value if field in features else []
            yield decode(values[0], where) if values else Rejected(f"no text in {field}", where)


READERS: dict[str, Callable[[Shard, str], Iterator[Record]]] = {
    "text": read_text_file,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "tfrecord": read_tfrecord,
    "tar": read_tar,
    "tars": read_tar_of_tars,
    "mediawiki": read_mediawiki,
}


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0:
        part = file.read(min(size, PIECE))
        if not part:
            raise CutShort("ends inside a record")
        size -= len(part)


def _whole_characters(data: bytes) -> int:
    """Return how much of ``data``, UTF-8, stands before a character at its end whose last bytes are missing."""
    for back in (1, 2, 3):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # a character begins with it
            size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if size > back else len(data)
    return len(data)
