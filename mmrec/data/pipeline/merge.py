"""From the tokens of all shards to a token folder: the split, the duplicates, and the counts."""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.data.pipeline.split import Shards, Split, split_shards
from mmrec.data.pipeline.tokenize_shard import read_json, stem
from mmrec.data.provenance import SOURCES, Provenance
from mmrec.data.store import HashedFile, TokenFolder, open_tokens, writing
from mmrec.tokenizers import Tokenizer, token_lengths

BYTES_AT_ONCE = 1 << 20
"""Bytes that a thread copies at once."""


def merge(
    shards: Shards,
    folder: Path,
    tokenizer: Tokenizer,
    description: dict[str, Any],
    drop_duplicates: bool,
    threads: int,
) -> TokenFolder:
    """Write the token folder, and return it opened; so many ``threads`` copy and hash.

    Raises:
        UserError: the corpus has too little text to split.
    """
    counts = [read_json(shards.work / f"{stem(number)}.json") for number in range(len(shards.parts))]
    reasons: Counter[str] = Counter()
    for count in counts:
        reasons.update(count["rejected"])
    if not sum(count["documents"] for count in counts):
        aside = f" (set aside: {_listed(reasons)})" if reasons else ""
        if fields := sorted({name for count in counts for name in count["fields"]}):
            aside += f"; the records have {', '.join(fields[:20])}: name the text by --text_field"
        if reasons["not UTF-8"]:
            aside += "; name the encoding of files of text by --encoding"
        raise UserError(f"{description['corpus']['title']}: 0 documents{aside}")
    try:
        split = split_shards(shards, drop_duplicates, tokenizer)
    except UserError as error:
        raise UserError(f"{description['corpus']['title']}: {error}") from None
    sizes = {part: Counter(documents=0, bytes=0) for part in ("train", "val", "duplicates")}
    with writing(folder, tokenizer, description) as create:
        with create("train.bin") as train, create("val.bin") as val:
            _copy(_pieces(split, tokenizer, {"train": train, "val": val}, sizes), threads)
        with create("rejected.jsonl") as rest:
            for number in range(len(shards.parts)):
                with open(shards.work / f"{stem(number)}.rejected", "rb") as lines:
                    shutil.copyfileobj(lines, rest)
        sources = _provenance(shards, counts)
        with create(SOURCES) as file:
            file.write(sources.encoded())
        description["sources"] = sources.counts()
        text = sizes["train"]["bytes"] + sizes["val"]["bytes"]
        description["split"] |= {"rule": split.rule, "val_share": round(sizes["val"]["bytes"] / text, 4)}
        description["documents"] = {part: dict(size) for part, size in sizes.items()}
        description["rejected"] = dict(sorted(reasons.items()))
    return open_tokens(folder)


def _provenance(shards: Shards, counts: Sequence[dict[str, Any]]) -> Provenance:
    """Return the files that were read, the parts of one file together, and those that were skipped."""
    sources = Provenance()
    for path, several in groupby(zip(shards.paths, counts, strict=True), key=lambda pair: pair[0]):
        parts = [count for _, count in several]
        rejected = sum(sum(count["rejected"].values()) for count in parts)
        sources.read(path, sum(c["documents"] for c in parts), sum(c["bytes"] for c in parts), rejected)
    sources.rows += shards.skipped.rows
    return sources


@dataclass(frozen=True)
class _Piece:
    """Some documents of one shard that follow each other in a token file.

    Attributes:
        source: the tokens of the shard.
        runs: first and last byte of each run of documents there.
        target: the token file.
        place: byte of it where the first run goes; the others follow.
    """

    source: Path
    runs: list[tuple[int, int]]
    target: HashedFile
    place: int


def _pieces(
    split: Split, tokenizer: Tokenizer, targets: Mapping[str, HashedFile], sizes: Mapping[str, Counter[str]]
) -> Iterator[_Piece]:
    """Yield what is to be copied, in the order of each target, and count it into ``sizes``.

    Args:
        split: of the documents.
        tokenizer: of the tokens.
        targets: the files of "train" and "val".
        sizes: documents and bytes of "train", "val" and "duplicates".
    """
    itemsize, shard, position = tokenizer.dtype.itemsize, -1, 0
    for number, place, rows in split.shards.all_blocks():
        shard, position = number, position if number == shard else 0
        source = split.shards.work / f"{stem(number)}.tokens"
        chosen = split.masks(number, place, rows)
        for part, which in chosen.items():
            sizes[part]["documents"] += int(which.sum())
            sizes[part]["bytes"] += int(rows["bytes"][which].sum())
        ends = position + np.cumsum(rows["tokens"].astype(np.int64) * itemsize)
        starts = np.concatenate([[position], ends[:-1]])
        for part, target in targets.items():
            for runs in _gathered(starts, ends, chosen[part]):
                yield _piece(source, runs, target)
        if split.cut is not None and place <= split.cut < place + len(rows):
            begin, end = int(starts[split.cut - place]), int(ends[split.cut - place])
            middle = begin + split.kept_tokens * itemsize
            train = _spelled_bytes(source, begin + itemsize, middle, tokenizer)
            for part, size in (("train", train), ("val", int(rows["bytes"][split.cut - place]) - train)):
                sizes[part].update(documents=1, bytes=size)
            yield _piece(source, [(begin, middle)], targets["train"])
            # The last part begins with the separator, as every document.
            yield _piece(source, [(begin, begin + itemsize), (middle, end)], targets["val"])
        position = int(ends[-1])


def _piece(source: Path, runs: list[tuple[int, int]], target: HashedFile) -> _Piece:
    return _Piece(source, runs, target, target.reserve(sum(last - first for first, last in runs)))


def _spelled_bytes(source: Path, first: int, last: int, tokenizer: Tokenizer) -> int:
    """Return the bytes of text that the tokens between two bytes of a file stand for."""
    size = tokenizer.dtype.itemsize
    tokens = np.fromfile(source, dtype=tokenizer.dtype, count=(last - first) // size, offset=first)
    return int(token_lengths(tokenizer)[tokens, 0].sum())


def _gathered(starts: np.ndarray, ends: np.ndarray, chosen: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Yield the runs of the documents that are chosen, [D] of bool, some of at most BYTES_AT_ONCE at a time."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    runs: list[tuple[int, int]] = []
    room = BYTES_AT_ONCE
    for first, last in zip(starts[edges[::2]].tolist(), ends[edges[1::2] - 1].tolist(), strict=True):
        while first < last:
            end = min(last, first + room)
            runs.append((first, end))
            room -= end - first
            first = end
            if not room:
                yield runs
                runs, room = [], BYTES_AT_ONCE
    if runs:
        yield runs


def _copy(pieces: Iterable[_Piece], threads: int) -> None:
    """Copy the pieces side by side; their bytes are hashed one piece after the other."""
    waiting: deque[Future[None]] = deque()
    previous: Future[None] | None = None
    with ThreadPoolExecutor(threads) as pool:
        for piece in pieces:
            previous = pool.submit(_copy_piece, piece, previous)
            waiting.append(previous)
            if len(waiting) > 2 * threads:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def _copy_piece(piece: _Piece, previous: Future[None] | None) -> None:
    data = memoryview(bytearray(sum(last - first for first, last in piece.runs)))
    done = 0
    with open(piece.source, "rb", buffering=0) as tokens:
        for first, last in piece.runs:
            tokens.seek(first)
            end = done + last - first
            while done < end:
                count = tokens.readinto(data[done:end])
                if not count:
                    raise UserError(f"{piece.source}: is cut short; delete the work folder and begin anew")
                done += count
    piece.target.put(piece.place, data)
    if previous is not None:
        previous.result()  # begun earlier, so that it ends
    piece.target.update(data)


def counts_table(manifest: dict[str, Any]) -> str:
    """Return a few lines for a person: documents, bytes and tokens of each part, and what was set aside."""
    rows = [("", "documents", "bytes", "tokens")]
    for part, size in manifest["documents"].items():
        tokens = manifest["tokens"].get(part)
        rows.append((part, f"{size['documents']:,}", f"{size['bytes']:,}", "" if tokens is None else f"{tokens:,}"))
    lines = [f"{a:<12}{b:>15}{c:>20}{d:>20}".rstrip() for a, b, c, d in rows]
    split = manifest["split"]
    asked = f"{split['val_split']:.2%} were asked for"
    lines.append(f"validation  {split['val_share']:.2%} of the text ({asked}): {split['rule']}")
    rejected = manifest["rejected"]
    if rejected:
        lines.append(f"set aside   {sum(rejected.values()):,} records: {_listed(rejected)} (rejected.jsonl)")
    return "\n".join(lines)


def _listed(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
