"""Your own text: a folder and its subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mmrec.core.errors import UserError
from mmrec.core.text_files import check_encoding, files_below, is_blank, read_text
from mmrec.data.corpora.base import Corpus, Document, Options
from mmrec.data.pipeline.formats import FORMATS, reader_of
from mmrec.data.provenance import skipped_line
from mmrec.data.store import written_by_prepare


class Directory(Corpus):
    """Every text file of a folder, as one document each, in the order of their paths.

    Text files are those whose name ends as one (.txt, .md and the like, in any case), or matches the glob. Hidden
    files and folders, links to folders, what was prepared before, and empty files are left out.
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
        if self.glob is not None and ("/" in self.glob or not self.glob):
            raise UserError(f"--glob is {self.glob!r}; it is for names of files, in all subfolders: as '*.html'")
        if not self.folder.exists():
            raise UserError(f"{self.folder}: no such folder")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: is not a folder; give a file as --input_file")
        skipped: list[tuple[str, str]] = []
        paths: list[Path] = []

        def skip(path: Path, reason: str) -> None:
            skipped.append((str(path.relative_to(self.folder)), reason))

        for path in sorted(files_below(self.folder, skip, written_by_prepare)):
            if reason := self._reason_to_skip(path):
                skip(path, reason)
            else:
                paths.append(path)
        if not paths:
            asked = f"files named {self.glob or ', '.join(f'*.{suffix}' for suffix in _suffixes())}"
            rows = [{"file": file, "skipped": reason} for file, reason in skipped]
            there = f"; {skipped_line(rows, '')}" if rows else ""
            raise UserError(f"{self.folder}: no text in {asked}; try another --glob, as '*.html'{there}")
        self.skipped = sorted(skipped)
        for path in paths:
            yield Document(str(path.relative_to(self.folder)), read_text(path, self.encoding))

    def _reason_to_skip(self, path: Path) -> str:
        """Return why a file does not count, or an empty string."""
        if self.glob is not None and not fnmatch(path.name.lower(), self.glob.lower()):
            return f"not named {self.glob}"
        if self.glob is None and path.suffix.lower().removeprefix(".") not in _suffixes():
            readable = reader_of(str(path)) is not None
            return "no text file, but read without --input_dir" if readable else "no format that is read"
        return "empty" if is_blank(path) else ""


def _suffixes() -> list[str]:
    """Return the ends of the names of text files."""
    return [suffix for suffix, reader in FORMATS.items() if reader == "text"]
