"""Your own text: one file, or several that are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmrec.core.errors import UserError
from mmrec.core.text_files import is_blank, read_text
from mmrec.data.corpora.base import Corpus, Document, Options
from mmrec.data.provenance import NAMED_BEFORE


class File(Corpus):
    """The text of each file, as one document, in the order in which they are named; of several, no empty one.

    One that is named again is read once: what validates would else have been trained on.
    """

    def __init__(self, options: Options) -> None:
        if not options.files:
            raise UserError("the corpus 'file' needs --input_file, or the names of files after it")
        self.paths = options.files
        self.encoding = options.encoding
        names = ", ".join(path.name for path in self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        self.title = f"the file{'s' if len(self.paths) > 1 else ''} {names}"

    def documents(self) -> Iterator[Document]:
        if len(self.paths) == 1:
            yield Document(self.paths[0].name, read_text(self.paths[0], self.encoding))
            return
        paths: dict[Path, Path] = {}
        skipped: list[tuple[str, str]] = []
        for path in self.paths:
            if (place := path.resolve()) in paths:
                skipped.append((str(path), NAMED_BEFORE))
            elif path.is_file() and is_blank(path):
                skipped.append((str(path), "empty"))
            else:
                paths[place] = path
        if not paths:
            raise UserError(f"{self.title}: are all empty")
        self.skipped = skipped
        for path in paths.values():
            yield Document(str(path), read_text(path, self.encoding))
