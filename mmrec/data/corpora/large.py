"""The corpora that are read shard by shard, by name: what they are and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "hf:"
"""Begins the name of a data set of Hugging Face: hf:OWNER/NAME."""


@dataclass(frozen=True)
class LargeCorpus:
    """A corpus that outgrows memory.

    Attributes:
        title: its name in messages.
        readers: of the formats that it is published in.
        url: where its files are, as fsspec or a browser knows it.
        files: their names, for a message.
        val: pattern of the names of its own validation files, where it has such.
    """

    title: str
    readers: tuple[str, ...]
    url: str
    files: str
    val: str | None = None


LARGE_CORPORA = {
    "openwebtext": LargeCorpus(
        "OpenWebText",
        ("tars", "tar", "parquet"),
        "hf://datasets/Skylion007/openwebtext",
        "openwebtext.tar.xz or train-*.parquet",
    ),
    "wikipedia": LargeCorpus(
        "Wikipedia",
        ("mediawiki", "parquet"),
        "hf://datasets/wikimedia/wikipedia/20231101.en",
        "*-pages-articles-multistream.xml.bz2 and its index, or train-*.parquet",
    ),
    "c4": LargeCorpus(
        "C4",
        ("jsonl", "tfrecord"),
        "hf://datasets/allenai/c4/en",
        "c4-train.*.json.gz and c4-validation.*.json.gz, or the tfrecord files",
        r"c4-validation\.",
    ),
}
