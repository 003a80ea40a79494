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
