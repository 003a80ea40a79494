"""JSON lines: an object a line, its text in one of its fields."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from mmrec.core.optional import optional_import
from mmrec.data.pipeline.records import LONGEST, Record, Rejected, as_utf8, open_shard
from mmrec.data.pipeline.shards import Shard

MOST_FIELDS = 12
"""Names of fields that are reported of a record without the text."""
ARRAY = "a JSON array instead of a record a line (jq -c '.[]' makes lines of it)"
SPREAD = "JSON over several lines instead of a record a line (jq -c . makes lines of it)"
UTF16 = "UTF-16 instead of UTF-8 (--encoding utf-16 reads it)"
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s"\[\]{}:,]+)', re.DOTALL)


def read_json_lines(shard: Shard, field: str) -> Iterator[Record]:
    """A file of JSON lines; the text is in ``field``, or, as "a.b", in b of the object a."""
    with open_shard(shard.path) as raw, as_utf8(raw, shard.encoding) as file:
        yield from json_records(file, field)


def json_records(file: IO[bytes], field: str, prefix: str = "") -> Iterator[Record]:
    """Yield the records of a file of JSON lines; a file in another form is one rejected record that says so."""
    first = True
    for number, line in enumerate(_lines(file), 1):
        where = f"{prefix}line {number}"
        if line is None:
            yield Rejected("longer than 32 MiB", where)
            continue
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield Rejected(UTF16, where)
                return
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = parse_json(line, field)
        except ValueError:
            if first and line.lstrip()[:1] in (b"[", b"{") and not line.rstrip().endswith((b"}", b"]")):
                begun = line.strip()
                if begun in (b"[", b"{", b"[{") or begun.endswith((b",", b"[", b"{", b":")):
                    yield Rejected(ARRAY if begun.startswith(b"[") else SPREAD, where)
                    return
            yield Rejected("not JSON", where)
        else:
            if first and isinstance(record, list):
                yield Rejected(ARRAY, where)
                return
            yield text_of(record, field, where)
        first = False


def parse_json(line: bytes, field: str) -> Any:
    """Return the value of a line.

    The fast parser refuses what many programs write: NaN and Infinity, halves of surrogate pairs, deep nesting. The
    standard library reads these; of an object that is nested too deep even for it, ``field`` alone is read.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return optional_import("orjson").loads(line)
    except ValueError:
        pass
    try:
        return json.loads(line)
    except RecursionError:
        return _top_level(line.decode("utf-8"), field)


def text_of(record: Any, field: str, where: str) -> Record:
    """Return the text of a record, or why it has none."""
    if not isinstance(record, dict):
        return Rejected(f"no text in {field}", where)
    value = record.get(field)
    if value is None:
        value = record
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, str):
        return value
    return Rejected(f"no text in {field}", where, _fields(record))


def _fields(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a record's fields, those of an inner object as "a.b", with the kind of what is no text."""
    names: list[str] = []
    for name, value in list(record.items())[:MOST_FIELDS]:
        inner = [f"{name}.{key}" for key in list(value)[:MOST_FIELDS]] if isinstance(value, dict) else []
        kind = {list: "list", type(None): "null", bool: "number", int: "number", float: "number"}.get(type(value))
        names += inner or [f"{name} ({kind})" if kind else name]
    return tuple(names[:MOST_FIELDS])


def _top_level(text: str, field: str) -> dict[str, Any]:
    """Return ``field`` of an object, found without recursion; ValueError where brackets or quotes do not match."""
    found: dict[str, Any] = {}
    depth, key, place = 0, None, 0
    expects_key = False
    while match := _TOKEN.match(text, place):
        token, place = match[1], match.end()
        if token in "[{":
            depth += 1
            expects_key = depth == 1 and token == "{"
        elif token in "]}":
            depth -= 1
            if depth < 0:
                break
        elif depth == 1 and token == ",":
            expects_key = True
        elif depth == 1 and token[0] == '"':
            if expects_key:
                key, expects_key = json.loads(token), False
            elif key == field:
                found[field] = json.loads(token)
    if depth or text[place:].strip():
        raise ValueError("brackets do not match")
    return found


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for one that is too long to hold."""
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
            pass
        yield None
