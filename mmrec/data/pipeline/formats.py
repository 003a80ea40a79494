"""Which reader reads a file, by its name; the same rule for files, folders and the members of an archive."""

from __future__ import annotations

import re

from mmrec.core.text_files import ENDS
from mmrec.data.pipeline.records import suffixes

FORMATS = {
    "txt": "text",
    "text": "text",
    "md": "text",
    "markdown": "text",
    "rst": "text",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "parquet": "parquet",
    "tfrecord": "tfrecord",
    "tar": "tar",
    "tgz": "tar",
    "xml": "mediawiki",
}
"""Reader by the end of a file's name, in any case, before that of its compression."""
COMPRESSIONS = (*ENDS.values(),)


def reader_of(path: str) -> str | None:
    """Return the name of the reader for a file, by its name; None where there is none for it."""
    name = path.rpartition("/")[2].lower()
    if is_hidden(name) or "multistream-index" in name:
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


def is_packed(path: str) -> bool:
    """Whether a file is compressed, by its name."""
    return any(part in COMPRESSIONS for part in suffixes(path)[-1:])


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden, or macOS keeps notes of its own there."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..", "")) or part == "__MACOSX" for part in parts)


def why_skipped(path: str) -> str:
    """Return why a file has no reader."""
    if is_hidden(path.rpartition("/")[2]):
        return "hidden"
    if "multistream-index" in path:
        return "index of a dump"
    if is_packed(path):
        return "packed, and not named after what it holds, as NAME.txt.gz"
    return "no format that is read"
