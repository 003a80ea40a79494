"""From the tokens of all shards to a token folder: the split, the duplicates, and the counts."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.data.pipeline.tokenize_shard import DOCUMENT, read_json, stem
from mmrec.data.store import HashedFile, TokenFolder, open_tokens, writing
from mmrec.tokenizers import Tokenizer

AT_ONCE = 1 << 22
"""Documents whose hashes are compared at once, about: it bounds the memory."""
SEEN = np.dtype([("hash", "<u8", 2), ("place", "<u8")])
"""What is compared of a document, and where it stands among all."""
ROWS_AT_ONCE, BYTES_AT_ONCE = 1 << 13, 1 << 20
"""Documents that are looked at, and bytes that a thread copies, at once."""


@dataclass(frozen=True)
class Shards:
    """What the workers wrote, shard by shard.

    Attributes:
        work: their folder.
        parts: "train", "val" or None for each shard, as in its :class:`~mmrec.data.pipeline.shards.Shard`.
        val_split: share of the documents that validate, where their shard does not decide it.
    """

    work: Path
    parts: Sequence[str | None]
    val_split: float

    def count(self, number: int) -> int:
        """Return the number of documents of a shard."""
        return (self.work / f"{stem(number)}.documents").stat().st_size // DOCUMENT.itemsize

    def blocks(self, number: int) -> Iterator[np.ndarray]:
        """Yield the documents of a shard, a bounded number at a time."""
        # Read, not mapped: pages of a map count as memory of the process.
        with open(self.work / f"{stem(number)}.documents", "rb") as file:
            while len(rows := np.fromfile(file, dtype=DOCUMENT, count=ROWS_AT_ONCE)):
                yield rows

    def validates(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return which documents of shard ``number`` validate, [D] of bool: a function of their content alone."""
        part = self.parts[number]
        if part is not None:
            return np.full(len(rows), part == "val")
        return rows["hash"][:, 0] < np.uint64(int(self.val_split * 2**64))


def find_duplicates(shards: Shards) -> np.ndarray:
    """Return which documents were there before, in the order of the shards: [all documents] of bool.

    A document of the training files that is also in the corpus's own validation files is one, too. The hashes are
    dealt out to as many files as keep memory bounded when each is sorted.
    """
    counts = [shards.count(number) for number in range(len(shards.parts))]
    total = sum(counts)
    # Validation files first: a text that is in both is kept there.
    order = sorted(range(len(counts)), key=lambda number: shards.parts[number] != "val")
    starts = np.cumsum([0, *counts])
    duplicate = np.zeros(total, dtype=bool)
    files = -(-total // AT_ONCE)
    with tempfile.TemporaryDirectory(prefix="hashes-", dir=shards.work) as folder:
        paths = [Path(folder) / str(number) for number in range(files)]
        with ExitStack() as stack:
            targets = [stack.enter_context(open(path, "wb")) for path in paths]
            for number in order:
                place = starts[number]
                for rows in shards.blocks(number):
                    seen = np.empty(len(rows), dtype=SEEN)
                    seen["hash"], seen["place"] = rows["hash"], np.arange(place, place + len(rows))
                    dealt = rows["hash"][:, 1] % np.uint64(files)
                    for turn, target in enumerate(targets):
                        target.write(seen[dealt == turn].tobytes())
                    place += len(rows)
        for path in paths:
            seen = np.fromfile(path, dtype=SEEN)
            by_hash = np.lexsort((seen["hash"][:, 0], seen["hash"][:, 1]))  # stable: of equal ones the earliest first
            hash_ = seen["hash"][by_hash]
            equal = (hash_[1:] == hash_[:-1]).all(axis=1)
            duplicate[seen["place"][by_hash[1:][equal]]] = True
    return duplicate


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
        UserError: the corpus has too few documents to split.
    """
    counts = [read_json(shards.work / f"{stem(number)}.json") for number in range(len(shards.parts))]
    documents = sum(count["documents"] for count in counts)
    reasons: Counter[str] = Counter()
    for count in counts:
        reasons.update(count["rejected"])
    if documents < 2:
        aside = f" (set aside: {_listed(reasons)})" if reasons else ""
        raise UserError(
            f"{description['corpus']['title']}: {documents} documents{aside}; at least two are needed, one to "
            f"validate"
        )
    dropped = find_duplicates(shards) if drop_duplicates else np.zeros(documents, dtype=bool)
    only = _lone_validator(shards, dropped)
    sizes = {part: Counter[str]() for part in ("train", "val", "duplicates")}
    with writing(folder, tokenizer, description) as create:
        with create("train.bin") as train, create("val.bin") as val:
            targets = {"train": train, "val": val}
            _copy(_pieces(shards, tokenizer.dtype.itemsize, dropped, only, targets, sizes), threads)
        with create("rejected.jsonl") as rest:
            for number in range(len(shards.parts)):
                with open(shards.work / f"{stem(number)}.rejected", "rb") as lines:
                    shutil.copyfileobj(lines, rest)
        description["documents"] = {part: dict(size) for part, size in sizes.items()}
        description["rejected"] = dict(sorted(reasons.items()))
    return open_tokens(folder)


def _lone_validator(shards: Shards, dropped: np.ndarray) -> int | None:
    """Return the place of the document that validates alone, where the shares leave one part empty; else None."""
    validating = training = place = 0
    smallest, lowest = 0, 2**64
    for number, rows in ((n, rows) for n in range(len(shards.parts)) for rows in shards.blocks(n)):
        kept = ~dropped[place : place + len(rows)]
        validates = shards.validates(number, rows)
        validating += int((kept & validates).sum())
        training += int((kept & ~validates).sum())
        hashes = np.where(kept, rows["hash"][:, 0], np.uint64(2**64 - 1))
        if len(hashes) and int(hashes.min()) < lowest:
            smallest, lowest = place + int(hashes.argmin()), int(hashes.min())
        place += len(rows)
    if validating + training < 2:
        raise UserError("only one document is left; at least two are needed, one to validate")
    return None if validating and training else smallest


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
    shards: Shards,
    itemsize: int,
    dropped: np.ndarray,
    only: int | None,
    targets: Mapping[str, HashedFile],
    sizes: Mapping[str, Counter[str]],
) -> Iterator[_Piece]:
    """Yield what is to be copied, in the order of each target, and count it into ``sizes``.

    Args:
        shards: all of them.
        itemsize: bytes of a token.
        dropped: [all documents] of bool.
        only: the place of the document that validates alone, or None.
        targets: the files of "train" and "val".
        sizes: documents and bytes of "train", "val" and "duplicates".
    """
    place = 0
    for number in range(len(shards.parts)):
        source, position = shards.work / f"{stem(number)}.tokens", 0
        for rows in shards.blocks(number):
            kept = ~dropped[place : place + len(rows)]
            validates = shards.validates(number, rows)
            if only is not None:
                validates = np.arange(place, place + len(rows)) == only
            chosen = {"train": kept & ~validates, "val": kept & validates, "duplicates": ~kept}
            for part, which in chosen.items():
                sizes[part]["documents"] += int(which.sum())
                sizes[part]["bytes"] += int(rows["bytes"][which].sum())
            ends = position + np.cumsum(rows["tokens"].astype(np.int64) * itemsize)
            starts = np.concatenate([[position], ends[:-1]])
            for part, target in targets.items():
                for runs in _gathered(starts, ends, chosen[part]):
                    yield _Piece(source, runs, target, target.reserve(sum(last - first for first, last in runs)))
            position = int(ends[-1])
            place += len(rows)


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
    rejected = manifest["rejected"]
    if rejected:
        lines.append(f"set aside   {sum(rejected.values()):,} records: {_listed(rejected)} (rejected.jsonl)")
    return "\n".join(lines)


def _listed(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
