"""The split of a large corpus: which documents validate, which are duplicates, and which one is cut in two."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrec.core.errors import UserError
from mmrec.data.pipeline.tokenize_shard import DOCUMENT, stem
from mmrec.data.provenance import Provenance
from mmrec.tokenizers import Tokenizer, token_lengths

AT_ONCE = 1 << 22
"""Documents whose hashes are compared at once, about: it bounds the memory."""
ROWS_AT_ONCE = 1 << 13
"""Documents of a shard that are looked at, at once."""
SEEN = np.dtype([("hash", "<u8", 2), ("place", "<u8")])
"""What is compared of a document, and its index among all."""


@dataclass(frozen=True)
class Shards:
    """What the workers wrote, shard by shard.

    Attributes:
        work: their folder.
        parts: "train", "val" or None for each shard, as in its :class:`~mmrec.data.pipeline.shards.Shard`.
        val_split: share of the text that validates, where the shards do not decide it.
        paths: the file of each shard; several in a row may be parts of one file.
        skipped: the files that were not read.
    """

    work: Path
    parts: Sequence[str | None]
    val_split: float
    paths: Sequence[str]
    skipped: Provenance

    def count(self, number: int) -> int:
        """Return the number of documents of a shard."""
        return (self.work / f"{stem(number)}.documents").stat().st_size // DOCUMENT.itemsize

    def blocks(self, number: int) -> Iterator[np.ndarray]:
        """Yield the documents of a shard, a bounded number at a time."""
        # Read, not mapped: pages of a map count as memory of the process.
        with open(self.work / f"{stem(number)}.documents", "rb") as file:
            while len(rows := np.fromfile(file, dtype=DOCUMENT, count=ROWS_AT_ONCE)):
                yield rows

    def all_blocks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the number of the shard, the index of the first document, and the documents of every block."""
        place = 0
        for number in range(len(self.parts)):
            for rows in self.blocks(number):
                yield number, place, rows
                place += len(rows)

    def validates(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return which documents of shard ``number`` validate by its file or their hash, [D] of bool."""
        part = self.parts[number]
        if part is not None:
            return np.full(len(rows), part == "val")
        return rows["hash"][:, 0] < np.uint64(int(self.val_split * 2**64))


@dataclass(frozen=True)
class Split:
    """What becomes of every document.

    Attributes:
        shards: all of them.
        dropped: [all documents] of bool: duplicates that are left out.
        rule: how it was decided, for the manifest.
        val_places: indices of the documents that validate, sorted; None where their file or hash decides.
        cut: index of a document whose last part validates, or None.
        kept_tokens: tokens of that document, its separator among them, that train.
        kept_bytes: bytes of that document that train, at least, whatever its tokens are.
    """

    shards: Shards
    dropped: np.ndarray
    rule: str
    val_places: np.ndarray | None = None
    cut: int | None = None
    kept_tokens: int = 0
    kept_bytes: int = 0

    def masks(self, number: int, place: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return which whole documents of a block are "train", "val" and "duplicates", each [D] of bool."""
        kept = ~self.dropped[place : place + len(rows)]
        if self.val_places is None:
            validates = self.shards.validates(number, rows)
        else:
            validates = np.isin(np.arange(place, place + len(rows)), self.val_places)
        whole = np.arange(place, place + len(rows)) != (-1 if self.cut is None else self.cut)
        return {"train": kept & whole & ~validates, "val": kept & whole & validates, "duplicates": ~kept}


def split_shards(shards: Shards, drop_duplicates: bool, tokenizer: Tokenizer) -> Split:
    """Return the split of the documents.

    The corpus's own validation files validate, where it has such; else the documents whose hash is below the share:
    the same ones whatever else is in the corpus, and copies of one together. Where few or very unequal documents make
    that less than half or more than twice the share of the bytes, they are chosen by size instead: in the order of
    their hashes, those that fit; and where these are less than half of the share, the last part of the largest
    document fills it up. Copies of that one are left out.

    Raises:
        UserError: there is too little text to split.
    """
    total = sum(shards.count(number) for number in range(len(shards.parts)))
    dropped = find_duplicates(shards) if drop_duplicates else np.zeros(total, dtype=bool)
    sizes = {"train": 0, "val": 0, "duplicates": 0}
    preset = Split(shards, dropped, "the corpus's own files")
    for number, place, rows in shards.all_blocks():
        for part, mask in preset.masks(number, place, rows).items():
            sizes[part] += int(rows["bytes"][mask].sum())
    text = sizes["train"] + sizes["val"]
    share = sizes["val"] / text if text else 0.0
    if any(shards.parts) and min(sizes["train"], sizes["val"]):
        return preset
    if shards.val_split / 2 <= share <= 2 * shards.val_split and 0 < share < 1:
        return Split(shards, dropped, "by a hash of each document")
    if total > AT_ONCE and 0 < share < 1:
        return Split(shards, dropped, "by a hash of each document; their sizes differ much")
    return _by_size(shards, dropped, text, tokenizer)


def _by_size(shards: Shards, dropped: np.ndarray, text: int, tokenizer: Tokenizer) -> Split:
    """Return the split by size that :func:`split_shards` describes."""
    blocks = [rows[["hash", "bytes"]] for _, _, rows in shards.all_blocks()]
    documents = np.concatenate(blocks) if blocks else np.zeros(0, dtype=DOCUMENT)[["hash", "bytes"]]
    kept = np.flatnonzero(~dropped)
    order = kept[np.lexsort((kept, documents["hash"][kept, 1], documents["hash"][kept, 0]))]
    hashes, sizes = documents["hash"][order], documents["bytes"][order].astype(np.int64)
    first = np.flatnonzero(np.concatenate([[True], (hashes[1:] != hashes[:-1]).any(axis=1)])[: len(order)])
    ends = np.append(first[1:], len(order))
    room = want = shards.val_split * text
    chosen: list[int] = []
    for group, (begin, end) in enumerate(zip(first.tolist(), ends.tolist(), strict=True)):
        size = int(sizes[begin:end].sum())
        if size <= room and len(chosen) + 1 < len(first):
            chosen.append(group)
            room -= size
    places = np.sort(np.concatenate([order[first[g] : ends[g]] for g in chosen])) if chosen else np.zeros(0, np.int64)
    if want - room >= want / 2:
        return Split(shards, dropped, "whole documents by size", places)
    left = [group for group in range(len(first)) if group not in set(chosen)]
    if not left:
        raise UserError("there is no text left to split")
    largest = max(left, key=lambda group: int(sizes[first[group]]))
    copies = order[first[largest] : ends[largest]]
    room -= shards.val_split * int(sizes[first[largest]]) * (len(copies) - 1)  # the copies are part of no share
    if room <= 0:
        return Split(shards, dropped, "whole documents by size", places)
    dropped[copies[1:]] = True
    kept_tokens = _tokens_that_train(shards, int(copies[0]), room, tokenizer)
    rule = "the last part of the largest document" if chosen or len(first) > 1 else "the last part of the text"
    rule = f"whole documents by size, and {rule}" if chosen else rule
    kept_bytes = max(0, int(sizes[first[largest]] - room))
    return Split(shards, dropped, rule, places, int(copies[0]), kept_tokens, kept_bytes)


def _tokens_that_train(shards: Shards, wanted: int, val_bytes: float, tokenizer: Tokenizer) -> int:
    """Return how many tokens of a document, its separator among them, come before the last ``val_bytes`` bytes."""
    for number in range(len(shards.parts)):
        start, count = 0, shards.count(number)
        if wanted >= count:
            wanted -= count
            continue
        rows = np.concatenate(list(shards.blocks(number)))
        start, length = int(rows["tokens"][:wanted].sum()), int(rows["tokens"][wanted])
        path, size = shards.work / f"{stem(number)}.tokens", tokenizer.dtype.itemsize
        tokens = np.fromfile(path, dtype=tokenizer.dtype, count=length, offset=start * size)
        bytes_ = token_lengths(tokenizer)[tokens, 0]
        bytes_[0] = 0  # the separator
        kept = max(2, int(np.searchsorted(np.cumsum(bytes_), bytes_.sum() - val_bytes, side="right")))
        # The last part begins with a character: the next one, or, where none is left, the one before.
        places: list[int] = [*range(kept, length), *range(min(kept, length) - 1, 1, -1)]
        for index in places:
            if not _continues(tokenizer.token_bytes(int(tokens[index]))):
                return index
        break
    raise UserError("there is too little text to split; give more text, or another --val_split to mmrec prepare")


def _continues(spelled: bytes) -> bool:
    """Whether a token begins inside a character."""
    return bool(spelled) and spelled[0] & 0xC0 == 0x80


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
