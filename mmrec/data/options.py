"""The options of ``mmrec prepare``, which validate themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrec.core.errors import UserError, nearest

EXECUTORS = ("local", "ray", "slurm")
"""Where the shards of a large corpus are tokenized."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of ``mmrec prepare``.

    Args:
        corpus: tiny_shakespeare, shakespeare_plays, sample, file or directory; openwebtext, wikipedia, c4 or
            hf:OWNER/NAME; or the first of your own files and folders. May be left out where --input_file or
            --input_dir is given.
        paths: files and folders, local or s3://, gs://, https://; large corpora are downloaded if left out. For the
            corpus "file": text files, which are held in memory together.
        output_dir: folder to write; data/CORPUS if left out. It must be new, empty, or hold this very corpus.
        input_file: your own text, for the corpus "file".
        input_dir: folder of your own texts, searched with its subfolders, for the corpus "directory".
        val_split: share of the text that validates. If left out: 0.2 under 1 MB, 0.05 from 1 GB on, else 0.1.
        tokenizer: characters, bytes or bpe; or the path of an existing one: a token folder, a
            tokenizer.json (also GPT-2's), or a model that mmrec export wrote as safetensors. If left out: characters
            for Shakespeare, bpe for openwebtext, wikipedia and c4, bytes for other text.
        vocab_size: number of tokens, for bpe only; if left out 4096, or 32768 for a large corpus.
        encoding: of your own files: of text, of JSON lines, and of those in tars.
        glob: names of the files that count, for --input_dir; those of text files (.txt, .md, ...) if left out.
        mirror: folder or URL that holds the corpus's file, used instead of the internet.
        text_field: name of the text in JSON, Parquet and tf.Example records.
        drop_duplicates: keep one of several documents with the same text (large corpora).
        executor: local, ray (a cluster that RAY_ADDRESS names) or slurm, for large corpora.
        workers: shards of a large corpus that are tokenized at once; as many as there are cores if left out.
        slurm: options of the Slurm jobs, as {partition: cpu, time: "4:00:00"}.
        force: replace another token folder at output_dir.
        verify: only check that the files of output_dir are as they were written.

    Raises:
        UserError: a value is out of its range, or two options exclude each other.
    """

    corpus: str | None = None
    paths: Sequence[str] = ()
    output_dir: Path | None = None
    input_file: Path | None = None
    input_dir: Path | None = None
    val_split: float | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    encoding: str = "utf-8"
    glob: str | None = None
    mirror: str | None = None
    text_field: str = "text"
    drop_duplicates: bool = False
    executor: str = "local"
    workers: int | None = None
    slurm: dict[str, str] | None = None
    force: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.input_file is not None and self.input_dir is not None:
            raise UserError("give either --input_file or --input_dir, not both")
        if self.val_split is not None and not 0 < self.val_split < 1:
            raise UserError(f"--val_split is {self.val_split}; it must lie between 0 and 1, for example 0.1")
        if self.executor not in EXECUTORS:
            known = f"{', '.join(EXECUTORS)}{nearest(self.executor, EXECUTORS)}"
            raise UserError(f"unknown --executor {self.executor!r}; known: {known}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it must be at least 1")

    def changed(self, *names: str) -> list[str]:
        """Return which of the options ``names`` have another value than their default."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]
