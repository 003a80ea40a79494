"""Your own text: a folder and its subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mmrec.core.errors import UserError
from mmrec.core.text_files import check_encoding, files_below, read_text
from mmrec.data.corpora.base import Corpus, Document, Options


class Directory(Corpus):
    """Every file of a folder whose name matches, as one document each, in the order of their paths.

    Hidden files and folders are left out, and so are empty files; links to folders are not followed.
    """

    def __init__(self, options: Options) -> None:
        if options.input_dir is None:
            raise UserError("the corpus 'directory' needs --input_dir")
        self.folder = options.input_dir
        self.encoding = options.encoding
        self.glob = options.glob
        self.title = f"the texts in {self.folder.name or self.folder}"

    def documents(self) -> Iterator[Document]:
        check_encoding(self.encoding)
        if not self.folder.exists():
            raise UserError(f"{self.folder}: no such folder")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: is not a folder; give a file as --input_file")
        matching = sorted(path for path in files_below(self.folder) if fnmatch(path.name, self.glob))
        paths = [path for path in matching if not _is_blank(path)]
        if not paths:
            raise UserError(f"{self.folder}: no text in files named {self.glob}; try another --glob, as '*.md'")
        if len(paths) < len(matching):
            print(f"{self.folder}: {len(matching) - len(paths):,} empty files left out")
        for path in paths:
            yield Document(str(path.relative_to(self.folder)), read_text(path, self.encoding))


def _is_blank(path: Path) -> bool:
    try:
        size = path.stat().st_size
        # White space alone is a matter of a few bytes; a longer file is left to read_text.
        return size == 0 or (size < 1024 and not path.read_bytes().strip())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
