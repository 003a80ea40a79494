"""``mmrec prepare`` for corpora that outgrow memory: plan, tokenize shard by shard, merge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmrec.core.errors import UserError, nearest
from mmrec.core.optional import optional_import
from mmrec.core.urls import filesystem, is_url, translate_errors
from mmrec.data.pipeline.download import download
from mmrec.data.pipeline.executors import EXECUTORS, run_shards
from mmrec.data.pipeline.merge import Shards, counts_table, merge
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.sources import HUB, SOURCES, files_of, find_shards
from mmrec.data.pipeline.tokenize_shard import PLAN, documents, hash_of, read_json, write_json
from mmrec.data.store import TokenFolder, open_tokens, read_manifest
from mmrec.tokenizers import TOKENIZERS, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from mmrec.tokenizers.loading import read_tokenizer

DEFAULT_SPLIT = 0.05
LARGE_VOCABULARY = 32_768
"""Of BPE for the named corpora, where no other size is asked for."""
SAMPLE_SHARDS, SAMPLE_BYTES = 16, 1 << 21
"""BPE is learned from the first documents of so many shards, so many bytes of each."""


def prepare_large(
    corpus: str | None,
    paths: Sequence[str],
    output_dir: Path,
    val_split: float | None,
    tokenizer: str | None,
    vocab_size: int | None,
    text_field: str,
    drop_duplicates: bool,
    engine: str,
    workers: int | None,
    slurm: dict[str, str],
    force: bool,
) -> TokenFolder | None:
    """Prepare a corpus of any size. What is done is kept, and the same command goes on after a stop.

    Args:
        corpus: one of :data:`~mmrec.data.pipeline.sources.SOURCES`, ``hf:OWNER/NAME``, or None for one's own files.
        paths: files and folders, local or remote; none to download the corpus.
        output_dir: the token folder; beside it, NAME.work holds what is done so far.
        val_split: share of the documents that validate, chosen by a hash of their text.
        tokenizer: bytes, bpe, or the path of one that is there already.
        vocab_size: for bpe.
        text_field: of JSON, Parquet and tf.Example.
        drop_duplicates: keep one of documents with the same text.
        engine: local, ray or slurm.
        workers: shards that are worked on at once; as many as there are cores if None.
        slurm: options for Slurm.
        force: replace the token folder that is there, and what is done of another one.

    Returns:
        The token folder, or None where Slurm has yet to do the work.
    """
    if engine not in EXECUTORS:
        raise UserError(f"unknown --engine {engine!r}; known: {', '.join(EXECUTORS)}{nearest(engine, EXECUTORS)}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    optional_import("datatrove")
    source = SOURCES.get(corpus or "")
    title = source.title if source else corpus or f"the texts of {', '.join(Path(path).name for path in paths[:3])}"
    if not paths:
        paths = _downloaded(corpus or "", output_dir)
    shards = find_shards(corpus, paths)
    name = tokenizer or ("bpe" if source else "bytes")
    given = None if name in TOKENIZERS else read_tokenizer(Path(name), documents=True)
    if name == "characters":
        raise UserError(f"--tokenizer {name} needs the whole text at once; for large corpora: bytes or bpe")
    if name != "bpe" and vocab_size is not None:
        raise UserError("--vocab_size is for --tokenizer bpe")
    plan: dict[str, Any] = {
        "shards": [shard.as_dict() for shard in shards],
        "sizes": {path: _size(path) for path in sorted({shard.path for shard in shards})},
        "text_field": text_field,
        "tokenizer": [name, (vocab_size or LARGE_VOCABULARY) if name == "bpe" else None]
        if given is None
        else given.state(),
        "val_split": DEFAULT_SPLIT if val_split is None else val_split,
        "drop_duplicates": drop_duplicates,
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    earlier = read_manifest(output_dir)
    if earlier is not None and not force:
        if earlier.get("request", {}).get("plan") == digest:
            print(f"{output_dir}: already prepared, nothing to do")
            return open_tokens(output_dir)
        raise UserError(
            f"{output_dir}: already holds another corpus, split or tokenizer; choose another --output_dir, or "
            f"replace it by --force"
        )
    work, lock = output_dir.with_name(f"{output_dir.name}.work"), output_dir.with_name(f".{output_dir.name}.lock")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            _plan_work(work, plan, force)
            made = _tokenizer(work, shards, plan)
            print(f"{title}: {len(shards):,} shards, {sum(plan['sizes'].values()):,} bytes")
            cores = os.cpu_count() or 1
            if not run_shards(work, len(shards), engine, workers or cores, slurm):
                print(f"handed to Slurm; once its jobs are done, the same command writes {output_dir}")
                return None
            description: dict[str, Any] = {
                "corpus": {"name": corpus or "paths", "title": title, "files": len(plan["sizes"])},
                "split": {"val_split": plan["val_split"], "rule": "by a hash of each document"},
                "request": {"plan": digest},
            }
            parts = Shards(work, [shard.part for shard in shards], float(plan["val_split"]))
            tokens = merge(parts, output_dir, made, description, drop_duplicates, min(workers or cores, cores))
            shutil.rmtree(work)
    except Timeout:
        if not lock.exists():
            raise UserError(f"{output_dir}: cannot be written, nor anything beside it") from None
        raise UserError(f"{output_dir}: another mmrec prepare is at work on it") from None
    print(f"{counts_table(tokens.manifest)}\nwritten to  {output_dir}")
    return tokens


def _downloaded(corpus: str, output_dir: Path) -> list[str]:
    """Return the local files of a corpus, fetched where they are missing."""
    url = f"hf://datasets/{corpus.removeprefix(HUB)}" if corpus.startswith(HUB) else SOURCES[corpus].url
    files = SOURCES[corpus].files if corpus in SOURCES else "its .parquet or .jsonl files"
    try:
        return download(files_of(corpus, url), output_dir.with_name(f"{output_dir.name}.download"), url)
    except UserError as error:
        raise UserError(f"{error}; or get {files} elsewhere: mmrec prepare {corpus} FOLDER") from None


def _size(path: str) -> int:
    if is_url(path):
        fs, inner = filesystem(path)
        with translate_errors(path):
            return int(fs.size(inner) or 0)
    return Path(path).stat().st_size


def _plan_work(work: Path, plan: dict[str, Any], force: bool) -> None:
    """Make the work folder, or go on with it where it is of the same plan."""
    if (work / PLAN).exists() and not force:
        if read_json(work / PLAN) != plan:
            raise UserError(
                f"{work}: holds what is done of another request, or the files have changed; delete it, or "
                f"begin anew by --force"
            )
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / PLAN, plan)


def _tokenizer(work: Path, shards: Sequence[Shard], plan: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of the plan: that of the work folder, or made, and kept there."""
    path = work / "tokenizer.json"
    if path.exists():
        return load_tokenizer(read_json(path))
    match plan["tokenizer"]:
        case ["bpe", size]:
            sample = _sample(shards, plan["text_field"], plan["val_split"])
            tokenizer: Tokenizer = BPETokenizer.train(sample, size, documents=True)
        case ["bytes", None]:
            tokenizer = ByteTokenizer(documents=True)
        case state:
            tokenizer = load_tokenizer(state)
    write_json(path, tokenizer.state())
    return tokenizer


def _sample(shards: Sequence[Shard], field: str, val_split: float) -> Iterator[str]:
    """Yield training documents from all over the corpus, the same ones each time."""
    training = [shard for shard in shards if shard.part != "val"]
    step = max(1, len(training) // SAMPLE_SHARDS)
    for shard in training[::step][:SAMPLE_SHARDS]:
        size = 0
        for record in documents(shard, field):
            if isinstance(record, str):
                data = record.encode("utf-8")
                if shard.part is None and int(hash_of(data)[0]) < int(val_split * 2**64):
                    continue
                yield record
                size += len(data)
                if size >= SAMPLE_BYTES:
                    break
