"""Units of work: what one worker reads from its first byte to its last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

UTF8 = "utf-8"


@dataclass(frozen=True)
class Shard:
    """A file, or a part of one.

    Attributes:
        reader: name of the function in :mod:`mmrec.data.pipeline.readers` that reads it.
        path: local, or a URL that fsspec knows.
        first: byte where the part begins.
        last: byte where it ends; None for the end of the file.
        part: "val" where all of it validates, "train" where none does, None where that is decided by document.
        encoding: of its text, where the format leaves that open.
    """

    reader: str
    path: str
    first: int = 0
    last: int | None = None
    part: str | None = None
    encoding: str = UTF8

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the usual encoding is left out, as in what earlier versions wrote."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("encoding", UTF8)}
