"""From a corpus to a token folder: read, split into training and validation, tokenize, write."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mmrec.core.errors import UserError
from mmrec.data.corpora import get_corpus
from mmrec.data.corpora.base import Options
from mmrec.data.options import PrepareOptions
from mmrec.data.provenance import Provenance, skipped_line
from mmrec.data.resolve import ResolvedSource, resolve_source
from mmrec.data.split import SEPARATOR, split_documents
from mmrec.data.store import (
    CHOOSE_OR_FORCE,
    FILES,
    MANIFEST,
    OTHER_TOKENS,
    FolderTakenError,
    TokenFolder,
    read_manifest,
    verify_tokens,
    write_tokens,
)
from mmrec.tokenizers import TOKENIZERS, make_tokenizer
from mmrec.tokenizers.loading import read_tokenizer


def prepare(options: PrepareOptions) -> TokenFolder | None:
    """Read a corpus, split it into training and validation, and write both as tokens (small corpora also as text).

    Returns:
        The token folder, opened; None where Slurm has yet to do the work.

    Raises:
        UserError: something that was given is wrong; nothing has been changed.
    """
    if options.verify and options.output_dir is not None:
        return _verified(options.output_dir)
    source = resolve_source(options)
    if options.verify:
        return _verified(source.output_dir)
    earlier = _check_target(source.output_dir, options.force)
    if not source.is_large:
        return _prepare_small(options, source, earlier)
    from mmrec.data.pipeline.plan import prepare_large  # what it needs is imported only for large corpora

    return prepare_large(options, source)


def _prepare_small(options: PrepareOptions, source: ResolvedSource, earlier: dict[str, Any] | None) -> TokenFolder:
    """Prepare a corpus in memory; ``earlier`` is the manifest of the token folder that is to be replaced."""
    corpus = get_corpus(
        source.corpus or "",
        Options([*map(Path, source.paths)], source.input_dir, options.encoding, options.glob, options.mirror),
    )
    documents = list(corpus.documents())
    sources = Provenance()
    for document in documents:
        sources.read(document.name, 1, len(document.text.encode("utf-8")))
    for file, reason in corpus.skipped:
        sources.skip(file, reason)
    train, val, split = split_documents(documents, options.val_split)
    if min(len(train), len(val)) < 2:
        raise UserError(
            f"{corpus.title}: too little text to split: {len(train):,} characters would train and {len(val):,} "
            f"validate; give more text, or another --val_split to mmrec prepare"
        )
    kind = options.tokenizer or corpus.default_tokenizer
    given = None if kind in TOKENIZERS else read_tokenizer(Path(kind))
    if given is not None and options.vocab_size is not None:
        raise UserError(f"--vocab_size is for --tokenizer bpe; {kind} has {given.vocab_size:,} tokens")
    description = {
        "corpus": {
            "name": source.corpus,
            "title": corpus.title,
            "documents": len(documents),
            "sha256": hashlib.sha256(SEPARATOR.join(d.text for d in documents).encode()).hexdigest(),
        },
        "split": split,
        "sources": sources.counts(),
        "request": {"tokenizer": kind if given is None else given.digest(), "vocab_size": options.vocab_size},
    }
    folder = source.output_dir
    if earlier is not None and not options.force:
        if not _same(earlier, description):
            raise FolderTakenError(folder, OTHER_TOKENS, CHOOSE_OR_FORCE)
        try:
            tokens = verify_tokens(folder)
        except UserError as error:
            print(f"{error}: this is done now")
        else:
            print(f"{folder}: already prepared, nothing to do")
            return tokens
    chosen = given or make_tokenizer(kind, train, val, options.vocab_size)
    tokens = write_tokens(folder, {"train": train, "val": val}, chosen, description, sources)
    lines = [summary(tokens), skipped_line(sources.skipped()), f"written to  {folder}"]
    print("\n".join(line for line in lines if line))
    return tokens


def _verified(folder: Path) -> TokenFolder:
    tokens = verify_tokens(folder)
    print(f"{folder}: every file is as it was written")
    return tokens


def _same(earlier: dict[str, Any], description: dict[str, Any]) -> bool:
    """Whether a folder holds what is described.

    Why its split was chosen, and what the texts are called, make no difference: a folder is called ``.``, too.
    """

    def essence(manifest: dict[str, Any]) -> object:
        split = manifest.get("split")
        if isinstance(split, dict):
            split = {key: value for key, value in split.items() if key != "reason"}
        corpus = manifest.get("corpus")
        if isinstance(corpus, dict):
            corpus = {key: value for key, value in corpus.items() if key != "title"}
        return corpus, manifest.get("request"), split

    return essence(earlier) == essence(description)


def _check_target(folder: Path, force: bool) -> dict[str, Any] | None:
    """Return the manifest of a token folder that exists already; refuse what must not be overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FolderTakenError(folder, "is not a folder", "choose another --output_dir")
    if not folder.exists() or not any(folder.iterdir()):
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{folder}: cannot be written ({parent} is not a writable folder)")
        return None
    earlier = read_manifest(folder)
    strangers = sorted({entry.name for entry in folder.iterdir()} - {*FILES, MANIFEST})
    if strangers:
        instead = "choose a new or empty --output_dir"
        raise FolderTakenError(folder, f"holds something else ({strangers[0]})", instead)
    if earlier is None and not force:
        raise FolderTakenError(folder, f"holds tokens without a readable {MANIFEST}", CHOOSE_OR_FORCE)
    return earlier


def summary(tokens: TokenFolder) -> str:
    """Return a few lines for a person: what was read, how it was split, what was written."""
    manifest = tokens.manifest
    files, split = manifest["files"], manifest["split"]
    rule = split["rule"]
    if "documents" in split:
        rule += (
            f" ({split['documents']['train']} train, {split['documents']['val']} validate: {split['val_share']:.1%})"
        )
    return "\n".join(
        [
            f"corpus      {manifest['corpus']['title']}",
            f"validation  {split['val_split']:g} of the text ({split['reason']}): {rule}",
            f"tokenizer   {tokens.tokenizer.name}, {tokens.tokenizer.vocab_size:,} tokens",
            f"train       {len(tokens.train):,} tokens, {files['train.txt']['bytes']:,} bytes",
            f"val         {len(tokens.val):,} tokens, {files['val.txt']['bytes']:,} bytes",
        ]
    )
