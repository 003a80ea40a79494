"""What a preparation read, what it skipped and why: a line of JSON for each file, and a summary of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

SOURCES = "sources.jsonl"
"""Its name in a token folder."""
NAMED_BEFORE = "named before"
"""Why a file is not read a second time."""
NAMED = 5
"""Skipped files that the summary names."""


@dataclass
class Provenance:
    """The files of a source, in the order in which they are met.

    Attributes:
        rows: ``{"file", "documents", "bytes"}`` of one that was read, ``{"file", "skipped"}`` of one that was not.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def read(self, file: str, documents: int, size: int, rejected: int = 0) -> None:
        """Note that ``documents`` of ``size`` bytes were read from ``file``, and so many records set aside."""
        self.rows.append({"file": file, "documents": documents, "bytes": size, "rejected": rejected})

    def skip(self, file: str, reason: str) -> None:
        """Note that ``file`` was not read."""
        self.rows.append({"file": file, "skipped": reason})

    def skipped(self) -> list[dict[str, Any]]:
        """Return the rows of the files that were not read."""
        return [row for row in self.rows if "skipped" in row]

    def counts(self) -> dict[str, Any]:
        """Return for the manifest how many files were read, and how many were skipped for which reason."""
        reasons = Counter(row["skipped"] for row in self.skipped())
        return {"read": len(self.rows) - sum(reasons.values()), "skipped": dict(sorted(reasons.items()))}

    def encoded(self) -> bytes:
        """Return the rows as lines of JSON; a name that is not UTF-8 is spelled by escapes."""
        lines = (json.dumps(row, ensure_ascii=False) for row in self.rows)
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def skipped_line(rows: Sequence[dict[str, Any]], where: str = SOURCES) -> str:
    """Return a line for a person about the files that were skipped, or an empty string where there are none."""
    if not rows:
        return ""
    reasons = Counter(row["skipped"] for row in rows)
    names = ", ".join(PurePath(row["file"]).name for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    return f"{'skipped':<12}{len(rows):,} files ({why}): {names}" + (f"; see {where}" if where else "")
