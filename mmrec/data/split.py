"""The split of documents held in memory into a training and a validation text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from mmrec.data.corpora.base import Document

SEPARATOR = "\n\n"
"""Stands between two documents, in the text files as in the tokens."""


def split_documents(documents: Sequence[Document], val_split: float | None) -> tuple[str, str, dict[str, Any]]:
    """Split documents into a training and a validation text.

    One document is cut before its last part, as nanoGPT does. Of several, whole documents go to validation as long as
    they fit into its share, in an order that only their content decides; copies of one go together, so that nothing
    that validates has been trained on. Where these are less than half of the share, as all others are larger, the
    last part of the largest document fills it up; of the copies of that one, all but one are left out.

    Returns:
        The training text, the validation text, and what was done, for the manifest.
    """
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    total = sum(sizes)
    share, reason = (val_split, "as asked") if val_split is not None else default_split(total)
    split: dict[str, Any] = {"val_split": share, "reason": reason}
    copies: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        copies.setdefault(hashlib.sha256(document.text.encode("utf-8")).hexdigest(), []).append(index)
    if len(copies) < 2:
        text = SEPARATOR.join(document.text for document in documents[:1])
        cut = int(len(text) * (1 - share))
        return text[:cut], text[cut:], split | {"rule": "the last part of the text"}

    chosen: set[int] = set()
    room = share * total
    for key in sorted(copies):
        size = sum(sizes[index] for index in copies[key])
        if size <= room and len(chosen) + len(copies[key]) < len(documents):
            chosen |= set(copies[key])
            room -= size
    rule = "whole documents"
    train = [document.text for index, document in enumerate(documents) if index not in chosen]
    val = [documents[index].text for index in sorted(chosen)]
    largest = max(sorted(copies), key=lambda key: -1 if copies[key][0] in chosen else sizes[copies[key][0]])
    text = documents[copies[largest][0]].text
    is_short = room > share * total / 2
    room -= share * sizes[copies[largest][0]] * (len(copies[largest]) - 1)  # the copies are part of no share
    if is_short and room > 0 and len(text) > 1:
        cut = min(max(1, int(len(text) * (1 - room / sizes[copies[largest][0]]))), len(text) - 1)
        left_out = chosen | set(copies[largest][1:])
        others = [document.text for index, document in enumerate(documents) if index not in left_out]
        train = [text[:cut] if other == text else other for other in others]
        val.append(text[cut:])
        rule = f"whole documents, and the last part of {documents[copies[largest][0]].name}"
    elif not val:  # single characters
        train, val = [other for other in train if other != text], [text]
    parts = SEPARATOR.join(train), SEPARATOR.join(val)
    counts = {"train": len(train), "val": len(val)}
    bytes_ = [len(part.encode("utf-8")) for part in parts]
    return *parts, split | {"rule": rule, "documents": counts, "val_share": round(bytes_[1] / sum(bytes_), 4)}


def default_split(size: int) -> tuple[float, str]:
    """Return the share that validates for a text of ``size`` bytes, and why."""
    if size < 10**6:
        return 0.2, "the default under 1 MB"
    if size < 10**9:
        return 0.1, "the default from 1 MB to 1 GB"
    return 0.05, "the default from 1 GB on"
