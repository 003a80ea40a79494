"""Your own text: one file."""

from __future__ import annotations

from collections.abc import Iterator

from mmrec.core.errors import UserError
from mmrec.core.text_files import read_text
from mmrec.data.corpora.base import Corpus, Document, Options


class File(Corpus):
    """The text of one file, as one document."""

    def __init__(self, options: Options) -> None:
        if options.input_file is None:
            raise UserError("the corpus 'file' needs --input_file")
        self.path = options.input_file
        self.encoding = options.encoding
        self.title = f"the file {self.path.name}"

    def documents(self) -> Iterator[Document]:
        yield Document(self.path.name, read_text(self.path, self.encoding))
