"""What a corpus is: a name, and documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Document:
    """One text that belongs together; a split never cuts one of several."""

    name: str
    text: str


@dataclass(frozen=True)
class Options:
    """What a user may say of where a corpus comes from; each corpus takes what concerns it.

    Args:
        files: of the corpus "file".
        input_dir: of the corpus "directory".
        encoding: of your own files.
        glob: names of the files that count in ``input_dir``; every text file if None.
        mirror: folder or URL used instead of the internet; the variable MMREC_MIRROR if None.
    """

    files: Sequence[Path] = ()
    input_dir: Path | None = None
    encoding: str = "utf-8"
    glob: str | None = None
    mirror: str | None = None


class Corpus(ABC):
    """A source of documents.

    Attributes:
        title: says to a person what it is.
        default_tokenizer: used where the user names none.
        skipped: files that :meth:`documents` left out, each with the reason; known once it has ended.
    """

    default_tokenizer: ClassVar[str] = "bytes"
    title: str
    skipped: Sequence[tuple[str, str]] = ()

    @abstractmethod
    def __init__(self, options: Options) -> None: ...

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield every document, in an order that does not change. UserError where they are not available."""
