"""Your own text: one file, or several that are named."""

from __future__ import annotations

from collections.abc import Iterator

from mmrec.core.errors import UserError
from mmrec.core.text_files import is_blank, read_text
from mmrec.data.corpora.base import Corpus, Document, Options


class File(Corpus):
    """The text of each file, as one document, in the order in which they are named; of several, no empty one."""

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
        blank = [path for path in self.paths if path.is_file() and is_blank(path)]
        self.skipped = [(str(path), "empty") for path in blank]
        if len(blank) == len(self.paths):
            raise UserError(f"{self.title}: are all empty")
        for path in self.paths:
            if path not in blank:
                yield Document(str(path), read_text(path, self.encoding))
