"""From a corpus to a token folder: read, split into training and validation, tokenize, write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.core.errors import UserError, nearest
from mmrec.data.corpora import CORPORA, get_corpus
from mmrec.data.corpora.base import Document, Options
from mmrec.data.store import FILES, TokenFolder, open_tokens, read_manifest, verify_tokens, write_tokens
from mmrec.tokenizers import TOKENIZERS, make_tokenizer
from mmrec.tokenizers.loading import read_tokenizer

LARGE, HUB = ("openwebtext", "wikipedia", "c4"), "hf:"
"""Corpora that are read shard by shard; what that needs is imported only for them."""
SEPARATOR = "\n\n"
"""Stands between two documents, in the text files as in the tokens."""


def prepare(
    corpus: str | None = None,
    paths: Sequence[str] = (),
    output_dir: Path | None = None,
    input_file: Path | None = None,
    input_dir: Path | None = None,
    val_split: float | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    encoding: str = "utf-8",
    glob: str = "*.txt",
    mirror: str | None = None,
    text_field: str = "text",
    drop_duplicates: bool = False,
    engine: str = "local",
    workers: int | None = None,
    slurm: dict[str, str] | None = None,
    force: bool = False,
    verify: bool = False,
) -> TokenFolder | None:
    """Read a corpus, split it into training and validation, and write both as text and as tokens.

    Args:
        corpus: tiny_shakespeare, shakespeare_plays, sample, file or directory; openwebtext, wikipedia, c4 or
            hf:OWNER/NAME; or the first of your own files and folders. May be left out where --input_file or
            --input_dir is given.
        paths: files and folders, local or s3://, gs://, https://; large corpora are downloaded if left out.
        output_dir: folder to write; data/CORPUS if left out. It must be new, empty, or hold this very corpus.
        input_file: your own text, for the corpus "file".
        input_dir: folder of your own texts, searched with its subfolders, for the corpus "directory".
        val_split: share of the text that validates. If left out: 0.2 under 1 MB, 0.05 from 1 GB on, else 0.1.
        tokenizer: characters, bytes or bpe; or the path of one that is there already: a token folder, a
            tokenizer.json (also GPT-2's), or a model that mmrec export wrote as safetensors. If left out: characters
            for Shakespeare, bpe for openwebtext, wikipedia and c4, bytes for other text.
        vocab_size: number of tokens, for bpe only; if left out 4096, or 32768 for a large corpus.
        encoding: of the input files.
        glob: names of the files that count, for --input_dir.
        mirror: folder or URL that holds the corpus's file, used instead of the internet.
        text_field: name of the text in JSON, Parquet and tf.Example records.
        drop_duplicates: keep one of several documents with the same text (large corpora).
        engine: local, ray (a cluster that RAY_ADDRESS names) or slurm, for large corpora.
        workers: shards of a large corpus that are worked on at once; as many as there are cores if left out.
        slurm: options of the Slurm jobs, as {partition: cpu, time: "4:00:00"}.
        force: replace another token folder that stands at output_dir.
        verify: only check that the files of output_dir are as they were written.

    Returns:
        The token folder, opened; None where Slurm has yet to do the work.

    Raises:
        UserError: something that was given is wrong; nothing has been changed.
    """
    if verify and output_dir is not None:
        return _verified(output_dir)
    if input_file is None and input_dir is None and corpus is not None and corpus not in CORPORA:
        if corpus not in LARGE and not corpus.startswith(HUB):
            paths, corpus = (_existing(corpus), *paths), None
        if corpus is None and len(paths) == 1 and _is_small_text(paths[0]):
            output_dir = output_dir or Path("data") / Path(paths[0]).stem
            input_file, paths = Path(paths[0]), ()
        else:
            folder = output_dir or Path("data") / _name_of(corpus or paths[0])
            if verify:
                return _verified(folder)
            for option, value, usual in (("encoding", encoding, "utf-8"), ("glob", glob, "*.txt")):
                if value != usual:
                    raise UserError(f"--{option} is for --input_file and --input_dir; other texts are read as UTF-8")
            if mirror is not None:
                raise UserError("--mirror is for the small corpora; for a large one, name the files that you have")
            _check_split(val_split)
            _check_target(folder, force)
            from mmrec.data.pipeline.plan import prepare_large

            return prepare_large(
                corpus,
                paths,
                folder,
                val_split,
                tokenizer,
                vocab_size,
                text_field,
                drop_duplicates,
                engine,
                workers,
                slurm or {},
                force,
            )
    by_shards = {"text_field": text_field != "text", "drop_duplicates": drop_duplicates, "engine": engine != "local"}
    asked = [option for option, given in (by_shards | {"slurm": bool(slurm)}).items() if given]
    if asked:
        raise UserError(
            f"--{asked[0]} is for large corpora, and for folders and files of many documents that are named without "
            f"--input_file or --input_dir: mmrec prepare FOLDER"
        )
    if paths:
        raise UserError(f"{paths[0]}: the corpus {corpus!r} takes no files of yours")
    name = _corpus_name(corpus, input_file, input_dir)
    folder = output_dir or Path("data") / name
    if verify:
        return _verified(folder)
    _check_split(val_split)
    earlier = _check_target(folder, force)

    source = get_corpus(name, Options(input_file, input_dir, encoding, glob, mirror))
    documents = list(source.documents())
    train, val, split = split_documents(documents, val_split)
    if min(len(train), len(val)) < 2:
        raise UserError(
            f"{source.title}: too little text to split: {len(train):,} characters would train and {len(val):,} "
            f"validate; give more text or another --val_split"
        )
    kind = tokenizer or source.default_tokenizer
    given = None if kind in TOKENIZERS else read_tokenizer(Path(kind))
    if given is not None and vocab_size is not None:
        raise UserError(f"--vocab_size is for --tokenizer bpe; {kind} has {given.vocab_size:,} tokens")
    description = {
        "corpus": {
            "name": name,
            "title": source.title,
            "documents": len(documents),
            "sha256": hashlib.sha256(SEPARATOR.join(d.text for d in documents).encode()).hexdigest(),
        },
        "split": split,
        "request": {"tokenizer": kind if given is None else given.digest(), "vocab_size": vocab_size},
    }
    if earlier is not None and not force and _same(earlier, description):
        print(f"{folder}: already prepared, nothing to do")
        return open_tokens(folder)
    if earlier is not None and not force:
        raise UserError(
            f"{folder}: already holds another corpus, split or tokenizer; choose another --output_dir, or "
            f"replace it by --force"
        )
    chosen = given or make_tokenizer(kind, train, val, vocab_size)
    tokens = write_tokens(folder, {"train": train, "val": val}, chosen, description)
    print(summary(tokens))
    return tokens


def _existing(path: str) -> str:
    """Return ``path``, given where a corpus may stand; UserError where it is neither."""
    if "://" in path or Path(path).exists():
        return path
    names = [*CORPORA, *LARGE]
    raise UserError(
        f"unknown corpus {path!r}, and no such file or folder; known: {', '.join(names)}, {HUB}OWNER/NAME"
        f"{nearest(path, names)}"
    )


def _is_small_text(path: str) -> bool:
    """Whether a path is a text file that is held in memory as a whole."""
    file = Path(path)
    return file.is_file() and file.suffix.lower() in ("", ".txt", ".md") and file.stat().st_size < 10**9


def _name_of(path: str) -> str:
    """Return a folder's name for a corpus or a path."""
    return path.removeprefix(HUB).rstrip("/").rpartition("/")[2].partition(".")[0] or "corpus"


def _verified(folder: Path) -> TokenFolder:
    verify_tokens(folder)
    print(f"{folder}: every file is as it was written")
    return open_tokens(folder)


def _check_split(val_split: float | None) -> None:
    if val_split is not None and not 0 < val_split < 1:
        raise UserError(f"--val_split is {val_split}; it must lie between 0 and 1, for example 0.1")


def _same(earlier: dict[str, Any], description: dict[str, Any]) -> bool:
    """Whether a folder holds what is described; why its split was chosen makes no difference."""

    def essence(manifest: dict[str, Any]) -> object:
        split = manifest.get("split")
        if isinstance(split, dict):
            split = {key: value for key, value in split.items() if key != "reason"}
        return manifest.get("corpus"), manifest.get("request"), split

    return essence(earlier) == essence(description)


def _corpus_name(corpus: str | None, input_file: Path | None, input_dir: Path | None) -> str:
    if input_file is not None and input_dir is not None:
        raise UserError("give either --input_file or --input_dir, not both")
    implied = "file" if input_file is not None else "directory" if input_dir is not None else None
    if corpus is None and implied is None:
        raise UserError("name a corpus, for example tiny_shakespeare, or give --input_file or --input_dir")
    if corpus is not None and implied is not None and corpus != implied:
        raise UserError(f"--input_{'file' if implied == 'file' else 'dir'} is not for the corpus {corpus!r}")
    return corpus or implied or ""


def _check_target(folder: Path, force: bool) -> dict[str, Any] | None:
    """Return the manifest of a token folder that is there already; refuse what must not be overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder; choose another --output_dir")
    if not folder.exists() or not any(folder.iterdir()):
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{folder}: cannot be written ({parent} is not a writable folder)")
        return None
    earlier = read_manifest(folder)
    strangers = sorted({entry.name for entry in folder.iterdir()} - {*FILES, "manifest.json"})
    if earlier is None or strangers:
        what = strangers[0] if strangers else "files of an unfinished corpus"
        raise UserError(f"{folder}: holds something else ({what}); choose a new or empty --output_dir")
    return earlier


def split_documents(documents: Sequence[Document], val_split: float | None) -> tuple[str, str, dict[str, Any]]:
    """Split documents into a training and a validation text.

    One document is cut before its last part, as nanoGPT does. Several are kept whole: in an order that only
    their content decides, documents go to validation as long as they fit into its share, identical ones
    together, so that nothing that validates has been trained on.

    Returns:
        The training text, the validation text, and what was done, for the manifest.
    """
    total = sum(len(document.text.encode("utf-8")) for document in documents)
    share, reason = (val_split, "as asked") if val_split is not None else default_split(total)
    split: dict[str, Any] = {"val_split": share, "reason": reason}
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(hashlib.sha256(document.text.encode("utf-8")).hexdigest(), []).append(document)
    if len(groups) < 2:
        text = SEPARATOR.join(document.text for document in documents[:1])
        cut = int(len(text) * (1 - share))
        return text[:cut], text[cut:], split | {"rule": "the last part of the text"}

    sizes = {key: sum(len(d.text.encode("utf-8")) for d in group) for key, group in groups.items()}
    chosen: set[str] = set()
    room = share * total
    for key in sorted(groups):
        if sizes[key] <= room and len(chosen) + 1 < len(groups):
            chosen.add(key)
            room -= sizes[key]
    if not chosen:  # every document is larger than the share: the smallest is the nearest to it
        chosen.add(min(sorted(groups), key=lambda key: sizes[key]))
    kept = {id(document) for key in chosen for document in groups[key]}
    val = [document for document in documents if id(document) in kept]
    train = [document for document in documents if id(document) not in kept]
    return (
        SEPARATOR.join(document.text for document in train),
        SEPARATOR.join(document.text for document in val),
        split
        | {
            "rule": "whole documents",
            "documents": {"train": len(train), "val": len(val)},
            "val_share": round(sum(sizes[key] for key in chosen) / total, 4),
        },
    )


def default_split(size: int) -> tuple[float, str]:
    """Return the share that validates for a text of ``size`` bytes, and why."""
    if size < 10**6:
        return 0.2, "the default under 1 MB"
    if size < 10**9:
        return 0.1, "the default from 1 MB to 1 GB"
    return 0.05, "the default from 1 GB on"


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
            f"written to  {tokens.folder}",
        ]
    )
