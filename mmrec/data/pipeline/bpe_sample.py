"""The documents from which a large corpus's BPE is learned: those that train, and none that validates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.split import Split
from mmrec.data.pipeline.tokenize_shard import documents, hash_of, read_json, write_json

SAMPLE_SHARDS, SAMPLE_BYTES = 16, 1 << 21
"""BPE is learned from the first documents of so many shards, so many bytes of each."""
MOST_MARGIN = 1 << 16
"""Bytes before the cut of a document that are left out: learned anew, its tokens end at other places."""


@dataclass(frozen=True)
class HeldOut:
    """Texts of the sampled shards that validate, where the split is not the one by hash that the sample assumes.

    Attributes:
        texts: the hashes of the whole documents, in hexadecimal.
        begins: for a document of which only the last part validates, by its hash, the bytes that may be learned from.
    """

    texts: frozenset[str] = frozenset()
    begins: Mapping[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_json(path, {"texts": sorted(self.texts), "begins": dict(self.begins)})

    @classmethod
    def load(cls, path: Path) -> HeldOut | None:
        """Return what :meth:`save` wrote, or None where there is none."""
        if not path.exists():
            return None
        saved = read_json(path)
        return cls(frozenset(saved["texts"]), saved["begins"])


def sampled(shards: Sequence[Shard]) -> list[int]:
    """Return the numbers of the shards that are learned from: training ones, from all over the corpus."""
    training = [number for number, shard in enumerate(shards) if shard.part != "val"]
    return training[:: max(1, len(training) // SAMPLE_SHARDS)][:SAMPLE_SHARDS]


def sample(shards: Sequence[Shard], text_field: str, val_split: float, held_out: HeldOut | None) -> Iterator[str]:
    """Yield documents, the same ones each time.

    Args:
        shards: of the corpus.
        text_field: of its records.
        val_split: share of the documents that validate by their hash; these are left out.
        held_out: what validates instead, once that is known.
    """
    for shard in (shards[number] for number in sampled(shards)):
        size = 0
        for record in documents(shard, text_field):
            if not isinstance(record, str):
                continue
            data = record.encode("utf-8")
            hash_ = hash_of(data)
            if held_out is not None:
                data = _learned_part(data, hash_, held_out)
            elif shard.part is None and int(hash_[0]) < int(val_split * 2**64):
                continue
            if data:
                yield data.decode("utf-8")
                size += len(data)
            if size >= SAMPLE_BYTES:
                break


def _learned_part(data: bytes, hash_: np.ndarray, held_out: HeldOut) -> bytes:
    """Return what may be learned from a document: all of it, its beginning or nothing."""
    name = hash_.tobytes().hex()
    if name in held_out.texts:
        return b""
    begin = held_out.begins.get(name)
    return data if begin is None else data[:begin].decode("utf-8", "ignore").encode("utf-8")


def find_held_out(shards: Sequence[Shard], split: Split) -> HeldOut:
    """Return what of the sampled shards validates by a split by size."""
    numbers = set(sampled(shards))
    texts: set[str] = set()
    begins: dict[str, int] = {}
    for number, place, rows in split.shards.all_blocks():
        if number not in numbers:
            continue
        for hash_ in rows["hash"][split.masks(number, place, rows)["val"]]:
            texts.add(hash_.tobytes().hex())
        if split.cut is not None and place <= split.cut < place + len(rows):
            kept = split.kept_bytes - min(MOST_MARGIN, split.kept_bytes // 16)
            begins[rows["hash"][split.cut - place].tobytes().hex()] = kept
    return HeldOut(frozenset(texts), begins)
