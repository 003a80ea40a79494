"""Large corpora in small: files in the exact layouts of their makers, and what a preparation made of them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from xml.sax.saxutils import escape

import numpy as np
import pytest

from mmrec.data.store import TokenFolder


def texts(count: int = 120) -> list[str]:
    """Documents of real text: paragraphs of Python's own help."""
    paragraphs = [part for name in sorted(topics) for part in str(topics[name]).split("\n\n") if len(part) > 40]
    return list(dict.fromkeys(paragraphs))[:count]


def write_json_lines(path: Path, documents: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def tar_of(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_openwebtext(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    subsets = {}
    for k in range(2):
        inner = {f"{i:07d}-{k}abc.txt": text.encode() for i, text in enumerate(documents[k::2])}
        subsets[f"openwebtext/urlsf_subset{k:02d}-{k}_data.xz"] = tar_of(inner | {f"{k}.lock": b""})
    (folder / "openwebtext.tar.xz").write_bytes(tar_of(subsets))
    return folder / "openwebtext.tar.xz"


def record_of(text: str | bytes | None) -> bytes:
    """A record of a tfrecord file, as TensorFlow Datasets writes C4."""
    crc = pytest.importorskip("google_crc32c").value
    example = pytest.importorskip("tfrecord.example_pb2").Example()
    if text is not None:
        value = text.encode() if isinstance(text, str) else text
        example.features.feature["text"].bytes_list.value.append(value)
    example.features.feature["url"].bytes_list.value.append(b"http://example.org")

    def masked(data: bytes) -> bytes:
        value = crc(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    data: bytes = example.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table({column: arrow.array(documents, arrow.string()), "id": list(range(len(documents)))})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=50)


WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename></siteinfo>
"""


def page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    tag = '<redirect title="x" />' if redirect else ""
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{tag}<revision><id>2</id>"
        f'<text bytes="1" xml:space="preserve">{escape(text)}</text></revision></page>\n'
    )


def write_wikipedia(folder: Path, articles: list[str]) -> Path:
    """A multistream dump with its index: a stream for the head, then one for every ten pages, then the end."""
    folder.mkdir(parents=True, exist_ok=True)
    dump, index = bz2.compress(WIKI.encode()), ""
    for first in range(0, len(articles), 10):
        some = "".join(page(f"T{first + i}", text) for i, text in enumerate(articles[first : first + 10]))
        some += page("Talk:T", "chat", namespace=1) + page("Old", "#REDIRECT [[T]]", redirect=True)
        index += "".join(f"{len(dump)}:{i}:T{i}\n" for i in range(first, min(first + 10, len(articles))))
        dump += bz2.compress(some.encode())
    dump += bz2.compress(b"</mediawiki>\n")
    path = folder / "enwiki-latest-pages-articles-multistream.xml.bz2"
    path.write_bytes(dump)
    (folder / "enwiki-latest-pages-articles-multistream-index.txt.bz2").write_bytes(bz2.compress(index.encode()))
    return path


def tokens_of(folder: Path) -> dict[str, str]:
    """Digests of what a preparation wrote."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def split_at_separator(tokens: TokenFolder, part: str) -> list[str]:
    values = np.asarray(getattr(tokens, part))
    separator = tokens.tokenizer.separator
    assert separator is not None
    assert values[0] == separator
    pieces = np.split(values, np.flatnonzero(values == separator))[1:]
    return [tokens.tokenizer.decode(piece[1:]) for piece in pieces]
