"""Preparing corpora that outgrow memory: plan, tokenize shard by shard, merge."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import
from mmrec.core.text_files import check_encoding
from mmrec.core.urls import filesystem, is_url, translate_errors
from mmrec.data.corpora.large import HUB, LARGE_CORPORA
from mmrec.data.options import PrepareOptions
from mmrec.data.pipeline.bpe_sample import HeldOut, find_held_out, sample
from mmrec.data.pipeline.download import download
from mmrec.data.pipeline.executors import run_shards
from mmrec.data.pipeline.merge import counts_table, merge
from mmrec.data.pipeline.shards import UTF8, Shard
from mmrec.data.pipeline.sources import files_of, find_shards
from mmrec.data.pipeline.split import Shards, split_shards
from mmrec.data.pipeline.tokenize_shard import PLAN, hash_of, read_json, stem, write_json
from mmrec.data.provenance import Provenance, skipped_line
from mmrec.data.resolve import ResolvedSource
from mmrec.data.store import CHOOSE_OR_FORCE, OTHER_TOKENS, FolderTakenError, TokenFolder, open_tokens, read_manifest
from mmrec.tokenizers import TOKENIZERS, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from mmrec.tokenizers.loading import read_tokenizer

DEFAULT_SPLIT = 0.05
LARGE_VOCABULARY = 32_768
"""Of BPE for the named corpora, where no other size is asked for."""
OPEN_ENCODING = ("text", "jsonl", "tar", "tars")
"""Readers of formats that leave the encoding of a text open."""
HELD_OUT = "held_out.json"
"""In the work folder: what BPE was not learned from, where the split is not the one by hash."""


def prepare_large(options: PrepareOptions, source: ResolvedSource) -> TokenFolder | None:
    """Prepare a corpus of any size. What is done is kept, and the same command goes on after a stop.

    Args:
        options: as they were typed.
        source: what they name; beside its ``output_dir``, NAME.work holds what is done so far.

    Returns:
        The token folder, or None where Slurm has yet to do the work.
    """
    optional_import("datatrove")
    corpus = LARGE_CORPORA.get(source.corpus or "")
    title = corpus.title if corpus else source.corpus or _listed(source.paths)
    paths = source.paths or _downloaded(source.corpus or "", source.output_dir)
    shards, skipped = find_shards(source.corpus, paths)
    shards = _with_encoding(shards, options.encoding)
    request = _request(options, shards, options.tokenizer or ("bpe" if corpus else "bytes"))
    folder, digest = source.output_dir, _digest(request)
    earlier = read_manifest(folder)
    if earlier is not None and not options.force:
        if earlier.get("request", {}).get("plan") != digest:
            raise FolderTakenError(folder, OTHER_TOKENS, CHOOSE_OR_FORCE)
        print(f"{folder}: already prepared, nothing to do")
        return open_tokens(folder)
    description: dict[str, Any] = {
        "corpus": {"name": source.corpus or "paths", "title": title, "files": len(request["sizes"])},
        "split": {"val_split": request["val_split"]},
        "request": {"plan": digest},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            tokens = _carry_out(options, Found(shards, skipped), request, folder, description)
    except Timeout:
        if not lock.exists():
            raise UserError(f"{folder}: cannot be written, nor anything beside it") from None
        raise UserError(f"{folder}: another mmrec prepare is at work on it") from None
    if tokens is None:
        print(f"handed to Slurm; once its jobs are done, the same command writes {folder}")
    else:
        lines = [counts_table(tokens.manifest), skipped_line(skipped.rows), f"written to  {folder}"]
        print("\n".join(line for line in lines if line))
    return tokens


def _with_encoding(shards: Sequence[Shard], encoding: str) -> list[Shard]:
    """Return the shards as texts in ``encoding``; UserError where the format of one has an encoding of its own."""
    check_encoding(encoding)
    if codecs.lookup(encoding).name == UTF8:
        return list(shards)
    for shard in shards:
        if shard.reader not in OPEN_ENCODING:
            kinds = "files of text and of JSON lines"
            raise UserError(f"--encoding is for {kinds}; {shard.path} is of a format that is UTF-8 ({shard.reader})")
    return [replace(shard, encoding=encoding) for shard in shards]


@dataclass(frozen=True)
class Found:
    """The files of a source: as shards, and those that are not read."""

    shards: Sequence[Shard]
    skipped: Provenance


def _request(options: PrepareOptions, shards: Sequence[Shard], tokenizer: str) -> dict[str, Any]:
    """Return what decides the tokens, as plain values for JSON: the shards, the tokenizer and the split."""
    given = None if tokenizer in TOKENIZERS else read_tokenizer(Path(tokenizer), documents=True)
    if tokenizer == "characters":
        raise UserError(f"--tokenizer {tokenizer} needs the whole text at once; for large corpora: bytes or bpe")
    if tokenizer != "bpe" and options.vocab_size is not None:
        raise UserError("--vocab_size is for --tokenizer bpe")
    size = (options.vocab_size or LARGE_VOCABULARY) if tokenizer == "bpe" else None
    return {
        "shards": [shard.as_dict() for shard in shards],
        "sizes": {path: _size(path) for path in sorted({shard.path for shard in shards})},
        "text_field": options.text_field,
        "tokenizer": [tokenizer, size] if given is None else given.state(),
        "val_split": DEFAULT_SPLIT if options.val_split is None else options.val_split,
        "drop_duplicates": options.drop_duplicates,
    }


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _carry_out(
    options: PrepareOptions,
    found: Found,
    request: dict[str, Any],
    folder: Path,
    description: dict[str, Any],
) -> TokenFolder | None:
    """Tokenize the shards and merge them into ``folder``; None where Slurm has yet to do the work."""
    shards, work = found.shards, folder.with_name(f"{folder.name}.work")
    _plan_work(work, request, options)
    tokenizer = _tokenizer(work, shards, request)
    print(f"{description['corpus']['title']}: {len(shards):,} shards, {sum(request['sizes'].values()):,} bytes")
    cores = os.cpu_count() or 1
    workers = options.workers or cores
    parts, files = [shard.part for shard in shards], [shard.path for shard in shards]
    written = Shards(work, parts, float(request["val_split"]), files, found.skipped)
    while True:
        if not run_shards(work, len(shards), options.executor, workers, options.slurm or {}):
            return None
        if not _learned_from_validation(written, shards, request, tokenizer):
            break
        print("the split is by size: BPE is learned again, from what trains alone, and the shards are done again")
        tokenizer = _tokenizer(work, shards, request)
    tokens = merge(written, folder, tokenizer, description, options.drop_duplicates, min(workers, cores))
    shutil.rmtree(work)
    return tokens


def _listed(paths: Sequence[str]) -> str:
    return f"the texts of {', '.join(Path(path).name for path in paths[:3])}"


def _downloaded(corpus: str, output_dir: Path) -> list[str]:
    """Return the local files of a corpus, fetched where they are missing."""
    url = f"hf://datasets/{corpus.removeprefix(HUB)}" if corpus.startswith(HUB) else LARGE_CORPORA[corpus].url
    files = LARGE_CORPORA[corpus].files if corpus in LARGE_CORPORA else "its .parquet or .jsonl files"
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


def _plan_work(work: Path, plan: dict[str, Any], options: PrepareOptions) -> None:
    """Make the work folder; where one of another plan is there, keep the shards that are the same in both."""
    if options.force or not (work / PLAN).exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(work / PLAN, plan)
        return
    earlier = read_json(work / PLAN)
    if earlier == plan:
        return
    if options.executor == "slurm":  # whose jobs may still be at work on the earlier one
        raise UserError(
            f"{work}: holds what is done of another request, or the files have changed; delete it, or "
            f"begin anew by --force"
        )
    kept = _keep_shards(work, earlier, plan)
    print(f"{work}: another request, or the files have changed: {kept:,} of {len(plan['shards']):,} shards are kept")


def _keep_shards(work: Path, earlier: dict[str, Any], plan: dict[str, Any]) -> int:
    """Replace the plan in ``work``; return the number of shards whose tokens are those of the new plan, too.

    A stop at any moment leaves a work folder that fits its plan, with fewer shards done.
    """

    def keys(one: dict[str, Any]) -> list[str]:
        """Return what decides the tokens of each shard; BPE is learned from all of them."""
        learned = one["tokenizer"][0] == "bpe" if isinstance(one["tokenizer"], list) else False
        common = [one["shards"], one["sizes"], one["val_split"]] if learned else []
        if learned and (work / HELD_OUT).exists():  # which was found by the split
            common.append(one["drop_duplicates"])
        common += [one["tokenizer"], one["text_field"]]
        return [json.dumps([shard | {"part": ""}, one["sizes"][shard["path"]], *common]) for shard in one["shards"]]

    aside = work / "kept"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    done = {key: number for number, key in enumerate(keys(earlier)) if (work / f"{stem(number)}.json").exists()}
    wanted = [(number, done[key]) for number, key in enumerate(keys(plan)) if key in done]
    for number, old in wanted:
        for path in work.glob(f"{stem(old)}.*"):
            shutil.copyfile(path, aside / f"{stem(number)}{path.suffix}")
    if not wanted:
        (work / "tokenizer.json").unlink(missing_ok=True)
        (work / HELD_OUT).unlink(missing_ok=True)
    for path in work.glob("[0-9]*.*"):
        path.unlink()
    write_json(work / PLAN, plan)
    for path in sorted(aside.iterdir(), key=lambda path: path.suffix == ".json"):  # which says that it is done, last
        os.replace(path, work / path.name)
    aside.rmdir()
    return len(wanted)


def _tokenizer(work: Path, shards: Sequence[Shard], plan: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of the plan: that of the work folder, or made, and kept there."""
    path = work / "tokenizer.json"
    if path.exists():
        return load_tokenizer(read_json(path))
    match plan["tokenizer"]:
        case ["bpe", size]:
            held_out = HeldOut.load(work / HELD_OUT)
            if held_out is not None:  # what another tokenizer made
                for old in work.glob("[0-9]*.*"):
                    old.unlink()
            texts = sample(shards, plan["text_field"], plan["val_split"], held_out)
            tokenizer: Tokenizer = BPETokenizer.train(texts, size, documents=True)
        case ["bytes", None]:
            tokenizer = ByteTokenizer(documents=True)
        case state:
            tokenizer = load_tokenizer(state)
    write_json(path, tokenizer.state())
    return tokenizer


def _learned_from_validation(
    written: Shards, shards: Sequence[Shard], plan: dict[str, Any], tokenizer: Tokenizer
) -> bool:
    """Whether BPE was learned from a text that validates; what validates is then held out, and the tokenizer gone.

    Which documents validate is known once all have been read. A stop at any moment leaves a work folder from which
    the next run comes to the same tokenizer.
    """
    work = written.work
    if not isinstance(plan["tokenizer"], list) or plan["tokenizer"][0] != "bpe" or (work / HELD_OUT).exists():
        return False
    if not any(written.count(number) for number in range(len(shards))):
        return False
    try:
        split = split_shards(written, plan["drop_duplicates"], tokenizer)
    except UserError:  # too little text, which the merge says
        return False
    if split.val_places is None:  # by file or by hash, as the sample assumes
        return False
    texts = sample(shards, plan["text_field"], plan["val_split"], None)
    learned = {hash_of(text.encode("utf-8")).tobytes().hex() for text in texts}
    held_out = find_held_out(shards, split)
    if learned and not learned & (held_out.texts | held_out.begins.keys()):
        return False
    (work / "tokenizer.json").unlink()
    held_out.save(work / HELD_OUT)
    return True
