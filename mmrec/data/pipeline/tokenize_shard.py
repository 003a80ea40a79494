"""One shard to tokens: the work that is done side by side, and skipped where it is done already.

In the work folder, shard 12 becomes ``000012.tokens`` (every document's tokens, each begun by the separator),
``000012.documents`` (a row a document), ``000012.rejected`` (a line of JSON for each record that is not used), and,
once these are whole, ``000012.json`` with the counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.core.files import staged_file, write_file
from mmrec.core.text_files import is_unicode
from mmrec.data.pipeline.json_lines import MOST_FIELDS
from mmrec.data.pipeline.readers import READERS
from mmrec.data.pipeline.records import Record, Rejected, WrongEncodingError, not_in
from mmrec.data.pipeline.shards import Shard
from mmrec.tokenizers import Tokenizer, load_tokenizer

DOCUMENT = np.dtype([("hash", "<u8", 2), ("tokens", "<u8"), ("bytes", "<u8")])
"""A document: 128 bits of the BLAKE2b of its UTF-8, its number of tokens with the separator, its bytes."""
PLAN = "plan.json"


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, whole or not at all."""
    # In ASCII: the name of a file may be bytes that are not UTF-8, which only an escape can spell.
    write_file(path, json.dumps(value))


def read_json(path: Path) -> Any:
    """Return what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def stem(number: int) -> str:
    """Return how the files of shard ``number`` begin."""
    return f"{number:06d}"


def documents(shard: Shard, field: str) -> Iterator[Record]:
    """Yield the records of a shard; texts that are blank or not Unicode are set aside."""
    try:
        for record in READERS[shard.reader](shard, field):
            if isinstance(record, str):
                if not record.strip():
                    record = Rejected("empty", "")
                elif not is_unicode(record):
                    record = Rejected("halves of characters", "")
            yield record
    except WrongEncodingError as error:
        yield not_in(shard.encoding, str(error))


def hash_of(data: bytes) -> np.ndarray:
    """Return 128 bits that tell texts apart, [2] of uint64; the first also decides whether a document validates."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype="<u8")


def tokenize_shard(work: Path, number: int) -> None:
    """Do shard ``number`` of the plan in ``work``, if it is not done yet.

    A UserError is left as a file for the process that started the work, ``000012.failed``: an executor would only
    show where in its own code it met the error.
    """
    done, failed = work / f"{stem(number)}.json", work / f"{stem(number)}.failed"
    if done.exists():
        return
    failed.unlink(missing_ok=True)
    written = tuple((work / name).stat().st_mtime_ns for name in (PLAN, "tokenizer.json"))
    try:
        plan, tokenizer = _job(work, written)
        counts = tokenize(Shard(**plan["shards"][number]), plan["text_field"], tokenizer, work / stem(number))
    except UserError as error:
        write_json(failed, str(error))
        return
    except OSError as error:
        write_json(failed, f"{error.filename or work}: {error.strerror or error}")
        return
    write_json(done, counts)


@lru_cache(maxsize=1)
def _job(work: Path, written: tuple[int, ...]) -> tuple[dict[str, Any], Tokenizer]:
    """Return the plan and the tokenizer that were written at these times: read once for all shards of a process.

    The plan names every shard that there is, and the library keeps what each tokenizer took.
    """
    tokenizer = (work / "tokenizer.json").read_text(encoding="utf-8")
    return read_json(work / PLAN), load_tokenizer(json.loads(tokenizer))


def tokenize(shard: Shard, field: str, tokenizer: Tokenizer, target: Path) -> dict[str, Any]:
    """Write the tokens, documents and rejected records of a shard; return their counts."""
    names = [target.with_suffix(end) for end in (".tokens", ".documents", ".rejected")]
    separator = np.array([tokenizer.separator], dtype=tokenizer.dtype).tobytes()
    reasons: Counter[str] = Counter()
    fields: dict[str, None] = {}
    count = size = total = 0
    with staged_file(names[0]) as tokens, staged_file(names[1]) as rows, staged_file(names[2]) as rest:
        for number, record in enumerate(documents(shard, field), 1):
            if isinstance(record, Rejected):
                reasons[record.reason] += 1
                if len(fields) < MOST_FIELDS:
                    fields.update(dict.fromkeys(record.fields))
                line = {"file": shard.path, "record": number, "where": record.where, "reason": record.reason}
                rest.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                continue
            data = record.encode("utf-8")
            try:
                encoded = tokenizer.encode(record)
            except UserError as error:
                raise UserError(f"{shard.path}: record {number}: {error}") from None
            tokens.write(separator)
            tokens.write(encoded.data)
            rows.write(np.array((hash_of(data), len(encoded) + 1, len(data)), dtype=DOCUMENT).tobytes())
            count, size, total = count + 1, size + len(data), total + len(encoded) + 1
    return {"documents": count, "bytes": size, "tokens": total, "rejected": dict(reasons), "fields": list(fields)}
